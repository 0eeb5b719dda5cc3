"""What `wina generate` does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wina.api import sparsify
from wina.cli_options import config_of, give_rotation, load_model, resolve_model
from wina.decoding.loop import Decoded, decode
from wina.memory import peak_resident
from wina.patch import is_patched
from wina.plan import SparsityPlan
from wina.progress import progress
from wina.threads import thread_warnings


@dataclass(frozen=True)
class Request:
    """The options of the command.

    Attributes:
        as_json: print one JSON document in place of the text.
        settings: fields of a GenerationConfig.
    """

    prompt: str
    model: str
    plan: Path | None
    method: str
    sparsity: float
    dtype: str
    weight_dtype: str | None
    head: str
    tracking: float
    head_dtype: str
    trust: bool
    stream: bool
    as_json: bool
    seed: int | None
    settings: Mapping[str, Any]


def run(request: Request) -> Decoded:
    """Load, sparsify, decode; the text goes to stdout, everything about it to stderr."""
    from transformers import TextStreamer

    started = time.perf_counter()
    for warning in thread_warnings():
        print(f"warning: {warning}", file=sys.stderr)
    with progress(f"loading {Path(resolve_model(request.model)).name}", 1) as advance:
        model, tokenizer = load_model(
            request.model, request.dtype, request.trust, sparse=request.plan is None
        )
        advance()
    if not is_patched(model) and (request.plan or request.method != "dense"):
        plan = (
            SparsityPlan.load(request.plan)
            if request.plan
            else config_of(
                request.method,
                sparsity=request.sparsity,
                weight_dtype=request.weight_dtype,
                head=request.head,
                tracking=request.tracking,
            )
        )
        rotation = plan.rotation if isinstance(plan, SparsityPlan) else plan.rotation_spec
        give_rotation(model, rotation, tokenizer)
        sparsify(model, plan, tokenizer=tokenizer)
    ready = time.perf_counter() - started
    inputs = tokenizer(request.prompt, return_tensors="pt")
    decoded = decode(
        model,
        inputs.input_ids,
        attention_mask=inputs.attention_mask,
        streamer=TextStreamer(tokenizer) if request.stream else None,
        tokenizer=tokenizer,
        seed=request.seed,
        head_dtype=request.head_dtype,
        **request.settings,
    )
    text = request.prompt + tokenizer.decode(decoded.tokens[0], skip_special_tokens=True)
    if request.as_json:
        print(json.dumps(document(text, decoded, ready)))
    elif not request.stream:
        print(text)
    print(summary(decoded, ready), file=sys.stderr)
    return decoded


def document(text: str, decoded: Decoded, ready_s: float) -> dict[str, Any]:
    """What ``--json`` says of a continuation."""
    return {
        "text": text,
        "tokens": decoded.tokens[0].tolist(),
        "finish": decoded.finish[0],
        "tokens_per_s": decoded.tokens_per_s,
        "first_s": decoded.first_s,
        "ready_s": ready_s,
        "peak_bytes": peak_resident(),
        "engine": decoded.engine,
        "reason": decoded.reason,
    }


def summary(decoded: Decoded, ready_s: float) -> str:
    """Two lines about a continuation."""
    rate = decoded.tokens_per_s
    speed = "" if rate is None else f" at {rate:.1f} tokens/s"
    peak = peak_resident()
    memory = "" if peak is None else f", peak memory {peak / 2**30:.2f} GiB"
    return (
        f"{decoded.tokens.shape[1]} tokens{speed} (ended by {decoded.finish[0]}); first after "
        f"{decoded.first_s * 1e3:.0f} ms; ready after {ready_s:.1f} s{memory}\n"
        f"engine: {decoded.engine} ({decoded.reason})"
    )
