"""A calibrated cut-off, lower for tokens whose errors the loss will notice."""

from __future__ import annotations

import torch
from torch import Tensor

from wina.errors import CalibrationError, ConfigError
from wina.kernels import ops
from wina.selectors.base import SELECTORS, Selector

# Importance below this share of the mean is all the same: its logarithm would be noise.
_FLOOR = 1e-4
# Tokens that are enough where a projection has more channels than this: the regression then costs
# as its tokens do, not as its channels.
_MOST = 4096


@SELECTORS.register("importance")
class Importance(Selector):
    """Keep |x_j|·c_j > τ·exp(p(x)), p a linear probe of the hidden state.

    An error at the output of a projection costs gᵀδy, g = ∂loss/∂y, and |g| differs by orders of
    magnitude from token to token. Were it known, the best cut-off at a given number of bytes would
    be proportional to 1/|g|: that follows from equal cost per byte. It is not known while decoding,
    but the hidden state says much of it: the probe is a ridge regression of log |Wᵀg|² on the
    input of the projection. Ours; it reads K + 1 numbers. Projections that read the same hidden
    state share the regression's matrix.

    What text a token is in must not move its cut-off, or texts unlike the calibration text would be
    read more or less than was asked. So the probe is fitted to differences within a window, and is
    penalised for telling windows apart.

    Args:
        strength: p is the predicted log |Wᵀg|², from its mean, times −strength. A perfect
            prediction of small errors would ask for 0.5.
        limit: of |p|: text of another kind makes linear probes say too much.
        ridge: of the regression on standardised inputs, in units of the number of tokens.
        steadiness: penalty of squared differences between the means of windows, relative to the
            squared errors of as many tokens.
    """

    weighs_tokens = True

    def __init__(
        self,
        strength: float = 0.25,
        limit: float = 0.5,
        ridge: float = 0.5,
        steadiness: float = 100.0,
    ) -> None:
        for name, value in (("strength", strength), ("limit", limit), ("ridge", ridge)):
            if not 0.0 < value < float("inf"):
                raise ConfigError(f"{name} is a positive number, not {value:g}")
        if not 0.0 <= steadiness < float("inf"):
            raise ConfigError(f"steadiness is zero or more, not {steadiness:g}")
        self.strength = strength
        self.limit = limit
        self.ridge = ridge
        self.steadiness = steadiness

    def fit(self, x: Tensor, importance: Tensor) -> list[Tensor | None]:
        """Probes [K + 1] float32; None where no token's errors cost anything."""
        found: list[Tensor | None] = [None] * len(importance)
        costs = [index for index, one in enumerate(importance) if one.any()]
        if not costs:  # projections without influence
            return found
        importance = importance[costs]
        windows, tokens, channels = x.shape
        if channels > _MOST and windows * tokens > _MOST:
            count = max(1, _MOST // tokens)
            some = torch.linspace(0, windows - 1, count).round().to(torch.int64)
            x, importance = x[some.to(x.device)], importance[:, some.to(importance.device)]
        rows = x.float()
        mean = _mean(rows)
        rows = rows - mean.float()
        spread = _mean(rows.square()).sqrt()
        used = spread > 1e-9 * spread.max()
        rows *= torch.where(used, 1.0 / spread, 0.0).float()
        weighed = importance.to(x.device, torch.float64)
        target = (weighed / weighed.mean((1, 2), keepdim=True) + _FLOOR).log()
        if not (_mean(rows).isfinite().all() and target.isfinite().all()):
            raise CalibrationError("inputs or gradients on the calibration text have NaN or Inf")
        levels = rows.mean(1, keepdim=True)
        rows -= levels
        steady = levels[:, 0] * (self.steadiness * x.shape[1]) ** 0.5
        wanted = (target - target.mean(2, keepdim=True)).flatten(1)
        slopes = _ridge(
            torch.cat([rows.flatten(0, 1), steady]),
            torch.cat([wanted, wanted.new_zeros(len(wanted), len(steady))], 1).t(),
            self.ridge * rows.shape[0] * rows.shape[1],
        ).t()
        slopes = torch.where(used, slopes / spread, 0.0) * -self.strength
        probes = torch.cat([slopes, -(slopes @ mean).unsqueeze(1)], 1).float()
        for index, probe in zip(costs, probes, strict=True):
            found[index] = probe.clone()
        return found

    def scale(
        self, x: Tensor, threshold: Tensor, sparsity: float, probe: Tensor | None = None
    ) -> Tensor | None:
        """exp(p(x)) of every token, in float32; None without a probe: one cut-off for all.

        Where x is repeated for several planes, the probe reads it once.
        """
        if probe is None:
            return None
        return ops.probe_scale(x[..., : len(probe) - 1], probe, self.limit)


def _mean(x: Tensor) -> Tensor:
    """Of [windows, S, K] over all tokens, [K] float64: float32 in a window, float64 over them."""
    return x.mean(1).mean(0, dtype=torch.float64)


def _ridge(inputs: Tensor, target: Tensor, penalty: float) -> Tensor:
    """β [K, P] float64 that minimises |Xβ − Y|² + penalty·|β|², X [T, K]; on the smaller side.

    Products of X are float32, which the penalty forgives; all else is float64.
    """
    tokens, channels = inputs.shape
    few = tokens < channels
    gram = (inputs @ inputs.t() if few else inputs.t() @ inputs).double()
    gram.diagonal().add_(penalty)
    right = target.double() if few else (inputs.t() @ target.float()).double()
    solved = torch.cholesky_solve(right, torch.linalg.cholesky(gram))
    return (inputs.t() @ solved.float()).double() if few else solved
