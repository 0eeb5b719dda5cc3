"""Checkpoint + text → plan.

The work is done inside one forward pass of the decoder. When a projection is about to run, its
scores over all calibration tokens are counted, its cut-off is read off the histogram, and its
inputs are masked with it at once; so whatever runs later sees what the sparse model will produce
("sequential" statistics), and the realised sparsity is the one asked for. With "dense" statistics
the inputs are not masked.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from wina.allocation import Problem, Uniform, Unit
from wina.config import SparsityConfig
from wina.errors import CalibrationError, PatchStateError
from wina.plan import ProjectionPlan, SparsityPlan, weight_sample
from wina.prefill import Prefill
from wina.progress import Advance, progress
from wina.projections import (
    Projection,
    decoder_of,
    dense_modules,
    find_projections,
    group_members,
    model_type_of,
)
from wina.scores import ChannelScores, rounded
from wina.statistics import ScoreHistogram
from wina.texts import bundled, to_windows

logger = logging.getLogger(__name__)

# Dense modules of a smaller share of the blocks' weights, such as routers, are not worth a warning.
_MENTIONED = 0.01

# Tokens whose activations are alive at once. More calibration tokens than this are taken in
# several passes, at first with cut-offs from the first chunk.
CHUNK_TOKENS = 16384


def calibrate(
    model: nn.Module,
    tokenizer: Any | None = None,
    config: SparsityConfig | None = None,
    texts: Iterable[str] | Iterable[Tensor] | Tensor | None = None,
    show_progress: bool = True,
) -> SparsityPlan:
    """Find the thresholds of every projection.

    Args:
        model: a dense decoder of transformers. It is run, never changed.
        tokenizer: its tokenizer; not needed when ``texts`` are token ids.
        config: defaults to ``SparsityConfig()``.
        texts: strings, a column of a dataset, or token ids; the bundled text by default.
        show_progress: draw a progress bar on stderr.

    Returns:
        The plan for :func:`wina.sparsify`.

    Raises:
        UnsupportedModelError: a module does not fit; the message names it.
        CalibrationError: the text is too short, or a projection received NaN or Inf.
        PatchStateError: the model is sparsified already.
    """
    config = config or SparsityConfig()
    if hasattr(model, "_wina_patch"):
        raise PatchStateError(
            "the model is sparsified: call wina.restore(model) before calibrating"
        )
    projections = find_projections(model)
    _tell_what_stays_dense(model, projections)
    windows = to_windows(
        bundled("calibration") if texts is None else texts,
        tokenizer,
        config.window,
        config.calibration_tokens,
    )
    if windows.shape[1] <= config.sink_tokens + 1:
        raise CalibrationError(f"the text is too short: {windows.numel()} tokens")
    units = _units(projections, config)
    scores = _scores(model, units, config)

    def run(sparsities: Mapping[str, float], title: str, show: bool) -> dict[str, ProjectionPlan]:
        calibrator = _Calibrator(model, projections, scores, sparsities, config)
        return calibrator.run(windows, title, show)

    def thresholds(sparsities: Mapping[str, float]) -> dict[str, Tensor]:
        layers = run(problem.by_projection(sparsities), "", show=False)
        return {name: layer.threshold for name, layer in layers.items()}

    problem = Problem(
        units=units,
        sparsity=config.sparsity,
        model=model,
        windows=windows,
        scores=scores,
        sink_tokens=config.sink_tokens,
        thresholds=thresholds,
        show_progress=show_progress,
    )
    allocation = config.make_allocation() if config.sparsity else Uniform()
    sparsities = problem.by_projection(allocation.allocate(problem))
    title = f"calibrating {config.method} at {config.sparsity:.0%}"
    return SparsityPlan(
        config=config,
        model_type=model_type_of(model),
        calibration={
            "text": "bundled" if texts is None else "given by the user",
            "tokens": windows.numel(),
            "criterion": config.criterion_spec,
            "allocation": config.allocation_spec,
        },
        layers=run(sparsities, title, show_progress),
    )


def _tell_what_stays_dense(model: nn.Module, projections: Sequence[Projection]) -> None:
    dense = dense_modules(model)
    weights = sum(module.weights for module in dense)
    share = weights / (weights + sum(projection.weights for projection in projections))
    if share > _MENTIONED:
        logger.warning(
            "%.0f%% of the weights of the blocks stay dense: %s %s (all: wina.inspect(model))",
            100 * share, dense[0].name, dense[0].reason,
        )  # fmt: skip


def _units(projections: Sequence[Projection], config: SparsityConfig) -> list[Unit]:
    """What gets one sparsity: every projection, or every group where groups share a mask."""
    if config.mask == "projection":
        return [Unit(projection.name, (projection,)) for projection in projections]
    return [Unit(name, tuple(members)) for name, members in group_members(projections).items()]


def _scores(
    model: nn.Module, units: Sequence[Unit], config: SparsityConfig
) -> dict[str, ChannelScores]:
    """Projection name → its scores; the projections of one unit share the constants."""
    found = {}
    for unit in units:
        modules = [model.get_submodule(projection.name) for projection in unit.projections]
        shared = ChannelScores(
            weights=[module.weight for module in modules],  # type: ignore[misc]
            criterion=config.make_criterion(),
            selector=config.make_selector(),
            seed=config.seed + zlib.crc32(unit.name.encode()),
            weight_dtype=config.weight_dtype,
        )
        found.update({projection.name: shared for projection in unit.projections})
    return found


class _Calibrator:
    def __init__(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        scores: Mapping[str, ChannelScores],
        sparsities: Mapping[str, float],
        config: SparsityConfig,
    ) -> None:
        self.decoder = decoder_of(model)
        self.layers = {}
        for projection in projections:
            module = model.get_submodule(projection.name)
            assert isinstance(module, nn.Linear)
            name = projection.name
            self.layers[name] = _Layer(projection, module, scores[name], sparsities[name], config)

    def run(self, windows: Tensor, title: str, show_progress: bool) -> dict[str, ProjectionPlan]:
        chunks = windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))
        passes = 1 if len(chunks) == 1 else 1 + len(chunks)
        with progress(title, passes * len(self.layers), show_progress) as advance:
            self._forward(chunks[0], advance)
            if len(chunks) > 1:
                for layer in self.layers.values():
                    layer.restart_statistics()
                for chunk in chunks:
                    self._forward(chunk, advance)
                for layer in self.layers.values():
                    layer.set_cutoff()
        return {name: layer.plan() for name, layer in self.layers.items()}

    def _forward(self, windows: Tensor, advance: Advance) -> None:
        def before(layer: _Layer) -> Any:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                masked = layer.see(arguments[0])
                layer.round_weight()
                advance()
                return (masked, *arguments[1:])

            return hook

        def after(layer: _Layer) -> Any:
            return lambda *_: layer.put_back()

        handles = []
        for layer in self.layers.values():
            handles += [
                layer.module.register_forward_pre_hook(before(layer)),
                layer.module.register_forward_hook(after(layer)),
            ]
        training = self.decoder.training
        device = next(self.decoder.parameters()).device
        self.decoder.eval()
        try:
            with torch.no_grad():
                self.decoder(input_ids=windows.to(device), use_cache=False)
        finally:
            self.decoder.train(training)
            for handle in handles:
                handle.remove()
            for layer in self.layers.values():
                layer.put_back()


class _Layer:
    """One projection while it is calibrated."""

    def __init__(
        self,
        projection: Projection,
        module: nn.Linear,
        scores: ChannelScores,
        sparsity: float,
        config: SparsityConfig,
    ) -> None:
        self.projection = projection
        self.module = module
        self.scores = scores
        self.sparsity = sparsity
        self.prefill = Prefill(1.0, config.sink_tokens)
        self.sequential = config.statistics == "sequential"
        self.weight_dtype = config.weight_dtype
        self.original: Tensor | None = None
        self.histogram = ScoreHistogram()
        self.threshold: Tensor | None = None
        self.cutoff = 0.0
        self.dropped = 0

    def round_weight(self) -> None:
        """Let the module compute with the weight that it will have, until :meth:`put_back`."""
        if self.weight_dtype is not None:
            self.original = self.module.weight.data
            self.module.weight.data = rounded(self.original, self.weight_dtype)

    def put_back(self) -> None:
        """Give the module its own weight again, the very same tensor."""
        if self.original is not None:
            self.module.weight.data = self.original
            self.original = None

    def see(self, x: Tensor) -> Tensor:
        """Count the scores of inputs [B, S, K]; return them masked with the current cut-off."""
        start = self.prefill.start(x.shape[-2])
        tokens = x[..., start:, :]
        try:
            self.scores.count(self.histogram, tokens, self.sparsity)
        except CalibrationError as error:
            raise CalibrationError(f"{self.projection.name}: {error}") from None
        if self.threshold is None:
            self.set_cutoff()
        assert self.threshold is not None
        keep = self.scores.keep(tokens, self.threshold, self.sparsity)
        self.dropped += int((~keep).sum())
        if not self.sequential:
            return x
        return torch.cat([x[..., :start, :], torch.where(keep, tokens, 0.0)], dim=-2)

    def set_cutoff(self) -> None:
        """Take the cut-off from the scores counted so far."""
        self.cutoff = self.scores.cutoff(self.histogram, self.sparsity)
        self.threshold = self.scores.threshold(self.cutoff)

    def restart_statistics(self) -> None:
        """Forget the counts, keep the cut-off: it stays in use until :meth:`set_cutoff`."""
        self.histogram = ScoreHistogram()
        self.dropped = 0

    def plan(self) -> ProjectionPlan:
        assert self.threshold is not None
        total = self.histogram.total
        return ProjectionPlan(
            projection=self.projection,
            sparsity=self.sparsity,
            realised=self.dropped / total if total else 0.0,
            cutoff=self.cutoff,
            threshold=self.threshold.cpu(),
            sample=weight_sample(self.module.weight),
        )
