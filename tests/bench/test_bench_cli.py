"""The commands of ``wina bench`` from end to end, small; times are never asserted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from wina.bench.cli_options import HERE_ONLY, without_options
from wina.cli import app
from wina.errors import WinaError
from wina.testing import tiny_model, tiny_tokenizer


def invoke(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["bench", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def document(*arguments: str) -> dict[str, Any]:
    """The last line of stdout."""
    run: dict[str, Any] = json.loads(invoke(*arguments).splitlines()[-1])
    return run


def is_png(path: Path) -> bool:
    return path.read_bytes().startswith(b"\x89PNG")


def test_roofline(tmp_path: Path) -> None:
    picture, saved = tmp_path / "r.png", tmp_path / "r.json"
    out = invoke(
        "roofline", "llama-3-70b", "--device", "h200", "--context", "4096", "--rotation",
        "--picture", str(picture), "--output", str(saved),
    )  # fmt: skip
    assert "rotation" in out
    run = json.loads(out.splitlines()[-1])
    assert run == json.loads(saved.read_text())
    assert [row["sparsity"] for row in run["rows"]] == [0.0, 0.25, 0.4, 0.5, 0.65]
    assert run["rows"][0]["speedup"] == 1.0
    assert "rotation" not in run["rows"][0]["bytes"]
    assert is_png(picture)
    again = document(
        "roofline", "llama-3-70b", "--context", "4096", "--rotation", "--compare", str(saved)
    )
    assert {row["verdict"] for row in again["comparisons"][0]["rows"]} == {"slower"}  # an H100


def test_roofline_fits_a_measured_dense_speed() -> None:
    run = document(
        "roofline", "mixtral-8x7b", "--bandwidth", "100", "--dense-tokens-per-s", "2",
        "--sparsities", "0.5",
    )  # fmt: skip
    assert run["rows"][0]["tokens_per_s"] == pytest.approx(2)
    assert run["arguments"]["overhead_ms"] > 0
    with pytest.raises(WinaError, match="unknown dtype"):
        invoke("roofline", "mixtral-8x7b", "--dtype", "int3")


def test_plot_joins_rooflines(tmp_path: Path) -> None:
    files = []
    for name in ("llama-3-8b", "qwen3-30b-a3b"):
        files.append(str(tmp_path / f"{name}.json"))
        invoke("roofline", name, "--output", files[-1])
    picture = tmp_path / "new" / "p.png"
    assert str(picture) in invoke("plot", *files, "--output", str(picture)).replace("\n", "")
    assert is_png(picture)


def test_kernels(tmp_path: Path) -> None:
    saved, picture = tmp_path / "k.json", tmp_path / "k.png"
    small = [
        "kernels",
        "--shapes",
        "64x96",
        "--dtypes",
        "float32",
        "--quick",
        "--sparsities",
        "0,0.5",
    ]
    out = invoke(*small, "--output", str(saved), "--picture", str(picture))
    assert "vs torch" in out
    assert is_png(picture)
    run = document(*small, "--compare", str(saved))
    assert run["arguments"]["quick"] is True
    assert [row["sparsity"] for row in run["comparisons"][0]["rows"]] == [0.0, 0.5]


def test_kernels_at_the_shapes_of_a_model() -> None:
    run = document(
        "kernels", "--model-shape", "smollm2-135m", "--dtypes", "float32", "--sparsities", "0.5",
        "--operators", "sparse_gate_up", "--quick",
    )  # fmt: skip
    assert [row["shape"] for row in run["rows"]] == [
        [576, 576], [192, 576], [1536, 576], [576, 1536],
    ]  # fmt: skip


def test_options_of_this_run_are_not_passed_on() -> None:
    given = ["bench", "kernels", "--quick", "--output", "a", "--compare=b", "--rounds", "3"]
    assert without_options(given, HERE_ONLY) == ["bench", "kernels", "--quick", "--rounds", "3"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def test_decode(folder: str, tmp_path: Path) -> None:
    saved, picture = tmp_path / "d.json", tmp_path / "d.png"
    small = ["decode", "--model", folder, "--new-tokens", "4", "--quick", "--sparsities", "0.3,0.6"]
    out = invoke(*small, "--output", str(saved), "--picture", str(picture))
    assert "vs best" in out
    assert is_png(picture)
    run = document(*small, "--methods", "wina", "--compare", str(saved))
    compared = run["comparisons"][0]["rows"]
    assert sorted({(r["method"], r["sparsity"]) for r in compared}) == [
        ("dense", 0.0), ("wina", 0.3), ("wina", 0.6),
    ]  # fmt: skip
    assert len(compared) == 2 * 3  # transformers' loop and ours
    with pytest.raises(WinaError, match="whole numbers"):
        invoke(*small, "--batch", "1.5")
    other = tmp_path / "r.json"
    invoke("roofline", "smollm2-135m", "--output", str(other))
    with pytest.raises(WinaError, match="different benches"):
        invoke("plot", str(saved), str(other))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_missing_gpu_is_named() -> None:
    with pytest.raises(WinaError, match="torch sees no GPU"):
        invoke("decode", "--shape", "smollm2-135m", "--device", "cuda", "--quick")
