"""Fused experts: recognised by numbers, calibrated one by one, sparse while decoding."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import CALIBRATION, config, decode_logits, logits, plan_for
from torch import Tensor, nn

import wina
from wina.errors import PlanError
from wina.experts import FEWEST_TOKENS, ROLES, recognise_experts
from wina.inspection import measure_sparsity
from wina.projections import find_experts
from wina.sparse_experts import SparseExperts
from wina.testing import random_tokens, tiny_model

MIXTURES = ["mixtral", "qwen3_moe", "olmoe", "gpt_oss"]


@pytest.fixture(params=MIXTURES)
def mixture(request: pytest.FixtureRequest) -> nn.Module:
    return tiny_model(request.param)


def experts_of(model: nn.Module) -> list[SparseExperts]:
    return [m for m in model.modules() if isinstance(m, SparseExperts)]


def route(module: SparseExperts, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, ids of two different experts a token, and routing weights."""
    E = module.fused.experts
    x = torch.randn(tokens, module.fused.shape("gate_up_proj")[1])
    first = torch.randint(0, E, (tokens, 1))
    return x, torch.cat([first, (first + 1) % E], dim=1), torch.rand(tokens, 2)


def test_found_with_shapes_and_the_number_of_experts_a_token_passes(mixture: nn.Module) -> None:
    chosen = mixture.config.num_experts_per_tok  # type: ignore[union-attr]
    found = find_experts(mixture)
    assert len(found) == 2
    for name, (fused, projections) in found.items():
        assert [p.name for p in projections] == [f"{name}.{role}" for role in ROLES]
        assert [p.copies for p in projections] == [chosen, chosen]
        gate_up, down = projections
        assert (gate_up.in_features, down.out_features) == (64, 64)
        assert gate_up.out_features == 2 * down.in_features
        assert gate_up.weights == 64 * gate_up.out_features * chosen
        assert fused.experts == len(fused.module.down_proj)


def test_decode_equals_a_float64_reference(mixture: nn.Module) -> None:
    """Every chosen expert's masked products, summed up in float64 without any of our modules."""
    wina.sparsify(mixture, plan_for(mixture))
    for module in experts_of(mixture):
        x, ids, routing = route(module, 3)
        want = torch.zeros(3, x.shape[1], dtype=torch.float64)
        for t in range(3):
            for slot in range(2):
                e = int(ids[t, slot])
                h = x[t]
                for role in ROLES:
                    threshold = getattr(module, f"{role}_threshold")[e]
                    h = torch.where(h.abs() <= threshold, 0.0, h).double()
                    bias = module.fused.bias(role, e)
                    h = F.linear(
                        h,
                        module.fused.weight(role, e).double(),
                        None if bias is None else bias.double(),
                    )
                    if role == "gate_up_proj":
                        h = module.fused.module._apply_gate(h.float())
                want[t] += h * routing[t, slot]
        module.rows = (3, 1)
        with torch.no_grad():
            got = module(x, ids, routing)
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_router_is_untouched_and_prefill_dense(mixture: nn.Module, tokens: Tensor) -> None:
    dense = logits(mixture, tokens)
    routers = {
        n: p.clone() for n, p in mixture.named_parameters() if ".gate." in n or "router" in n
    }
    assert routers
    wina.sparsify(mixture, plan_for(mixture))
    torch.testing.assert_close(logits(mixture, tokens), dense, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(mixture.get_parameter(name), routers[name]) for name in routers)
    assert not torch.allclose(decode_logits(mixture, tokens), dense[0, 8:], atol=1e-2)


@pytest.mark.parametrize("prefill", ["all", "last:0.5"])
def test_masked_prefill_equals_tokens_one_by_one(prefill: str) -> None:
    model = tiny_model("mixtral")
    wina.sparsify(model, plan_for(model), prefill=prefill)
    module = experts_of(model)[0]
    x, ids, routing = route(module, 8)
    start = module.control.prefill.start(8)
    with torch.no_grad():
        module.rows = (1, 8)
        got = module(x, ids, routing)
        module.rows = (8, 1)
        sparse = module(x, ids, routing)
        with wina.dense(model):
            dense = module(x, ids, routing)
    assert not torch.allclose(sparse, dense, atol=1e-3)
    torch.testing.assert_close(got[:start], dense[:start], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got[start:], sparse[start:], rtol=1e-4, atol=1e-4)


def test_a_batch_of_decode_steps_is_sparse_and_a_prompt_of_the_same_size_is_not() -> None:
    model = tiny_model("olmoe")
    wina.sparsify(model, plan_for(model))
    with measure_sparsity(model) as counter, torch.no_grad():
        model(random_tokens(4)[None])
    assert counter.mean == 0.0
    with measure_sparsity(model) as counter, torch.no_grad():
        model(random_tokens(4)[:, None])
    assert all(0.2 < share < 0.8 for name, share in counter.by_projection.items() if "exp" in name)


def test_experts_with_few_tokens_take_the_cutoff_of_all(mixture: nn.Module) -> None:
    settings = config(calibration_tokens=64, window=32)
    plan = wina.calibrate(mixture, config=settings, texts=CALIBRATION, show_progress=False)
    few = [layer for layer in plan.experts.values() if (layer.tokens < FEWEST_TOKENS).any()]
    assert few
    for layer in few:
        assert len(layer.cutoff[layer.tokens < FEWEST_TOKENS].unique()) == 1
        assert (layer.cutoff > 0).all()
    wina.sparsify(mixture, plan)
    assert "with the cut-off of all" in str(wina.inspect(mixture))


def test_realised_counts_active_experts(mixture: nn.Module, tokens: Tensor) -> None:
    plan = plan_for(mixture)
    assert plan.realised == pytest.approx(0.5, abs=0.01)
    for layer in plan.experts.values():
        assert layer.realised == pytest.approx(0.5, abs=0.02)
        passes = int(layer.tokens.sum())
        assert passes == layer.projection.copies * (1024 - 2 * 8)  # 8 windows without their sinks
    wina.sparsify(mixture, plan)
    with measure_sparsity(mixture) as counter:
        decode_logits(mixture, tokens)
    assert 0.4 < counter.mean < 0.6


def test_several_passes_count_every_token_once(monkeypatch: pytest.MonkeyPatch) -> None:
    import wina.calibration

    monkeypatch.setattr(wina.calibrator, "CHUNK_TOKENS", 256)
    plan = plan_for(tiny_model("mixtral"))
    for layer in plan.experts.values():
        assert int(layer.tokens.sum()) == 2 * (1024 - 2 * 8)


@pytest.mark.parametrize("method", ["wina-fisher", "teal-greedy", "was"])
def test_policies_divide_what_is_not_experts(method: str) -> None:
    plan = plan_for(tiny_model("mixtral"), method=method)
    assert len({layer.sparsity for layer in plan.layers.values()}) > 1
    assert {layer.sparsity for layer in plan.experts.values()} == {0.5}
    assert plan.realised == pytest.approx(0.5, abs=0.03)


def test_experts_keep_their_width_when_projections_are_rounded(tokens: Tensor) -> None:
    model = tiny_model("mixtral")
    wina.sparsify(model, plan_for(model, weight_dtype="int8"))
    widths = {
        row.projection.rpartition(".")[2]: row.weight_dtype for row in wina.inspect(model).rows
    }
    assert (widths["q_proj"], widths["gate_up_proj"]) == ("int8", "float32")
    assert decode_logits(model, tokens).isfinite().all()


def test_plan_is_saved_and_checked(tmp_path: Path) -> None:
    model = tiny_model("gpt_oss")
    plan = plan_for(model)
    again = wina.SparsityPlan.load(plan.save(tmp_path))
    assert list(again.experts) == list(plan.experts)
    for name, layer in plan.experts.items():
        assert again.experts[name].projection == layer.projection
        for key in ("cutoff", "threshold", "tokens", "sample"):
            assert torch.equal(getattr(again.experts[name], key), getattr(layer, key))
    wina.sparsify(model, again)
    other: Any = tiny_model("gpt_oss")
    with torch.no_grad():
        other.model.layers[0].mlp.experts.down_proj.mul_(1.1)
    with pytest.raises(PlanError, match=r"experts\.down_proj has other weights"):
        wina.sparsify(other, plan)


def test_gradients_flow(tokens: Tensor) -> None:
    model = tiny_model("mixtral")
    wina.sparsify(model, plan_for(model), prefill="all")
    model(tokens, labels=tokens).loss.backward()
    for module in experts_of(model):
        for role in ROLES:
            assert getattr(module, role).grad.isfinite().all()
            assert getattr(module, role).grad.abs().sum() > 0


def test_a_cast_a_copy_and_another_formula(tokens: Tensor) -> None:
    model: Any = tiny_model("qwen3_moe")
    wina.sparsify(model, plan_for(model))
    twin = copy.deepcopy(model)
    wina.restore(model)
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert decode_logits(twin.to(torch.bfloat16), tokens).isfinite().all()
    assert experts_of(twin)[0].gate_up_proj_threshold.dtype == torch.float32
    experts = model.model.layers[0].mlp.experts
    assert recognise_experts(experts) is not None
    experts.forward = lambda x, ids, routing: 2 * x
    assert recognise_experts(experts) is None
    assert "Experts" in wina.inspect(model).dense[0].reason
