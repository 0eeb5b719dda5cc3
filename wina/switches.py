"""``with`` blocks in which a sparsified model computes otherwise."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn

from wina.patch import patch_of
from wina.prefill import Prefill

_COUNTING = threading.Lock()  # of blocks that make a model dense


@contextmanager
def dense(model: nn.Module) -> Iterator[nn.Module]:
    """Let a sparsified model compute densely inside the ``with`` block.

    Weights stay K-major, so speed is not that of the restored model: use :func:`restore` to time
    a dense baseline. Weights that were rounded stay rounded.
    """
    control = patch_of(model).control
    with _COUNTING:
        control.dense_blocks += 1
    try:
        yield model
    finally:
        with _COUNTING:
            control.dense_blocks -= 1


@contextmanager
def dense_in_this_thread(model: nn.Module) -> Iterator[nn.Module]:
    """:func:`dense` for the thread that is in the ``with`` block; one at a time may be."""
    control = patch_of(model).control
    control.dense_thread = threading.get_ident()
    try:
        yield model
    finally:
        control.dense_thread = None


@contextmanager
def prefill_protocol(model: nn.Module, prefill: Prefill) -> Iterator[nn.Module]:
    """Score texts under another prefill protocol inside the ``with`` block."""
    control = patch_of(model).control
    before = control.prefill
    control.prefill = prefill
    try:
        yield model
    finally:
        control.prefill = before


@contextmanager
def padded_batch(
    model: nn.Module, lengths: Sequence[int], size: int, padding: str
) -> Iterator[nn.Module]:
    """Run a padded batch inside the ``with`` block as if each row were alone.

    The prefill protocol counts the tokens of a sequence. Without this it would count the padding:
    the first tokens of a left-padded row would not be the ones that stay dense, and the last half
    of a right-padded row would begin too late.

    Args:
        model: sparsified; a dense model needs nothing of the kind.
        lengths: tokens of each row without its padding.
        size: tokens of each row with it.
        padding: ``"left"`` or ``"right"``.
    """
    control = patch_of(model).control
    before = control.padded
    if min(lengths, default=size) < size:
        sparse = control.prefill.sparse_tokens(lengths, size, padding)
        control.padded = sparse.to(next(model.parameters()).device)
    else:
        control.padded = None
    try:
        yield model
    finally:
        control.padded = before
