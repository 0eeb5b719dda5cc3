"""A sparsified model saves itself as a folder that everybody can read.

``save_pretrained`` of a sparsified model writes weights in their usual layout under their usual
names, and the plan into a folder :data:`PLAN_FOLDER` beside them; ``config.json`` gets a
``quantization_config`` with the settings. Where wina has been imported, ``from_pretrained`` gives
the sparse model back (:mod:`wina.integrations.transformers`); elsewhere transformers says that it
skips an unknown method, and gives a dense model.

Weights that are kept in 8 or 4 bits are saved as floats: the original ones where they were kept,
else the rounded ones. Loaded, they are replaced by the integers of the plan where calibration found
them (:mod:`wina.rounding`), or where planes of weights that are gone were saved in it; else they
are rounded again, which gives the same values back (in 16 bits and int8 now and then a scale that
is one step off).
"""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from wina.errors import PatchStateError
from wina.patch import Patch, patch_of
from wina.plan import SparsityPlan, experts_sample, weight_sample
from wina.quantized_linear import QuantizedSparseLinear
from wina.rotation import NO_ROTATION

PLAN_FOLDER = "wina"
QUANT_METHOD = "wina"


def saves_with_plan(model: nn.Module) -> None:
    """Let ``model.save_pretrained`` write the plan as well, until the model is restored."""
    from transformers import PreTrainedModel  # slow, and there is a model of it by now

    if isinstance(model, PreTrainedModel):  # PEFT's model around one saves its adapters
        patch_of(model).attributes["save_pretrained"] = model.__dict__.get("save_pretrained")
        # A partial, since a bound method would be pickled by a name that the model does not have.
        model.__dict__["save_pretrained"] = partial(_save_pretrained, model)


def quantization_config(plan: SparsityPlan) -> dict[str, Any]:
    """What ``config.json`` says of a sparsified model, JSON-ready."""
    return {"quant_method": QUANT_METHOD, **plan.config.to_dict()}


def _save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    push_to_hub: bool = False,
    **settings: Any,
) -> None:
    """As ``PreTrainedModel.save_pretrained``, and the plan into the folder ``wina``.

    A model with PEFT adapters loaded saves the adapters alone, as ever.

    Raises:
        PatchStateError: the model is rotated, which other programs could not read.
    """
    usual = type(self).save_pretrained
    if getattr(self, "_hf_peft_config_loaded", False):
        usual(
            self, save_directory, is_main_process=is_main_process, state_dict=state_dict,
            push_to_hub=push_to_hub, **settings,
        )  # fmt: skip
        return
    patch = patch_of(self)
    if patch.plan.rotation != NO_ROTATION:
        raise PatchStateError(
            f"the model is rotated ({patch.plan.rotation}), and no other program could read its "
            "weights: save the plan alone (plan.save), and rotate the loaded model before use"
        )
    weights = _float_state_dict(self, patch) if state_dict is None else state_dict
    # Another library's quantization has the place already, and is needed to load the weights.
    free = getattr(self.config, "quantization_config", None) is None
    if free:
        self.config.quantization_config = quantization_config(patch.plan)
    try:
        usual(
            self, save_directory, is_main_process=is_main_process, state_dict=dict(weights),
            **settings,
        )  # fmt: skip
    finally:
        if free:
            del self.config.quantization_config
    if is_main_process:
        _plan_of(self, patch, weights).save(Path(save_directory) / PLAN_FOLDER)
    if push_to_hub:
        # It saves again, into an empty folder, and uploads all that is in it.
        known = ("commit_message", "private", "token", "revision", "create_pr", "max_shard_size")
        self.push_to_hub(
            settings.get("repo_id", Path(save_directory).name),
            **{name: settings[name] for name in known if name in settings},
        )


def _float_state_dict(model: nn.Module, patch: Patch) -> dict[str, Tensor]:
    """The state dict of the dense model: floats under ``weight``, whatever is kept in memory."""
    originals = {
        replaced.new: replaced.original.weight
        for replaced in patch.replaced
        if isinstance(replaced.original, nn.Linear)
    }
    weights: dict[str, Tensor] = {}
    for key, value in model.state_dict().items():
        name, _, leaf = key.rpartition(".")
        module = model.get_submodule(name) if leaf in ("packed", "scales") else None
        if not isinstance(module, QuantizedSparseLinear):
            weights[key] = value
        elif leaf == "packed":
            weights[f"{name}.weight"] = originals.get(module, module.weight).detach()
    for name, weight in patch.tied.items():  # the embedding's, which is written once
        weights[f"{name}.weight"] = weight.detach()
    return weights


def _plan_of(model: nn.Module, patch: Patch, weights: dict[str, Tensor]) -> SparsityPlan:
    """The plan, recognising the weights that are saved (they may have been tuned or rounded)."""
    plan = patch.plan
    layers = {
        name: replace(layer, sample=weight_sample(weights[f"{name}.weight"]))
        if f"{name}.weight" in weights
        else layer
        for name, layer in plan.layers.items()
    }
    if patch.dropped and plan.config.planes > 1:
        # The sum of planes, rounded again, would give others.
        gone = layers.keys() - patch.tied.keys()
        for module in model.modules():
            if isinstance(module, QuantizedSparseLinear) and module.name in gone:
                layers[module.name] = replace(layers[module.name], weight=module.quantized.cpu())
    experts = {
        name: replace(layer, sample=experts_sample(weights[name])) if name in weights else layer
        for name, layer in plan.experts.items()
    }
    return replace(plan, layers=layers, experts=experts)
