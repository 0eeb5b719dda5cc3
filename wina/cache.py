"""Where wina keeps what it has built or fetched."""

from __future__ import annotations

import os
from pathlib import Path


def cache_root() -> Path | None:
    """``$WINA_CACHE_DIR``, else ``$XDG_CACHE_HOME/wina``, else ``~/.cache/wina``.

    None where that is no absolute path (no home folder, say): what is built must not depend on
    the working directory.
    """
    own, shared = os.environ.get("WINA_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    try:
        root = Path(own) if own else Path(shared or Path.home() / ".cache") / "wina"
    except RuntimeError:  # no home folder
        return None
    return root if root.is_absolute() else None
