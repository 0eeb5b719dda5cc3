"""``wina demo``: a real model, dense and sparse side by side."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from wina.api import sparsify
from wina.bench.decode import decode_seconds
from wina.bench.machine import machine_card
from wina.bench.timing import interleave, ratio
from wina.config import SparsityConfig
from wina.eval.perplexity import perplexity
from wina.patch import restore
from wina.texts import bundled, to_windows

PROMPT = "The history of science is"


def run_demo(
    model: Any,
    tokenizer: Any,
    name: str,
    methods: Sequence[str] = ("teal", "wina"),
    sparsities: Sequence[float] = (0.4, 0.5),
    tokens: int = 6144,
    new_tokens: int = 40,
    rounds: int = 5,
    show_progress: bool = True,
) -> dict[str, Any]:
    """Measure dense and every method × sparsity: perplexity, realised sparsity, decode speed.

    Args:
        model: a dense decoder; it stays dense, a copy of it is patched.
        tokenizer: the model's.
        name: for the report.
        methods: names of :data:`wina.methods.METHODS`.
        sparsities: shares of input channels to drop.
        tokens: of held-out text to score.
        new_tokens: length of each continuation.
        rounds: of timing, dense and sparse in turn.
        show_progress: draw progress bars on stderr.

    Returns:
        {"model", "dtype", "heldout_tokens", "rows", "machine"}, JSON-ready.
    """
    windows = to_windows(bundled("heldout"), tokenizer, 512, tokens)
    prompt = tokenizer(PROMPT, return_tensors="pt").input_ids
    baseline = perplexity(model, windows, title="scoring dense", show_progress=show_progress)
    rows = [
        {
            "method": "dense",
            "sparsity": 0.0,
            "realised": 0.0,
            "perplexity": baseline.perplexity,
            "continuation": _continue(model, tokenizer, prompt),
        }
    ]
    dense_seconds: list[float] = []
    sparse = copy.deepcopy(model)
    for method in methods:
        for sparsity in sparsities:
            config = SparsityConfig(method=method, sparsity=sparsity, calibration_tokens=4096)
            sparsify(sparse, config, tokenizer=tokenizer, show_progress=show_progress)
            label = f"{method} at {sparsity:.0%}"
            scored = perplexity(
                sparse, windows, title=f"scoring {label}", show_progress=show_progress
            )
            times = interleave(
                {
                    "dense": lambda: decode_seconds(model, prompt, new_tokens),
                    "sparse": lambda: decode_seconds(sparse, prompt, new_tokens),
                },
                rounds,
                f"decoding {label}",
                show_progress,
            )
            dense_seconds += times["dense"].seconds
            rows.append(
                {
                    "method": method,
                    "sparsity": sparsity,
                    "realised": scored.realised,
                    "perplexity": scored.perplexity,
                    "tokens_per_s": 1 / times["sparse"].median,
                    "speedup": ratio(times["dense"], times["sparse"]),
                    "continuation": _continue(sparse, tokenizer, prompt),
                }
            )
            restore(sparse)
    dense_seconds.sort()
    rows[0]["tokens_per_s"] = 1 / dense_seconds[len(dense_seconds) // 2]
    rows[0]["speedup"] = 1.0
    return {
        "model": name,
        "dtype": str(model.dtype).removeprefix("torch."),
        "heldout_tokens": baseline.tokens,
        "rows": rows,
        "machine": machine_card(),
    }


def _continue(model: Any, tokenizer: Any, prompt: torch.Tensor) -> str:
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=24, do_sample=False
    )
    return str(tokenizer.decode(output[0], skip_special_tokens=True))


def print_demo(report: dict[str, Any], picture: Path | None) -> None:
    """A table and the continuations for people, then the JSON line."""
    console = Console(width=100)
    table = Table(title=f"{report['model']} ({report['dtype']})")
    for column in ("method", "sparsity", "realised", "perplexity", "tokens/s", "vs dense"):
        table.add_column(column, justify="right")
    for row in report["rows"]:
        table.add_row(
            row["method"], f"{row['sparsity']:.2f}", f"{row['realised']:.3f}",
            f"{row['perplexity']:.2f}", f"{row['tokens_per_s']:.1f}", f"{row['speedup']:.2f}×",
        )  # fmt: skip
    console.print(table)
    console.print(
        f"perplexity on {report['heldout_tokens']} held-out tokens, all but the first two tokens "
        "of each window sparse; calibrated on other text.\n"
    )
    for row in report["rows"]:
        label = Text(f"{row['method']} {row['sparsity']:.0%}: ", style="bold")
        console.print(label + Text(row["continuation"], style="default"))
    if picture is not None:
        console.print(f"\npicture: {picture}")
    print(json.dumps(report))


def draw_demo(report: dict[str, Any], path: Path) -> None:
    """Quality and speed against realised sparsity, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    rows = report["rows"]
    dense = rows[0]
    figure, (quality, speed) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for method in dict.fromkeys(row["method"] for row in rows[1:]):
        points = [dense, *(row for row in rows if row["method"] == method)]
        x = [100 * row["realised"] for row in points]
        quality.plot(x, [row["perplexity"] for row in points], marker="o", label=method.upper())
        speed.plot(x, [row["speedup"] for row in points], marker="o", label=method.upper())
    quality.axhline(dense["perplexity"], color="0.6", linestyle=":", label="dense")
    speed.axhline(1.0, color="0.6", linestyle=":", label="dense")
    quality.set_ylabel("perplexity (lower is better)")
    speed.set_ylabel("decode speed relative to dense")
    for axes in (quality, speed):
        axes.set_xlabel("projection weights skipped per token, %")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{report['model']}, {report['dtype']}, {report['machine']['cpu']}")
    figure.savefig(path, dpi=150)
    plt.close(figure)
