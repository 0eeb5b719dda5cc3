"""Texts to calibrate and to evaluate on, and their way into token windows."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor

from wina.errors import CalibrationError

DOCUMENT_MARK = "<|doc|>"


def bundled(name: str) -> list[str]:
    """Documents of a bundled text: ``"calibration"`` or ``"heldout"`` (``wina/data/README.md``)."""
    text = files("wina").joinpath("data", f"{name}.txt").read_text(encoding="utf-8")
    return [document.strip() for document in text.split(DOCUMENT_MARK)]


def to_windows(
    texts: Iterable[str] | Iterable[Tensor] | Tensor,
    tokenizer: Any | None,
    window: int,
    tokens: int | None = None,
) -> Tensor:
    """Cut texts into sequences of equal length.

    Documents are joined, each ended by the tokenizer's end-of-sequence token where it has one. If
    there are more tokens than asked for, the windows are taken evenly from the whole text.

    Args:
        texts: strings, or token ids [n] (one tensor or several), which need no tokenizer.
        tokenizer: of transformers.
        window: tokens in one sequence.
        tokens: upper bound of tokens to use, None for all.

    Returns:
        int64 [windows, window]. A text shorter than one window gives one shorter sequence.

    Raises:
        CalibrationError: fewer than 16 tokens.
    """
    if isinstance(texts, str):
        raise CalibrationError("texts is one string; pass an iterable of strings, as in [text]")
    pieces: list[Tensor] = []
    # A stream may be endless: read ahead of what is asked for by a factor that leaves a choice.
    wanted = None if tokens is None else 4 * max(tokens, window)
    count = 0
    for text in [texts] if isinstance(texts, Tensor) else texts:
        ids = _token_ids(text, tokenizer)
        pieces.append(ids)
        count += ids.numel()
        if wanted is not None and count >= wanted:
            break
    stream = torch.cat(pieces) if pieces else torch.empty(0, dtype=torch.int64)
    if stream.numel() < 16:
        raise CalibrationError(
            f"the text has {stream.numel()} tokens; at least 16 are needed, and thousands are "
            "better"
        )
    if stream.numel() < window:
        return stream.unsqueeze(0)
    windows = stream[: stream.numel() // window * window].view(-1, window)
    limit = len(windows) if tokens is None else max(1, tokens // window)
    if len(windows) > limit:
        pick = torch.linspace(0, len(windows) - 1, limit).round().to(torch.int64)
        windows = windows[pick]
    return windows


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
