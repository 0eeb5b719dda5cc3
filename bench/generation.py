"""One greedy generation, timed token by token, and the memory that it takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from wina.decoding import Decoder
from wina.memory import peak_resident, reset_peak, resident
from wina.registry import Registry


class _Clock:
    """A streamer that notes when each token arrives, and those of the first sequence."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.values: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.values.append(value)

    @property
    def tokens(self) -> tuple[int, ...]:
        """Without the prompt, which arrives first."""
        return tuple(int(value.flatten()[0]) for value in self.values[1:])

    def end(self) -> None:
        pass

    def generation(self, start: float) -> Generation:
        """Of a run that was started then."""
        # put() is called for the prompt, then for every token; the first token ends the prefill.
        times = self.times[1:]
        steps = tuple(after - before for before, after in pairwise(times))
        return Generation(times[0] - start, steps, self.tokens)


@dataclass(frozen=True)
class Generation:
    """When tokens came.

    Attributes:
        first_s: seconds from the call to the first token: prefill, and what surrounds it.
        steps_s: seconds between a token and the next.
        tokens: of the first sequence.
    """

    first_s: float
    steps_s: tuple[float, ...]
    tokens: tuple[int, ...] = ()

    @property
    def step_s(self) -> float:
        """Mean seconds of a decode step."""
        return sum(self.steps_s) / len(self.steps_s)


def generate(model: nn.Module, prompt: Tensor, new_tokens: int, **options: Any) -> Generation:
    """Generate greedily with transformers' own loop.

    Args:
        model: dense or sparsified.
        prompt: token ids [batch, S].
        new_tokens: of each sequence, at least 2; end-of-sequence does not stop.
        **options: of ``model.generate``.
    """
    clock = _Clock()
    run: Any = model.generate
    start = time.perf_counter()
    run(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        streamer=clock,
        **options,
    )
    return clock.generation(start)


def decode_seconds(model: nn.Module, prompt: Tensor, new_tokens: int) -> float:
    """Seconds per token of greedy decode, without prefill; arguments of :func:`generate`."""
    return generate(model, prompt, new_tokens).step_s


Run = Callable[[Tensor, int], Generation]


@dataclass(frozen=True)
class Engine:
    """A way to run a model.

    Attributes:
        name: of rows.
        on: a context for a model that gives a function (prompt, new tokens) → Generation; after
            it the model is as before.
        ours: whether it is not what a user of transformers has anyway.
    """

    name: str
    on: Callable[[nn.Module], AbstractContextManager[Run]]
    ours: bool = False


ENGINES: Registry[Engine] = Registry("engine")


@contextmanager
def _eager(model: nn.Module) -> Iterator[Run]:
    yield lambda prompt, new_tokens: generate(model, prompt, new_tokens)


@contextmanager
def _compiled(model: nn.Module) -> Iterator[Run]:
    """``forward`` compiled by Inductor, with a static cache."""
    compiled = torch.compile(model.forward)

    def run(prompt: Tensor, new_tokens: int) -> Generation:
        # Set for the call alone: eager runs of the same model come between.
        model.forward = compiled
        try:
            return generate(model, prompt, new_tokens, cache_implementation="static")
        finally:
            del model.forward

    yield run


@contextmanager
def _decoder(model: nn.Module) -> Iterator[Run]:
    decoders: dict[int, Decoder] = {}

    def run(prompt: Tensor, new_tokens: int) -> Generation:
        rows = len(prompt)
        if rows not in decoders:
            decoders[rows] = Decoder(model, rows)
        clock = _Clock()
        start = time.perf_counter()
        decoders[rows].decode(prompt, max_new_tokens=new_tokens, do_sample=False,
                              eos_token_id=None, streamer=clock)  # fmt: skip
        return clock.generation(start)

    yield run


ENGINES.register("eager")(Engine("transformers generate", _eager))
ENGINES.register("compiled")(Engine("transformers compiled", _compiled))
ENGINES.register("wina")(Engine("wina decode", _decoder, ours=True))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.itemsize for t in tensors.values())


def peak_memory(function: Callable[[], object], device: torch.device) -> tuple[int | None, int]:
    """(bytes that a call needs beyond what was held before, peak of the whole process).

    On the CPU, resident memory as Linux counts it; where its peak cannot be reset the first is
    None. On a GPU, what torch allocates there. Garbage is collected before: what is freed while the
    call runs would be taken off what it needs.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        peak = torch.cuda.max_memory_allocated(device)
        return peak - before, peak
    held = resident() if reset_peak() else None
    function()
    most = peak_resident() or 0
    return (None if held is None else max(0, most - held)), most
