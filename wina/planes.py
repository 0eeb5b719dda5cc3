"""Weights in planes: how many bits of a channel are read is chosen token by token.

A weight in two planes is the sum of its rounding to 4 bits and of what that leaves, rounded again
(:data:`wina.kernels.quantization.WEIGHT_DTYPES`). A channel may then be read in full, in 4 bits, or
not at all, and one rule decides on both: a plane's channel is kept iff |x_j| times the norm of its
column *in that plane* is large, since that is what leaving it out costs. The second plane's columns
are about ten times shorter, so it is read for the channels that are about ten times larger.

To everything that looks at a projection it is one of planes·K input channels, whose inputs are the
K hidden values repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from wina.kernels.quantization import WeightDtype
from wina.rounding import Nearest
from wina.statistics import second_moments


def repeated(x: Tensor, planes: int) -> Tensor:
    """Hidden states [..., K] as all planes read them, [..., planes·K]."""
    return x if planes == 1 else torch.cat([x] * planes, dim=-1)


def constants_of_planes(weights: Sequence[Tensor], constants: Tensor, planes: int) -> Tensor:
    """The constants c of every plane's channels, from those of the whole weight.

    Leaving plane p of channel j out changes the output by ‖W_p,j‖/‖W_j‖ of what leaving out the
    whole channel would: c_j is scaled by that share. For c = ‖W_j‖₂ it is ‖W_p,j‖₂.

    Args:
        weights: the matrices [N_i, planes·K] that a mask serves.
        constants: c [K] of their sums over the planes.
        planes: their number.

    Returns:
        [planes·K] float32; the first plane's are c itself.
    """
    lengths = sum(weight.float().square().sum(0).unflatten(0, (planes, -1)) for weight in weights)
    assert isinstance(lengths, Tensor)
    whole = sum(summed(weight, planes).float().square().sum(0) for weight in weights)
    share = (lengths[1:] / whole).sqrt().nan_to_num(0.0, posinf=0.0)
    return torch.cat([constants, (share * constants).flatten()])


def summed(weight: Tensor, planes: int) -> Tensor:
    """The weight [N, K] that planes [N, planes·K] stand for."""
    whole: Tensor = weight.unflatten(1, (planes, -1)).sum(1)
    return whole


def moments_of_planes(x: Tensor, planes: int) -> list[Tensor]:
    """Σ z·zᵀ of every plane, z the inputs of channels that it and no later plane is read for.

    There the error of what it leaves of the weight stays; elsewhere a later plane makes up for it.

    Args:
        x: masked inputs [..., planes·K].

    Returns:
        [K, K] float32 each.
    """
    parts = [*x.unflatten(-1, (planes, -1)).unbind(-2), None]
    return [
        second_moments(part if later is None else part - later)
        for part, later in pairwise(parts)
        if part is not None
    ]


@contextmanager
def in_planes(
    modules: Mapping[str, nn.Linear], kind: WeightDtype | None
) -> Iterator[Mapping[str, Tensor]]:
    """Let linear modules be [N, planes·K] and repeat their inputs, inside the ``with`` block.

    For calibration: hooks that are registered inside see the repeated inputs. Afterwards the
    modules are what they were, with the very same weights. Meanwhile all planes are in memory as
    well, in the dtype of the weights.

    Args:
        modules: with float weights [N, K], by name.
        kind: how weights will be kept; nothing is done for None or one plane.

    Yields:
        The weights [N, K] that stand back, by name; those that the modules have are rounded.
    """
    if kind is None or kind.planes == 1:
        yield {}
        return
    planes, rounding = kind.planes, Nearest()

    def repeat(_: nn.Module, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (repeated(arguments[0], planes), *arguments[1:])

    def put_back(module: nn.Linear, weight: nn.Parameter) -> None:
        module.weight = weight
        module.in_features = weight.shape[1]

    weights = {}
    with ExitStack() as stack:
        for name, module in modules.items():
            weights[name] = module.weight.data
            own = module.weight
            assert isinstance(own, nn.Parameter)
            stack.callback(put_back, module, own)
            stack.callback(module.register_forward_pre_hook(repeat).remove)
            rounded = rounding.round(weights[name], None, kind.name)
            # A parameter of its own: the head's may be the embedding's as well.
            floats = rounded.dequantize().t().to(weights[name])
            module.weight = nn.Parameter(floats, requires_grad=False)
            module.in_features *= planes
        yield weights
