"""Constants that are learned: they lower the divergence and leave the model as it was."""

from __future__ import annotations

import pytest
import torch
from conftest import CALIBRATION, config, divergence, plan_for
from torch import nn

import wina
from wina.corrections import Learned, Lesson


@pytest.mark.parametrize("width", [None, "int8"])
def test_learning_lowers_the_divergence(llama: nn.Module, width: str | None) -> None:
    ids = CALIBRATION[:1024].reshape(-1, 128)
    settings = {"sparsity": 0.6, "weight_dtype": width}
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    plain = plan_for(llama, **settings)
    learned = plan_for(llama, correction="learned:steps=12:rate=0.02", **settings)
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert all(p.requires_grad for p in llama.parameters())
    if width is None:
        assert divergence(llama, learned, ids) < 0.9 * divergence(llama, plain, ids)


def test_learning_is_reproducible(llama: nn.Module) -> None:
    first, second = (plan_for(llama, correction="learned:steps=2") for _ in range(2))
    for name, layer in first.layers.items():
        bias = second.layers[name].terms.bias
        assert bias is not None
        assert torch.equal(bias, layer.terms.bias)  # type: ignore[arg-type]


def test_a_failure_leaves_a_dense_model(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Learned, "learn", fail)
    with pytest.raises(KeyboardInterrupt):
        plan_for(llama, correction="learned")
    assert not wina.patch.is_patched(llama)
    assert all(p.requires_grad for p in llama.parameters())


def test_learns_the_constant_that_is_missing() -> None:
    """Sparse logits that lack a constant: the divergence falls to zero."""
    target = torch.tensor([0.5, -0.25, 0.0, 0.25])
    shift = torch.zeros(4, requires_grad=True)
    logits = torch.randn(64, 4)
    lesson = Lesson(
        windows=torch.arange(64).reshape(4, 16),
        shifts={"p": shift},
        units={"p": torch.ones(4)},
        dense=lambda ids: (logits[ids.flatten()] + target).log_softmax(-1),
        sparse=lambda ids: (logits[ids.flatten()] + shift).log_softmax(-1),
    )
    Learned(steps=80, rate=0.03, tokens=32).learn(lesson)
    found = shift.detach()
    torch.testing.assert_close(found - found.mean(), target - target.mean(), atol=0.02, rtol=0)


def test_sparsity_zero_learns_nothing(llama: nn.Module) -> None:
    plan = plan_for(llama, sparsity=0.0, correction="learned")
    assert not any(layer.terms.tensors() for layer in plan.layers.values())


def test_needs_gradients_of_the_sparse_model() -> None:
    assert config(correction="learned").make_correction().needs is wina.needs.Needs.EVALUATIONS
