"""Operator time on cold weights, against the byte floor and against ``F.linear``."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wina.bench.machine import machine_card
from wina.bench.shapes import PROJECTION_SHAPES
from wina.bench.timing import Timing, interleave, ratio
from wina.errors import WinaError
from wina.kernels import reference
from wina.kernels.dispatch import LayerSpec, choose

# Weights rotated through must not fit into any cache.
COLD_BYTES = 512 << 20
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def bench_kernels(
    shapes: Sequence[tuple[int, int]] = PROJECTION_SHAPES,
    dtypes: Sequence[str] = ("float32", "bfloat16"),
    sparsities: Sequence[float] = (0.0, 0.5, 0.65),
    backend: str = "auto",
    rounds: int = 15,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Time one token through one projection of every shape.

    Each round runs, in turn: a plain read of the same buffers, ``F.linear`` on the usual N-major
    weight, and ``sparse_linear`` at every sparsity; each call takes the next of enough buffers to
    be cold. The result is compared with the reference first.

    Returns:
        Rows of {backend, shape [N, K], dtype, sparsity, threads, time_us, own_dense_us,
        torch_dense_us, speedup_vs_own_dense, speedup_vs_torch, bandwidth_gb_s, bandwidth_share,
        spread}.
    """
    rows = []
    for dtype_name in dtypes:
        for shape in shapes:
            rows += _bench_shape(shape, dtype_name, sparsities, backend, rounds, show_progress)
    return rows


def _bench_shape(
    shape: tuple[int, int],
    dtype_name: str,
    sparsities: Sequence[float],
    want: str,
    rounds: int,
    show_progress: bool,
) -> list[dict[str, Any]]:
    N, K = shape
    dtype = DTYPES[dtype_name]
    choice = choose(LayerSpec(torch.device("cpu"), dtype, K, N), want)
    operator = choice.backend.sparse_linear
    generator = torch.Generator().manual_seed(N * 31 + K)
    one = N * K * dtype.itemsize
    count = max(2, -(-COLD_BYTES // one))
    # K-major buffers; the N-major weights of F.linear are the same memory read another way, which
    # costs the same bytes.
    buffers = [(torch.randn(K, N, generator=generator) * 0.02).to(dtype)]
    buffers += [buffers[0].clone() for _ in range(count - 1)]
    x = torch.randn(1, K, generator=generator).to(dtype)
    thresholds = {s: threshold_for(x, s) for s in sparsities}
    _gate(operator, x, buffers[0], thresholds, choice.backend.name)

    state = {"next": 0}

    def each(function: Callable[[Tensor], object], calls: int) -> Callable[[], float]:
        def run() -> float:
            start = time.perf_counter()
            for _ in range(calls):
                function(buffers[state["next"]])
                state["next"] = (state["next"] + 1) % count
            return (time.perf_counter() - start) / calls

        return run

    calls = max(1, min(count, (128 << 20) // one))
    contenders: dict[str, Callable[[], float | None]] = {
        "read": each(plain_read, calls),
        "torch": each(lambda w: F.linear(x, w.view(N, K)), calls),
    }
    for s, threshold in thresholds.items():
        contenders[f"own {s}"] = each(lambda w, t=threshold: operator(x, w, t), calls)  # type: ignore[misc]
    with torch.no_grad():
        times = interleave(contenders, rounds, f"{dtype_name} {N}×{K}", show_progress)
    own_dense = times.get("own 0.0")
    rows = []
    for s, threshold in thresholds.items():
        own = times[f"own {s}"]
        kept = int(reference.keep_mask(x, threshold).sum())
        rows.append(
            {
                "backend": choice.backend.name,
                "shape": [N, K],
                "dtype": dtype_name,
                "sparsity": s,
                "kept": kept,
                "threads": torch.get_num_threads(),
                "time_us": own.median * 1e6,
                "own_dense_us": own_dense.median * 1e6 if own_dense else None,
                "torch_dense_us": times["torch"].median * 1e6,
                "speedup_vs_own_dense": ratio(own_dense, own) if own_dense else None,
                "speedup_vs_torch": ratio(times["torch"], own),
                "bandwidth_gb_s": kept * N * dtype.itemsize / own.median / 1e9,
                "bandwidth_share": _share(times["read"], own, kept / K),
                "spread": own.spread,
            }
        )
    return rows


def _share(read: Timing, own: Timing, kept: float) -> float:
    """Bandwidth on kept bytes as a share of what a plain read of all bytes reaches."""
    return ratio(read, own) * kept


def plain_read(buffer: Tensor) -> Tensor:
    """Read a buffer once and do next to nothing with it: the bandwidth ceiling.

    The maximum of the bytes as 64-bit integers is a single vectorised pass in torch.
    """
    return buffer.view(torch.int64).sum()


def threshold_for(x: Tensor, sparsity: float) -> Tensor:
    """A per-channel threshold vector [K] that drops this share of the channels of x [1, K]."""
    K = x.shape[-1]
    dropped = round(sparsity * K)
    if dropped == 0:
        return torch.full((K,), -1.0)
    magnitude = x[0].abs().float()
    order = magnitude.argsort()
    threshold = torch.full((K,), -1.0)
    threshold[order[:dropped]] = torch.inf
    return threshold


def _gate(
    operator: Callable[..., Tensor],
    x: Tensor,
    weight: Tensor,
    thresholds: dict[float, Tensor],
    name: str,
) -> None:
    """No speed is reported for a kernel that is wrong."""
    size = weight.double().abs()
    for sparsity, threshold in thresholds.items():
        got = operator(x, weight, threshold).double()
        want = reference.sparse_linear(x.double(), weight.double(), threshold)
        # One rounding of the output, and float32 accumulation over K terms.
        bound = torch.finfo(x.dtype).eps * want.abs() + 3e-6 * (x.double().abs() @ size) + 1e-7
        excess = float(((got - want).abs() - bound).max())
        if not excess <= 0:
            raise WinaError(
                f"backend {name} exceeds its error bound by {excess:.3g} at sparsity {sparsity}: "
                "not timing it"
            )


def print_kernels(rows: Sequence[dict[str, Any]]) -> None:
    """A table for people, then the JSON line."""
    table = Table(title="sparse_linear, one token, cold weights")
    for column in (
        "backend", "dtype", "[N, K]", "sparsity", "µs", "GB/s kept", "of read bandwidth",
        "vs own dense", "vs F.linear", "spread",
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        against = row["speedup_vs_own_dense"]
        table.add_row(
            row["backend"], row["dtype"], "×".join(map(str, row["shape"])),
            f"{row['sparsity']:.2f}", f"{row['time_us']:.0f}", f"{row['bandwidth_gb_s']:.1f}",
            f"{row['bandwidth_share']:.0%}", f"{against:.2f}×" if against else "",
            f"{row['speedup_vs_torch']:.2f}×", f"{row['spread']:.0%}",
        )  # fmt: skip
    Console(width=130).print(table)
    print(json.dumps({"rows": list(rows), "machine": machine_card()}))
