"""Times the operators on a card: cold weights, CUDA graphs, against the strongest dense product."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.bench.budget import Budget
from wina.bench.card import cold_copies, seconds_in_graph
from wina.bench.gpu_check import threshold_of
from wina.kernels import ops, reference
from wina.progress import progress

TOKENS = (1, 2, 4, 8, 16)
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65)
# Hidden sizes and widths of MLPs whose per-token cut-offs are timed.
CHANNELS = (2048, 4096, 14336, 18944)
SCALES = ("topk_scale", "mean_scale", "probe_scale", "tracked_scale")
# Seconds that one row of calls, and a compilation of the dense product, may take.
_ROW_S = 6.0
_COMPILE_S = 25.0


@dataclass(frozen=True)
class Call:
    """One call of a model: weights [K, N] of the hidden state's K channels, read together."""

    model: str
    projection: str
    kernel: str
    K: int
    columns: tuple[int, ...]


def _calls(model: str, hidden: int, q: int, kv: int, mlp: int, fused: bool = False) -> list[Call]:
    """The calls of one decoder block; ``fused`` models keep q, k and v in one weight."""
    attention = (
        Call(model, "qkv", "sparse_linear", hidden, (q + 2 * kv,))
        if fused
        else Call(model, "q, k, v", "sparse_group", hidden, (q, kv, kv))
    )
    return [
        attention,
        Call(model, "o", "sparse_linear", q, (hidden,)),
        Call(model, "gate_up", "sparse_gate_up", hidden, (mlp, mlp)),
        Call(model, "down", "sparse_linear", mlp, (hidden,)),
    ]


CALLS = (
    *_calls("Llama-3-8B", 4096, 4096, 1024, 14336),
    *_calls("Qwen2.5-7B", 3584, 3584, 512, 18944),
    *_calls("Llama-3.2-1B", 2048, 2048, 512, 8192),
    *_calls("Phi-4", 5120, 5120, 1280, 17920, fused=True),
)


def _sparse_linear(x: Tensor, weights: Sequence[Tensor], threshold: Tensor) -> object:
    return ops.sparse_linear(x, weights[0], threshold)


def _sparse_group(x: Tensor, weights: Sequence[Tensor], threshold: Tensor) -> object:
    none = [None] * len(weights)
    return ops.sparse_group(x, list(weights), [threshold] * len(weights), none, none)


def _sparse_gate_up(x: Tensor, weights: Sequence[Tensor], threshold: Tensor) -> object:
    return ops.sparse_gate_up(x, weights[0], weights[1], threshold, threshold, "silu")


def _dense_products(x: Tensor, weights: Sequence[Tensor]) -> object:
    return [F.linear(x, w) for w in weights]


def _dense_gate_up(x: Tensor, weights: Sequence[Tensor]) -> object:
    return F.silu(F.linear(x, weights[0])) * F.linear(x, weights[1])


@dataclass(frozen=True)
class _Way:
    """A kernel (x, weights [K, N], threshold), and torch's way (x, weights [N, K])."""

    sparse: Callable[[Tensor, Sequence[Tensor], Tensor], object]
    dense: Callable[[Tensor, Sequence[Tensor]], object]


_WAYS = {
    "sparse_linear": _Way(_sparse_linear, _dense_products),
    "sparse_group": _Way(_sparse_group, _dense_products),
    "sparse_gate_up": _Way(_sparse_gate_up, _dense_gate_up),
}


def bench_operators(
    device: torch.device, copy: float, budget: Budget, calls: Sequence[Call] = CALLS,
    show_progress: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """Time calls in bfloat16 against cuBLAS, ``torch.compile`` and the TEAL-style kernel.

    cuBLAS reads the weights in the layout that it is faster with. ``torch.compile`` is timed for
    one token, and the TEAL-style kernel for one token of a single weight.

    Args:
        device: the card.
        copy: its copy bandwidth in bytes per second.
        budget: ends the bench in time; what is left out is noted there.
        calls: what to time.
        show_progress: draw progress on stderr.

    Returns:
        Rows of {card, model, kernel, projection, shape [ΣN, K], dtype, tokens, sparsity, time_us,
        cublas_us, compiled_us, teal_style_us, speedup_vs_cublas, speedup_vs_compiled,
        speedup_vs_teal_style, kept_bytes, bandwidth_share}; ``kept_bytes`` counts rows that any
        token keeps, ``bandwidth_share`` is of the copy bandwidth.
    """
    rows: list[dict[str, Any]] = []
    # One token first: should time run out, larger batches are what is missing.
    work = [(call, tokens) for tokens in TOKENS for call in calls]
    with progress("timing operators", len(work), show_progress) as advance:
        for call, tokens in work:
            what = f"{call.model} {call.projection}, {tokens} tokens"
            if budget.allows(what, _ROW_S):
                rows += _time_call(call, tokens, device, copy, budget)
            advance()
    return rows


def _time_call(
    call: Call, tokens: int, device: torch.device, copy: float, budget: Budget
) -> list[dict[str, Any]]:
    K, way = call.K, _WAYS[call.kernel]
    x = torch.randn(tokens, K, device=device).bfloat16()
    weights = [torch.randn(K, N, device=device).div_(K**0.5).bfloat16() for N in call.columns]
    copies = cold_copies(weights)

    def dense(ws: Sequence[Tensor]) -> object:
        return way.dense(x, [w.view(w.shape[1], K) for w in ws])

    cublas = min(
        seconds_in_graph(dense, copies),
        seconds_in_graph(lambda ws: way.dense(x, [w.t() for w in ws]), copies),
    )
    compiled = None
    if tokens == 1 and budget.allows(f"torch.compile of {call.model} {call.projection}",
                                     _COMPILE_S):  # fmt: skip
        # Calls share one cache of compiled code, which is small and falls back to eager silently.
        torch.compiler.reset()
        compiled = seconds_in_graph(torch.compile(dense, dynamic=False), copies)
    rows = []
    for sparsity in SPARSITIES:
        threshold = threshold_of(x, sparsity)
        seconds = seconds_in_graph(
            lambda ws, t=threshold: way.sparse(x, ws, t),  # type: ignore[misc]
            copies,
        )
        kept_rows = int(reference.keep_mask(x, threshold).any(dim=0).sum())
        kept = kept_rows * sum(call.columns) * x.itemsize
        teal = None
        if tokens == 1 and call.kernel == "sparse_linear":
            teal = _teal_style(x, threshold, copies)
        rows.append(
            {
                "card": torch.cuda.get_device_name(device),
                "model": call.model,
                "kernel": call.kernel,
                "projection": call.projection,
                "shape": [sum(call.columns), K],
                "dtype": "bfloat16",
                "tokens": tokens,
                "sparsity": sparsity,
                "time_us": seconds * 1e6,
                "cublas_us": cublas * 1e6,
                "compiled_us": compiled and compiled * 1e6,
                "teal_style_us": teal and teal * 1e6,
                "speedup_vs_cublas": cublas / seconds,
                "speedup_vs_compiled": compiled and compiled / seconds,
                "speedup_vs_teal_style": teal and teal / seconds,
                "kept_bytes": kept,
                "bandwidth_share": kept / seconds / copy,
            }
        )
    return rows


def _teal_style(x: Tensor, threshold: Tensor, copies: Sequence[list[Tensor]]) -> float:
    """Seconds of the TEAL-style kernel with its fastest tile."""
    from wina.bench.teal_style import TILES, teal_style

    cut = max(0.0, float(threshold[0]))
    return min(
        seconds_in_graph(lambda ws, t=tile: teal_style(x, ws[0], cut, t), copies)  # type: ignore[misc]
        for tile in TILES
    )


def bench_scales(device: torch.device, budget: Budget) -> list[dict[str, Any]]:
    """Time the per-token cut-offs of one bfloat16 token against their plain-torch definitions.

    Returns:
        Rows of {card, kernel, channels, dtype, tokens, time_us, definition_us}.
    """
    rows: list[dict[str, Any]] = []
    for K in CHANNELS:
        x = torch.randn(1, K, device=device).bfloat16()
        threshold = 1 / (torch.rand(K, device=device) + 0.1)
        ways: dict[str, tuple[Callable[..., object], Callable[..., object], tuple[Any, ...]]] = {
            "topk_scale": (ops.topk_scale, reference.topk_scale, (x, threshold, K // 2)),
            "mean_scale": (ops.mean_scale, reference.mean_scale, (x,)),
            "probe_scale": (
                ops.probe_scale,
                reference.probe_scale,
                (x, torch.randn(K + 1, device=device), 0.5),
            ),
            "tracked_scale": (
                ops.tracked_scale,
                reference.tracked_scale,
                (x, threshold, torch.zeros(1, device=device), 0.5, 0.02),
            ),
        }
        for kernel, (own, definition, arguments) in ways.items():
            if not budget.allows(f"{kernel} of {K} channels", _ROW_S):
                continue
            times = [
                seconds_in_graph(lambda _, f=f, a=arguments: f(*a), [[x], [x]])  # type: ignore[misc]
                for f in (own, definition)
            ]
            rows.append(
                {
                    "card": torch.cuda.get_device_name(device),
                    "kernel": kernel,
                    "channels": K,
                    "dtype": "bfloat16",
                    "tokens": 1,
                    "time_us": times[0] * 1e6,
                    "definition_us": times[1] * 1e6,
                }
            )
    return rows
