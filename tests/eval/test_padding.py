"""A padded batch must choose the masks, and give the scores, of its rows one by one."""

from __future__ import annotations

import pytest
import torch
from conftest import plan_for
from torch import Tensor, nn

import wina
from wina.errors import ConfigError, PatchStateError
from wina.inspection import measure_sparsity
from wina.prefill import parse_prefill
from wina.switches import padded_batch
from wina.testing import random_tokens, tiny_model

PROTOCOLS = ("all", "last:0.99", "last:0.5", "dense")
LENGTHS = (23, 9, 3, 2, 1)
SIZE = 23


@pytest.fixture(scope="module")
def exact() -> nn.Module:
    """Float64, so that rounding moves no channel across its threshold."""
    return tiny_model("llama", torch.float64)


@pytest.mark.parametrize("spec", PROTOCOLS)
def test_positions_are_counted_from_each_rows_own_ends(spec: str) -> None:
    prefill = parse_prefill(spec, sink_tokens=2)
    right = prefill.sparse_tokens(LENGTHS, SIZE, "right")
    left = prefill.sparse_tokens(LENGTHS, SIZE, "left")
    for row, length in enumerate(LENGTHS):
        want = torch.arange(length) >= prefill.start(length)
        assert torch.equal(right[row, :length], want)
        assert torch.equal(left[row, SIZE - length :], want)
        assert not right[row, length:].any()
        assert not left[row, : SIZE - length].any()


def test_positions_refuse_what_does_not_fit() -> None:
    prefill = parse_prefill("all", 2)
    with pytest.raises(ConfigError, match="Known: left, right"):
        prefill.sparse_tokens([3], 4, "middle")
    for lengths in ([], [0, 3], [5]):
        with pytest.raises(ConfigError, match="do not fit into 4"):
            prefill.sparse_tokens(lengths, 4, "left")


def rows() -> list[Tensor]:
    return [random_tokens(length, seed=length) for length in LENGTHS]


def padded_logits(model: nn.Module, side: str) -> list[Tensor]:
    """Logits [length, vocabulary] of every row, all rows in one padded batch."""
    ids = torch.zeros(len(LENGTHS), SIZE, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for row, tokens in enumerate(rows()):
        where = slice(SIZE - len(tokens), SIZE) if side == "left" else slice(0, len(tokens))
        ids[row, where] = tokens
        mask[row, where] = 1
    # As `generate` numbers left-padded tokens; lm-eval gives right-padded ones no mask.
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    arguments = {"attention_mask": mask, "position_ids": positions} if side == "left" else {}
    with torch.no_grad():
        logits = model(ids, **arguments).logits
    return [
        logits[row, SIZE - length :] if side == "left" else logits[row, :length]
        for row, length in enumerate(LENGTHS)
    ]


def single_logits(model: nn.Module) -> list[Tensor]:
    with torch.no_grad():
        return [model(tokens[None]).logits[0] for tokens in rows()]


def largest_difference(a: list[Tensor], b: list[Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("spec", PROTOCOLS)
@pytest.mark.parametrize("selector", ["threshold", "relative", "topk", "importance"])
def test_padding_changes_no_mask_and_no_logit(
    exact: nn.Module, side: str, spec: str, selector: str
) -> None:
    wina.sparsify(exact, plan_for(exact, selector=selector), prefill=spec)
    try:
        with measure_sparsity(exact) as alone:
            want = single_logits(exact)
        with measure_sparsity(exact) as together, padded_batch(exact, LENGTHS, SIZE, side):
            got = padded_logits(exact, side)
        assert largest_difference(got, want) < 1e-9
        assert together.by_projection == alone.by_projection
        with padded_batch(exact, LENGTHS, SIZE, side):
            assert largest_difference(padded_logits(exact, side), want) < 1e-9
        if spec == "last:0.5" or (spec == "all" and side == "left"):
            assert largest_difference(padded_logits(exact, side), want) > 1e-3
    finally:
        wina.restore(exact)


def test_padded_batch_in_float32_with_every_backend() -> None:
    """Sparsity 0, where backends agree: the padded path computes what the others do."""
    model = tiny_model("llama")
    dense = padded_logits(model, "right")
    for backend in ("reference", "cpu"):
        wina.sparsify(model, plan_for(model, sparsity=0.0), prefill="all", backend=backend)
        with padded_batch(model, LENGTHS, SIZE, "right"):
            assert largest_difference(padded_logits(model, "right"), dense) < 1e-4
        with wina.dense(model), padded_batch(model, LENGTHS, SIZE, "right"):
            assert largest_difference(padded_logits(model, "right"), dense) < 1e-4
        wina.restore(model)


def test_the_reference_backend_is_dense_to_the_bit(llama: nn.Module) -> None:
    dense = padded_logits(llama, "right")
    wina.sparsify(llama, plan_for(llama, sparsity=0.0), prefill="all", backend="reference")
    with padded_batch(llama, LENGTHS, SIZE, "right"):
        assert largest_difference(padded_logits(llama, "right"), dense) == 0.0


def test_equal_lengths_need_nothing(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama), prefill="all")
    with padded_batch(llama, [4, 4], 4, "left"):
        assert llama._wina_patch.control.padded is None  # type: ignore[union-attr]


def test_another_shape_is_refused(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama), prefill="all")
    with padded_batch(llama, LENGTHS, SIZE, "right"):
        with pytest.raises(PatchStateError, match="one sequence at a time"):
            llama(random_tokens(11)[None])
        with torch.no_grad():
            llama(random_tokens(5)[:, None])  # decode steps pass
    llama(random_tokens(11)[None])


def test_gradients_flow_through_a_padded_batch(llama: nn.Module) -> None:
    plan = plan_for(llama)
    ids = random_tokens(2 * 12).view(2, 12)
    wina.sparsify(llama, plan, prefill="all", backend="reference")
    with padded_batch(llama, [12, 7], 12, "right"):
        loss = llama(ids).logits[1, :7].square().sum()
        loss.backward()
    together = llama.model.layers[0].mlp.up_proj.weight.grad.clone()  # type: ignore[union-attr]
    llama.zero_grad()
    llama(ids[1:, :7]).logits.square().sum().backward()
    torch.testing.assert_close(
        llama.model.layers[0].mlp.up_proj.weight.grad, together, rtol=1e-3, atol=1e-3
    )  # type: ignore[union-attr]
