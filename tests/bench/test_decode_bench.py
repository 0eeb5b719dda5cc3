from __future__ import annotations

import pytest
import torch
from torch import nn

from wina.bench.decode import Sweep, bench_decode, prompts_for, random_model
from wina.bench.devices import Device
from wina.bench.generation import ENGINES, decode_seconds, generate, model_bytes, peak_memory
from wina.bench.structure import structure_of
from wina.bench.timing import QUICK
from wina.config import SparsityConfig
from wina.errors import ConfigError, UnknownNameError
from wina.patch import is_patched
from wina.testing import random_tokens, tiny_model, tiny_tokenizer

CALIBRATION = random_tokens(512, seed=3)


def plan(sparsity: float, method: str = "wina") -> SparsityConfig:
    return SparsityConfig(method=method, sparsity=sparsity, calibration_tokens=512, window=128)


def test_sweep_becomes_rows(llama: nn.Module) -> None:
    sweep = Sweep(batches=(1, 2), contexts=(4, 9), new_tokens=3)
    rows = bench_decode(
        llama, [plan(0.0), plan(0.5)], sweep, texts=CALIBRATION, effort=QUICK, show_progress=False
    )
    assert not is_patched(llama)
    assert [(r["method"], r["sparsity"]) for r in rows] == (
        4 * [("dense", 0.0)] + 4 * [("wina", 0.0)] + 4 * [("wina", 0.5)]
    )
    loads = [(1, 4), (1, 9), (2, 4), (2, 9)]
    assert [(r["batch"], r["context"]) for r in rows] == 3 * loads
    for row in rows:
        assert row["tokens_per_s"] == pytest.approx(row["batch"] / row["ms_per_step"] * 1e3)
        assert 0 < row["ms_p50"] <= row["ms_p95"]
        assert row["first_token_ms"] > 0
        assert row["weights_gib"] > 0
        assert (row["speedup_vs_own_dense"] is None) == (row["method"] == "dense")
        assert row["verdict"] == "quick: no claim"
    for dense in rows[:4]:
        assert dense["byte_ideal"] == dense["speedup_vs_dense"] == 1.0
        assert dense["rounds"] == 2 * QUICK.rounds  # beside both plans
    for sparse, batch in zip(rows[8:], (1, 1, 2, 2), strict=True):
        assert 0.2 < sparse["realised"] < 0.8
        assert 1.0 < sparse["byte_ideal"] < 2.5
        assert 0 < sparse["predicted_speedup"] < float("inf")
        assert sparse["batch"] == batch
    # The union of two tokens' channels is larger than one token's.
    assert rows[10]["byte_ideal"] < rows[8]["byte_ideal"]


def test_engines_for_one_side(llama: nn.Module) -> None:
    sweep = Sweep(new_tokens=3, engines=("eager:dense", "wina:sparse"))
    dense, sparse = bench_decode(
        llama, [plan(0.5)], sweep, texts=CALIBRATION, effort=QUICK, show_progress=False,
        predict=False,
    )  # fmt: skip
    assert (dense["engine"], dense["method"]) == ("transformers generate", "dense")
    assert (sparse["engine"], sparse["method"]) == ("wina decode", "wina")
    assert sparse["speedup_vs_dense"] == sparse["speedup_vs_best_dense"] > 0
    assert sparse["predicted_speedup"] is None
    for engines, message in ((("eager:both",), "dense or sparse"), (("eager:dense",), "sparse")):
        with pytest.raises(ConfigError, match=message):
            Sweep(engines=engines)


def test_a_patched_model_is_predicted_at_the_rate_of_sparse_kernels(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sparsity 0, too: its own kernel serves it, at twice the speed of the dense product."""
    device = Device("here", 1e-6, None, "given", dense_share=0.25, sparse_share=0.5)
    monkeypatch.setattr("wina.bench.decode.measured_device", lambda *_: device)
    monkeypatch.setattr("wina.bench.decode.overhead_for", lambda *_: 0.0)
    dense, own = bench_decode(
        llama, [plan(0.0)], Sweep(new_tokens=3), texts=CALIBRATION, effort=QUICK,
        show_progress=False,
    )  # fmt: skip
    assert dense["predicted_speedup"] == 1.0
    assert 1.3 < own["predicted_speedup"] < 2.0


def test_generation_has_a_time_for_every_token(llama: nn.Module) -> None:
    for batch in (1, 3):
        prompt = random_tokens(5 * batch).view(batch, 5)
        done = generate(llama, prompt, 6)
        assert len(done.steps_s) == 5
        assert done.first_s > 0
    assert decode_seconds(llama, prompt, 3) > 0


def test_compiled_engine_leaves_the_model_alone(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled or not, the tokens and the module are the same; compiling itself is not tested."""
    calls = []

    def fake_compile(function):  # type: ignore[no-untyped-def]
        def run(*arguments, **named):  # type: ignore[no-untyped-def]
            calls.append(1)
            return function(*arguments, **named)

        return run

    monkeypatch.setattr(torch, "compile", fake_compile)
    with ENGINES["compiled"].on(llama) as run:
        assert len(run(random_tokens(5)[None], 3).steps_s) == 2
        assert "forward" not in llama.__dict__
    assert len(calls) == 3


def test_prompts() -> None:
    model = tiny_model("llama")
    text = prompts_for(model, tiny_tokenizer(), 3, 40)
    assert text.shape == (3, 40)
    assert not torch.equal(text[0], text[1])
    assert prompts_for(model, None, 2, 7).shape == (2, 7)
    assert prompts_for(model, tiny_tokenizer(), 1, 200_000).shape == (1, 200_000)


def test_random_model_has_the_named_shape() -> None:
    model = random_model("smollm2-135m", "bfloat16")
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    assert structure_of(model).weights[0].itemsize == 2
    assert model_bytes(model) == pytest.approx(2 * 134_515_008, rel=1e-3)
    with pytest.raises(ConfigError, match="int3"):
        random_model("smollm2-135m", "int3")
    with pytest.raises(UnknownNameError, match="Did you mean"):
        random_model("smollm2-135", "float32")


def test_peak_memory_sees_a_buffer_that_is_gone() -> None:
    size = 64 << 20
    working, peak = peak_memory(lambda: torch.ones(size, dtype=torch.uint8), torch.device("cpu"))
    assert working is None or working > size // 2
    assert peak >= 0


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="at least 3"):
        Sweep(new_tokens=2)
    with pytest.raises(ConfigError, match="counted from 1"):
        Sweep(batches=(0,))
    with pytest.raises(UnknownNameError, match="eager"):
        Sweep(engines=("eger",))
