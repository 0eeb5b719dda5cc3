"""A product of low rank with the channels that are dropped."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.corrections.base import CORRECTIONS, Correction, Fit, Products, Terms
from wina.needs import Needs
from wina.registry import share as checked_share


def project(weight: Tensor, products: Tensor, share: float) -> Terms:
    """W·x_dropped inside the leading directions of its output.

    Q_r·Q_rᵀ·W, Q_r the first r eigenvectors of E[y yᵀ] for y = W·x_dropped, is the rank-r matrix
    that is nearest to W over such x in mean square.

    Args:
        weight: W [N, K].
        products: E[y yᵀ] [N, N].
        share: of the weight's numbers that both factors may hold together; at least rank 1.
    """
    rows, columns = weight.shape
    rank = min(rows, max(1, int(share * rows * columns / (rows + columns))))
    _, vectors = torch.linalg.eigh(products.double())
    left = vectors[:, -rank:].float()
    return Terms(left=left.contiguous(), right=(left.t() @ weight.float()).contiguous())


@CORRECTIONS.register("low-rank")
class LowRank(Correction):
    """The rank-r product with the dropped channels that is best for them in mean square.

    Args:
        share: of each weight's numbers that the factors hold: what a token reads for them.
    """

    needs = Needs.NOTHING

    def __init__(self, share: float = 0.02) -> None:
        self.share = checked_share("share", share)

    def fit(self) -> Fit:
        """Begin with a covariance of zero tokens."""
        return _DroppedCovariance(self.share)


@CORRECTIONS.register("weight-svd")
class WeightSVD(Correction):
    """U_r·S_r·V_rᵀ·x_dropped from the singular values of the weight. R-Sparse, arXiv 2504.19449.

    Args:
        share: of each weight's numbers that the factors hold.
    """

    def __init__(self, share: float = 0.02) -> None:
        self.share = checked_share("share", share)

    def fit(self) -> Fit:
        """Nothing to gather: the weight is enough."""
        return _WeightOnly(self.share)


class _DroppedCovariance(Fit):
    def __init__(self, share: float) -> None:
        self.share = share
        self.total: Tensor | float = 0.0

    def add(self, products: Products) -> None:
        dropped = products.dropped.float()
        self.total = self.total + (dropped.t() @ dropped).double()

    def terms(self, weight: Tensor) -> Terms:
        w = weight.double()
        return project(weight, w @ torch.as_tensor(self.total).to(w) @ w.t(), self.share)


class _WeightOnly(Fit):
    def __init__(self, share: float) -> None:
        self.share = share

    def add(self, products: Products) -> None:
        pass

    def terms(self, weight: Tensor) -> Terms:
        w = weight.double()
        return project(weight, w @ w.t(), self.share)
