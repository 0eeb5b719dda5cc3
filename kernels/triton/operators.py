"""Registers the kernels for CUDA tensors under ``torch.ops.wina``.

Knows the calls that have a kernel; the others (more tokens than a tile has, other dtypes, weights
that are not K-major, empty tensors) get the definition: a masked dense product. Nothing here reads
device memory or depends on values, so every path can be captured in a CUDA graph after one warm-up
call, which compiles the kernel.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from wina.kernels import ops, reference
from wina.kernels.triton import DTYPES, gate_up, sparse_linear
from wina.kernels.triton.config import MAX_TOKENS, card_of, choose

_LIBRARY = torch.library.Library("wina", "IMPL")


@cache
def register() -> None:
    """Make the kernels the implementation of the operators for CUDA tensors."""
    _LIBRARY.impl("sparse_linear", _sparse_linear, "CUDA")
    _LIBRARY.impl("sparse_gate_up", _sparse_gate_up, "CUDA")


def has_kernel(x: Tensor, *weights: Tensor) -> bool:
    """Whether a call of checked arguments has a kernel; x [..., K], weights [K, N]."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (
        0 < tokens <= MAX_TOKENS
        and x.dtype in DTYPES
        and all(w.shape[1] > 0 and w.stride(1) == 1 for w in weights)
    )


def _sparse_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    ops.check_linear(x, weight, threshold, bias, scale)
    ops.refuse_gradient("sparse_linear", x, weight, bias)
    if not has_kernel(x, weight):
        return reference.sparse_linear(x, weight, threshold, bias, scale)
    flat, K, N = _tokens(x), weight.shape[0], weight.shape[1]
    config = choose("sparse_linear", card_of(x.device), len(flat), K, N, x.itemsize)
    with torch.cuda.device(x.device):
        y = sparse_linear.launch(
            flat, weight, threshold.contiguous(), _contiguous(bias), _per_token(scale), config
        )
    return y.view(*x.shape[:-1], N)


def _sparse_gate_up(
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
    ops.check_linear(x, gate, gate_threshold, gate_bias, gate_scale)
    ops.check_linear(x, up, up_threshold, up_bias, up_scale)
    ops.check_gated(gate, up, activation)
    ops.refuse_gradient("sparse_gate_up", x, gate, up, gate_bias, up_bias)
    if not has_kernel(x, gate, up):
        return reference.sparse_gate_up(
            x, gate, up, gate_threshold, up_threshold, activation,
            gate_bias, up_bias, gate_scale, up_scale,
        )  # fmt: skip
    flat, K, N = _tokens(x), gate.shape[0], gate.shape[1]
    config = choose("sparse_gate_up", card_of(x.device), len(flat), K, N, x.itemsize)
    with torch.cuda.device(x.device):
        h = gate_up.launch(
            flat, gate, up, gate_threshold.contiguous(), up_threshold.contiguous(), activation,
            _contiguous(gate_bias), _contiguous(up_bias),
            _per_token(gate_scale), _per_token(up_scale), config,
        )  # fmt: skip
    return h.view(*x.shape[:-1], N)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _per_token(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.reshape(-1).contiguous()
