import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wina.criteria import CRITERIA
from wina.kernels.reference import keep_mask
from wina.registry import create
from wina.scores import ChannelScores
from wina.selectors import SELECTORS, Relative, Statistical, Threshold, TopK
from wina.statistics import ScoreHistogram


@given(
    channels=st.integers(1, 80),
    sparsity=st.floats(0, 0.999),
    seed=st.integers(0, 10_000),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(deadline=None, max_examples=100)
def test_topk_keeps_the_highest_scores(
    channels: int, sparsity: float, seed: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, channels, generator=generator).to(dtype)
    c = torch.rand(channels, generator=generator) + 0.1
    keep = keep_mask(x, 1 / c, TopK().scale(x, 1 / c, sparsity))
    scores = x.abs().float() * c
    for row, kept in zip(scores, keep, strict=True):
        if kept.any() and not kept.all():
            assert row[kept].min() >= row[~kept].max() * (1 - 1e-5)
        ties = channels - row.unique().numel()
        assert abs(int(kept.sum()) - max(1, channels - round(sparsity * channels))) <= ties


def test_topk_keeps_nan_and_inf() -> None:
    x = torch.tensor([[torch.nan, 1.0, torch.inf, 2.0]])
    ones = torch.ones(4)
    assert keep_mask(x, ones, TopK().scale(x, ones, 0.5)).tolist() == [[True, False, True, False]]


@pytest.mark.parametrize("selector", [Threshold(), Relative(), TopK()])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_calibrated_cutoff_realises_the_sparsity(selector: object, sparsity: float) -> None:
    assert isinstance(selector, Threshold | Relative | TopK)
    x = torch.randn(500, 64) * torch.rand(64)
    c = torch.rand(64) + 0.1
    scale = selector.scale(x, 1 / c, sparsity)
    scores = x.abs() * c
    histogram = ScoreHistogram()
    histogram.add(scores if scale is None else scores / scale[:, None])
    t = selector.cutoff(histogram, sparsity) / c
    keep = keep_mask(
        x, t, selector.scale(x, t if not isinstance(selector, TopK) else 1 / c, sparsity)
    )
    assert 1 - keep.double().mean() == pytest.approx(sparsity, abs=0.01)


def test_relative_follows_the_size_of_a_token() -> None:
    x = torch.randn(1, 64)
    t = torch.full((64,), 0.7)
    small, large = (keep_mask(y, t, Relative().scale(y, t, 0.5)) for y in (x, x * 100))
    assert torch.equal(small, large)
    assert not torch.equal(keep_mask(x, t), keep_mask(x * 100, t))


@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.8])
def test_statistical_keeps_what_lies_above_mean_and_spread(sparsity: float) -> None:
    x, c = 5.0 + torch.randn(20, 4000), torch.rand(4000) * 0.01 + 1.0  # normal scores, positive
    keep = keep_mask(x, 1 / c, Statistical().scale(x, 1 / c, sparsity))
    scores = x.double() * c
    quantile = torch.erfinv(torch.tensor(2 * sparsity - 1, dtype=torch.float64)) * 2**0.5
    cut = scores.mean(-1, keepdim=True) + scores.std(-1, correction=0, keepdim=True) * quantile
    assert (keep == (scores > cut)).double().mean() > 0.999
    assert 1 - keep.double().mean() == pytest.approx(sparsity, abs=0.02)
    assert keep_mask(x, 1 / c, Statistical().scale(x, 1 / c, 0.0)).all()


def test_names() -> None:
    assert set(SELECTORS) == {"threshold", "relative", "topk", "statistical", "importance"}
    assert isinstance(create(SELECTORS, "topk"), TopK)


@pytest.mark.parametrize("selector", list(SELECTORS))
def test_masks_drop_what_was_asked(selector: str) -> None:
    weight, x = torch.randn(24, 40), torch.randn(30, 40)
    scores = ChannelScores([weight], create(CRITERIA, "l2-norm"), create(SELECTORS, selector), 0)
    histogram = ScoreHistogram()
    scores.count(histogram, x, 0.5)
    for sparsity in (0.0, 0.2, 0.5, 0.9):
        keep = scores.keep(x, scores.threshold(scores.cutoff(histogram, sparsity)), sparsity)
        if selector != "statistical":  # these scores are not normally distributed
            assert float((~keep).float().mean()) == pytest.approx(sparsity, abs=0.02)


def test_sums_over_a_grid_are_those_of_the_masks() -> None:
    weight, x, g = torch.randn(24, 40), torch.randn(30, 40), torch.randn(30, 40)
    scores = ChannelScores([weight], create(CRITERIA, "l2-norm"), create(SELECTORS, "threshold"), 0)
    histogram = ScoreHistogram()
    scores.count(histogram, x, 0.5)
    grid = [0.0, 0.2, 0.5, 0.9]
    found = scores.kept_sums(x, g, grid)
    for index, sparsity in enumerate(grid):
        keep = scores.keep(x, scores.threshold(scores.cutoff(histogram, sparsity)), sparsity)
        torch.testing.assert_close(found[:, index], (x * g * keep).sum(-1))


def test_channels_without_weights_are_dropped_whatever_the_cutoff() -> None:
    weight = torch.randn(8, 5)
    weight[:, 2] = 0
    scores = ChannelScores([weight], create(CRITERIA, "l2-norm"), create(SELECTORS, "threshold"), 0)
    for cutoff in (0.0, 1e-42, 1.0):
        threshold = scores.threshold(cutoff)
        assert threshold[2] == torch.inf
        assert not threshold.isnan().any()
    assert (scores.threshold(-1.0) == -1.0).all()
