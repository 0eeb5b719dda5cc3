"""Timing on a CUDA card: cold weights, CUDA graphs, and a plain refusal where there is no card."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from wina.errors import WinaError


def require_card(what: str) -> torch.device:
    """The current CUDA device; a WinaError that names ``what`` if there is none."""
    if not torch.cuda.is_available():
        raise WinaError(
            f"{what} needs a CUDA card and this machine has none: nothing was measured. "
            "The kernels can be checked without one: `make test`, "
            "`python -m wina.kernels.triton.compiled`"
        )
    return torch.device("cuda", torch.cuda.current_device())


def cold_copies(weights: Sequence[Tensor], factor: int = 4) -> list[list[Tensor]]:
    """Sets of weights to rotate through, together ``factor`` times the L2 cache, at least two."""
    size = sum(w.numel() * w.itemsize for w in weights)
    cache = torch.cuda.get_device_properties(weights[0].device).L2_cache_size
    count = max(2, -(-factor * cache // max(1, size)))
    return [list(weights)] + [[w.clone() for w in weights] for _ in range(count - 1)]


def seconds_in_graph(
    call: Callable[[list[Tensor]], object], copies: Sequence[list[Tensor]], repeats: int = 7
) -> float:
    """Median seconds of one call, replayed from a CUDA graph that runs through all copies.

    Args:
        call: takes one set of weights; it must not synchronise.
        copies: from :func:`cold_copies`.
        repeats: replays; each gives one figure, the first is left out.
    """
    calls = list(copies) * max(1, -(-32 // len(copies)))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call(copies[0])  # compiles, outside of the capture
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for weights in calls:
            call(weights)
    figures: list[float] = []
    for _ in range(repeats + 1):
        start = torch.cuda.Event(enable_timing=True)
        end = torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        figures.append(start.elapsed_time(end) / 1e3 / len(calls))
    return statistics.median(figures[1:])


def copy_bandwidth(device: torch.device, size: int = 1 << 30) -> float:
    """Bytes per second, read plus written, of a large device-to-device copy."""
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * size / seconds_in_graph(lambda pair: pair[1].copy_(pair[0]), [[source, target]])
