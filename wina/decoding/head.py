"""The language-model head in fewer bits: a copy, beside an embedding that stays as it is.

A token reads all of the head, whatever the sparsity of the projections; once these are integers,
it is a large part of what a small model reads. The copy is memory on top (a byte a weight in 8
bits): a tied embedding is needed as it was, and ``model.generate`` reads the original.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn

from wina.config import SparsityConfig
from wina.errors import ConfigError
from wina.kernels.quantization import FORMATS, QuantizedWeight, quantize
from wina.linear import SparseLinear
from wina.patch import is_patched, patch_of

AUTO, OWN = "auto", "model"
HEAD_DTYPES = (AUTO, OWN, *FORMATS)

# A head's copy serves every decoder of a model: rounding takes a second for a thousand million.
_rounded: WeakKeyDictionary[nn.Module, tuple[tuple[int, int, str], QuantizedWeight]] = (
    WeakKeyDictionary()
)


def head_dtype(model: Any, wanted: str = AUTO) -> str | None:
    """The integer format in which a model's head is read, None for the weight that it has.

    Args:
        model: dense or sparsified.
        wanted: one of :data:`HEAD_DTYPES`. ``"auto"`` is int8 for a model whose projections are
            integers (of 4 bits, too: logits are what a token is chosen by), else the model's own. A
            head that is one of the projections is read as they are.

    Raises:
        ConfigError: no such format, or one for a head that is one of the projections.
    """
    if wanted not in HEAD_DTYPES:
        raise ConfigError(f"unknown head dtype {wanted!r}. Known: {', '.join(HEAD_DTYPES)}.")
    planned = isinstance(model.get_output_embeddings(), SparseLinear)
    if planned and wanted not in (AUTO, OWN):
        raise ConfigError(
            f"head dtype {wanted!r}: the plan has the head among its projections (head='sparse'), "
            "and reads it as they are"
        )
    if wanted != AUTO:
        return None if wanted == OWN else wanted
    return usual_head(patch_of(model).plan.config) if is_patched(model) else None


def usual_head(config: SparsityConfig | None) -> str | None:
    """:func:`head_dtype` of a model with these settings (None: dense) that nobody asked about."""
    if config is None or config.weight_dtype is None or config.head == "sparse":
        return None
    return "int8"


def rounded_head(model: Any, dtype: str) -> QuantizedWeight:
    """The head [vocabulary, hidden] of a model in a format of FORMATS, made once."""
    head = model.get_output_embeddings()
    weight = head.weight.detach()
    version = 0 if weight.is_inference() else head.weight._version
    state = (weight.data_ptr(), version, dtype)
    known = _rounded.get(head)
    if known is None or known[0] != state:
        known = _rounded[head] = (state, quantize(weight, dtype))
    return known[1]


@contextmanager
def read_rounded(model: Any, dtype: str | None) -> Iterator[None]:
    """Let a model's own forward compute with the rounded head inside the ``with`` block.

    To measure what rounding costs; the rounded weight is a float copy.

    Args:
        dtype: None leaves the head as it is.
    """
    if dtype is None:
        yield
        return
    head = model.get_output_embeddings()
    rounded = nn.Linear(head.in_features, head.out_features, head.bias is not None, device="meta")
    weight = rounded_head(model, dtype).dequantize().to(head.weight)
    rounded.weight = nn.Parameter(weight, requires_grad=False)
    if head.bias is not None:
        rounded.bias = nn.Parameter(head.bias.detach(), requires_grad=False)
    with torch.no_grad():
        model.set_output_embeddings(rounded)
    try:
        yield
    finally:
        model.set_output_embeddings(head)
