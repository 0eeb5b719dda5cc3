import pytest
import torch
import torch.nn.functional as F
from torch import nn

from wina.mlp import recognise_activation, recognise_gated_mlp


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (nn.SiLU(), "silu"),
        (nn.GELU(), "gelu"),
        (nn.GELU(approximate="tanh"), "gelu_tanh"),
        (nn.ReLU(), "relu"),
        (lambda x: F.relu(x) ** 2, "relu2"),
        (nn.Tanh(), None),
        (nn.Identity(), None),
        (nn.Linear(3, 3), None),
    ],
)
def test_activations_are_recognised_by_value(function: nn.Module, name: str | None) -> None:
    assert recognise_activation(function) == name


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(8, 16)
        self.up_proj = nn.Linear(8, 16)
        self.down_proj = nn.Linear(16, 8)
        self.act_fn = nn.SiLU()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Swapped(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


class Scaled(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) * 0.9


def test_formula_is_verified_by_numbers() -> None:
    found = recognise_gated_mlp(Gated())
    assert found is not None
    assert found.activation == "silu"
    assert recognise_gated_mlp(Swapped()) is None
    assert recognise_gated_mlp(Scaled()) is None
    assert recognise_gated_mlp(nn.Linear(2, 2)) is None
