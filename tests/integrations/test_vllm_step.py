"""The arithmetic of the vLLM plug-in, without vLLM."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from wina.integrations.vllm.step import (
    STEP,
    DecodedChannels,
    Rows,
    merged_product,
    pack,
    step_linear,
    unpack,
)
from wina.kernels import reference
from wina.kernels.reference import mask_inputs

SPLITS = [7, 3, 3]
CHANNELS = 13
LIMIT = 0.5


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = vars(STEP).copy()
    yield
    vars(STEP).update(before)


def merged(seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x [5, K], weight [N, K], thresholds [3, K], bias [N])."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return (
        random(5, CHANNELS), random(sum(SPLITS), CHANNELS), random(3, CHANNELS).abs(),
        random(sum(SPLITS)),
    )  # fmt: skip


def expected(
    x: Tensor, weight: Tensor, thresholds: Tensor, bias: Tensor | None, rows: Rows,
    shift: Tensor | None = None, probes: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """In float64, part by part."""
    parts = []
    for i, (block, threshold) in enumerate(zip(weight.split(SPLITS), thresholds, strict=True)):
        scale = None if probes is None else reference.probe_scale(x, probes[i], LIMIT)
        masked = mask_inputs(x, threshold, scale)
        if isinstance(rows, Tensor):
            masked = torch.where(rows[:, None], masked, x)
        parts.append((masked if rows is not False else x).double() @ block.double().t())
    y = torch.cat(parts, dim=-1)
    if shift is not None and rows is not False:
        y = y + shift.double() * (rows[:, None] if isinstance(rows, Tensor) else 1)
    return y if bias is None else y + bias.double()


def test_pack_lays_each_part_k_major() -> None:
    _, weight, _, _ = merged()
    blocks = unpack(pack(weight, SPLITS), SPLITS)
    for block, part in zip(blocks, weight.split(SPLITS), strict=True):
        assert block.is_contiguous()
        assert torch.equal(block.t(), part)


@pytest.mark.parametrize("with_shift", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [True, False, torch.tensor([True, False, False, True, False])])
def test_each_part_has_its_own_mask_and_each_row_its_own_kind(
    rows: Rows, with_bias: bool, with_shift: bool
) -> None:
    x, weight, thresholds, bias = merged()
    used = bias if with_bias else None
    shift = bias.flip(0) if with_shift else None
    y = merged_product(x, pack(weight, SPLITS), thresholds, used, shift, SPLITS, rows)
    torch.testing.assert_close(
        y.double(), expected(x, weight, thresholds, used, rows, shift), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("rows", [True, False, torch.tensor([True, False, False, True, True])])
def test_probes_scale_the_thresholds_of_their_part(rows: Rows) -> None:
    x, weight, thresholds, bias = merged()
    probes = torch.randn(3, CHANNELS + 1)
    probes[1] = 0.0  # a part without one
    packed = pack(weight, SPLITS)
    y = merged_product(x, packed, thresholds, bias, None, SPLITS, rows, probes, LIMIT)
    want = expected(x, weight, thresholds, bias, rows, probes=probes)
    torch.testing.assert_close(y.double(), want, rtol=1e-5, atol=1e-5)
    plain = expected(x, weight, thresholds, bias, rows)
    assert torch.allclose(want, plain) == (rows is False)
    counter = DecodedChannels()
    STEP.observer, STEP.sparse_rows = counter, lambda tokens: rows
    step_linear(x, packed, thresholds, bias, None, SPLITS, "layer", probes, LIMIT)
    if rows is False:
        assert counter.seen == 0
        return
    sparse = x[rows] if isinstance(rows, Tensor) else x
    kept = [
        reference.keep_mask(sparse, threshold, reference.probe_scale(sparse, probe, LIMIT))
        for threshold, probe in zip(thresholds, probes, strict=True)
    ]
    assert counter.realised == pytest.approx(1 - float(torch.stack(kept).float().mean()))


def test_a_compiled_graph_asks_anew_in_every_step() -> None:
    x, weight, thresholds, _ = merged()
    packed = pack(weight, SPLITS)

    def forward(x: Tensor) -> Tensor:
        return step_linear(2 * x, packed, thresholds, None, None, SPLITS, "layer") + 1

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    kinds: list[Rows] = [False, True, torch.tensor([False, True, True, False, True])]
    for rows in kinds:
        STEP.sparse_rows = lambda tokens, rows=rows: rows  # type: ignore[misc]
        torch.testing.assert_close(
            compiled(x).double(),
            expected(2 * x, weight, thresholds, None, rows) + 1,
            rtol=1e-5,
            atol=1e-5,
        )


def test_channels_are_counted_where_rows_are_sparse() -> None:
    x, weight, thresholds, _ = merged()
    packed = pack(weight, SPLITS)
    counter = DecodedChannels()
    STEP.observer = counter
    step_linear(x, packed, thresholds, None, None, SPLITS, "layer")
    assert counter.realised == 0
    rows = torch.tensor([True, False, False, True, False])
    STEP.sparse_rows = lambda tokens: rows
    step_linear(x, packed, thresholds, None, None, SPLITS, "layer")
    dropped = sum(int((x[rows].abs() <= threshold).sum()) for threshold in thresholds)
    assert counter.realised == pytest.approx(dropped / (2 * 3 * CHANNELS))


def test_the_operator_is_sound() -> None:
    x, weight, thresholds, bias = merged()
    probes = torch.randn(3, CHANNELS + 1)
    arguments = (x, pack(weight, SPLITS), thresholds, bias, bias, SPLITS, "layer", probes, LIMIT)
    torch.library.opcheck(step_linear, arguments, test_utils=("test_schema", "test_faketensor"))
