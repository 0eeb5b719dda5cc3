"""The kernels behind ``torch.ops.wina``: registered for CPU tensors, where they are interpreted.

All that a call on a card goes through but the card: checks, configuration, the launch, the views of
its results, and the definition for calls without a kernel.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext

import pytest
import torch
from operator_cases import assert_equal_up_to_rounding, case, exact
from torch import Tensor

from wina.kernels import ops, reference
from wina.kernels.triton import group, operators, selection, sparse_linear
from wina.kernels.triton.config import Card


@pytest.fixture(autouse=True, scope="module")
def _registered() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(operators, "card_of", lambda _: Card("interpreter", 2))
        patch.setattr(torch.cuda, "device", lambda _: nullcontext())
        operators.register("CPU")
        yield


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The launches that calls lead to."""
    seen: list[str] = []
    for module, name in (
        (sparse_linear, "launch"), (group, "launch"), (selection, "launch_topk"),
        (selection, "launch_mean"), (selection, "launch_probe"), (selection, "launch_tracked"),
    ):  # fmt: skip
        monkeypatch.setattr(module, name, noting(seen, getattr(module, name)))
    return seen


def noting(seen: list[str], right: Callable[..., object]) -> Callable[..., object]:
    def counted(*args: object) -> object:
        seen.append(f"{right.__module__.rpartition('.')[2]}.{right.__name__}")
        return right(*args)

    return counted


def parts(T: int, K: int, columns: tuple[int, ...]) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    x = case(T, K, 1, torch.float32, 0.5)[0]
    drawn = [case(T, K, N, torch.float32, 0.5)[1:] for N in columns]
    return x, [w for w, _ in drawn], [t for _, t in drawn]


def test_sparse_linear(launches: list[str]) -> None:
    x, weight, threshold = case(4, 96, 40, torch.float32, 0.5)
    bias, scale, residual = torch.randn(40), torch.rand(4) + 0.5, torch.randn(4, 40)
    y = ops.sparse_linear(
        x.view(2, 2, 96), weight, threshold, bias, scale.view(2, 2), residual.view(2, 2, 40)
    )
    want = exact(x, weight, threshold, bias, scale, residual)
    assert_equal_up_to_rounding(y.view(4, 40), want, x, weight)
    assert launches == ["sparse_linear.launch"]


@pytest.mark.parametrize("columns", [(40, 8, 8), (24, 16), (8,), (8, 9, 10, 11)], ids=str)
def test_sparse_group(columns: tuple[int, ...], launches: list[str]) -> None:
    x, weights, thresholds = parts(2, 64, columns)
    biases = [torch.randn(N) if i else None for i, N in enumerate(columns)]
    scales = [None if i else torch.rand(2) + 0.5 for i, _ in enumerate(columns)]
    ys = ops.sparse_group(x, weights, thresholds, biases, scales)
    for i, y in enumerate(ys):
        want = exact(x, weights[i], thresholds[i], biases[i], scales[i])
        assert_equal_up_to_rounding(y, want, x, weights[i])
    assert launches == ["group.launch"] * -(-len(columns) // group.SLOTS)


def test_scales(launches: list[str]) -> None:
    x = torch.randn(2, 3, 70)
    threshold = 1 / torch.rand(70)
    want = reference.topk_scale(x, threshold, 30)
    assert torch.equal(ops.topk_scale(x, threshold, 30), want)
    torch.testing.assert_close(ops.mean_scale(x), reference.mean_scale(x))
    probe = torch.randn(x.shape[-1] + 1) / 8
    torch.testing.assert_close(ops.probe_scale(x, probe, 0.5), reference.probe_scale(x, probe, 0.5))
    states = [torch.zeros(6), torch.zeros(6)]
    got = ops.tracked_scale(x.view(6, 1, 70), threshold, states[0], 0.5, 0.1)
    want = reference.tracked_scale(x.view(6, 1, 70), threshold, states[1], 0.5, 0.1)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*states)
    assert launches == [
        "selection.launch_topk", "selection.launch_mean", "selection.launch_probe",
        "selection.launch_tracked",
    ]  # fmt: skip


def test_calls_without_a_kernel_get_the_definition(
    launches: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    x, weight, threshold = case(17, 32, 24, torch.float32, 0.5)
    want = exact(x, weight, threshold)
    assert_equal_up_to_rounding(ops.sparse_linear(x, weight, threshold), want, x, weight)
    row_major = weight.t().contiguous().t()
    y = ops.sparse_group(x[:2], [row_major], [threshold], [None], [None])[0]
    assert_equal_up_to_rounding(y, want[:2], x[:2], weight)
    assert ops.sparse_linear(x[:0], weight, threshold).shape == (0, 24)
    assert ops.sparse_linear(x[:2], weight[:, :0], threshold).shape == (2, 0)
    monkeypatch.setattr(selection, "MAX_CHANNELS", 16)
    assert ops.mean_scale(x).shape == (17,)
    assert ops.topk_scale(x, threshold, 3).shape == (17,)
    assert ops.probe_scale(x, torch.zeros(33), 0.5).tolist() == [1.0] * 17
    assert ops.tracked_scale(x, threshold, torch.zeros(1), 0.5, 0.1).shape == (17,)
    assert launches == []


@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(extras: bool, launches: list[str]) -> None:
    x, weights, thresholds = parts(2, 32, (24, 8))
    bias, scale = (torch.randn(24), torch.rand(2)) if extras else (None, None)
    residual = torch.randn(2, 24) if extras else None
    linear = (x, weights[0], thresholds[0], bias, scale)
    torch.library.opcheck(ops.sparse_linear, (*linear, residual))
    torch.library.opcheck(
        ops.sparse_group, (x, weights, thresholds, [bias, None], [None, scale])
    )  # fmt: skip
    torch.library.opcheck(ops.topk_scale, (x, thresholds[0].abs(), 7))
    torch.library.opcheck(ops.mean_scale, (x,))
    torch.library.opcheck(ops.probe_scale, (x, torch.randn(33), 0.5))
    tracked = (x[:, None], thresholds[0], torch.zeros(2), 0.5, 0.1)
    torch.library.opcheck(ops.tracked_scale, tracked)
    torch.library.opcheck(
        ops.sparse_gate_up,
        (x, weights[0], weights[0], thresholds[0], thresholds[0], "silu", bias, bias, scale),
    )
    assert set(launches) == {
        "sparse_linear.launch", "group.launch", "selection.launch_topk", "selection.launch_mean",
        "selection.launch_probe", "selection.launch_tracked",
    }  # fmt: skip


def test_compiled_with_the_fake_implementations() -> None:
    x, weights, thresholds = parts(1, 32, (24, 8))

    def step(x: Tensor) -> Tensor:
        scale = ops.topk_scale(x, thresholds[0].abs(), 7)
        q, k = ops.sparse_group(x, weights, thresholds, [None, None], [scale, None])
        return ops.sparse_linear(q, weights[0].t().contiguous(), q.new_zeros(24), None, None, x) @ (
            x.t() @ k
        )

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), step(x))
