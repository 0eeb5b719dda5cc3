"""LaRoSA's principal components of hidden states."""

from __future__ import annotations

from torch import Tensor

from wina.errors import CalibrationError
from wina.rotation.base import ROTATIONS, Basis
from wina.rotation.reads import Read


@ROTATIONS.register("pca")
class PCA(Basis):
    """Eigenvectors of E[xᵀx], x the hidden state on calibration text (arXiv 2507.01299)."""

    needs_text = True

    def gram(self, read: Read) -> Tensor:
        """The second moments of the hidden state."""
        if read.moments is None:
            raise CalibrationError("the rotation 'pca' needs texts to take moments from")
        return read.moments
