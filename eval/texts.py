"""Texts to measure on, read from files or from the package."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterable
from pathlib import Path

from wina.errors import WinaError
from wina.files import parse_json
from wina.texts import bundled

# Fields of a row of JSON that may hold the text, in this order.
FIELDS = ("text", "page", "content")
_NAMES = ("heldout", "calibration")


def read_documents(source: str) -> list[str]:
    """Documents of ``"heldout"`` (bundled), a text file, or a ``.jsonl`` file, each maybe ``.gz``.

    A text file is one document; a row of JSON is a document, in its field ``text``, ``page`` or
    ``content``.

    Raises:
        WinaError: it cannot be read, or a row has none of these fields.
    """
    if source in _NAMES:
        return bundled(source)
    path = Path(source)
    opened = gzip.open if path.suffix == ".gz" else Path.open
    try:
        with opened(path, "rt", encoding="utf-8", newline="\n") as file:
            return _rows(path, file) if ".jsonl" in path.suffixes else [file.read()]
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise WinaError(
            f"cannot read {path}: {error}. Name a file, or `heldout` for the bundled text."
        ) from None


def _rows(path: Path, lines: Iterable[str]) -> list[str]:
    """The documents of lines of JSON, one a line."""
    documents = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = parse_json(line)
            documents.append(str(next(row[field] for field in FIELDS if field in row)))
        except (ValueError, TypeError, StopIteration):
            raise WinaError(
                f"{path}, line {number}: expected JSON with a field {', '.join(FIELDS)}"
            ) from None
    return documents


def digest(documents: list[str]) -> str:
    """sha256 of documents, by which a cached result knows its text."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()
