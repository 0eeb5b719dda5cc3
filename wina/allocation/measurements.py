"""What allocation policies have measured, kept for the next budget.

A policy looks at a model once and can then divide any budget; calibrations at several sparsities
share what it saw. Values are JSON, so that an interrupted run finds them in its folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from wina.files import read_json, write_atomically


class Measurements:
    """Measurements on one model with one calibration text.

    Args:
        reach: the highest sparsity that will be asked for. A policy that walks from dense to a
            budget walks so far at once.
        folder: where they are kept, None for memory only.
        identity: what the caller knows of the model and the text; others' files are not read.
    """

    def __init__(
        self, reach: float, folder: Path | None = None, identity: Mapping[str, Any] | None = None
    ) -> None:
        self.reach = reach
        self.folder = folder
        self.identity = dict(identity or {})
        self._known: dict[str, Any] = {}

    def get(self, about: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The measurement that ``about`` names, measured now if it is not known.

        Args:
            about: what it depends on, JSON-ready.
            measure: gives a JSON-ready value.
        """
        document = {**self.identity, **about}
        text = json.dumps(document, sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:32]
        if key not in self._known:
            self._known[key] = self._read(key, document)
        if self._known[key] is None:
            value = measure()
            self._known[key] = value
            if self.folder is not None:
                self.folder.mkdir(parents=True, exist_ok=True)
                saved = json.dumps({"about": document, "value": value}, indent=1)
                write_atomically(self.folder / f"{key}.json", saved.encode())
        return self._known[key]

    def _read(self, key: str, document: Mapping[str, Any]) -> Any:
        if self.folder is None:
            return None
        try:
            saved = read_json(self.folder / f"{key}.json")
        except (OSError, ValueError):  # nothing there, or not whole: it is measured again
            return None
        fits = isinstance(saved, dict) and saved.get("about") == document
        return saved.get("value") if fits else None
