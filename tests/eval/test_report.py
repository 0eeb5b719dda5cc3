from __future__ import annotations

import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from eval_grids import bench, cell, key, make_grid, write_cell, write_header
from typer.testing import CliRunner

from wina.cli import app
from wina.errors import WinaError
from wina.eval.report.chance import chance
from wina.eval.report.contents import BETTER, SAME, UNTESTED, WORSE, Report
from wina.eval.report.differences import segments
from wina.eval.report.grid import load
from wina.eval.report.render import COLUMNS, RENDERERS, to_csv, to_html, to_json, to_markdown
from wina.eval.report.summary import summarise
from wina.eval.report.words import documents
from wina.eval.report.write import write_report

FEW = ("piqa", "lambada_openai", "wikitext2", "greedy_generation")
HOSTILE = "<script>alert(1)</script>\"'&|`*_ [x](javascript:0)"


def report_of(folder: Path, *benches: Path) -> Report:
    return summarise(load(folder, benches))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Report:
    return report_of(make_grid(tmp_path_factory.mktemp("grid"), FEW, sparsities=(0.4, 0.65)))


def metric(value: float, higher: bool = True, stderr: float | None = None) -> dict[str, Any]:
    return {"value": value, "stderr": stderr, "higher_is_better": higher}


def write_rows(folder: Path, task: str, rows: dict[str, list[float]], higher: bool = True) -> None:
    """One task at 50 %: per-document values of each method, the metric their mean."""
    for method, values in rows.items():
        made = cell(method, 0.5 if method != "dense" else 0.0, task, len(values))
        made |= {"metrics": {"m": metric(sum(values) / len(values), higher)}, "primary": "m"}
        made |= {"rows": {"m": values}, "kind": "lm_eval", "identity": {}}
        write_cell(folder, made)


# What the numbers mean


def test_whole_grid(whole: Report) -> None:
    assert whole.complete
    assert (whole.measured, whole.asked) == (20, 20)
    assert whole.averaged == ("piqa", "lambada_openai")  # neither perplexity nor generation
    dense, *sparse = whole.rows
    assert (dense.method, dense.weights_read, dense.difference) == ("dense", 1.0, None)
    for row in sparse:
        scores = {e.task: e.value for e in whole.entries_of(row)}
        assert row.mean == pytest.approx((scores["piqa"] + scores["lambada_openai"]) / 2)
        assert row.recovery == pytest.approx(row.mean / dense.mean)
        assert row.above_chance == pytest.approx((row.mean - 0.25) / (dense.mean - 0.25))
        assert row.difference.value == pytest.approx(row.mean - dense.mean)
        assert row.weights_read == pytest.approx(1 - row.sparsity - 0.002)
        assert row.kl > 0
    lost = [row for row in sparse if row.sparsity == 0.65]
    assert all(row.difference.verdict == WORSE and row.worse == 3 for row in lost)


def test_perplexity_is_tested_on_its_nats(whole: Report) -> None:
    entry = next(e for e in whole.entries if e.task == "wikitext2" and e.sparsity == 0.65)
    assert (entry.difference.test, entry.difference.documents) == ("paired t", 200)
    assert entry.difference.verdict == WORSE
    assert entry.recovery is None


def test_distance_to_dense_is_not_compared_with_dense(whole: Report) -> None:
    entries = [e for e in whole.entries if e.task == "greedy_generation"]
    assert all(e.value is not None and e.difference is None for e in entries)


@pytest.mark.parametrize(("higher", "verdict"), [(True, BETTER), (False, WORSE)])
def test_direction_of_the_metric(tmp_path: Path, higher: bool, verdict: str) -> None:
    write_header(tmp_path, ["t"], ["dense", "wina"], [0.5])
    write_rows(tmp_path, "t", {"dense": [0.0] * 12, "wina": [1.0] * 10 + [0.0] * 2}, higher)
    entry = report_of(tmp_path).entries[-1]
    assert entry.difference.value > 0
    assert entry.difference.verdict == verdict


def test_noise_is_no_win(tmp_path: Path) -> None:
    write_header(tmp_path, ["t"], ["dense", "wina"], [0.5])
    write_rows(tmp_path, "t", {"dense": [0.0, 1.0] * 8, "wina": [1.0, 1.0] * 2 + [0.0, 1.0] * 6})
    report = report_of(tmp_path)
    difference = report.entries[-1].difference
    assert difference.p == 0.5
    assert difference.verdict == SAME
    assert 'class="delta better"' not in to_html(report).split("<tbody>", 1)[1].split("</main>")[
        0
    ].replace('<span class="delta better">▲ better</span>', "")


def test_comparisons_are_corrected_together(tmp_path: Path) -> None:
    """p = 1/32 alone would count; among 20 comparisons it does not."""
    tasks = [f"t{i}" for i in range(20)]
    write_header(tmp_path, tasks, ["dense", "wina"], [0.5])
    for task in tasks:
        gained = [1.0] * 6 if task == "t0" else [0.0] * 6
        write_rows(tmp_path, task, {"dense": [0.0] * 12, "wina": gained + [0.0] * 6})
    first = report_of(tmp_path).entries[20].difference
    assert first.p == pytest.approx(1 / 32)
    assert first.p_holm == pytest.approx(20 / 32)
    assert first.verdict == SAME


def test_values_without_documents_are_not_tested(tmp_path: Path) -> None:
    write_header(tmp_path, ["t"], ["dense", "wina"], [0.5])
    write_rows(tmp_path, "t", {"dense": [0.0] * 12, "wina": [1.0] * 12})
    made = cell("wina", 0.5, "t", 12)
    rows = [[-3.0, 2], [-1.0, 4]]  # weighted log-likelihoods
    made |= {"metrics": {"m": metric(1.0)}, "primary": "m", "rows": {"m": rows}, "identity": {}}
    write_cell(tmp_path, made)
    assert report_of(tmp_path).entries[-1].difference.verdict == UNTESTED


def test_methods_against_one_another(whole: Report) -> None:
    assert [(d.first, d.second, d.sparsity) for d in whole.duels] == [
        ("teal", "wina", 0.4), ("teal", "wina", 0.65),
    ]  # fmt: skip
    means = {(row.method, row.sparsity): row.mean for row in whole.rows}
    for duel in whole.duels:
        expected = means["teal", duel.sparsity] - means["wina", duel.sparsity]
        assert duel.difference.value == pytest.approx(expected)


@pytest.mark.parametrize(
    ("task", "level"),
    [("wina_arc_easy", 0.25), ("mmlu_anatomy", 0.25), ("xcopa_zh", 0.5), ("novel", None)],
)
def test_chance(task: str, level: float | None) -> None:
    assert chance(task) == level


def test_realised_by_layer_and_type(whole: Report) -> None:
    found = whole.realised[0]
    assert (len(found.layers), found.types[0]) == (6, "q_proj")
    mean = sum(layer[0] for layer in found.layers) / 6
    assert found.by_type["q_proj"] == pytest.approx(mean)


@pytest.mark.parametrize("number", ["9" * 5000, "999999999"])
def test_numbers_beyond_all_bounds(tmp_path: Path, number: str) -> None:
    folder = make_grid(tmp_path, ("piqa", "boolq"), sparsities=(0.5,))
    for path in (folder / "cells").glob("*.json"):
        made = json.loads(path.read_text())
        made["metrics"][made["primary"]]["stderr"] = 1e300
        if made["realised"]:
            made["realised"]["projections"][f"model.layers.{number}.q_proj"] = 0.5
        path.write_text(json.dumps(made))
    report = report_of(folder)
    assert {len(found.layers) for found in report.realised} == {6}
    assert [row.stderr for row in report.rows] == [None] * 3


def test_speed_is_of_the_smallest_batch(tmp_path: Path) -> None:
    folder = make_grid(tmp_path / "grid", ["piqa"], sparsities=(0.5,))
    (folder / "decode.json").write_text(json.dumps(bench(["teal", "wina"], [0.5])))
    report = report_of(folder)
    assert [row.speed.batch for row in report.rows] == [1, 1, 1]
    assert report.rows[1].speed.speedup == pytest.approx(1 / 0.65)
    assert "Decode speed" in to_html(report)
    assert len(report.speeds) == 6
    # the same file named again is not shown twice
    assert len(report_of(folder, folder / "decode.json").speeds) == 6


# What is missing


def test_incomplete(tmp_path: Path) -> None:
    missing = {("wina", 0.5, "piqa"), ("teal", 0.4, "wikitext2")}
    report = report_of(make_grid(tmp_path, FEW, missing=missing))
    page, text = to_html(report), to_markdown(report)
    assert "incomplete: 18 of 20 cells" in page
    assert "Incomplete: 18 of 20 cells" in text
    assert page.count('title="not measured"') == 2
    row = report.rows[-1]
    assert (row.method, row.sparsity, row.mean, row.cells) == ("wina", 0.5, None, 3)
    assert "1 of 2 tasks" in page  # a mean over other tasks would mislead
    lines = list(csv.DictReader(io.StringIO(to_csv(report))))
    gaps = [line for line in lines if line["verdict"] == "missing"]
    assert {(g["method"], float(g["sparsity"]), g["task"]) for g in gaps} == missing


def test_empty_grid(tmp_path: Path) -> None:
    report = report_of(make_grid(tmp_path, FEW, missing=_Everything()))
    assert (report.measured, report.asked) == (0, 20)
    assert "incomplete: 0 of 20 cells" in to_html(report)
    for render in RENDERERS.values():
        assert render(report)


def test_grid_without_tasks(tmp_path: Path) -> None:
    report = report_of(make_grid(tmp_path, []))
    for render in RENDERERS.values():
        assert render(report)


def test_without_dense(tmp_path: Path) -> None:
    report = report_of(make_grid(tmp_path, FEW, methods=["teal", "wina"]))
    assert report.complete
    assert all(e.difference is None for e in report.entries)
    assert all(row.recovery is None for row in report.rows)
    assert to_html(report)


def test_optional_fields(tmp_path: Path) -> None:
    write_header(tmp_path, ["t"], ["dense", "wina"], [0.5])
    path = tmp_path / "grid.json"
    least = ("format", "version", "cells")
    header = json.loads(path.read_text())
    path.write_text(json.dumps({name: header[name] for name in least}))
    made = cell("wina", 0.5, "t")
    made = {name: made[name] for name in ("format", "version", "key", "method", "sparsity", "task")}
    write_cell(tmp_path, {**made, "metrics": {"acc": {"value": 0.5}}})
    report = report_of(tmp_path)
    assert report.entries[-1].value == 0.5
    assert "unnamed model" in to_html(report)


def test_infinite_perplexity(tmp_path: Path) -> None:
    write_header(tmp_path, ["p"], ["dense", "wina"], [0.5])
    write_rows(tmp_path, "p", {"dense": [3.0, 4.0], "wina": [3.0, float("inf")]}, higher=False)
    report = report_of(tmp_path)
    assert "inf" in to_html(report)
    assert json.loads(to_json(report))["entries"][-1]["value"] is None


def test_cells_that_do_not_belong(tmp_path: Path) -> None:
    folder = make_grid(tmp_path, ["piqa"], sparsities=(0.5,))
    write_cell(folder, {**cell("wina", 0.5, "piqa"), "key": "of another grid"})
    write_cell(folder, {**cell("wina", 0.4, "piqa"), "key": key("teal", 0.5, "piqa")})
    (folder / "cells" / f"{key('wina', 0.5, 'piqa')}.json").write_text('{"format": "wina-ev')
    report = report_of(folder)
    assert (report.measured, report.asked) == (1, 3)
    wrong, damaged = report.warnings
    assert "it is a cell of wina, 0.4, piqa" in wrong
    assert f"{key('wina', 0.5, 'piqa')}.json is left out" in damaged


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "no readable grid.json"),
        ("[1]", "no readable grid.json"),
        ('{"format": "wina-eval", "version": 99}', "of version 99"),
        ('{"format": "wina-eval", "version": 1}', "does not name its cells"),
        ('{"format": "wina-eval", "version": 1, "cells": [{}]}', "does not name its cells"),
    ],
)
def test_other_folders_are_refused(tmp_path: Path, text: str | None, message: str) -> None:
    if text is not None:
        (tmp_path / "grid.json").write_text(text)
    with pytest.raises(WinaError, match=message):
        load(tmp_path)


def test_other_benches_are_refused(tmp_path: Path) -> None:
    folder = make_grid(tmp_path / "grid", ["piqa"])
    run = {**bench([], []), "bench": "kernels", "rows": []}
    (tmp_path / "kernels.json").write_text(json.dumps(run))
    with pytest.raises(WinaError, match="kernels run"):
        load(folder, [tmp_path / "kernels.json"])
    (folder / "kernels.json").write_text(json.dumps(run))  # beside the grid it is just not used
    assert load(folder).benches == ()


# How it is written


def test_page_loads_nothing(whole: Report) -> None:
    page = to_html(whole)
    assert not re.search(r"https?://|//[a-z]|@import|url\(", page.replace("<!doctype", ""))
    tags = _Tags(page)
    assert not {"script", "link", "img", "iframe", "object", "base"} & set(tags.names)
    assert all(value.startswith("#") for name, value in tags.attributes if name == "href")
    assert not [name for name, _ in tags.attributes if name == "src" or name.startswith("on")]


def test_page_is_well_formed(whole: Report) -> None:
    assert _Tags(to_html(whole)).open == []
    for drawing in re.findall(r"<svg.*?</svg>", to_html(whole), re.DOTALL):
        ElementTree.fromstring(drawing)


def test_hostile_names_and_texts(tmp_path: Path) -> None:
    write_header(
        tmp_path, [HOSTILE], ["dense", HOSTILE], [0.5], model={"name": HOSTILE}, command=HOSTILE,
        protocol=HOSTILE, versions={"wina": HOSTILE}, machine={HOSTILE: HOSTILE},
    )  # fmt: skip
    for number, method in enumerate(("dense", HOSTILE)):
        made = cell(method, 0.5 * number, "piqa")
        made |= {"task": HOSTILE, "primary": HOSTILE}
        made["key"] = key(method, 0.5 * number, HOSTILE)
        made |= {"metrics": {HOSTILE: metric(0.5 + 0.1 * number)}, "rows": {}, "identity": {}}
        made["samples"] = [{"prompt": HOSTILE, "text": HOSTILE * (number + 1)}]
        if made["realised"]:
            made["realised"]["projections"] = {f"model.layers.0.{HOSTILE}": 0.5}
        write_cell(tmp_path, made)
    run = bench([HOSTILE], [0.5])
    run |= {"title": HOSTILE, "machine": {"cpu": HOSTILE}}
    (tmp_path / "decode.json").write_text(json.dumps(run))
    report = report_of(tmp_path)
    assert report.complete
    page = to_html(report)
    tags = _Tags(page)
    assert "script" not in tags.names
    assert tags.open == []
    assert not [name for name, _ in tags.attributes if name.startswith("on")]
    assert "<script>" not in page
    assert "&amp;lt;" not in page  # escaped once
    markdown = to_markdown(report)
    outside = [line for line in markdown.splitlines() if not line.startswith("    ")]
    assert not [line for line in outside if re.search(r"(?<!\\)<(?!br>)[a-z/]", line)]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in _table(markdown, "## Tasks")}
    assert len(bars) == 1  # no name opened another column


def test_same_input_same_bytes(tmp_path: Path) -> None:
    one = write_report(make_grid(tmp_path / "a", FEW), tmp_path / "first")
    two = write_report(make_grid(tmp_path / "b", FEW), tmp_path / "second")
    for name in RENDERERS:
        assert one.paths[name].read_bytes() == two.paths[name].read_bytes()
    again = write_report(tmp_path / "a")  # its own report.json is not taken for a bench
    assert again.paths["report.html"].read_bytes() == one.paths["report.html"].read_bytes()
    assert write_report(tmp_path / "a").report == again.report


def test_csv_and_json_hold_the_same_numbers(whole: Report) -> None:
    lines = list(csv.DictReader(io.StringIO(to_csv(whole))))
    assert tuple(lines[0]) == COLUMNS
    document = json.loads(to_json(whole))
    assert document["complete"] is True
    primary = {(r["method"], float(r["sparsity"]), r["task"]): r for r in lines
               if r["primary"] == "True"}  # fmt: skip
    assert len(primary) == len(document["entries"]) == 20
    for entry in document["entries"]:
        line = primary[entry["method"], entry["sparsity"], entry["task"]]
        assert float(line["value"]) == entry["value"]
        if entry["difference"] is not None:
            assert float(line["difference"]) == entry["difference"]["value"]
            assert float(line["p_holm"]) == entry["difference"]["p_holm"]
            assert line["verdict"] == entry["difference"]["verdict"]
    others = [line for line in lines if line["metric"] == "acc_norm"]
    assert len(others) == 10
    assert {line["p"] for line in others} == {""}


def test_conditions_stand_at_every_table(whole: Report) -> None:
    page = to_html(whole)
    assert page.count("last 99% of the tokens sparse (protocol last:0.99)") >= 4
    assert page.count("wina eval run --model smollm2-135m-instruct") >= 4
    for words in ("first 200 documents of each task", "0-shot", "lm_eval 0.4.13"):
        assert words in page
        assert words in to_markdown(whole)


@pytest.mark.parametrize(
    ("reference", "text", "expected"),
    [
        ("a b c", "a b c", [(False, "a b c")]),
        ("a b c", "a x c", [(False, "a "), (True, "x"), (False, " c")]),
        ("", "new words", [(True, "new words")]),
        ("gone", "", []),
        ("他很高兴", "他不高兴", [(False, "他"), (True, "不"), (False, "高兴")]),
    ],
)
def test_differing_words(reference: str, text: str, expected: list[tuple[bool, str]]) -> None:
    assert segments(reference, text) == expected
    assert "".join(part for _, part in segments(reference, text)) == text


def test_command(tmp_path: Path) -> None:
    folder = make_grid(tmp_path / "grid", FEW)
    run = tmp_path / "decode.json"
    run.write_text(json.dumps(bench(["teal"], [0.5])))
    output = tmp_path / "out"
    arguments = ["eval", "report", str(folder), "--output", str(output), "--bench", str(run)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    last = json.loads(result.stdout.splitlines()[-1])
    assert last["complete"] is True
    assert {Path(path).name for path in last["paths"].values()} == set(RENDERERS)
    assert all(Path(path).is_file() for path in last["paths"].values())
    assert "tokens/s" in (output / "report.html").read_text()


class _Everything:
    """Contains everything."""

    def __contains__(self, item: object) -> bool:
        return True

    def __iter__(self) -> Any:
        return iter(())

    def __len__(self) -> int:
        return 0


class _Tags(HTMLParser):
    """Names and attributes of a page's elements, and what was opened but not closed."""

    VOID = frozenset({"meta", "br", "link", "img", "input", "hr"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def _table(markdown: str, heading: str) -> list[str]:
    section = markdown.split(heading)[1].split("\n## ")[0]
    return [line for line in section.splitlines() if line.startswith("|")]


def test_limits_of_single_tasks_are_told() -> None:
    assert documents({"limit": None, "tasks": ["piqa"]}) == "all documents"
    told = documents({"limit": 20, "tasks": ["piqa", "boolq@5"]})
    assert told == "first N documents of a task@N, else first 20 documents of each task"
