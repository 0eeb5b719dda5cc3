"""A sparse model as a folder for a model hub: weights, plan, tokenizer and a model card."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wina.api import sparsify
from wina.bench.generation import decode_seconds
from wina.bench.machine import machine_card
from wina.bench.timing import interleave, ratio
from wina.eval.perplexity import perplexity
from wina.methods import METHODS
from wina.patch import patch_of
from wina.plan import SparsityPlan
from wina.saving import PLAN_FOLDER
from wina.texts import bundled, to_windows


@dataclass(frozen=True)
class Measured:
    """What a model card may say, all of it measured on this machine.

    Attributes:
        tokens: scored tokens of the bundled held-out text.
        dense, sparse: perplexity on them; sparse in all but the first two tokens of a window.
        realised: share of projection weights that the sparse model skipped there.
        dense_tokens_per_s, tokens_per_s: while one sequence is decoded.
        speedup: over the dense model, median of rounds in turn.
        machine: from :func:`wina.bench.machine.machine_card`.
    """

    tokens: int
    dense: float
    sparse: float
    realised: float
    dense_tokens_per_s: float
    tokens_per_s: float
    speedup: float
    machine: Mapping[str, Any]


def measure(
    model: Any,
    tokenizer: Any,
    plan: SparsityPlan,
    tokens: int = 4096,
    new_tokens: int = 32,
    rounds: int = 5,
    show_progress: bool = True,
) -> Measured:
    """Quality and speed of a plan on a dense model, which stays dense: a copy of it is patched."""
    windows = to_windows(bundled("heldout"), tokenizer, 512, tokens)
    prompt = windows[:1, :8].to(model.device)
    dense = perplexity(model, windows, title="scoring dense", show_progress=show_progress)
    sparse_model = copy.deepcopy(model)
    sparsify(sparse_model, plan, show_progress=show_progress)
    sparse = perplexity(sparse_model, windows, title="scoring sparse", show_progress=show_progress)
    times = interleave(
        {
            "dense": lambda: decode_seconds(model, prompt, new_tokens),
            "sparse": lambda: decode_seconds(sparse_model, prompt, new_tokens),
        },
        rounds,
        "decoding",
        show_progress,
    )
    return Measured(
        tokens=dense.tokens,
        dense=dense.perplexity,
        sparse=sparse.perplexity,
        realised=sparse.realised,
        dense_tokens_per_s=1 / times["dense"].median,
        tokens_per_s=1 / times["sparse"].median,
        speedup=ratio(times["dense"], times["sparse"]),
        machine=machine_card(),
    )


def export(
    model: Any,
    tokenizer: Any,
    folder: Path,
    source: str,
    command: str,
    measured: Measured | None = None,
) -> None:
    """Write a sparsified model, its tokenizer and a model card into ``folder``.

    Args:
        model: sparsified.
        tokenizer: the model's.
        folder: made if missing; its ``README.md`` is replaced.
        source: hub id or folder that the model was loaded from.
        command: what was run, for the reader.
        measured: figures for the card.
    """
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    card = model_card(patch_of(model).plan, model.dtype, source, command, measured)
    (folder / "README.md").write_text(card, encoding="utf-8")


def model_card(
    plan: SparsityPlan,
    dtype: torch.dtype,
    source: str,
    command: str,
    measured: Measured | None = None,
) -> str:
    """The ``README.md`` of a hub repository: metadata as YAML, then text for people."""
    from huggingface_hub import ModelCardData

    local = Path(source).exists()
    name = Path(source).resolve().name if local else source
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["wina", "activation-sparsity"],
        base_model=None if local else source,
    )
    config = plan.config
    method = METHODS[config.method]
    facts = {
        "model": name,
        "method": f"{config.method}: {method.source}",
        "sparsity asked": f"{config.sparsity:.0%} of the projections' weights, allocation "
        f"{config.allocation_spec}",
        "realised on calibration text": f"{plan.realised:.3f}",
        "calibration": f"{plan.calibration.get('tokens')} tokens, text "
        f"{plan.calibration.get('text')}",
        "prefill": config.prefill,
        "language-model head": "one of the projections" if config.head == "sparse" else "dense",
        "weights": str(dtype).removeprefix("torch.")
        if config.weight_dtype is None
        else f"in {config.weight_dtype} once loaded, rounded by {config.rounding_spec}",
    }
    rows = "\n".join(f"| {key} | {value} |" for key, value in facts.items())
    return f"""---
{data.to_yaml()}
---

# {name}, {config.sparsity:.0%} sparse

A decoded token reads only the weight columns that matter to it. The weights are complete and lie as
usual: without wina this is a dense model. The folder `{PLAN_FOLDER}/` holds the thresholds.

| | |
| --- | --- |
{rows}

## Use it

```python
import wina  # before from_pretrained
from transformers import AutoModelForCausalLM, AutoTokenizer

path = "THIS REPOSITORY OR FOLDER"
model = AutoModelForCausalLM.from_pretrained(path)
tokenizer = AutoTokenizer.from_pretrained(path)
inputs = tokenizer("The history of science is", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=64)[0]))
print(wina.inspect(model))
```

## Measured

{_measured_text(measured)}

## How it was made

```bash
{command}
```
"""


def _measured_text(measured: Measured | None) -> str:
    if measured is None:
        return "Nothing: `wina export --measure` measures perplexity and decoding speed."
    machine = measured.machine
    dense_rate, rate = measured.dense_tokens_per_s, measured.tokens_per_s
    return f"""| | dense | sparse |
| --- | --- | --- |
| perplexity | {measured.dense:.2f} | {measured.sparse:.2f} |
| projection weights skipped | 0 | {measured.realised:.3f} |
| decoding, tokens/s | {dense_rate:.1f} | {rate:.1f} |

{measured.tokens} tokens of wina's held-out text in windows of 512, all but the first two of each
sparse. Speed {measured.speedup:.2f}× of dense (one sequence; {machine["cpu"]},
{machine["threads"]} threads; dense and sparse in turn)."""
