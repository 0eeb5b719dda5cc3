"""The card's bench where there is none: it refuses, and its logic runs on the CPU operators."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from wina.bench import (
    gpu,
    gpu_check,
    gpu_decode,
    gpu_operators,
    gpu_quantized,
    teal_style,
)
from wina.bench.budget import Budget
from wina.bench.gpu_operators import Call
from wina.errors import WinaError
from wina.kernels import cpu, ops, quantized, triton
from wina.testing import tiny_model

CARD = torch.cuda.is_available()
CPU = torch.device("cpu")


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
    calls = [c for c in gpu_check._odd_calls() if c[1] * c[2] < 100_000]
    monkeypatch.setattr(gpu_check, "_odd_calls", lambda: iter(calls))
    monkeypatch.setattr(gpu_check, "_check_graph", lambda _: None)


@pytest.mark.usefixtures("few_calls")
def test_right_operators_pass_the_gate() -> None:
    assert gpu_check.check_kernels(CPU) > 200


@pytest.mark.usefixtures("few_calls")
@pytest.mark.parametrize("name", ["sparse_linear", "sparse_gate_up", *gpu_operators.SCALES])
def test_a_wrong_operator_stops_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(ops, name)
    monkeypatch.setattr(ops, name, lambda *a: right(*a) * 1.02)
    with pytest.raises(WinaError, match=rf"{name}.* of .* not timing anything"):
        gpu_check.check_kernels(CPU)


@pytest.mark.usefixtures("few_calls")
def test_swapped_products_of_a_group_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    right = ops.sparse_group
    monkeypatch.setattr(ops, "sparse_group", lambda *a: right(*a)[::-1])
    with pytest.raises(WinaError, match=r"sparse_group .* of .* not timing anything"):
        gpu_check.check_kernels(CPU)


@pytest.fixture
def few_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = [c for c in gpu_quantized._odd_calls() if c[1] * c[2] < 100_000]
    monkeypatch.setattr(gpu_quantized, "_odd_calls", lambda: iter(calls))


@pytest.mark.usefixtures("few_quantized")
def test_right_integer_products_pass_the_gate() -> None:
    assert gpu_quantized.check_quantized_kernels(CPU) > 80


@pytest.mark.usefixtures("few_quantized")
@pytest.mark.parametrize("name", ["linear_operator", "gate_up_operator"])
def test_a_wrong_integer_product_stops_the_run(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    right = getattr(quantized, name)
    monkeypatch.setattr(quantized, name, lambda *a: right(*a) * 1.05)
    with pytest.raises(WinaError, match=r"_quantized of .* not timing anything"):
        gpu_quantized.check_quantized_kernels(CPU)


def test_integer_weights_become_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(call, copies) -> float:
        assert call(copies[0]) is not None
        return 1e-6

    monkeypatch.setattr(gpu_quantized, "seconds_in_graph", clock)
    monkeypatch.setattr(gpu_quantized, "cold_copies", lambda weights: [list(weights)])
    shapes = (("o", 256, 384), ("gate_up", 256, 384))
    rows = gpu_quantized.bench_quantized(CPU, 1e12, Budget(3600.0), shapes)
    assert [(r["projection"], r["weights"], r["sparsity"]) for r in rows] == [
        (p, w, s) for p in ("o", "gate_up") for w in ("int8", "int4") for s in (0.0, 0.5, 0.65)
    ]
    # Three groups of 128 columns: a line and a scale each, the scales padded to an even number.
    assert rows[0]["kept_bytes"] == 256 * (384 + 8)
    assert rows[4]["kept_bytes"] == pytest.approx(128 * (192 + 8), rel=0.02)
    assert rows[6]["kept_bytes"] == 2 * rows[0]["kept_bytes"]


@pytest.fixture
def stopped_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """All but the clock: a stand-in runs each call once and says one microsecond."""

    def clock(call, copies) -> float:
        call(copies[0])
        return 1e-6

    def teal(x: Tensor, weight: Tensor, cut: float, tile: object) -> Tensor:
        return x @ weight

    monkeypatch.setattr(gpu_operators, "seconds_in_graph", clock)
    monkeypatch.setattr(gpu_operators, "cold_copies", lambda weights: [weights])
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "no card")
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(teal_style, "teal_style", teal)


TINY = (
    Call("tiny", "o", "sparse_linear", 32, (64,)),
    Call("tiny", "q, k, v", "sparse_group", 32, (64, 16, 16)),
    Call("tiny", "gate_up", "sparse_gate_up", 48, (64, 64)),
)


@pytest.mark.usefixtures("stopped_clock")
def test_rows_and_tables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu_operators, "CHANNELS", (64,))
    budget = Budget(600)
    with torch.no_grad():
        rows = gpu_operators.bench_operators(CPU, 1e12, budget, TINY, show_progress=False)
        scales = gpu_operators.bench_scales(CPU, budget)
    assert len(rows) == 3 * len(gpu_operators.TOKENS) * len(gpu_operators.SPARSITIES)
    assert [row["kernel"] for row in scales] == list(gpu_operators.SCALES)
    half = {r["kernel"]: r for r in rows if (r["tokens"], r["sparsity"]) == (1, 0.5)}
    assert half["sparse_linear"]["kept_bytes"] == 16 * 64 * 2
    assert half["sparse_linear"]["speedup_vs_teal_style"] == 1
    assert half["sparse_group"]["shape"] == [96, 32]
    assert half["sparse_group"]["speedup_vs_compiled"] == 1
    assert half["sparse_group"]["speedup_vs_teal_style"] is None
    gpu.print_gpu([*rows, *scales], 3, budget.left_out)
    said = capsys.readouterr().out
    assert "left out" not in said
    assert json.loads(said.splitlines()[-1])["compared"] == 3


@pytest.mark.usefixtures("stopped_clock")
def test_what_there_is_no_time_for_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    budget = Budget(0)
    assert gpu_operators.bench_operators(CPU, 1e12, budget, TINY[:1], show_progress=False) == []
    assert not gpu_decode.fits(budget, "llama-3-8b")
    gpu.print_gpu([], 3, budget.left_out)
    said = capsys.readouterr().out
    assert "tiny o, 16 tokens" in said
    assert json.loads(said.splitlines()[-1])["left_out"][-1] == "llama-3-8b decode"


def test_decode_steps_of_a_tiny_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole of it but the card: a static cache, a compiled step, thresholds put in place."""
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f, **k: compiled(f, backend="aot_eager", **k))
    model = tiny_model("llama", num_hidden_layers=1)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trace = tmp_path / "trace.json"
    rows = gpu_decode.bench_steps(model, "tiny", "no card", 1e10, Budget(600), trace=trace)
    assert [row["sparsity"] for row in rows] == [0.0, *gpu_decode.SPARSITIES]
    realised = {row["sparsity"]: row["realised"] for row in rows}
    assert realised[0.4] < realised[0.5] < realised[0.65]
    assert rows[0]["byte_ideal"] == 1.0 == rows[0]["speedup_vs_compiled_dense"]
    assert rows[3]["byte_ideal"] > rows[1]["byte_ideal"] > rows[2]["byte_ideal"] > 1.0
    assert json.loads(trace.read_text())["traceEvents"]
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])
    gpu.print_gpu(rows, 0, [])
    assert len(json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]) == 4


def test_a_step_decodes_what_generate_does() -> None:
    model = tiny_model("llama")
    step = gpu_decode.DecodeStep(model, context=16, steps=8, compiled=False)
    generator = torch.Generator().manual_seed(1)
    prompt = torch.randint(0, model.config.vocab_size, (1, 16), generator=generator)
    tokens = []
    for _ in range(2):  # a second time after going back
        step.rewind()
        step.token.copy_(prompt[:, -1:])
        found = []
        for _ in range(8):
            step.run_once()
            found.append(int(step.token))
        tokens.append(found)
    twice = torch.cat([prompt, prompt[:, -1:]], dim=1)  # the prompt's last token comes again
    want = model.generate(
        twice, attention_mask=torch.ones_like(twice), max_new_tokens=8, min_new_tokens=8,
        do_sample=False,
    )[0, 17:]  # fmt: skip
    assert tokens[0] == tokens[1] == want.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not CARD, reason="no CUDA card")
def test_every_kernel_on_the_card() -> None:
    assert triton.load() is None
    assert gpu_check.check_kernels(torch.device("cuda", 0)) > 600
    assert gpu_quantized.check_quantized_kernels(torch.device("cuda", 0)) > 100
