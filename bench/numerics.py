"""Errors of every backend and dtype against float64: ``python -m wina.bench.numerics``.

One token through ``sparse_linear`` and ``sparse_gate_up``, half of its channels dropped, on inputs
of every kind that :data:`CASES` names. The result in float64 is that of the very numbers the
kernel was given, with the mask of the definition. Triton's kernels run in its interpreter, in a
process of their own. Prints a table for people, then one JSON line.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wina.bench.machine import machine_card
from wina.kernels import cpu, reference
from wina.kernels.dispatch import backends
from wina.kernels.quantization import FORMATS, GROUP, QuantizedWeight, quantize

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
WEIGHTS = ("as x", *FORMATS)
OPERATORS = ("sparse_linear", "sparse_gate_up")
K, N = 500, 193  # no multiples of a vector, a tile or a group
ACTIVATION = "silu"
ROUNDING = 2.0**-24  # of a float32
Inputs = tuple[Tensor, Tensor]
Make = Callable[[torch.Generator, torch.dtype], Inputs]


def _normal(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    x = torch.randn(K, generator=generator)
    return x, torch.randn(K, N, generator=generator) / math.sqrt(K)


def _massive(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    x, weight = _normal(generator, dtype)
    x[17], x[K // 2] = 1e4, -1e4
    return x, weight


def _denormal(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Hidden states below the smallest normal number of their dtype, weights of about 1."""
    x, weight = _normal(generator, dtype)
    return x * torch.finfo(dtype).tiny / 4, weight * math.sqrt(K)


def _large_sums(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Sums beyond the largest float16, of inputs that it holds."""
    x = 400 + 100 * torch.rand(K, generator=generator)
    return x, torch.rand(K, N, generator=generator) + 0.5


def _large_parts(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
    """Sums that float16 holds of parts that it does not: the first half is taken back."""
    x, weight = _large_sums(generator, dtype)
    weight[K // 2 :] = -weight[: K - K // 2]
    x[K // 2 :] = x[: K - K // 2]
    return x, weight + torch.rand(K, N, generator=generator) / K


def _holding(value: float) -> Make:
    def make(generator: torch.Generator, dtype: torch.dtype) -> Inputs:
        x, weight = _normal(generator, dtype)
        x[17] = value
        return x, weight.abs() + 0.1

    return make


CASES: dict[str, Make] = {
    "normal": _normal,
    "massive activations": _massive,
    "denormals": _denormal,
    "sums beyond float16": _large_sums,
    "partial sums beyond float16": _large_parts,
    "a NaN": _holding(math.nan),
    "an Inf": _holding(math.inf),
    "a negative Inf": _holding(-math.inf),
}


def measure(
    names: Sequence[str], cases: Sequence[str] = tuple(CASES), seed: int = 0
) -> list[dict[str, Any]]:
    """Rows of errors for backends that run here, see :func:`compare` for the figures."""
    rows = []
    for case in cases:
        for dtype in DTYPES:
            generator = torch.Generator().manual_seed(seed)
            x, weight = CASES[case](generator, dtype)
            _, other = _normal(generator, dtype)
            x = x.to(dtype)[None]
            # Half of the channels: the median of what is finite.
            size = x.float().abs()
            threshold = torch.full((K,), float(size[size.isfinite()].median()))
            for kind in WEIGHTS:
                given = (weight, other)
                pair = [w.to(dtype) if kind == "as x" else quantize(w, kind) for w in given]
                for operator in OPERATORS:
                    want, meant = (
                        _exact(operator, x, [_wide(w) for w in weights], threshold)
                        for weights in (pair, given)
                    )
                    parts = _reach(operator, x, pair, threshold)
                    for name in names:
                        got = _call(backends()[name], operator, x, pair, threshold)
                        rows.append({
                            "case": case, "operator": operator, "backend": name,
                            "dtype": str(dtype).removeprefix("torch."), "weights": kind,
                            **compare(got, want, meant, parts),
                        })  # fmt: skip
    return rows


def _wide(weight: Tensor | QuantizedWeight) -> Tensor:
    """The numbers that a weight stands for, float64 [K, N]."""
    return (weight if isinstance(weight, Tensor) else weight.dequantize()).double()


def _exact(operator: str, x: Tensor, weights: Sequence[Tensor], threshold: Tensor) -> Tensor:
    kept = torch.where(reference.keep_mask(x, threshold), x, 0).double()
    if operator == "sparse_linear":
        return kept @ weights[0]
    return reference.ACTIVATIONS[ACTIVATION](kept @ weights[0]) * (kept @ weights[1])


def _reach(
    operator: str, x: Tensor, weights: Sequence[Tensor | QuantizedWeight], threshold: Tensor
) -> Tensor:
    """How far each element moves, to first order, when sums are off by their parts' total size.

    A part of a sum is |x_j·w_j|; of integers, from which a kernel may take an offset at the end,
    |x_j·scale_j|·2^bits.
    """
    kept = torch.where(reference.keep_mask(x, threshold), x, 0).double()
    sizes = [kept.abs() @ _part_sizes(w) for w in weights]
    if operator == "sparse_linear":
        return sizes[0]
    gate, up = (kept @ _wide(w) for w in weights)
    with torch.enable_grad():
        gate.requires_grad_()
        act = reference.ACTIVATIONS[ACTIVATION](gate)
        (slope,) = torch.autograd.grad(act.sum(), gate)
    return slope.abs() * sizes[0] * up.abs() + act.detach().abs() * sizes[1]


def _part_sizes(weight: Tensor | QuantizedWeight) -> Tensor:
    if isinstance(weight, Tensor):
        return weight.double().abs()
    scales = weight.scales.double().abs().repeat_interleave(GROUP, dim=1)
    return scales[:, : weight.columns] * float(2**weight.bits)


def _call(backend: Any, operator: str, x: Tensor, weights: Sequence[Any], cut: Tensor) -> Tensor:
    single = operator == "sparse_linear"
    integers = isinstance(weights[0], QuantizedWeight)
    fields = [
        part
        for w in (weights[:1] if single else weights)
        for part in ((w.packed, w.scales) if integers else (w,))
    ]
    form = (weights[0].columns, weights[0].bits) if integers else ()
    call = getattr(backend, operator + ("_quantized" if integers else ""))
    tail = (cut,) if single else (cut, cut, ACTIVATION)
    result: Tensor = call(x, *fields, *form, *tail)
    return result


def compare(got: Tensor, want: Tensor, meant: Tensor, reach: Tensor) -> dict[str, Any]:
    """Figures of a result in some dtype.

    Args:
        got: the result.
        want: in float64, from the numbers that were multiplied.
        meant: in float64, from the weights before they were rounded.
        reach: in float64, see :func:`_reach`.

    Returns:
        ``error``: ‖got − want‖/‖want‖ over what is finite in both. ``floor``: the same for ``want``
        rounded once to the dtype, which is the least that can be. ``sums``: 2^-24 ‖reach‖/‖want‖,
        what sums in float32 may cost: large where most of a sum cancels. ``with_weights``:
        ‖got − meant‖/‖meant‖, likewise. ``other_kind``: how many elements are finite, +inf, −inf or
        NaN where ``want`` rounded to the dtype is something else. ``hidden``: how many are finite
        where it is not. ``not_finite``: how many of that rounded ``want`` are not finite.
    """
    rounded = want.to(got.dtype)
    return {
        "error": _relative(got, want),
        "floor": _relative(rounded, want),
        "sums": _relative(want + ROUNDING * reach, want, got),
        "with_weights": _relative(got, meant),
        "other_kind": int((_kind(got) != _kind(rounded)).sum()),
        "hidden": int((got.isfinite() & ~rounded.isfinite()).sum()),
        "not_finite": int((~rounded.isfinite()).sum()),
    }


def _relative(got: Tensor, want: Tensor, where: Tensor | None = None) -> float | None:
    both = (got if where is None else where).isfinite() & want.isfinite()
    if not both.any():
        return None
    difference, size = (got.double() - want)[both].norm(), want[both].norm()
    return float(difference / size) if size else float(difference)


def _kind(y: Tensor) -> Tensor:
    return y.isnan() * 1 + y.isposinf() * 2 + y.isneginf() * 3


def interpret() -> None:
    """Let Triton's kernels serve CPU tensors of this process, which TRITON_INTERPRET rules."""
    from wina.kernels.triton import operators
    from wina.kernels.triton.config import Card

    # What a launch asks of a card.
    vars(operators)["card_of"] = lambda _: Card("interpreter", 2)
    vars(torch.cuda)["device"] = lambda _: nullcontext()
    operators.register("CPU")


def _triton(cases: Sequence[str]) -> list[dict[str, Any]]:
    answer = subprocess.run(
        [sys.executable, "-m", "wina.bench.numerics", "--interpreted", "--cases", ",".join(cases)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    rows: list[dict[str, Any]] = json.loads(answer.stdout.splitlines()[-1])["rows"]
    return rows


def main() -> None:
    """Measure, print the table, and keep the result if asked to."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", default=",".join(CASES), help="by commas")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--interpreted", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    cases = asked.cases.split(",")
    if asked.interpreted:
        interpret()
        print(json.dumps({"rows": measure(["triton"], cases)}))
        return
    if (reason := cpu.load()) is not None:
        raise SystemExit(reason)
    rows = measure(["reference", "cpu"], cases) + _triton(cases)
    order = list(CASES)
    rows.sort(key=lambda row: order.index(row["case"]))
    _print(rows)
    command = " ".join(["python -m wina.bench.numerics", *sys.argv[1:]])
    result = {"command": command, "shape": [N, K], "machine": machine_card(), "rows": rows}
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


def _print(rows: Sequence[dict[str, Any]]) -> None:
    table = Table(title="relative error against float64")
    for column in ("case", "operator", "backend", "dtype", "weights"):
        table.add_column(column)
    for column in ("error", "floor", "with weights", "other kind", "hidden", "not finite"):
        table.add_column(column, justify="right")
    for row in rows:
        errors = (row[key] for key in ("error", "floor", "with_weights"))
        table.add_row(
            *(row[key] for key in ("case", "operator", "backend", "dtype", "weights")),
            *("" if value is None else f"{value:.1e}" for value in errors),
            *(str(row[key]) for key in ("other_kind", "hidden", "not_finite")),
        )  # fmt: skip
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
