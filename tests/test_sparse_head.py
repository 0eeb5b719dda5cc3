"""The language-model head among the projections."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import CALIBRATION, config, decode_logits, logits, plan_for
from torch import Tensor, nn

import wina
from wina.allocation import ALLOCATIONS
from wina.decoding.engines import Trimmed, choose_engine
from wina.decoding.head import head_dtype
from wina.errors import ConfigError, PatchStateError, UnsupportedModelError
from wina.inspection import measure_sparsity
from wina.linear import SparseLinear
from wina.plan import SparsityPlan
from wina.prefill import parse_prefill
from wina.projections import find_head, head_name
from wina.quantized_linear import QuantizedSparseLinear
from wina.switches import prefill_protocol
from wina.testing import random_tokens, tiny_model

WIDTHS = [None, "int8", "int4", "int4+int4"]


def head_of(model: Any) -> SparseLinear:
    head = model.get_output_embeddings()
    assert isinstance(head, SparseLinear)
    return head


def is_tied(model: Any) -> bool:
    return model.get_output_embeddings().weight is model.get_input_embeddings().weight


def sparse_decode(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad(), prefill_protocol(model, parse_prefill("all", 2)):
        found: Tensor = model(input_ids=tokens, use_cache=False).logits
    return found


def test_every_architecture_has_its_head_last(model: nn.Module, tokens: Tensor) -> None:
    dense = logits(model, tokens)
    plan = plan_for(model, head="sparse")
    name = head_name(model)
    assert name is not None
    assert list(plan.layers)[-1] == name
    assert plan.layers[name].projection == find_head(model)
    assert plan.layers[name].realised == pytest.approx(0.5, abs=0.02)
    torch.testing.assert_close(logits(model, tokens), dense)  # calibration changed nothing
    wina.sparsify(model, plan)
    assert head_of(model).name == name
    with wina.dense(model):
        torch.testing.assert_close(logits(model, tokens), dense, rtol=1e-4, atol=1e-5)
    wina.restore(model)
    assert torch.equal(logits(model, tokens), dense)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
def test_logits_are_the_product_of_kept_channels(
    width: str | None, tied: bool, tokens: Tensor
) -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=tied)
    assert is_tied(model) == tied
    embedding = model.get_input_embeddings().weight
    before = embedding.detach().clone()
    plan = plan_for(model, head="sparse", weight_dtype=width, rounding=width and "nearest")
    assert is_tied(model) == tied
    wina.sparsify(model, plan, keep_original=True)
    head = head_of(model)
    hidden: list[Tensor] = []
    handle = head.register_forward_pre_hook(lambda _, x: hidden.append(x[0]))
    found = sparse_decode(model, tokens)[0, 2:].double()
    handle.remove()
    x = hidden[0][0, 2:].double()
    planes = head.planes if isinstance(head, QuantizedSparseLinear) else 1
    x = torch.cat([x] * planes, dim=-1)
    kept = x.abs() > head.threshold.double()
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(found, (x * kept) @ head.matrix.double().t(), rtol=1e-4, atol=1e-4)
    assert model.get_input_embeddings().weight is embedding
    assert torch.equal(embedding, before)
    assert embedding.is_contiguous()  # a token's row is still one
    wina.restore(model)
    assert is_tied(model) == tied
    assert embedding.is_contiguous()


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("selector", ["threshold", "importance", "relative"])
def test_the_decode_program_reads_it(width: str | None, selector: str, tokens: Tensor) -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    wina.sparsify(
        model,
        plan_for(
            model, head="sparse", weight_dtype=width, rounding=width and "nearest",
            selector=selector,
        ),
    )  # fmt: skip
    engine = choose_engine(model)
    assert isinstance(engine, Trimmed), engine.reason
    engine.start(tokens[:, :8], None, tokens.shape[1])
    found = torch.stack([engine.step(token[None])[0] for token in tokens[0, 8:]])
    # A score at the cut-off may fall on either side of it, and a token with it.
    errors = (found - decode_logits(model, tokens)).abs().amax(-1)
    assert (errors < 1e-3).float().mean() > 0.8
    assert errors.max() < 0.2


def test_the_budget_is_spent_over_the_head_as_well(llama: nn.Module, tokens: Tensor) -> None:
    plan = plan_for(llama, head="sparse", method="wina-fisher", sparsity=0.4)
    weights = {name: layer.projection.weights for name, layer in plan.layers.items()}
    mean = sum(layer.sparsity * weights[name] for name, layer in plan.layers.items())
    assert mean / sum(weights.values()) == pytest.approx(0.4, abs=1e-6)
    name = head_name(llama)
    assert name is not None
    assert plan.layers[name].probe is not None
    assert plan.layers[name].sparsity != pytest.approx(0.4, abs=1e-3)
    wina.sparsify(llama, plan)
    with measure_sparsity(llama) as seen:
        sparse_decode(llama, tokens)
    assert seen.by_projection[name] > 0
    assert wina.inspect(llama).rows[-1].projection == name


def test_measurements_of_the_blocks_alone_are_not_taken_for_those_with_the_head(
    llama: nn.Module,
) -> None:
    measurements = wina.allocation.Measurements(0.6)
    for head, count in (("dense", 14), ("sparse", 15), ("dense", 14)):
        plan = wina.calibrate(
            llama, config=config(method="wina-fisher", head=head), texts=CALIBRATION,
            show_progress=False, measurements=measurements,
        )  # fmt: skip
        assert len(plan.layers) == count


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("keep", [True, False])
def test_saved_and_loaded(
    width: str | None, tied: bool, keep: bool, tokens: Tensor, tmp_path: Path
) -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=tied)
    plan = plan_for(model, head="sparse", weight_dtype=width)
    wina.sparsify(model, plan, keep_original=keep)
    want = sparse_decode(model, tokens)
    model.save_pretrained(tmp_path)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert isinstance(head_of(loaded), SparseLinear)
    torch.testing.assert_close(sparse_decode(loaded, tokens), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        loaded.get_input_embeddings().weight, model.get_input_embeddings().weight
    )


def test_plans_say_so_and_older_ones_have_a_dense_head(llama: nn.Module, tmp_path: Path) -> None:
    assert config(head="sparse").record()["head"] == "sparse"
    assert "head" not in config().record()
    plan_for(llama, head="sparse").save(tmp_path / "sparse")
    plan_for(llama).save(tmp_path / "dense")
    assert SparsityPlan.load(tmp_path / "sparse").config.head == "sparse"
    assert SparsityPlan.load(tmp_path / "dense").config.head == "dense"


@pytest.mark.parametrize(
    "settings",
    [
        {"correction": "bias"},
        {"method": "cats"},
    ],
)
def test_what_needs_the_heads_product_is_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=r"head 'sparse' needs|needs"):
        config(head="sparse", **settings)


def test_policies_of_blocks_are_refused() -> None:
    of_blocks = {name for name in ALLOCATIONS if ALLOCATIONS[name].by_block}
    assert of_blocks == {"greedy", "block-error", "growing"}
    for name in of_blocks:
        with pytest.raises(ConfigError, match="the head is in none"):
            config(head="sparse", allocation=name)


def test_unknown_settings_of_the_head() -> None:
    with pytest.raises(ConfigError, match="head 'half' is not known"):
        config(head="half")


def test_a_head_that_is_a_projection_has_its_width(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, head="sparse", weight_dtype="int8"))
    assert head_dtype(llama) is None
    with pytest.raises(ConfigError, match="among its projections"):
        head_dtype(llama, "int4")


def test_a_head_that_reads_something_else_is_refused(llama: Any) -> None:
    class Halved(nn.Module):
        def __init__(self, model: Any) -> None:
            super().__init__()
            self.inner = model
            self.config = model.config
            self.base_model = model.base_model

        def get_output_embeddings(self) -> nn.Module:
            return self.inner.lm_head  # type: ignore[no-any-return]

        def forward(self, **given: Any) -> Tensor:
            return self.inner.lm_head(self.inner.model(**given)[0] / 2)  # type: ignore[no-any-return]

    with pytest.raises(UnsupportedModelError, match="other than the decoder's output"):
        find_head(Halved(llama))


def test_a_model_without_a_head_is_told_so(llama: Any) -> None:
    with pytest.raises(UnsupportedModelError, match="has no language-model head"):
        find_head(llama.model)


@pytest.mark.parametrize(("prefill", "sparse"), [("dense", False), ("all", True)])
def test_the_logits_after_a_prompt_follow_the_prefill_protocol(
    llama: nn.Module, prefill: str, sparse: bool, tokens: Tensor
) -> None:
    """Although the head is given the last hidden state alone, as in a decode step."""
    dense = logits(llama, tokens)[:, -1]
    wina.sparsify(llama, plan_for(llama, head="sparse"), prefill=prefill)
    llama = copy.deepcopy(llama)
    with torch.no_grad():
        whole = llama(input_ids=tokens).logits
        last = llama(input_ids=tokens, logits_to_keep=1).logits[:, -1]
        three = llama(input_ids=tokens, logits_to_keep=3).logits
        torch.testing.assert_close(last, whole[:, -1], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(three, whole[:, -3:], rtol=1e-4, atol=1e-5)
        assert ((last - dense).abs().max() > 1e-3) == sparse
        # A hidden state by itself is a decode step, whatever the head was given before, and so is
        # a token, whatever the decoder was given without its head.
        head = head_of(llama)
        x = torch.randn(1, 1, head.in_features)
        kept = x * (x.abs() > head.threshold)
        torch.testing.assert_close(head(x), kept @ head.weight.t(), rtol=1e-4, atol=1e-5)
        step = llama(input_ids=tokens[:, :1]).logits
        llama.model(input_ids=tokens)  # type: ignore[operator]
        assert torch.equal(llama(input_ids=tokens[:, :1]).logits, step)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled(llama: nn.Module, backend: str, tokens: Tensor) -> None:
    wina.sparsify(llama, plan_for(llama, head="sparse"))
    torch.compiler.reset()
    compiled = torch.compile(llama, backend=backend)
    with torch.no_grad():
        for ids in (tokens, tokens[:, :1]):
            want = llama(ids, use_cache=False, logits_to_keep=1).logits
            found = compiled(ids, use_cache=False, logits_to_keep=1).logits
            assert (found - want).abs().median() <= 1e-4


def test_a_head_that_is_no_linear_layer_is_refused(llama: Any) -> None:
    llama.lm_head = nn.Sequential(llama.lm_head)
    with pytest.raises(UnsupportedModelError, match="lm_head is a Sequential: set head='dense'"):
        find_head(llama)


def test_a_sparse_head_is_not_replaced_in_silence() -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=True)
    wina.sparsify(model, plan_for(model, head="sparse"))
    for call in (lambda: model.resize_token_embeddings(270), model.tie_weights):
        with pytest.raises(PatchStateError, match=r"wina.restore\(model\) before"):
            call()
    wina.restore(model)
    model.tie_weights()
    model.resize_token_embeddings(270)
    assert model.lm_head.weight is model.get_input_embeddings().weight


def test_what_is_trained_beside_a_sparse_head_that_is_tied_stays_when_it_is_restored() -> None:
    model: Any = tiny_model("llama", tie_word_embeddings=True)
    wina.sparsify(model, plan_for(model, head="sparse", sparsity=0.0))
    tokens = random_tokens(32)[None]
    assert not model.lm_head.weight.requires_grad
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    before = model.get_input_embeddings().weight.detach().clone()
    model(tokens, labels=tokens).loss.backward()
    optimizer.step()
    trained = model.get_input_embeddings().weight.detach().clone()
    assert not torch.equal(trained, before)
    wina.restore(model)
    assert torch.equal(model.lm_head.weight, trained)
