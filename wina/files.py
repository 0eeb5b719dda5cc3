"""Files that are whole or absent whatever happens while they are written, and strangers' JSON."""

from __future__ import annotations

import json
import os
import tempfile
from pathlib import Path
from typing import Any

_MARK = ".partial"
_LARGEST = 2**63


def parse_json(text: str | bytes) -> Any:
    """A JSON value; whatever cannot be used raises ValueError, and nothing else does.

    That includes lists nested too deeply for Python, and integers of more than 64 bits, which no
    float or tensor would take.
    """
    try:
        return json.loads(text, parse_int=_integer)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _integer(digits: str) -> int:
    value = int(digits)
    if not -_LARGEST <= value < _LARGEST:
        raise ValueError(f"an integer of {len(digits)} digits")
    return value


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file at once: readers see the old one or the new one, never a part.

    A process that is killed meanwhile leaves a file that :func:`remove_partial` removes.
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_MARK)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left in a folder and below. Nobody may be writing there."""
    for leftover in folder.rglob(f".*{_MARK}"):
        leftover.unlink(missing_ok=True)
