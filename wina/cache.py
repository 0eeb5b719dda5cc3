"""Where wina keeps what it has built or fetched."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path | None:
    """``$WINA_CACHE_DIR``, else ``$XDG_CACHE_HOME/wina``, else ``~/.cache/wina``.

    None where that is no absolute path (no home folder): the working directory is never used.
    """
    chosen = os.environ.get("WINA_CACHE_DIR")
    if chosen:
        root = Path(chosen)
    else:
        root = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()) / "wina"
    return root if root.is_absolute() else None
