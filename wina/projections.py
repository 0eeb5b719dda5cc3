"""Finds the projections of a decoder, and which of them read the same hidden state.

Structure is observed, not looked up: two tokens are sent through the model, and projections that
receive the same tensor form a projection group. :data:`ARCHITECTURES` holds what cannot be seen
that way. Knows nothing of sparsity.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wina.errors import UnsupportedModelError
from wina.experts import ROLES, FusedExperts, recognise_experts
from wina.offload import device_of, is_offloaded


@dataclass(frozen=True)
class Projection:
    """One linear layer inside a decoder block: y = Wx + b, W [out_features, in_features].

    ``group`` names the projection group: all projections with the same value read the same hidden
    state and sit in the same module. ``copies`` exceeds 1 for the projections of fused experts: as
    many experts, each with a weight of its own, multiply one token.
    """

    name: str
    block: int
    group: str
    in_features: int
    out_features: int
    copies: int = 1

    @property
    def role(self) -> str:
        """The last part of the name, such as ``q_proj``: the same in every block."""
        return self.name.rpartition(".")[2]

    @property
    def weights(self) -> int:
        """Number of weights that one token reads when dense: K·N, for each of the copies."""
        return self.in_features * self.out_features * self.copies


@dataclass(frozen=True)
class Architecture:
    """What observation cannot tell of a ``model_type``.

    Attributes:
        linear_types: classes that compute exactly what ``nn.Linear`` does under another name.
        skip: last parts of names of linear layers that stay dense (such as a router's).
    """

    linear_types: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()


ARCHITECTURES: dict[str, Architecture] = {
    "falcon": Architecture(linear_types=("FalconLinear",)),
}


def architecture_of(model: nn.Module) -> Architecture:
    """The table row of a model, or the row without peculiarities."""
    return ARCHITECTURES.get(model_type_of(model), Architecture())


def model_type_of(model: nn.Module) -> str:
    """``config.model_type``, such as ``"llama"``."""
    return str(getattr(getattr(model, "config", None), "model_type", type(model).__name__))


def text_config(model: nn.Module) -> Any:
    """The config of the decoder: a model of several towers keeps it inside its own."""
    config: Any = model.config
    return config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder without its language-model head; of a vision-language model, the language tower.

    Raises:
        UnsupportedModelError: no model of transformers, or an encoder-decoder.
    """
    config: Any = getattr(model, "config", None)
    if config is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no `config`: wina takes decoders of transformers "
            "(AutoModelForCausalLM)"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{type(model).__name__} is an encoder-decoder; wina takes decoder-only models"
        )
    towers = text_config(model) is not config
    decoder = model.get_decoder() if towers else getattr(model, "base_model", model)  # type: ignore[operator]
    if not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__}.base_model is not a module")
    return decoder


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the decoder blocks, in order."""
    decoder = decoder_of(model)
    count = getattr(text_config(model), "num_hidden_layers", None)
    inside = set(decoder.modules())
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and module in inside
    ]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise UnsupportedModelError(
            f"{type(decoder).__name__}: expected one ModuleList of {count} decoder blocks "
            f"(config.num_hidden_layers), found: {found}"
        )
    name, blocks = lists[0]
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks.children())]


@dataclass(frozen=True)
class DenseModule:
    """A module of a block that holds matrices and stays as it is.

    Attributes:
        name: of the module.
        reason: why it stays dense, for people.
        weights: elements of its matrices.
    """

    name: str
    reason: str
    weights: int


def check_mode(model: nn.Module) -> None:
    """Raise :class:`UnsupportedModelError` for a model whose weights cannot be written to."""
    if next(model.parameters()).is_inference():
        raise UnsupportedModelError(
            "the model was made in torch.inference_mode, where weights cannot be laid out anew nor "
            "gradients be taken: load it outside of it"
        )


def find_projections(model: nn.Module, offloaded: bool = False) -> list[Projection]:
    """All projections of the decoder blocks, in the order in which a token passes them.

    Sends two tokens through the decoder without gradients. Changes nothing. What cannot become
    sparse is left out: :func:`dense_modules` tells it, with reasons.

    Args:
        model: a decoder of transformers.
        offloaded: also those whose weights accelerate brings in for every call.

    Raises:
        UnsupportedModelError: no projection is left, with the reason of the first module; or one
            took no part in the pass.
    """
    linears: dict[str, tuple[int, nn.Linear]] = {}
    architecture = architecture_of(model)
    for index, name, module in _block_modules(model):
        why = why_dense(name, module, architecture, offloaded)
        if is_linear(module, architecture) and why is None:
            assert isinstance(module, nn.Linear)
            linears[name] = (index, module)
    if not linears:
        dense = dense_modules(model, offloaded)
        raise UnsupportedModelError(
            f"{dense[0].name} {dense[0].reason}"
            if dense
            else f"{type(model).__name__} has no nn.Linear in its blocks"
        )
    inputs = _observe_inputs(model, {name: module for name, (_, module) in linears.items()})
    groups = _group_by_input(inputs)
    return [
        Projection(
            name=name,
            block=linears[name][0],
            group=groups[name],
            in_features=linears[name][1].in_features,
            out_features=linears[name][1].out_features,
        )
        for name in inputs
    ]


def head_name(model: nn.Module) -> str | None:
    """The name of the language-model head, None for a model without one."""
    get: Any = getattr(model, "get_output_embeddings", lambda: None)
    head = get()
    return next((name for name, module in model.named_modules() if module is head), None)


def find_head(model: nn.Module) -> Projection:
    """The language-model head as a projection: the last one, behind all blocks.

    Sends two tokens through the model. Changes nothing.

    Raises:
        UnsupportedModelError: there is no head, it cannot become sparse, or it reads something
            other than the decoder's output.
    """
    name = head_name(model)
    if name is None:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no language-model head: set head='dense'"
        )
    module = model.get_submodule(name)
    reason = why_dense(name, module, architecture_of(model))
    if reason is None and not is_linear(module, architecture_of(model)):
        reason = f"is a {type(module).__name__}"
    if reason is not None:
        raise UnsupportedModelError(f"the language-model head {name} {reason}: set head='dense'")
    read: list[Tensor] = []
    seen: list[Tensor] = []

    def out(_: nn.Module, __: Any, output: Any) -> None:
        seen.append(output[0])

    with ExitStack() as stack:
        stack.callback(decoder_of(model).register_forward_hook(out).remove)
        stack.enter_context(_pre_hooks({name: module}, lambda _: lambda _, x: read.append(x[0])))
        _run_two_tokens(model)
    # NaN is equal to itself here: random weights may give it.
    if len(read) != 1 or not torch.equal(read[0].nan_to_num(), seen[0].nan_to_num()):
        raise UnsupportedModelError(
            f"{name} reads something other than the decoder's output: set head='dense'"
        )
    assert isinstance(module, nn.Linear)
    count = len(decoder_blocks(model))
    group = f"[{name}]"
    return Projection(name, count, group, module.in_features, module.out_features)


def linear_of(model: nn.Module, name: str) -> nn.Linear:
    """The module of a projection."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def find_experts(model: nn.Module) -> dict[str, tuple[FusedExperts, tuple[Projection, ...]]]:
    """Name → fused experts of the decoder blocks and their two projections, in order of execution.

    Sends two tokens through the decoder, to see how many experts a token passes.
    """
    found = {}
    for index, name, module in _block_modules(model):
        if not is_offloaded(module) and (fused := recognise_experts(module)) is not None:
            found[name] = (index, fused)
    if not found:
        return {}
    chosen: dict[str, int] = {}

    def observer(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            chosen[name] = arguments[1].shape[-1]

        return hook

    with _pre_hooks({name: fused.module for name, (_, fused) in found.items()}, observer):
        _run_two_tokens(decoder_of(model))

    def projection(name: str, role: str) -> Projection:
        index, fused = found[name]
        N, K = fused.shape(role)
        return Projection(f"{name}.{role}", index, f"{name}[{role}]", K, N, chosen[name])

    return {
        name: (fused, tuple(projection(name, role) for role in ROLES))
        for name, (_, fused) in found.items()
        if name in chosen
    }


def dense_modules(model: nn.Module, offloaded: bool = False) -> list[DenseModule]:
    """The modules of the decoder blocks that hold matrices and cannot become sparse."""
    architecture = architecture_of(model)
    found = []
    for _, name, module in _block_modules(model):
        reason = why_dense(name, module, architecture, offloaded)
        if reason is not None:
            found.append(DenseModule(name, reason, sum(_matrices(module).values())))
    return found


def _block_modules(model: nn.Module) -> Iterator[tuple[int, str, nn.Module]]:
    """(block, name, module) of everything inside the decoder blocks but adapters."""
    adapters: set[str] = set()
    for index, (block_name, block) in enumerate(decoder_blocks(model)):
        for name, module in block.named_modules(prefix=block_name):
            # PEFT keeps the parts of an adapter beside the layer that it wraps, `base_layer`.
            parts = getattr(module, "adapter_layer_names", ())
            adapters.update(f"{name}.{part}" for part in parts)
            if not any(name.startswith(f"{adapter}.") for adapter in adapters):
                yield index, name, module


def is_linear(module: nn.Module, architecture: Architecture) -> bool:
    """Whether a module computes what ``nn.Linear`` does, whatever its weight is made of."""
    return type(module) is nn.Linear or type(module).__name__ in architecture.linear_types


def why_dense(
    name: str, module: nn.Module, architecture: Architecture, offloaded: bool = False
) -> str | None:
    """Why a module that holds matrices cannot become sparse; None if it can, or holds none.

    With ``offloaded`` projections are fine whose weights accelerate brings in for every call.
    """
    if isinstance(module, nn.Embedding) or not _matrices(module):
        return None
    if name.rpartition(".")[2] in architecture.skip:
        return "is a router or a gate, which stays dense"
    if is_offloaded(module) and not (offloaded and is_linear(module, architecture)):
        return (
            "is offloaded by accelerate: its whole weight is copied for every token, so skipping "
            "channels saves nothing; a device_map without cpu or disk makes it sparse"
        )
    if recognise_experts(module) is not None:
        return None
    if not is_linear(module, architecture):
        shapes = ", ".join(n for n in _matrices(module))
        return (
            f"is a {type(module).__module__}.{type(module).__qualname__}, which keeps {shapes} "
            "itself: wina reads plain nn.Linear projections"
        )
    weight = module.weight
    assert isinstance(weight, Tensor)
    if weight.is_meta and not is_offloaded(module):
        return "is on the meta device: load the weights before calibrating or patching"
    if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
        return (
            f"holds a {type(weight).__name__} of {weight.dtype}: quantized weights of another "
            "library cannot be patched; load the model unquantized"
        )
    return None


def _matrices(module: nn.Module) -> dict[str, int]:
    """Name and shape → elements of a module's own matrices, whether parameters or buffers."""
    return {
        f"{name} {tuple(value.shape)}": value.numel()
        for name, value in module.named_parameters(recurse=False)
        if value.dim() >= 2
    }


def _observe_inputs(
    model: nn.Module, linears: dict[str, nn.Linear]
) -> dict[str, tuple[Tensor, int]]:
    """Name → input tensor of each projection and its version, in the order of execution."""
    inputs: dict[str, tuple[Tensor, int]] = {}

    def observer(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0]
            inputs.setdefault(name, (x, 0 if x.is_inference() else x._version))

        return hook

    with _pre_hooks(linears, observer):
        _run_two_tokens(decoder_of(model))
    unreached = [name for name in linears if name not in inputs]
    if unreached:
        raise UnsupportedModelError(
            f"{unreached[0]} took no part in a forward pass of two tokens "
            f"({len(unreached)} such modules): wina cannot tell what it reads"
        )
    return inputs


@contextmanager
def _pre_hooks(modules: Mapping[str, nn.Module], hook: Callable[[str], Any]) -> Iterator[None]:
    with ExitStack() as stack:  # a stop between two registrations leaves none behind
        for name, module in modules.items():
            stack.callback(module.register_forward_pre_hook(hook(name)).remove)
        yield


def _run_two_tokens(module: nn.Module) -> None:
    """Through a decoder, or a model with its head."""
    device = device_of(module)
    with torch.no_grad():
        module(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)


def _group_by_input(inputs: dict[str, tuple[Tensor, int]]) -> dict[str, str]:
    """Name → group name; the inputs are all alive, so equal addresses mean the same tensor, and
    equal versions that nothing was written to it in between.
    """
    members: dict[tuple[Any, ...], list[str]] = {}
    for name, (x, version) in inputs.items():
        parent = name.rpartition(".")[0]
        key = (parent, x.data_ptr(), tuple(x.shape), x.stride(), x.dtype, version)
        members.setdefault(key, []).append(name)
    return {
        name: f"{key[0]}[{','.join(n.rpartition('.')[2] for n in names)}]"
        for key, names in members.items()
        for name in names
    }


def group_members(projections: Sequence[Projection]) -> dict[str, list[Projection]]:
    """Group name → its projections, both in order of execution."""
    groups: dict[str, list[Projection]] = {}
    for projection in projections:
        groups.setdefault(projection.group, []).append(projection)
    return groups
