"""Width, sparsity and method for a budget of bytes or of loss, from a short calibration."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import nn

from wina.allocation import Measurements
from wina.api import sparsify
from wina.calibration import calibrate
from wina.config import SparsityConfig, settings_of
from wina.decoding.head import read_rounded, usual_head
from wina.errors import ConfigError
from wina.eval.costs import TokenCosts
from wina.eval.frontier import LOADED
from wina.eval.perplexity import perplexity
from wina.kernels.quantization import WEIGHT_DTYPES
from wina.patch import restore
from wina.progress import progress
from wina.rotation import NO_ROTATION, rotated
from wina.texts import bundled, to_windows

# Sparsities that are tried: below the first the kernels save nothing worth the loss, above the
# last no method is known to be useful.
LEAST, MOST = 0.1, 0.8
# How far a choice may miss a budget of bytes, as realised sparsity drifts with the text.
_SLACK = 0.01
# A bound on the loss is met from this part of it on, or where the sparsity is known to _NEAR.
_MET = 0.9
_NEAR = 0.01


@dataclass(frozen=True)
class Expectation:
    """What a choice is expected to cost and to lose.

    Attributes:
        method: a name of :data:`wina.methods.METHODS`, maybe with settings of its own.
        width: ``"loaded"`` or a key of :data:`WEIGHT_DTYPES`.
        sparsity: to ask for.
        realised: share of projection weights skipped on held-out text.
        share: of the dense model's bytes that a token reads.
        nats_over_dense: loss on held-out text.
    """

    method: str
    width: str
    sparsity: float
    realised: float
    share: float
    nats_over_dense: float

    @property
    def settings(self) -> dict[str, Any]:
        """Fields of :class:`SparsityConfig`."""
        found = _settings(self.method, self.width, round(self.sparsity, 4))
        return {name: value for name, value in found.items() if value is not None}


def _settings(method: str, width: str, sparsity: float) -> dict[str, Any]:
    return {
        **settings_of(method),
        "sparsity": sparsity,
        "weight_dtype": None if width == LOADED else width,
    }


class Adviser:
    """Tries choices on held-out text.

    Args:
        model: a dense decoder; dense again after every trial.
        tokenizer: the model's.
        methods: to choose from, as of :func:`wina.eval.columns.columns_of`; ``"dense"`` (rounding
            alone) is always one.
        widths: ``"loaded"`` or keys of :data:`WEIGHT_DTYPES`.
        itemsize: see :class:`TokenCosts`.
        tokens: of calibration text and of held-out text.
        window: tokens in a window.
        show_progress: draw progress on stderr.
        texts: to calibrate on; the bundled calibration text by default.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        methods: Sequence[str],
        widths: Sequence[str] = (LOADED, *WEIGHT_DTYPES),
        itemsize: float | None = None,
        tokens: int = 2048,
        window: int = 512,
        show_progress: bool = True,
        texts: Sequence[str] | None = None,
    ) -> None:
        self.model = model
        self.texts = texts
        self.tokenizer = tokenizer
        self.methods = methods
        self.widths = widths
        self.costs = TokenCosts(model, itemsize)
        self.tokens = tokens
        self.window = window
        self.show_progress = show_progress
        self.windows = to_windows(bundled("heldout"), tokenizer, window, tokens)
        self.dense = perplexity(model, self.windows, show_progress=False).nats
        self.measurements = Measurements(MOST)
        self.tried: list[Expectation] = []

    def for_bytes(self, share: float) -> Expectation:
        """The least loss among choices that read at most this share of the dense model's bytes.

        Each width and method is tried at the sparsity that just meets the budget.
        """
        if not 0.0 < share <= 1.0:
            raise ConfigError(f"bytes are a share in (0, 1] of the dense model's, not {share:g}")
        for width in self.widths:
            if self.costs.sparsity_for(share, self._config("dense", width, 0.0)) <= 0.0:
                self._try("dense", width, 0.0)
                continue
            for method in self.methods:
                config = self._config(method, width, 0.0)
                wanted = max(LEAST, self.costs.sparsity_for(share, config))
                if wanted > MOST:
                    continue
                over = self._try(method, width, wanted).share - share
                # Corrections and rotations are read as well, and this text may skip less than
                # the calibration text.
                again = wanted + over / self.costs.share_of_projections(config)
                if over > _SLACK and again <= MOST:
                    self._try(method, width, again)
        fitting = [found for found in self.tried if found.share <= share + _SLACK]
        if not fitting:
            raise ConfigError(
                f"{share:.0%} of the bytes are out of reach: at a sparsity of {MOST:.0%} a token "
                f"reads {self._floor():.0%}, at the best of these widths and methods"
            )
        return min(fitting, key=lambda found: found.nats_over_dense)

    def for_loss(self, nats: float) -> Expectation:
        """The fewest bytes among choices that lose at most so many nats per token."""
        if nats < 0.0:
            raise ConfigError(f"a loss is not negative: {nats:g}")
        for width in sorted(self.widths, key=self._dense_share):
            if self._try("dense", width, 0.0).nats_over_dense > nats:
                continue
            for method in self.methods:
                self._search(method, width, nats)
        fitting = self._losing(nats)
        if not fitting:
            raise ConfigError(f"nothing loses at most {nats:g} nats per token")
        return min(fitting, key=lambda found: found.share)

    def _losing(self, nats: float) -> list[Expectation]:
        return [found for found in self.tried if found.nats_over_dense <= nats]

    def _search(self, method: str, width: str, nats: float) -> None:
        """Try sparsities up to where the loss reaches the bound.

        The first one is where fewer bytes are read than by the best so far. If too much is lost
        there already, nothing more is tried.
        """
        least = min(found.share for found in self._losing(nats))
        good = max(LEAST, self.costs.sparsity_for(least, self._config(method, width, 0.0)))
        if good > MOST or (here := self._try(method, width, good).nats_over_dense) > nats:
            return
        bad, there = MOST, math.inf
        side, times = 0, 0  # the end that moved last, and how often in a row
        while here < _MET * nats and bad - good > 2 * _NEAR:
            # An end that moves alone creeps towards the other: halving catches up.
            asked = (good + bad) / 2 if times > 1 else _between(good, here, bad, there, nats)
            loss = self._try(method, width, asked).nats_over_dense
            if loss <= nats:
                good, here, moved = asked, loss, 1
            else:
                bad, there, moved = asked, loss, -1
            side, times = moved, times + 1 if moved == side else 1

    def _dense_share(self, width: str) -> float:
        return self.costs.share(self.costs.at({}, self._config("dense", width, 0.0)))

    def _floor(self) -> float:
        """The least share that any choice reads."""
        shares = []
        for width in self.widths:
            for method in ("dense", *self.methods):
                config = self._config(method, width, 0.0)
                most = 0.0 if method == "dense" else MOST
                realised = {p.name: most for p in self.costs.projections(config)}
                shares.append(self.costs.share(self.costs.at(realised, config)))
        return min(shares)

    def _config(self, method: str, width: str, sparsity: float) -> SparsityConfig:
        own = {"calibration_tokens": self.tokens, "window": self.window}
        return SparsityConfig.from_dict({**_settings(method, width, sparsity), **own})

    def _patch(self, config: SparsityConfig) -> None:
        plan = calibrate(
            self.model, self.tokenizer, config, self.texts, show_progress=False,
            measurements=self.measurements,
        )  # fmt: skip
        sparsify(self.model, plan, backend="reference", keep_original=True, show_progress=False)

    def _try(self, method: str, width: str, sparsity: float) -> Expectation:
        if method == "dense" and width == LOADED:
            found = Expectation("dense", LOADED, 0.0, 0.0, 1.0, 0.0)
            self.tried.append(found)
            return found
        config = self._config(method, width, sparsity)
        title = f"trying {method}, {width}, {sparsity:.0%}"
        with (
            progress(title, 2, self.show_progress) as advance,
            rotated(self.model, config.rotation_spec, self.tokenizer, show_progress=False),
        ):
            self._patch(config)
            advance()
            try:
                with read_rounded(self.model, usual_head(config)):
                    scored = perplexity(self.model, self.windows, show_progress=False)
                realised = scored.by_projection if sparsity else {}
                read = self.costs.at(realised, config, scored.extra_bytes)
            finally:
                restore(self.model)
            advance()
        found = Expectation(
            method, width, sparsity, scored.realised if sparsity else 0.0,
            self.costs.share(read), scored.nats - self.dense,
        )  # fmt: skip
        self.tried.append(found)
        return found


def _between(good: float, here: float, bad: float, there: float, nats: float) -> float:
    """Where the loss should reach ``nats``: losses grow about exponentially with the sparsity.

    Args:
        good, here: a sparsity, and its loss, at most ``nats``.
        bad, there: a sparsity, and its loss, above ``nats``; inf if it was not measured.
    """
    part = 0.5
    if nats > 0.0 and math.isfinite(there):
        floor = max(here, nats / 100)  # what is lost at low sparsities may be nothing, or less
        part = math.log(nats / floor) / math.log(there / floor)
    return min(max(good + part * (bad - good), good + _NEAR), bad - _NEAR)


def print_recommendation(
    title: str, chosen: Expectation, tried: Sequence[Expectation], note: str
) -> None:
    """What was tried and what to take, for people, then the JSON line."""
    table = Table(title=title)
    for column in ("width", "method", "sparsity", "realised", "bytes of dense", "nats over dense"):
        left = column in ("width", "method")
        table.add_column(column, justify="left" if left else "right", no_wrap=True)
    for row in tried:
        table.add_row(
            row.width, row.method, f"{row.sparsity:.3f}", f"{row.realised:.3f}",
            f"{row.share:.3f}", f"{row.nats_over_dense:.4f}",
            style="bold" if row is chosen else None,
        )  # fmt: skip
    console = Console(width=110)
    console.print(table)
    settings = ", ".join(f"{name}={value!r}" for name, value in chosen.settings.items())
    rotation = SparsityConfig(**chosen.settings).rotation_spec
    if rotation != NO_ROTATION:
        console.print(f"first: wina.rotate(model, {rotation!r}, tokenizer=tokenizer)")
    console.print(f"take: wina.sparsify(model, tokenizer=tokenizer, {settings})", highlight=False)
    console.print(
        f"expect: {chosen.share:.1%} of the dense model's bytes per token and "
        f"{chosen.nats_over_dense:+.4f} nats per token on the held-out text",
        highlight=False,
    )
    if note and chosen.width != LOADED:
        console.print(note)
    print(
        json.dumps(
            {
                "settings": chosen.settings,
                "expected": asdict(chosen),
                "tried": [asdict(row) for row in tried],
                "note": note,
            }
        )
    )
