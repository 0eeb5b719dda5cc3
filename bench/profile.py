"""Where a decoded token's time goes, by kind of work."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wina.api import sparsify
from wina.bench.decode import calibration_texts
from wina.config import SparsityConfig
from wina.decoding.engines import Trimmed, choose_engine
from wina.decoding.sampling import choose_token
from wina.errors import WinaError
from wina.kernels.program import INSTRUCTIONS
from wina.patch import restore

SPARSE, DENSE, HEAD = "sparse products", "dense products", "lm_head"
ATTENTION, NORMS, BETWEEN, PYTHON = "attention", "norms", "between", "Python, sampling"
KINDS = (SPARSE, DENSE, HEAD, ATTENTION, NORMS, BETWEEN, PYTHON)
WEIGHTS = (SPARSE, DENSE, HEAD)

_KIND_OF = {
    **dict.fromkeys(
        ("sparse", "sparse_integers", "gate_up", "gate_up_integers", "group_of_three"), SPARSE
    ),
    "dense": DENSE,
    "dense_integers": DENSE,
    "attend": ATTENTION,
    "rms_norm": NORMS,
}


# Tokens that plans are calibrated on: times depend on how many channels are kept, not on which.
_CALIBRATION_TOKENS = 2048


def profile_rows(
    model: Any,
    tokenizer: Any,
    prompt: Tensor,
    new_tokens: int,
    method: str,
    sparsities: Sequence[float | None],
    weight_dtypes: Sequence[str | None],
) -> list[dict[str, Any]]:
    """A row of :func:`profile_decode` for every weight width and sparsity.

    Args:
        model: a dense causal language model, dense again afterwards.
        tokenizer: the model's; None for random weights, which calibrate on random tokens.
        prompt: token ids [1, S].
        new_tokens: to time in each row.
        method: a name of :data:`wina.methods.METHODS`, maybe with settings of its own.
        sparsities: None is the model as it was loaded; it has one row only.
        weight_dtypes: formats of the projections' weights, None for the model's own.

    Returns:
        Rows with ``speedup`` over the first of them.
    """
    rows: list[dict[str, Any]] = []
    for width in weight_dtypes:
        for sparsity in sparsities:
            if sparsity is None and width is not None:
                continue
            if sparsity is not None:
                config = SparsityConfig.from_label(
                    method, sparsity=sparsity, weight_dtype=width,
                    rounding=width and "nearest",  # quick, and the time is that of any integers
                    calibration_tokens=_CALIBRATION_TOKENS,
                )  # fmt: skip
                texts = None if tokenizer else calibration_texts(model)
                sparsify(model, config, tokenizer=tokenizer, texts=texts, keep_original=True)
            try:
                profile = profile_decode(model, prompt, new_tokens)
            finally:
                if sparsity is not None:
                    restore(model)
            first = rows[0]["ms_per_token"] if rows else profile["ms_per_token"]
            rows.append(
                {
                    "engine": "wina decode",
                    "method": "dense" if sparsity is None else method,
                    "sparsity": sparsity or 0.0,
                    "dtype": str(model.dtype).removeprefix("torch."),
                    "weight_dtype": width or "",
                    "context": prompt.shape[1],
                    "threads": torch.get_num_threads(),
                    **profile,
                    "speedup": first / profile["ms_per_token"],
                }
            )
    return rows


def profile_decode(model: nn.Module, prompt: Tensor, new_tokens: int) -> dict[str, Any]:
    """Time greedy decode of one sequence by kind of work.

    Every instruction of the decode step is timed where it runs; two readings of the clock cost
    some 50 ns. What is left of a token is Python and sampling.

    Args:
        model: dense or sparsified, served by the trimmed step.
        prompt: token ids [1, S].
        new_tokens: to time, at least 1.

    Returns:
        {ms {kind → milliseconds}, ms_per_token, tokens_per_s, not_weights: share of a token that
        is not spent on products with weights}, medians over the tokens.

    Raises:
        WinaError: the model is not served by the trimmed step; the message says why.
    """
    engine = choose_engine(model)
    if not isinstance(engine, Trimmed):
        raise WinaError(f"only the trimmed decode step can be profiled: {engine.reason}")
    kinds = list(_kinds(engine.code))
    logits = engine.start(prompt, None, prompt.shape[1] + new_tokens + 1)
    seen: dict[str, list[float]] = defaultdict(list)
    ids = prompt
    for _ in range(new_tokens + 1):
        times = torch.zeros(len(kinds), dtype=torch.float64)
        start = time.perf_counter()
        tokens = choose_token(logits, ids, [], sample=False, generator=None)
        logits = engine.advance(int(tokens[0]), times)[None]
        token_s = time.perf_counter() - start
        spent: dict[str, float] = defaultdict(float)
        for kind, seconds in zip(kinds, times.tolist(), strict=True):
            spent[kind] += seconds
        spent[PYTHON] = token_s - sum(spent.values())
        for kind, seconds in spent.items():
            seen[kind].append(seconds)
    # The first token finds its code cold.
    ms = {kind: 1e3 * statistics.median(every[1:]) for kind, every in seen.items()}
    total = sum(ms.values())
    return {
        "ms": {kind: ms[kind] for kind in KINDS if kind in ms},
        "ms_per_token": total,
        "tokens_per_s": 1e3 / total,
        "not_weights": sum(t for kind, t in ms.items() if kind not in WEIGHTS) / total,
    }


def _kinds(code: Tensor) -> Iterator[str]:
    """The kind of every instruction of a program; the last product is the head's."""
    names = list(INSTRUCTIONS)
    words = code.tolist()
    found: list[str] = []
    at = 0
    while at < len(words):
        name = names[words[at]]
        found.append(_KIND_OF.get(name, BETWEEN))
        at += 2 + len(INSTRUCTIONS[name].operands)
    last = max((i for i, kind in enumerate(found) if kind in WEIGHTS), default=None)
    if last is not None:
        found[last] = HEAD
    yield from found
