"""How far a sparse model's predictions are from the dense model's, token by token.

More sensitive than the accuracy of any task: every token of a text says something, and the noise
of the text itself cancels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wina.inspection import measure_sparsity
from wina.patch import dense

# Tokens whose logits are alive at once, for the dense and for the sparse model.
_CHUNK = 256


@dataclass(frozen=True)
class Agreement:
    """What was compared on a set of texts.

    Attributes:
        kl: KL(dense‖sparse) of the next-token distributions in nats, the mean over tokens.
        kl_stderr: its standard error, with the texts as clusters; None for a single text.
        top1: share of tokens where both models find the same token most likely.
        tokens: predictions compared.
        realised: share of projection weights that the sparse tokens skipped, and the same for
            every projection.
    """

    kl: float
    kl_stderr: float | None
    top1: float
    tokens: int
    realised: float
    by_projection: dict[str, float]


def agreement(model: nn.Module, texts: Sequence[Sequence[int]], tokens: int) -> Agreement:
    """Compare a sparsified model with itself made dense, on the first ``tokens`` of the texts.

    Args:
        model: sparsified; its prefill protocol says which tokens of a text are sparse.
        texts: token ids, each text a sequence of its own; the last one used may be cut.
        tokens: upper bound of the tokens to read.
    """
    device = next(model.parameters()).device
    divergence, same, counts = [], [], []
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        counter = stack.enter_context(measure_sparsity(model))
        for ids in _first(texts, tokens):
            batch = torch.tensor([ids], device=device)
            sparse = _logits(model, batch)
            with dense(model):
                exact = _logits(model, batch)
            kl, equal = _compare(exact, sparse)
            divergence.append(kl)
            same.append(equal)
            counts.append(len(ids))
    total = sum(counts)
    sums = [float(value) for value in divergence]
    mean = math.fsum(sums) / total
    return Agreement(
        kl=mean,
        kl_stderr=_clustered_error(sums, counts, mean),
        top1=sum(int(value) for value in same) / total,
        tokens=total,
        realised=counter.mean,
        by_projection=dict(counter.by_projection),
    )


def _first(texts: Sequence[Sequence[int]], tokens: int) -> Iterator[Sequence[int]]:
    left = tokens
    for ids in texts:
        if left <= 0:
            return
        if ids:
            yield ids[:left]
            left -= len(ids)


def _logits(model: nn.Module, batch: Tensor) -> Tensor:
    output: Any = model(input_ids=batch, use_cache=False)
    logits: Tensor = output.logits[0]
    return logits


def _compare(exact: Tensor, sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of KL(exact‖sparse) over the rows of logits [T, vocabulary], and equal arg maxima."""
    kl = torch.zeros((), dtype=torch.float64, device=exact.device)
    for p, q in zip(exact.split(_CHUNK), sparse.split(_CHUNK), strict=True):
        log_p, log_q = (F.log_softmax(logits.float(), dim=-1) for logits in (p, q))
        rows = F.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)
        kl += rows.to(torch.float64).sum()
    return kl, (exact.argmax(-1) == sparse.argmax(-1)).sum()


def _clustered_error(sums: Sequence[float], counts: Sequence[int], mean: float) -> float | None:
    """Standard error of Σ sums / Σ counts when the texts were drawn, not the tokens."""
    texts = len(sums)
    if texts < 2:
        return None
    squares = math.fsum((s - mean * n) ** 2 for s, n in zip(sums, counts, strict=True))
    return math.sqrt(squares * texts / (texts - 1)) / sum(counts)
