"""What a rounding is. Knows nothing of models."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from wina.kernels.quantization import QuantizedWeight, quantize
from wina.registry import Registry


class Rounding(ABC):
    """Turns the weight of a projection into integers of a format.

    Parameters are keyword arguments of ``__init__``, as for allocation policies.

    Attributes:
        looks: whether it looks at the inputs of the projection. Then calibration rounds, and the
            plan carries the integers; else a model is rounded when it is patched.
    """

    looks: bool = False

    @abstractmethod
    def round(self, weight: Tensor, moments: Tensor | None, dtype: str) -> QuantizedWeight:
        """Integers and scales for a weight.

        Args:
            weight: [N, K], any float dtype and strides.
            moments: Σ x·xᵀ over the inputs that the weight will meet, masked, [K, K] float32; None
                where it does not look.
            dtype: a key of :data:`wina.kernels.quantization.FORMATS`.

        Raises:
            ConfigError: the weight holds NaN or Inf.
        """


ROUNDINGS: Registry[type[Rounding]] = Registry("rounding")

# By width: 255 levels are enough for each weight on its own, 16 are not.
USUAL_ROUNDING = {"int8": "nearest", "int4": "gptq"}


@ROUNDINGS.register("nearest")
class Nearest(Rounding):
    """Every weight by itself, to the nearest value that its group's scale allows."""

    def round(self, weight: Tensor, moments: Tensor | None, dtype: str) -> QuantizedWeight:
        """See :func:`wina.kernels.quantization.quantize`."""
        return quantize(weight.t(), dtype)
