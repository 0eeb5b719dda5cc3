"""The native decode step against float64, instruction by instruction."""

from __future__ import annotations

import pytest
import torch
from operator_cases import DTYPES
from torch import Tensor

from wina.kernels import cpu
from wina.kernels.program import Builder, Cache, attend, bind, decode_step, rms_norm, step
from wina.kernels.quantization import quantize


def run(
    builder: Builder, caches: list[Tensor], position: int, outputs: int, native: bool
) -> Tensor:
    assert cpu.load() is None
    function = step if native else decode_step
    return function(
        0, position, torch.tensor(builder.code),
        torch.tensor(builder.numbers, dtype=torch.float64), builder.constants, caches, outputs,
    )  # fmt: skip


def vector(builder: Builder, x: Tensor) -> str:
    """A register that holds x."""
    return builder.emit("embed", "x", x[None], 1.0)


@pytest.mark.parametrize("native", [True, False], ids=["native", "definition"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("D", "heads", "kv_heads", "length", "R", "window", "softcap"),
    [(64, 9, 3, 300, 64, 0, 0.0), (20, 6, 2, 150, 12, 37, 0.0), (33, 4, 4, 70, 0, 0, 5.0),
     (128, 8, 1, 600, 128, 0, 0.0)],
)  # fmt: skip
def test_attention(
    D: int, heads: int, kv_heads: int, length: int, R: int, window: int, softcap: float,
    dtype: torch.dtype, native: bool,
) -> None:  # fmt: skip
    x = torch.randn((heads + 2 * kv_heads) * D).to(dtype)
    tables = (torch.randn(length, R), torch.randn(length, R)) if R else (None, None)
    q, k, v = x.split([heads * D, kv_heads * D, kv_heads * D])
    for position in (0, 7, 8, length - 1):
        caches = list(torch.randn(2, kv_heads, length, D).to(dtype))
        exact = [c.double() for c in caches]
        wide = [t.double() for t in (q, k, v)]
        want = attend(
            position, *wide, *exact, *tables, 0.3, softcap, window
        )  # fmt: skip
        builder = Builder(("q", "k", "v"))
        vector(builder, x)
        start = 0
        for name, part in zip("qkv", (q, k, v), strict=True):
            builder.emit("slice", name, "x", start, len(part))
            start += len(part)
        builder.emit("attend", "y", "q", "k", "v", Cache(0), Cache(1), *tables, 0.3, softcap,
                     window)  # fmt: skip
        builder.emit("logits", "y", "y", 1.0, 0.0)
        before = [c.clone() for c in caches]
        got = run(builder, caches, position, heads * D, native)
        # The token's own key is rounded to the cache's dtype before it is used.
        eps = torch.finfo(dtype).eps
        assert (got - want).abs().max() <= 8 * eps * want.abs().max() + 2e-5
        assert torch.equal(caches[1][:, position], v.view(kv_heads, D))
        for cache, old in zip(caches, before, strict=True):
            cache[:, position] = old[:, position]
            assert torch.equal(cache, old)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "runs"), [(576, 1), (63, 1), (16, 9)])
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm(n: int, runs: int, offset: float, dtype: torch.dtype) -> None:
    x, weight = (3 * torch.randn(n * runs)).to(dtype), torch.randn(n).to(dtype)
    wide = x.double().view(runs, n)
    want = wide / (wide.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    want = (want * (weight.double() + offset)).flatten()
    builder = Builder()
    vector(builder, x)
    builder.emit("rms_norm", "h", "x", weight, 1e-5, offset)
    builder.emit("logits", "h", "h", 1.0, 0.0)
    for native in (True, False):
        got = run(builder, [], 0, n * runs, native)
        assert (got - want).abs().max() <= torch.finfo(dtype).eps * want.abs().max() + 1e-6
    assert torch.equal(rms_norm(x, weight, 1e-5, offset).float(), got)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scaled", [False, True])
def test_dense_of_masked_inputs(dtype: torch.dtype, scaled: bool) -> None:
    # Whole steps, blocks and a rest; the identity shows which channels were kept.
    K = 150
    x = torch.tensor([0.5, -0.5, 2.0, -2.0, 0.0, 1.0]).repeat(K // 6).to(dtype)
    threshold = torch.tensor([1.0, 1.0, 1.0, 1.0, -1.0, 1.0]).repeat(K // 6)
    residual = torch.arange(K).to(dtype)
    want = torch.tensor([0.0, 0.0, 2.0, -2.0, 0.0, 0.0]).repeat(K // 6) + residual.float()
    for native in (True, False):
        builder = Builder()
        vector(builder, x)
        scale = builder.emit("mean_scale", "s", vector_of_ones(builder)) if scaled else None
        builder.emit("embed", "r", residual[None], 1.0)
        builder.emit("dense", "y", "x", torch.eye(K).to(dtype), None, threshold, scale, "r")
        builder.emit("logits", "y", "y", 1.0, 0.0)
        assert torch.equal(run(builder, [], 0, K, native), want.to(dtype).float())


@pytest.mark.parametrize("bits", ["int8", "int4"])
def test_dense_integers(bits: str) -> None:
    x, rounded = torch.randn(200), quantize(torch.randn(70, 200), bits)
    bias = torch.randn(70)
    for native in (True, False):
        builder = Builder()
        vector(builder, x)
        builder.emit("dense_integers", "y", "x", rounded.packed, rounded.scales, 200,
                     rounded.bits, bias)  # fmt: skip
        builder.emit("logits", "y", "y", 1.0, 0.0)
        want = rounded.dequantize() @ x + bias
        torch.testing.assert_close(run(builder, [], 0, 70, native), want, rtol=1e-4, atol=1e-3)


def vector_of_ones(builder: Builder) -> str:
    return builder.emit("embed", "ones", torch.ones(1, 4), 1.0)


def test_a_bound_step_is_the_step() -> None:
    builder = Builder()
    vector(builder, torch.randn(8))
    builder.emit("logits", "y", "x", 2.0, 0.0)
    given = (torch.tensor(builder.code), torch.tensor(builder.numbers).double(),
             builder.constants, [], 8)  # fmt: skip
    times = torch.zeros(2, dtype=torch.float64)
    assert torch.equal(bind(*given)(0, 0, times), step(0, 0, *given))
    assert (times > 0).all()
    with pytest.raises(RuntimeError, match="9 outputs expected"):
        bind(*given[:4], 9)(0, 0, None)


def test_a_nan_shows_and_stays_where_it_is() -> None:
    builder = Builder(("q", "k", "v"))
    x = torch.randn(3 * 16)
    vector(builder, x)
    for start, name in enumerate("qkv"):
        builder.emit("slice", name, "x", 16 * start, 16)
    builder.emit("attend", "y", "q", "k", "v", Cache(0), Cache(1), None, None, 1.0, 0.0, 0)
    builder.emit("logits", "y", "y", 1.0, 0.0)
    keys, values = torch.randn(2, 1, 40, 16)
    keys[:, 20:] = torch.nan
    assert run(builder, [keys, values], 19, 16, True).isfinite().all()
    assert run(builder, [keys, values], 30, 16, True).isnan().all()


@pytest.mark.parametrize("native", [True, False], ids=["native", "definition"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_vector_is_repeated(dtype: torch.dtype, native: bool) -> None:
    x, builder = torch.randn(37).to(dtype), Builder()
    vector(builder, x)
    builder.emit("repeat", "w", "x", 3)
    builder.emit("logits", "y", "w", 1.0, 0.0)
    assert torch.equal(run(builder, [], 0, 111, native), torch.cat([x, x, x]).float())


def test_broken_programs_are_refused() -> None:
    builder = Builder()
    vector(builder, torch.randn(8))
    builder.emit("logits", "y", "x", 1.0, 0.0)
    with pytest.raises(RuntimeError, match="9 outputs expected"):
        run(builder, [], 0, 9, True)
    for word, message in ((0, "no instruction"), (3, "no number"), (2, "no constant")):
        broken = Builder()
        broken.__dict__.update(vars(builder))
        broken.code = list(builder.code)
        broken.code[word] = 99
        with pytest.raises(RuntimeError, match=message):
            run(broken, [], 0, 8, True)
    short = Builder()
    short.__dict__.update(vars(builder))
    short.code = builder.code[:-1]
    with pytest.raises(RuntimeError, match="inside of an instruction"):
        run(short, [], 0, 8, True)


def test_times_of_every_instruction() -> None:
    builder = Builder()
    vector(builder, torch.randn(8))
    builder.emit("logits", "y", "x", 1.0, 0.0)
    for function in (step, decode_step):
        times = torch.zeros(2, dtype=torch.float64)
        function(0, 0, torch.tensor(builder.code), torch.tensor(builder.numbers).double(),
                 builder.constants, [], 8, times)  # fmt: skip
        assert (times > 0).all()
