"""The result of calibration: which channels of which projection may be skipped.

A plan is a folder with ``plan.json`` (readable) and ``plan.safetensors`` (thresholds,
corrections, and the weight samples that tell for which model they were made). Nothing else is read
or executed.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor, nn

import wina.projections as projections_module
from wina.config import SparsityConfig
from wina.corrections import Terms
from wina.errors import PlanError, WinaError
from wina.experts import recognise_experts
from wina.files import read_json, write_together
from wina.kernels.quantization import QuantizedWeight, check_layout
from wina.methods import METHODS
from wina.projections import Projection
from wina.registry import create
from wina.rotation import NO_ROTATION, rotation_of
from wina.selectors import SELECTORS

FORMAT = "wina-plan"
VERSION = 2
JSON_FILE = "plan.json"
TENSOR_FILE = "plan.safetensors"

_SAMPLES = 16
_EXPERT_TENSORS = ("cutoff", "threshold", "tokens", "sample")
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
        path = Path(folder)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.threshold"] = layer.threshold.contiguous()
            tensors[f"{name}.sample"] = layer.sample.contiguous()
            for term, tensor in layer.terms.tensors().items():
                tensors[f"{name}.correction.{term}"] = tensor.contiguous()
            if layer.probe is not None:
                tensors[f"{name}.probe"] = layer.probe.contiguous()
            if layer.weight is not None:
                tensors[f"{name}.packed"] = layer.weight.packed
                tensors[f"{name}.scales"] = layer.weight.scales
        for name, experts in self.experts.items():
            for key in _EXPERT_TENSORS:
                tensors[f"{name}.{key}"] = getattr(experts, key).contiguous()
        blob = safetensors_save(tensors)
        document = self._document(hashlib.sha256(blob).hexdigest())
        text = json.dumps(document, indent=1, allow_nan=False) + "\n"
        # The JSON names the tensors by their hash, so a crash between the two renames is noticed
        # when loading instead of giving a mixture.
        write_together({path / TENSOR_FILE: blob, path / JSON_FILE: text.encode()})
        return path

    def _document(self, tensor_hash: str) -> dict[str, Any]:
        document: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "model_type": self.model_type,
            "config": self.config.record(),
            "calibration": dict(self.calibration),
            "realised": self.realised,
            "projections": [
                {
                    "name": layer.projection.name,
                    "block": layer.projection.block,
                    "group": layer.projection.group,
                    "in_features": layer.projection.in_features,
                    "out_features": layer.projection.out_features,
                    "sparsity": layer.sparsity,
                    "realised": layer.realised,
                    "cutoff": layer.cutoff,
                }
                for layer in self.layers.values()
            ],
            "tensors_sha256": tensor_hash,
        }
        if self.experts:
            document["experts"] = [
                {
                    **asdict(layer.projection),
                    "experts": len(layer.threshold),
                    "sparsity": layer.sparsity,
                    "realised": layer.realised,
                }
                for layer in self.experts.values()
            ]
        document["sha256"] = _digest(document)
        return document

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> SparsityPlan:
        """Read a plan folder.

        Raises:
            PlanError: missing, truncated, altered, or of an unknown version.
        """
        path = Path(folder)
        try:
            document = read_json(path / JSON_FILE)
            blob = (path / TENSOR_FILE).read_bytes()
        except OSError as error:
            raise PlanError(
                f"{path} is no plan folder: {error.strerror} ({error.filename})"
            ) from None
        except ValueError:
            raise PlanError(f"{path / JSON_FILE} is not JSON: truncated or altered") from None
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise PlanError(f"{path / JSON_FILE} is not a {FORMAT} file")
        if document.get("version") != VERSION:
            raise PlanError(
                f"{path / JSON_FILE} has version {document.get('version')!r}; this wina reads "
                f"version {VERSION}. Calibrate again, or use the wina that wrote it."
            )
        if document.pop("sha256", None) != _digest(document):
            raise PlanError(f"{path / JSON_FILE} was altered: its checksum does not fit")
        if document.get("tensors_sha256") != hashlib.sha256(blob).hexdigest():
            raise PlanError(f"{path / TENSOR_FILE} was altered or belongs to another plan")
        try:
            return cls._parse(document, safetensors_load(blob))
        except (KeyError, TypeError, ValueError, SafetensorError, WinaError) as error:
            raise PlanError(f"{path} is malformed: {error}") from error

    @classmethod
    def _parse(cls, document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparsityPlan:
        config = _parse_config(document["config"])
        layers = {}
        for row in document["projections"]:
            name = _typed(row, "name", str)
            projection = Projection(
                name=name,
                block=_typed(row, "block", int),
                group=_typed(row, "group", str),
                in_features=_typed(row, "in_features", int),
                out_features=_typed(row, "out_features", int),
            )
            if name in layers:
                raise PlanError(f"projections names {name} twice")
            terms = Terms.stored(tensors, f"{name}.correction.")
            terms.check(name, projection.in_features, projection.out_features)
            layers[name] = ProjectionPlan(
                projection=projection,
                sparsity=_share(row, "sparsity"),
                realised=_share(row, "realised"),
                cutoff=float(_typed(row, "cutoff", (int, float))),
                threshold=tensors[f"{name}.threshold"],
                sample=tensors[f"{name}.sample"],
                terms=terms,
                probe=tensors.get(f"{name}.probe"),
                weight=_parse_weight(projection, config, tensors),
            )
            layers[name].check(config.planes)
        return cls(
            config=config,
            model_type=_typed(document, "model_type", str),
            calibration=_typed(document, "calibration", dict),
            layers=layers,
            experts={
                row["name"]: _parse_experts(row, tensors) for row in document.get("experts", ())
            },
        )


def _parse_config(settings: Mapping[str, Any]) -> SparsityConfig:
    """The settings; plans of before :mod:`wina.rounding` were made for weights rounded plainly,
    and those that name no selector have one cut-off for all tokens, whatever the method has now.
    """
    if isinstance(settings, Mapping) and settings.get("selector") is None:
        method = settings.get("method")
        if (
            isinstance(method, str)
            and method in METHODS
            and create(SELECTORS, METHODS[method].selector).weighs_tokens
        ):
            settings = {**settings, "selector": "threshold"}
    if isinstance(settings, Mapping) and settings.get("weight_dtype") is not None:
        settings = {"rounding": "nearest", **settings}
    return SparsityConfig.from_dict(settings)


def _parse_weight(
    projection: Projection, config: SparsityConfig, tensors: Mapping[str, Tensor]
) -> QuantizedWeight | None:
    rounding = config.make_rounding()
    if config.kept_as is None or rounding is None:
        return None
    if not rounding.looks and f"{projection.name}.packed" not in tensors:
        return None
    packed, scales = (tensors[f"{projection.name}.{leaf}"] for leaf in ("packed", "scales"))
    rows, bits = config.planes * projection.in_features, config.kept_as.format.bits
    try:
        check_layout(packed, scales, rows, projection.out_features, bits)
    except ValueError as error:
        raise PlanError(f"{projection.name}: {error}") from None
    return QuantizedWeight(packed, scales, projection.out_features, bits)


def _parse_experts(row: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> ExpertsPlan:
    name = _typed(row, "name", str)
    numbers = ("in_features", "out_features", "copies", "block")
    projection = Projection(
        name=name,
        group=_typed(row, "group", str),
        **{key: _typed(row, key, int) for key in numbers},
    )
    found = {key: tensors[f"{name}.{key}"] for key in _EXPERT_TENSORS}
    shape = (_typed(row, "experts", int), projection.in_features)
    threshold = found["threshold"]
    if tuple(threshold.shape) != shape or found["cutoff"].shape != found["tokens"].shape:
        raise PlanError(f"{name}.threshold has shape {tuple(threshold.shape)}, not {shape}")
    if threshold.dtype != torch.float32 or threshold.isnan().any():
        raise PlanError(f"{name}.threshold must be float32 without NaN")
    return ExpertsPlan(projection, _share(row, "sparsity"), _share(row, "realised"), **found)


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


def _digest(document: Mapping[str, Any]) -> str:
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _typed(row: Mapping[str, Any], key: str, kind: type | tuple[type, ...]) -> Any:
    value = row[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise PlanError(f"{key} has the wrong type: {value!r}")
    return value


def _share(row: Mapping[str, Any], key: str) -> float:
    value = float(_typed(row, key, (int, float)))
    if not 0.0 <= value <= 1.0:
        raise PlanError(f"{key} of {row.get('name')} is not in [0, 1]: {value}")
    return value
