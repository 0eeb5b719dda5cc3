"""Checkpoint + text → plan.

An allocation policy divides the budget over the projections, one pass of the decoder
(:mod:`wina.calibrator`) finds their thresholds, and a refinement may move them together afterwards.
"""

from __future__ import annotations

import hashlib
import logging
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wina.allocation import Measurements, Problem, Uniform, Unit
from wina.calibrator import Calibrator
from wina.config import SparsityConfig
from wina.errors import CalibrationError, PatchStateError, UnsupportedModelError
from wina.experts import ROLES, ExpertsCalibrator, FusedExperts
from wina.importance import TokenImportance
from wina.kernels import cpu
from wina.methods import METHODS
from wina.offload import WeightsOf, is_offloaded, weight_of
from wina.plan import (
    ExpertsPlan,
    SparsityPlan,
    experts_sample,
    weight_sample,
)
from wina.planes import in_planes
from wina.projections import (
    Projection,
    check_mode,
    dense_modules,
    find_experts,
    find_head,
    find_projections,
    group_members,
    linear_of,
    model_type_of,
)
from wina.refinement import NO_REFINEMENT
from wina.refining import refine
from wina.rotation import check_rotation, rotation_of
from wina.scores import ChannelScores
from wina.texts import default_texts, digest, evenly, to_windows

logger = logging.getLogger(__name__)

# Dense modules of a smaller share of the blocks' weights, such as routers, are not worth a warning.
_MENTIONED = 0.01


def calibrate(
    model: nn.Module,
    tokenizer: Any | None = None,
    config: SparsityConfig | None = None,
    texts: Iterable[str] | Iterable[Tensor] | Tensor | None = None,
    show_progress: bool = True,
    measurements: Measurements | None = None,
    offloaded: bool = False,
) -> SparsityPlan:
    """Find the thresholds of every projection.

    Args:
        model: a dense decoder of transformers. It is run, never changed.
        tokenizer: its tokenizer; not needed when ``texts`` are token ids.
        config: defaults to ``SparsityConfig()``.
        texts: strings, a column of a dataset, or token ids; the bundled text by default, and more
            of it where a refinement learns from it.
        show_progress: draw a progress bar on stderr.
        measurements: where allocation policies keep what they measured, for calibrations of this
            model with this text at other sparsities and with other selectors, and where rounded
            weights are kept, for a calibration that was interrupted.
        offloaded: also calibrate projections whose weights accelerate brings in for every call (a
            ``device_map`` with ``cpu`` or ``disk``): for models larger than memory, one projection
            of which is there at a time, and one block for gradients. They cannot be sparsified
            where they are offloaded; the plan is for where the model fits.

    Returns:
        The plan for :func:`wina.sparsify`.

    Raises:
        UnsupportedModelError: a module does not fit; the message names it. Or the model is
            offloaded, and the config wants rounded weights or a refinement.
        CalibrationError: the text is too short, or a projection received NaN or Inf.
        PatchStateError: the model is sparsified already, or not rotated as the method wants it.
    """
    config = config or SparsityConfig()
    # Whatever the caller's surroundings are: gradients are taken here, in the model's own dtype.
    device = next(model.parameters()).device.type
    usual = device if torch.amp.is_autocast_available(device) else "cpu"  # of offloaded weights
    with torch.inference_mode(False), torch.autocast(usual, enabled=False):
        return _calibrate(model, tokenizer, config, texts, show_progress, measurements, offloaded)


def _calibrate(
    model: nn.Module,
    tokenizer: Any | None,
    config: SparsityConfig,
    texts: Iterable[str] | Iterable[Tensor] | Tensor | None,
    show_progress: bool,
    measurements: Measurements | None,
    offloaded: bool,
) -> SparsityPlan:
    """See :func:`calibrate`."""
    if hasattr(model, "_wina_patch"):
        raise PatchStateError(
            "the model is sparsified: call wina.restore(model) before calibrating"
        )
    check_mode(model)
    if next(model.parameters()).device.type == "cpu":
        cpu.load()  # what is counted and masked is one pass then
    check_rotation(model, config.rotation_spec)
    projections = find_projections(model, offloaded)
    if config.head == "sparse":
        projections.append(find_head(model))
    if offloaded:
        _check_offloaded(model, config)
    refinement = config.make_refinement()
    text = to_windows(
        default_texts(refinement.text > 0) if texts is None else texts,
        tokenizer,
        config.window,
        max(config.calibration_tokens, refinement.text),
    )
    _check_tokens(model, text)
    windows = evenly(text, config.calibration_tokens)
    if windows.shape[1] <= config.sink_tokens + 1:
        raise CalibrationError(f"the text is too short: {windows.numel()} tokens")
    _tell_what_stays_dense(model, offloaded, projections)
    calibration = _Calibration(model, config, projections, windows, measurements, show_progress)
    plan = calibration.plan("bundled" if texts is None else "given by the user")
    if config.refinement_spec == NO_REFINEMENT or config.sparsity == 0.0:
        return plan
    return refine(model, plan, refinement, text, windows, show_progress)


class _Calibration:
    """A plan in the making: the budget is divided, then each projection gets its thresholds.

    Args:
        model: dense, with its head.
        config: what is asked for.
        projections: to become sparse.
        windows: calibration tokens [windows, S].
        measurements: of policies, and rounded weights; None to keep nothing.
        show_progress: draw progress bars on stderr.
    """

    def __init__(
        self,
        model: nn.Module,
        config: SparsityConfig,
        projections: Sequence[Projection],
        windows: Tensor,
        measurements: Measurements | None,
        show_progress: bool,
    ) -> None:
        self.model = model
        self.config = config
        self.projections = projections
        self.windows = windows
        self.measurements = measurements
        self.show_progress = show_progress
        self.units = _units(projections, config)
        self.experts = find_experts(model)
        self.experts_scores = {
            name: _scores_of_experts(name, fused, config)
            for name, (fused, _) in self.experts.items()
        }
        # Weights in planes, rounded to the nearest, are in the modules while calibration runs.
        self.loaded = (
            config if config.planes == 1 else replace(config, weight_dtype=None, rounding=None)
        )
        # Policies look at masks with one cut-off for all tokens, whatever the selector: as TEAL's
        # histograms do, from which WINA's top-k budgets come as well.
        self.seen = self._scores(replace(self.loaded, selector="threshold"))
        units = [unit.projections for unit in self.units]
        self.importance = TokenImportance(model, units, windows)
        self.weighs_tokens = config.make_selector().weighs_tokens and config.sparsity > 0.0
        self.problem = self._problem()

    def plan(self, text: str) -> SparsityPlan:
        """The plan, not refined.

        Args:
            text: where the calibration text is from, for the plan's record.
        """
        config = self.config
        found = self._calibrated()
        return SparsityPlan(
            config=config,
            model_type=model_type_of(self.model),
            calibration={
                "text": text,
                "tokens": self.windows.numel(),
                "criterion": config.criterion_spec,
                "allocation": config.allocation_spec,
                "refinement": config.refinement_spec,
                "correction": config.correction_spec,
                "rounding": config.rounding_spec or "none",
                "rotation": rotation_of(self.model),
            },
            layers=found.plans(),
            experts={
                projection.name: _plan_of_experts(projection, found.experts[name], config)
                for name, (_, roles) in self.experts.items()
                for projection in roles
            },
        )

    def _calibrated(self) -> Calibrator:
        """The budget divided, and the decoder run at it."""
        config = self.config
        allocation = config.make_allocation() if config.sparsity else Uniform()
        rounding = config.make_rounding()
        modules = {p.name: linear_of(self.model, p.name) for p in self.projections}
        with in_planes(modules, config.kept_as) as weights:
            sparsities = self.problem.by_projection(allocation.allocate(self.problem))
            importance = None
            if self.weighs_tokens:
                importance = self.problem.measured_tensors(
                    lambda: self.importance.measured(self.show_progress),
                    importance="curvature of KL",
                )
            return self._run(
                self._scores(self.loaded),
                sparsities,
                config if rounding is not None and rounding.looks else self.loaded,
                f"calibrating {config.method} at {config.sparsity:.0%}",
                importance,
                weights,
            )

    def _run(
        self,
        scores: Mapping[str, ChannelScores],
        sparsities: Mapping[str, float],
        config: SparsityConfig,
        title: str = "",
        importance: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> Calibrator:
        """One pass of the decoder; progress is shown under a title."""
        calibrator = Calibrator(
            self.model, self.projections, scores, sparsities, config, self.measurements,
            importance, weights,
        )  # fmt: skip
        # Policies divide the budget over projections; experts have the share that was asked for.
        sequential = config.statistics == "sequential"
        calibrator.experts = {
            name: ExpertsCalibrator(fused, self.experts_scores[name], config.sparsity, sequential)
            for name, (fused, _) in self.experts.items()
        }
        calibrator.run(self.windows, title, self.show_progress and bool(title))
        return calibrator

    def _thresholds(self, sparsities: Mapping[str, float]) -> dict[str, Tensor]:
        """Of every projection, for what a policy gives to each unit."""
        # Where a policy only looks for masks, finding the best integers each time would be dear.
        nearest = self.loaded.weight_dtype and "nearest"
        config = replace(self.loaded, rounding=nearest)
        layers = self._run(self.seen, self.problem.by_projection(sparsities), config).plans()
        return {name: layer.threshold for name, layer in layers.items()}

    def _problem(self) -> Problem:
        """What the allocation policy is asked."""
        config = self.config
        same = ("mask", "sink_tokens", "weight_dtype", "seed")
        return Problem(
            units=self.units,
            sparsity=config.sparsity,
            model=self.model,
            windows=self.windows,
            scores=self.seen,
            sink_tokens=config.sink_tokens,
            thresholds=self._thresholds,
            measurements=self.measurements,
            about={
                "criterion": config.criterion_spec,
                "criteria": {} if config.criterion else dict(METHODS[config.method].criteria),
                "rotation": rotation_of(self.model),
                "windows": hashlib.sha256(self.windows.numpy().tobytes()).hexdigest(),
                **{name: getattr(config, name) for name in same},
                **({} if config.head == "dense" else {"head": config.head}),
            },
            watched=self.importance.watched if self.weighs_tokens else (),
            show_progress=self.show_progress,
        )

    def _scores(self, config: SparsityConfig) -> dict[str, ChannelScores]:
        """Projection name → its scores; the projections of one unit share the constants."""
        found = {}
        for unit in self.units:
            modules = [linear_of(self.model, projection.name) for projection in unit.projections]
            shared = ChannelScores(
                weights=WeightsOf(modules),
                criterion=config.make_criterion(_deciding_role(unit, config)),
                selector=config.make_selector(),
                seed=config.seed + zlib.crc32(unit.name.encode()),
                weight_dtype=config.weight_dtype,
                planes=self.config.planes,
            )
            found.update({projection.name: shared for projection in unit.projections})
        return found


def measurements_in(
    folder: Path, model: nn.Module, texts: Sequence[str] | None, reach: float = 0.0
) -> Measurements:
    """What a folder holds of measurements on this model and this calibration text.

    Args:
        folder: made when there is something to keep.
        model: known by samples of its weights; it may be offloaded.
        texts: as of :func:`calibrate`; None for the bundled text.
        reach: the highest sparsity that will be asked for.
    """
    weights = hashlib.sha256()
    for projection in find_projections(model, offloaded=True):
        weight = weight_of(linear_of(model, projection.name))
        weights.update(f"{projection.name} {weight.dtype}".encode())
        weights.update(weight_sample(weight).numpy().tobytes())
    text = "bundled" if texts is None else digest(list(texts))
    return Measurements(reach, folder, {"model": weights.hexdigest(), "text": text}, large=True)


def _check_tokens(model: nn.Module, text: Tensor) -> None:
    """Raise for token ids of another tokenizer, and for windows that the model cannot see."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    known = int(getattr(embedding, "num_embeddings", 0) or 1 << 62)
    if text.numel() and not 0 <= int(text.min()) <= int(text.max()) < known:
        raise CalibrationError(
            f"token ids from {int(text.min())} to {int(text.max())}, and the model knows 0 to "
            f"{known - 1}: is this its tokenizer?"
        )
    config: Any = model.config
    most = getattr(config.get_text_config(), "max_position_embeddings", None)
    if most is not None and text.shape[1] > most:
        raise CalibrationError(
            f"windows of {text.shape[1]} tokens, and the model sees {most}: pass window={most}"
        )


def _check_offloaded(model: nn.Module, config: SparsityConfig) -> None:
    """Raise for what changes weights, or runs a patched model."""
    for setting, value, none in (
        ("weight_dtype", config.weight_dtype, None),
        ("refinement", config.refinement_spec, NO_REFINEMENT),
    ):
        if value != none and any(is_offloaded(module) for module in model.modules()):
            raise UnsupportedModelError(
                f"{setting}={value!r} needs the weights in memory, and this model is offloaded: "
                f"calibrate with {setting}={none!r}, or where the model fits"
            )


def _tell_what_stays_dense(
    model: nn.Module, offloaded: bool, projections: Sequence[Projection]
) -> None:
    dense = dense_modules(model, offloaded)
    experts = [fused.module for fused, _ in find_experts(model).values()]
    weights = sum(module.weights for module in dense)
    sparse = sum(projection.weights for projection in projections) + sum(
        parameter.numel() for module in experts for parameter in module.parameters()
    )
    share = weights / (weights + sparse)
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


def _deciding_role(unit: Unit, config: SparsityConfig) -> str:
    """The role whose criterion a unit takes: one that the method names, if it has one."""
    named = METHODS[config.method].criteria
    roles = [projection.role for projection in unit.projections]
    return next((role for role in roles if role in named), roles[0])


def _scores_of_experts(
    name: str, fused: FusedExperts, config: SparsityConfig
) -> dict[str, Sequence[ChannelScores]]:
    """Role → the scores of every expert. Experts keep their float weights: nothing is rounded."""
    return {
        role: [
            ChannelScores(
                weights=[fused.weight(role, expert)],
                criterion=config.make_criterion(role),
                selector=config.make_selector(),
                seed=config.seed + zlib.crc32(f"{name}.{role}.{expert}".encode()),
            )
            for expert in range(fused.experts)
        ]
        for role in ROLES
    }


def _plan_of_experts(
    projection: Projection, found: ExpertsCalibrator, config: SparsityConfig
) -> ExpertsPlan:
    role, E = projection.role, found.fused.experts
    return ExpertsPlan(
        projection=projection,
        sparsity=config.sparsity,
        realised=found.realised(role),
        cutoff=torch.tensor(found.cutoffs[role], dtype=torch.float32),
        threshold=torch.stack([found.threshold(role, e).cpu() for e in range(E)]),
        tokens=torch.tensor(found.tokens[role], dtype=torch.int64),
        sample=experts_sample(getattr(found.fused.module, role)),
    )
