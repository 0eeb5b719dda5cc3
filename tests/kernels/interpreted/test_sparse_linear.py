"""sparse_linear's kernel in the Triton interpreter against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, assert_equal_up_to_rounding, case, exact
from torch import Tensor

from wina.kernels.triton.config import Launch
from wina.kernels.triton.sparse_linear import launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

# Wide tiles: the interpreter's time goes by the number of tiles.
WIDE = Launch(row_bytes=2048, block_k=256, warps=4, stages=2)
SPLIT = Launch(row_bytes=2048, block_k=256, warps=4, stages=2, k_splits=3)
SMALL = Launch(row_bytes=64, block_k=16, warps=4, stages=2, k_splits=2)


def run(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
    config: Launch = WIDE,
    residual: Tensor | None = None,
) -> Tensor:
    return launch(x, weight, threshold, bias, scale, config, residual)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(
    ("K", "N"),
    [(1, 1), (1, 576), (63, 1), (63, 63), (576, 1536), (1000, 1000), (1536, 63), (4097, 576)],
)
def test_shapes(K: int, N: int, T: int, dtype: torch.dtype) -> None:
    x, weight, threshold = case(T, K, N, dtype, 0.5)
    got = run(x, weight, threshold, config=SPLIT)
    assert_equal_up_to_rounding(got, exact(x, weight, threshold), x, weight)


@pytest.mark.parametrize("T", [1, 2])
def test_long_rows(T: int) -> None:
    x, weight, threshold = case(T, 63, 4097, torch.bfloat16, 0.5)
    got = run(x, weight, threshold)
    assert_equal_up_to_rounding(got, exact(x, weight, threshold), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.99, 1])
@pytest.mark.parametrize("T", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("config", [WIDE, SPLIT], ids=["one pass", "splits"])
def test_tokens(config: Launch, T: int, sparsity: float, dtype: torch.dtype) -> None:
    x, weight, threshold = case(T, 600, 193, dtype, sparsity)
    bias = torch.randn(193).to(dtype)
    scale = torch.rand(T) + 0.5
    got = run(x, weight, threshold, bias, scale, config)
    want = exact(x, weight, threshold, bias, scale)
    assert_equal_up_to_rounding(got, want, x, weight)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 3.4e38, torch.inf])
@pytest.mark.parametrize("T", [1, 3, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_never_dropped(
    bad: float, threshold: float, T: int, dtype: torch.dtype
) -> None:
    x = torch.randn(T, 40).to(dtype)
    x[T // 2, 17] = bad
    weight = torch.rand(40, 24).to(dtype) + 0.1
    y = run(x, weight, torch.full((40,), threshold), config=SMALL)
    assert not y[T // 2].isfinite().any()
    others = [t for t in range(T) if t != T // 2]
    assert y[others].isfinite().all()


def test_a_cut_that_is_nan_keeps() -> None:
    """inf·0: a dropped channel of a token whose scale is 0, as in the definition."""
    x, weight, _ = case(1, 32, 16, torch.float32, 0)
    threshold = torch.full((32,), torch.inf)
    got = run(x, weight, threshold, scale=torch.zeros(1), config=SMALL)
    assert_equal_up_to_rounding(got, x.double() @ weight.double(), x, weight)


@pytest.mark.parametrize("T", [1, 4])
def test_rows_that_no_token_keeps_are_not_read(T: int) -> None:
    """A poisoned weight row shows if it is multiplied, even by zero."""
    x, weight, threshold = case(T, 80, 48, torch.float32, 0)
    threshold[20:60] = torch.inf
    poisoned = weight.clone()
    poisoned[20:60] = torch.nan
    got = run(x, poisoned, threshold, config=SMALL)
    assert_equal_up_to_rounding(got, exact(x, weight, threshold), x, weight)


@pytest.mark.parametrize("config", [WIDE, SMALL], ids=["one pass", "splits"])
@pytest.mark.parametrize("T", [1, 7])
def test_each_token_keeps_its_own_channels(config: Launch, T: int) -> None:
    x, weight, threshold = case(T, 128, 50, torch.float32, 0.7)
    together = run(x, weight, threshold, config=config)
    one_by_one = torch.cat([run(row[None], weight, threshold, config=config) for row in x])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)


def test_rows_of_a_wider_matrix() -> None:
    """Rows further apart than they are long: the weight is a slice of columns."""
    x, wide, threshold = case(2, 64, 96, torch.bfloat16, 0.5)
    weight = wide[:, 8:71]
    got = run(x, weight, threshold, config=SMALL)
    assert_equal_up_to_rounding(got, exact(x, weight, threshold), x, weight)


@given(
    T=st.integers(1, 16),
    K=st.integers(1, 90),
    N=st.integers(1, 90),
    sparsity=st.sampled_from([0, 0.3, 0.5, 0.9, 1]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.booleans(),
    residual=st.booleans(),
    splits=st.integers(1, 4),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=80)
def test_random_calls(T, K, N, sparsity, dtype, bias, scale, residual, splits, seed) -> None:
    x, weight, threshold = case(T, K, N, dtype, sparsity, seed)
    b = torch.randn(N).to(dtype) if bias else None
    s = torch.rand(T) * 2 if scale else None
    r = torch.randn(T, N).to(dtype) if residual else None
    config = Launch(row_bytes=128, block_k=32, warps=4, stages=2, k_splits=splits)
    want = exact(x, weight, threshold, b, s)
    want = want if r is None else want + r.double()
    assert_equal_up_to_rounding(run(x, weight, threshold, b, s, config, r), want, x, weight)
