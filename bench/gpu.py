"""Check, then time, the Triton kernels on a card: ``python -m wina.bench.gpu``.

Every operator is compared with the float64 definition on the card first; a failure ends the run
before any time is taken. Times are of CUDA graphs over rotating (cold) weights, then of whole
decode steps. The run watches the clock and says what it left out. The last stdout line is one JSON
document.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from wina.bench.budget import Budget
from wina.bench.card import copy_bandwidth, require_card
from wina.bench.gpu_check import check_kernels
from wina.bench.gpu_decode import bench_steps, fits, model_on
from wina.bench.gpu_operators import CALLS, SCALES, bench_operators, bench_scales
from wina.bench.gpu_quantized import bench_quantized, check_quantized_kernels
from wina.bench.machine import machine_card
from wina.errors import WinaError
from wina.kernels import triton

# Columns of a table: title → (field, format); a field that a row lacks is left empty.
_OPERATORS = {
    "model": ("model", "{}"),
    "projection": ("projection", "{}"),
    "[N, K]": ("shape", "{0[0]}×{0[1]}"),
    "tokens": ("tokens", "{}"),
    "sparsity": ("sparsity", "{:.2f}"),
    "µs": ("time_us", "{:.1f}"),
    "of copy bandwidth": ("bandwidth_share", "{:.0%}"),
    "vs cuBLAS": ("speedup_vs_cublas", "{:.2f}×"),
    "vs compiled": ("speedup_vs_compiled", "{:.2f}×"),
    "vs TEAL-style": ("speedup_vs_teal_style", "{:.2f}×"),
}
_QUANTIZED = {
    "projection": ("projection", "{}"),
    "weights": ("weights", "{}"),
    "[N, K]": ("shape", "{0[0]}×{0[1]}"),
    "sparsity": ("sparsity", "{:.2f}"),
    "µs": ("time_us", "{:.1f}"),
    "of copy bandwidth": ("bandwidth_share", "{:.0%}"),
    "vs cuBLAS in bfloat16": ("speedup_vs_cublas", "{:.2f}×"),
}
_SCALES = {
    "kernel": ("kernel", "{}"),
    "channels": ("channels", "{}"),
    "µs": ("time_us", "{:.1f}"),
    "definition µs": ("definition_us", "{:.1f}"),
}
_STEPS = {
    "model": ("model", "{}"),
    "sparsity": ("sparsity", "{:.2f}"),
    "realised": ("realised", "{:.3f}"),
    "µs a token": ("time_us", "{:.0f}"),
    "tokens/s": ("tokens_per_s", "{:.1f}"),
    "vs compiled dense": ("speedup_vs_compiled_dense", "{:.2f}×"),
    "byte-ideal": ("byte_ideal", "{:.2f}×"),
    "of copy bandwidth": ("bandwidth_share", "{:.0%}"),
}


def print_gpu(rows: Sequence[dict[str, Any]], compared: int, left_out: Sequence[str]) -> None:
    """Tables for people, what was left out, then the JSON line."""
    console = Console(width=140)
    console.print(f"{compared} calls equal the definition", highlight=False)
    for title, columns, kernels in (
        ("decode steps, compiled and replayed from a CUDA graph", _STEPS, ("decode step",)),
        ("per-token cut-offs, one token", _SCALES, SCALES),
        (
            "integer weights, cold, one token",
            _QUANTIZED,
            ("sparse_linear_quantized", "sparse_gate_up_quantized"),
        ),
        (
            "operators, cold weights",
            _OPERATORS,
            ("sparse_linear", "sparse_group", "sparse_gate_up"),
        ),
    ):
        chosen = [row for row in rows if row["kernel"] in kernels]
        if not chosen:
            continue
        table = Table(title=title)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
        for row in chosen:
            table.add_row(*(_cell(row.get(field), form) for field, form in columns.values()))
        console.print(table)
    if left_out:
        console.print("left out for lack of time: " + "; ".join(left_out), highlight=False)
    document = {
        "rows": list(rows),
        "compared": compared,
        "left_out": list(left_out),
        "machine": machine_card(),
    }
    print(json.dumps(document))


def _cell(value: Any, form: str) -> str:
    return "" if value is None else form.format(value)


def main() -> None:
    """Check every kernel on the card, then time whole decode steps and the operators."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="check only, time nothing")
    parser.add_argument(
        "--quick", action="store_true", help="operators of Llama-3-8B only, no decode steps"
    )
    parser.add_argument("--shape", default="llama-3-8b", help="model of the decode steps")
    parser.add_argument("--minutes", type=float, default=9.0, help="time that it may take")
    parser.add_argument("--trace", type=Path, help="write a profiler trace of decode steps here")
    asked = parser.parse_args()
    # What is under way when time runs out still has to end.
    budget = Budget(60 * asked.minutes - 15)
    rows: list[dict[str, Any]] = []
    try:
        device = require_card("python -m wina.bench.gpu")
        if (reason := triton.refuses_card(device) or triton.load()) is not None:
            raise WinaError(f"no Triton kernels here: {reason}")
        with torch.no_grad():
            compared = check_kernels(device) + check_quantized_kernels(device)
            if not asked.check:
                rows = _measure(device, asked.shape, asked.quick, asked.trace, budget)
    except WinaError as error:
        print(f"wina: {error}", file=sys.stderr)
        sys.exit(1)
    print_gpu(rows, compared, budget.left_out)


def _measure(
    device: torch.device, shape: str, quick: bool, trace: Path | None, budget: Budget
) -> list[dict[str, Any]]:
    copy = copy_bandwidth(device)
    rows: list[dict[str, Any]] = []
    if not quick and fits(budget, shape):
        model = model_on(device, shape)
        card = torch.cuda.get_device_name(device)
        rows += bench_steps(model, shape, card, copy, budget, trace=trace)
        del model
        torch.cuda.empty_cache()
    rows += bench_scales(device, budget)
    calls = [call for call in CALLS if not quick or call.model == "Llama-3-8B"]
    rows += bench_quantized(device, copy, budget)
    return rows + bench_operators(device, copy, budget, calls)


if __name__ == "__main__":
    main()
