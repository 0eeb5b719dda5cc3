"""What a rounding is. Knows nothing of models."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from wina.errors import ConfigError
from wina.kernels.quantization import (
    WEIGHT_DTYPES,
    IntegerFormat,
    QuantizedWeight,
    quantize_as,
    stacked,
)
from wina.registry import Registry


class Rounding(ABC):
    """Turns the weight of a projection into integers of a format.

    Parameters are keyword arguments of ``__init__``, as for allocation policies.

    Attributes:
        looks: whether it looks at the inputs of the projection. Then calibration rounds, and the
            plan carries the integers; else a model is rounded when it is patched.
    """

    looks: bool = False

    def round(
        self, weight: Tensor, moments: Sequence[Tensor] | None, dtype: str
    ) -> QuantizedWeight:
        """Integers and scales for a weight; what a plane leaves is rounded in the next.

        Args:
            weight: [N, K], any float dtype and strides.
            moments: of every plane Σ z·zᵀ, [K, K] float32, over the inputs z that its errors will
                meet: those of channels that the plane and no later one is read for. None where it
                does not look.
            dtype: a key of :data:`wina.kernels.quantization.WEIGHT_DTYPES`.

        Returns:
            [planes·K, N].

        Raises:
            ConfigError: unknown dtype, or the weight holds NaN or Inf.
        """
        if dtype not in WEIGHT_DTYPES:
            raise ConfigError(f"unknown weight dtype {dtype!r}. Known: {', '.join(WEIGHT_DTYPES)}.")
        kind = WEIGHT_DTYPES[dtype]
        planes: list[QuantizedWeight] = []
        rest = weight
        for index, form in enumerate(kind.forms):
            if planes:
                rest = rest.detach().to(torch.float32) - planes[-1].dequantize().t()
            seen = None if moments is None else moments[index]
            planes.append(self.round_plane(rest, seen, form))
        return planes[0] if kind.planes == 1 else stacked(planes)

    @abstractmethod
    def round_plane(
        self, weight: Tensor, moments: Tensor | None, form: IntegerFormat
    ) -> QuantizedWeight:
        """Integers and scales for one plane.

        Args:
            weight: [N, K], any float dtype and strides.
            moments: as above, of this plane.
            form: of the integers.
        """


ROUNDINGS: Registry[type[Rounding]] = Registry("rounding")

# By width: 255 levels are enough for each weight on its own, 16 are not.
USUAL_ROUNDING = {"int8": "nearest", "int4": "gptq", "int4+int4": "nearest"}


@ROUNDINGS.register("nearest")
class Nearest(Rounding):
    """Every weight by itself, to the nearest value that its group's scale allows."""

    def round_plane(
        self, weight: Tensor, moments: Tensor | None, form: IntegerFormat
    ) -> QuantizedWeight:
        """See :func:`wina.kernels.quantization.quantize`."""
        return quantize_as(weight.t(), form)
