"""Which words of a text differ from a reference."""

from __future__ import annotations

import re
from collections.abc import Iterator
from difflib import SequenceMatcher

# Scripts without spaces are compared character by character.
_WORDS = re.compile(r"\s+|[⺀-鿿가-힯]|[^\s⺀-鿿가-힯]+")


def segments(reference: str, text: str) -> list[tuple[bool, str]]:
    """Split a text into (differs from the reference, words), in order; joined they are the text."""
    merged: list[tuple[bool, str]] = []
    for differs, part in _parts(_WORDS.findall(reference), _WORDS.findall(text)):
        if merged and merged[-1][0] == differs:
            merged[-1] = differs, merged[-1][1] + part
        elif part:
            merged.append((differs, part))
    return merged


def _parts(reference: list[str], words: list[str]) -> Iterator[tuple[bool, str]]:
    matcher = SequenceMatcher(None, reference, words, autojunk=False)
    for operation, _, _, start, end in matcher.get_opcodes():
        yield operation != "equal", "".join(words[start:end])
