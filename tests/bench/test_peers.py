"""Other engines beside ours: files, protocol, and the contest with engines made up here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import wina
from wina.bench.peers import measure
from wina.bench.peers.engines.pytorch import Engine
from wina.bench.peers.measure import Contest, bench_peers
from wina.bench.peers.process import EngineProcess, PeerError
from wina.bench.peers.registry import OURS, PEERS, WIDTHS, Peer
from wina.bench.peers.to_gguf import WEIGHTS, write_gguf
from wina.bench.peers.workshop import Workshop
from wina.bench.timing import QUICK
from wina.cli import app
from wina.config import SparsityConfig
from wina.errors import ConfigError, UnknownNameError, UnsupportedModelError, WinaError
from wina.testing import tiny_model

FAKE = """
import os, sys, time

class Engine:
    version = "made up 1"

    def __init__(self, threads=1, known=(), seconds=0.5, fault=""):
        print("noise on stdout")
        os.system("echo noise of a child on stdout")
        self.known = {tuple(prompt): token for prompt, token in known}
        self.seconds, self.fault = seconds, fault
        if fault == "load":
            raise ValueError("no such file")

    def generate(self, prompt, new_tokens):
        print("more noise")
        if self.fault == "raise":
            raise RuntimeError("out of memory")
        if self.fault == "die":
            print("a last word", file=sys.stderr, flush=True)
            os._exit(7)
        if self.fault == "hang":
            time.sleep(60)
        return [self.known.get(tuple(prompt), -1)] * new_tokens, self.seconds
"""


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    path = tmp_path / "json.py"  # named like a module that the worker imports
    path.write_text(FAKE)
    return path


@pytest.fixture
def shop(tmp_path: Path) -> Workshop:
    folder = tmp_path / "llama"
    model: Any = tiny_model("llama")
    model.save_pretrained(folder)
    return Workshop(folder, tmp_path / "made", show_progress=False)


def made_up(fake: Path, title: str, seconds: float, knows: bool = True, **more: Any) -> Peer:
    def prepare(shop: Workshop, form: str) -> dict[str, Any]:
        pairs = list(zip(shop.prompts(5), shop.reference(5), strict=True)) if knows else []
        return {"known": pairs, "seconds": seconds, **more}

    return Peer(title, str(fake.with_suffix("")), {"f32": "f32"}, prepare=prepare)


# --- the protocol ---------------------------------------------------------------------------------


def test_an_engine_answers_whatever_it_prints(fake: Path) -> None:
    options = {"known": [[[1, 2], 9]], "seconds": 0.25}
    with EngineProcess(sys.executable, fake, options) as process:
        assert process.version == "made up 1"
        answer = process.generate([1, 2], 3)
        assert answer.tokens == (9, 9, 9)
        assert answer.seconds_per_token == 0.25
        assert process.generate([5], 1).tokens == (-1,)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("load", "ValueError: no such file"),
        ("raise", "RuntimeError: out of memory"),
        ("die", "(?s)ended with 7.*a last word"),
        ("hang", "limit: 1 s"),
    ],
)
def test_what_goes_wrong_is_told(fake: Path, fault: str, message: str) -> None:
    with EngineProcess(sys.executable, fake, {"fault": fault}) as process:
        if fault == "hang":
            assert process.version
            process.limit_s = 1.0
        with pytest.raises(PeerError, match=message):
            process.generate([1], 1)


def test_a_python_that_does_not_exist(fake: Path) -> None:
    with pytest.raises(PeerError, match="cannot start /no/python"):
        EngineProcess("/no/python", fake, {})


# --- the registry ---------------------------------------------------------------------------------


def test_every_peer_has_its_engine_and_known_widths() -> None:
    from wina.bench.peers.process import ENGINES

    for peer in (OURS, *(PEERS[name] for name in PEERS)):
        assert (ENGINES / f"{peer.engine}.py").is_file()
        assert set(peer.forms) <= set(WIDTHS)
        assert peer.own_python or (peer.modules and peer.install.startswith("pip install "))
    for name in ("llama.cpp", "openvino"):
        assert set(PEERS[name].forms.values()) <= set(WEIGHTS)


def test_a_missing_peer_is_told_with_its_install_command() -> None:
    absent = Peer("x", "x", {}, ("json", "no_such_engine"), "pip install no-such-engine")
    reason = absent.missing(sys.executable)
    assert reason == f"no no_such_engine in {sys.executable}: pip install no-such-engine"
    assert Peer("x", "x", {}, ("json",)).missing(sys.executable) is None
    with pytest.raises(WinaError, match="--peer-python /no/python does not run"):
        absent.missing("/no/python")


def test_unknown_names_and_wrong_numbers() -> None:
    with pytest.raises(UnknownNameError, match=r"Did you mean 'llama\.cpp'"):
        Contest(peers=("llama-cpp",))
    with pytest.raises(UnknownNameError, match="Known: f32, bf16, q8_0, q4_0"):
        Contest(widths=("int3",))
    with pytest.raises(ConfigError, match="new_tokens"):
        Contest(new_tokens=2)


# --- GGUF -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_gguf_reads_back_as_the_same_model(tmp_path: Path, tied: bool) -> None:
    pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")
    from transformers import AutoModelForCausalLM

    model: Any = tiny_model("llama", tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "f32", show_progress=False)
    back: Any = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    )
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        torch.testing.assert_close(
            back(input_ids=tokens).logits, model(input_ids=tokens).logits, rtol=1e-5, atol=1e-5
        )


@pytest.mark.parametrize(("weights", "error"), [("bf16", 2**-8), ("f16", 2**-10), ("q8_0", 2**-6)])
def test_gguf_rounds_matrices_and_keeps_vectors(tmp_path: Path, weights: str, error: float) -> None:
    gguf = pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")
    model: Any = tiny_model("llama")
    model.save_pretrained(tmp_path)
    path = tmp_path / "model.gguf"
    write_gguf(tmp_path, path, weights, show_progress=False)
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    state = model.state_dict()
    for name, ours in {
        "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
        "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
        "output_norm.weight": "model.norm.weight",
    }.items():
        tensor, weight = tensors[name], state[ours]
        read = torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy())
        read = read.view(weight.shape)
        if weight.dim() == 1:
            assert torch.equal(read, weight)
        else:
            assert 0 < (read - weight).abs().max() <= error * weight.abs().max()


def test_only_plain_llamas_with_fitting_rows_are_written(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="writing GGUF needs the package gguf")
    for model_type, settings, message in (
        ("qwen2", {}, "model_type is 'qwen2'"),
        ("llama", {"mlp_bias": True}, "mlp_bias is True"),
        ("llama", {"intermediate_size": 70}, "rows of 70 do not fit Q8_0"),
    ):
        model: Any = tiny_model(model_type, **settings)
        model.save_pretrained(tmp_path)
        with pytest.raises(UnsupportedModelError, match=message):
            write_gguf(tmp_path, tmp_path / "model.gguf", "q8_0", show_progress=False)


# --- the contest ----------------------------------------------------------------------------------


def test_files_are_made_once_and_anew_for_another_model(shop: Workshop, tmp_path: Path) -> None:
    config = SparsityConfig(calibration_tokens=64, window=32)
    plan = shop.plan(config)
    stamp = (plan / "plan.json").stat().st_mtime_ns
    assert shop.plan(config) == plan
    assert (plan / "plan.json").stat().st_mtime_ns == stamp
    assert shop.plan(SparsityConfig(sparsity=0.4, calibration_tokens=64, window=32)) != plan
    assert not list(shop.folder.glob(".making-*"))
    other: Any = tiny_model("llama", seed=1)
    other.save_pretrained(shop.source)
    assert Workshop(shop.source, tmp_path / "made").folder != shop.folder


def test_our_engine_generates_dense_and_sparse(shop: Workshop) -> None:
    plan = shop.plan(SparsityConfig(calibration_tokens=64, window=32))
    threads = torch.get_num_threads()
    engine = Engine(str(shop.source), threads, "float32")
    prompt, expected = shop.prompts(5)[0], shop.reference(5)[0]
    tokens, seconds = engine.generate(prompt, 4)
    assert len(tokens) == 4
    assert tokens[0] == expected
    assert seconds > 0
    sparse = Engine(str(shop.source), threads, "float32", str(plan))
    assert len(wina.inspect(sparse._model).rows) > 0
    assert len(sparse.generate(prompt, 4)[0]) == 4


@pytest.fixture
def contest(fake: Path, monkeypatch: pytest.MonkeyPatch) -> Contest:
    peers = {
        "quick": made_up(fake, "quick", 0.1),
        "slow": made_up(fake, "slow", 0.4),
        "liar": made_up(fake, "liar", 0.01, knows=False),
        "absent": Peer("absent", "x", {"f32": "f32"}, ("no_such_engine",), "pip install it"),
        "other width": Peer("other width", "x", {"bf16": "bf16"}, ("json",)),
    }
    for name, peer in peers.items():
        monkeypatch.setitem(PEERS._entries, name, peer)
    monkeypatch.setattr(measure, "OURS", made_up(fake, "wina", 0.05))
    monkeypatch.setattr(measure, "own_options", lambda shop, *_: measure.OURS.prepare(shop, "f32"))
    return Contest(tuple(peers), ("f32",), context=5, new_tokens=4, threads=1)


def test_the_contest(shop: Workshop, contest: Contest) -> None:
    outcome = bench_peers(shop, contest, effort=QUICK, show_progress=False)
    rows = {row["engine"]: row for row in outcome.rows}
    assert list(rows) == ["quick", "slow", "wina"]
    assert rows["quick"]["tokens_per_s"] == pytest.approx(10)
    assert rows["wina"]["sparsity"] == 0.5
    assert rows["wina"]["agreement"] == 1
    assert rows["wina"]["speedup_vs_peers"] == pytest.approx({"quick": 2, "slow": 8})
    assert rows["wina"]["speedup_vs_best_peer"] == pytest.approx(2)
    assert rows["slow"]["speedup_vs_best_peer"] == pytest.approx(0.25)
    assert rows["slow"]["method"] == "dense"
    assert [m["engine"] for m in outcome.missing] == ["absent"]
    assert "pip install it" in outcome.missing[0]["reason"]
    assert [w["engine"] for w in outcome.wrong] == ["liar"]


def test_without_any_peer_ours_is_timed_all_the_same(shop: Workshop, contest: Contest) -> None:
    alone = Contest(("absent",), ("f32",), context=5, new_tokens=4, threads=1)
    outcome = bench_peers(shop, alone, effort=QUICK, show_progress=False)
    assert [row["engine"] for row in outcome.rows] == ["wina"]
    assert outcome.rows[0]["speedup_vs_best_peer"] is None


def test_the_command(
    shop: Workshop, contest: Contest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("WINA_CACHE_DIR", str(tmp_path / "cache"))
    arguments = [
        "bench", "peers", "--model", str(shop.source), "--peers", "quick,slow,absent",
        "--weight-dtypes", "f32", "--new-tokens", "4", "--context", "5", "--quick",
    ]  # fmt: skip
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    run = json.loads(result.stdout.splitlines()[-1])
    assert run["bench"] == "peers"
    assert [row["engine"] for row in run["rows"]] == ["quick", "slow", "wina"]
    assert any("absent is missing" in warning for warning in run["warnings"])
    assert run["missing"][0]["engine"] == "absent"
