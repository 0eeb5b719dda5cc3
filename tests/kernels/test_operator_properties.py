"""Properties that every backend of this machine keeps, for random sizes, strides and thresholds."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, assert_equal_up_to_rounding, case, exact
from torch import Tensor

from wina.kernels import cpu, ops
from wina.kernels.dispatch import backends
from wina.kernels.reference import keep_mask

BACKENDS = [name for name, backend in backends().items() if backend.device in (None, "cpu")]
SIZES = st.integers(1, 70)


def strided(tensor: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "turned":
        return tensor.t().contiguous().t()
    if layout == "spread":
        wide = torch.full((tensor.shape[0], 2 * tensor.shape[1] + 1), torch.nan).to(tensor.dtype)
        wide[:, 1::2] = tensor
        return wide[:, 1::2]
    if layout == "broadcast":
        return tensor[:1].expand_as(tensor)
    return tensor


@pytest.mark.parametrize("name", BACKENDS)
@given(
    T=st.integers(1, 18), K=SIZES, N=SIZES, dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["plain", "turned", "spread", "broadcast"]),
    sparsity=st.sampled_from([0, 0.5, 0.9]), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_strides_of_hidden_states_do_not_matter(
    name: str, T: int, K: int, N: int, dtype: torch.dtype, layout: str, sparsity: float, seed: int
) -> None:
    assert cpu.load() is None
    x, weight, threshold = case(T, K, N, dtype, sparsity, seed)
    x = strided(x, layout)
    got = backends()[name].sparse_linear(x, weight, threshold)
    assert_equal_up_to_rounding(got, exact(x, weight, threshold), x, weight)


@pytest.mark.parametrize("name", BACKENDS)
@given(K=SIZES, T=st.integers(1, 5), dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000))
@settings(deadline=None, max_examples=60)
def test_a_higher_threshold_keeps_a_subset(
    name: str, K: int, T: int, dtype: torch.dtype, seed: int
) -> None:
    """With an identity weight the output shows which channels were kept."""
    assert cpu.load() is None
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(T, K, generator=generator) + 0.01).to(dtype)
    weight = torch.eye(K).to(dtype)
    low = torch.rand(K, generator=generator)
    higher = low + torch.rand(K, generator=generator)
    kept = [
        backends()[name].sparse_linear(x, weight, threshold) != 0
        for threshold in (torch.full((K,), -1.0), low, higher, torch.full((K,), torch.inf))
    ]
    assert kept[0].all()
    assert not kept[-1].any()
    for more, less in pairwise(kept):
        assert not (less & ~more).any()
    assert torch.equal(kept[1], keep_mask(x, low))


@given(
    K=st.integers(2, 90), T=st.integers(1, 4), share=st.floats(0.01, 0.99),
    dtype=st.sampled_from(DTYPES), seed=st.integers(0, 1000),
)  # fmt: skip
@settings(deadline=None, max_examples=100)
def test_top_k_keeps_the_highest_scores(
    K: int, T: int, share: float, dtype: torch.dtype, seed: int
) -> None:
    """Through the native kernels: the scale of one, the mask of the other."""
    assert cpu.load() is None
    generator = torch.Generator().manual_seed(seed)
    x = (torch.rand(T, K, generator=generator) + 0.01).to(dtype)
    inverse = 1 / (torch.rand(K, generator=generator) + 0.1)
    dropped = min(K - 1, max(1, round(share * K)))
    scale = ops.topk_scale(x, inverse, dropped)
    kept = ops.sparse_linear(x, torch.eye(K).to(dtype), inverse, None, scale) != 0
    scores = x.float() / inverse
    for row, of_row in zip(scores, kept, strict=True):
        if of_row.any() and not of_row.all():
            assert row[of_row].min() >= row[~of_row].max() * (1 - 1e-5)
        ties = K - row.unique().numel()
        assert abs(int(of_row.sum()) - (K - dropped)) <= ties
