"""The card's bench where there is none: it refuses, and its logic runs on the CPU operators."""

import json
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from wina.bench import gpu, teal_style
from wina.errors import WinaError
from wina.kernels import cpu, ops, triton

CARD = torch.cuda.is_available()


@pytest.mark.skipif(CARD, reason="there is a card")
def test_without_a_card_nothing_is_measured() -> None:
    answer = subprocess.run(
        [sys.executable, "-m", "wina.bench.gpu"], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 1
    assert answer.stdout == ""
    assert "needs a CUDA card and this machine has none" in answer.stderr


@pytest.fixture
def few_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cpu.load() is None
    calls = [c for c in gpu._odd_calls() if c[1] * c[2] < 100_000]
    monkeypatch.setattr(gpu, "_odd_calls", lambda: iter(calls))
    monkeypatch.setattr(gpu, "_check_graph", lambda _: None)


@pytest.mark.usefixtures("few_calls")
def test_right_operators_pass_the_gate() -> None:
    assert gpu.check_kernels(torch.device("cpu")) > 100


@pytest.mark.usefixtures("few_calls")
def test_a_wrong_operator_stops_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_linear
    monkeypatch.setattr(ops, "sparse_linear", lambda *a: right(*a) * 1.02)
    with pytest.raises(WinaError, match=r"sparse_linear of .* not timing anything"):
        gpu.check_kernels(torch.device("cpu"))


def test_rows_and_table(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All but the clock: a stand-in runs each call once and says one microsecond."""

    def clock(call, copies) -> float:
        call(copies[0])
        return 1e-6

    def teal(x: Tensor, weight: Tensor, cut: float, tile: object) -> Tensor:
        return x @ weight

    monkeypatch.setattr(gpu, "seconds_in_graph", clock)
    monkeypatch.setattr(gpu, "cold_copies", lambda weights: [weights])
    monkeypatch.setattr(gpu, "copy_bandwidth", lambda _: 1e12)
    monkeypatch.setattr(gpu, "CALLS", (("tiny", "o", 64, 32), ("tiny", "gate_up", 64, 48)))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "no card")
    monkeypatch.setattr(teal_style, "teal_style", teal)
    with torch.no_grad():
        rows = gpu.bench_operators(torch.device("cpu"), show_progress=False)
    assert len(rows) == 2 * len(gpu.TOKENS) * len(gpu.SPARSITIES)
    half = next(
        r for r in rows if (r["kernel"], r["tokens"], r["sparsity"]) == ("sparse_linear", 1, 0.5)
    )
    assert half["kept_bytes"] == 32 * 32 * 2
    assert half["speedup_vs_teal_style"] == 1
    gpu.print_gpu(rows, 3)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["compared"] == 3


@pytest.mark.gpu
@pytest.mark.skipif(not CARD, reason="no CUDA card")
def test_every_kernel_on_the_card() -> None:
    assert triton.load() is None
    assert gpu.check_kernels(torch.device("cuda", 0)) > 300
