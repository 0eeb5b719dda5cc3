"""Decode speed of ``model.generate``: dense transformers against the patched model."""

from __future__ import annotations

import copy
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wina.api import sparsify
from wina.bench.machine import machine_card
from wina.bench.operators import DTYPES
from wina.bench.shapes import shape_config
from wina.bench.timing import interleave, ratio
from wina.config import SparsityConfig
from wina.inspection import measure_sparsity
from wina.patch import restore
from wina.plan import SparsityPlan
from wina.projections import find_projections


class _Clock:
    """A streamer that notes when each token arrives."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def decode_seconds(model: nn.Module, prompt: Tensor, new_tokens: int) -> float:
    """Seconds per token of greedy decode, without prefill.

    Args:
        model: dense or sparsified.
        prompt: token ids [1, S].
        new_tokens: tokens to generate, at least 2; end-of-sequence does not stop.
    """
    clock = _Clock()
    generate: Any = model.generate
    generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
    )
    # put() is called for the prompt, then for every token; the first token ends the prefill.
    first, last = clock.times[1], clock.times[-1]
    return (last - first) / (len(clock.times) - 2)


def bytes_per_token(model: nn.Module, realised: float = 0.0) -> int:
    """Weight bytes that one decoded token reads: kept projection weights and everything else.

    Embedding tables are read by one row only, except where tied to the language-model head.
    """
    skipped = 0.0
    for projection in find_projections(model):
        weight: Any = model.get_submodule(projection.name).weight
        skipped += realised * projection.weights * weight.itemsize
    total = sum(p.numel() * p.itemsize for p in model.parameters())
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight is not embedding.weight:
        total -= embedding.weight.numel() * embedding.weight.itemsize
    return int(total - skipped)


def random_model(shape: str, dtype: str) -> nn.Module:
    """A model of a named shape with random weights."""
    import transformers

    config = shape_config(shape)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[dtype])
    try:
        torch.manual_seed(0)
        with torch.device("cpu"):
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype])
    finally:
        torch.set_default_dtype(before)
    module: nn.Module = model.eval()
    return module


def bench_decode(
    model: nn.Module,
    plans: Sequence[SparsityPlan | SparsityConfig],
    prompt: Tensor,
    texts: Any,
    tokenizer: Any | None = None,
    new_tokens: int = 48,
    rounds: int = 4,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Time greedy decode of the dense model and of every plan, in turn.

    The dense model is timed as transformers loads it, beside a patched copy, so both are in
    memory at once.

    Returns:
        Rows of {engine, method, sparsity, realised, dtype, tokens_per_s, speedup_vs_dense,
        byte_ideal, spread}; ``byte_ideal`` is dense bytes over the bytes that the sparse model
        reads in this very run.
    """
    dense_bytes = bytes_per_token(model)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    patched = copy.deepcopy(model)
    rows: list[dict[str, Any]] = []
    for asked in plans:
        plan = (
            sparsify(patched, asked, tokenizer=tokenizer, texts=texts, show_progress=show_progress)
            if isinstance(asked, SparsityConfig)
            else sparsify(patched, asked)
        )
        with measure_sparsity(patched) as counter:
            decode_seconds(patched, prompt, min(new_tokens, 16))
        contenders: dict[str, Callable[[], float | None]] = {
            "dense": lambda: decode_seconds(model, prompt, new_tokens),
            "sparse": lambda: decode_seconds(patched, prompt, new_tokens),
        }
        title = f"decoding {plan.config.method} at {plan.config.sparsity:.0%}"
        times = interleave(contenders, rounds, title, show_progress)
        realised = counter.mean
        restore(patched)
        common = {"engine": "transformers generate", "dtype": dtype}
        rows.append(
            {
                **common,
                "method": "dense",
                "sparsity": 0.0,
                "realised": 0.0,
                "tokens_per_s": 1 / times["dense"].median,
                "speedup_vs_dense": 1.0,
                "byte_ideal": 1.0,
                "spread": times["dense"].spread,
            }
        )
        rows.append(
            {
                **common,
                "method": plan.config.method,
                "sparsity": plan.config.sparsity,
                "realised": realised,
                "tokens_per_s": 1 / times["sparse"].median,
                "speedup_vs_dense": ratio(times["dense"], times["sparse"]),
                "byte_ideal": dense_bytes / bytes_per_token(model, realised),
                "spread": times["sparse"].spread,
            }
        )
    return rows


def print_decode(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A table for people, then the JSON line."""
    table = Table(title=f"{title}: greedy decode, batch 1")
    for column in (
        "method", "sparsity", "realised", "dtype", "tokens/s", "vs dense", "byte ideal", "spread"
    ):  # fmt: skip
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"], f"{row['sparsity']:.2f}", f"{row['realised']:.3f}", row["dtype"],
            f"{row['tokens_per_s']:.1f}", f"{row['speedup_vs_dense']:.2f}×",
            f"{row['byte_ideal']:.2f}×", f"{row['spread']:.0%}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"model": title, "rows": list(rows), "machine": machine_card()}))
