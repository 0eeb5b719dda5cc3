"""A constant for each output, from the mean of what is dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.corrections.base import CORRECTIONS, Correction, Fit, Products, Terms


@CORRECTIONS.register("bias")
class Bias(Correction):
    """b = W·E[(1 − m)⊙x], the mean over calibration tokens of what the mask takes away.

    In closed form, with the inputs that the projection has in the sparse model.
    """

    def fit(self) -> Fit:
        """Begin with a mean of zero tokens."""
        return _MeanDropped()


class _MeanDropped(Fit):
    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.tokens = 0

    def add(self, products: Products) -> None:
        self.total = self.total + products.dropped.sum(0, dtype=torch.float64)
        self.tokens += len(products.dropped)

    def terms(self, weight: Tensor) -> Terms:
        mean = torch.as_tensor(self.total / max(1, self.tokens)).float()
        return Terms(bias=weight.float() @ mean)
