"""Prefill protocols: which tokens of a forward pass with several tokens are sparse.

Decode, one token at a time, is always sparse. While a prompt is read or a text is scored, papers
differ: TEAL sparsifies the last 50 % of the tokens, WINA the last 99 %, LaRoSA all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wina.errors import ConfigError, UnknownNameError
from wina.registry import split_spec

PADDING = ("left", "right")


@dataclass(frozen=True)
class Prefill:
    """The share of a sequence, counted from its end, whose tokens are sparse.

    Attributes:
        share: 0 keeps prefill dense, 1 makes it sparse.
        sink_tokens: the first tokens of a sequence stay dense whatever the share: they are
            attention sinks with massive activations.
    """

    share: float
    sink_tokens: int

    def start(self, length: int) -> int:
        """Index of the first sparse token in a sequence of ``length`` tokens.

        A single token is a decode step, and sparse.
        """
        if length <= 1:
            return 0
        return max(min(self.sink_tokens, length), length - round(self.share * length))

    def sparse_tokens(self, lengths: Sequence[int], size: int, padding: str) -> Tensor:
        """Which tokens of a padded batch are sparse: those that would be without the padding.

        Args:
            lengths: tokens of each row without its padding.
            size: tokens of each row with it.
            padding: ``"left"`` or ``"right"``.

        Returns:
            Boolean [rows, size]; False for the padding.

        Raises:
            ConfigError: another side, or a row that is empty or longer than ``size``.
        """
        if padding not in PADDING:
            raise ConfigError(f"padding {padding!r} is not known. Known: {', '.join(PADDING)}.")
        if not lengths or min(lengths) < 1 or max(lengths) > size:
            raise ConfigError(f"rows of {list(lengths)} tokens do not fit into {size} tokens")
        sparse = torch.zeros(len(lengths), size, dtype=torch.bool)
        for row, length in zip(sparse, lengths, strict=True):
            first = size - length if padding == "left" else 0
            row[first + self.start(length) : first + length] = True
        return sparse


def parse_prefill(spec: str, sink_tokens: int) -> Prefill:
    """``"dense"``, ``"all"`` or ``"last:f"`` with 0 < f ≤ 1.

    Raises:
        UnknownNameError: another word.
        ConfigError: f is missing or out of range.
    """
    name, number = split_spec("prefill protocol", spec)
    if name == "dense" and number is None:
        return Prefill(0.0, sink_tokens)
    if name == "all" and number is None:
        return Prefill(1.0, sink_tokens)
    if name == "last":
        if number is None or not 0.0 < number <= 1.0:
            raise ConfigError(f"prefill {spec!r}: write the share as in 'last:0.5', in (0, 1]")
        return Prefill(number, sink_tokens)
    raise UnknownNameError(f"unknown prefill protocol {spec!r}. Known: dense, all, last:<share>.")
