"""How far a sparse model's predictions are from the dense model's, token by token.

More sensitive than the accuracy of any task: every token of a text says something, and the noise
of the text itself cancels.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wina.inspection import RealisedSparsity, measure_sparsity
from wina.switches import dense

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


class DenseLogits:
    """Logits of a dense model, kept for texts that many sparse ones are compared on.

    Args:
        most_bytes: what is kept at most; other texts run through the model each time.
    """

    def __init__(self, most_bytes: int = 1 << 30) -> None:
        self.left = most_bytes
        self._kept: dict[bytes, Tensor] = {}

    def of(self, model: nn.Module, ids: Tensor) -> Tensor:
        """Logits [S, vocabulary] of token ids [1, S], in the model's dtype.

        Args:
            model: sparsified; it runs with its masks off.
        """
        key = ids.cpu().numpy().tobytes()
        if key in self._kept:
            return self._kept[key]
        with dense(model):
            logits = _logits(model, ids)
        if logits.nbytes <= self.left:
            self.left -= logits.nbytes
            self._kept[key] = logits
        return logits


class Comparison:
    """Compares a sparsified model with itself made dense, text by text.

    Args:
        model: sparsified; its prefill protocol says which tokens of a text are sparse.
        tokens: texts are compared until so many tokens were.
        dense: what is known of the dense model.

    Attributes:
        seconds: what comparing cost on top of the sparse model's own run.
    """

    def __init__(self, model: nn.Module, tokens: int, dense: DenseLogits | None = None) -> None:
        self.model = model
        self.left = tokens
        self.dense = DenseLogits(0) if dense is None else dense
        self.seconds = 0.0
        self._counter = RealisedSparsity(model)
        self._divergence: list[Tensor] = []
        self._same: list[Tensor] = []
        self._counts: list[int] = []

    @property
    def tokens(self) -> int:
        """Predictions compared so far."""
        return sum(self._counts)

    @torch.no_grad()
    def logits(self, ids: Tensor) -> Tensor:
        """Logits [S, vocabulary] of the sparse model for a text [1, S], compared on the way."""
        if self.left <= 0:
            return _logits(self.model, ids)
        with measure_sparsity(self.model, self._counter):
            sparse = _logits(self.model, ids)
        began = time.perf_counter()
        kl, equal = _compare(self.dense.of(self.model, ids), sparse)
        self._divergence.append(kl)
        self._same.append(equal)
        self._counts.append(len(sparse))
        self.left -= len(sparse)
        self.seconds += time.perf_counter() - began
        return sparse

    def read(self, texts: Sequence[Sequence[int]]) -> None:
        """Compare on the first tokens of texts of token ids; the last text used may be cut."""
        device = next(self.model.parameters()).device
        for ids in texts:
            if self.left <= 0:
                return
            if ids:
                self.logits(torch.tensor([ids[: self.left]], device=device))

    def result(self) -> Agreement:
        """What was compared so far."""
        sums = [float(value) for value in self._divergence]
        mean = math.fsum(sums) / self.tokens
        return Agreement(
            kl=mean,
            kl_stderr=_clustered_error(sums, self._counts, mean),
            top1=sum(int(value) for value in self._same) / self.tokens,
            tokens=self.tokens,
            realised=self._counter.mean,
            by_projection=dict(self._counter.by_projection),
        )


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
