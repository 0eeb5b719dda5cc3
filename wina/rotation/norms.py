"""Norms: which of them a rotation passes through, and the module that rotates what one gives."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Large against every epsilon, small enough for float32 inside the norm.
_SCALE = 1e3


def is_norm(module: nn.Module) -> bool:
    """Whether a module normalises, by the name of its class."""
    return "norm" in type(module).__name__.lower()


def rms_offset(norm: nn.Module) -> float | None:
    """What a norm adds to its weight: 0 for y = x/rms(x)·w, 1 for Gemma's y = x/rms(x)·(1 + w).

    None for any other function (LayerNorm, a bias): found by running a copy on a random vector.
    """
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or len(list(norm.parameters())) != 1:
        return None
    probe = copy.deepcopy(norm).to(device="cpu", dtype=torch.float64)
    parameter: Any = probe.weight
    x = torch.randn(3, len(weight), generator=torch.Generator().manual_seed(0)) * _SCALE
    x = x.double() + _SCALE
    plain = x / x.square().mean(-1, keepdim=True).sqrt()
    with torch.no_grad():
        for offset in (0.0, 1.0):
            results = []
            for gain in (1.0, 3.0):
                parameter.fill_(gain - offset)
                results.append(torch.allclose(probe(x), gain * plain, rtol=1e-5, atol=1e-5))
            if all(results):
                return offset
    return None


class RotatedNorm(nn.Module):
    """A norm whose output is multiplied by an orthogonal matrix.

    Attributes:
        rotation: Qᵀ [hidden, hidden], so that the product is one of rows.
    """

    rotation: Tensor

    def __init__(self, norm: nn.Module, rotation: Tensor) -> None:
        super().__init__()
        self.norm = norm
        self.register_buffer("rotation", rotation.t().contiguous())
        self.train(norm.training)

    def forward(self, x: Tensor, *arguments: Any, **keywords: Any) -> Tensor:
        """Hidden states [..., hidden] → norm(x)·Q."""
        return F.linear(self.norm(x, *arguments, **keywords), self.rotation)
