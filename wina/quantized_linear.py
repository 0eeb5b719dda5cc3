"""The module that replaces a projection whose weight is kept in 8 or 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wina.control import Control
from wina.corrections import Terms
from wina.errors import PatchStateError
from wina.group import scales
from wina.kernels.dispatch import Choice, LayerSpec, choose
from wina.kernels.quantization import QuantizedWeight, WeightDtype
from wina.linear import SparseLinear
from wina.planes import repeated, summed
from wina.selectors import Selector


class ComputedWeight(Tensor):
    """A weight that is computed when it is asked for: what is written to it would be lost.

    Adapters are merged by setting ``data``, which says so.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def data(self) -> Tensor:
        """The values."""
        return self.as_subclass(Tensor).detach()

    @data.setter
    def data(self, _: Tensor) -> None:
        raise PatchStateError(
            "this weight is kept in integers, and what is merged into it would be lost: merge the "
            "adapter first (or wina.restore the model), then round"
        )


class QuantizedSparseLinear(SparseLinear):
    """A :class:`SparseLinear` whose weight is integers with a scale for each row and column group.

    Every product, sparse or dense, is one with the rounded weight. A weight in planes has rows for
    all of them, and the hidden state is repeated for each (:mod:`wina.planes`). Buffers ``packed``
    and ``scales`` stand in the state dict where ``weight`` stood; the original weight is not kept.
    ``weight`` is computed on every access, [N, K] in the layer's dtype: for code that looks at it.
    """

    packed: Tensor
    scales: Tensor
    like: Tensor

    def __init__(
        self,
        original: nn.Linear,
        name: str,
        threshold: Tensor,
        sparsity: float,
        selector: Selector,
        control: Control,
        rounded: QuantizedWeight,
        terms: Terms | None = None,
        probe: Tensor | None = None,
    ) -> None:
        super().__init__(original, name, threshold, sparsity, selector, control, terms, probe)
        self.bits = rounded.bits
        device = self.like.device
        self.register_buffer("packed", rounded.packed.to(device))
        self.register_buffer("scales", rounded.scales.to(device))

    @property
    def planes(self) -> int:
        """Of the weight: 1 where it is simply rounded."""
        return len(self.packed) // self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., S, K] → [..., S, N]."""
        return super().forward(repeated(x, self.planes))

    def _hold(self, original: nn.Linear) -> None:
        # Follows casts of the model: neither integers nor scales tell what x will be.
        self.register_buffer("like", original.weight.detach().new_empty(0), persistent=False)

    @property
    def quantized(self) -> QuantizedWeight:
        """The weight [planes·K, N] as kernels take it."""
        return QuantizedWeight(self.packed, self.scales, self.out_features, self.bits)

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The rounded weight [N, K], computed anew."""
        values = summed(self.quantized.dequantize().t(), self.planes).to(self.like.dtype)
        return values.as_subclass(ComputedWeight)

    @property
    def matrix(self) -> Tensor:
        """What inputs repeated for every plane are multiplied by, [N, planes·K], computed anew."""
        return self.quantized.dequantize().to(self.like.dtype).t()

    @property
    def weight_dtype(self) -> str:
        """A key of :data:`wina.kernels.quantization.WEIGHT_DTYPES`."""
        return WeightDtype(f"int{self.bits}", self.planes).name

    @property
    def weight_bytes(self) -> int:
        """Bytes of the integers and their scales."""
        return self.quantized.bytes

    @property
    def storage(self) -> Tensor:
        """An empty tensor with the device and dtype of the products."""
        return self.like

    def gate_up(self, up: SparseLinear, x: Tensor, activation: str) -> Tensor:
        """As for float weights; both are rounded to the same width."""
        assert isinstance(up, QuantizedSparseLinear)
        x = repeated(self._as_stored(x), self.planes)
        return self.choice.backend.sparse_gate_up_quantized(
            x, self.packed, self.scales, up.packed, up.scales, self.out_features, self.bits,
            self.threshold, up.threshold, activation, self.product_bias, up.product_bias,
            *scales((self, up), x),
        )  # fmt: skip

    def _layer(self) -> LayerSpec:
        # Integers are K-major whatever the sparsity.
        return replace(super()._layer(), sparsity=1.0)

    def _kernel(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return self.choice.backend.sparse_linear_quantized(
            x, self.packed, self.scales, self.out_features, self.bits, self.threshold,
            self.product_bias, scale,
        )  # fmt: skip

    def _dense(self, x: Tensor) -> Tensor:
        return self.choice.backend.dense_linear_quantized(x, self.quantized, self.bias)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> QuantizedSparseLinear:
        # A cast of the model must not round the scales again.
        scales = self.scales
        super()._apply(fn, recurse)
        self.scales = scales.to(self.scales.device)
        return self

    def _choose_again(self) -> Choice:
        """The backend after a move or a cast: every backend reads the same layout."""
        return choose(self._layer())
