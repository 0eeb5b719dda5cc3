"""Puts sparse modules into a model, and takes them out again.

Knows plans; knows nothing of how they are calibrated.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wina.config import SparsityConfig
from wina.control import Control
from wina.errors import (
    ConfigError,
    PatchStateError,
    PlanError,
    UnknownNameError,
    UnsupportedModelError,
)
from wina.experts import ROLES, recognise_experts
from wina.group import ProjectionGroup
from wina.kernels.dispatch import backends
from wina.layout import Layout
from wina.linear import SparseLinear
from wina.methods import METHODS
from wina.mlp import SparseGatedMLP, recognise_gated_mlp
from wina.plan import SparsityPlan
from wina.prefill import Prefill
from wina.progress import progress
from wina.projections import (
    architecture_of,
    check_mode,
    decoder_of,
    group_members,
    head_name,
    why_dense,
)
from wina.quantized_linear import QuantizedSparseLinear
from wina.sparse_experts import SparseExperts

_ATTRIBUTE = "_wina_patch"

# Where torch keeps what others have registered on a module.
_HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called",
    "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs",
    "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip


# Methods of a model that replace its head, or its head's weight.
_OF_HEADS = ("resize_token_embeddings", "tie_weights")


Place = tuple[nn.Module, str]  # a parent, and the name of its child


class Replaced(NamedTuple):
    """``original`` was the child ``name`` of ``parent``, where ``new`` stands now."""

    parent: nn.Module
    name: str
    original: nn.Module
    new: nn.Module

    def undo(self, places: Mapping[nn.Module, Sequence[Place]]) -> None:
        """Put the original back, where the new module was put and where it has come to since.

        Args:
            places: of all modules of the model: something may have been wrapped around the new
                module, or taken away that was around it.
        """
        self.original.train(self.new.training)
        if isinstance(
            self.new, SparseGatedMLP
        ):  # adapters may have been wrapped around its children
            self.original._modules.update(self.new._modules)
        for parent, name in ((self.parent, self.name), *places.get(self.new, ())):
            if parent._modules.get(name) is self.new:
                parent._modules[name] = self.original


@dataclass
class Patch:
    """What was done to a model, in the order in which it was done.

    ``attributes`` were set on the model itself, hiding those of its class: name → what stood there
    before, None for nothing; ``tied``
    are weights, by the projection's name, that stay in the model as its embedding.
    """

    plan: SparsityPlan
    control: Control
    replaced: list[Replaced] = field(default_factory=list)
    transposed: list[nn.Parameter] = field(default_factory=list)
    layout: Layout = field(default_factory=Layout)
    attributes: dict[str, Any] = field(default_factory=dict)
    hooks: list[RemovableHandle] = field(default_factory=list)
    tied: dict[str, nn.Parameter] = field(default_factory=dict)
    dropped: bool = False

    def drop_originals(self) -> None:
        """Free the original weights, which nothing reads any more: there is no way back then."""
        self.dropped = True
        self.replaced.clear()

    def undo(self, model: nn.Module) -> None:
        """Put the original modules and weight layouts back into a model, last change first.

        Can be interrupted and called again.
        """
        while self.hooks:
            self.hooks.pop().remove()
        for replaced in self.replaced:  # another weight may have been assigned
            original, new = replaced.original, replaced.new
            if type(new) is SparseLinear and new.name not in self.tied:
                assert isinstance(original, nn.Linear)
                assert isinstance(new.weight, nn.Parameter)
                if new.weight is not original.weight:
                    self.transposed.append(new.weight)
                original.weight, original.bias = new.weight, new.bias
        places: dict[nn.Module, list[Place]] = {}
        for parent in model.modules():
            for name, child in parent._modules.items():
                if child is not None:
                    places.setdefault(child, []).append((parent, name))
        while self.replaced:
            self.replaced[-1].undo(places)
            self.replaced.pop()
        self.layout.recover()
        while self.transposed:
            self.layout.to_row_major(self.transposed[-1])
            self.transposed.pop()


def patch_of(model: nn.Module) -> Patch:
    """The patch of a sparsified model; a dense model raises :class:`PatchStateError`."""
    patch = None if (owner := _owner(model)) is None else owner.__dict__[_ATTRIBUTE]
    if not isinstance(patch, Patch):
        raise PatchStateError("the model is dense: wina.sparsify(model, ...) has not been called")
    return patch


def is_patched(model: nn.Module) -> bool:
    """Whether the model, or the one that it is wrapped around, is sparsified."""
    return _owner(model) is not None


def _owner(model: nn.Module) -> nn.Module | None:
    """The model that was sparsified: this one, or one inside of it (of PEFT, of a compiled one)."""
    if _ATTRIBUTE in model.__dict__:
        return model
    return next((m for m in model.modules() if _ATTRIBUTE in m.__dict__), None)


def apply_plan(
    model: nn.Module,
    plan: SparsityPlan,
    prefill: str | None = None,
    backend: str = "auto",
    keep_original: bool = False,
    show_progress: bool = False,
) -> None:
    """Replace the projections and gated MLPs that a plan names.

    Weights are laid K-major one at a time inside their own storage: peak memory is the model and
    one weight. A head that is tied to the embedding gets a copy. If anything goes wrong (or is
    interrupted) the model is dense and whole again.

    Args:
        model: the dense model that the plan was made for.
        plan: from :func:`wina.calibrate` or :meth:`SparsityPlan.load`.
        prefill: overrides the plan's prefill protocol.
        backend: ``"auto"``, or one of :func:`wina.kernels.dispatch.backends`.
        keep_original: with a plan that rounds weights, keep the original ones in memory as well,
            so that :func:`restore` can put them back.
        show_progress: draw a bar while weights are rounded.

    Raises:
        PatchStateError: the model is sparsified already.
        PlanError: the plan is for another model.
        UnsupportedModelError: a weight is shared or not contiguous; the message names it.
        ConfigError: the plan's method has no kernels, and the backend is not ``"reference"``.
    """
    if is_patched(model):
        raise PatchStateError(
            "the model is sparsified already: call wina.restore(model) before another plan"
        )
    architecture = architecture_of(model)
    for name in plan.layers:
        try:
            reason = why_dense(name, model.get_submodule(name), architecture)
        except AttributeError:
            raise PlanError(f"the plan names {name}, which this model does not have") from None
        if reason is not None:
            raise UnsupportedModelError(f"{name} {reason}")
    plan.check(model)
    tied = _tied_head(model)
    _check_weights(model, plan, tied)
    config = plan.config
    gate_mask = METHODS[config.method].gate_mask
    protocol = check_use(model, config, prefill, backend)
    patch = Patch(plan, Control(protocol, backend, config.tracking))
    rounding = config.make_rounding()
    rounds = rounding is not None
    title = f"rounding weights to {config.weight_dtype}"
    # From here on the model knows what was done to it, so that an undoing that is interrupted in
    # its turn can be finished by `restore`.
    model.__dict__[_ATTRIBUTE] = patch
    try:
        gated = {
            name: found
            for name, module in model.named_modules()
            if all(
                f"{name}.{child}" in plan.layers
                for child, m in module.named_children()
                if isinstance(m, nn.Linear)
            )
            and (found := recognise_gated_mlp(module)) is not None
        }
        with progress(title, len(plan.layers), show_progress and rounds) as advance:
            for name, layer in plan.layers.items():
                parent_name, _, leaf = name.rpartition(".")
                parent = model.get_submodule(parent_name)
                original = parent._modules[leaf]
                assert isinstance(original, nn.Linear)
                if name == tied:
                    assert isinstance(original.weight, nn.Parameter)
                    patch.tied[name] = original.weight
                settings = (
                    original, name, layer.threshold, layer.sparsity,
                    config.make_selector(), patch.control,
                )  # fmt: skip
                sparse: SparseLinear
                if config.weight_dtype is None or rounding is None:
                    sparse = SparseLinear(*settings, layer.terms, layer.probe)
                    _lay(patch, sparse)
                else:
                    weight = layer.weight or rounding.round(
                        original.weight, None, config.weight_dtype
                    )
                    sparse = QuantizedSparseLinear(*settings, weight, layer.terms, layer.probe)
                _replace(patch, parent, leaf, original, sparse)
                advance()
        for name in plan.expert_modules:
            _replace_experts(patch, model, name)
        for module in {model, decoder_of(model)}:
            patch.hooks.append(patch.control.enter(module))
        if config.head == "sparse":
            head = model.get_output_embeddings()  # type: ignore[operator]
            patch.control.watch(decoder_of(model), head, patch.hooks)
            for name in _OF_HEADS:
                if hasattr(model, name):
                    patch.attributes[name] = model.__dict__.get(name)
                    model.__dict__[name] = partial(_refuse, name)
        if config.weight_dtype is None:
            _form_groups(model, plan, fused=gated)
        for name, found in gated.items():
            parent_name, _, leaf = name.rpartition(".")
            parent = model.get_submodule(parent_name)
            mlp = parent._modules[leaf]
            assert mlp is not None
            _replace(patch, parent, leaf, mlp, SparseGatedMLP(mlp, found, gate_mask))
    except BaseException:
        restore(model)
        raise
    # Not before all is done: an interrupted patch gives the model back as it was.
    if rounds and not keep_original:
        patch.drop_originals()


def _refuse(name: str, *_: Any, **__: Any) -> None:
    raise PatchStateError(
        f"{name} would put another head in the place of the sparse one: call wina.restore(model) "
        "before, and wina.sparsify after"
    )


def check_use(
    model: nn.Module, config: SparsityConfig, prefill: str | None, backend: str
) -> Prefill:
    """How prompts are to be read, for what else is asked of a patch.

    Raises:
        ConfigError: the protocol or the backend makes no sense for this model and method.
        UnsupportedModelError: its weights cannot be written to.
    """
    check_mode(model)
    if METHODS[config.method].gate_mask and backend != "reference":
        raise ConfigError(
            f"method {config.method!r} skips rows of up, for which there is no kernel: pass "
            "backend='reference' to evaluate it"
        )
    if backend not in ("auto", *backends()):
        known = ", ".join(("auto", *backends()))
        raise UnknownNameError(f"unknown backend {backend!r}. Known: {known}.")
    device = next(model.parameters()).device.type
    serves = "auto" if backend == "auto" else backends()[backend].device
    if serves not in ("auto", None, device):
        raise ConfigError(f"backend {backend!r} is for {serves}, and the model is on {device}")
    if prefill is None:
        return config.make_prefill()
    return replace(config, prefill=prefill).make_prefill()


def _form_groups(model: nn.Module, plan: SparsityPlan, fused: Container[str]) -> None:
    """Let projections that read the same hidden state share launches, but in ``fused`` parents."""
    for members in group_members([layer.projection for layer in plan.layers.values()]).values():
        if len(members) == 1 or members[0].name.rpartition(".")[0] in fused:
            continue
        modules = [model.get_submodule(member.name) for member in members]
        group = ProjectionGroup([m for m in modules if isinstance(m, SparseLinear)])
        for module in group.members:
            module.group = group


def _replace_experts(patch: Patch, model: nn.Module, name: str) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    original = parent._modules[leaf]
    assert original is not None
    fused = recognise_experts(original)
    assert fused is not None  # the plan has been checked
    layers = {role: patch.plan.experts[f"{name}.{role}"] for role in ROLES}
    sparse = SparseExperts(
        fused,
        name,
        {role: layer.threshold for role, layer in layers.items()},
        {role: layer.sparsity for role, layer in layers.items()},
        patch.plan.config.make_selector(),
        patch.control,
    )
    for role in ROLES:
        weight = getattr(sparse, role)
        if sparse.choices[role].backend.k_major and not fused.transposed:
            patch.transposed.append(weight)
            patch.layout.to_k_major(weight)
    patch.hooks.append(parent.register_forward_pre_hook(sparse.enter))
    _replace(patch, parent, leaf, original, sparse)


def _lay(patch: Patch, sparse: SparseLinear) -> None:
    """Lay a float weight as the module's backend reads it."""
    weight = sparse.weight
    assert isinstance(weight, nn.Parameter)
    if not sparse.choice.backend.k_major:
        return
    if sparse.name in patch.tied:
        # A copy is not trained: the embedding is what is saved, and what comes back.
        rows = weight.detach().t().clone(memory_format=torch.contiguous_format)
        sparse.weight = nn.Parameter(rows.t(), requires_grad=False)
        return
    patch.transposed.append(weight)
    patch.layout.to_k_major(weight)


def _replace(
    patch: Patch, parent: nn.Module, name: str, original: nn.Module, new: nn.Module
) -> None:
    patch.replaced.append(Replaced(parent, name, original, new))
    for hooks in _HOOKS:  # the very tables: a handle of before removes its hook
        setattr(new, hooks, getattr(original, hooks))
    parent._modules[name] = new


def restore(model: nn.Module) -> None:
    """Make a sparsified model dense again: the original modules, weights bit for bit in place.

    Raises:
        PatchStateError: the model is dense, or its weights were rounded and the originals not kept.
    """
    if patch_of(model).dropped:
        raise PatchStateError(
            "the original weights were not kept when they were rounded: load the model again, or "
            "pass keep_original=True to wina.sparsify before wina.restore"
        )
    owner = _owner(model)
    assert owner is not None
    patch = patch_of(owner)
    patch.undo(model)
    for name, before in patch.attributes.items():
        owner.__dict__.pop(name, None)
        if before is not None:
            owner.__dict__[name] = before
    del owner.__dict__[_ATTRIBUTE]


def _tied_head(model: nn.Module) -> str | None:
    """The name of a language-model head that reads the embedding's weight."""
    name = head_name(model)
    if name is None:
        return None
    weight = getattr(model.get_submodule(name), "weight", None)
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    return name if weight is getattr(embedding, "weight", None) else None


def _check_weights(model: nn.Module, plan: SparsityPlan, tied: str | None) -> None:
    owners: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(parameter.data_ptr(), []).append(name)
    weights = {
        f"{name}.weight": model.get_submodule(name).weight for name in plan.layers if name != tied
    }
    weights |= {name: model.get_parameter(name) for name in plan.experts}
    for name, weight in weights.items():
        assert isinstance(weight, Tensor)
        sharing = owners[weight.data_ptr()]
        if len(sharing) > 1 and weight.numel():
            raise UnsupportedModelError(
                f"{name} shares its memory with {', '.join(n for n in sharing if n != name)}: "
                "laying it K-major would break the other"
            )
        if not (weight.is_contiguous() or weight.mT.is_contiguous()):
            raise UnsupportedModelError(
                f"{name} has strides {weight.stride()}: make it contiguous first"
            )
