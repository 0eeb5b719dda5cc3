"""A constant for each output, from what the dense model has more."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.corrections.base import CORRECTIONS, Correction, Fit, Products, Terms
from wina.needs import Needs


@CORRECTIONS.register("sparse-fit")
class SparseFit(Correction):
    """b = E[y_dense − y_sparse], the least-squares constant towards the dense model's output.

    Both products are taken in one pass, the sparse one from inputs that sparse and corrected
    projections before it produced: it also makes up for the mean of what they did.
    """

    needs = Needs.ACTIVATIONS
    compares = True

    def fit(self) -> Fit:
        """Begin with a mean of zero tokens."""
        return _MeanMissing()


class _MeanMissing(Fit):
    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.tokens = 0

    def add(self, products: Products) -> None:
        assert products.missing is not None
        self.total = self.total + products.missing.sum(0, dtype=torch.float64)
        self.tokens += len(products.missing)

    def terms(self, weight: Tensor) -> Terms:
        return Terms(bias=torch.as_tensor(self.total / max(1, self.tokens)).float())
