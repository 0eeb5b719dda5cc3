"""Rotation: another orthonormal basis for the hidden states that projections read.

x and W become xQ and WQ with QᵀQ = I: the product is the same, but other channels are small. To add
a method: a file beside this one, ``@ROTATIONS.register("name")``, and its import below.
"""

from wina.rotation.apply import (
    Rotation,
    RotationTotals,
    check_rotation,
    rotate,
    rotated,
    rotation_elements,
    rotation_of,
    unrotate,
)
from wina.rotation.base import NO_ROTATION, ROTATIONS, Basis
from wina.rotation.orthogonal import Orthogonal
from wina.rotation.pca import PCA

__all__ = [
    "NO_ROTATION",
    "PCA",
    "ROTATIONS",
    "Basis",
    "Orthogonal",
    "Rotation",
    "RotationTotals",
    "check_rotation",
    "rotate",
    "rotated",
    "rotation_elements",
    "rotation_of",
    "unrotate",
]
