"""Finds the projections of a decoder, and which of them read the same hidden state.

Structure is observed, not looked up: two tokens are sent through the model, and projections that
receive the same tensor form a projection group. :data:`ARCHITECTURES` holds what cannot be seen
that way. Knows nothing of sparsity.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wina.errors import UnsupportedModelError


@dataclass(frozen=True)
class Projection:
    """One linear layer inside a decoder block: y = Wx + b, W [out_features, in_features].

    ``group`` names the projection group: all projections with the same value read the same hidden
    state and sit in the same module.
    """

    name: str
    block: int
    group: str
    in_features: int
    out_features: int

    @property
    def role(self) -> str:
        """The last part of the name, such as ``q_proj``: the same in every block."""
        return self.name.rpartition(".")[2]

    @property
    def weights(self) -> int:
        """Number of weights, K·N: what one token reads when dense."""
        return self.in_features * self.out_features


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


def decoder_of(model: nn.Module) -> nn.Module:
    """The decoder without its language-model head."""
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
    decoder = getattr(model, "base_model", model)
    if not isinstance(decoder, nn.Module):
        raise UnsupportedModelError(f"{type(model).__name__}.base_model is not a module")
    return decoder


def decoder_blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """(name, module) of the decoder blocks, in order."""
    decoder = decoder_of(model)
    config: Any = model.config
    count = getattr(config, "num_hidden_layers", None)
    lists = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count
    ]
    if len(lists) != 1:
        found = ", ".join(name for name, _ in lists) or "none"
        raise UnsupportedModelError(
            f"{type(decoder).__name__}: expected one ModuleList of {count} decoder blocks "
            f"(config.num_hidden_layers), found: {found}"
        )
    name, blocks = lists[0]
    return [(f"{name}.{i}", block) for i, block in enumerate(blocks.children())]


def find_projections(model: nn.Module) -> list[Projection]:
    """All projections of the decoder blocks, in the order in which a token passes them.

    Sends two tokens through the decoder without gradients. Changes nothing.

    Raises:
        UnsupportedModelError: naming the module that does not fit, and why.
    """
    linears: dict[str, tuple[int, nn.Linear]] = {}
    architecture = architecture_of(model)
    for index, (block_name, block) in enumerate(decoder_blocks(model)):
        for name, module in block.named_modules(prefix=block_name):
            if check_projection(name, module, architecture):
                assert isinstance(module, nn.Linear)
                linears[name] = (index, module)
    if not linears:
        raise UnsupportedModelError(f"{type(model).__name__} has no nn.Linear in its blocks")
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


def check_projection(name: str, module: nn.Module, architecture: Architecture) -> bool:
    """Whether a module is a projection; raises where it holds weights that wina cannot read."""
    if name.rpartition(".")[2] in architecture.skip or isinstance(module, nn.Embedding):
        return False
    kind = type(module)
    if kind is nn.Linear or kind.__name__ in architecture.linear_types:
        weight = module.weight
        assert isinstance(weight, Tensor)
        if weight.is_meta:
            raise UnsupportedModelError(
                f"{name} is on the meta device: load the weights before calibrating or patching"
            )
        if type(weight) not in (Tensor, nn.Parameter) or not weight.is_floating_point():
            raise UnsupportedModelError(
                f"{name} holds a {type(weight).__name__} of {weight.dtype}: quantized weights of "
                "another library cannot be patched; load the model unquantized"
            )
        return True
    for parameter_name, parameter in module.named_parameters(recurse=False):
        if parameter.dim() >= 2:
            raise UnsupportedModelError(
                f"{name} is a {kind.__module__}.{kind.__qualname__} whose {parameter_name} has "
                f"shape {tuple(parameter.shape)}: wina reads plain nn.Linear projections only"
            )
    return False


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

    decoder = decoder_of(model)
    device = next(decoder.parameters()).device
    with ExitStack() as stack:
        for name, module in linears.items():
            stack.callback(module.register_forward_pre_hook(observer(name)).remove)
        with torch.no_grad():
            decoder(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    unreached = [name for name in linears if name not in inputs]
    if unreached:
        raise UnsupportedModelError(
            f"{unreached[0]} took no part in a forward pass of two tokens "
            f"({len(unreached)} such modules): wina cannot tell what it reads"
        )
    return inputs


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
