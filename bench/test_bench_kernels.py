"""Micro-benches of the operators for pytest-benchmark.

    pytest bench/ --benchmark-only --benchmark-json=now.json
    pytest bench/ --benchmark-only --benchmark-compare=before.json

A group is one operator at one shape and dtype, dense torch beside every backend; ``extra_info``
holds the bytes that a call must read and the GB/s of the median. Nothing asserts a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from wina.bench.operators import (
    DTYPES,
    OPERATORS,
    ColdWeights,
    gate,
    inputs_for,
    kept_channels,
    threshold_for,
)
from wina.bench.shapes import QUICK_SHAPES
from wina.bench.timing import FULL, QUICK, Effort
from wina.kernels import counting, cpu
from wina.kernels.dispatch import LayerSpec, backends

# Llama-3.2-1B's and Llama-3-8B's largest; a full run takes about two minutes.
SHAPES = ((8192, 2048), (2048, 8192), (14336, 4096))
SPARSITIES = (0.0, 0.5, 0.65)
CPU = torch.device("cpu")
TOKENS = 512  # of a calibration window
COUNTING: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "count_scores": (counting.count_operator, counting.count_scores),
    "kept_sums": (counting.sums_operator, counting.kept_sums),
    "mask_backward": (counting.backward_operator, counting.mask_backward),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Quick mode has shapes of its own."""
    if "shape" in metafunc.fixturenames:
        shapes = QUICK_SHAPES if metafunc.config.getoption("--quick") else SHAPES
        metafunc.parametrize("shape", shapes, ids=lambda s: f"{s[0]}x{s[1]}")


@pytest.fixture
def effort(request: pytest.FixtureRequest) -> Effort:
    return QUICK if request.config.getoption("--quick") else FULL


@pytest.mark.parametrize("operator", list(OPERATORS))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_torch_dense(
    benchmark: Any, shape: tuple[int, int], dtype: str, operator: str, effort: Effort
) -> None:
    weights = ColdWeights(
        shape, OPERATORS[operator].matrices, DTYPES[dtype], CPU, effort.cold_bytes
    )
    x = inputs_for(shape, 1, DTYPES[dtype], CPU)
    benchmark.group = f"{operator} {shape[0]}x{shape[1]} {dtype}"
    with torch.no_grad():
        _measure(
            benchmark, lambda: OPERATORS[operator].dense(x, list(weights.take())),
            weights.bytes, effort,
        )  # fmt: skip


@pytest.mark.parametrize(
    ("operator", "sparsity"),
    [(name, s) for name in OPERATORS for s in OPERATORS[name].sparsities(SPARSITIES)],
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("backend", [name for name in backends() if name != "reference"])
def test_sparse(
    benchmark: Any, shape: tuple[int, int], dtype: str, operator: str, backend: str,
    sparsity: float, effort: Effort,
) -> None:  # fmt: skip
    chosen, op = backends()[backend], OPERATORS[operator]
    reason = chosen.refuses(LayerSpec(CPU, DTYPES[dtype], shape[1], shape[0]))
    if reason is not None:
        pytest.skip(reason)
    weights = ColdWeights(shape, op.matrices, DTYPES[dtype], CPU, effort.cold_bytes)
    x = inputs_for(shape, 1, DTYPES[dtype], CPU)
    threshold = threshold_for(x, sparsity)
    benchmark.group = f"{operator} {shape[0]}x{shape[1]} {dtype}"
    with torch.no_grad():
        # No speed-up on a red gate.
        gate(op, chosen, x, weights.matrices(weights.buffers[0], op, chosen), threshold)
        kept = kept_channels(x, threshold) / shape[1]
        _measure(
            benchmark,
            lambda: op.sparse(chosen, x, weights.matrices(weights.take(), op, chosen), threshold),
            kept * weights.bytes, effort,
        )  # fmt: skip


@pytest.mark.parametrize("operator", list(COUNTING))
@pytest.mark.parametrize("way", ["definition", "native"])
def test_counting(
    benchmark: Any, shape: tuple[int, int], operator: str, way: str, effort: Effort
) -> None:
    """What calibration counts over 512 tokens, in one pass or as its definition says."""
    if (reason := cpu.load()) is not None:
        pytest.skip(reason)
    K = shape[1]
    x, gradient = torch.randn(2, TOKENS, K).bfloat16().unbind()
    constants, factor = torch.rand(K), torch.ones(TOKENS)
    arguments: dict[str, tuple[Any, ...]] = {
        "count_scores": (x, constants),
        "kept_sums": (x, gradient, constants, torch.linspace(0.05, 2.0, 19)),
        "mask_backward": (x, gradient, constants, factor, 0.3),
    }
    called, definition = COUNTING[operator]
    benchmark.group = f"{operator} {TOKENS}x{K} bfloat16"
    function = called if way == "native" else definition
    read = sum(t.nbytes for t in arguments[operator] if torch.is_tensor(t))
    _measure(benchmark, lambda: function(*arguments[operator]), read, effort)


def _measure(benchmark: Any, function: Any, read_bytes: float, effort: Effort) -> None:
    rounds = 10 * effort.rounds
    benchmark.pedantic(function, rounds=rounds, iterations=1, warmup_rounds=effort.rounds)
    benchmark.extra_info["bytes"] = round(read_bytes)
    if benchmark.stats is not None:  # None with --benchmark-disable
        benchmark.extra_info["gb_per_s"] = read_bytes / benchmark.stats.stats.median / 1e9
