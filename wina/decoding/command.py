"""What `wina generate` does."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wina.api import sparsify
from wina.cli_options import config_of, give_rotation, load_model, resolve_model
from wina.config import USUAL_METHOD
from wina.decoding.loop import Decoded, decode, settled
from wina.decoding.sampling import processors_for
from wina.errors import ConfigError
from wina.memory import peak_resident
from wina.patch import is_patched
from wina.plan import SparsityPlan
from wina.progress import progress
from wina.threads import thread_warnings


@dataclass(frozen=True)
class Request:
    """The options of the command.

    Attributes:
        method: None for the usual one, or for that of the plan in the model's folder.
        asked: fields of a :class:`SparsityConfig`, None for what is not said.
        as_json: print one JSON document in place of the text.
        settings: fields of a GenerationConfig.
    """

    prompt: str
    model: str
    plan: Path | None
    method: str | None
    asked: Mapping[str, Any]
    dtype: str
    head_dtype: str
    trust: bool
    stream: bool
    as_json: bool
    seed: int | None
    settings: Mapping[str, Any]


def run(request: Request) -> Decoded:
    """Load, sparsify, decode; the text goes to stdout, everything about it to stderr."""
    from transformers import GenerationConfig, TextStreamer

    started = time.perf_counter()
    # What makes no sense is said before anything is loaded.
    settings = settled(None, GenerationConfig(), dict(request.settings))
    processors_for(settings, 1, torch.device("cpu"))
    asked = {name: value for name, value in request.asked.items() if value is not None}
    if request.plan is not None and (asked or request.method is not None):
        given = ", ".join([*asked, *(["method"] if request.method else [])])
        raise ConfigError(f"a plan says all of it: leave out {given}, or the plan")
    if request.method == "dense":
        asked["sparsity"] = 0.0
    said = request.plan is not None or request.method is not None or bool(asked)
    for warning in thread_warnings():
        print(f"warning: {warning}", file=sys.stderr)
    with progress(f"loading {Path(resolve_model(request.model)).name}", 1) as advance:
        model, tokenizer = load_model(request.model, request.dtype, request.trust, sparse=not said)
        advance()
    plain = request.plan is None and request.method == "dense" and "weight_dtype" not in asked
    if not is_patched(model) and not plain:
        plan = (
            SparsityPlan.load(request.plan)
            if request.plan
            else config_of(request.method or USUAL_METHOD, **asked)
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
