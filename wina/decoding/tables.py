"""What decoder layers are given from outside, found by looking: embeddings, rotations, windows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wina.decoding.forms import UnrecognisedError
from wina.offload import forward_replaced

_CHUNK = 512


@dataclass(frozen=True)
class Seen:
    """What reaches the layers of a model.

    Attributes:
        embedding_scale: factor between a row of the embedding and the first layer's input.
        rope: (cos, sin) of each layer, [length, R] float32, or (None, None).
        windows: how many of the last tokens each layer's attention sees, 0 for all.
    """

    embedding_scale: float
    rope: list[tuple[Tensor | None, Tensor | None]]
    windows: list[int]


def look(model: Any, decoder: Any, length: int) -> Seen:
    """Run a model with its layers taken out and note what they would have been given.

    One thread at a time may look at a model; others may run it meanwhile.

    Args:
        model: a causal language model of transformers.
        decoder: the module that holds its ``layers``.
        length: of the rotary tables, in tokens.

    Raises:
        UnrecognisedError: a layer is given something else.
    """
    import transformers

    device = next(model.parameters()).device
    tables: list[list[tuple[Tensor, Tensor]]] = [[] for _ in decoder.layers]
    scale = None
    embedding = model.get_input_embeddings().weight
    # Which token it is matters to nothing but the scale: one whose row is not zero, as padding is.
    token = next((i for i in range(min(16, len(embedding))) if embedding[i].any()), 0)
    kinds = {str(kind) for kind in _rope_kinds(decoder)}
    if kinds & {"dynamic", "longrope"}:
        raise UnrecognisedError("its rotary embedding changes with the length of the sequence")
    with torch.no_grad():
        for start in range(0, length, _CHUNK):
            count = min(_CHUNK, length - start)
            positions = torch.arange(start, start + count, device=device)[None]
            tokens = torch.full_like(positions, token)
            with _recorded(decoder.layers) as calls:
                decoder(input_ids=tokens, position_ids=positions, use_cache=False)
            if len(calls) != len(tables):
                raise UnrecognisedError("its layers are not called once each")
            if scale is None:
                scale = _scale(embedding[token], calls[0][0][0, 0])
            for table, (_, rope) in zip(tables, calls, strict=True):
                if rope is not None:
                    table.append((rope[0][0], rope[1][0]))
    assert scale is not None
    # One tensor for layers that were given the same one.
    known: dict[int, tuple[Tensor, Tensor]] = {}
    rope = [_joined(table, known) for table in tables]
    cache = transformers.DynamicCache(config=model.config)
    layers = list(cache.layers) or [None] * len(tables)
    windows = [int(getattr(layer, "sliding_window", None) or 0) for layer in layers]
    return Seen(scale, rope, windows)


def _joined(
    parts: list[tuple[Tensor, Tensor]], known: dict[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor | None, Tensor | None]:
    if not parts:
        return None, None
    key = parts[0][0].data_ptr()
    if key not in known:
        cos, sin = (torch.cat(side).float().contiguous() for side in zip(*parts, strict=True))
        known[key] = (cos, sin)
    return known[key]


def _scale(row: Tensor, x: Tensor) -> float:
    """factor with x = factor·row."""
    wide, seen = row.detach().double(), x.double()
    factor = float(wide @ seen / (wide @ wide).clamp_min(1e-30))
    if not torch.allclose(factor * wide, seen, rtol=2e-2, atol=1e-6):
        raise UnrecognisedError("the first layer's input is no multiple of a row of the embedding")
    return factor


def _rope_kinds(decoder: nn.Module) -> Iterator[object]:
    for module in decoder.modules():
        kind = getattr(module, "rope_type", None)
        yield from kind.values() if isinstance(kind, dict) else [kind]


@contextmanager
def _recorded(layers: nn.ModuleList) -> Iterator[list[tuple[Tensor, Any]]]:
    """Layers that hand their input on and note (it, ``position_embeddings``).

    They do so in this thread only: another one may be decoding with the same model.
    """
    calls: list[tuple[Tensor, Any]] = []
    here = threading.get_ident()

    def recorder(usual: Callable[..., Any]) -> Callable[..., Any]:
        def record(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() != here:
                return usual(hidden_states, *args, **kwargs)
            calls.append((hidden_states, kwargs.get("position_embeddings")))
            return hidden_states

        return record

    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(forward_replaced(layer, recorder(layer.forward)))
        yield calls
