"""Compares every Triton kernel with the float64 definition on the card, before any is timed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.errors import WinaError
from wina.kernels import ops, reference, triton
from wina.kernels.triton import DTYPES


def check_kernels(device: torch.device) -> int:
    """Compare every operator with the definition in float64; the number of calls compared.

    Odd shapes, all dtypes, 1 to 17 tokens, NaN, bias, scale and residual, and one CUDA-graph
    replay.

    Raises:
        WinaError: a result is off; the message names the call.
    """
    compared = 0
    for T, K, N, dtype, sparsity in _odd_calls():
        generator = torch.Generator(device).manual_seed(T + K + N)
        x = torch.randn(T, K, generator=generator, device=device).to(dtype)
        gate, up = (
            (torch.randn(K, N, generator=generator, device=device) / K**0.5).to(dtype)
            for _ in range(2)
        )
        threshold = threshold_of(x, sparsity)
        bias = torch.randn(N, generator=generator, device=device).to(dtype)
        scale = torch.rand(T, generator=generator, device=device) + 0.5
        masked = reference.mask_inputs(x, threshold, scale).double()
        g, u = masked @ gate.double() + bias.double(), masked @ up.double()
        size = masked.abs() @ torch.maximum(gate.abs(), up.abs()).double() + bias.double().abs()
        name = f"{T} tokens, K={K}, N={N}, {dtype}, sparsity {sparsity}"
        eps = torch.finfo(dtype).eps
        linear = ops.sparse_linear(x, gate, threshold, bias, scale)
        compare(f"sparse_linear of {name}", linear, g, eps * g.abs() + 3e-6 * size + 1e-6)
        residual = torch.randn(T, N, generator=generator, device=device).to(dtype)
        added = ops.sparse_linear(x, gate, threshold, bias, scale, residual)
        # The definition, which serves more tokens than kernels do, rounds the product as well.
        y = g + residual.double()
        allowed = eps * (y.abs() + g.abs() * (T > triton.MAX_TOKENS)) + 3e-6 * size + 1e-6
        compare(f"sparse_linear with residual of {name}", added, y, allowed)
        group = ops.sparse_group(x, [gate, up], [threshold] * 2, [bias, None], [scale] * 2)
        for part, got, want in zip(("first", "second"), group, (g, u), strict=True):
            compare(f"sparse_group ({part} weight) of {name}", got, want,
                     eps * want.abs() + 3e-6 * size + 1e-6)  # fmt: skip
        compared += 2 + _check_scales(x, threshold.abs() + 0.1, name)
        again = ops.sparse_linear(x, gate, threshold, bias, scale)
        if not torch.equal(linear, again):
            raise WinaError(f"sparse_linear of {name} gave other bits the second time")
        h = ops.sparse_gate_up(x, gate, up, threshold, threshold, "silu", bias, None, scale, scale)
        # Above the kernels' tokens g, its activation and u are rounded on the way.
        roundings = 1 if T <= triton.MAX_TOKENS else 4
        allowed = (roundings * eps + 1e-5) * (1 + g.abs()) * (1 + u.abs()) + 6e-6 * size
        compare(f"sparse_gate_up of {name}", h, F.silu(g) * u, allowed)
        x[0, K // 2] = torch.nan
        dropped = ops.sparse_linear(x, gate, torch.full_like(threshold, torch.inf))
        if not dropped[0].isnan().all() or not dropped[1:].isfinite().all():
            raise WinaError(f"sparse_linear of {name} dropped a NaN, or spread it")
        compared += 3
    _check_graph(device)
    return compared + 1


def _check_scales(x: Tensor, threshold: Tensor, name: str) -> int:
    mean, want = ops.mean_scale(x), reference.mean_scale(x.float())
    compare(f"mean_scale of {name}", mean, want, 1e-5 * want)
    K = x.shape[1]
    probe = torch.cat([threshold / K, threshold[:1]])
    factor, want = ops.probe_scale(x, probe, 0.5), reference.probe_scale(x.float(), probe, 0.5)
    compare(f"probe_scale of {name}", factor, want, 1e-5 * want)
    states = [torch.full((len(x),), 0.2, device=x.device) for _ in range(2)]
    factor = ops.tracked_scale(x[:, None], threshold, states[0], 0.5, 0.1)
    want = reference.tracked_scale(x[:, None], threshold, states[1], 0.5, 0.1)
    compare(f"tracked_scale of {name}", factor, want, 1e-5 * want)
    # A channel at the edge of the cut-off may be dropped by one and not by the other.
    allowed = torch.full_like(states[1], 1e-5 + 0.1 / K)
    compare(f"the state of tracked_scale of {name}", states[0], states[1], allowed)
    if K == 1:
        return 4
    for dropped in {1, K // 2 or 1, K - 1}:
        cut = reference.topk_scale(x, threshold, dropped)
        compare(f"topk_scale ({dropped} dropped) of {name}", ops.topk_scale(x, threshold, dropped),
                 cut, torch.zeros_like(cut))  # fmt: skip
    return 5


def _odd_calls() -> Iterator[tuple[int, int, int, torch.dtype, float]]:
    shapes = ((1, 1), (63, 1000), (576, 63), (1000, 1536), (4097, 576), (1536, 4097), (4096, 4096))
    for K, N in shapes:
        for T in (1, 2, 5, 16, 17):
            for dtype in DTYPES:
                yield T, K, N, dtype, 0.5
    for sparsity in (0.0, 0.99):
        for T in (1, 16):
            yield T, 4096, 1024, torch.bfloat16, sparsity


def compare(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    """Raise a WinaError that names the call if a result is off by more than allowed, all [T, N]."""
    excess = float(((got.double() - want).abs() - allowed).max())
    if not excess <= 0:
        raise WinaError(f"{name} exceeds its error bound by {excess:.3g}: not timing anything")


def _check_graph(device: torch.device) -> None:
    x = torch.randn(1, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    threshold = threshold_of(x, 0.5)
    ops.sparse_linear(x, weight, threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.sparse_linear(x, weight, threshold)
    x.normal_()
    graph.replay()
    if not torch.equal(y, ops.sparse_linear(x, weight, threshold)):
        raise WinaError("sparse_linear replayed from a CUDA graph differs from a direct call")


def threshold_of(x: Tensor, sparsity: float) -> Tensor:
    """[K]: drops this share of all tokens' channels; each token has its own mask."""
    cut = x.abs().float().quantile(sparsity) if sparsity else torch.tensor(-1.0, device=x.device)
    return cut.expand(x.shape[1]).contiguous()
