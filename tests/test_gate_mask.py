"""CATS: the gate decides which rows of up and which columns of down are read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from conftest import CALIBRATION, config, logits, plan_for
from torch import Tensor, nn

import wina
from wina.errors import ConfigError, UnsupportedModelError
from wina.eval.perplexity import perplexity
from wina.inspection import measure_sparsity
from wina.testing import random_tokens, tiny_model
from wina.texts import to_windows

SPARSITY = 0.3


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen2"])
def test_up_and_down_share_the_budget(name: str) -> None:
    model = tiny_model(name)
    plan = plan_for(model, method="cats", sparsity=SPARSITY)
    assert plan.realised == pytest.approx(SPARSITY, abs=0.01)
    for layer in plan.layers.values():
        if layer.projection.role in ("up_proj", "down_proj"):
            assert layer.sparsity > SPARSITY
            assert layer.realised == pytest.approx(layer.sparsity, abs=0.01)
        else:
            assert (layer.sparsity, layer.realised) == (0.0, 0.0)
        if layer.projection.role != "down_proj":
            assert (layer.threshold == -1).all()
    wina.sparsify(model, plan, backend="reference")
    windows = to_windows(random_tokens(2048, seed=4), None, 128)
    assert perplexity(model, windows, show_progress=False).realised == pytest.approx(
        SPARSITY, abs=0.02
    )


def test_a_block_computes_the_formula(llama: nn.Module) -> None:
    mlp = llama.model.layers[0].mlp  # type: ignore[union-attr,index]
    gate, up, down = (
        getattr(mlp, name).weight.detach().clone() for name in ("gate_proj", "up_proj", "down_proj")
    )
    plan = plan_for(llama, method="cats", sparsity=SPARSITY)
    threshold = plan.layers["model.layers.0.mlp.down_proj"].threshold
    wina.sparsify(llama, plan, prefill="all", backend="reference")
    x = torch.randn(1, 9, 64)
    activated = F.silu(x.double() @ gate.T.double())
    keep = activated.abs() > threshold
    keep[:, :2] = True  # the first tokens stay dense
    wanted = (activated * keep * (x.double() @ up.T.double())) @ down.T.double()
    patched = llama.model.layers[0].mlp  # type: ignore[union-attr,index]
    with measure_sparsity(llama) as counter, torch.no_grad():
        found: Tensor = patched(x)  # type: ignore[operator]
    assert torch.allclose(found.double(), wanted, rtol=1e-4, atol=1e-5)
    shares = counter.by_projection
    dropped = float((~keep[:, 2:]).double().mean())
    for role in ("up_proj", "down_proj"):
        assert shares[f"model.layers.0.mlp.{role}"] == pytest.approx(dropped)
    assert shares["model.layers.0.mlp.gate_proj"] == 0.0


def test_dense_and_restore(llama: nn.Module, tokens: Tensor) -> None:
    before = logits(llama, tokens)
    plan = plan_for(llama, method="cats", sparsity=SPARSITY)
    assert torch.equal(logits(llama, tokens), before)
    wina.sparsify(llama, plan, prefill="all", backend="reference")
    assert not torch.allclose(logits(llama, tokens), before, rtol=1e-4)
    with wina.dense(llama):
        assert torch.allclose(logits(llama, tokens), before, rtol=1e-4, atol=1e-5)
    wina.restore(llama)
    assert torch.equal(logits(llama, tokens), before)


def test_what_cannot_be_is_refused(llama: nn.Module) -> None:
    plan = plan_for(llama, method="cats", sparsity=SPARSITY)
    with pytest.raises(ConfigError, match="no kernel"):
        wina.sparsify(llama, plan)
    with pytest.raises(ConfigError, match="out of reach"):
        plan_for(llama, method="cats", sparsity=0.8)
    for settings in ({"allocation": "uniform"}, {"correction": "bias"}, {"mask": "group"}):
        with pytest.raises(ConfigError, match="method 'cats'"):
            config(method="cats", **settings)
    with pytest.raises((ConfigError, UnsupportedModelError), match="gated MLPs"):
        wina.calibrate(
            tiny_model("starcoder2"), None, config(method="cats", sparsity=0.1), CALIBRATION,
            show_progress=False,
        )  # fmt: skip
