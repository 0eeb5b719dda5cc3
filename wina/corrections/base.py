"""What a correction is, and what it is fitted to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.errors import PlanError
from wina.needs import Needs
from wina.registry import Registry


@dataclass(frozen=True)
class Terms:
    """What is added to a sparse product of x: bias + left·right·(the dropped channels of x).

    With a center the sparse product is that of x − center: a channel is kept where it is far from
    it, and a dropped one counts as the center, whose product is in the bias.

    Attributes:
        bias: [N] float32 or None.
        left: [N, r] float32, None if there is no such term.
        right: [r, K] float32, None likewise.
        center: [K] float32 or None; not beside ``left``.
    """

    bias: Tensor | None = None
    left: Tensor | None = None
    right: Tensor | None = None
    center: Tensor | None = None

    def of(self, dropped: Tensor) -> Tensor | float:
        """What is added for tokens with these dropped channels [..., K]: [..., N], [N] or 0."""
        added: Tensor | float = 0.0 if self.bias is None else self.bias
        if self.left is not None and self.right is not None:
            added = added + F.linear(F.linear(dropped.to(self.right), self.right), self.left)
        return added

    @property
    def values(self) -> int:
        """Numbers that a token reads for it, in the dtype of the model."""
        return sum(tensor.numel() for tensor in self.tensors().values())

    def cpu(self) -> Terms:
        """The same terms on the CPU."""
        return Terms(**{name: tensor.cpu() for name, tensor in self.tensors().items()})

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that there are, by the names of the attributes."""
        named = {
            "bias": self.bias, "left": self.left, "right": self.right, "center": self.center
        }  # fmt: skip
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @classmethod
    def stored(cls, tensors: Mapping[str, Tensor], prefix: str) -> Terms:
        """The terms among named tensors whose names begin with ``prefix``."""
        return cls(**{field.name: tensors.get(prefix + field.name) for field in fields(cls)})

    def check(self, name: str, in_features: int, out_features: int) -> None:
        """Raise :class:`PlanError` unless shapes and dtypes fit a projection [N, K]."""
        if (self.left is None) != (self.right is None):
            raise PlanError(f"{name}: a low-rank correction has two factors, left and right")
        if self.center is not None and self.left is not None:
            raise PlanError(f"{name}: a correction has a center or factors, not both")
        rank = 0 if self.right is None else self.right.shape[0]
        shapes = {
            "bias": (out_features,), "left": (out_features, rank), "right": (rank, in_features),
            "center": (in_features,),
        }  # fmt: skip
        for key, tensor in self.tensors().items():
            if tuple(tensor.shape) != shapes[key]:
                raise PlanError(
                    f"{name}.{key} has shape {tuple(tensor.shape)}, expected {shapes[key]}"
                )
            if tensor.dtype != torch.float32 or not tensor.isfinite().all():
                raise PlanError(f"{name}.{key} must be float32 without NaN or Inf")


@dataclass(frozen=True)
class Products:
    """One projection over calibration tokens, while everything before it is sparse.

    Attributes:
        dropped: the channels of x that its mask leaves out, zero elsewhere, [T, K].
        missing: what the dense model has more than the product of the kept channels, not corrected,
            [T, N]; None unless :attr:`Correction.compares`.
    """

    dropped: Tensor
    missing: Tensor | None


class Fit(ABC):
    """The correction of one projection while it is calibrated."""

    def center(self, x: Tensor) -> Tensor | None:
        """What inputs are compared with, [K] float32; None for zero.

        Args:
            x: calibration tokens [T, K], the first ones that the projection gets.
        """
        return None

    @abstractmethod
    def add(self, products: Products) -> None:
        """Take in more tokens."""

    @abstractmethod
    def terms(self, weight: Tensor) -> Terms:
        """The correction for the tokens seen so far and the weight [N, K] that is in use."""


class Correction(ABC):
    """Finds what to add to the sparse products of a model.

    Each projection by itself (:meth:`fit`), while thresholds are calibrated. Parameters are keyword
    arguments of ``__init__``, as for allocation policies.

    Attributes:
        needs: what it has to compute beyond the pass that calibrates thresholds.
        compares: whether :attr:`Products.missing` is wanted, which doubles the cost of that pass.
    """

    needs: Needs = Needs.NOTHING
    compares: bool = False

    @abstractmethod
    def fit(self) -> Fit | None:
        """Begin with a projection; None if there is nothing to fit."""


NO_CORRECTION = "none"
CORRECTIONS: Registry[type[Correction]] = Registry("correction")


@CORRECTIONS.register(NO_CORRECTION)
class Uncorrected(Correction):
    """Dropped channels are taken as zero."""

    def fit(self) -> Fit | None:
        """Nothing."""
        return None
