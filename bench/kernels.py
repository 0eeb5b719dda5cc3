"""Operator time on cold weights, against the byte floor and against dense torch."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wina.bench.devices import plain_read
from wina.bench.operators import (
    DTYPES,
    OPERATORS,
    ColdIntegers,
    ColdWeights,
    Operator,
    gate,
    gate_integers,
    inputs_for,
    kept_channels,
    threshold_for,
)
from wina.bench.shapes import PROJECTION_SHAPES
from wina.bench.timing import (
    FULL,
    STEADY,
    Comparison,
    Effort,
    Timing,
    claim,
    compare,
    interleave,
    ratio,
)
from wina.errors import ConfigError
from wina.kernels.dispatch import Backend, LayerSpec, backends, choose
from wina.kernels.quantization import FORMATS, WEIGHT_DTYPES


@dataclass(frozen=True)
class Grid:
    """What to time: every combination of these.

    Attributes:
        shapes: [N, K] of a projection; for ``sparse_gate_up`` of each of its two.
        operators: names of :data:`wina.bench.operators.OPERATORS`.
        backends: names; ``("auto",)`` is the one a model would get, ``("all",)`` every one that
            accepts.
        dtypes: of hidden states and results, names of :data:`wina.bench.operators.DTYPES`.
        weight_dtypes: ``""`` for weights in the same dtype, ``"int8"``, ``"int4"``.
        sparsities: shares of channels dropped; 0 is added, as the kernel's own dense time.
        tokens: decoded at once.
        device: ``"cpu"`` or ``"cuda"``.
    """

    shapes: Sequence[tuple[int, int]] = PROJECTION_SHAPES
    operators: Sequence[str] = ("sparse_linear",)
    backends: Sequence[str] = ("auto",)
    dtypes: Sequence[str] = ("float32", "bfloat16")
    weight_dtypes: Sequence[str] = ("",)
    sparsities: Sequence[float] = (0.0, 0.5, 0.65)
    tokens: Sequence[int] = (1,)
    device: str = "cpu"

    def __post_init__(self) -> None:
        unknown = [name for name in self.dtypes if name not in DTYPES]
        if unknown:
            raise ConfigError(f"unknown dtype {unknown[0]!r}. Known: {', '.join(DTYPES)}.")
        if any(t < 1 for t in self.tokens):
            raise ConfigError("tokens are counted from 1")
        unknown = [name for name in self.weight_dtypes if name and name not in FORMATS]
        if unknown:
            raise ConfigError(
                f"unknown weight dtype {unknown[0]!r}. Known: {', '.join(FORMATS)}, or none for "
                "weights in the dtype of the hidden states."
            )
        for name in self.operators:
            operator = OPERATORS[name]
            if any(self.weight_dtypes) and operator.integers is None:
                timed = ", ".join(n for n in OPERATORS if OPERATORS[n].integers is not None)
                raise ConfigError(f"{name} is not timed with integer weights; these are: {timed}.")


def bench_kernels(
    grid: Grid, effort: Effort = FULL, show_progress: bool = True
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Time operators at every point of a grid.

    Each round runs, in turn: a plain read of the same buffers, the dense product of torch on the
    usual N-major weight, and every backend at every sparsity; each call takes the buffers that
    have been cold for longest. Every contender is compared with float64 first. The grid is gone
    through twice or more (``effort.passes``), by a new process each time: what differs from one run
    to the next differs between passes too, and a row whose passes disagree makes no claim.

    Returns:
        (rows, refusals). Rows of {operator, backend, device, shape [N, K], dtype, weight_dtype,
        tokens, sparsity, kept, threads, time_us, own_dense_us, torch_dense_us, read_us,
        bandwidth_gb_s, bandwidth_share, speedup_vs_own_dense, speedup_vs_torch,
        speedup_vs_best_dense, byte_ideal, low, high, uncertainty, rounds, verdict, spread,
        break_even_sparsity, break_even_tokens}, weight_dtype None where weights have the dtype of
        the hidden states; refusals of {backend, shape, dtype, reason}.

    Raises:
        WinaError: a backend is wrong; nothing is timed then.
    """
    device = torch.device(grid.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device 'cuda' was asked for, but torch sees no GPU")
    points, refusals = _points(grid, device)
    waiting = list(range(len(points)))
    for number in range(max(effort.passes, effort.most_passes)):
        if number >= effort.passes:
            waiting = [index for index in waiting if not points[index].steady]
        if waiting:
            times = _apart(grid, waiting, number, effort, show_progress)
            for index, found in zip(waiting, times, strict=True):
                points[index].add(found)
    rows = [row for point in points for row in point.rows(grid.sparsities, effort)]
    _add_break_even(rows)
    return rows, refusals


def _points(grid: Grid, device: torch.device) -> tuple[list[_Point], list[dict[str, Any]]]:
    """All points of a grid, those that share weights next to each other, and the refusals."""
    points: list[_Point] = []
    refusals: list[dict[str, Any]] = []
    for dtype in grid.dtypes:
        for shape in grid.shapes:
            layer = LayerSpec(device, DTYPES[dtype], shape[1], shape[0])
            accepted, refused = _accepting(grid.backends, layer)
            refusals += [
                {"backend": name, "shape": list(shape), "dtype": dtype, "reason": reason}
                for name, reason in refused.items()
            ]
            points += [
                _Point(
                    OPERATORS[name], accepted, shape, dtype, width, tokens, device, grid.sparsities
                )
                for width in grid.weight_dtypes
                for name in grid.operators
                for tokens in grid.tokens
            ]
    return points, refusals


def _apart(
    grid: Grid, chosen: Sequence[int], number: int, effort: Effort, show_progress: bool
) -> list[dict[str, Timing]]:
    """:func:`measure_points` in a process of its own where there are several passes.

    Where memory comes to lie differs from process to process, and speed with it.
    """
    if effort.passes == 1:
        return measure_points(grid, chosen, number, effort, show_progress)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure_points, grid, chosen, number, effort, show_progress).result()


def measure_points(
    grid: Grid, chosen: Sequence[int], number: int, effort: Effort, show_progress: bool
) -> list[dict[str, Timing]]:
    """Go through points once, with a share of the rounds.

    Args:
        grid: what the points are of.
        chosen: their numbers.
        number: of the pass, from 0.
        effort, show_progress: of :func:`bench_kernels`.
    """
    points, _ = _points(grid, torch.device(grid.device))
    weights: ColdWeights | None = None
    integers: ColdIntegers | None = None
    key: tuple[Any, ...] = ()
    found = []
    for point in (points[index] for index in chosen):
        if weights is None or key != point.weights_key:
            weights = integers = None  # frees the old ones first
            key = point.weights_key
            weights = ColdWeights(
                point.shape, point.operator.matrices, DTYPES[point.dtype], point.device,
                effort.cold_bytes,
            )  # fmt: skip
            if point.weight_dtype:
                integers = ColdIntegers(
                    point.shape, point.weight_dtype, point.operator.row_major, point.device,
                    effort.cold_bytes,
                )  # fmt: skip
        found.append(point.measure(weights, integers, number, effort, show_progress))
    return found


def _accepting(wanted: Sequence[str], layer: LayerSpec) -> tuple[list[Backend], dict[str, str]]:
    """(backends that serve a layer, name → reason of those that refuse)."""
    if tuple(wanted) != ("all",):
        # A backend that is asked for by name and refuses is an error that says why.
        chosen = {choice.backend.name: choice.backend for choice in
                  (choose(layer, name) for name in wanted)}  # fmt: skip
        return list(chosen.values()), {}
    answers = {name: backend.refuses(layer) for name, backend in backends().items()}
    return (
        [backends()[name] for name, reason in answers.items() if reason is None],
        {name: reason for name, reason in answers.items() if reason is not None},
    )


class _Point:
    """One operator at one shape, dtype and number of tokens: what runs interleaved."""

    def __init__(
        self, operator: Operator, backends: Sequence[Backend], shape: tuple[int, int], dtype: str,
        weight_dtype: str, tokens: int, device: torch.device, sparsities: Sequence[float],
    ) -> None:  # fmt: skip
        self.operator, self.backends, self.shape, self.dtype = operator, backends, shape, dtype
        self.weight_dtype, self.tokens, self.device = weight_dtype, tokens, device
        self.x = inputs_for(shape, tokens, DTYPES[dtype], device)
        self.thresholds = {s: threshold_for(self.x, s) for s in operator.sparsities(sparsities)}
        self.times: dict[str, Timing] = {}

    @property
    def weights_key(self) -> tuple[Any, ...]:
        """Points with the same key can share weights."""
        row_major = self.operator.row_major if self.weight_dtype else None
        return (self.shape, self.operator.matrices, self.dtype, self.weight_dtype, row_major)

    def measure(
        self, weights: ColdWeights, integers: ColdIntegers | None, number: int, effort: Effort,
        show_progress: bool,
    ) -> dict[str, Timing]:  # fmt: skip
        """The rounds of pass ``number``; the first begins with the comparison with float64.

        Dense torch has the weight in the dtype of the hidden states, whatever the width is.
        """
        with torch.no_grad():
            contenders = {
                "read": _timed(plain_read, integers or weights, effort),
                "torch": _timed(lambda b: self.operator.dense(self.x, list(b)), weights, effort),
            }
            for backend in self.backends:
                for s, threshold in self.thresholds.items():
                    if number == 0:
                        self._gate(backend, threshold, weights, integers)
                    call = self._call(backend, threshold, weights, integers)
                    contenders[f"{backend.name} {s}"] = _timed(call, integers or weights, effort)
            N, K = self.shape
            width = f" × {self.weight_dtype}" if self.weight_dtype else ""
            title = f"{self.operator.name} {self.dtype}{width} {N}×{K}, {self.tokens} tokens"
            if number:
                title += f", pass {number + 1}"
            return interleave(contenders, -(-effort.rounds // effort.passes), title, show_progress)

    def _gate(
        self, backend: Backend, threshold: Tensor, weights: ColdWeights,
        integers: ColdIntegers | None,
    ) -> None:  # fmt: skip
        if integers is not None:
            weight = integers.weight(integers.buffers[0])
            gate_integers(self.operator, backend, self.x, weight, threshold)
        else:
            matrices = weights.matrices(weights.buffers[0], self.operator, backend)
            gate(self.operator, backend, self.x, matrices, threshold)

    def add(self, times: Mapping[str, Timing]) -> None:
        """Take the rounds of one more pass."""
        for name, timing in times.items():
            before = self.times[name].seconds if name in self.times else ()
            self.times[name] = Timing(before + timing.seconds)

    def _call(
        self, backend: Backend, threshold: Tensor, weights: ColdWeights,
        integers: ColdIntegers | None,
    ) -> Callable[[Tensor], Tensor]:  # fmt: skip
        call = self.operator.integers
        if integers is not None and call is not None:
            return lambda buffer: call(backend, self.x, integers.weight(buffer), threshold)
        return lambda buffer: self.operator.sparse(
            backend, self.x, weights.matrices(buffer, self.operator, backend), threshold
        )

    def _against_torch(self, backend: Backend, sparsity: float) -> Comparison:
        return compare(self.times["torch"], self.times[f"{backend.name} {sparsity}"])

    @property
    def steady(self) -> bool:
        """Whether every ratio may be claimed."""
        return all(
            self._against_torch(backend, s).verdict == STEADY
            for backend in self.backends
            for s in self.thresholds
        )

    def rows(self, sparsities: Sequence[float], effort: Effort) -> list[dict[str, Any]]:
        """One row for every backend and sparsity."""
        return [
            self._row(backend, s, effort) for backend in self.backends
            for s in dict.fromkeys(sparsities) if s in self.thresholds
        ]  # fmt: skip

    def _size(self) -> int:
        """Bytes that a dense product reads: integers and their scales, or floats."""
        N, K = self.shape
        if not self.weight_dtype:
            return N * K * DTYPES[self.dtype].itemsize * self.operator.matrices
        rows, columns = (N, K) if self.operator.row_major else (K, N)
        return WEIGHT_DTYPES[self.weight_dtype].bytes_of(rows, columns)

    def _row(self, backend: Backend, sparsity: float, effort: Effort) -> dict[str, Any]:
        N, K = self.shape
        kept = kept_channels(self.x, self.thresholds[sparsity])
        size = self._size()
        own = self.times[f"{backend.name} {sparsity}"]
        own_dense = self.times[f"{backend.name} 0.0"]
        dense, read = self.times["torch"], self.times["read"]
        against = self._against_torch(backend, sparsity)
        best = dense if dense.median <= own_dense.median else own_dense
        return {
            "operator": self.operator.name,
            "backend": backend.name,
            "device": self.device.type,
            "shape": [N, K],
            "dtype": self.dtype,
            "weight_dtype": self.weight_dtype or None,
            "tokens": self.tokens,
            "sparsity": sparsity,
            "kept": kept,
            "threads": torch.get_num_threads(),
            "time_us": own.median * 1e6,
            "own_dense_us": own_dense.median * 1e6,
            "torch_dense_us": dense.median * 1e6,
            "read_us": read.median * 1e6,
            "bandwidth_gb_s": kept / K * size / own.median / 1e9,
            "bandwidth_share": ratio(read, own) * kept / K,
            "speedup_vs_own_dense": ratio(own_dense, own),
            "speedup_vs_torch": against.ratio,
            "speedup_vs_best_dense": ratio(best, own),
            "byte_ideal": K / kept if kept else None,
            **claim(against, effort),
            "spread": own.spread,
        }


def _timed(
    function: Callable[[Tensor], Tensor], weights: ColdWeights | ColdIntegers, effort: Effort
) -> Callable[[], float | None]:
    count = len(weights.buffers)
    if weights.buffers.is_cuda:
        return _on_gpu(function, weights, count)
    return _on_cpu(function, weights, max(1, min(count, effort.call_bytes // weights.bytes)))


def _on_cpu(
    function: Callable[[Tensor], Tensor], weights: ColdWeights | ColdIntegers, calls: int
) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        for _ in range(calls):
            function(weights.take())
        return (time.perf_counter() - start) / calls

    return run


def _on_gpu(
    function: Callable[[Tensor], Tensor], weights: ColdWeights | ColdIntegers, calls: int
) -> Callable[[], float]:
    """Seconds of a call inside a CUDA graph over all buffers: a model would not pay launches."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compile and tune before the capture
        for _ in range(3):
            function(weights.take())
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function(weights.take())
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def run() -> float:
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls

    return run


def break_even(points: Sequence[tuple[float, float]]) -> float | None:
    """The least x from which on y ≥ 1, between measured points by straight lines; None if never.

    Args:
        points: (x, y), such as (sparsity, speed-up over dense).
    """
    ordered = sorted(points)
    if not ordered or ordered[-1][1] < 1.0:
        return None
    found = ordered[-1][0]
    for (x0, y0), (x1, y1) in zip(reversed(ordered[:-1]), reversed(ordered[1:]), strict=True):
        if y0 < 1.0:
            return x0 + (1.0 - y0) / (y1 - y0) * (x1 - x0)
        found = x0
    return found


def _add_break_even(rows: Sequence[dict[str, Any]]) -> None:
    """Where sparse stops paying: over the sparsities of a row's kind, and over the tokens."""
    kind = ("operator", "backend", "shape", "dtype", "weight_dtype")
    for row in rows:
        same = [r for r in rows if all(r[field] == row[field] for field in kind)]
        row["break_even_sparsity"] = break_even(
            [(r["sparsity"], r["speedup_vs_torch"]) for r in same if r["tokens"] == row["tokens"]]
        )
        row["break_even_tokens"] = max(
            (r["tokens"] for r in same
             if r["sparsity"] == row["sparsity"] and r["speedup_vs_torch"] >= 1.0),
            default=None,
        )  # fmt: skip
