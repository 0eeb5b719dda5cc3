"""Check, then time, the Triton kernels on a card: ``python -m wina.bench.gpu``.

Every operator is compared with the float64 definition on the card first; a failure ends the run
before any time is taken. Times are of CUDA graphs over rotating (cold) weights. The last stdout
line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wina.bench.card import cold_copies, copy_bandwidth, require_card, seconds_in_graph
from wina.bench.machine import machine_card
from wina.errors import WinaError
from wina.kernels import ops, reference, triton
from wina.kernels.triton import DTYPES
from wina.progress import progress

# (model, projection, K, N); gate and up are timed as one fused call.
CALLS = (
    ("Llama-3-8B", "q/o", 4096, 4096),
    ("Llama-3-8B", "k/v", 4096, 1024),
    ("Llama-3-8B", "gate_up", 4096, 14336),
    ("Llama-3-8B", "down", 14336, 4096),
    ("Qwen2.5-7B", "q/o", 3584, 3584),
    ("Qwen2.5-7B", "gate_up", 3584, 18944),
    ("Qwen2.5-7B", "down", 18944, 3584),
    ("Llama-3.2-1B", "q/o", 2048, 2048),
    ("Llama-3.2-1B", "gate_up", 2048, 8192),
    ("Llama-3.2-1B", "down", 8192, 2048),
    ("Phi-4", "o", 5120, 5120),
    ("Phi-4", "gate_up", 5120, 17920),
    ("Phi-4", "down", 17920, 5120),
)
TOKENS = (1, 2, 4, 8, 16)
SPARSITIES = (0.0, 0.25, 0.4, 0.5, 0.65)


def check_kernels(device: torch.device) -> int:
    """Compare every operator with the definition in float64; the number of calls compared.

    Odd shapes, all dtypes, 1 to 17 tokens, NaN, bias and scale, and one CUDA-graph replay.

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
        threshold = _threshold(x, sparsity)
        bias = torch.randn(N, generator=generator, device=device).to(dtype)
        scale = torch.rand(T, generator=generator, device=device) + 0.5
        masked = reference.mask_inputs(x, threshold, scale).double()
        g, u = masked @ gate.double() + bias.double(), masked @ up.double()
        size = masked.abs() @ torch.maximum(gate.abs(), up.abs()).double() + bias.double().abs()
        name = f"{T} tokens, K={K}, N={N}, {dtype}, sparsity {sparsity}"
        eps = torch.finfo(dtype).eps
        linear = ops.sparse_linear(x, gate, threshold, bias, scale)
        _compare(f"sparse_linear of {name}", linear, g, eps * g.abs() + 3e-6 * size + 1e-6)
        again = ops.sparse_linear(x, gate, threshold, bias, scale)
        if not torch.equal(linear, again):
            raise WinaError(f"sparse_linear of {name} gave other bits the second time")
        h = ops.sparse_gate_up(x, gate, up, threshold, threshold, "silu", bias, None, scale, scale)
        # Above the kernels' tokens g, its activation and u are rounded on the way.
        roundings = 1 if T <= triton.MAX_TOKENS else 4
        allowed = (roundings * eps + 1e-5) * (1 + g.abs()) * (1 + u.abs()) + 6e-6 * size
        _compare(f"sparse_gate_up of {name}", h, F.silu(g) * u, allowed)
        x[0, K // 2] = torch.nan
        dropped = ops.sparse_linear(x, gate, torch.full_like(threshold, torch.inf))
        if not dropped[0].isnan().all() or not dropped[1:].isfinite().all():
            raise WinaError(f"sparse_linear of {name} dropped a NaN, or spread it")
        compared += 3
    _check_graph(device)
    return compared + 1


def _odd_calls() -> Iterator[tuple[int, int, int, torch.dtype, float]]:
    shapes = ((1, 1), (63, 1000), (576, 63), (1000, 1536), (4097, 576), (1536, 4097), (4096, 4096))
    for K, N in shapes:
        for T in (1, 2, 5, 16, 17):
            for dtype in DTYPES:
                yield T, K, N, dtype, 0.5
    for sparsity in (0.0, 0.99):
        for T in (1, 16):
            yield T, 4096, 1024, torch.bfloat16, sparsity


def _compare(name: str, got: Tensor, want: Tensor, allowed: Tensor) -> None:
    excess = float(((got.double() - want).abs() - allowed).max())
    if not excess <= 0:
        raise WinaError(f"{name} exceeds its error bound by {excess:.3g}: not timing anything")


def _check_graph(device: torch.device) -> None:
    x = torch.randn(1, 4096, device=device, dtype=torch.bfloat16)
    weight = torch.randn(4096, 4096, device=device, dtype=torch.bfloat16)
    threshold = _threshold(x, 0.5)
    ops.sparse_linear(x, weight, threshold)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.sparse_linear(x, weight, threshold)
    x.normal_()
    graph.replay()
    if not torch.equal(y, ops.sparse_linear(x, weight, threshold)):
        raise WinaError("sparse_linear replayed from a CUDA graph differs from a direct call")


def _threshold(x: Tensor, sparsity: float) -> Tensor:
    """[K]: drops this share of all tokens' channels; each token has its own mask."""
    cut = x.abs().float().quantile(sparsity) if sparsity else torch.tensor(-1.0, device=x.device)
    return cut.expand(x.shape[1]).contiguous()


def bench_operators(
    device: torch.device, quick: bool = False, show_progress: bool = True
) -> list[dict[str, Any]]:
    """Time every call in bfloat16 against cuBLAS and, for one token, the TEAL-style kernel.

    Returns:
        Rows of {card, model, kernel, shape [N, K], dtype, tokens, sparsity, time_us, cublas_us,
        teal_style_us, speedup_vs_cublas, speedup_vs_teal_style, kept_bytes, bandwidth_share};
        ``kept_bytes`` counts rows that any token keeps, ``bandwidth_share`` is of the card's
        measured copy bandwidth.
    """
    copy = copy_bandwidth(device)
    calls = CALLS[:4] if quick else CALLS
    rows: list[dict[str, Any]] = []
    with progress("timing operators", len(calls) * len(TOKENS), show_progress) as advance:
        for model, projection, K, N in calls:
            products = 2 if projection == "gate_up" else 1
            weights = [
                torch.randn(K, N, device=device).div_(K**0.5).bfloat16() for _ in range(products)
            ]
            copies = cold_copies(weights)
            for tokens in TOKENS:
                rows += _time_call(model, projection, tokens, copies, copy)
                advance()
            del weights, copies
    return rows


def _time_call(
    model: str, projection: str, tokens: int, copies: list[list[Tensor]], copy: float
) -> list[dict[str, Any]]:
    from wina.bench.teal_style import TILES, teal_style

    K, N = copies[0][0].shape
    x = torch.randn(tokens, K, device=copies[0][0].device).bfloat16()
    fused = len(copies[0]) == 2

    def dense(ws: list[Tensor]) -> Tensor:
        g = F.linear(x, ws[0].t())
        return F.silu(g) * F.linear(x, ws[1].t()) if fused else g

    def sparse(threshold: Tensor) -> Callable[[list[Tensor]], Tensor]:
        if fused:
            return lambda ws: ops.sparse_gate_up(x, ws[0], ws[1], threshold, threshold, "silu")
        return lambda ws: ops.sparse_linear(x, ws[0], threshold)

    cublas = seconds_in_graph(dense, copies)
    rows = []
    for sparsity in SPARSITIES:
        threshold = _threshold(x, sparsity)
        seconds = seconds_in_graph(sparse(threshold), copies)
        kept_rows = int(reference.keep_mask(x, threshold).any(dim=0).sum())
        kept = kept_rows * N * len(copies[0]) * x.itemsize
        teal = None
        if tokens == 1 and not fused:
            cut = max(0.0, float(threshold[0]))
            teal = min(
                seconds_in_graph(lambda ws, c=cut, t=tile: teal_style(x, ws[0], c, t), copies)  # type: ignore[misc]
                for tile in TILES
            )
        rows.append(
            {
                "card": torch.cuda.get_device_name(x.device),
                "model": model,
                "kernel": "sparse_gate_up" if fused else "sparse_linear",
                "shape": [N, K],
                "dtype": "bfloat16",
                "tokens": tokens,
                "sparsity": sparsity,
                "time_us": seconds * 1e6,
                "cublas_us": cublas * 1e6,
                "teal_style_us": teal and teal * 1e6,
                "speedup_vs_cublas": cublas / seconds,
                "speedup_vs_teal_style": teal and teal / seconds,
                "kept_bytes": kept,
                "bandwidth_share": kept / seconds / copy,
            }
        )
    return rows


def print_gpu(rows: Sequence[dict[str, Any]], compared: int) -> None:
    """A table for people, then the JSON line."""
    table = Table(title=f"Triton kernels, cold weights ({compared} calls equal the definition)")
    for column in (
        "model", "kernel", "[N, K]", "tokens", "sparsity", "µs", "of copy bandwidth",
        "vs cuBLAS", "vs TEAL-style",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        teal = row["speedup_vs_teal_style"]
        table.add_row(
            row["model"], row["kernel"], "×".join(map(str, row["shape"])), str(row["tokens"]),
            f"{row['sparsity']:.2f}", f"{row['time_us']:.1f}", f"{row['bandwidth_share']:.0%}",
            f"{row['speedup_vs_cublas']:.2f}×", f"{teal:.2f}×" if teal else "",
        )  # fmt: skip
    Console(width=140).print(table)
    print(json.dumps({"rows": list(rows), "compared": compared, "machine": machine_card()}))


def main() -> None:
    """Check every kernel on the card, then time the operators."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="check only, time nothing")
    parser.add_argument("--quick", action="store_true", help="Llama-3-8B only")
    asked = parser.parse_args()
    try:
        device = require_card("python -m wina.bench.gpu")
        if (reason := triton.refuses_card(device) or triton.load()) is not None:
            raise WinaError(f"no Triton kernels here: {reason}")
        with torch.no_grad():
            compared = check_kernels(device)
            rows = [] if asked.check else bench_operators(device, asked.quick)
    except WinaError as error:
        print(f"wina: {error}", file=sys.stderr)
        sys.exit(1)
    print_gpu(rows, compared)


if __name__ == "__main__":
    main()
