"""What rounding weights to 8 and 4 bits costs: ``python -m wina.bench.rounding``.

Root mean square error of the weights relative to their own, for Gaussian weights and for one block
of a model. Scales are bfloat16 throughout. The way in use is the fourth column at a group of 128
(:mod:`wina.kernels.quantization`); the others are here to be compared with it.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wina.kernels.quantization import FORMATS, quantize_as

GROUPS = (32, 64, 128, 4096)
# The least share of a first plane's scale: 1 clips nothing, below 0.64 nothing is tried.
LEAST_SHARES = (1.0, 0.92, 0.64)
# The largest weight of a group becomes `full`; clipping tries ten scales; or a zero point.
WAYS: dict[str, dict[str, Any]] = {
    "int8": {"bits": 8, "full": 127},
    "int4 ±7": {"bits": 4, "full": 7},
    "int4 −8": {"bits": 4, "full": -8},
    "int4 −8, clipped": {"bits": 4, "full": -8, "clip": True},
    "int4 zero point, clipped": {"bits": 4, "full": None, "clip": True},
}
_SHRINK = tuple(1.0 - 0.04 * i for i in range(10))
_TINY = 1e-30


def error(weight: Tensor, group: int, bits: int, full: int | None, clip: bool = False) -> float:
    """Relative error of a weight [K, N] rounded in groups along N; ``full`` None: a zero point."""
    N = weight.shape[1]
    grouped = F.pad(weight.float(), (0, -N % group)).unflatten(1, (-1, group))
    best = torch.full(grouped.shape[:2], torch.inf)
    for share in _SHRINK if clip else (1.0,):
        back = _with_zero(grouped, bits, share) if full is None else _scaled(
            grouped, bits, full, share
        )  # fmt: skip
        best = torch.minimum(best, (grouped - back).square().sum(-1))
    return float((best.sum() / weight.float().square().sum()).sqrt())


def _scaled(w: Tensor, bits: int, full: int, share: float) -> Tensor:
    largest = w.gather(-1, w.abs().argmax(-1, keepdim=True))
    scale = _stored(largest * (share / full))
    top = 2 ** (bits - 1) - 1
    return scale * (w / scale).round().clamp(-top - (bits == 4), top)


def _with_zero(w: Tensor, bits: int, share: float) -> Tensor:
    low = w.amin(-1, keepdim=True).clamp(max=0) * share
    high = w.amax(-1, keepdim=True).clamp(min=0) * share
    top = 2**bits - 1
    scale = _stored((high - low) / top)
    zero = (-low / scale).round()
    return scale * (((w / scale).round() + zero).clamp(0, top) - zero)


def _stored(scale: Tensor) -> Tensor:
    scale = scale.to(torch.bfloat16).to(torch.float32)
    return torch.where(scale.abs() < _TINY, _TINY, scale)


def measure(weights: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Rows of {group, way → mean relative error} for weights [K, N]."""
    return [
        {"group": group}
        | {
            name: sum(error(w, group, **way) for w in weights) / len(weights)
            for name, way in WAYS.items()
        }
        for group in GROUPS
    ]


def measure_planes(weights: Sequence[Tensor]) -> list[dict[str, Any]]:
    """Rows of {least, first, both}: mean relative errors of weights [K, N] in two planes of 4 bits.

    ``least`` is how far the first plane may clip; the second clips as a weight of 4 bits does.
    """
    form = FORMATS["int4"]
    rows = []
    for least in LEAST_SHARES:
        gentle = replace(form, shrink=tuple(share for share in form.shrink if share >= least))
        errors = []
        for weight in weights:
            rest = weight - quantize_as(weight, gentle).dequantize()
            left = rest - quantize_as(rest, form).dequantize()
            errors.append([float(error.norm() / weight.norm()) for error in (rest, left)])
        first, both = (fmean(column) for column in zip(*errors, strict=True))
        rows.append({"least": least, "first": first, "both": both})
    return rows


def main() -> None:
    """Print tables for Gaussian weights and for a model's block, then one JSON line."""
    from wina.cli_options import load_model
    from wina.projections import find_projections

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="demo", help="folder, hub id or demo model")
    parser.add_argument("--block", type=int, default=10)
    asked = parser.parse_args()
    model, _ = load_model(asked.model, "float32")
    torch.manual_seed(0)
    sets = {
        "Gaussian": [torch.randn(512, 2048)],
        f"{asked.model}, block {asked.block}": [
            model.get_submodule(p.name).weight.detach().t()
            for p in find_projections(model)
            if p.block == asked.block
        ],
    }
    rows: list[dict[str, Any]] = []
    planes: list[dict[str, Any]] = []
    for name, weights in sets.items():
        found = measure(weights)
        rows += [{"weights": name, **row} for row in found]
        table = Table(title=f"{name}: relative error")
        for column in ("group", *WAYS):
            table.add_column(column, justify="right")
        for row in found:
            table.add_row(str(row["group"]), *(f"{row[way]:.2%}" for way in WAYS))
        Console(width=110).print(table)
        in_planes = measure_planes(weights)
        planes += [{"weights": name, **row} for row in in_planes]
        table = Table(title=f"{name}: 4 + 4 bits")
        for column in ("first clips to", "first", "both"):
            table.add_column(column, justify="right")
        for row in in_planes:
            table.add_row(f"{row['least']:.2f}", f"{row['first']:.2%}", f"{row['both']:.2%}")
        Console(width=110).print(table)
    print(json.dumps({"rows": rows, "planes": planes}))


if __name__ == "__main__":
    main()
