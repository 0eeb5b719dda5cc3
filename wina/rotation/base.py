"""What a rotation method is."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from wina.errors import ConfigError
from wina.registry import Registry
from wina.rotation.reads import Read

NO_ROTATION = "none"


class Basis(ABC):
    """Gives the basis as the eigenvectors of a symmetric matrix, largest eigenvalue first.

    Args:
        shared: 1 for one basis for the whole model, which folds into its weights and costs nothing
            at run time; 0 for a basis of its own for each hidden state that projections read, as
            the papers have it, which costs a product [hidden, hidden] each.
    """

    needs_text: bool = False

    def __init__(self, shared: float = 0) -> None:
        if shared not in (0, 1):
            raise ConfigError(f"shared is 0 or 1, not {shared:g}")
        self.shared = bool(shared)

    @abstractmethod
    def gram(self, read: Read) -> Tensor:
        """The symmetric positive semidefinite matrix [hidden, hidden] float64 of one hidden state.

        Args:
            read: the hidden state with the weights that read it, its moments if ``needs_text``.
        """


ROTATIONS: Registry[type[Basis]] = Registry("rotation")


# Eigenvalues below this share of the largest are those of the null space.
_NULL = 1e-10


def eigenvectors(gram: Tensor, second: Tensor) -> Tensor:
    """Q [d, d] float64, eigenvectors in columns, largest eigenvalue first.

    Nothing in Q is left to the accidents of a library: in the null space of ``gram`` (large where
    k_proj has few heads) the basis is that of ``second``, and the largest entry of each column is
    positive.
    """
    vectors: Tensor
    values, vectors = torch.linalg.eigh(gram)
    null = int((values < _NULL * values[-1]).sum())
    if null:
        inside = vectors[:, :null]
        vectors[:, :null] = inside @ torch.linalg.eigh(inside.t() @ second @ inside).eigenvectors
    vectors = vectors.flip(1)
    largest = vectors.abs().argmax(0, keepdim=True)
    return vectors * vectors.gather(0, largest).sign()
