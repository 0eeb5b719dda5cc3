"""Decode at batch 1 in other engines and in ours, in turn."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from wina.bench.peers.process import EngineProcess
from wina.bench.peers.registry import OURS, PEERS, WIDTHS, Peer, own_options
from wina.bench.peers.workshop import Workshop
from wina.bench.timing import FULL, Effort, Timing, claim, compare, interleave
from wina.errors import ConfigError

# Wrong weights give the right token now and then.
LEAST_AGREEMENT = 0.5


@dataclass(frozen=True)
class Contest:
    """Who is measured, and on what.

    Attributes:
        peers: names of :data:`wina.bench.peers.registry.PEERS`.
        widths: names of :data:`wina.bench.peers.registry.WIDTHS`; engines without one sit it out.
        method: of :data:`wina.methods.METHODS`, for our engine, maybe with settings of its own.
        sparsities: of our engine.
        context: tokens of the prompt.
        new_tokens: to generate.
        threads: of every engine.
        calibration_tokens: for our plans.
    """

    peers: Sequence[str] = tuple(PEERS)
    widths: Sequence[str] = ("bf16", "q8_0", "q4_0")
    method: str = "wina"
    sparsities: Sequence[float] = (0.5,)
    context: int = 16
    new_tokens: int = 128
    threads: int = 2
    calibration_tokens: int = 2048

    def __post_init__(self) -> None:
        if self.new_tokens < 3:
            raise ConfigError("new_tokens is at least 3: a first one, and two to time")
        if self.context < 1 or self.threads < 1:
            raise ConfigError("context and threads are counted from 1")
        for name in self.peers:
            PEERS[name]
        for name in self.widths:
            WIDTHS[name]


@dataclass
class Outcome:
    """Of :func:`bench_peers`.

    Attributes:
        rows: see there.
        missing: [{engine, reason}] of peers that are not installed.
        wrong: [{engine, dtype, reason}] of peers that were not timed since their tokens are not the
            model's.
    """

    rows: list[dict[str, Any]] = field(default_factory=list)
    missing: list[dict[str, str]] = field(default_factory=list)
    wrong: list[dict[str, str]] = field(default_factory=list)


@dataclass(frozen=True)
class _Contender:
    """One engine with one file: a row to be."""

    peer: Peer
    options: dict[str, Any]
    sparsity: float | None  # None: dense

    @property
    def label(self) -> str:
        return self.peer.title if self.sparsity is None else f"wina at {self.sparsity:.0%}"


def bench_peers(
    shop: Workshop, contest: Contest, python: str = sys.executable, effort: Effort = FULL,
    show_progress: bool = True, prepare_only: bool = False,
) -> Outcome:  # fmt: skip
    """Time greedy decode of dense peers and of our sparse engine, interleaved, width by width.

    Before it is timed, a peer has to find the tokens that follow some prompts as the model itself
    does (where the width lets it): a file written wrongly is as fast as a right one.

    Args:
        shop: the model.
        contest: who and what.
        python: interpreter that has the peers' packages.
        effort: how many rounds.
        show_progress: draw progress on stderr.
        prepare_only: make the files and plans, and measure nothing.

    Returns:
        Rows of {engine, version, method, sparsity, dtype, context, new_tokens, threads,
        tokens_per_s, ms_per_step, agreement, speedup_vs_peers, speedup_vs_best_peer, low, high,
        uncertainty, rounds, verdict, spread}; ``speedup_vs_peers`` maps the peers of the same
        width to ratios, and low and high bound ``speedup_vs_best_peer``.
    """
    outcome = Outcome()
    present = []
    for name in contest.peers:
        reason = PEERS[name].missing(python)
        if reason is None:
            present.append(PEERS[name])
        else:
            outcome.missing.append({"engine": PEERS[name].title, "reason": reason})
    entries = {width: _contenders(shop, contest, present, width) for width in contest.widths}
    prompts, expected = shop.prompts(contest.context), shop.reference(contest.context)
    shop.release()
    if prepare_only:
        return outcome
    for width, contenders in entries.items():
        with ExitStack() as stack:
            running: dict[str, tuple[_Contender, EngineProcess, float]] = {}
            started = [
                (c, stack.enter_context(c.peer.start(python, c.options, contest.threads)))
                for c in contenders
            ]
            for contender, process in started:
                found = [process.generate(prompt, 2).tokens[:1] for prompt in prompts]
                right = sum(f == (e,) for f, e in zip(found, expected, strict=True)) / len(prompts)
                if WIDTHS[width].exact and right < LEAST_AGREEMENT:
                    reason = f"its next token is the model's after {right:.0%} of the prompts"
                    outcome.wrong.append(
                        {"engine": contender.peer.title, "dtype": width, "reason": reason}
                    )
                    process.close()
                else:
                    running[contender.label] = (contender, process, right)
            times = interleave(
                {
                    label: _run(process, prompts[0], contest.new_tokens)
                    for label, (_, process, _) in running.items()
                },
                effort.rounds,
                f"decoding in {width}",
                show_progress,
            )
            outcome.rows += _rows(running, times, contest, width, effort)
    return outcome


def _contenders(
    shop: Workshop, contest: Contest, peers: Sequence[Peer], width: str
) -> list[_Contender]:
    dense = [
        _Contender(peer, peer.prepare(shop, peer.forms[width]), None)
        for peer in peers
        if width in peer.forms
    ]
    sparse = [
        _Contender(
            OURS,
            own_options(shop, width, contest.method, sparsity, contest.calibration_tokens),
            sparsity,
        )
        for sparsity in contest.sparsities
    ]
    return dense + sparse


def _run(process: EngineProcess, prompt: Sequence[int], new_tokens: int) -> Callable[[], float]:
    return lambda: process.generate(prompt, new_tokens).seconds_per_token


def _rows(
    running: dict[str, tuple[_Contender, EngineProcess, float]],
    times: dict[str, Timing],
    contest: Contest,
    width: str,
    effort: Effort,
) -> list[dict[str, Any]]:
    dense = {label: times[label] for label, (c, _, _) in running.items() if c.sparsity is None}
    best = min(dense, key=lambda label: dense[label].median, default=None)
    rows = []
    for label, (contender, process, agreement) in running.items():
        own = times[label]
        row = {
            "engine": contender.peer.title,
            "version": process.version,
            "method": "dense" if contender.sparsity is None else contest.method,
            "sparsity": contender.sparsity or 0.0,
            "dtype": width,
            "context": contest.context,
            "new_tokens": contest.new_tokens,
            "threads": contest.threads,
            "tokens_per_s": 1.0 / own.median,
            "ms_per_step": own.median * 1e3,
            "agreement": agreement,
            "speedup_vs_peers": {
                peer: compare(theirs, own).ratio for peer, theirs in dense.items() if peer != label
            },
            "speedup_vs_best_peer": None,
            "spread": own.spread,
        }
        if best is not None:
            against = compare(dense[best], own)
            row["speedup_vs_best_peer"] = against.ratio
            row.update(claim(against, effort))
        rows.append(row)
    return rows
