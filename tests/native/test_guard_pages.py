"""No operator reads or writes a byte outside of a tensor, whatever the sizes."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver import HERE, drive, said

from wina.kernels import dispatch
from wina.kernels.cpu import build
from wina.kernels.ops import OPERATORS

CALLS = 100  # of each operator and edge


def test_every_operator_stays_inside_of_its_tensors(tmp_path: Path) -> None:
    """Inputs, outputs and whatever torch makes in between end, then start, at a page that kills."""
    compiler = build._compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    guard = tmp_path / "guard.so"
    build.build_library(compiler, guard, [HERE / "guard_pages.cpp"], ["-O1"])
    found = said(drive("--calls", CALLS, "--edge", "end", "--edge", "start", "--guard", guard))
    assert dispatch.backends()
    assert set(found["native"]) == set(OPERATORS)
    assert set(found["calls"]) == set(OPERATORS)
    assert (found["outside the end"], found["outside the start"]) == ("SIGSEGV", "SIGSEGV")
    assert found["guarded"] > 2 * CALLS * len(found["calls"])
