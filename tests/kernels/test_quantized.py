"""The operators on integer weights: every backend of this machine against float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, assert_equal_up_to_rounding, case, exact, full_scale
from torch import Tensor

from wina.kernels import cpu, quantized, reference
from wina.kernels.ops import OPERATORS
from wina.kernels.quantization import FORMATS, QuantizedWeight, quantize

DEFINITION = "definition"
NATIVE = "native"
IMPLEMENTATIONS = [DEFINITION, NATIVE]


def linear(which: str) -> Any:
    if which == DEFINITION:
        return quantized.sparse_linear_quantized
    assert cpu.load() is None
    return quantized.linear_operator


def fields(w: QuantizedWeight) -> tuple[Tensor, Tensor, int, int]:
    return w.packed, w.scales, w.columns, w.bits


def check(
    which: str, T: int, K: int, N: int, weights: str, dtype: torch.dtype, sparsity: float = 0.5,
    extras: bool = False, seed: int = 0,
) -> None:  # fmt: skip
    x, weight, threshold = case(T, K, N, dtype, sparsity, seed)
    packed = quantize(weight, weights)
    bias = torch.randn(N).to(dtype) if extras else None
    scale = torch.rand(T) + 0.5 if extras else None
    residual = torch.randn(T, N).to(dtype) if extras else None
    got = linear(which)(x, *fields(packed), threshold, bias, scale, residual)
    want = exact(x, packed.dequantize(), threshold, bias, scale)
    want = want if residual is None else want + residual.double()
    assert_equal_up_to_rounding(got, want, x, full_scale(packed))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("T", [1, 2, 3, 5, 16, 17, 40])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (63, 193), (576, 63), (100, 1000)])
def test_shapes(which: str, K: int, N: int, T: int, weights: str, dtype: torch.dtype) -> None:
    check(which, T, K, N, weights, dtype, extras=T % 2 == 1)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("sparsity", [0, 0.99, 1])
@pytest.mark.parametrize("T", [1, 4, 40])
def test_sparsity(which: str, T: int, sparsity: float, weights: str) -> None:
    check(which, T, 700, 300, weights, torch.bfloat16, sparsity)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("threshold", [-1.0, torch.inf])
@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("weights", FORMATS)
def test_nan_and_inf_are_never_dropped(
    which: str, bad: float, threshold: float, T: int, weights: str
) -> None:
    x = torch.randn(T, 40).bfloat16()
    x[T // 2, 17] = bad
    packed = quantize(torch.rand(40, 24) + 0.1, weights)
    y = linear(which)(x, *fields(packed), torch.full((40,), threshold))
    assert not y[T // 2].isfinite().any()
    assert y[[t for t in range(T) if t != T // 2]].isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inf_gives_what_the_definition_gives(
    bad: float, T: int, weights: str, dtype: torch.dtype
) -> None:
    x = torch.randn(T, 40).to(dtype)
    x[T // 2, 17] = bad
    packed = quantize(torch.randn(40, 300), weights)
    got, want = (linear(which)(x, *fields(packed), torch.zeros(40)) for which in IMPLEMENTATIONS)
    assert all({torch.inf, -torch.inf} <= set(y[T // 2].tolist()) for y in (got, want))
    rtol = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-3, rtol=rtol)


@pytest.mark.parametrize("weights", FORMATS)
def test_a_massive_input_costs_only_the_rows_that_are_rounded_with_it(weights: str) -> None:
    """Of a bfloat16 token: the bound of docs/numerics.md, where the massive part cancels."""
    K = 512
    x = torch.randn(1, K).bfloat16()
    x[0, 17], x[0, 18] = 1024, -1024
    weight = torch.randn(K, 300)
    weight[18] = weight[17]
    packed = quantize(weight, weights)
    y = linear(NATIVE)(x, *fields(packed), torch.full((K,), -1.0)).double()
    want = x.double() @ packed.dequantize().double()
    # Rows 17 and 18 share their groups with seven others each: 2^-16 of the largest a row.
    largest = 1024 * packed.scales[17:19].double().abs().amax() * 2 ** (packed.bits - 1)
    assert ((y - want).abs() <= 2 * 8 * largest / 2**16 + want.abs() / 256).all()
    assert (y - want).norm() <= 5e-3 * want.norm()


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
@pytest.mark.parametrize("weights", FORMATS)
def test_zero_sizes(which: str, weights: str, shape: tuple[int, int, int]) -> None:
    T, K, N = shape
    packed = quantize(torch.randn(K, N), weights)
    bias = torch.randn(N)
    y = linear(which)(torch.randn(T, K), *fields(packed), torch.zeros(K), bias)
    assert y.shape == (T, N)
    if K == 0:
        assert torch.equal(y, bias.expand(T, N))


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_leading_dimensions_and_float64(which: str) -> None:
    x, weight, threshold = case(12, 96, 40, torch.float32, 0.5)
    packed = quantize(weight, "int4")
    flat = linear(which)(x, *fields(packed), threshold)
    apart = linear(which)(x.view(3, 4, 96), *fields(packed), threshold)
    torch.testing.assert_close(apart, flat.view(3, 4, 40))
    wide = linear(which)(x.double(), *fields(packed), threshold)
    torch.testing.assert_close(wide, exact(x, packed.dequantize(), threshold), rtol=1e-12, atol=0)


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
@pytest.mark.parametrize("weights", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("T", [1, 40])
def test_gate_up(which: str, T: int, activation: str, dtype: torch.dtype, weights: str) -> None:
    x, gate, gate_threshold = case(T, 192, 201, dtype, 0.5)
    _, up, up_threshold = case(T, 192, 201, dtype, 0.4, seed=1)
    g, u = quantize(gate / 8, weights), quantize(up / 8, weights)
    bias, scale = torch.randn(201).to(dtype), torch.rand(T) + 0.5
    if which == NATIVE:
        assert cpu.load() is None
    function = quantized.gate_up_operator if which == NATIVE else quantized.sparse_gate_up_quantized
    got = function(
        x, g.packed, g.scales, u.packed, u.scales, 201, g.bits, gate_threshold, up_threshold,
        activation, bias, None, None, scale,
    )  # fmt: skip
    left = exact(x, g.dequantize(), gate_threshold, bias)
    right = exact(x, u.dequantize(), up_threshold, None, scale)
    want = reference.ACTIVATIONS[activation](left) * right
    size = (1 + left.abs() + left.square() * (activation == "relu2")) * (1 + right.abs())
    assert ((got.double() - want).abs() <= (torch.finfo(dtype).eps + 3e-5) * size).all()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weights", FORMATS)
def test_threads_do_not_change_a_bit(weights: str, T: int, dtype: torch.dtype) -> None:
    x, weight, threshold = case(T, 777, 1537, dtype, 0.5)
    packed = quantize(weight, weights)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(linear(NATIVE)(x, *fields(packed), threshold))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_poisoned_outputs_are_all_written(poisoned_memory: None) -> None:
    for weights in FORMATS:
        for N in (1, 7, 64, 193, 2049):
            x, weight, threshold = case(1, 33, N, torch.float32, 0.5)
            y = linear(NATIVE)(x, *fields(quantize(weight, weights)), threshold)
            assert y.isfinite().all()


@pytest.mark.parametrize("which", IMPLEMENTATIONS)
def test_opcheck(which: str) -> None:
    dtype = torch.float64 if which == DEFINITION else torch.float32
    x, threshold = torch.randn(3, 32, dtype=dtype), torch.full((32,), 0.5)
    w = quantize(torch.randn(32, 24), "int4")
    torch.library.opcheck(
        linear(which) if which == NATIVE else quantized.linear_operator,
        (x, *fields(w), threshold, torch.randn(24, dtype=dtype), torch.rand(3)),
    )
    torch.library.opcheck(
        quantized.gate_up_operator,
        (x, w.packed, w.scales, w.packed, w.scales, 24, 4, threshold, threshold, "silu"),
    )


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 9)}, "packed of 4 columns in 8 bits must be"),
        ({"packed": torch.zeros(8, 4, dtype=torch.int8)}, "packed .*contiguous"),
        ({"packed": torch.zeros(8, 64)}, "packed .*int8"),
        ({"scales": torch.zeros(8, 2)}, "scales .*(?i:bfloat16)"),
        ({"columns": 65}, "packed of 65 columns"),
        ({"bits": 3}, "bits"),
        ({"threshold": torch.zeros(7)}, "threshold"),
        ({"bias": torch.zeros(3)}, "bias"),
        ({"scale": torch.zeros(3)}, "scale"),
        ({"residual": torch.zeros(3)}, "residual"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Any], message: str, native: bool) -> None:
    w = quantize(torch.randn(8, 4), "int8")
    names = ("packed", "scales", "columns", "bits")
    arguments = {"x": torch.randn(1, 8), **dict(zip(names, fields(w), strict=True))}
    arguments |= {"threshold": torch.zeros(8), **change}
    call = linear(NATIVE) if native else OPERATORS["sparse_linear_quantized"].fake
    with pytest.raises(RuntimeError, match=message):
        call(**arguments)


@given(
    T=st.integers(1, 34),
    K=st.integers(1, 90),
    N=st.integers(1, 300),
    weights=st.sampled_from(list(FORMATS)),
    sparsity=st.sampled_from([0, 0.3, 0.5, 0.9, 1]),
    dtype=st.sampled_from(DTYPES),
    extras=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_native_on_random_calls(T, K, N, weights, sparsity, dtype, extras, seed) -> None:
    check(NATIVE, T, K, N, weights, dtype, sparsity, extras, seed)
