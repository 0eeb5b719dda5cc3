"""Dense products on the usual and on the K-major weight layout: ``python -m wina.bench.layouts``.

Why dense products of patched 16-bit layers go through the kernel (``kernels/README.md``).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from wina.bench.machine import machine_card
from wina.bench.operators import DTYPES
from wina.bench.timing import interleave, ratio
from wina.kernels.dispatch import LayerSpec, choose


def run(N: int = 1536, K: int = 576, tokens: tuple[int, ...] = (1, 16, 128, 512)) -> None:
    """Print a table and a JSON line."""
    rows = []
    for name, dtype in DTYPES.items():
        backend = choose(LayerSpec(torch.device("cpu"), dtype, K, N)).backend
        weight = torch.randn(N, K).to(dtype)
        k_major = weight.t().contiguous()
        for T in tokens:
            x = torch.randn(T, K).to(dtype)
            ways: dict[str, Callable[[], object]] = {
                "usual layout, F.linear": lambda x=x, w=weight: F.linear(x, w),  # type: ignore[misc]
                "K-major, F.linear": lambda x=x, w=k_major: F.linear(x, w.t()),  # type: ignore[misc]
                "K-major, ours": lambda x=x, w=k_major, b=backend: b.dense_linear(x, w),  # type: ignore[misc]
            }
            with torch.no_grad():
                times = interleave(
                    {way: _timed(call) for way, call in ways.items()}, 3, f"{name}, {T} tokens"
                )
            usual = next(iter(times.values()))
            rows += [
                {
                    "dtype": name,
                    "shape": [N, K],
                    "tokens": T,
                    "way": way,
                    "time_us": timing.median * 1e6,
                    "speed_vs_usual": ratio(usual, timing),
                }
                for way, timing in times.items()
            ]
    table = Table(title=f"dense product, [N, K] = {N}×{K}")
    for column in ("dtype", "tokens", "way", "µs", "speed vs usual layout"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            str(row["dtype"]),
            str(row["tokens"]),
            str(row["way"]),
            f"{row['time_us']:.0f}",
            f"{row['speed_vs_usual']:.3g}×",
        )
    Console(width=100).print(table)
    print(json.dumps({"rows": rows, "machine": machine_card()}))


def _timed(call: Callable[[], object]) -> Callable[[], float]:
    def measured() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return measured


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    run()
