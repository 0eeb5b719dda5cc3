"""WINA's column-orthogonal transform."""

from __future__ import annotations

from torch import Tensor

from wina.rotation.base import ROTATIONS, Basis
from wina.rotation.reads import Read

# The projections whose columns WINA makes orthogonal; where none of a hidden state's readers has
# one of these names (fused projections), all of them are taken.
_ROLES = ("k_proj", "gate_proj", "w1")


@ROTATIONS.register("orthogonal")
class Orthogonal(Basis):
    """V of the SVD W = USVᵀ, so that the columns of WV are orthogonal (arXiv 2505.19427, Sec. 3).

    W is k_proj's weight for the attention's hidden state and gate_proj's for the MLP's, after the
    weight of the norm has been folded into it.

    Args:
        shared: see :class:`Basis`; the Gram matrices are then added with equal traces.
        joint: 1 takes W as all the weights that read the hidden state, one upon the other.
    """

    def __init__(self, shared: float = 0, joint: float = 0) -> None:
        super().__init__(shared)
        self.joint = bool(joint)

    def gram(self, read: Read) -> Tensor:
        """WᵀW: its eigenvectors are V."""
        chosen = [name for name in read.projections if name.rpartition(".")[2] in _ROLES]
        if self.joint or not chosen:
            return read.joint()
        return sum((w.t() @ w for w in map(read.folded, chosen)), start=read.zeros())
