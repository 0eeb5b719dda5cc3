"""Perplexity of a causal language model on token windows."""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wina.allocation import Measurements
from wina.api import sparsify
from wina.bench.machine import machine_card
from wina.decoding.head import AUTO, read_rounded
from wina.decoding.head import head_dtype as chosen_head
from wina.errors import ConfigError, WinaError
from wina.eval.columns import BACKEND, columns_of
from wina.eval.grid import fingerprint, versions
from wina.files import read_json
from wina.inspection import inspect, measure_sparsity
from wina.patch import is_patched, restore
from wina.prefill import parse_prefill
from wina.progress import progress
from wina.rotation import rotated
from wina.switches import prefill_protocol
from wina.texts import bundled, default_texts, digest, to_windows

# Tokens whose logits are widened to float32 at once: all of a text's would be gigabytes, which
# take longer to come by than to add up.
_AT_ONCE = 16


@dataclass(frozen=True)
class Perplexity:
    """What was measured on a text.

    Attributes:
        nats: mean negative log-likelihood per predicted token.
        tokens: number of predicted tokens.
        realised: share of projection weights skipped by the tokens that were sparse; 0 if dense.
        by_projection: that of each projection, by name; empty if dense.
        extra_bytes: what such a token reads for corrections and rotations.
    """

    nats: float
    tokens: int
    realised: float
    by_projection: Mapping[str, float] = field(default_factory=dict)
    extra_bytes: int = 0

    @property
    def perplexity(self) -> float:
        """exp(nats)."""
        return math.exp(self.nats)


def perplexity(
    model: nn.Module,
    windows: Tensor,
    prefill: str = "all",
    sink_tokens: int = 2,
    batch: int = 2,
    title: str = "perplexity",
    show_progress: bool = True,
) -> Perplexity:
    """Score every window on its own, each token given the ones before it in the window.

    Args:
        model: dense or sparsified decoder.
        windows: token ids [windows, S].
        prefill: protocol for a sparsified model: which tokens of a window are sparse.
        sink_tokens: first tokens of each window that stay dense.
        batch: windows in one forward pass.
        title: of the progress bar.
        show_progress: draw it.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    with ExitStack() as stack:
        counter = None
        if is_patched(model):
            stack.enter_context(prefill_protocol(model, parse_prefill(prefill, sink_tokens)))
            counter = stack.enter_context(measure_sparsity(model))
        stack.enter_context(torch.no_grad())
        advance = stack.enter_context(progress(title, len(windows), show_progress))
        for ids in windows.split(batch):
            ids = ids.to(device)
            output: Any = model(input_ids=ids, use_cache=False)
            total += nats_of(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            count += ids[:, 1:].numel()
            advance(len(ids))
    if counter is None:
        return Perplexity(total / count, count, 0.0)
    return Perplexity(
        total / count, count, counter.mean, counter.by_projection, inspect(model).extra_bytes
    )


def strided_windows(
    stream: Tensor, window: int, stride: int, begin: Tensor | None = None
) -> list[tuple[Tensor, int]]:
    """Cut a text into windows that each bring ``stride`` new tokens.

    Args:
        stream: token ids [n].
        window: tokens in a window; the last one may be shorter.
        stride: from the start of a window to the start of the next. At ``window`` they are
            disjoint, and the first token of each is not predicted; below it they overlap, and the
            tokens that a window shares with the one before are context only.
        begin: token ids [p] with which every window begins, never scored
            (:func:`wina.texts.opening`); the first token of the text is predicted from them.

    Returns:
        (token ids, number of predictions to score, the last ones) of every window.
    """
    if not 1 <= stride <= window or window < 2:
        raise ConfigError(f"stride ({stride}) lies between 1 and the window ({window}), at least 2")
    begin = stream[:0] if begin is None else begin
    room = window - len(begin)
    if room < 1:
        raise ConfigError(f"a window of {window} tokens has no room behind the first {len(begin)}")
    windows = []
    done = 0
    for start in range(0, len(stream), min(stride, room)):
        ids = torch.cat([begin, stream[start : start + room]])
        end = min(start + room, len(stream))
        scored = min(end - done, len(ids) - 1)
        if scored < 1:
            break
        windows.append((ids, scored))
        done = end
        if done == len(stream):
            break
    return windows


def nats_of(logits: Tensor, ids: Tensor) -> float:
    """Sum of the negative log-likelihoods of token ids [T] under logits [T, vocabulary]."""
    pieces = zip(logits.split(_AT_ONCE), ids.split(_AT_ONCE), strict=True)
    losses = [F.cross_entropy(some.float(), wanted, reduction="sum") for some, wanted in pieces]
    return float(torch.stack(losses).sum(dtype=torch.float64))


def score_windows(
    model: nn.Module,
    windows: Sequence[tuple[Tensor, int]],
    logits_of: Callable[[Tensor], Tensor] | None = None,
) -> list[float]:
    """Mean negative log-likelihood in nats of the scored predictions of each window.

    Args:
        model: dense or sparsified decoder.
        windows: see :func:`strided_windows`.
        logits_of: gives the model's logits [S, vocabulary] of token ids [1, S], where a caller
            wants more of them.
    """
    device = next(model.parameters()).device

    def plain(batch: Tensor) -> Tensor:
        output: Any = model(input_ids=batch, use_cache=False)
        logits: Tensor = output.logits[0]
        return logits

    nats = []
    with torch.no_grad():
        for ids, scored in windows:
            batch = ids.unsqueeze(0).to(device)
            logits = (logits_of or plain)(batch)[-scored - 1 : -1]
            nats.append(nats_of(logits, batch[0, -scored:]) / scored)
    return nats


def compare(
    model: nn.Module,
    tokenizer: Any,
    methods: Sequence[str],
    sparsities: Sequence[float],
    texts: Iterable[str] | None = None,
    calibration: Sequence[str] | None = None,
    tokens: int | None = None,
    window: int = 512,
    prefill: str = "all",
    settings: Mapping[str, Any] | None = None,
    show_progress: bool = True,
    head_dtype: str = AUTO,
    after_row: Callable[[list[dict[str, Any]]], object] | None = None,
    known: Sequence[Mapping[str, Any]] = (),
    measurements: Measurements | None = None,
) -> list[dict[str, Any]]:
    """Perplexity of every method at every sparsity, calibrated on another text.

    Args:
        model: a dense decoder, dense again afterwards.
        tokenizer: the model's.
        methods: names of :data:`wina.methods.METHODS`, each with settings of its own where wanted,
            see :func:`wina.eval.columns.columns_of`; ``"dense"`` is always measured.
        sparsities: shares of input channels to drop.
        texts: what to score; the bundled held-out text by default.
        calibration: what to calibrate on; the bundled calibration text by default.
        tokens: score at most this many.
        window: tokens in one window.
        prefill: which tokens of a window are sparse.
        settings: further fields of :class:`SparsityConfig`.
        show_progress: draw progress bars on stderr.
        head_dtype: of the sparse models' head, as :func:`wina.decode` reads it.
        after_row: gets the rows so far whenever there is one more.
        known: rows that are not to be measured again, unless their method was made of other parts.
        measurements: where those of allocations are kept; in memory by default.

    Returns:
        Rows of {method, sparsity, realised_bytes_sparsity, perplexity, nats_over_dense,
        extra_bytes, tokens, parts}: the known ones, then those that are new. ``parts`` is
        :meth:`SparsityConfig.parts`, what the method's name stood for.
    """
    windows = to_windows(bundled("heldout") if texts is None else texts, tokenizer, window, tokens)
    columns = columns_of(methods, sparsities, settings or {})
    current = {(c.label, c.sparsity): c.config.parts() for c in columns if c.config is not None}

    def is_current(row: Mapping[str, Any]) -> bool:
        parts = current.get((row["method"], row["sparsity"]))
        return parts is None or row.get("parts") == parts

    rows = [dict(row) for row in known if is_current(row)]
    measured = {(row["method"], row["sparsity"]): row for row in rows}
    tell = after_row or (lambda _: None)
    if ("dense", 0.0) not in measured:
        scored = perplexity(model, windows, title="scoring dense", show_progress=show_progress)
        rows.append(_row("dense", 0.0, scored, scored.nats))
        tell(rows)
    dense = math.log(next(row for row in rows if row["method"] == "dense")["perplexity"])
    left = [
        (column.label, column.config)
        for column in columns
        if column.config is not None and (column.label, column.sparsity) not in measured
    ]
    if measurements is None:
        measurements = Measurements(max((config.sparsity for _, config in left), default=0.0))
    for label, config in left:
        with rotated(model, config.rotation_spec, tokenizer, show_progress):
            sparsify(
                model, config, tokenizer=tokenizer, texts=calibration, keep_original=True,
                backend=BACKEND, measurements=measurements, show_progress=show_progress,
            )  # fmt: skip
            try:
                title = f"scoring {label} at {config.sparsity:.0%}"
                with read_rounded(model, chosen_head(model, head_dtype)):
                    scored = perplexity(
                        model, windows, prefill, config.sink_tokens, title=title,
                        show_progress=show_progress,
                    )  # fmt: skip
            finally:
                restore(model)
        row = _row(label, config.sparsity, scored, dense)
        rows.append({**row, "parts": config.parts()})
        tell(rows)
        if show_progress:
            Console(stderr=True).print(
                f"{label} at {config.sparsity:.0%}: perplexity {scored.perplexity:.3f}, "
                f"realised {scored.realised:.4f}",
                highlight=False,
            )
    return rows


def _row(method: str, sparsity: float, scored: Perplexity, dense_nats: float) -> dict[str, Any]:
    return {
        "method": method,
        "sparsity": sparsity,
        "realised_bytes_sparsity": scored.realised,
        "perplexity": scored.perplexity,
        "nats_over_dense": scored.nats - dense_nats,
        "extra_bytes": scored.extra_bytes,
        "tokens": scored.tokens,
    }


def identity_of(
    model: nn.Module,
    texts: Sequence[str] | None,
    calibration: Sequence[str] | None,
    settings: Mapping[str, Any],
) -> str:
    """A digest of all that the rows of :func:`compare` depend on beside method and sparsity."""

    facts = {
        "model": fingerprint(model),
        "text": digest(bundled("heldout") if texts is None else texts),
        "calibration": digest(default_texts(learns=True) if calibration is None else calibration),
        "settings": dict(settings),
        "versions": versions(),
    }
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


def saved_rows(path: Path, identity: str) -> list[dict[str, Any]]:
    """The rows of a saved comparison with this identity; none where there is no such file.

    Raises:
        WinaError: the file holds something else, which would be overwritten.
    """
    if not path.exists():
        return []
    document = read_json(path)
    if not isinstance(document, dict) or document.get("identity") != identity:
        raise WinaError(
            f"{path} holds a comparison of another model, text, version or setting: choose another "
            "--output, or remove it"
        )
    rows: list[dict[str, Any]] = document["rows"]
    return rows


def print_comparison(
    title: str, rows: Sequence[dict[str, Any]], prefill: str, identity: str
) -> None:
    """A table for people, then the JSON line."""
    table = Table(title=f"{title}: perplexity, prefill {prefill}, {rows[0]['tokens']} tokens")
    for column in (
        "method",
        "sparsity",
        "realised",
        "extra bytes",
        "perplexity",
        "nats over dense",
    ):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["method"], f"{row['sparsity']:.2f}", f"{row['realised_bytes_sparsity']:.4f}",
            f"{row['extra_bytes']:,}",
            f"{row['perplexity']:.3f}", f"{row['nats_over_dense']:.4f}",
        )  # fmt: skip
    Console(width=100).print(table)
    print(json.dumps(comparison_document(title, rows, identity)))


def comparison_document(
    title: str, rows: Sequence[dict[str, Any]], identity: str
) -> dict[str, Any]:
    """What is printed last, and saved: the rows, what they are of, the machine, the command."""
    return {
        "model": title,
        "rows": list(rows),
        "identity": identity,
        "machine": machine_card(),
        "command": " ".join(["wina", *sys.argv[1:]]),
    }
