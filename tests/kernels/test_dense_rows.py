"""Dense products of few tokens with row-major weights: every dtype and width against float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, assert_equal_up_to_rounding, full_scale
from torch import Tensor

from wina.kernels import cpu, ops, quantized, reference
from wina.kernels.quantization import FORMATS, QuantizedWeight, quantize

DEFINITION = "definition"
NATIVE = "native"
WEIGHTS = ["float", *FORMATS]


def fields(w: QuantizedWeight) -> tuple[Tensor, Tensor, int, int]:
    return w.packed, w.scales, w.columns, w.bits


def product(
    which: str, x: Tensor, weight: Tensor, weights: str, bias: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, the weight [N, K] that it is of, the largest that each entry of it could hold)."""
    call: Callable[..., Tensor]
    if which == NATIVE:
        assert cpu.load() is None
    if weights == "float":
        call = ops.dense_linear_rows if which == NATIVE else reference.dense_linear_rows
        return call(x, weight, bias), weight, weight
    rounded = quantize(weight, weights)
    call = quantized.dense_linear_rows_quantized
    if which == NATIVE:
        call = quantized.dense_rows_operator
    return call(x, *fields(rounded), bias), rounded.dequantize(), full_scale(rounded)


def check(
    which: str, T: int, K: int, N: int, weights: str, dtype: torch.dtype, bias: bool, seed: int = 0
) -> None:
    generator = torch.Generator().manual_seed(seed + T + 7 * K + 11 * N)
    x = torch.randn(T, K, generator=generator).to(dtype)
    weight = torch.randn(N, K, generator=generator).to(dtype)
    added = torch.randn(N, generator=generator).to(dtype) if bias else None
    got, meant, largest = product(which, x, weight, weights, added)
    want = x.double() @ meant.double().t()
    want = want if added is None else want + added.double()
    assert_equal_up_to_rounding(got, want, x, largest.t())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 2, 3, 4, 5, 8, 9, 40])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (63, 193), (576, 6), (1000, 35), (4097, 5)])
def test_shapes(K: int, N: int, T: int, weights: str, dtype: torch.dtype) -> None:
    check(NATIVE, T, K, N, weights, dtype, bias=T % 2 == 1)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_definitions(weights: str, dtype: torch.dtype) -> None:
    check(DEFINITION, 3, 200, 2100, weights, dtype, bias=True)


@given(
    T=st.integers(1, 10),
    K=st.integers(1, 300),
    N=st.integers(1, 40),
    weights=st.sampled_from(WEIGHTS),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=100)
def test_random_calls(T, K, N, weights, dtype, bias, seed) -> None:
    check(NATIVE, T, K, N, weights, dtype, bias, seed)


@pytest.mark.parametrize("which", [NATIVE, DEFINITION])
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("T", [1, 3, 8, 40])
@pytest.mark.parametrize("K", [7, 130, 576])
def test_masked_inputs_and_a_residual(K: int, T: int, dtype: torch.dtype, which: str) -> None:
    assert cpu.load() is None
    x, weight, residual = (torch.randn(*s).to(dtype) for s in ((T, K), (37, K), (T, 37)))
    threshold, scale = torch.rand(K), torch.rand(T) + 0.5
    threshold[0], threshold[-1] = torch.inf, -1.0
    x[1:2, 0] = torch.nan  # kept, whatever the threshold
    call = ops.dense_linear_rows if which == NATIVE else reference.dense_linear_rows
    got = call(x, weight, None, threshold, scale, residual)
    masked = reference.mask_inputs(x, threshold, scale)
    assert (masked == 0).any()
    want = residual.double() + masked.double() @ weight.double().t()
    assert got[1:2].isnan().all()
    sound = [t for t in range(T) if t != 1]
    if dtype.itemsize == 2 and (which == DEFINITION or T == 40):
        # Torch's product is rounded before the residual is added. Where it uses AMX and K is odd,
        # it reads one number past a row, times zero: the next one's NaN shows there as well.
        twice = residual + torch.nn.functional.linear(masked, weight)
        torch.testing.assert_close(got[sound], twice[sound], rtol=0, atol=0, equal_nan=True)
    else:
        assert_equal_up_to_rounding(got[sound], want[sound], x[sound], weight.t())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("T", [1, 3, 40])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_of_x_show_in_their_token(
    bad: float, T: int, weights: str, dtype: torch.dtype
) -> None:
    x = torch.randn(T, 140).to(dtype)
    x[T // 2, 137] = bad
    y = product(NATIVE, x, (torch.rand(24, 140) + 0.1).to(dtype), weights)[0]
    assert not y[T // 2].isfinite().any()
    assert y[[t for t in range(T) if t != T // 2]].isfinite().all()


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf])
@pytest.mark.parametrize("weights", FORMATS)
def test_inf_of_x_gives_what_the_definition_gives(bad: float, weights: str) -> None:
    x, weight = torch.randn(3, 300), torch.randn(40, 300)
    x[1, 17] = bad
    got, want = (product(which, x, weight, weights)[0] for which in (NATIVE, DEFINITION))
    assert all({torch.inf, -torch.inf} <= set(y[1].tolist()) for y in (got, want))
    torch.testing.assert_close(got, want, equal_nan=True, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_inf_of_the_weight_show_in_their_output(bad: float, dtype: torch.dtype) -> None:
    weight = torch.randn(11, 70).to(dtype)
    weight[9, 3], weight[10, 69] = bad, bad
    y = product(NATIVE, torch.ones(2, 70, dtype=dtype), weight, "float")[0]
    assert y[:, :9].isfinite().all()
    assert not y[:, 9:].isfinite().any()


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_zero_sizes(weights: str, shape: tuple[int, int, int]) -> None:
    T, K, N = shape
    bias = torch.randn(N)
    y = product(NATIVE, torch.randn(T, K), torch.randn(N, K), weights, bias)[0]
    assert y.shape == (T, N)
    if K == 0:
        assert torch.equal(y, bias.expand(T, N))


@pytest.mark.parametrize("weights", WEIGHTS)
def test_leading_dimensions_strides_and_float64(weights: str) -> None:
    x, weight = torch.randn(6, 96), torch.randn(40, 96)
    flat = product(NATIVE, x, weight, weights)[0]
    assert torch.equal(product(NATIVE, x.view(2, 3, 96), weight, weights)[0], flat.view(2, 3, 40))
    assert torch.equal(product(NATIVE, x.t().contiguous().t(), weight, weights)[0], flat)
    assert product(NATIVE, x[0], weight, weights)[0].shape == (40,)
    wide, meant, _ = product(NATIVE, x.double(), weight.double(), weights)
    torch.testing.assert_close(wide, x.double() @ meant.double().t(), rtol=1e-12, atol=1e-12)


def test_a_weight_that_is_not_row_major_is_multiplied_all_the_same() -> None:
    assert cpu.load() is None
    x, weight = torch.randn(1, 50), torch.randn(50, 30).t()
    torch.testing.assert_close(ops.dense_linear_rows(x, weight), x @ weight.t())


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("T", [1, 3, 6])
def test_threads_do_not_change_a_bit(weights: str, T: int) -> None:
    x, weight = torch.randn(T, 777).bfloat16(), torch.randn(203, 777).bfloat16()
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(product(NATIVE, x, weight, weights)[0])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("weights", WEIGHTS)
def test_poisoned_outputs_are_all_written(weights: str, poisoned_memory: None) -> None:
    for N in (1, 3, 4, 5, 193):
        assert product(NATIVE, torch.randn(2, 33), torch.randn(N, 33), weights)[0].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    assert cpu.load() is None
    x, weight, bias = (torch.randn(*s, dtype=dtype) for s in ((3, 32), (24, 32), (24,)))
    torch.library.opcheck(ops.dense_linear_rows, (x, weight, bias))
    torch.library.opcheck(
        quantized.dense_rows_operator, (x, *fields(quantize(weight, "int4")), bias)
    )


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.randn(1, 9)}, "weight.*8"),
    ({"weight": torch.randn(4)}, r"weight.*\[4\]|\(4,\)"),
    ({"weight": torch.randn(4, 8).half()}, "(?i)dtype.*half|float16"),
    ({"bias": torch.zeros(3)}, "bias"),
    ({"bias": torch.zeros(4).half()}, "bias"),
    ({"threshold": torch.zeros(3)}, "threshold"),
    ({"scale": torch.zeros(1)}, "scale"),
    ({"residual": torch.zeros(1, 3)}, "residual"),
])  # fmt: skip
def test_wrong_arguments_are_named(change: dict[str, Any], message: str, native: bool) -> None:
    assert cpu.load() is None
    call = ops.dense_linear_rows if native else ops.OPERATORS["dense_linear_rows"].fake
    with pytest.raises(RuntimeError, match=message):
        call(**{"x": torch.randn(1, 8), "weight": torch.randn(4, 8), **change})


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize(("change", "message"), [
    ({"x": torch.randn(1, 9)}, "columns"),
    ({"packed": torch.zeros(4, 8, dtype=torch.int8)}, "packed"),
    ({"scales": torch.zeros(4, 2)}, "scales"),
    ({"bits": 5}, "bits"),
    ({"bias": torch.zeros(3)}, "bias"),
])  # fmt: skip
def test_wrong_integers_are_named(change: dict[str, Any], message: str, native: bool) -> None:
    assert cpu.load() is None
    names = ("packed", "scales", "columns", "bits")
    given = dict(zip(names, fields(quantize(torch.randn(4, 8), "int8")), strict=True))
    call = quantized.dense_rows_operator
    if not native:
        call = ops.OPERATORS["dense_linear_rows_quantized"].fake
    with pytest.raises(RuntimeError, match=message):
        call(**{"x": torch.randn(1, 8), **given, **change})


def test_gradients_are_refused() -> None:
    weight = torch.randn(4, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward"):
        ops.dense_linear_rows(torch.randn(1, 8), weight)
