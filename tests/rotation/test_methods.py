"""Methods that want a rotated model, from calibration to evaluation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import config, logits, plan_for
from rotating import turned
from torch import Tensor, nn

import wina
from wina.errors import PatchStateError, PlanError
from wina.eval.perplexity import compare
from wina.methods import METHODS
from wina.rotation import rotated, rotation_of
from wina.statistics import column_norms
from wina.testing import tiny_model, tiny_tokenizer

ROTATING = [name for name in METHODS if METHODS[name].rotation != "none"]


@pytest.mark.parametrize("method", ROTATING)
def test_an_unrotated_model_is_refused(method: str, llama: nn.Module) -> None:
    with pytest.raises(PatchStateError, match=r"wina\.rotate\(model"):
        plan_for(llama, method=method)
    plan = plan_for(llama, method=method, rotation="none", allocation="uniform")
    assert plan.rotation == "none"


@pytest.mark.parametrize("method", ROTATING)
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "falcon"])
def test_a_rotated_model_drops_what_was_asked(method: str, name: str) -> None:
    model = tiny_model(name)
    turned(model, METHODS[method].rotation)
    plan = plan_for(model, method=method)
    assert plan.rotation == METHODS[method].rotation
    assert plan.realised == pytest.approx(0.5, abs=0.02)
    wina.sparsify(model, plan)
    wina.restore(model)


def test_wina_paper_weighs_keys_and_gates_only(llama: nn.Module) -> None:
    turned(llama, "orthogonal")
    plan = plan_for(llama, method="wina-paper", selector="threshold")
    for name, layer in plan.layers.items():
        weight = llama.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        constants = layer.threshold / layer.cutoff
        if layer.projection.role in ("k_proj", "gate_proj"):
            used = column_norms([weight]) > 1e-3  # k_proj has fewer outputs than inputs
            expected = 1 / column_norms([weight])
            assert torch.allclose(constants[used], expected[used], rtol=1e-4)
        else:
            assert torch.allclose(constants, torch.ones(()))


def test_a_plan_knows_its_rotation(llama: nn.Module, tmp_path: Path) -> None:
    with rotated(llama, "orthogonal", show_progress=False):
        plan_for(llama, method="wina-paper").save(tmp_path)
    plan = wina.SparsityPlan.load(tmp_path)
    with pytest.raises(PlanError, match="rotation 'orthogonal', this one has 'none'"):
        wina.sparsify(llama, plan)
    turned(llama, "orthogonal")
    wina.sparsify(llama, plan)


def test_compare_rotates_and_counts_the_products(llama: nn.Module, tokens: Tensor) -> None:
    before = logits(llama, tokens)
    rows = compare(
        llama, tiny_tokenizer(), ["wina-paper", "wina"], [0.5], texts=["Words to score. " * 40],
        window=64, settings={"calibration_tokens": 512, "window": 128}, show_progress=False,
    )  # fmt: skip
    assert [row["extra_bytes"] for row in rows] == [0, 2 * 2 * 64**2 * 4, 0]
    assert rotation_of(llama) == "none"
    assert torch.equal(logits(llama, tokens), before)


def test_a_group_takes_the_criterion_of_its_named_member(llama: nn.Module) -> None:
    turned(llama, "orthogonal")
    plan = plan_for(llama, method="wina-paper", mask="group", allocation="uniform")
    layers = {layer.projection.role: layer for layer in plan.layers.values()}
    assert torch.equal(layers["q_proj"].threshold, layers["k_proj"].threshold)
    assert layers["q_proj"].threshold.std() > 0
    assert layers["o_proj"].threshold.std() == 0


def test_settings_name_a_rotation() -> None:
    assert config(method="larosa").rotation_spec == "pca"
    assert config(method="larosa").selector_spec == "topk"
    assert config(method="larosa", selector="threshold").selector_spec == "threshold"
    with pytest.raises(wina.WinaError, match="Did you mean 'orthogonal'"):
        config(rotation="orthogonl")
