"""Texts to calibrate and to evaluate on, and their way into token windows."""

from __future__ import annotations

import gzip
import hashlib
import zlib
from collections.abc import Iterable, Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina.errors import CalibrationError, WinaError
from wina.files import parse_json

DOCUMENT_MARK = "<|doc|>"
# Fields of a row of JSON that may hold the text, in this order.
FIELDS = ("text", "page", "content")
# Or all of them together: the fields of instruction data sets such as Alpaca.
INSTRUCTION_FIELDS = ("instruction", "input", "output")
_NAMES = ("heldout", "calibration", "learning")


def bundled(name: str) -> list[str]:
    """Documents of a bundled text, of which ``wina/data/README.md`` tells.

    Args:
        name: ``"calibration"``; ``"learning"``, more for a refinement that learns from text; or
            ``"heldout"``, which is scored.
    """
    text = files("wina").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")
    return [document.strip() for document in text.split(DOCUMENT_MARK)]


def default_texts(learns: bool) -> list[str]:
    """The bundled documents that calibration reads where no text is given.

    Args:
        learns: a refinement reads them, too, and wants more than what is only counted.
    """
    return bundled("calibration") + (bundled("learning") if learns else [])


def read_documents(source: str) -> list[str]:
    """Documents of texts named by commas: ``calibration,wiki.jsonl.gz,instructions.jsonl@200``.

    A text is ``heldout``, ``calibration`` or ``learning`` (bundled), a text file, or a ``.jsonl``
    file, each maybe ``.gz``. A text file is one document; a row of JSON is a document, in its field
    ``text``, ``page`` or ``content``, or in ``instruction``, ``input`` and ``output`` together.
    ``@200`` takes 200 documents, evenly from all.

    Raises:
        WinaError: it cannot be read, or a row has none of these fields.
    """
    names = [source] if _exists(source) else source.split(",")
    return [document for name in names for document in _some(name)]


def _some(name: str) -> list[str]:
    """The documents of ``FILE``, or N of them for ``FILE@N``."""
    file, _, number = name.rpartition("@")
    if _exists(name) or not (file and number.isdecimal() and int(number)):
        return _documents(name)
    documents = _documents(file)
    count = min(int(number), len(documents))
    return [documents[index * len(documents) // count] for index in range(count)]


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long a name
        return False


def _documents(source: str) -> list[str]:
    """The documents of one bundled text or file."""
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
            if not any(field in row for field in (*FIELDS, INSTRUCTION_FIELDS[0])):
                raise ValueError("no text")
            documents.append(_text_of(row))
        except (ValueError, TypeError, AttributeError):
            raise WinaError(
                f"{path}, line {number}: expected JSON with a field {', '.join(FIELDS)}, or with "
                f"{', '.join(INSTRUCTION_FIELDS)}"
            ) from None
    return documents


def _text_of(row: Mapping[str, Any]) -> str:
    """The text of a row of JSON, empty where it has none."""
    for field in FIELDS:
        if field in row:
            return str(row[field])
    return "\n".join(str(row[field]) for field in INSTRUCTION_FIELDS if row.get(field))


def digest(documents: Iterable[str]) -> str:
    """sha256 of documents, by which a cached result knows its text."""
    return hashlib.sha256("\0".join(documents).encode()).hexdigest()


def to_windows(
    texts: Iterable[str] | Iterable[Tensor] | Tensor,
    tokenizer: Any | None,
    window: int,
    tokens: int | None = None,
) -> Tensor:
    """Cut texts into sequences of equal length, each with the beginning that the model is used to.

    Documents are joined, each ended by the tokenizer's end-of-sequence token where it has one. A
    window begins with what the tokenizer puts before a text: a model that was trained with a
    begin-of-sequence token, such as Gemma, is another one without it. If there are more tokens than
    asked for, the windows are taken evenly from the whole text.

    Args:
        texts: strings, or token ids [n] (one tensor or several), which need no tokenizer and are
            taken as they are.
        tokenizer: of transformers.
        window: tokens in one sequence.
        tokens: upper bound of tokens to use, None for all.

    Returns:
        int64 [windows, window]. A text shorter than one window gives one shorter sequence.

    Raises:
        CalibrationError: fewer than 16 tokens, or a window that has no room for text.
    """
    # A stream may be endless: read ahead of what is asked for by a factor that leaves a choice.
    stream, strings = _read(texts, tokenizer, None if tokens is None else 4 * max(tokens, window))
    if stream.numel() < 16:
        raise CalibrationError(
            f"the text has {stream.numel()} tokens; at least 16 are needed, and thousands are "
            "better"
        )
    begin = opening(tokenizer) if strings else stream[:0]
    body = window - len(begin)
    if body < 1:
        raise CalibrationError(
            f"a window of {window} tokens has no room behind the first {len(begin)}"
        )
    body = min(body, len(stream))
    windows = stream[: len(stream) // body * body].view(-1, body)
    windows = torch.cat([begin.expand(len(windows), -1), windows], dim=1)
    return windows if tokens is None else evenly(windows, tokens)


def evenly(windows: Tensor, tokens: int) -> Tensor:
    """At most ``tokens`` tokens, at least one window, of windows [windows, S]: from all of them."""
    limit = max(1, tokens // windows.shape[1])
    if len(windows) <= limit:
        return windows
    return windows[torch.linspace(0, len(windows) - 1, limit).round().to(torch.int64)]


def token_stream(texts: Iterable[str], tokenizer: Any) -> Tensor:
    """Token ids [n] of documents, joined as in :func:`to_windows`."""
    return _read(texts, tokenizer, None)[0]


def opening(tokenizer: Any | None) -> Tensor:
    """Token ids [p] that a tokenizer puts before every text; none where it does not."""
    if tokenizer is None:
        return torch.empty(0, dtype=torch.int64)
    plain = tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"]
    whole = tokenizer("a", verbose=False)["input_ids"]
    at = next((i for i in range(len(whole)) if whole[i : i + len(plain)] == plain), 0)
    return torch.tensor(whole[:at], dtype=torch.int64)


def _read(
    texts: Iterable[str] | Iterable[Tensor] | Tensor, tokenizer: Any | None, wanted: int | None
) -> tuple[Tensor, bool]:
    """(token ids [n] of about as many documents as give ``wanted``, whether any was a string)."""
    if isinstance(texts, str):
        raise CalibrationError("texts is one string; pass an iterable of strings, as in [text]")
    pieces: list[Tensor] = []
    strings = False
    count = 0
    for text in [texts] if isinstance(texts, Tensor) else texts:
        strings = strings or isinstance(text, str)
        ids = _token_ids(text, tokenizer)
        pieces.append(ids)
        count += ids.numel()
        if wanted is not None and count >= wanted:
            break
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    return stream, strings


def _token_ids(text: str | Tensor, tokenizer: Any | None) -> Tensor:
    if isinstance(text, Tensor):
        if text.is_floating_point() or text.dim() > 2:
            raise CalibrationError(
                f"token ids are integers [n], got {text.dtype} of shape {tuple(text.shape)}"
            )
        return text.flatten().to("cpu", torch.int64)
    if not isinstance(text, str):
        raise CalibrationError(f"texts must be strings or token ids, got {type(text).__name__}")
    if tokenizer is None:
        raise CalibrationError("text needs a tokenizer: pass tokenizer=, or texts as token ids")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    end = getattr(tokenizer, "eos_token_id", None)
    if ids and end is not None:
        ids = [*ids, end]
    return torch.tensor(ids, dtype=torch.int64)
