"""Bytes that one decoded token reads of a model: counted, as the kernels lay weights out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from wina.bench.structure import SPARSE_KINDS, structure_of
from wina.kernels.quantization import WEIGHT_DTYPES
from wina.plan import weighted_mean
from wina.projections import Projection, find_projections

_THRESHOLD_BYTES = 4


@dataclass(frozen=True)
class TokenBytes:
    """What a token reads.

    Attributes:
        projections: kept rows of the projections' weights, with the scales of rounded ones.
        thresholds: of sparse projections.
        rest: language-model head, norms, biases and the embedding's row: the same for all.
        extra: corrections and rotations.
    """

    projections: float
    thresholds: float
    rest: float
    extra: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.projections + self.thresholds + self.rest + self.extra


class TokenCosts:
    """Bytes of a model at every width and sparsity, from its shapes.

    Args:
        model: dense, as it was loaded.
        itemsize: bytes that an element of what is not rounded is counted with, such as 2 for a
            model that is evaluated in float32 and deployed in bfloat16; None for those it has.
    """

    def __init__(self, model: nn.Module, itemsize: float | None = None) -> None:
        self.projections = find_projections(model)
        self.weights = sum(projection.weights for projection in self.projections)
        weights = structure_of(model).weights
        loaded = next(w.itemsize for w in weights if w.kind in SPARSE_KINDS)
        self._itemsize = float(loaded if itemsize is None else itemsize)
        self._scale = self._itemsize / loaded
        rest = sum(w.read * w.itemsize for w in weights if w.kind not in SPARSE_KINDS)
        self.rest = rest * self._scale
        self.dense = self.at({}, None)

    def at(
        self, realised: Mapping[str, float], weight_dtype: str | None, extra: float = 0.0
    ) -> TokenBytes:
        """Bytes at a realised sparsity of each projection.

        Args:
            realised: projection name → share of its rows that are not read; empty for dense.
            weight_dtype: a key of :data:`WEIGHT_DTYPES`, None for weights as loaded.
            extra: bytes of corrections and rotations as the model holds them.
        """
        kept = sum(
            (1.0 - realised.get(p.name, 0.0)) * self._weight_bytes(p, weight_dtype)
            for p in self.projections
        )
        planes = 1 if weight_dtype is None else WEIGHT_DTYPES[weight_dtype].planes
        thresholds = planes * sum(p.in_features for p in self.projections) if realised else 0
        return TokenBytes(kept, thresholds * _THRESHOLD_BYTES, self.rest, extra * self._scale)

    def share(self, found: TokenBytes) -> float:
        """Of what a token of the dense model reads, as it was loaded."""
        return found.total / self.dense.total

    def sparsity_for(self, share: float, weight_dtype: str | None, extra: float = 0.0) -> float:
        """The sparsity at which a token reads this share; negative if dense reads less already."""
        fixed = self.at(dict.fromkeys((p.name for p in self.projections), 1.0), weight_dtype, extra)
        whole = self.at({}, weight_dtype).projections
        return 1.0 - (share * self.dense.total - fixed.total) / whole

    def mean(self, realised: Mapping[str, float]) -> float:
        """Share of projection weights skipped."""
        return weighted_mean(self.projections, realised)

    def _weight_bytes(self, projection: Projection, weight_dtype: str | None) -> float:
        if weight_dtype is None:
            return projection.weights * self._itemsize
        kind = WEIGHT_DTYPES[weight_dtype]
        return float(kind.bytes_of(projection.in_features, projection.out_features))
