"""Estimated loss changes against finite differences of the real loss, in float64."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from allocation_problem import problem_of
from torch import Tensor, nn

from wina.allocation.base import Problem
from wina.allocation.gradients import LossChange, OperatingPoint, loss_changes
from wina.statistics import ScoreHistogram
from wina.testing import tiny_model

SINKS = 2
GRID = (0.3, 0.7)
# Norms compute in float32 whatever the weights are: a smaller step drowns in rounding.
STEP = 0.03


@pytest.fixture
def problem() -> Problem:
    return problem_of(tiny_model("llama", torch.float64))


def logits(model: nn.Module, ids: Tensor, name: str, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Logits [S, vocabulary] with the input of one projection changed."""
    module = model.get_submodule(name)
    handle = module.register_forward_pre_hook(lambda _, args: (change(args[0]), *args[1:]))
    with torch.no_grad():
        output: Tensor = model(input_ids=ids).logits[0]
    handle.remove()
    return output


def masked_input(problem: Problem, name: str, x: Tensor, sparsity: float) -> Tensor:
    scores = problem.scores[name]
    histogram = ScoreHistogram()
    scores.count(histogram, x[:, SINKS:], sparsity)
    keep = scores.keep(x, scores.threshold(scores.cutoff(histogram, sparsity)), sparsity)
    keep[:, :SINKS] = True
    return torch.where(keep, x, 0.0)


def slopes(loss: Callable[[int, float], float], length: int) -> Tensor:
    """Central differences of the loss with respect to the change of each token's input."""
    rows = [(loss(t, STEP) - loss(t, -STEP)) / (2 * STEP) for t in range(SINKS, length)]
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("leaf", ["self_attn.v_proj", "mlp.up_proj", "mlp.down_proj"])
def test_dense_curvature(problem: Problem, leaf: str, monkeypatch: pytest.MonkeyPatch) -> None:
    direction = torch.randn(20, problem.model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    monkeypatch.setattr("wina.allocation.gradients._direction", lambda *_: direction)
    window = problem.windows[:1, :20]
    name = f"model.layers.0.{leaf}"
    found = loss_changes(problem, grids(problem), window)[name]
    for index, sparsity in enumerate(GRID):

        def loss(token: int, size: float, sparsity: float = sparsity) -> float:
            def change(x: Tensor) -> Tensor:
                moved = x.clone()
                sparse = masked_input(problem, name, x, sparsity)
                moved[:, token] += size * (sparse - x)[:, token]
                return moved

            scored = logits(problem.model, window, name, change)
            return float((direction * scored).sum())

        expected = slopes(loss, 20)
        assert found.first[index] == pytest.approx(float(expected.mean()), rel=0.01, abs=2e-5)
        assert found.second[index] == pytest.approx(float(expected.square().mean() / 2), rel=0.01)


def test_divergence_at_an_operating_point(problem: Problem) -> None:
    window = problem.windows[:1, :20]
    # The last projection: behind any other, masks flip with the step and the loss jumps.
    name = "model.layers.1.mlp.down_proj"
    every = {unit.name: 0.5 for unit in problem.units}
    point = OperatingPoint(problem.by_projection(every), problem.thresholds(every))
    found = loss_changes(problem, grids(problem), window, point)[name]
    others = [other for other in point.thresholds if other != name]

    def here(which: str, x: Tensor) -> Tensor:
        keep = problem.scores[which].keep(x, point.thresholds[which], 0.5)
        keep[:, :SINKS] = True
        return torch.where(keep, x, 0.0)

    dense = logits(problem.model, window, name, lambda x: x).log_softmax(-1)
    handles = [
        problem.model.get_submodule(other).register_forward_pre_hook(
            lambda _, args, other=other: (here(other, args[0]), *args[1:])
        )
        for other in others
    ]
    for index, sparsity in enumerate(GRID):

        def loss(size: float, sparsity: float = sparsity) -> float:
            def change(x: Tensor) -> Tensor:
                return here(name, x) + size * (
                    masked_input(problem, name, x, sparsity) - here(name, x)
                )

            sparse = logits(problem.model, window, name, change).log_softmax(-1)
            return float(F.kl_div(sparse, dense, reduction="sum", log_target=True))

        slope = (loss(STEP) - loss(-STEP)) / (2 * STEP) / (20 - SINKS)
        assert found.first[index] == pytest.approx(slope, rel=0.01, abs=2e-5)
    for handle in handles:
        handle.remove()


def test_moments_do_not_depend_on_the_batches() -> None:
    changes = torch.randn(2, 30, dtype=torch.float64)
    whole, parts = LossChange(GRID), LossChange(GRID)
    whole.add(changes)
    for part in changes.split(7, dim=1):
        parts.add(part)
    assert torch.allclose(whole.first, changes.mean(1))
    assert torch.allclose(whole.second, changes.square().mean(1) / 2)
    assert torch.allclose(parts.first, whole.first)
    assert torch.allclose(parts.second, whole.second)


def test_directions_have_the_curvature_of_the_divergence() -> None:
    from wina.allocation.gradients import _direction

    logits = torch.tensor([0.0, 2.0, -30.0, 1.0])
    v = _direction(logits.expand(50000, 4), torch.Generator().manual_seed(0))
    curvature = torch.func.hessian(
        lambda moved: F.kl_div(
            moved.log_softmax(-1), logits.log_softmax(-1), reduction="sum", log_target=True
        )
    )(logits)
    assert torch.allclose(v.t() @ v / len(v), curvature, atol=5e-3)
    assert torch.allclose(v.sum(-1), torch.zeros(()), atol=1e-5)


def grids(problem: Problem) -> dict[str, tuple[float, ...]]:
    return {p.name: GRID for unit in problem.units for p in unit.projections}
