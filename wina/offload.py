"""Models larger than memory: modules whose weights accelerate brings in for every call.

Nothing here imports accelerate: what it does to a module is known by the hook that it leaves there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, overload

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate brings the weights to the device before every call (and no longer)."""
    hook = getattr(module, "_hf_hook", None)
    return any(getattr(one, "offload", False) for one in getattr(hook, "hooks", (hook,)))


def weight_and_bias(module: nn.Linear) -> tuple[Tensor, Tensor | None]:
    """Weight [N, K] and bias [N] of a linear module, brought in if they are elsewhere.

    They are the module's own where it has them, copies that are freed with the last reference where
    they are offloaded.
    """
    if not is_offloaded(module):
        return module.weight, module.bias
    hook: Any = module._hf_hook
    hook.pre_forward(module)
    try:
        return module.weight.detach(), None if module.bias is None else module.bias.detach()
    finally:
        hook.post_forward(module, None)


def weight_of(module: nn.Linear) -> Tensor:
    """The weight [N, K], see :func:`weight_and_bias`."""
    return weight_and_bias(module)[0]


class WeightsOf(Sequence[Tensor]):
    """The weights of linear modules, each brought in when it is asked for."""

    def __init__(self, modules: Sequence[nn.Linear]) -> None:
        self._modules = modules

    @overload
    def __getitem__(self, index: int) -> Tensor: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Tensor]: ...
    def __getitem__(self, index: int | slice) -> Tensor | Sequence[Tensor]:
        if isinstance(index, slice):
            return WeightsOf(self._modules[index])
        return weight_of(self._modules[index])

    def __len__(self) -> int:
        return len(self._modules)


def device_of(model: nn.Module) -> torch.device:
    """Where a model takes its input: the device of its first parameter that is in memory."""
    for parameter in model.parameters():
        if not parameter.is_meta:
            return parameter.device
    for module in model.modules():
        device = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return torch.device("meta")


@contextmanager
def recomputed(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Let gradients need one offloaded block in memory at a time.

    A graph keeps the weights that its products need on the way back: of an offloaded model, all of
    them. So these blocks run again on the way back, one after the other.
    """
    with ExitStack() as stack:
        for block in blocks:
            if any(is_offloaded(module) for module in block.modules()):
                again = partial(checkpoint, block.forward, use_reentrant=False)
                stack.enter_context(forward_replaced(block, again))
        yield


@contextmanager
def forward_replaced(module: nn.Module, forward: Any) -> Iterator[None]:
    """Let a module compute something else; whatever computed before, a hook's too, comes back."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.forward = before
