"""Bytes that one decoded token reads of a model: counted, as the kernels lay weights out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from wina.bench.structure import LM_HEAD, SPARSE_KINDS, structure_of
from wina.config import SparsityConfig
from wina.decoding.head import usual_head
from wina.kernels.quantization import WEIGHT_DTYPES
from wina.plan import weighted_mean
from wina.projections import Projection, find_head, find_projections

_THRESHOLD_BYTES = 4


@dataclass(frozen=True)
class TokenBytes:
    """What a token reads.

    Attributes:
        projections: kept rows of the projections' weights, with the scales of rounded ones.
        thresholds: of sparse projections.
        rest: norms, biases, the embedding's row, and a language-model head that is no projection.
        extra: corrections, probes and rotations.
        weights: number of weights of the projections.
    """

    projections: float
    thresholds: float
    rest: float
    extra: float
    weights: int

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.thresholds + self.rest + self.extra

    @property
    def bits(self) -> float:
        """Read of a projection's weight, in the mean."""
        return 8.0 * self.projections / self.weights


class TokenCosts:
    """Bytes of a model at every width and sparsity, from its shapes.

    Args:
        model: dense, as it was loaded.
        itemsize: bytes that an element of what is not rounded is counted with, such as 2 for a
            model that is evaluated in float32 and deployed in bfloat16; None for those it has.
    """

    def __init__(self, model: nn.Module, itemsize: float | None = None) -> None:
        self._model = model
        self._blocks = find_projections(model)
        weights = structure_of(model).weights
        loaded = next(w.itemsize for w in weights if w.kind in SPARSE_KINDS)
        self._itemsize = float(loaded if itemsize is None else itemsize)
        self._scale = self._itemsize / loaded
        rest = [w for w in weights if w.kind not in (*SPARSE_KINDS, LM_HEAD)]
        self._rest = sum(w.read * w.itemsize for w in rest) * self._scale
        self._heads = [w for w in weights if w.kind == LM_HEAD]
        self.dense = self.at({}, None)

    @cached_property
    def _head(self) -> Projection:
        return find_head(self._model)

    def projections(self, config: SparsityConfig | None) -> list[Projection]:
        """Those that these settings make sparse."""
        sparse = config is not None and config.head == "sparse"
        return [*self._blocks, self._head] if sparse else self._blocks

    def at(
        self, realised: Mapping[str, float], config: SparsityConfig | None, extra: float = 0.0
    ) -> TokenBytes:
        """Bytes at a realised sparsity of each projection.

        Args:
            realised: projection name → share of its rows that are not read; empty for dense.
            config: widths, and whether the head is a projection; None for the model as loaded.
            extra: bytes of corrections and rotations as the model holds them.
        """
        projections = self.projections(config)
        width = None if config is None else config.weight_dtype
        kept = sum((1.0 - realised.get(p.name, 0.0)) * self._bytes(p, width) for p in projections)
        planes = 1 if config is None else config.planes
        thresholds = planes * sum(p.in_features for p in projections) if realised else 0
        return TokenBytes(
            projections=kept,
            thresholds=thresholds * _THRESHOLD_BYTES,
            rest=self._rest + self._head_bytes(config),
            extra=extra * self._scale,
            weights=sum(projection.weights for projection in projections),
        )

    def share(self, found: TokenBytes) -> float:
        """Of what a token of the dense model reads, as it was loaded."""
        return found.total / self.dense.total

    def share_of_projections(self, config: SparsityConfig | None) -> float:
        """Of what a token of the dense model reads, the projections' weights at this width."""
        return self.at({}, config).projections / self.dense.total

    def sparsity_for(self, share: float, config: SparsityConfig | None) -> float:
        """The sparsity at which a token reads this share; negative if dense reads less already.

        Args:
            share: of what a token of the dense model reads.
            config: its sparsity does not matter. Corrections and rotations are left out.
        """
        names = [projection.name for projection in self.projections(config)]
        fixed = self.at(dict.fromkeys(names, 1.0), config)
        return 1.0 - (share - self.share(fixed)) / self.share_of_projections(config)

    def mean(self, realised: Mapping[str, float], config: SparsityConfig | None) -> float:
        """Share of projection weights skipped."""
        return weighted_mean(self.projections(config), realised)

    def _bytes(self, projection: Projection, width: str | None) -> float:
        if width is None:
            return projection.weights * self._itemsize
        kind = WEIGHT_DTYPES[width]
        return float(kind.bytes_of(projection.in_features, projection.out_features))

    def _head_bytes(self, config: SparsityConfig | None) -> float:
        """Of a language-model head that is no projection, as decoding reads it."""
        if config is not None and config.head == "sparse":
            return 0.0
        width = usual_head(config)
        if width is None:
            return sum(w.read * w.itemsize for w in self._heads) * self._scale
        # Its rows are those of the vocabulary: nothing of it is skipped.
        return float(sum(WEIGHT_DTYPES[width].bytes_of(*w.shape) for w in self._heads))
