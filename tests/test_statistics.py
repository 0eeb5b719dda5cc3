import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wina.errors import CalibrationError
from wina.statistics import ScoreHistogram, column_norms


@pytest.mark.parametrize("p", [1.0, 2.0, 3.0])
def test_column_norms_match_torch(p: float) -> None:
    weight = torch.randn(37, 11, dtype=torch.float64)
    want = torch.linalg.vector_norm(weight, ord=p, dim=0).float()
    torch.testing.assert_close(column_norms([weight], p), want, rtol=1e-6, atol=0)


def test_column_norms_of_a_group_are_those_of_the_stacked_matrix() -> None:
    a, b = torch.randn(5, 7), torch.randn(3, 7)
    torch.testing.assert_close(column_norms([a, b]), column_norms([torch.cat([a, b])]))


def test_column_norms_do_not_depend_on_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(64, 16).bfloat16()
    whole = column_norms([weight])
    monkeypatch.setattr("wina.statistics._NORM_CHUNK", 48)
    torch.testing.assert_close(column_norms([weight]), whole, rtol=1e-6, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_column_norms_leave_the_weight_alone(dtype: torch.dtype) -> None:
    weight = torch.randn(8, 4).to(dtype)
    before = weight.clone()
    column_norms([weight])
    assert torch.equal(weight, before)


def test_column_norms_survive_large_float16() -> None:
    weight = torch.full((8, 2), 60000.0, dtype=torch.float16)
    assert column_norms([weight])[0] == pytest.approx(60000 * 8**0.5, rel=1e-3)


@given(
    exponent=st.integers(-30, 30),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=60)
def test_quantile_realises_the_share(exponent: int, share: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(20000, generator=generator).abs() * 2.0**exponent
    histogram = ScoreHistogram()
    for part in scores.split(3000):
        histogram.add(part)
    cut = histogram.quantile(share)
    assert (scores <= cut).double().mean() == pytest.approx(share, abs=0.003)


def test_quantile_is_monotone_and_bounded() -> None:
    histogram = ScoreHistogram()
    histogram.add(torch.tensor([0.0, 1.0, 2.0, 4.0]))
    cuts = [histogram.quantile(s / 100) for s in range(101)]
    assert cuts == sorted(cuts)
    assert cuts[0] == -1.0
    assert 4.0 <= cuts[-1] < 4.1


def test_merge_is_addition() -> None:
    scores = torch.rand(5000)
    a, b, both = ScoreHistogram(), ScoreHistogram(), ScoreHistogram()
    a.add(scores[:2000])
    b.add(scores[2000:])
    both.add(scores)
    a.merge(b)
    assert torch.equal(a.counts, both.counts)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -1.0])
def test_bad_scores_are_refused(bad: float) -> None:
    histogram = ScoreHistogram()
    with pytest.raises(CalibrationError):
        histogram.add(torch.tensor([1.0, bad]))
    assert histogram.total == 0


def test_empty_histogram_has_no_quantile() -> None:
    histogram = ScoreHistogram()
    histogram.add(torch.empty(0))
    with pytest.raises(CalibrationError, match="no scores"):
        histogram.quantile(0.5)
    with pytest.raises(CalibrationError, match="between 0 and 1"):
        histogram.quantile(1.5)
