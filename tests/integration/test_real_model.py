"""SmolLM2-135M-Instruct, fetched on first use: what tiny random models cannot show."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import decode_logits, logits
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import wina
from wina.demo_model import demo_model_folder
from wina.eval.perplexity import perplexity
from wina.texts import bundled, to_windows

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def folder() -> Path:
    return demo_model_folder()


@pytest.fixture(scope="module")
def tokenizer(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def smollm(folder: Path):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def plan(smollm, tokenizer) -> wina.SparsityPlan:
    config = wina.SparsityConfig(calibration_tokens=4096)
    return wina.calibrate(smollm, tokenizer, config, show_progress=False)


@pytest.fixture
def tokens(tokenizer) -> Tensor:
    return tokenizer(bundled("heldout")[0], return_tensors="pt").input_ids[:, :64]


def test_demo_folder_is_a_normal_one(folder: Path, smollm) -> None:
    assert "quantization_config" not in smollm.config.to_dict()
    assert smollm.lm_head.weight is smollm.model.embed_tokens.weight


def test_sparsity_zero_is_dense_to_rounding_and_restore_is_exact(
    smollm, tokenizer, tokens: Tensor
) -> None:
    """Float32 rounding adds up over 30 layers: the dense model itself is 1e-4 from float64.

    So the sparse path is held against float64, and may be no worse than three times that far.
    """
    dense = logits(smollm, tokens)
    exact = logits(copy.deepcopy(smollm).double(), tokens)
    bound = 3 * float((dense - exact).abs().max())
    assert bound < 1e-3
    storage = {name: p.untyped_storage().data_ptr() for name, p in smollm.named_parameters()}
    config = wina.SparsityConfig(sparsity=0.0, prefill="all", calibration_tokens=512)
    wina.sparsify(smollm, config, tokenizer=tokenizer, show_progress=False)
    try:
        whole, stepwise = logits(smollm, tokens), decode_logits(smollm, tokens)
    finally:
        wina.restore(smollm)
    print(  # shown by `pytest -s`
        f"\nmax |logit difference|: dense to float64 {bound / 3:.3g}; sparsity 0, "
        f"prefill: to dense {(whole - dense).abs().max():.3g}, "
        f"to float64 {(whole - exact).abs().max():.3g}; "
        f"decode: to float64 {(stepwise - exact[0, 8:]).abs().max():.3g}"
    )
    assert (whole - exact).abs().max() <= bound
    assert (stepwise - exact[0, 8:]).abs().max() <= bound
    assert torch.equal(logits(smollm, tokens), dense)
    assert {n: p.untyped_storage().data_ptr() for n, p in smollm.named_parameters()} == storage


@pytest.mark.xfail(
    reason="float32 rounding over 30 layers: 1.7e-4; the dense model is 1.1e-4 from float64",
    strict=True,
)
def test_sparsity_zero_is_within_1e_4_of_dense(smollm, tokenizer, tokens: Tensor) -> None:
    """The bound that tiny models meet and that is still asked of this one."""
    dense = logits(smollm, tokens)
    config = wina.SparsityConfig(sparsity=0.0, prefill="all", calibration_tokens=512)
    wina.sparsify(smollm, config, tokenizer=tokenizer, show_progress=False)
    try:
        whole = logits(smollm, tokens)
    finally:
        wina.restore(smollm)
    assert (whole - dense).abs().max() <= 1e-4


def test_half_the_weights_say_sensible_things(smollm, tokenizer, plan) -> None:
    wina.sparsify(smollm, plan)
    try:
        prompt = tokenizer("The capital of France is", return_tensors="pt")
        text = tokenizer.decode(smollm.generate(**prompt, max_new_tokens=8, do_sample=False)[0])
        assert "Paris" in text
    finally:
        wina.restore(smollm)


def test_realised_sparsity_and_quality_on_held_out_text(smollm, tokenizer, plan) -> None:
    windows = to_windows(bundled("heldout"), tokenizer, 512, 2048)
    dense = perplexity(smollm, windows, show_progress=False)
    wina.sparsify(smollm, plan)
    try:
        sparse = perplexity(smollm, windows, show_progress=False)
    finally:
        wina.restore(smollm)
    assert sparse.realised == pytest.approx(0.5, abs=0.02)
    assert 0 < sparse.nats - dense.nats < 0.7
    random = wina.sparsify(
        smollm,
        method="random",
        sparsity=0.5,
        calibration_tokens=2048,
        tokenizer=tokenizer,
        show_progress=False,
    )
    try:
        assert random.realised == pytest.approx(0.5, abs=0.02)
        assert perplexity(smollm, windows, show_progress=False).nats > sparse.nats + 1
    finally:
        wina.restore(smollm)


def test_gemma_loads_and_skips() -> None:
    folder = demo_model_folder("gemma-3-270m")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = tokenizer(bundled("heldout")[0], return_tensors="pt").input_ids[:, :48]
    dense = logits(model, ids)
    plan = wina.sparsify(
        model, sparsity=0.4, calibration_tokens=1024, tokenizer=tokenizer, show_progress=False
    )
    assert plan.realised == pytest.approx(0.4, abs=0.01)
    assert decode_logits(model, ids).isfinite().all()
    wina.restore(model)
    assert torch.equal(logits(model, ids), dense)
