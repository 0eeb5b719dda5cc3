"""Constants learned in a sparse model, for corrections that ask for it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from wina.allocation.gradients import frozen
from wina.corrections import Correction, Lesson
from wina.linear import SparseLinear
from wina.patch import apply_plan, dense, restore
from wina.plan import ProjectionPlan, SparsityPlan
from wina.projections import decoder_of


def learn(
    model: nn.Module,
    plan: SparsityPlan,
    correction: Correction,
    windows: Tensor,
    show_progress: bool,
) -> SparsityPlan:
    """The plan with the constants that its correction learns.

    Args:
        model: dense; it is sparsified meanwhile and dense again afterwards.
        plan: calibrated for it.
        correction: one that :attr:`~wina.corrections.Correction.learns`.
        windows: calibration tokens [windows, S].
        show_progress: draw a progress bar on stderr.
    """
    layers = {
        name: replace(layer, terms=replace(layer.terms, bias=_constant(layer.terms.bias, layer)))
        for name, layer in plan.layers.items()
    }
    plan = replace(plan, layers=layers)
    units = _spreads(model, plan, windows[:1])
    apply_plan(model, plan, prefill="all", backend="reference", keep_original=True)
    try:
        modules = {m.name: m for m in model.modules() if isinstance(m, SparseLinear)}
        shifts = {
            name: layer.terms.bias.to(modules[name].storage.device).clone().requires_grad_()  # type: ignore[union-attr]
            for name, layer in layers.items()
        }
        sink = plan.config.sink_tokens

        def run(ids: Tensor) -> Tensor:
            output: Any = model(input_ids=ids, use_cache=False)
            logits: Tensor = output.logits[:, sink:]
            return logits.float().log_softmax(-1).flatten(0, 1)

        def run_dense(ids: Tensor) -> Tensor:
            with torch.no_grad(), dense(model):
                return run(ids)

        def run_sparse(ids: Tensor) -> Tensor:
            for name, module in modules.items():
                module.shift = shifts[name].to(module.storage)
            return run(ids)

        device = next(model.parameters()).device
        with frozen(model):
            correction.learn(
                Lesson(windows.to(device), shifts, units, run_dense, run_sparse, show_progress)
            )
    finally:
        restore(model)
    return replace(
        plan,
        layers={
            name: replace(layer, terms=replace(layer.terms, bias=shifts[name].detach().cpu()))
            for name, layer in layers.items()
        },
    )


def _constant(bias: Tensor | None, layer: ProjectionPlan) -> Tensor:
    return torch.zeros(layer.projection.out_features) if bias is None else bias


def _spreads(model: nn.Module, plan: SparsityPlan, windows: Tensor) -> dict[str, Tensor]:
    """Standard deviation over tokens of every output of every projection, dense."""
    found = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:
            tokens = y[..., plan.config.sink_tokens :, :].flatten(0, -2)
            found[name] = tokens.float().std(0, correction=0)

        return hook

    handles = [
        model.get_submodule(name).register_forward_hook(hook_of(name)) for name in plan.layers
    ]
    decoder = decoder_of(model)
    training = decoder.training
    try:
        decoder.eval()
        with torch.no_grad():
            device = next(decoder.parameters()).device
            decoder(input_ids=windows.to(device), use_cache=False)
    finally:
        decoder.train(training)
        for handle in handles:
            handle.remove()
    return found
