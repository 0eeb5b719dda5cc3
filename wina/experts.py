"""Fused experts: one module that keeps the weights of all its experts as matrices [E, ...].

transformers stores the experts of a mixture this way: ``gate_up_proj`` and ``down_proj`` of three
dimensions, called with hidden states [T, K], expert ids [T, k] and routing weights [T, k]. Here is
what such a module is, how it is recognised (by numbers), and how it is calibrated. Routers are no
part of it. Knows nothing of plans or patching.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wina.scores import ChannelScores
from wina.statistics import ScoreHistogram

ROLES = ("gate_up_proj", "down_proj")

# An expert that saw fewer calibration tokens takes the cut-off that all experts have together.
FEWEST_TOKENS = 32


@dataclass(frozen=True)
class FusedExperts:
    """A recognised module of fused experts.

    Attributes:
        module: of transformers.
        experts: E, how many there are.
        transposed: whether a matrix lies as [K, N], input channels first, instead of [N, K].
    """

    module: Any
    experts: int
    transposed: bool

    def weight(self, role: str, expert: int) -> Tensor:
        """One expert's matrix [N, K] (a view)."""
        matrix: Tensor = getattr(self.module, role)[expert]
        return matrix.t() if self.transposed else matrix

    def bias(self, role: str, expert: int) -> Tensor | None:
        """One expert's bias [N], or None."""
        biases = getattr(self.module, f"{role}_bias", None)
        return None if biases is None else biases[expert]

    def shape(self, role: str) -> tuple[int, int]:
        """(N, K) of one expert."""
        N, K = self.weight(role, 0).shape
        return N, K

    def product(self, role: str, expert: int, x: Tensor) -> Tensor:
        """The dense product of one expert."""
        return F.linear(x, self.weight(role, expert), self.bias(role, expert))

    def run(
        self,
        x: Tensor,
        ids: Tensor,
        routing: Tensor,
        product: Callable[[str, int, Tensor, Tensor], Tensor],
    ) -> Tensor:
        """Σ over the chosen experts of routing · down(gate(gate_up(x))).

        Args:
            x: hidden states [T, K].
            ids: [T, k]; ids of E and above (other machines' experts) are left out.
            routing: [T, k].
            product: (role, expert, inputs [t, K], their tokens [t]) → [t, N].

        Returns:
            [T, K] in the dtype of x.
        """
        y = torch.zeros_like(x)
        for expert in ids.unique().tolist():
            if expert >= self.experts:
                continue
            tokens, slots = torch.where(ids == expert)
            h = self.module._apply_gate(product("gate_up_proj", expert, x[tokens], tokens))
            out = product("down_proj", expert, h, tokens) * routing[tokens, slots, None]
            y.index_add_(0, tokens, out.to(y.dtype))
        return y


def recognise_experts(module: nn.Module) -> FusedExperts | None:
    """The fused experts that a module is, or None. Runs it on two random tokens to make sure."""
    matrices = {n: p for n, p in module.named_parameters(recurse=False) if p.dim() > 2}
    if set(matrices) != set(ROLES) or not hasattr(module, "_apply_gate"):
        return None
    if any(p.is_meta or p.dim() != 3 or not p.is_floating_point() for p in matrices.values()):
        return None
    down = matrices["down_proj"]
    transposed = bool(getattr(module, "is_transposed", False))
    found = FusedExperts(module, len(down), transposed)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, found.shape("gate_up_proj")[1], generator=generator).to(down)
    ids = torch.tensor([[0], [len(down) - 1]], device=down.device)
    routing = torch.tensor([[1.0], [0.5]]).to(down)
    with torch.no_grad():
        try:
            want = module(x, ids, routing)
            got = found.run(x, ids, routing, lambda role, e, x, _: found.product(role, e, x))
        except (RuntimeError, TypeError, AttributeError, IndexError):
            return None
    return found if torch.allclose(want, got, rtol=1e-2, atol=1e-5) else None


class ExpertsCalibrator:
    """The experts of one module while their cut-offs are found.

    Args:
        fused: the module.
        scores: role → criterion and selector of every expert.
        sparsity: share of channels to drop.
        sequential: whether later products see masked inputs, see :class:`wina.SparsityConfig`.
    """

    def __init__(
        self,
        fused: FusedExperts,
        scores: dict[str, Sequence[ChannelScores]],
        sparsity: float,
        sequential: bool,
    ) -> None:
        self.fused = fused
        self.scores = scores
        self.sparsity = sparsity
        self.sequential = sequential
        self.cutoffs: dict[str, list[float]] = {}
        self.restart_statistics()

    def restart_statistics(self) -> None:
        """Forget the counts, keep the cut-offs: they stay in use until :meth:`set_cutoffs`."""
        E = self.fused.experts
        self.histograms = {role: [ScoreHistogram() for _ in range(E)] for role in ROLES}
        self.tokens = {role: [0] * E for role in ROLES}
        self.dropped = dict.fromkeys(ROLES, 0)

    def forward(self, counted: Tensor, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        """The module's output, counting and masking the tokens where ``counted`` [T] is True.

        One role after the other, so that the cut-off of all experts together is there when an
        expert's own has to be replaced by it.
        """
        parts = [
            (expert, *torch.where(ids == expert))
            for expert in ids.unique().tolist()
            if expert < self.fused.experts
        ]
        inputs = [x[tokens] for _, tokens, _ in parts]
        for role in ROLES:
            for (expert, tokens, _), values in zip(parts, inputs, strict=True):
                seen = values[counted[tokens]]
                self.scores[role][expert].count(self.histograms[role][expert], seen, self.sparsity)
                self.tokens[role][expert] += len(seen)
            if role not in self.cutoffs:
                self._set_cutoffs_of(role)
            outputs = []
            for (expert, tokens, _), values in zip(parts, inputs, strict=True):
                masked = self._masked(role, expert, values, counted[tokens])
                outputs.append(self.fused.product(role, expert, masked))
            inputs = (
                [self.fused.module._apply_gate(out) for out in outputs]
                if role == "gate_up_proj"
                else outputs
            )
        y = torch.zeros_like(x)
        for (_, tokens, slots), out in zip(parts, inputs, strict=True):
            y.index_add_(0, tokens, (out * routing[tokens, slots, None]).to(y.dtype))
        return y

    def _masked(self, role: str, expert: int, x: Tensor, counted: Tensor) -> Tensor:
        keep = self.scores[role][expert].keep(x, self.threshold(role, expert), self.sparsity)
        keep |= ~counted.unsqueeze(-1)
        self.dropped[role] += int((~keep).sum())
        return torch.where(keep, x, 0.0) if self.sequential else x

    def threshold(self, role: str, expert: int) -> Tensor:
        """τ/c of one expert, [K] float32."""
        return self.scores[role][expert].threshold(self.cutoffs[role][expert])

    def set_cutoffs(self) -> None:
        """Take the cut-offs from the scores counted so far."""
        for role in ROLES:
            self._set_cutoffs_of(role)

    def _set_cutoffs_of(self, role: str) -> None:
        together = ScoreHistogram()
        for histogram in self.histograms[role]:
            together.merge(histogram)
        shared = self.scores[role][0].cutoff(together, self.sparsity)
        self.cutoffs[role] = [
            self.scores[role][e].cutoff(histogram, self.sparsity)
            if self.tokens[role][e] >= FEWEST_TOKENS
            else shared
            for e, histogram in enumerate(self.histograms[role])
        ]

    def realised(self, role: str) -> float:
        """Share of channels dropped on the calibration text."""
        total = sum(histogram.total for histogram in self.histograms[role])
        return self.dropped[role] / total if total else 0.0
