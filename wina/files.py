"""Files that are whole or absent whatever happens while they are written, and strangers' JSON."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

_MARK = ".partial"
_LARGEST = 2**63
# Bytes that Python takes for what a mark begins or ends, roughly: a list, a dict, a value in one,
# half a string.
_COSTS = {"[": 64, "{": 240, ",": 40, '"': 30}
_FREE = 4 << 20


def read_json(path: Path) -> Any:
    """The value of a UTF-8 file, see :func:`parse_json`; OSError if it cannot be read."""
    return parse_json(path.read_text(encoding="utf-8"))


def parse_json(text: str) -> Any:
    """A JSON value; whatever cannot be used raises ValueError, and nothing else does.

    That includes lists nested too deeply for Python, integers of more than 64 bits, which no float
    or tensor would take, and a long text of next to nothing but tiny values, which would grow
    twentyfold in memory.
    """
    if len(text) > _FREE // 8:
        cost = sum(text.count(mark) * each for mark, each in _COSTS.items())
        if cost > 2 * len(text) + _FREE:
            raise ValueError("too many values for its size")
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
    write_together({path: data})


def write_together(files: Mapping[Path, bytes]) -> None:
    """Write each file at once, and none of them unless there is room for all.

    They take their places one after the other, in order: who is killed between them leaves new
    files beside old ones.
    """
    with ExitStack() as leftovers:
        ready = []
        for path, data in files.items():
            handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=_MARK)
            temporary = Path(name)
            leftovers.callback(temporary.unlink, missing_ok=True)
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            ready.append((temporary, path))
        for temporary, path in ready:
            temporary.replace(path)


def remove_partial(folder: Path) -> None:
    """Remove what killed processes left in a folder and below. Nobody may be writing there."""
    for leftover in folder.rglob(f".*{_MARK}"):
        leftover.unlink(missing_ok=True)
