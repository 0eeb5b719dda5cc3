"""A rotated model is the same function, read in another basis."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, logits
from rotating import turned
from torch import Tensor

from wina import restore, rotate, sparsify, unrotate
from wina.errors import ConfigError, PatchStateError, UnsupportedModelError
from wina.rotation import apply, rotation_elements, rotation_of
from wina.rotation.norms import RotatedNorm, rms_offset
from wina.rotation.reads import find_reads
from wina.testing import TINY, random_tokens, tiny_model

SPECS = ("orthogonal", "orthogonal:joint=1", "pca")
SHARED = ("orthogonal:shared=1", "pca:shared=1")
# Why a model cannot be rotated: no norm before the projections at all.
NO_PLACE = {"olmo2": "without a norm before it"}
# Why its residual stream cannot be.
NO_STREAM = {
    **NO_PLACE,
    "gemma2": "post_attention_layernorm normalises what a block adds",
    "gemma3_text": "post_attention_layernorm normalises what a block adds",
    "starcoder2": "no RMSNorm",
    "gpt_neox": "no RMSNorm",
    "cohere": "no RMSNorm",
    "falcon": "no RMSNorm",
    **dict.fromkeys(("mixtral", "qwen3_moe", "olmoe", "gpt_oss"), "or feeds fused experts"),
}
IDS = random_tokens(40, seed=3).view(2, 20)


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("spec", SPECS + SHARED)
@pytest.mark.parametrize("name", list(TINY))
def test_a_rotated_model_is_the_same_function(name: str, spec: str, tied: bool) -> None:
    model: Any = tiny_model(name, torch.float64, tie_word_embeddings=tied)
    model.set_experts_implementation("eager")  # torch's grouped products know no float64
    before = logits(model, IDS)
    reason = (NO_STREAM if spec in SHARED else NO_PLACE).get(name)
    if reason is not None:
        with pytest.raises(UnsupportedModelError, match=reason):
            turned(model, spec)
        assert torch.equal(logits(model, IDS), before)
        assert rotation_of(model) == "none"
        return
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    turned(model, spec, keep_original=True)
    assert (logits(model, IDS) - before).abs().max() < 1e-5 * before.abs().max()
    changed = dict(model.named_parameters())
    assert any(
        name not in changed or not torch.equal(weights[name], changed[name]) for name in weights
    )
    unrotate(model)
    after = dict(model.named_parameters())
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[name], weights[name]) for name in weights)


def test_columns_of_the_chosen_projections_become_orthogonal() -> None:
    model = tiny_model("llama", torch.float64)
    turned(model, "orthogonal")
    for layer in model.model.layers:  # type: ignore[union-attr]
        for weight in (layer.self_attn.k_proj.weight, layer.mlp.gate_proj.weight):  # type: ignore[union-attr]
            gram = weight.T @ weight  # type: ignore[operator]
            off = gram - torch.diag(gram.diagonal())
            assert off.abs().max() < 1e-9 * gram.diagonal().max()
            assert (gram.diagonal().diff() < 1e-9).all(), "largest first"


def test_components_of_hidden_states_become_uncorrelated() -> None:
    model = tiny_model("gemma3_text", torch.float64)
    turned(model, "pca")
    norm = model.model.layers[1].pre_feedforward_layernorm  # type: ignore[union-attr,index]
    assert isinstance(norm, RotatedNorm)
    seen: list[Tensor] = []
    norm.register_forward_hook(lambda _, __, y: seen.append(y[:, 2:].flatten(0, 1)))
    with torch.no_grad():
        # The windows that the rotation took, which are all of the text that fits.
        model(CALIBRATION.view(-1, 128)[torch.linspace(0, 15, 8).round().long()])
    x = torch.cat(seen)
    moments = x.T @ x / len(x)
    off = moments - torch.diag(moments.diagonal())
    assert off.abs().max() < 1e-5 * moments.diagonal().max()


def test_norm_weights_leave_the_norm_and_join_the_projections() -> None:
    model = tiny_model("gemma2", torch.float64)
    turned(model, "orthogonal")
    layer = model.model.layers[0]  # type: ignore[union-attr,index]
    assert not layer.input_layernorm.norm.weight.any()  # Gemma's gain is 1 + w
    assert layer.post_attention_layernorm.weight.any(), "stays: it is not followed by a projection"


def test_a_shared_basis_costs_nothing_at_run_time_and_unties() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with pytest.warns(UserWarning, match="tied"):
        rotate(model, "orthogonal:shared=1", show_progress=False)
    assert rotation_elements(model).elements == 0
    assert model.config.tie_word_embeddings is False  # type: ignore[union-attr]
    assert model.lm_head.weight is not model.model.embed_tokens.weight  # type: ignore[union-attr]


def test_each_basis_of_its_own_costs_two_products_a_layer() -> None:
    model = tiny_model("llama", torch.bfloat16)
    turned(model, "orthogonal")
    totals = rotation_elements(model)
    assert totals.elements == 2 * 2 * 64**2
    assert totals.bytes == 2 * totals.elements


def test_tied_embeddings_stay_tied_where_the_stream_is_not_rotated() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rotate(model, "orthogonal", show_progress=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "norm", "offset"),
    [
        ("llama", "model.layers.0.input_layernorm", 0.0),
        ("gemma2", "model.layers.0.input_layernorm", 1.0),
        ("starcoder2", "model.layers.0.input_layernorm", None),
        ("cohere", "model.layers.0.input_layernorm", None),
    ],
)
def test_norms_are_recognised_by_what_they_compute(
    name: str, norm: str, offset: float | None
) -> None:
    assert rms_offset(tiny_model(name).get_submodule(norm)) == offset


def test_parallel_blocks_share_one_hidden_state() -> None:
    reads = find_reads(tiny_model("cohere")).blocks
    assert [len(read.projections) for read in reads] == [5, 5]


def test_a_model_that_16_bits_would_change_is_told_to_take_32(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(apply._TOLERANCE, torch.bfloat16, 1e-6)
    model = tiny_model("llama").to(torch.bfloat16)
    before = logits(model, IDS)
    with pytest.raises(UnsupportedModelError, match="load it in float32"):
        turned(model, "orthogonal")
    assert torch.equal(logits(model, IDS), before)


def test_a_norm_that_something_else_reads_is_noticed() -> None:
    model = tiny_model("llama")
    mlp = model.model.layers[0].mlp  # type: ignore[union-attr,index]
    inner = mlp.forward
    mlp.forward = lambda x: inner(x) + x  # type: ignore[method-assign,assignment,operator]
    before = logits(model, IDS)
    with pytest.raises(UnsupportedModelError, match="besides projections"):
        turned(model, "orthogonal")
    assert torch.equal(logits(model, IDS), before)


def test_states_are_guarded() -> None:
    model = tiny_model("llama")
    with pytest.raises(PatchStateError, match="not rotated"):
        unrotate(model)
    with pytest.raises(ConfigError, match="nothing to do"):
        rotate(model, "none")
    turned(model, "orthogonal")
    with pytest.raises(PatchStateError, match="rotated already"):
        rotate(model, "pca")
    with pytest.raises(PatchStateError, match="not kept"):
        unrotate(model)


def test_a_rotated_model_can_be_sparsified_and_restored() -> None:
    model = tiny_model("llama")
    turned(model, "orthogonal", keep_original=True)
    before = logits(model, IDS)
    plan = sparsify(
        model, sparsity=0.5, texts=CALIBRATION, calibration_tokens=1024, window=128,
        show_progress=False,
    )  # fmt: skip
    assert plan.realised == pytest.approx(0.5, abs=0.02)
    with pytest.raises(PatchStateError, match="restore"):
        unrotate(model)
    restore(model)
    assert torch.equal(logits(model, IDS), before)
    unrotate(model)
    assert rotation_of(model) == "none"
