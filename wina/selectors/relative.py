"""A calibrated cut-off in units of the token's own mean magnitude."""

from __future__ import annotations

from torch import Tensor

from wina.kernels import ops
from wina.selectors.base import SELECTORS, Selector


@SELECTORS.register("relative")
class Relative(Selector):
    """Keep |x_j|·c_j > τ·mean_i|x_i|: follows a token whose hidden state is larger or smaller.

    The mean, unlike the root mean square, is not ruled by a few massive activations. O(K), no
    sort; in the spirit of the statistical top-k of Spark Transformer and Gemma 3n.
    """

    of_x_alone = True

    def scale(
        self, x: Tensor, threshold: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> Tensor | None:
        """mean_j |x_j| of every token, in float32."""
        return ops.mean_scale(x)
