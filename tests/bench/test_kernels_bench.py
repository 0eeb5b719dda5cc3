from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from wina.bench.devices import plain_read
from wina.bench.kernels import Grid, bench_kernels, break_even
from wina.bench.operators import (
    DTYPES,
    OPERATORS,
    ColdIntegers,
    ColdWeights,
    gate,
    gate_integers,
    inputs_for,
    kept_channels,
    threshold_for,
)
from wina.bench.timing import QUICK, STEADY, TOO_NOISY, Effort, Timing
from wina.errors import ConfigError, UnknownNameError, WinaError
from wina.kernels import quantized, reference
from wina.kernels.dispatch import Backend, ReferenceBackend, backends
from wina.kernels.quantization import FORMATS

CPU = torch.device("cpu")


def test_every_point_of_the_grid_becomes_a_row() -> None:
    grid = Grid(
        shapes=((33, 48),), operators=list(OPERATORS), backends=("all",), dtypes=list(DTYPES),
        sparsities=(0.5,), tokens=(1, 2),
    )  # fmt: skip
    rows, refusals = bench_kernels(grid, QUICK, show_progress=False)
    served = {row["backend"] for row in rows}
    assert served | {refusal["backend"] for refusal in refusals} == set(backends())
    # A dense operator has no row at 50 %.
    sparse = [name for name in OPERATORS if not OPERATORS[name].row_major]
    assert len(rows) == len(served) * len(sparse) * len(DTYPES) * 2
    for row in rows:
        assert row["shape"] == [33, 48]
        assert row["sparsity"] == 0.5
        assert row["weight_dtype"] is None
        assert row["own_dense_us"] > 0
        assert row["low"] <= row["speedup_vs_torch"] <= row["high"]
        assert row["verdict"] == "quick: no claim"
        bytes_ = {"float32": 4}.get(row["dtype"], 2) * 33 * row["kept"]
        bytes_ *= OPERATORS[row["operator"]].matrices
        assert row["bandwidth_gb_s"] == pytest.approx(bytes_ / row["time_us"] / 1e3)
    assert {row["kept"] for row in rows if row["tokens"] == 1} == {24}
    assert all(24 < row["kept"] <= 48 for row in rows if row["tokens"] == 2)  # the union


@pytest.mark.parametrize(("operator", "held"), [("sparse_linear", 48), ("dense_linear_rows", 33)])
@pytest.mark.parametrize("width", FORMATS)
def test_integer_weights_are_counted_with_their_scales(
    operator: str, held: int, width: str
) -> None:
    grid = Grid(
        shapes=((33, 48),), operators=(operator,), dtypes=("bfloat16",), sparsities=(0.0,),
        weight_dtypes=(width,),
    )  # fmt: skip
    (row,), _ = bench_kernels(grid, QUICK, show_progress=False)
    assert row["weight_dtype"] == width
    # A row of either layout is one cache line, and two scales of two bytes.
    assert row["bandwidth_gb_s"] == pytest.approx(held * (64 + 4) / row["time_us"] / 1e3)


@pytest.mark.parametrize("operator", ["sparse_linear", "dense_linear_rows"])
def test_red_gate_of_integers(operator: str) -> None:
    weights = ColdIntegers((64, 96), "int4", OPERATORS[operator].row_major, CPU, 1)
    x = inputs_for((64, 96), 2, torch.bfloat16, CPU)
    weight, threshold = weights.weight(weights.buffers[1]), threshold_for(x, 0.0)
    gate_integers(OPERATORS[operator], ReferenceBackend(), x, weight, threshold)
    with pytest.raises(WinaError, match="not timing it"):
        gate_integers(OPERATORS[operator], _Wrong(), x, weight, threshold)


@pytest.mark.parametrize(("drift", "passes"), [(1.0, 2), (0.9, 4)])
def test_points_whose_passes_disagree_are_gone_through_again(
    monkeypatch: pytest.MonkeyPatch, drift: float, passes: int
) -> None:
    """A product that is as steady within every pass as can be, and faster in the next one."""
    calls: list[int] = []

    def scripted(_: Grid, chosen: Sequence[int], number: int, effort: Effort, __: bool) -> Any:
        calls.append(number)
        slow, fast = ((s,) * effort.rounds for s in (1.0, 0.5 * drift**number))
        times = {"torch": slow, "read": slow, "cpu 0.0": fast, "cpu 0.5": fast}
        return [{name: Timing(seconds) for name, seconds in times.items()} for _ in chosen]

    monkeypatch.setattr("wina.bench.kernels._apart", scripted)
    effort = Effort(rounds=4, passes=2, most_passes=4, cold_bytes=1, call_bytes=1)
    grid = Grid(shapes=((33, 48),), dtypes=("float32",), sparsities=(0.5,), backends=("cpu",))
    (row,), _ = bench_kernels(grid, effort, show_progress=False)
    assert calls == list(range(passes))
    assert row["rounds"] == 4 * passes
    assert row["verdict"] == (STEADY if drift == 1.0 else TOO_NOISY)


def test_every_pass_has_its_process() -> None:
    effort = Effort(rounds=2, passes=2, most_passes=2, cold_bytes=1, call_bytes=1)
    grid = Grid(shapes=((33, 48),), dtypes=("float32",), sparsities=(0.5,), backends=("cpu",))
    (row,), _ = bench_kernels(grid, effort, show_progress=False)
    assert row["rounds"] == 2
    assert row["time_us"] > 0


class _Wrong(ReferenceBackend):
    name = "wrong"

    @staticmethod
    def dense_linear_rows(*arguments: Tensor) -> Tensor:
        return reference.dense_linear_rows(*arguments) * 1.01

    @staticmethod
    def sparse_linear_quantized(*arguments: Any) -> Tensor:
        return quantized.sparse_linear_quantized(*arguments) * 1.01

    @staticmethod
    def dense_linear_rows_quantized(*arguments: Any) -> Tensor:
        return quantized.dense_linear_rows_quantized(*arguments) * 1.01

    @staticmethod
    def sparse_linear(*arguments: Tensor) -> Tensor:
        return reference.sparse_linear(*arguments) * 1.01

    @staticmethod
    def sparse_gate_up(*arguments: Tensor) -> Tensor:
        return reference.sparse_gate_up(*arguments) * 1.01  # type: ignore[arg-type]


@pytest.mark.parametrize("name", list(OPERATORS))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_red_gate_stops_the_bench(name: str, dtype: torch.dtype) -> None:
    weights = ColdWeights((64, 96), OPERATORS[name].matrices, dtype, CPU, 1)
    x = inputs_for((64, 96), 2, dtype, CPU)
    threshold = threshold_for(x, 0.0 if OPERATORS[name].row_major else 0.5)

    def check(backend: Backend) -> None:
        matrices = weights.matrices(weights.buffers[0], OPERATORS[name], backend)
        gate(OPERATORS[name], backend, x, matrices, threshold)

    check(ReferenceBackend())
    with pytest.raises(WinaError, match="not timing it"):
        check(_Wrong())


def test_wrong_backend_gets_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wina.bench.kernels.backends", lambda: {"wrong": _Wrong()})
    with pytest.raises(WinaError, match="backend wrong exceeds"):
        bench_kernels(Grid(shapes=((16, 32),), backends=("all",)), QUICK, show_progress=False)


def test_cold_weights_rotate_and_serve_both_layouts() -> None:
    weights = ColdWeights((3, 5), 2, torch.float32, CPU, 1000)
    assert weights.bytes == 120
    assert len(weights.buffers) == 9
    taken = [weights.take().data_ptr() for _ in range(10)]
    assert len(set(taken)) == 9
    assert taken[9] == taken[0]
    buffer = weights.take()
    straight = weights.k_major(buffer, ReferenceBackend())
    assert [tuple(w.shape) for w in straight] == [(5, 3), (5, 3)]
    assert torch.equal(straight[1], buffer[1].t())

    class KMajor(ReferenceBackend):
        k_major = True

    turned = weights.k_major(buffer, KMajor())
    assert all(w.is_contiguous() and w.shape == (5, 3) for w in turned)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("tokens", [1, 4])
def test_thresholds_drop_what_was_asked(sparsity: float, tokens: int) -> None:
    x = inputs_for((1, 256), tokens, torch.float32, CPU)
    kept = reference.keep_mask(x, threshold_for(x, sparsity))
    assert float((~kept).float().mean()) == pytest.approx(sparsity, abs=0.002)
    assert kept_channels(x, threshold_for(x, sparsity)) == int(kept.any(0).sum())
    with pytest.raises(ConfigError, match="share"):
        threshold_for(x, 1.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain_read_takes_odd_sizes(dtype: torch.dtype) -> None:
    for buffer in torch.zeros(3, 5, 7, dtype=dtype):
        assert plain_read(buffer) == 0


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0.0, 0.8), (0.5, 1.2)], 0.25),
        ([(0.5, 1.2), (0.0, 0.8), (0.65, 1.5)], 0.25),
        ([(0.0, 1.1), (0.5, 1.2)], 0.0),
        ([(0.0, 0.5), (0.5, 0.9)], None),
        ([(0.0, 1.2), (0.25, 0.9), (0.5, 1.1)], 0.375),  # it must hold from there on
        ([], None),
    ],
)
def test_break_even(points: list[tuple[float, float]], expected: float | None) -> None:
    assert break_even(points) == (None if expected is None else pytest.approx(expected))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="int3"):
        Grid(dtypes=("int3",))
    with pytest.raises(ConfigError, match="Known: int8, int4"):
        Grid(weight_dtypes=("int3",))
    with pytest.raises(ConfigError, match="these are: sparse_linear, dense_linear_rows"):
        Grid(operators=("sparse_gate_up",), weight_dtypes=("int8",))
    with pytest.raises(ConfigError, match="counted from 1"):
        Grid(tokens=(0,))
    with pytest.raises(UnknownNameError, match="sparse_linear"):
        Grid(operators=("sparse_line",))
    with pytest.raises(UnknownNameError, match="Known: auto"):
        bench_kernels(Grid(backends=("cuda",)), QUICK, show_progress=False)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no GPU"):
            bench_kernels(replace(Grid(), device="cuda"), QUICK, show_progress=False)
