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

from wina.kernels import ops
from wina.kernels.ops import Arguments
from wina.kernels.quantization import QuantizedWeight
from wina.kernels.triton import DTYPES, gate_up, sparse_linear
from wina.kernels.triton.config import MAX_TOKENS, card_of, choose


@cache
def register() -> None:
    """Make the kernels the implementation of the operators for CUDA tensors."""
    ops.register("sparse_linear", "CUDA", _sparse_linear, lambda a: has_kernel(a.x, a.weight))
    ops.register("sparse_gate_up", "CUDA", _sparse_gate_up, lambda a: has_kernel(a.x, a.gate, a.up))
    ops.register(
        "sparse_linear_quantized", "CUDA", _linear_quantized, lambda a: has_kernel(a.x, a.packed)
    )
    ops.register(
        "sparse_gate_up_quantized", "CUDA", _gate_up_quantized, lambda a: has_kernel(a.x, a.gate)
    )


def has_kernel(x: Tensor, *weights: Tensor) -> bool:
    """Whether a call of checked arguments has a kernel; x [..., K], weights [K, N]."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (
        0 < tokens <= MAX_TOKENS
        and x.dtype in DTYPES
        and all(w.shape[1] > 0 and w.stride(1) == 1 for w in weights)
    )


def _sparse_linear(a: Arguments) -> Tensor:
    flat, (K, N) = _tokens(a.x), a.weight.shape
    config = choose("sparse_linear", card_of(a.x.device), len(flat), K, N, a.x.itemsize)
    with torch.cuda.device(a.x.device):
        y = sparse_linear.launch(
            flat, a.weight, a.threshold.contiguous(), _contiguous(a.bias), _per_token(a.scale),
            config,
        )  # fmt: skip
    return y.view(*a.x.shape[:-1], N)


def _sparse_gate_up(a: Arguments) -> Tensor:
    flat, (K, N) = _tokens(a.x), a.gate.shape
    config = choose("sparse_gate_up", card_of(a.x.device), len(flat), K, N, a.x.itemsize)
    with torch.cuda.device(a.x.device):
        h = gate_up.launch(
            flat, a.gate, a.up, a.gate_threshold.contiguous(), a.up_threshold.contiguous(),
            a.activation, _contiguous(a.gate_bias), _contiguous(a.up_bias),
            _per_token(a.gate_scale), _per_token(a.up_scale), config,
        )  # fmt: skip
    return h.view(*a.x.shape[:-1], N)


def _linear_quantized(a: Arguments) -> Tensor:
    flat, K = _tokens(a.x), a.x.shape[-1]
    config = choose(
        "sparse_linear", card_of(a.x.device), len(flat), K, a.columns, a.bits / 8
    )  # fmt: skip
    with torch.cuda.device(a.x.device):
        y = sparse_linear.launch(
            flat, QuantizedWeight(a.packed, a.scales, a.columns, a.bits), a.threshold.contiguous(),
            _contiguous(a.bias), _per_token(a.scale), config,
            None if a.residual is None else _tokens(a.residual),
        )  # fmt: skip
    return y.view(*a.x.shape[:-1], a.columns)


def _gate_up_quantized(a: Arguments) -> Tensor:
    flat, K = _tokens(a.x), a.x.shape[-1]
    config = choose(
        "sparse_gate_up", card_of(a.x.device), len(flat), K, a.columns, a.bits / 8
    )  # fmt: skip
    with torch.cuda.device(a.x.device):
        h = gate_up.launch(
            flat, QuantizedWeight(a.gate, a.gate_scales, a.columns, a.bits),
            QuantizedWeight(a.up, a.up_scales, a.columns, a.bits),
            a.gate_threshold.contiguous(), a.up_threshold.contiguous(), a.activation,
            _contiguous(a.gate_bias), _contiguous(a.up_bias),
            _per_token(a.gate_scale), _per_token(a.up_scale), config,
        )  # fmt: skip
    return h.view(*a.x.shape[:-1], a.columns)


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _per_token(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.reshape(-1).contiguous()
