from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from wina.bench.machine import Neighbours
from wina.bench.runs import (
    compare_runs,
    different_machines,
    document,
    load,
    parse,
    repeated,
    save,
)
from wina.errors import WinaError


def row(time: float, sparsity: float = 0.5, **more: Any) -> dict[str, Any]:
    key = {"engine": "e", "method": "wina", "dtype": "float32", "batch": 1, "context": 8}
    return {**key, "sparsity": sparsity, "ms_per_step": time, "speedup_vs_dense": 1.5, **more}


def run(*rows: dict[str, Any], bench: str = "decode") -> dict[str, Any]:
    return document(bench, "title", rows, {"rounds": 2})


def test_round_trip(tmp_path: Path) -> None:
    made = run(row(1.0))
    save(made, tmp_path / "new" / "run.json")
    assert load(tmp_path / "new" / "run.json") == made
    (tmp_path / "log.txt").write_text(f"a table\n{json.dumps(made)}\n")
    assert load(tmp_path / "log.txt") == made  # captured stdout serves as well
    assert {"cpu", "caches", "governor", "torch", "commit"} <= set(made["machine"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no run"),
        ('{"rows": []}', "no run"),
        ('{"format": "wina-bench", "version": 99, "bench": "decode"}', "version 99"),
        ('{"format": "wina-bench", "version": 1, "bench": "soup"}', "'soup' run"),
    ],
)
def test_other_files_are_refused(text: str, message: str) -> None:
    with pytest.raises(WinaError, match=message):
        parse(text, "file")


def test_comparison() -> None:
    old = run(row(1.0), row(1.0, 0.25), row(1.0, 0.4), row(1.0, 0.9))
    noisy = row(0.5, 0.4, verdict="too noisy for the claim")
    found = compare_runs(old, run(row(0.8), row(1.02, 0.25), noisy, row(2.0, 0.7)))
    assert [(r["sparsity"], r["verdict"]) for r in found] == [
        (0.5, "faster"), (0.25, "same"), (0.4, "too noisy"),
    ]  # fmt: skip
    assert found[0]["faster"] == pytest.approx(1.25)
    with pytest.raises(WinaError, match="no row in common"):
        compare_runs(old, run(row(1.0, 0.1)))
    with pytest.raises(WinaError, match="cannot be compared"):
        compare_runs(old, run(bench="kernels"))


def test_repeated_claims_are_counted() -> None:
    def at(sparsity: float, speedup: float, **more: Any) -> dict[str, Any]:
        return row(1.0, sparsity, **{"speedup_vs_dense": speedup, **more})

    noisy = {"verdict": "too noisy for the claim"}
    old = run(at(0.0, 1.0), at(0.25, 1.2), at(0.5, 2.0), at(0.65, 3.0))
    new = run(at(0.0, 1.0), at(0.25, 1.22), at(0.5, 2.2), at(0.65, 9.0, **noisy))
    found = repeated(compare_runs(old, new))
    assert found == {"rows": 3, "claimed": 2, "within": 1, "worst": pytest.approx(0.1)}
    assert repeated([])["worst"] is None


def test_machines_are_compared() -> None:
    old, new = run(), run()
    assert different_machines(old, new) == []
    old["machine"]["cpu"] = "another"
    assert different_machines(old, new)[0].startswith("cpu: another →")


def test_neighbours_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = iter((10.0, 1000.0, 1000.0))
    monkeypatch.setattr(Neighbours, "_others", staticmethod(lambda: next(seconds)))
    (warning,) = Neighbours().warnings()
    assert "too noisy" in warning
    monkeypatch.setattr(Neighbours, "_others", staticmethod(lambda: None))
    assert Neighbours().cores is None
    assert Neighbours().warnings() == []
    monkeypatch.undo()
    own = Neighbours().cores
    assert own is None or own >= 0
