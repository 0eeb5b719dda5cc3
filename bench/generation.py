"""One greedy generation, timed token by token, and the memory that it takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

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
    # put() is called for the prompt, then for every token; the first token ends the prefill.
    times = clock.times[1:]
    steps = tuple(after - before for before, after in pairwise(times))
    return Generation(times[0] - start, steps, clock.tokens)


def decode_seconds(model: nn.Module, prompt: Tensor, new_tokens: int) -> float:
    """Seconds per token of greedy decode, without prefill; arguments of :func:`generate`."""
    return generate(model, prompt, new_tokens).step_s


@dataclass(frozen=True)
class Engine:
    """A way to run a model.

    Attributes:
        name: of rows.
        compiled: whether ``forward`` is compiled by Inductor, with a static cache.
    """

    name: str
    compiled: bool = False

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[Callable[[Tensor, int], Generation]]:
        """A function (prompt, new tokens) → :class:`Generation`; ``model`` is as before after."""
        if not self.compiled:
            yield lambda prompt, new_tokens: generate(model, prompt, new_tokens)
            return
        compiled = torch.compile(model.forward)

        def run(prompt: Tensor, new_tokens: int) -> Generation:
            # Set for the call alone: eager runs of the same model come between.
            model.forward = compiled
            try:
                return generate(model, prompt, new_tokens, cache_implementation="static")
            finally:
                del model.forward

        yield run


ENGINES: Registry[Engine] = Registry("engine")
ENGINES.register("eager")(Engine("transformers generate"))
ENGINES.register("compiled")(Engine("transformers compiled", compiled=True))


def model_bytes(model: nn.Module) -> int:
    """Bytes of a model's parameters and buffers, shared ones once."""
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}
    return sum(t.numel() * t.itemsize for t in tensors.values())


def peak_memory(function: Callable[[], object], device: torch.device) -> tuple[int | None, int]:
    """(bytes that a call needs beyond what was held before, peak of the whole process).

    On the CPU, resident memory as Linux counts it; where its peak cannot be reset the first is
    None. On a GPU, what torch allocates there.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        peak = torch.cuda.max_memory_allocated(device)
        return peak - before, peak
    try:
        Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
        before = _resident("VmRSS")
    except OSError:
        before = 0
    function()
    peak = _resident("VmHWM")
    return (max(0, peak - before) if before else None), peak


def _resident(field: str) -> int:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(field)), 0)
