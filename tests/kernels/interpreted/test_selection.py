"""The kernels that find a token's scale, in the Triton interpreter against the definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES
from torch import Tensor

from wina.kernels import reference
from wina.kernels.triton.selection import launch_mean, launch_probe, launch_topk, launch_tracked

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def token(T: int, K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed + 7 * T + K)
    x = torch.randn(T, K, generator=generator).to(dtype)
    return x, 1 / (torch.rand(K, generator=generator) + 0.1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [2, 63, 576, 1000, 4097])
def test_topk_is_exactly_the_definitions(K: int, dtype: torch.dtype) -> None:
    x, threshold = token(2, K, dtype)
    for dropped in {1, max(1, K // 2), K - 1}:
        want = reference.topk_scale(x, threshold, dropped)
        assert torch.equal(launch_topk(x, threshold, dropped), want)


@pytest.mark.parametrize("dropped", [1, 2, 3, 4, 5])
def test_topk_of_odd_values(dropped: int) -> None:
    """NaN, infinities, zeros of both signs, ties, negative and infinite thresholds."""
    x = torch.tensor(
        [
            [torch.nan, 1.0, -torch.inf, 2.0, -0.0, 0.0],
            [1.0, 1.0, -1.0, 1.0, 2.0, 2.0],
            [3e38, -3e38, 1e-45, 0.0, torch.inf, torch.inf],
        ]
    )
    for threshold in (torch.ones(6), torch.tensor([1.0, -1.0, 2.0, torch.inf, -2.0, 0.0])):
        got = launch_topk(x, threshold, dropped)
        want = reference.topk_scale(x, threshold, dropped)
        assert torch.equal(got, want), (got, want)


@given(
    T=st.integers(1, 4),
    K=st.integers(2, 300),
    share=st.floats(0, 1),
    levels=st.sampled_from([1, 2, 10, 1000]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=15)
def test_topk_of_random_tokens(T, K, share, levels, dtype, seed) -> None:
    x, threshold = token(T, K, dtype, seed)
    x = (x * levels).round() / levels  # ties
    dropped = 1 + round(share * (K - 2))
    want = reference.topk_scale(x, threshold, dropped)
    assert torch.equal(launch_topk(x, threshold, dropped), want)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", [1, 63, 576, 4097, 18944])
def test_mean(K: int, dtype: torch.dtype) -> None:
    x, _ = token(3, K, dtype)
    torch.testing.assert_close(launch_mean(x), reference.mean_scale(x), rtol=1e-5, atol=0)


def test_mean_shows_nan_and_inf() -> None:
    x = torch.ones(3, 8)
    x[0, 3], x[1, 4] = torch.nan, -torch.inf
    got = launch_mean(x)
    assert got[0].isnan()
    assert got[1:].tolist() == [torch.inf, 1.0]


@pytest.mark.parametrize("K", [1, 5, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_probe(K: int, dtype: torch.dtype) -> None:
    x, _ = token(3, K, dtype)
    probe = torch.randn(K + 1, generator=torch.Generator().manual_seed(K)) / K**0.5
    want = reference.probe_scale(x, probe, 0.5)
    torch.testing.assert_close(launch_probe(x, probe, 0.5), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("K", [1, 5, 64, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tracked(K: int, dtype: torch.dtype, own: bool) -> None:
    x, threshold = token(3, K, dtype)
    scale = torch.rand(3) + 0.5 if own else None
    states = [torch.tensor([0.0, 0.7, -0.999]) for _ in range(2)]
    got = launch_tracked(x, threshold, states[0], 0.3, 0.5, scale)
    own_3d = None if scale is None else scale[:, None]
    want = reference.tracked_scale(x[:, None], threshold, states[1], 0.3, 0.5, own_3d)
    torch.testing.assert_close(got, want[:, 0], rtol=1e-5, atol=0)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-5)


def test_tracked_keeps_nan_and_is_bounded() -> None:
    x = torch.full((1, 8), torch.nan)
    state = torch.tensor([0.99])
    launch_tracked(x, torch.ones(8), state, 1.0, 1.0, None)  # all are kept: the cut-off rises
    assert state.tolist() == [1.0]
    launch_tracked(torch.zeros(1, 8), torch.ones(8), state.neg_(), 0.0, 1.0, None)
    assert state.tolist() == [-1.0]


def test_probe_shows_nan_and_is_limited() -> None:
    x = torch.tensor([[torch.nan, 1.0], [100.0, 0.0], [-100.0, 0.0]])
    got = launch_probe(x, torch.tensor([1.0, 1.0, 0.5]), 0.25)
    assert got[0].isnan()
    torch.testing.assert_close(got[1:].log(), torch.tensor([0.25, -0.25]))
