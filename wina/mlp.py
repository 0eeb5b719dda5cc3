"""The module that replaces a gated MLP: one fused product for gate and up, then down."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wina.kernels.reference import ACTIVATIONS
from wina.linear import SparseLinear
from wina.offload import device_of


@dataclass(frozen=True)
class GatedForm:
    """Names under which an MLP class keeps the parts of down(act(gate(x))·up(x))."""

    gate: str
    up: str
    down: str
    activation: str


# Forms are recognised by these names and then verified by numbers, so a class that uses the names
# for another formula is left as it is (its projections are replaced one by one).
GATED_FORMS = (
    GatedForm("gate_proj", "up_proj", "down_proj", "act_fn"),
    GatedForm("w1", "w3", "w2", "act_fn"),
)


@dataclass(frozen=True)
class GatedMLP:
    """A verified gated MLP: its form and the kernels' name of its activation."""

    form: GatedForm
    activation: str


def recognise_gated_mlp(module: nn.Module) -> GatedMLP | None:
    """The gated form of a module, or None. Runs it on one random token to make sure."""
    children = dict(module.named_children())
    for form in GATED_FORMS:
        if set(children) != {form.gate, form.up, form.down, form.activation}:
            continue
        activation = recognise_activation(children[form.activation])
        if activation is None:
            continue
        gate, up, down = (children[name] for name in (form.gate, form.up, form.down))
        if not all(isinstance(child, nn.Linear) for child in (gate, up, down)):
            continue
        generator = torch.Generator().manual_seed(0)
        weight = gate.weight
        assert isinstance(weight, Tensor)
        x = torch.randn(1, 1, weight.shape[1], generator=generator)
        x = x.to(device_of(module), weight.dtype)
        with torch.no_grad():
            expected = down(ACTIVATIONS[activation](gate(x)) * up(x))
            if torch.allclose(module(x), expected, rtol=1e-2, atol=1e-6):
                return GatedMLP(form, activation)
    return None


def recognise_activation(function: Callable[[Tensor], Tensor]) -> str | None:
    """The kernels' name of an elementwise function, found by comparing values; None if unknown."""
    x = torch.linspace(-6.0, 6.0, 49)
    try:
        with torch.no_grad():
            y = function(x)
    except (RuntimeError, TypeError):
        return None
    for name, known in ACTIVATIONS.items():
        if isinstance(y, Tensor) and torch.allclose(y, known(x), rtol=1e-5, atol=1e-6):
            return name
    return None


class SparseGatedMLP(nn.Module):
    """down(act(gate(x))·up(x)) with the three projections sparse.

    Its children have the names of the module it replaces, so state dicts do not change.

    Attributes:
        gate_mask: down's thresholds are those of |act(gate(x))|; a channel below them is a row of
            up and a column of down that need not be read (CATS, arXiv 2404.08763).
    """

    def __init__(self, original: nn.Module, gated: GatedMLP, gate_mask: bool = False) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.gated = gated
        self.gate_mask = gate_mask
        self.train(original.training)

    @property
    def _watched(self) -> bool:
        """Whether somebody's hook is on a module that one launch would pass by."""
        form = self.gated.form
        skipped = (self._modules[name] for name in (form.gate, form.up, form.activation))
        return any(m._forward_hooks or m._forward_pre_hooks for m in skipped if m is not None)

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., S, K] → [..., S, K]."""
        form = self.gated.form
        gate, up, down = (self._modules[name] for name in (form.gate, form.up, form.down))
        assert gate is not None
        assert up is not None
        assert down is not None
        if self.gate_mask and isinstance(up, SparseLinear) and isinstance(down, SparseLinear):
            # Dense products, where what the gate leaves out is zero.
            activated = ACTIVATIONS[self.gated.activation](gate(x))
            chosen: Tensor = down.dense(down.chosen(activated) * up.dense(x))
            return chosen
        if (
            isinstance(gate, SparseLinear)
            and isinstance(up, SparseLinear)
            and not self._watched
            and _fuses(gate, up, x)
        ):
            h = gate.gate_up(up, x, self.gated.activation)
        else:  # an adapter may have been wrapped around them
            h = ACTIVATIONS[self.gated.activation](gate(x)) * up(x)
        y: Tensor = down(h)
        return y


def _fuses(gate: SparseLinear, up: SparseLinear, x: Tensor) -> bool:
    """Whether every token of x is sparse, one launch can give both products, and nobody looks at
    them on their own.
    """
    control = gate.control
    return (
        control.observer is None
        and control.first_sparse(x) == 0
        and control.sparse_tokens(x) is None
        and gate.one_launch
        and up.one_launch
        and gate.choice.backend.name == up.choice.backend.name
        and not torch.is_grad_enabled()
    )
