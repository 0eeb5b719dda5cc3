"""What calibration has measured, kept for the next budget, or for a run that was interrupted.

An allocation policy looks at a model once and can then divide any budget; calibrations at several
sparsities share what it saw. Rounded weights serve the same calibration alone. Values are JSON and
safetensors files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from wina.files import read_json, write_atomically


class Measurements:
    """Measurements on one model with one calibration text.

    Args:
        reach: the highest sparsity that will be asked for. A policy that walks from dense to a
            budget walks so far at once.
        folder: where they are kept, None for memory only.
        identity: what the caller knows of the model and the text; others' files are not read.
        large: keep tensors in the folder as well, which takes about the room of a plan each time.
    """

    def __init__(
        self,
        reach: float,
        folder: Path | None = None,
        identity: Mapping[str, Any] | None = None,
        large: bool = False,
    ) -> None:
        self.large = large
        self.reach = reach
        self.folder = folder
        self.identity = dict(identity or {})
        self._known: dict[str, Any] = {}
        self._tensors: dict[str, Mapping[str, Tensor]] = {}

    def get(self, about: Mapping[str, Any], measure: Callable[[], Any]) -> Any:
        """The measurement that ``about`` names, measured now if it is not known.

        Args:
            about: what it depends on, JSON-ready.
            measure: gives a JSON-ready value.
        """
        document, key = self._named(about)
        if key not in self._known:
            self._known[key] = self._read(key, document)
        if self._known[key] is None:
            value = measure()
            self._known[key] = value
            self._write(key, document, value)
        return self._known[key]

    def tensors(
        self,
        about: Mapping[str, Any],
        measure: Callable[[], Mapping[str, Tensor]],
        remember: bool = False,
    ) -> Mapping[str, Tensor]:
        """Named tensors on the CPU that ``about`` names, found now unless they are known.

        The folder keeps them if ``large``, this object if they are to be remembered.
        """
        document, key = self._named(about)
        if key in self._tensors:
            return self._tensors[key]
        found = self._from_folder(document, key, measure)
        if remember:
            self._tensors[key] = found
        return found

    def _from_folder(
        self,
        document: Mapping[str, Any],
        key: str,
        measure: Callable[[], Mapping[str, Tensor]],
    ) -> Mapping[str, Tensor]:
        if self.folder is None or not self.large:
            return measure()
        path = self.folder / f"{key}.safetensors"
        # The file's name says what it depends on; the hash within, that it is whole.
        known = self._read(key, document)
        try:
            blob = path.read_bytes() if isinstance(known, str) else b""
            if hashlib.sha256(blob).hexdigest() == known:
                return safetensors_load(blob)
        except (OSError, SafetensorError):
            pass
        found = measure()
        blob = safetensors_save({name: tensor.contiguous() for name, tensor in found.items()})
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomically(path, blob)
        self._write(key, document, hashlib.sha256(blob).hexdigest())
        return found

    def _named(self, about: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
        """All that a value depends on, and the name of its file."""
        document = {**self.identity, **about}
        text = json.dumps(document, sort_keys=True)
        return document, hashlib.sha256(text.encode()).hexdigest()[:32]

    def _write(self, key: str, document: Mapping[str, Any], value: Any) -> None:
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            saved = json.dumps({"about": document, "value": value}, indent=1)
            write_atomically(self.folder / f"{key}.json", saved.encode())

    def _read(self, key: str, document: Mapping[str, Any]) -> Any:
        if self.folder is None:
            return None
        try:
            saved = read_json(self.folder / f"{key}.json")
        except (OSError, ValueError):  # nothing there, or not whole: it is measured again
            return None
        fits = isinstance(saved, dict) and saved.get("about") == document
        return saved.get("value") if fits else None
