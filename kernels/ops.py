"""``torch.ops.wina.*``: schemas, fake implementations and the default for every device.

The default is the reference; a backend registers a faster kernel for its own device key, which
takes precedence. An operator has no backward: modules take the differentiable path instead
(:mod:`wina.linear`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from wina.kernels import reference

_LIBRARY = torch.library.Library("wina", "DEF")

_LIBRARY.define(
    "sparse_linear(Tensor x, Tensor weight, Tensor threshold, Tensor? bias=None, "
    "Tensor? scale=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "sparse_gate_up(Tensor x, Tensor gate, Tensor up, Tensor gate_threshold, "
    "Tensor up_threshold, str activation, Tensor? gate_bias=None, Tensor? up_bias=None, "
    "Tensor? gate_scale=None, Tensor? up_scale=None) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def refuse_gradient(name: str, *tensors: Tensor | None) -> None:
    """Raise if autograd would have to differentiate an operator that has no backward."""
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        raise RuntimeError(
            f"wina::{name} has no backward; call it under torch.no_grad(), or use "
            f"wina.kernels.reference.{name}, which is differentiable"
        )


def check_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Raise a RuntimeError that names the argument whose shape or dtype does not fit."""
    if weight.dim() != 2 or threshold.dim() != 1 or x.dim() < 1:
        raise RuntimeError(
            "expected x [..., K], weight [K, N] and threshold [K], got shapes "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(threshold.shape)}"
        )
    if x.shape[-1] != weight.shape[0] or x.shape[-1] != threshold.shape[0]:
        raise RuntimeError(
            f"x has {x.shape[-1]} channels, weight {weight.shape[0]} rows (K-major), "
            f"threshold {threshold.shape[0]} entries: they must be the same number K"
        )
    if x.dtype != weight.dtype or threshold.dtype != torch.float32:
        raise RuntimeError(
            f"x and weight must share a dtype and threshold be float32, got {x.dtype}, "
            f"{weight.dtype} and {threshold.dtype}"
        )
    if bias is not None and (bias.shape != weight.shape[1:] or bias.dtype != x.dtype):
        raise RuntimeError(
            f"bias must be [{weight.shape[1]}] {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )
    if scale is not None and (scale.shape != x.shape[:-1] or scale.dtype != torch.float32):
        raise RuntimeError(
            f"scale must be {tuple(x.shape[:-1])} torch.float32, one a token, got "
            f"{tuple(scale.shape)} {scale.dtype}"
        )


def check_gated(gate: Tensor, up: Tensor, activation: str) -> None:
    """Raise a RuntimeError if gate and up differ in shape or the activation is unknown."""
    if gate.shape != up.shape:
        raise RuntimeError(
            f"gate and up must share a shape [K, N], got {tuple(gate.shape)} and {tuple(up.shape)}"
        )
    if activation not in reference.ACTIVATIONS:
        raise RuntimeError(
            f"unknown activation {activation!r}; known: {', '.join(reference.ACTIVATIONS)}"
        )


def _default_sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    refuse_gradient("sparse_linear", x, weight, bias)
    check_linear(x, weight, threshold, bias, scale)
    return reference.sparse_linear(x, weight, threshold, bias, scale)


def _default_sparse_gate_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_threshold: Tensor,
    up_threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    refuse_gradient("sparse_gate_up", x, gate, up, gate_bias, up_bias)
    check_linear(x, gate, gate_threshold, gate_bias, gate_scale)
    check_linear(x, up, up_threshold, up_bias, up_scale)
    check_gated(gate, up, activation)
    return reference.sparse_gate_up(
        x, gate, up, gate_threshold, up_threshold, activation,
        gate_bias, up_bias, gate_scale, up_scale,
    )  # fmt: skip


def _fake_sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    check_linear(x, weight, threshold, bias, scale)
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


def _fake_sparse_gate_up(
    x: Tensor,
    gate: Tensor,
    up: Tensor,
    gate_threshold: Tensor,
    up_threshold: Tensor,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    gate_scale: Tensor | None = None,
    up_scale: Tensor | None = None,
) -> Tensor:
    check_linear(x, gate, gate_threshold, gate_bias, gate_scale)
    check_linear(x, up, up_threshold, up_bias, up_scale)
    check_gated(gate, up, activation)
    return x.new_empty((*x.shape[:-1], gate.shape[1]))


_LIBRARY.impl("sparse_linear", _default_sparse_linear, "CompositeExplicitAutograd")
_LIBRARY.impl("sparse_gate_up", _default_sparse_gate_up, "CompositeExplicitAutograd")
torch.library.register_fake("wina::sparse_linear", _fake_sparse_linear, lib=_LIBRARY)
torch.library.register_fake("wina::sparse_gate_up", _fake_sparse_gate_up, lib=_LIBRARY)

sparse_linear: Callable[..., Tensor] = torch.ops.wina.sparse_linear.default
sparse_gate_up: Callable[..., Tensor] = torch.ops.wina.sparse_gate_up.default
