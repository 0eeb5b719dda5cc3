"""The documentation's Python runs, and its files are linked."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from wina.catalogue import to_markdown
from wina.criteria import CRITERIA
from wina.kernels.dispatch import backends
from wina.methods import METHODS
from wina.projections import ARCHITECTURES

DOCS = Path(__file__).resolve().parents[1] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture
def _own_tables() -> Iterator[None]:
    """What a page registers is gone afterwards."""
    tables = (CRITERIA._entries, METHODS._entries, ARCHITECTURES, backends())
    before = [dict(table) for table in tables]
    yield
    for table, entries in zip(tables, before, strict=True):
        table.clear()
        table.update(entries)  # type: ignore[call-overload]


@pytest.mark.usefixtures("_own_tables")
@pytest.mark.parametrize("page", ["model", "method", "kernel"])
def test_how_tos_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = (DOCS / "howto" / f"{page}.md").read_text(encoding="utf-8")
    names: dict[str, object] = {"__name__": page}
    for block in BLOCK.findall(text):
        exec(compile(block, f"{page}.md", "exec"), names)
    assert capsys.readouterr().out


def test_the_page_of_methods_lists_all_that_can_be_chosen() -> None:
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    assert page.endswith(to_markdown()), "wina methods --markdown prints what is to stand there"


def notebook_cells() -> list[dict[str, object]]:
    cells: list[dict[str, object]] = json.loads(
        (DOCS / "first-steps.ipynb").read_text(encoding="utf-8")
    )["cells"]
    return cells


def test_the_notebook_was_run_from_top_to_bottom_and_names_no_machine() -> None:
    code = [cell for cell in notebook_cells() if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = json.dumps([cell["outputs"] for cell in code])
    assert '"error"' not in outputs
    assert not re.search(r"/(home|root|work|tmp|Users)/", outputs)


@pytest.mark.slow
def test_the_notebook_runs() -> None:
    names: dict[str, object] = {"__name__": "notebook"}
    for cell in notebook_cells():
        if cell["cell_type"] == "code":
            exec("".join(cell["source"]), names)  # type: ignore[arg-type]


def test_every_page_is_in_the_navigation() -> None:
    settings = (DOCS.parent / "mkdocs.yml").read_text(encoding="utf-8")
    for page in (*DOCS.rglob("*.md"), *DOCS.rglob("*.ipynb")):
        assert f"- {page.relative_to(DOCS)}\n" in settings
