"""What the paper proves, checked against brute force (arXiv 2505.19427, Section 3)."""

from itertools import combinations

import pytest
import torch
from torch import Tensor

from wina.criteria import CRITERIA
from wina.kernels.reference import keep_mask
from wina.registry import create
from wina.selectors import TopK

K, N, KEPT = 8, 12, 4
DRAWS = 200


def kept_set(criterion: str, weight: Tensor, x: Tensor) -> Tensor:
    constants = create(CRITERIA, criterion).constants([weight], torch.Generator())
    threshold = 1.0 / constants
    sparsity = 1 - KEPT / x.shape[-1]
    return keep_mask(x, threshold, TopK().scale(x, threshold, sparsity))


def error(weight: Tensor, x: Tensor, keep: Tensor) -> float:
    return float((weight @ (x * ~keep)).norm())


def best_error(weight: Tensor, x: Tensor) -> float:
    best = float("inf")
    for kept in combinations(range(K), KEPT):
        keep = torch.zeros(K, dtype=torch.bool)
        keep[list(kept)] = True
        best = min(best, error(weight, x, keep))
    return best


def column_orthogonal() -> Tensor:
    """Orthogonal columns of very unequal length."""
    q, _ = torch.linalg.qr(torch.randn(N, K, dtype=torch.float64))
    return q * torch.exp(torch.randn(K, dtype=torch.float64))


def test_wina_attains_the_optimum_for_orthogonal_columns() -> None:
    for _ in range(DRAWS):
        weight, x = column_orthogonal(), torch.randn(K, dtype=torch.float64)
        keep = kept_set("l2-norm", weight, x)
        assert keep.sum() == KEPT
        assert error(weight, x, keep) <= best_error(weight, x) * (1 + 1e-9)


def test_teal_does_not() -> None:
    worse = 0
    for _ in range(DRAWS):
        weight, x = column_orthogonal(), torch.randn(K, dtype=torch.float64)
        worse += error(weight, x, kept_set("magnitude", weight, x)) > 1.001 * best_error(weight, x)
    assert worse > DRAWS / 2


@pytest.mark.parametrize("kept", [0.35, 0.5, 0.75])
def test_wina_beats_teal_on_heavy_tailed_column_norms(kept: float) -> None:
    channels = 256
    weight = torch.randn(128, channels, dtype=torch.float64)
    weight *= torch.distributions.StudentT(2.0).sample((channels,)).abs().double()
    x = torch.randn(500, channels, dtype=torch.float64)
    errors = {}
    for criterion in ("l2-norm", "magnitude", "random"):
        constants = create(CRITERIA, criterion).constants([weight], torch.Generator())
        threshold = 1.0 / constants
        keep = keep_mask(x, threshold, TopK().scale(x, threshold, 1 - kept))
        errors[criterion] = ((x * ~keep) @ weight.t()).norm(dim=-1).mean()
    assert errors["l2-norm"] < errors["magnitude"] < errors["random"]


def kept_above(weight: Tensor, x: Tensor, cutoff: float) -> Tensor:
    """WINA's mask with a cut-off on |x_j|·‖W_:,j‖."""
    return keep_mask(x, (cutoff / weight.norm(dim=0)).float())


def test_the_bound_with_a_threshold() -> None:
    """docs/mathematics.md, (3): ‖e‖² ≤ m·τ² for orthogonal columns."""
    weight, x = column_orthogonal(), torch.randn(DRAWS, K, dtype=torch.float64)
    cutoff = float((x.abs() * weight.norm(dim=0)).median())
    dropped = ~kept_above(weight, x, cutoff)
    errors = ((x * dropped) @ weight.t()).square().sum(dim=-1)
    assert (errors <= dropped.sum(dim=-1) * cutoff**2 * (1 + 1e-6)).all()
    expected = (x * dropped).square() @ weight.square().sum(dim=0)  # (2)
    torch.testing.assert_close(errors, expected)


def test_the_bounds_for_any_columns() -> None:
    """(6), and that WINA's mask is within κ of the best one of its size."""
    for _ in range(DRAWS):
        weight = torch.randn(N, K, dtype=torch.float64) * torch.exp(torch.randn(K).double())
        x = torch.randn(K, dtype=torch.float64)
        norms = weight.norm(dim=0)
        least, *_, most = torch.linalg.eigvalsh((weight / norms).t() @ (weight / norms)).tolist()
        keep = kept_set("l2-norm", weight, x)
        separate = float((x * norms * ~keep).square().sum())
        squared = error(weight, x, keep) ** 2
        assert least * separate * (1 - 1e-9) <= squared <= most * separate * (1 + 1e-9)
        assert squared <= most / least * best_error(weight, x) ** 2 * (1 + 1e-9)


@pytest.mark.parametrize(("sparsity", "lost"), [(0.5, 0.071), (0.65, 0.168)])
def test_the_energy_below_the_cut_off_of_half_normal_scores(sparsity: float, lost: float) -> None:
    """(5): s − 2·τ·φ(τ), against a sample."""
    normal = torch.distributions.Normal(0.0, 1.0)
    cutoff = normal.icdf(torch.tensor((1 + sparsity) / 2))
    share = float(sparsity - 2 * cutoff * normal.log_prob(cutoff).exp())
    assert share == pytest.approx(lost, abs=5e-4)
    scores = torch.randn(1_000_000).abs()
    sampled = scores.square()[scores <= cutoff].sum() / scores.square().sum()
    assert float(sampled) == pytest.approx(share, abs=2e-3)


def test_two_planes_leave_a_tenth_of_the_energy_that_dropping_does() -> None:
    """docs/mathematics.md, (12): half of 8 bits, read as 8, 4 or none of each channel."""
    scores = torch.randn(1_000_000).abs()
    both = torch.cat([scores, 0.1 * scores])
    first, second = (both > both.median()).chunk(2)
    left = torch.where(first, torch.where(second, 0.0, (0.1 * scores).square()), scores.square())
    assert float((~first).float().mean()) == pytest.approx(0.12, abs=5e-3)
    assert float((first & ~second).float().mean()) == pytest.approx(0.75, abs=0.01)
    assert float(left.sum() / scores.square().sum()) == pytest.approx(0.0060, abs=2e-4)


def test_one_cut_off_on_all_planes_is_the_best_choice_of_its_bytes() -> None:
    """(11) and (12) against all choices of as many planes of channels."""
    whole = column_orthogonal().norm(dim=0)
    for x in torch.randn(20, K, dtype=torch.float64):
        costs = torch.stack([(x * whole).square(), (0.1 * x * whole).square()])
        chosen = tuple(costs.view(-1).topk(K).indices.tolist())

        def left(read: tuple[int, ...], costs: Tensor = costs) -> float:
            kept = torch.zeros(2, K, dtype=torch.bool)
            kept.view(-1)[list(read)] = True
            return float(torch.where(kept[0], torch.where(kept[1], 0.0, costs[1]), costs[0]).sum())

        # A channel's first plane saves 99 % of its cost: choices that differ by less are alike.
        best = min(left(read) for read in combinations(range(2 * K), K))
        assert left(chosen) <= 1.02 * best
