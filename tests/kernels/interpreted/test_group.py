"""sparse_group's kernel in the Triton interpreter against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, assert_equal_up_to_rounding, case, exact
from torch import Tensor

from wina.kernels.triton.config import Launch
from wina.kernels.triton.group import launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Wide tiles: the interpreter's time goes by the number of tiles.
WIDE = Launch(row_bytes=2048, block_k=256, warps=4, stages=2)
SPLIT = Launch(row_bytes=2048, block_k=256, warps=4, stages=2, k_splits=3)
SMALL = Launch(row_bytes=64, block_k=16, warps=4, stages=2, k_splits=2)


def check(
    T: int, K: int, columns: tuple[int, ...], dtype: torch.dtype, sparsity: float = 0.5,
    config: Launch = SPLIT, bias: bool = False, scale: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    x = case(T, K, 1, dtype, sparsity, seed)[0]
    weights, thresholds = [], []
    for i, N in enumerate(columns):
        _, weight, threshold = case(T, K, N, dtype, sparsity, seed + i)
        weights.append(weight)
        thresholds.append(threshold)
    biases = [torch.randn(N).to(dtype) for N in columns] if bias else None
    scales = [torch.rand(T) + 0.5 for _ in columns] if scale else None
    ys = launch(x, weights, thresholds, biases, scales, config)
    assert [tuple(y.shape) for y in ys] == [(T, N) for N in columns]
    for i, y in enumerate(ys):
        want = exact(
            x, weights[i], thresholds[i], biases and biases[i], scales and scales[i]
        )  # fmt: skip
        assert_equal_up_to_rounding(y, want, x, weights[i])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 16])
@pytest.mark.parametrize("config", [WIDE, SPLIT], ids=["one pass", "splits"])
def test_grouped_query_attention(config: Launch, T: int, dtype: torch.dtype) -> None:
    check(T, 576, (192, 64, 64), dtype, config=config, bias=True, scale=True)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(
    ("K", "columns"),
    [
        (1, (1, 1, 1)),
        (63, (1000, 63, 1)),
        (576, (63, 1536)),
        (1000, (193,)),
        (1536, (1, 2, 3)),
        (4097, (65, 8, 64)),
    ],
    ids=str,
)
def test_shapes(K: int, columns: tuple[int, ...], T: int) -> None:
    check(T, K, columns, torch.bfloat16)


@pytest.mark.parametrize("sparsity", [0, 0.99, 1])
@pytest.mark.parametrize("T", [1, 9])
def test_sparsity(sparsity: float, T: int) -> None:
    check(T, 100, (70, 30), torch.float16, sparsity, config=SMALL)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("T", [1, 4])
def test_nan_and_inf_are_never_dropped(bad: float, T: int) -> None:
    x = torch.randn(T, 40)
    x[0, 17] = bad
    weights = [torch.rand(40, N) + 0.1 for N in (24, 8, 9)]
    dropped = torch.full((40,), torch.inf)
    for y in launch(x, weights, [dropped] * 3, None, None, SMALL):
        assert not y[0].isfinite().any()
        assert y[1:].isfinite().all()


def test_equal_to_separate_launches_bit_for_bit() -> None:
    """The order of a column's sum goes by the launch, not by which weight it belongs to."""
    from wina.kernels.triton import sparse_linear

    x: Tensor = case(2, 300, 1, torch.float32, 0.5)[0]
    parts = [case(2, 300, N, torch.float32, 0.5)[1:] for N in (40, 24, 8)]
    weights, thresholds = [w for w, _ in parts], [t for _, t in parts]
    together = launch(x, weights, thresholds, None, None, SMALL)
    for y, (weight, threshold) in zip(together, parts, strict=True):
        assert torch.equal(y, sparse_linear.launch(x, weight, threshold, None, None, SMALL))


@given(
    T=st.integers(1, 16),
    K=st.integers(1, 90),
    columns=st.lists(st.integers(1, 90), min_size=1, max_size=3),
    sparsity=st.sampled_from([0, 0.3, 0.5, 0.9, 1]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.booleans(),
    splits=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
def test_random_calls(T, K, columns, sparsity, dtype, bias, scale, splits, seed) -> None:
    config = Launch(row_bytes=128, block_k=32, warps=4, stages=2, k_splits=splits)
    check(T, K, tuple(columns), dtype, sparsity, config, bias, scale, seed)
