"""Registers the kernels for CUDA tensors under ``torch.ops.wina``.

Knows the calls that have a kernel; the others (more tokens than a tile has, other dtypes, weights
that are not K-major, empty tensors) get the definition: a masked dense product. Nothing here reads
device memory or depends on values, so every path can be captured in a CUDA graph after one warm-up
call, which compiles the kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

from wina.kernels import ops
from wina.kernels.ops import Arguments
from wina.kernels.quantization import QuantizedWeight
from wina.kernels.triton import DTYPES, gate_up, group, selection, sparse_linear
from wina.kernels.triton.config import card_of, choose, token_limit


@cache
def register(key: str = "CUDA") -> None:
    """Make the kernels the implementation of the operators for one dispatch key."""
    ops.register("sparse_linear", key, _sparse_linear, lambda a: has_kernel(a.x, a.weight))
    ops.register("sparse_gate_up", key, _sparse_gate_up, lambda a: has_kernel(a.x, a.gate, a.up))
    ops.register(
        "sparse_linear_quantized", key, _linear_quantized, lambda a: has_kernel(a.x, a.packed)
    )
    ops.register(
        "sparse_gate_up_quantized", key, _gate_up_quantized, lambda a: has_kernel(a.x, a.gate)
    )
    ops.register("sparse_group", key, _sparse_group, lambda a: has_kernel(a.x, *a.weights))
    ops.register("topk_scale", key, _topk_scale, lambda a: has_selection(a.x))
    ops.register("mean_scale", key, _mean_scale, lambda a: has_selection(a.x))
    ops.register("probe_scale", key, _probe_scale, lambda a: has_selection(a.x))
    ops.register("tracked_scale", key, _tracked_scale, _is_one_token_each)


def has_kernel(x: Tensor, *weights: Tensor) -> bool:
    """Whether a call of checked arguments has a kernel; x [..., K], weights [K, N]."""
    tokens = x.numel() // x.shape[-1] if x.shape[-1] else 0
    return (
        tokens > 0
        and x.dtype in DTYPES
        and all(w.shape[1] > 0 and w.stride(1) == 1 for w in weights)
        and tokens <= token_limit(card_of(x.device).name).tokens
    )


def has_selection(x: Tensor) -> bool:
    """Whether the tokens of x [..., K] have a kernel that finds their scale."""
    return x.numel() > 0 and x.dtype in DTYPES and x.shape[-1] <= selection.MAX_CHANNELS


def _is_one_token_each(a: Arguments) -> bool:
    """Whether every sequence that is followed has one token, as while decoding."""
    one_each = a.x.shape[:-1].numel() == len(a.state)
    return one_each and a.counted is None and a.state.is_contiguous() and has_selection(a.x)


def _sparse_linear(a: Arguments) -> Tensor:
    flat, (K, N) = _tokens(a.x), a.weight.shape
    config = choose("sparse_linear", card_of(a.x.device), len(flat), K, N, a.x.itemsize)
    with torch.cuda.device(a.x.device):
        y = sparse_linear.launch(
            flat, a.weight, a.threshold.contiguous(), _contiguous(a.bias), _per_token(a.scale),
            config, None if a.residual is None else _tokens(a.residual),
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


def _sparse_group(a: Arguments) -> list[Tensor]:
    flat, K = _tokens(a.x), a.x.shape[-1]
    columns = [w.shape[1] for w in a.weights]
    thresholds = [t.contiguous() for t in a.thresholds]
    biases = _all_or_none(a.biases, columns, 0.0, a.x.dtype)
    scales = _all_or_none(
        [_per_token(scale) for scale in a.scales], [len(flat)] * len(columns), 1.0, torch.float32
    )
    ys: list[Tensor] = []
    for first in range(0, len(columns), group.SLOTS):
        part = slice(first, first + group.SLOTS)
        # All the columns together are to the launch what one weight's are.
        config = choose("sparse_linear", card_of(a.x.device), len(flat), K, sum(columns[part]),
                        a.x.itemsize)  # fmt: skip
        with torch.cuda.device(a.x.device):
            ys += group.launch(
                flat, a.weights[part], thresholds[part], biases and biases[part],
                scales and scales[part], config,
            )  # fmt: skip
    return [y.view(*a.x.shape[:-1], y.shape[1]) for y in ys]


def _all_or_none(
    given: Sequence[Tensor | None], sizes: Sequence[int], neutral: float, dtype: torch.dtype
) -> list[Tensor] | None:
    """None where none is given; where some are, a neutral vector stands for a missing one."""
    device = next((one.device for one in given if one is not None), None)
    if device is None:
        return None
    return [
        torch.full((n,), neutral, dtype=dtype, device=device) if one is None else one.contiguous()
        for one, n in zip(given, sizes, strict=True)
    ]


def _topk_scale(a: Arguments) -> Tensor:
    with torch.cuda.device(a.x.device):
        scale = selection.launch_topk(_tokens(a.x), a.threshold.contiguous(), a.dropped)
    return scale.view(a.x.shape[:-1])


def _mean_scale(a: Arguments) -> Tensor:
    with torch.cuda.device(a.x.device):
        scale = selection.launch_mean(_tokens(a.x))
    return scale.view(a.x.shape[:-1])


def _probe_scale(a: Arguments) -> Tensor:
    with torch.cuda.device(a.x.device):
        scale = selection.launch_probe(_tokens(a.x), a.probe.contiguous(), a.limit)
    return scale.view(a.x.shape[:-1])


def _tracked_scale(a: Arguments) -> Tensor:
    with torch.cuda.device(a.x.device):
        scale = selection.launch_tracked(
            _tokens(a.x), a.threshold.contiguous(), a.state, a.sparsity, a.rate, _per_token(a.scale)
        )
    return scale.view(a.x.shape[:-1])


def _tokens(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def _per_token(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.reshape(-1).contiguous()
