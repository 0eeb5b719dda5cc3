"""Files that are whole or absent, whatever happens while they are written."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

_MARK = ".partial"


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
