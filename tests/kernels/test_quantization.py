"""Rounding weights to integers, and the layout."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from wina.errors import ConfigError
from wina.kernels import quantization
from wina.kernels.quantization import FORMATS, GROUP, LINE, format_of, groups_of, quantize

SHAPES = [(1, 1), (3, 63), (5, 64), (2, 127), (4, 128), (7, 129), (6, 576), (3, 1000), (2, 4097)]


def integers(packed: Tensor, scales: Tensor, K: int, N: int, bits: int) -> Tensor:
    """q by the words of the docstring, one weight at a time."""
    q = torch.empty(K, N)
    for j in range(K):
        row = [int(b) & 0xFF for b in packed[j]]
        for n in range(N):
            if bits == 8:
                q[j, n] = int(packed[j, n])
                continue
            group, column = divmod(n, GROUP)
            nibble, word = divmod(column, 16)
            start = LINE * group + 4 * word
            bits32 = int.from_bytes(bytes(row[start : start + 4]), "little")
            q[j, n] = (bits32 >> (4 * nibble) & 15) - 8
    return q


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("K", "N"), SHAPES[:-1])
def test_layout_is_the_documented_one(K: int, N: int, dtype: str) -> None:
    form = FORMATS[dtype]
    found = quantize(torch.randn(K, N), dtype)
    assert found.packed.shape == (K, form.row_bytes(N))
    assert found.packed.shape[1] % LINE == 0
    q = integers(found.packed, found.scales, K, N, form.bits)
    assert form.lowest <= q.min()
    assert q.max() <= form.highest
    scale = found.scales.float().repeat_interleave(GROUP, 1)[:, :N]
    assert torch.equal(found.dequantize(), q * scale)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("K", "N"), SHAPES)
def test_error_is_at_most_half_a_step_unless_clipping_is_better(K: int, N: int, dtype: str) -> None:
    weight = torch.randn(K, N)
    error = weight - quantize(weight, dtype).dequantize()
    form = FORMATS[dtype]
    for group in range(groups_of(N)):
        span = slice(GROUP * group, GROUP * (group + 1))
        # The scale of the first candidate, plain rounding to nearest, bounds the squared error.
        w = weight[:, span]
        largest = w.gather(1, w.abs().argmax(1, keepdim=True))
        scale = (largest / form.full).bfloat16().float()
        plain = (w / scale).round().clamp(form.lowest, form.highest) * scale - w
        assert (error[:, span].square().sum(1) <= plain.square().sum(1) * (1 + 1e-6) + 1e-12).all()


def test_gaussian_weights_lose_what_the_width_says() -> None:
    weight = torch.randn(256, 1024)
    size = weight.square().mean().sqrt()
    for dtype, most in (("int8", 0.0075), ("int4", 0.115)):
        error = (weight - quantize(weight, dtype).dequantize()).square().mean().sqrt()
        assert error / size < most


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-38, 3e38, -3e38])
def test_extreme_values(dtype: str, value: float) -> None:
    weight = torch.full((2, 130), value)
    weight[1] = 0.0
    back = quantize(weight, dtype).dequantize()
    assert back.isfinite().all()
    assert torch.equal(back[1], torch.zeros(130))
    assert torch.allclose(back, weight, rtol=0.01, atol=1e-36)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.float16])
def test_strides_chunks_and_dtypes_do_not_matter(
    dtype: str, source: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = torch.randn(33, 200).to(source)
    whole = quantize(weight, dtype)
    monkeypatch.setitem(quantization._CHUNK, "cpu", 1000)
    for same in (weight, weight.t().contiguous().t(), weight.float()):
        pieces = quantize(same, dtype)
        assert torch.equal(whole.packed, pieces.packed)
        assert torch.equal(whole.scales, pieces.scales)


def test_bytes_are_counted() -> None:
    weight = torch.randn(10, 4096)
    assert quantize(weight, "int8").bytes == 10 * (4096 + 64)
    assert quantize(weight, "int4").bytes == 10 * (2048 + 64)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("dtype", FORMATS)
def test_empty(dtype: str, shape: tuple[int, int]) -> None:
    assert quantize(torch.empty(shape), dtype).dequantize().shape == shape


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_what_cannot_be_rounded_is_refused(bad: float) -> None:
    weight = torch.randn(4, 4)
    weight[2, 1] = bad
    with pytest.raises(ConfigError, match="NaN or Inf"):
        quantize(weight, "int8")
    with pytest.raises(ConfigError, match=r"'int5'. Known: int8, int4"):
        quantize(torch.randn(4, 4), "int5")
    with pytest.raises(ConfigError, match="5 bits"):
        format_of(5)


@given(K=st.integers(1, 20), N=st.integers(1, 300), dtype=st.sampled_from(list(FORMATS)))
@settings(deadline=None, max_examples=40)
def test_padding_holds_no_weight(K: int, N: int, dtype: str) -> None:
    """Columns beyond N are zeros, which a kernel may multiply and drop."""
    found = quantize(torch.randn(K, N) + 3, dtype)
    width = found.packed.shape[1] * 8 // found.bits
    wider = type(found)(found.packed, found.scales, width, found.bits).dequantize()
    assert torch.equal(wider[:, :N], found.dequantize())
    assert not wider[:, N:].any()
