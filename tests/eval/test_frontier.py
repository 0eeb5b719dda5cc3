"""Ablation, frontier and recommendation: tables over cells, on a tiny model."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import config
from torch import nn
from typer.testing import CliRunner

from wina.bench.structure import structure_of
from wina.cli import app
from wina.config import HEADS
from wina.decoding.head import rounded_head
from wina.errors import ConfigError, WinaError
from wina.eval import recommend
from wina.eval.ablation import Levels, effects, levels_of, rows_of_ablation
from wina.eval.costs import TokenCosts
from wina.eval.frontier import frontier_columns, rows_of_frontier
from wina.eval.recommend import Adviser, Expectation
from wina.kernels.quantization import WEIGHT_DTYPES
from wina.patch import is_patched
from wina.rounding import Nearest
from wina.testing import tiny_model, tiny_tokenizer

SETTINGS = "calibration_tokens=512,window=128"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    model: Any = tiny_model("llama")
    model.save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return path


def run(*arguments: str) -> dict[str, Any]:
    answer = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert answer.exit_code == 0, answer.output
    found: dict[str, Any] = json.loads(answer.stdout.strip().splitlines()[-1])
    return found


def cell(method: str, sparsity: float, nats: float, **more: Any) -> dict[str, Any]:
    return {
        "method": method, "sparsity": sparsity, "task": "perplexity:a", "extra_bytes": 0,
        "metrics": {"nats": {"value": nats}},
        "realised": {"overall": sparsity, "projections": {"p": sparsity}} if sparsity else None,
        "identity": {},
        **more,
    }  # fmt: skip


def test_ablation_command(folder: Path, tmp_path: Path) -> None:
    arguments = [
        "eval", "ablation", "-m", str(folder), "-o", str(tmp_path), "--sparsities", "0.3,0.5",
        "--criteria", "magnitude,l2-norm", "--allocations", "uniform,fisher:tokens=128",
        "--selectors", "threshold,topk", "--tokens", "128", "--window", "64", "--set", SETTINGS,
    ]  # fmt: skip
    found = run(*arguments)
    assert len(found["rows"]) == 2 * 2 * 2 * 2 * 2
    assert len(list((tmp_path / "cells").iterdir())) == 33
    # One measurement for each criterion and rotation.
    assert len(list((tmp_path / "measurements").iterdir())) == 4
    rotated = [row for row in found["rows"] if row["rotation"] == "orthogonal"]
    weights = sum(p.weights for p in TokenCosts(tiny_model("llama")).projections(None))
    assert all(row["extra"] == pytest.approx(2 * 2 * 64**2 / weights) for row in rotated)
    assert all(row["extra"] == 0 for row in found["rows"] if row not in rotated)
    for row in found["rows"]:
        assert row["read"] == pytest.approx(1 - row["realised"] + row["extra"])
    text = (tmp_path / "ablation.md").read_text()
    assert text.count("| l2-norm |") >= 8
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()}
    assert run(*arguments)["rows"] == found["rows"]
    assert {p: p.stat().st_mtime_ns for p in (tmp_path / "cells").iterdir()} == times


def test_effects_compare_with_all_else_equal() -> None:
    levels = Levels(("magnitude", "l2-norm"), ("none",), ("uniform", "fisher"), ("topk",))
    losses = {"magnitude": 1.0, "l2-norm": 0.5}
    cells = [cell("dense", 0.0, 2.0)]
    for label in levels.labels():
        settings = levels_of(label)
        factor = 0.1 if settings["allocation"] == "fisher" else 1.0
        cells.append(cell(label, 0.5, 2.0 + losses[settings["criterion"]] * factor))
    rows = rows_of_ablation(cells, 100.0)
    found = {effect["value"]: effect for effect in effects(rows)}
    assert found["l2-norm over magnitude"]["ratio"] == pytest.approx(0.5)
    assert found["fisher over uniform"]["ratio"] == pytest.approx(0.1)
    assert {(e["pairs"], e["better"]) for e in found.values()} == {(2, 1.0)}


def test_frontier_command(folder: Path, tmp_path: Path) -> None:
    found = run(
        "eval", "frontier", "-m", str(folder), "-o", str(tmp_path), "--sparsities", "0.5",
        "--methods", "wina,wina/head=sparse", "--tokens", "128", "--window", "64",
        "--set", SETTINGS,
    )  # fmt: skip
    rows = {
        (row["width"], row["sparsity"]): row
        for row in found["rows"]
        if row["method"] != "wina/head=sparse"
    }
    for row in found["rows"]:
        if row["method"] == "wina/head=sparse":
            assert row["bytes"] < rows[row["width"], 0.5]["bytes"]
    widths = ("loaded", "int8", "int4", "int4+int4")
    assert set(rows) == {(w, s) for w in widths for s in (0.0, 0.5)}
    for width in widths:
        assert rows[width, 0.5]["bytes"] < rows[width, 0.0]["bytes"]
    assert rows["loaded", 0.0]["nats_over_dense"] == 0.0
    assert rows["loaded", 0.0]["share"] == 1.0
    assert rows["loaded", 0.0]["bits"] == 16.0  # counted as bfloat16
    assert rows["int4+int4", 0.0]["bits"] == 2 * rows["int4", 0.0]["bits"] > 8.0
    assert {row["method"] for row in found["rows"]} == {"dense", "wina", "wina/head=sparse"}
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
    best = [row["width"] for row in found["rows"] if row["best"]]
    assert (tmp_path / "frontier.md").read_text().count("\n| **") == len(best) > 0


def test_rows_that_another_beats_in_both_are_not_best() -> None:
    costs = TokenCosts(tiny_model("llama"))
    name = costs.projections(None)[0].name

    def row(method: str, nats: float, share: float) -> dict[str, Any]:
        realised = {
            "overall": share,
            "projections": {p.name: share for p in costs.projections(None)},
        }
        return cell(method, 0.5, nats, realised=realised)

    cells = [cell("dense", 0.0, 2.0), row("teal", 2.5, 0.4), row("wina", 2.4, 0.5)]
    found = {r["method"]: r for r in rows_of_frontier(cells, costs)}
    assert [found[m]["best"] for m in ("dense", "wina", "teal")] == [True, True, False]
    assert name in cells[1]["realised"]["projections"]
    with pytest.raises(WinaError, match="loaded, int8, int4"):
        frontier_columns(["wina"], ["int3"], [0.5], {})


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3"])
def test_dense_bytes_are_those_of_the_structure(name: str) -> None:
    model = tiny_model(name)
    structure = structure_of(model)
    assert TokenCosts(model).dense.total == sum(w.read * w.itemsize for w in structure.weights)
    halved = TokenCosts(model, itemsize=2)
    assert halved.dense.total == TokenCosts(model).dense.total / 2
    half = dict.fromkeys((p.name for p in halved.projections(None)), 0.5)
    read = halved.at(half, None, extra=400.0)
    assert read.projections == halved.dense.projections / 2
    assert read.extra == 200.0  # the float32 model's, counted with two bytes
    assert read.thresholds == 4 * sum(p.in_features for p in halved.projections(None))


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("width", [None, *WEIGHT_DTYPES])
def test_rows_are_as_long_as_in_memory(width: str | None, head: str) -> None:
    model = tiny_model("llama")
    costs = TokenCosts(model)
    found = config(weight_dtype=width, head=head)
    held = 0
    for projection in costs.projections(found):
        weight: Any = model.get_submodule(projection.name).weight
        if width is None:
            held += weight.nbytes
        else:
            held += Nearest().round(weight, None, width).bytes
    read = costs.at({}, found)
    assert read.projections == held
    if head == "sparse":
        assert read.weights == costs.dense.weights + 258 * 64
        assert read.rest == costs.dense.rest - 258 * 64 * 4
    else:  # as `wina.decode` reads it
        rounded = rounded_head(model, "int8").bytes if width else 258 * 64 * 4
        assert read.rest == costs.dense.rest - 258 * 64 * 4 + rounded


def test_a_budget_gives_the_sparsity_that_meets_it() -> None:
    costs = TokenCosts(tiny_model("llama"))
    for width in (None, "int8"):
        for head in HEADS:
            found = config(weight_dtype=width, head=head)
            sparsity = costs.sparsity_for(0.45, found)
            realised = dict.fromkeys((p.name for p in costs.projections(found)), sparsity)
            assert costs.share(costs.at(realised, found)) == pytest.approx(0.45)


def adviser(model: nn.Module) -> Adviser:
    return Adviser(
        model, tiny_tokenizer(), ("wina",), tokens=256, window=64, show_progress=False
    )  # fmt: skip


def test_recommendations_keep_their_budget() -> None:
    model = tiny_model("llama")
    found = adviser(model)
    chosen = found.for_bytes(0.6)
    assert chosen.share <= 0.61
    fitting = [t for t in found.tried if t.share <= 0.61]
    assert chosen.nats_over_dense == min(t.nats_over_dense for t in fitting)
    assert {t.width for t in found.tried} == {"loaded", *WEIGHT_DTYPES}
    assert not is_patched(model)
    with pytest.raises(ConfigError, match="out of reach"):
        adviser(model).for_bytes(0.05)


def losing(
    found: Adviser, monkeypatch: pytest.MonkeyPatch, loss: Callable[[str, float], float]
) -> None:
    """Let trials lose what a function of width and sparsity says, without running the model."""

    def tried(method: str, width: str, sparsity: float) -> Expectation:
        realised = dict.fromkeys((p.name for p in found.costs.projections(None)), sparsity)
        read = found.costs.at(realised if sparsity else {}, found._config(method, width, sparsity))
        share = found.costs.share(read)
        trial = Expectation(method, width, sparsity, sparsity, share, loss(width, sparsity))
        found.tried.append(trial)
        return trial

    monkeypatch.setattr(found, "_try", tried)


def exponential(**rates: float) -> Callable[[str, float], float]:
    """exp(rate·sparsity) − 1 thousandths by width, 0 where no rate is given."""
    return lambda width, sparsity: 1e-3 * math.expm1(rates.get(width, 0.0) * sparsity)


@pytest.mark.parametrize("nats", [0.02, 0.1, 0.5])
def test_a_bound_on_the_loss_is_almost_reached_in_few_trials(
    nats: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = adviser(tiny_model("llama"))
    rates = {"loaded": 9.0, "int8": 9.0, "int4": 20.0, "int4+int4": 8.0}
    losing(found, monkeypatch, exponential(**rates))
    chosen = found.for_loss(nats)
    assert chosen.nats_over_dense <= nats
    assert chosen.nats_over_dense >= 0.8 * nats
    assert chosen.share == min(t.share for t in found.tried if t.nats_over_dense <= nats)
    # Where 16 bits begin to read less than 8 or 4 bits do already, too much is lost.
    assert len([t for t in found.tried if t.width == "loaded"]) <= 2
    assert len(found.tried) <= 20


def test_a_width_that_just_misses_the_bytes_is_tried_sparse() -> None:
    found = adviser(tiny_model("llama"))
    dense = found.costs.at({}, found._config("dense", "int8", 0.0))
    found.for_bytes(found.costs.share(dense) - 0.005)
    assert [t.sparsity for t in found.tried if t.width == "int8"] == [recommend.LEAST]


def test_what_a_rotation_reads_is_paid_for_by_channels() -> None:
    found = Adviser(
        tiny_model("llama"), tiny_tokenizer(), ("wina/rotation=orthogonal",), ("loaded",),
        tokens=256, window=64, show_progress=False,
    )  # fmt: skip
    chosen = found.for_bytes(0.8)
    assert len(found.tried) == 2  # the first trial read too much
    assert chosen.share == pytest.approx(0.8, abs=0.02)
    assert chosen.sparsity > found.tried[0].sparsity + 0.05


def test_a_search_does_not_creep(monkeypatch: pytest.MonkeyPatch) -> None:
    """Losses as Gemma 3 270M has them in int8: at first next to nothing, soon much."""
    found = adviser(tiny_model("llama"))
    sparsities = [0.1, 0.126, 0.271, 0.301, 0.37, 0.463, 0.8]
    losses = [0.0005, 0.001, 0.0455, 0.058, 0.0963, 0.2269, 3.0]
    losing(found, monkeypatch, lambda _, sparsity: float(np.interp(sparsity, sparsities, losses)))
    chosen = found.for_loss(0.05)
    assert 0.045 <= chosen.nats_over_dense <= 0.05
    assert len([t for t in found.tried if t.width == "int4"]) <= 7


def test_a_search_knows_that_it_cannot_win(monkeypatch: pytest.MonkeyPatch) -> None:
    found = adviser(tiny_model("llama"))
    losing(found, monkeypatch, exponential())
    chosen = found.for_loss(0.01)
    assert (chosen.width, chosen.sparsity) == ("int4", pytest.approx(recommend.MOST, abs=0.02))
    assert not [t for t in found.tried if t.width == "loaded" and t.sparsity]


def test_a_bound_on_the_loss_takes_the_fewest_bytes() -> None:
    model = tiny_model("llama")
    found = adviser(model)
    chosen = found.for_loss(0.02)
    assert chosen.nats_over_dense <= 0.02
    assert chosen.share == min(t.share for t in found.tried if t.nats_over_dense <= 0.02)
    assert not is_patched(model)
    with pytest.raises(ConfigError, match="not negative"):
        found.for_loss(-1.0)


def test_recommend_command(folder: Path) -> None:
    found = run(
        "recommend", "-m", str(folder), "--bytes", "0.5", "--methods", "teal/head=sparse",
        "--widths", "loaded", "--tokens", "512",
    )  # fmt: skip
    assert (found["settings"]["method"], found["settings"]["head"]) == ("teal", "sparse")
    assert found["expected"]["share"] == pytest.approx(0.5, abs=0.02)
    answer = CliRunner().invoke(app, ["recommend", "-m", str(folder)])
    assert "one of --bytes and --max-loss" in str(answer.exception)
