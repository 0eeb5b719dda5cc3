"""The kernels on integer weights, in the Triton interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, assert_equal_up_to_rounding, case, exact, full_scale
from torch import Tensor

from wina.kernels import reference
from wina.kernels.quantization import FORMATS, QuantizedWeight, quantize
from wina.kernels.triton import gate_up, sparse_linear
from wina.kernels.triton.config import Launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

ROW_BYTES = {"int8": 128, "int4": 64}


def config(dtype: str, k_splits: int = 1, row_bytes: int | None = None) -> Launch:
    return Launch(row_bytes or ROW_BYTES[dtype], 64, 4, 2, k_splits)


def check(
    T: int, K: int, N: int, weights: str, dtype: torch.dtype, sparsity: float = 0.5,
    extras: bool = False, launch: Launch | None = None, seed: int = 0,
) -> None:  # fmt: skip
    x, weight, threshold = case(T, K, N, dtype, sparsity, seed)
    packed = quantize(weight, weights)
    bias = torch.randn(N).to(dtype) if extras else None
    scale = torch.rand(T) + 0.5 if extras else None
    residual = torch.randn(T, N).to(dtype) if extras else None
    launch = launch or config(weights)
    got = sparse_linear.launch(x, packed, threshold, bias, scale, launch, residual)
    w = packed.dequantize()
    want = exact(x, w, threshold, bias, scale)
    want = want if residual is None else want + residual.double()
    assert_equal_up_to_rounding(got, want, x, full_scale(packed))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (63, 63), (130, 400), (300, 193)])
def test_shapes(K: int, N: int, T: int, weights: str, dtype: torch.dtype) -> None:
    check(T, K, N, weights, dtype, launch=config(weights, k_splits=3))


@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("sparsity", [0, 0.99, 1])
@pytest.mark.parametrize("T", [1, 16])
def test_sparsity(T: int, sparsity: float, weights: str) -> None:
    check(T, 200, 140, weights, torch.bfloat16, sparsity, extras=True)


@pytest.mark.parametrize("T", [1, 5])
def test_a_tile_of_half_a_group(T: int) -> None:
    check(T, 100, 300, "int8", torch.bfloat16, launch=config("int8", row_bytes=64))


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("threshold", [-1.0, torch.inf])
@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("weights", FORMATS)
def test_nan_and_inf_are_never_dropped(bad: float, threshold: float, T: int, weights: str) -> None:
    x = torch.randn(T, 40).bfloat16()
    x[T // 2, 17] = bad
    packed = quantize(torch.rand(40, 24) + 0.1, weights)
    cut = torch.full((40,), threshold)
    y = sparse_linear.launch(x, packed, cut, None, None, config(weights))
    assert not y[T // 2].isfinite().any()
    assert y[[t for t in range(T) if t != T // 2]].isfinite().all()


@pytest.mark.parametrize("T", [1, 4])
@pytest.mark.parametrize("weights", FORMATS)
def test_rows_that_no_token_keeps_are_not_read(weights: str, T: int) -> None:
    """A scale of NaN shows if its row is multiplied, even by zero."""
    x, weight, threshold = case(T, 80, 48, torch.float32, 0)
    threshold[20:60] = torch.inf
    packed = quantize(weight, weights)
    w = packed.dequantize()
    size = full_scale(packed)
    packed.scales[20:60] = torch.nan
    got = sparse_linear.launch(x, packed, threshold, None, None, config(weights, 2))
    assert_equal_up_to_rounding(got, exact(x, w, threshold), x, size)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("T", [1, 4])
def test_gate_up(T: int, weights: str, dtype: torch.dtype) -> None:
    x, gate, gate_threshold = case(T, 192, 301, dtype, 0.5)
    _, up, up_threshold = case(T, 192, 301, dtype, 0.4, seed=1)
    packed = [quantize(w / 8, weights) for w in (gate, up)]
    bias = torch.randn(2, 301).to(dtype)
    scale = torch.rand(2, T) + 0.5
    got = gate_up.launch(
        x, *packed, gate_threshold, up_threshold, "silu", *bias, *scale, config(weights)
    )
    g = exact(x, packed[0].dequantize(), gate_threshold, bias[0], scale[0])
    u = exact(x, packed[1].dequantize(), up_threshold, bias[1], scale[1])
    assert_close_gated(got, g, u, x, packed)


def assert_close_gated(
    got: Tensor, g: Tensor, u: Tensor, x: Tensor, packed: list[QuantizedWeight]
) -> None:
    """One rounding of h, and float32 sums; silu is not steeper than 1.1."""
    size = x.double().abs()
    g_error, u_error = (3e-6 * (size @ full_scale(w).double()) + 1e-6 for w in packed)
    value = reference.ACTIVATIONS["silu"](g)
    error = 1.1 * g_error * u.abs() + (value.abs() + 1.1 * g_error) * u_error + 1e-6
    tolerance = torch.finfo(x.dtype).eps * (value * u).abs() + error
    assert ((got.double() - value * u).abs() <= tolerance).all()


@given(
    T=st.integers(1, 16),
    K=st.integers(1, 90),
    N=st.integers(1, 300),
    weights=st.sampled_from(list(FORMATS)),
    sparsity=st.sampled_from([0, 0.3, 0.5, 0.9, 1]),
    dtype=st.sampled_from(DTYPES),
    extras=st.booleans(),
    splits=st.integers(1, 3),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=25)
def test_random_calls(T, K, N, weights, sparsity, dtype, extras, splits, seed) -> None:
    launch = Launch(ROW_BYTES[weights], 32, 4, 2, splits)
    check(T, K, N, weights, dtype, sparsity, extras, launch, seed)
