"""How a plan lies on disk.

A folder with ``plan.json`` (readable) and ``plan.safetensors`` (thresholds, corrections, and the
weight samples that tell for which model they were made). Nothing else is read or executed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as safetensors_load
from safetensors.torch import save as safetensors_save
from torch import Tensor

from wina.config import SparsityConfig
from wina.corrections import Terms
from wina.errors import PlanError, WinaError
from wina.files import read_json, write_together
from wina.kernels.quantization import QuantizedWeight, check_layout
from wina.methods import METHODS
from wina.plan import ExpertsPlan, ProjectionPlan, SparsityPlan
from wina.projections import Projection
from wina.registry import create
from wina.selectors import SELECTORS

FORMAT = "wina-plan"
VERSION = 2
JSON_FILE = "plan.json"
TENSOR_FILE = "plan.safetensors"

_EXPERT_TENSORS = ("cutoff", "threshold", "tokens", "sample")


def check_folder(path: Path) -> None:
    """Raise :class:`PlanError` where no folder can be made."""
    if path.exists() and not path.is_dir():
        raise PlanError(f"{path} is a file: name a folder for the plan")


def write(plan: SparsityPlan, path: Path) -> Path:
    """Make the folder ``path`` the plan's; what it held is replaced at once, or not at all."""
    check_folder(path)
    path.mkdir(parents=True, exist_ok=True)
    tensors = {}
    for name, layer in plan.layers.items():
        tensors[f"{name}.threshold"] = layer.threshold.contiguous()
        tensors[f"{name}.sample"] = layer.sample.contiguous()
        for term, tensor in layer.terms.tensors().items():
            tensors[f"{name}.correction.{term}"] = tensor.contiguous()
        if layer.probe is not None:
            tensors[f"{name}.probe"] = layer.probe.contiguous()
        if layer.weight is not None:
            tensors[f"{name}.packed"] = layer.weight.packed
            tensors[f"{name}.scales"] = layer.weight.scales
    for name, experts in plan.experts.items():
        for key in _EXPERT_TENSORS:
            tensors[f"{name}.{key}"] = getattr(experts, key).contiguous()
    blob = safetensors_save(tensors)
    document = document_of(plan, hashlib.sha256(blob).hexdigest())
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    # The JSON names the tensors by their hash, so a crash between the two renames is noticed
    # when loading instead of giving a mixture.
    write_together({path / TENSOR_FILE: blob, path / JSON_FILE: text.encode()})
    return path


def document_of(plan: SparsityPlan, tensor_hash: str) -> dict[str, Any]:
    """The readable part, which names the tensors by their hash."""
    document: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "model_type": plan.model_type,
        "config": plan.config.record(),
        "calibration": dict(plan.calibration),
        "realised": plan.realised,
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
            for layer in plan.layers.values()
        ],
        "tensors_sha256": tensor_hash,
    }
    if plan.experts:
        document["experts"] = [
            {
                **asdict(layer.projection),
                "experts": len(layer.threshold),
                "sparsity": layer.sparsity,
                "realised": layer.realised,
            }
            for layer in plan.experts.values()
        ]
    document["sha256"] = digest(document)
    return document


def read(path: Path) -> SparsityPlan:
    """The plan in a folder; one that is missing, damaged or too new raises :class:`PlanError`."""
    try:
        document = read_json(path / JSON_FILE)
        blob = (path / TENSOR_FILE).read_bytes()
    except OSError as error:
        raise PlanError(f"{path} is no plan folder: {error.strerror} ({error.filename})") from None
    except ValueError:
        raise PlanError(f"{path / JSON_FILE} is not JSON: truncated or altered") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise PlanError(f"{path / JSON_FILE} is not a {FORMAT} file")
    if document.get("version") != VERSION:
        raise PlanError(
            f"{path / JSON_FILE} has version {document.get('version')!r}; this wina reads "
            f"version {VERSION}. Calibrate again, or use the wina that wrote it."
        )
    if document.pop("sha256", None) != digest(document):
        raise PlanError(f"{path / JSON_FILE} was altered: its checksum does not fit")
    if document.get("tensors_sha256") != hashlib.sha256(blob).hexdigest():
        raise PlanError(f"{path / TENSOR_FILE} was altered or belongs to another plan")
    try:
        return parse(document, safetensors_load(blob))
    except (KeyError, TypeError, ValueError, SafetensorError, WinaError) as error:
        raise PlanError(f"{path} is malformed: {error}") from error


def parse(document: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> SparsityPlan:
    """The plan that a document and its tensors are, checked."""
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
    return SparsityPlan(
        config=config,
        model_type=_typed(document, "model_type", str),
        calibration=_typed(document, "calibration", dict),
        layers=layers,
        experts={row["name"]: _parse_experts(row, tensors) for row in document.get("experts", ())},
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


def digest(document: Mapping[str, Any]) -> str:
    """Of a document, whatever the order of its keys."""
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
