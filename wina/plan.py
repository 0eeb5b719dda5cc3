"""The result of calibration: which channels of which projection may be skipped.

:mod:`wina.plan_file` writes it down.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import wina.projections as projections_module
from wina.config import SparsityConfig
from wina.corrections import Terms
from wina.errors import PlanError
from wina.experts import recognise_experts
from wina.kernels.quantization import QuantizedWeight
from wina.projections import Projection
from wina.rotation import NO_ROTATION, rotation_of

_SAMPLES = 16
_OTHER_WEIGHTS = (
    "{} has other weights than the model this plan was made for: calibrate this model and use its "
    "own plan"
)
# A checkpoint rounded to bfloat16 is the same model; a fine-tuned one is not.
_SAMPLE_RTOL = 2.0**-7


@dataclass(frozen=True)
class ProjectionPlan:
    """What one projection does at run time, and what was measured when it was calibrated.

    Attributes:
        projection: name and shape.
        sparsity: share of channels to drop, as allocated.
        realised: share dropped on the calibration text.
        cutoff: τ, the cut-off of the scores |x_j|·c_j (in units of the selector's scale).
        threshold: τ/c, [K] float32, for each plane of the weight in turn.
        sample: a few weights, by which the model is recognised, float32.
        terms: the correction, in float32.
        probe: what the selector reads off the hidden state, [K + 1] float32, or None.
        weight: the rounded weight, where calibration found it; None for a weight that is in use
            as it is or, with a ``weight_dtype``, rounded to the nearest when a model is patched.
    """

    projection: Projection
    sparsity: float
    realised: float
    cutoff: float
    threshold: Tensor
    sample: Tensor
    terms: Terms = field(default_factory=Terms)
    probe: Tensor | None = None
    weight: QuantizedWeight | None = None

    def check(self, planes: int = 1) -> None:
        """Raise :class:`PlanError`, with the field's name, for a value that means nothing.

        A threshold of −1 (or less) keeps its channel and +inf drops it; NaN would keep it without
        anybody having said so.

        Args:
            planes: of the weight (:attr:`SparsityConfig.planes`).
        """
        name = self.projection.name
        for field_name, tensor, length in (
            ("threshold", self.threshold, planes * self.projection.in_features),
            ("sample", self.sample, _SAMPLES),
            ("probe", self.probe, self.projection.in_features + 1),
        ):
            if tensor is None:
                continue
            if tuple(tensor.shape) != (length,) or tensor.dtype != torch.float32:
                raise PlanError(
                    f"{name}.{field_name} has shape {tuple(tensor.shape)} {tensor.dtype}, expected "
                    f"({length},) torch.float32"
                )
        if self.threshold.isnan().any():
            raise PlanError(f"{name}.threshold must be float32 without NaN")
        if self.probe is not None and not self.probe.isfinite().all():
            raise PlanError(f"{name}.probe must be finite")
        if math.isnan(self.cutoff):
            raise PlanError(f"cutoff of {name} is NaN")


@dataclass(frozen=True)
class ExpertsPlan:
    """What the matrices of one role of E fused experts do at run time, and what was measured.

    Attributes:
        projection: name, shape of one expert's matrix, and how many a token passes.
        sparsity: share of channels to drop.
        realised: share dropped on the calibration text, over all experts.
        cutoff: τ of every expert, [E] float32.
        threshold: τ/c, [E, K] float32.
        tokens: calibration tokens that each expert saw, [E] int64; those that saw fewer than
            :data:`wina.experts.FEWEST_TOKENS` have the cut-off of all experts together.
        sample: a few weights, by which the model is recognised, float32.
    """

    projection: Projection
    sparsity: float
    realised: float
    cutoff: Tensor
    threshold: Tensor
    tokens: Tensor
    sample: Tensor


@dataclass(frozen=True)
class SparsityPlan:
    """Thresholds for every projection of one model.

    Attributes:
        config: the settings that led here.
        model_type: ``config.model_type`` of the model.
        calibration: what was read: source, tokens (JSON values, for people).
        layers: projection name → its plan, in order of execution.
        experts: name of the module of fused experts and role → their plan.
    """

    config: SparsityConfig
    model_type: str
    calibration: Mapping[str, Any]
    layers: Mapping[str, ProjectionPlan] = field(repr=False)
    experts: Mapping[str, ExpertsPlan] = field(repr=False, default_factory=dict)

    @property
    def all_layers(self) -> dict[str, ProjectionPlan | ExpertsPlan]:
        """Projections and fused experts, by name."""
        return {**self.layers, **self.experts}

    @property
    def expert_modules(self) -> tuple[str, ...]:
        """Names of the modules of fused experts."""
        return tuple(dict.fromkeys(name.rpartition(".")[0] for name in self.experts))

    @property
    def realised(self) -> float:
        """Share of projection weights skipped on the calibration text."""
        layers = self.all_layers
        return weighted_mean(
            [layer.projection for layer in layers.values()],
            {name: layer.realised for name, layer in layers.items()},
        )

    @property
    def rotation(self) -> str:
        """The rotation of the model that it was made for, ``"none"`` for a model as loaded."""
        return str(self.calibration.get("rotation", NO_ROTATION))

    def check(self, model: nn.Module) -> None:
        """Raise :class:`PlanError` unless the plan was made for this model."""
        found = projections_module.model_type_of(model)
        if found != self.model_type:
            raise PlanError(f"the plan is for a {self.model_type} model, this is a {found}")
        if rotation_of(model) != self.rotation:
            raise PlanError(
                f"the plan is for a model with rotation {self.rotation!r}, this one has "
                f"{rotation_of(model)!r}: see wina.rotate and wina.unrotate"
            )
        modules = dict(model.named_modules())
        rounding = self.config.make_rounding()
        for name, layer in self.layers.items():
            layer.check(self.config.planes)
            if rounding is not None and rounding.looks and layer.weight is None:
                raise PlanError(
                    f"the plan has no rounded weight for {name}: calibrate with rounding "
                    f"{self.config.rounding_spec!r}, or set rounding='nearest'"
                )
            module = modules.get(name)
            if not isinstance(module, nn.Linear):
                raise PlanError(f"the plan names {name}, which is no linear layer of this model")
            shape = (layer.projection.out_features, layer.projection.in_features)
            if tuple(module.weight.shape) != shape:
                raise PlanError(
                    f"{name} has shape {tuple(module.weight.shape)}, in the plan it has {shape}"
                )
        for name, layer in self.layers.items():
            module = model.get_submodule(name)
            assert isinstance(module, nn.Linear)
            if not torch.allclose(
                weight_sample(module.weight), layer.sample, rtol=_SAMPLE_RTOL, atol=1e-8
            ):
                raise PlanError(_OTHER_WEIGHTS.format(name))
        for name, experts in self.experts.items():
            module_name, _, role = name.rpartition(".")
            module = modules.get(module_name)
            fused = None if module is None else recognise_experts(module)
            if fused is None:
                raise PlanError(f"the plan names {module_name}, which are no fused experts")
            wanted = (experts.projection.out_features, experts.projection.in_features)
            if fused.shape(role) != wanted or fused.experts != len(experts.threshold):
                raise PlanError(
                    f"{name} has {fused.experts} matrices {fused.shape(role)}, in the plan "
                    f"{len(experts.threshold)} matrices {wanted}"
                )
            sample = experts_sample(getattr(fused.module, role))
            if not torch.allclose(sample, experts.sample, rtol=_SAMPLE_RTOL, atol=1e-8):
                raise PlanError(_OTHER_WEIGHTS.format(name))

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write the plan into ``folder`` (made if missing). A previous plan is replaced at once
        or, if writing fails, not at all.
        """
        from wina.plan_file import write

        return write(self, Path(folder))

    @staticmethod
    def load(folder: str | os.PathLike[str]) -> SparsityPlan:
        """Read a plan folder.

        Raises:
            PlanError: missing, truncated, altered, or of an unknown version.
        """
        from wina.plan_file import read

        return read(Path(folder))


def weighted_mean(projections: Sequence[Projection], values: Mapping[str, float]) -> float:
    """Mean of a per-projection value, weighted by the projections' numbers of weights."""
    total = sum(projection.weights for projection in projections)
    return sum(values[p.name] * p.weights for p in projections) / total if total else 0.0


def weight_sample(weight: Tensor) -> Tensor:
    """A few weights at fixed positions of a matrix [N, K], float32 on the CPU."""
    rows, columns = weight.shape
    index = torch.arange(_SAMPLES, dtype=torch.int64)
    # Large odd steps visit rows and columns that are not aligned with heads or blocks.
    row = (index * 7919 + 13) % rows
    column = (index * 104729 + 5) % columns
    sample = weight.detach()[row.to(weight.device), column.to(weight.device)]
    return sample.to("cpu", torch.float32)


def experts_sample(weight: Tensor) -> Tensor:
    """A few weights of the first and the last of E matrices, float32 on the CPU."""
    return torch.cat([weight_sample(weight[0]), weight_sample(weight[-1])])
