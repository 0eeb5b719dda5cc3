"""The module that replaces fused experts: it reads only active channels of the chosen experts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from wina.control import Control
from wina.experts import ROLES, FusedExperts
from wina.kernels.dispatch import Choice, LayerSpec, choose
from wina.kernels.reference import mask_inputs
from wina.selectors import Selector


class SparseExperts(nn.Module):
    """Fused experts whose products are sparse while decoding.

    Shares the parameters of the module it stands for, under their names. A weight keeps its logical
    shape and storage, but each expert's matrix lies K-major in it.

    Attributes:
        fused: the original module, which computes whatever is dense.
        name: of the module in the model.
        rows: sequences and tokens of the hidden states on their way in, set by the block around
            it: the experts themselves get them flattened.
    """

    def __init__(
        self,
        fused: FusedExperts,
        name: str,
        thresholds: Mapping[str, Tensor],
        sparsities: Mapping[str, float],
        selector: Selector,
        control: Control,
    ) -> None:
        super().__init__()
        for key, parameter in fused.module.named_parameters(recurse=False):
            self.register_parameter(key, parameter)
        self.fused = fused
        self.name = name
        self.sparsities = dict(sparsities)
        self.selector = selector
        self.control = control
        self.rows: tuple[int, int] | None = None
        device = next(self.parameters()).device
        for role in ROLES:
            values = thresholds[role].to(device, torch.float32)
            self.register_buffer(f"{role}_threshold", values, persistent=False)
        self.choices = {role: choose(self.layer(role), control.backend) for role in ROLES}
        self.train(fused.module.training)

    def layer(self, role: str) -> LayerSpec:
        """One expert's product, for the choice of a backend."""
        weight: Tensor = getattr(self, role)
        N, K = self.fused.shape(role)
        return LayerSpec(weight.device, weight.dtype, K, N)

    def enter(self, _: nn.Module, arguments: tuple[Any, ...]) -> None:
        """Pre-hook of the block around the experts: remembers how its tokens form sequences."""
        x = arguments[0]
        self.rows = (x.shape[0], x.shape[1]) if x.dim() == 3 else (1, x.shape[0])

    def forward(self, x: Tensor, ids: Tensor, routing: Tensor) -> Tensor:
        """Hidden states [T, K], expert ids and routing weights [T, k] → [T, K]."""
        if torch.is_autocast_enabled(x.device.type):  # kernels want x in the dtype of the weights
            x = x.to(next(self.parameters()).dtype)
        batch, length = self.rows or (1, len(x))
        flat = x.view(batch, length, x.shape[-1]) if batch * length == len(x) else x[None]
        start = self.control.first_sparse(flat)
        padded = self.control.sparse_tokens(flat)
        if padded is None and start >= flat.shape[1]:
            y: Tensor = self.fused.module(x, ids, routing)
            return y
        needs_gradient = torch.is_grad_enabled() and (
            x.requires_grad or any(p.requires_grad for p in self.parameters())
        )
        if padded is None and start == 0 and not needs_gradient:
            return self.fused.run(x, ids, routing, self._sparse)
        if padded is None:
            padded = torch.arange(flat.shape[1], device=x.device) >= start
        sparse = padded.expand(flat.shape[:-1]).reshape(-1)

        def masked(role: str, expert: int, x: Tensor, tokens: Tensor) -> Tensor:
            return self._masked(role, expert, x, sparse[tokens])

        return self.fused.run(x, ids, routing, masked)

    def threshold(self, role: str, expert: int) -> Tensor:
        """[K] float32."""
        thresholds: Tensor = getattr(self, f"{role}_threshold")
        return thresholds[expert]

    def _scale(self, role: str, expert: int, x: Tensor) -> Tensor | None:
        threshold = self.threshold(role, expert)
        scale = self.selector.scale(x, threshold, self.sparsities[role])
        if self.control.observer is not None:
            self.control.observer(f"{self.name}.{role}", x, threshold, scale)
        return scale

    def _sparse(self, role: str, expert: int, x: Tensor, _: Tensor) -> Tensor:
        return self.choices[role].backend.sparse_linear(
            x,
            self.fused.weight(role, expert).t(),
            self.threshold(role, expert),
            self.fused.bias(role, expert),
            self._scale(role, expert, x),
        )

    def _masked(self, role: str, expert: int, x: Tensor, sparse: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self._scale(role, expert, x[sparse])
        inputs = x.clone()
        inputs[sparse] = mask_inputs(x[sparse], self.threshold(role, expert), scale)
        return self.fused.product(role, expert, inputs)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseExperts:
        # As in SparseLinear: thresholds stay float32.
        kept = {role: getattr(self, f"{role}_threshold") for role in ROLES}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for role, values in kept.items():
            name = f"{role}_threshold"
            setattr(self, name, values.to(getattr(self, name).device))
        self.choices = {role: self._choose_again(role) for role in ROLES}
        return self

    def _choose_again(self, role: str) -> Choice:
        """The backend after a move or a cast: weights keep the layout they were patched with."""
        choice = choose(self.layer(role))
        if choice.backend.k_major and not self.fused.weight(role, 0).t().is_contiguous():
            reason = f"{choice.backend.name}: the weight is row-major; restore and sparsify again"
            return Choice(choose(self.layer(role), "reference").backend, reason)
        return choice
