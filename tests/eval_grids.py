"""Folders of made-up evaluation results, in the format of ``eval/README.md``."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

ACCURACY = {
    "piqa": 0.68, "arc_easy": 0.55, "arc_challenge": 0.28, "hellaswag": 0.42, "winogrande": 0.52,
    "boolq": 0.60, "openbookqa": 0.32, "lambada_openai": 0.38, "gsm8k": 0.05, "xcopa_it": 0.53,
}  # fmt: skip
TASKS = (*ACCURACY, "wikitext2", "greedy_generation")
HARM = {"dense": 0.0, "teal": 1.0, "wina": 0.9, "was": 0.95, "random": 4.0}
TYPES = tuple(
    f"{block}.{name}_proj"
    for block, names in (("self_attn", "qkvo"), ("mlp", ("gate", "up", "down")))
    for name in names
)
PROMPT = "The history of science is"
TEXT = "a story of discovery, exploration and the pursuit of knowledge that never ends."


def make_grid(
    folder: Path,
    tasks: Sequence[str] = TASKS,
    methods: Sequence[str] = ("dense", "teal", "wina"),
    sparsities: Sequence[float] = (0.4, 0.5),
    documents: int = 200,
    layers: int = 6,
    missing: Collection[tuple[str, float, str]] = (),
    **header: Any,
) -> Path:
    """Write grid.json and cells/, the same bytes every time, and return the folder."""
    write_header(folder, tasks, methods, sparsities, documents, **header)
    for method in methods:
        for sparsity in (0.0,) if method == "dense" else sparsities:
            for task in tasks:
                if (method, sparsity, task) not in missing:
                    write_cell(folder, cell(method, sparsity, task, documents, layers))
    return folder


def write_header(
    folder: Path,
    tasks: Sequence[str],
    methods: Sequence[str],
    sparsities: Sequence[float],
    documents: int = 200,
    **more: Any,
) -> None:
    """Write grid.json."""
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    header = {
        "format": "wina-eval", "version": 1,
        "model": {"name": "smollm2-135m-instruct", "architecture": "llama",
                  "parameters": 134515008, "fingerprint": "0f3c9d"},
        "methods": list(methods), "sparsities": list(sparsities), "tasks": list(tasks),
        "protocol": "last:0.99", "limit": documents, "num_fewshot": 0,
        "versions": {"wina": "0.1.0", "lm_eval": "0.4.13", "torch": "2.13.0"},
        "machine": {"cpu": "Example CPU", "threads": 2},
        "command": "wina eval run --model smollm2-135m-instruct --output out/grid",
        "created": "2026-01-02T03:04:05+00:00",
        "cells": [
            {"key": key(m, s, task), "method": m, "sparsity": s, "task": task}
            for m in methods
            for s in ((0.0,) if m == "dense" else sparsities)
            for task in tasks
        ],
        **more,
    }  # fmt: skip
    (folder / "grid.json").write_text(json.dumps(header))


def write_cell(folder: Path, made: dict[str, Any]) -> Path:
    """Write a cell under its key."""
    path = folder / "cells" / f"{made['key']}.json"
    path.write_text(json.dumps(made))
    return path


def key(method: str, sparsity: float, task: str) -> str:
    """Name of a cell's file."""
    return hashlib.sha256(f"{method} {sparsity} {task}".encode()).hexdigest()[:32]


def cell(
    method: str, sparsity: float, task: str, documents: int = 200, layers: int = 6
) -> dict[str, Any]:
    """One measured cell: documents have difficulties that all methods share."""
    harm = HARM.get(method, 1.0) * sparsity**3
    shared = np.random.default_rng(sum(map(ord, task)))
    own = np.random.default_rng([sum(map(ord, task + method)), int(1000 * sparsity)])
    difficulty = shared.normal(size=documents)
    noise = own.normal(size=documents) * (0.3 if sparsity else 0.0)
    made: dict[str, Any] = {
        "format": "wina-eval", "version": 1,
        "key": key(method, sparsity, task), "identity": {},
        "method": method, "sparsity": sparsity, "task": task, "seconds": 12.5,
        "created": "2026-01-02T03:04:05+00:00", "samples": [], "agreement": None, "realised": None,
    }  # fmt: skip
    if task == "wikitext2":
        nats = 3.41 + 0.3 * difficulty + harm + 0.05 * noise
        stderr = float(nats.std(ddof=1)) / documents**0.5
        made |= {"kind": "perplexity", **_metrics("nats", float(nats.mean()), stderr, False, nats)}
        value = float(np.exp(nats.mean()))
        made["metrics"]["perplexity"] = {
            "value": value, "stderr": value * stderr, "higher_is_better": False,
        }  # fmt: skip
        made["primary"] = "perplexity"
    elif task == "greedy_generation":
        kept = np.round(64 * np.exp(-12 * harm * np.abs(difficulty)))
        made |= {
            "kind": "generation",
            **_metrics("same_prefix", float(kept.mean()), None, True, kept),
        }
        words = TEXT.split()
        changed = [w if own.random() > 4 * harm else w.upper() for w in words]
        made["samples"] = [{"prompt": PROMPT, "text": " ".join(changed)}]
    else:
        chance = ACCURACY.get(task, 0.5)
        right = (NormalDist().inv_cdf(chance) - 1.6 * harm > difficulty + noise).astype(float)
        mean = float(right.mean())
        stderr = (mean * (1 - mean) / (documents - 1)) ** 0.5 if documents > 1 else None
        made |= {"kind": "lm_eval", **_metrics("acc", mean, stderr, True, right)}
        made["metrics"]["acc_norm"] = {"value": mean, "stderr": None, "higher_is_better": True}
    if method != "dense":
        made["agreement"] = {"kl": 0.9 * harm, "kl_stderr": 0.02 * harm, "top1": 1 - 0.8 * harm,
                             "tokens": 50 * documents}  # fmt: skip
        shares = {
            f"model.layers.{i}.{name}": sparsity + 0.03 * float(np.sin(harm * i + j)) - 0.002 * i
            for i in range(layers)
            for j, name in enumerate(TYPES)
        }
        made["realised"] = {"overall": sparsity + 0.002, "projections": shares}
    return made


def bench(methods: Sequence[str], sparsities: Sequence[float]) -> dict[str, Any]:
    """A run of ``wina bench decode``."""
    pairs = [("dense", 0.0), *((m, s) for m in methods if m != "dense" for s in sparsities)]
    rows = [
        {"engine": "transformers generate", "method": method, "sparsity": sparsity,
         "dtype": "float32", "batch": batch, "context": 16, "threads": 2, "realised": sparsity,
         "tokens_per_s": 17.9 * batch**0.5 / (1 - 0.7 * sparsity), "verdict": "",
         "ms_per_step": 50.0, "speedup_vs_dense": 1 / (1 - 0.7 * sparsity),
         "low": 0.98 / (1 - 0.7 * sparsity), "high": 1.03 / (1 - 0.7 * sparsity),
         "byte_ideal": 1 / (1 - 0.8 * sparsity)}
        for batch in (4, 1)
        for method, sparsity in pairs
    ]  # fmt: skip
    return {
        "format": "wina-bench", "version": 1, "bench": "decode", "title": "smollm2-135m-instruct",
        "created": "2026-01-02T03:04:05+00:00", "arguments": {}, "warnings": [],
        "machine": {"cpu": "Example CPU", "threads": 2, "commit": "abc123"}, "rows": rows,
    }  # fmt: skip


def _metrics(
    name: str, value: float, stderr: float | None, higher: bool, rows: np.ndarray
) -> dict[str, Any]:
    metric = {"value": value, "stderr": stderr, "higher_is_better": higher}
    return {"metrics": {name: metric}, "primary": name, "rows": {name: rows.tolist()}}
