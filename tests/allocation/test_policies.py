"""Every policy on tiny models; the shared matrix covers a new one without a new test."""

from dataclasses import replace

import pytest
import torch
from allocation_problem import problem_of
from conftest import plan_for
from torch import Tensor, nn

import wina
from wina.allocation import ALLOCATIONS
from wina.allocation.blocks import Block, visit_blocks
from wina.errors import ConfigError
from wina.methods import METHODS
from wina.plan import weighted_mean
from wina.registry import create
from wina.testing import tiny_model

# Coarse, so that the matrix takes a moment; block-wise policies rerun blocks for every step.
QUICK = {"greedy": "greedy:step=0.4:tokens=128"}
# "gated" reaches two projections only: tests/test_gate_mask.py.
SPECS = [QUICK.get(name, name) for name in ALLOCATIONS if name != "gated"] + ["fisher:rounds=2"]


def quick_plan(model: nn.Module, **settings: object) -> wina.SparsityPlan:
    return plan_for(model, **{"calibration_tokens": 512, **settings})


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "phi3", "gpt_neox", "falcon"])
def test_budget_of_bytes_is_met(spec: str, model_type: str) -> None:
    model = tiny_model(model_type)
    plan = quick_plan(model, allocation=spec, sparsity=0.6)
    layers = plan.layers.values()
    asked = weighted_mean(
        [layer.projection for layer in layers],
        {layer.projection.name: layer.sparsity for layer in layers},
    )
    assert asked == pytest.approx(0.6, abs=1e-9)
    assert all(0.0 <= layer.sparsity <= 0.95 for layer in layers)
    assert plan.realised == pytest.approx(0.6, abs=0.01)
    for layer in layers:
        assert layer.realised == pytest.approx(layer.sparsity, abs=0.02)


@pytest.mark.parametrize("spec", SPECS)
def test_model_is_left_as_it_was(llama: nn.Module, spec: str, tokens: Tensor) -> None:
    llama.model.layers[1].mlp.train()  # type: ignore[union-attr,index]
    next(llama.parameters()).requires_grad_(False)
    gradient = torch.ones(1)
    llama.model.norm.weight.grad = gradient.expand(64).clone()  # type: ignore[union-attr]
    state = {name: value.clone() for name, value in llama.state_dict().items()}
    flags = [parameter.requires_grad for parameter in llama.parameters()]
    gradients = [parameter.grad for parameter in llama.parameters()]
    quick_plan(llama, allocation=spec)
    assert all(torch.equal(state[name], value) for name, value in llama.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in llama.parameters()]
    found = [parameter.grad for parameter in llama.parameters()]
    assert all(a is b for a, b in zip(gradients, found, strict=True))
    for module in llama.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks
        assert "forward" not in module.__dict__
    wina.sparsify(llama, quick_plan(llama, allocation=spec))
    wina.restore(llama)


@pytest.mark.parametrize("spec", SPECS)
def test_same_result_every_time(llama: nn.Module, spec: str) -> None:
    a, b = (quick_plan(llama, allocation=spec).layers for _ in range(2))
    assert [layer.sparsity for layer in a.values()] == [layer.sparsity for layer in b.values()]


@pytest.mark.parametrize("spec", SPECS)
def test_groups_that_share_a_mask_share_their_sparsity(llama: nn.Module, spec: str) -> None:
    plan = quick_plan(llama, allocation=spec, mask="group")
    q, k, v, _, gate, up, _ = list(plan.layers.values())[:7]
    assert torch.equal(q.threshold, k.threshold)
    assert torch.equal(q.threshold, v.threshold)
    assert torch.equal(gate.threshold, up.threshold)
    assert plan.realised == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("selector", ["relative", "topk", "importance"])
@pytest.mark.parametrize("spec", SPECS)
def test_every_selector(llama: nn.Module, spec: str, selector: str) -> None:
    plan = quick_plan(llama, allocation=spec, selector=selector)
    assert plan.realised == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("spec", SPECS)
def test_sparsity_zero_allocates_nothing(llama: nn.Module, spec: str) -> None:
    assert quick_plan(llama, allocation=spec, sparsity=0.0).realised == 0.0


def test_plan_says_what_allocated_it(llama: nn.Module) -> None:
    plan = quick_plan(llama, method="wina", allocation="fisher:most=0.8")
    assert plan.calibration["allocation"] == "fisher:most=0.8"
    assert plan.calibration["criterion"] == "l2-norm"
    assert max(layer.sparsity for layer in plan.layers.values()) <= 0.8
    assert quick_plan(llama).calibration["allocation"] == "uniform"


@pytest.mark.parametrize("spec", ["fisher", "block-error", "greedy:step=0.4", "growing"])
def test_policies_disagree_with_uniform(llama: nn.Module, spec: str) -> None:
    plan = quick_plan(llama, allocation=spec)
    assert len({round(layer.sparsity, 6) for layer in plan.layers.values()}) > 1


@pytest.mark.parametrize(
    "spec",
    ["fisher:rounds=0", "fisher:rounds=1.5", "fisher:most=2", "greedy:step=0", "growing:x=1"],
)
def test_parameters_are_checked(spec: str) -> None:
    with pytest.raises(ConfigError):
        wina.SparsityConfig(allocation=spec)


def test_out_of_reach_says_so(llama: nn.Module) -> None:
    for spec in ("fisher:most=0.4", "greedy:step=0.4:most=0.4"):
        with pytest.raises(ConfigError, match="out of reach"):
            quick_plan(llama, allocation=spec)


def test_every_method_declares_its_needs() -> None:
    assert METHODS["wina"].needs == "nothing"
    assert METHODS["teal-greedy"].needs.startswith("activations")
    assert METHODS["wina-fisher"].needs.startswith("gradients")


def test_tokens_are_whole_windows_from_all_of_the_text(llama: nn.Module) -> None:
    problem = problem_of(llama)
    assert torch.equal(problem.tokens(100), problem.windows[:1])
    assert torch.equal(problem.tokens(20), problem.windows[:1, :20])
    assert torch.equal(problem.tokens(10**9), problem.windows)
    assert torch.equal(problem.tokens(128), problem.windows[[0, -1]])


def test_greedy_path_of_a_block() -> None:
    """Budget, bound and the first step, which must be the cheapest of all first steps."""

    model = tiny_model("llama")
    spy = {}

    def visit(block: Block) -> None:
        policy = create(ALLOCATIONS, "greedy:step=0.2:tokens=64")
        total = block.weights
        size = 0.2 * block.units[0].weights
        dense = {unit.name: 0.0 for unit in block.units}
        errors = {
            unit.name: block.error({**dense, unit.name: size / unit.weights}, 0.25)
            for unit in block.units
        }
        small = policy._steps(block, 0.3)  # type: ignore[attr-defined]
        cheapest = min(errors, key=errors.__getitem__)
        assert small[0] == (cheapest, pytest.approx(size))
        block.settle(dense)
        large = policy._steps(block, 0.6)  # type: ignore[attr-defined]
        assert large[: len(small)] == small, "one path for all budgets"
        assert sum(weights for _, weights in large) >= 0.6 * total
        spy[block.units[0].name] = large

    problem = problem_of(model)
    visit_blocks(problem, problem.tokens(64), visit, "")
    assert len(spy) == 2
    for budget in (0.3, 0.6):
        asked = replace(problem, sparsity=budget)
        found = create(ALLOCATIONS, "greedy:step=0.2:tokens=64").allocate(asked)
        for block in (0, 1):
            units = [u for u in problem.units if u.projections[0].block == block]
            spent = sum(found[unit.name] * unit.weights for unit in units)
            assert spent == pytest.approx(budget * sum(unit.weights for unit in units))


def test_block_error_is_that_of_the_masked_block() -> None:

    model = tiny_model("llama")
    problem = problem_of(model)
    found = []

    def visit(block: Block) -> None:
        dense = {unit.name: 0.0 for unit in block.units}
        assert block.error(dense) == 0.0
        half = dict.fromkeys(dense, 0.5)
        error = block.error(half)
        assert error > 0
        block.settle(half)
        # Nothing differs from the settled state but the last projection.
        last = block.units[-1].name
        assert block.error({**half, last: 0.0}) != error
        assert block.error(half) == pytest.approx(error, rel=1e-6)
        found.append(error)

    visit_blocks(problem, problem.windows, visit, "")
    assert len(found) == 2
