"""Where a decoded token's time goes, by kind of work."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from wina.decoding.engines import Trimmed, choose_engine
from wina.decoding.sampling import choose_token
from wina.errors import WinaError
from wina.kernels.program import INSTRUCTIONS

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
    last = max((i for i, kind in enumerate(found) if kind == DENSE), default=None)
    if last is not None:
        found[last] = HEAD
    yield from found
