"""Options of ``pytest bench/``, the micro-benches."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add ``--quick``."""
    parser.addoption("--quick", action="store_true", help="tiny buffers: show that benches run")
