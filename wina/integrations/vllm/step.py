"""Merged projections of one step of an engine that batches tokens of many sequences.

Such an engine hands over hidden states [T, K] with no word about which rows are decode steps; that
is known where the step was planned. The product is therefore one opaque operator that asks while it
runs: a compiled graph must not freeze the answer of the run in which it was traced.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from wina.kernels import ops
from wina.kernels.dispatch import Backend, LayerSpec, choose
from wina.kernels.reference import keep_mask

Rows = Tensor | bool
"""Which rows are sparse: all, none, or Boolean [T] for some and not all."""

Scales = Sequence[Tensor | None]
"""The factor of a row's thresholds, float32 [T], or None for 1, for each part of a projection."""


class Step:
    """What the operator asks in this process.

    Attributes:
        sparse_rows: T → which of the step's T rows are sparse.
        observer: called with (layer, x [t, K] of the sparse rows, thresholds [S, K], their factors
            [t] or None of the S parts) of every sparse product; for tests and for counting, else
            None.
    """

    def __init__(self) -> None:
        self.sparse_rows: Callable[[int], Rows] = lambda _: False
        self.observer: Callable[[str, Tensor, Tensor, Scales], None] | None = None


STEP = Step()


def pack(weight: Tensor, splits: Sequence[int]) -> Tensor:
    """The rows of a merged weight [N, K], one K-major block [K, N_i] for each part, flat."""
    return torch.cat([block.t().reshape(-1) for block in weight.split(list(splits))])


def unpack(packed: Tensor, splits: Sequence[int]) -> list[Tensor]:
    """The blocks [K, N_i] of :func:`pack`, as views."""
    channels = packed.numel() // sum(splits)
    blocks = packed.split([channels * columns for columns in splits])
    return [block.view(channels, -1) for block in blocks]


def scales_of(x: Tensor, probes: Tensor | None, limit: float, parts: int) -> Scales:
    """Of rows x [T, K], by the probes [S, K + 1] that the selector found, if it did."""
    if probes is None:
        return [None] * parts
    return [ops.probe_scale(x, probe, limit) for probe in probes]


def merged_product(
    x: Tensor, packed: Tensor, thresholds: Tensor, bias: Tensor | None, shift: Tensor | None,
    splits: list[int], rows: Rows, probes: Tensor | None = None, limit: float = 1.0,
) -> Tensor:  # fmt: skip
    """Products of the parts of a merged projection, side by side; some rows sparse.

    Args:
        x: hidden states [T, K].
        packed: of :func:`pack`.
        thresholds: [S, K] float32, one row for each part, see
            :func:`wina.kernels.reference.keep_mask`.
        bias: [N] or None.
        shift: [N] that sparse rows get in addition, in the dtype of x, or None.
        splits: N_i of the S parts.
        rows: which rows are sparse.
        probes: [S, K + 1] float32 of :class:`wina.selectors.Importance`, or None.
        limit: of what they say.

    Returns:
        [T, N] in the dtype of x.
    """
    if isinstance(rows, Tensor):
        y = x.new_empty(x.shape[0], sum(splits))
        for mask, kind in ((rows, True), (~rows, False)):
            y[mask] = merged_product(
                x[mask], packed, thresholds, bias, shift, splits, kind, probes, limit
            )
        return y
    backend = _backend(x.device, x.dtype)
    if rows and shift is not None:
        bias = shift if bias is None else bias + shift
    biases = [None] * len(splits) if bias is None else list(bias.split(splits))
    scales = scales_of(x, probes if rows else None, limit, len(splits))
    parts = [
        backend.sparse_linear(x, block, threshold, part, scale)
        if rows
        else backend.dense_linear(x, block, part)
        for block, threshold, part, scale in zip(
            unpack(packed, splits), thresholds, biases, scales, strict=True
        )
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)


@cache
def _backend(device: torch.device, dtype: torch.dtype) -> Backend:
    return choose(LayerSpec(device, dtype, 1, 1)).backend


def _step_linear(
    x: Tensor, packed: Tensor, thresholds: Tensor, bias: Tensor | None, shift: Tensor | None,
    splits: list[int], layer: str, probes: Tensor | None = None, limit: float = 1.0,
) -> Tensor:  # fmt: skip
    hidden = x.reshape(-1, x.shape[-1])
    rows = STEP.sparse_rows(len(hidden))
    if STEP.observer is not None and rows is not False:
        sparse = hidden if rows is True else hidden[rows]
        STEP.observer(layer, sparse, thresholds, scales_of(sparse, probes, limit, len(splits)))
    y = merged_product(hidden, packed, thresholds, bias, shift, splits, rows, probes, limit)
    return y.view(*x.shape[:-1], sum(splits))


def _fake(
    x: Tensor, packed: Tensor, thresholds: Tensor, bias: Tensor | None, shift: Tensor | None,
    splits: list[int], layer: str, probes: Tensor | None = None, limit: float = 1.0,
) -> Tensor:  # fmt: skip
    return x.new_empty(*x.shape[:-1], sum(splits))


_LIBRARY = torch.library.Library("wina", "FRAGMENT")
_LIBRARY.define(
    torch.library.infer_schema(_step_linear, op_name="step_linear", mutates_args=()),
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.impl("step_linear", _step_linear, "CompositeExplicitAutograd")
torch.library.register_fake("wina::step_linear", _fake, lib=_LIBRARY)
step_linear: Callable[..., Tensor] = torch.ops.wina.step_linear.default


class DecodedChannels:
    """An observer that counts the channels that sparse products drop."""

    def __init__(self) -> None:
        self.dropped = self.seen = 0

    def __call__(self, layer: str, x: Tensor, thresholds: Tensor, scales: Scales) -> None:
        """Count one product's."""
        for threshold, scale in zip(thresholds, scales, strict=True):
            keep: Any = keep_mask(x, threshold, scale)
            self.dropped += keep.numel() - int(keep.sum())
            self.seen += keep.numel()

    @property
    def realised(self) -> float:
        """Share of channels dropped so far, 0 where nothing was sparse."""
        return self.dropped / self.seen if self.seen else 0.0
