"""Sparse models where callers have put things around them: autocast, hooks, wrappers, modes."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CALIBRATION, config, decode_logits, logits, plan_for
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

import wina
from wina.errors import (
    CalibrationError,
    ConfigError,
    PatchStateError,
    UnsupportedModelError,
    WinaError,
)
from wina.inspection import measure_sparsity
from wina.testing import random_tokens, tiny_model


@pytest.mark.parametrize("weight_dtype", [None, "int8"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "starcoder2"])
@pytest.mark.parametrize("prefill", ["dense", "all"])
def test_autocast(name: str, prefill: str, weight_dtype: str | None, tokens: Tensor) -> None:
    model: Any = tiny_model(name)
    wina.sparsify(model, plan_for(model, prefill=prefill, weight_dtype=weight_dtype))
    want = decode_logits(model, tokens)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        got = decode_logits(model, tokens)
        model.generate(tokens, max_new_tokens=3)
    # A channel on its threshold may fall on either side: most of it, not all.
    error = (got.float() - want).norm() / want.norm()
    assert error < 0.3


def test_calibrating_under_autocast_and_inference_mode_is_calibrating(llama: nn.Module) -> None:
    plans = []
    for around in (torch.no_grad(), torch.inference_mode(), torch.autocast("cpu", torch.bfloat16)):
        with around:
            plans.append(wina.calibrate(llama, None, config(), CALIBRATION, show_progress=False))
    for plan in plans[1:]:
        for name, layer in plan.layers.items():
            assert torch.equal(layer.threshold, plans[0].layers[name].threshold)


def test_a_model_of_inference_mode_is_refused_whole() -> None:
    with torch.inference_mode():
        model = tiny_model("llama")
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        wina.calibrate(model, None, config(), CALIBRATION, show_progress=False)
    with pytest.raises(UnsupportedModelError, match="inference_mode"):
        wina.sparsify(model, plan_for(tiny_model("llama")))


@pytest.mark.parametrize("correction", ["low-rank", "weight-svd", "bias", "sparse-fit"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_corrections_are_found_in_16_bits(correction: str, dtype: torch.dtype) -> None:
    model = tiny_model("llama", dtype=dtype)
    plan = wina.calibrate(
        model, None, config(correction=correction), CALIBRATION, show_progress=False
    )
    wina.sparsify(model, plan)
    assert torch.isfinite(logits(model, random_tokens(8)[None])).all()


@pytest.mark.parametrize("prefill", ["dense", "all", "last:0.5"])
def test_batches_whose_tokens_are_flattened_are_as_each_alone(prefill: str) -> None:
    settings = {
        "vocab_size": 258, "hidden_size": 64, "ffn_dim": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 64, "word_embed_proj_dim": 64,
    }  # fmt: skip
    made = AutoConfig.for_model("opt", **settings)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(made).eval()
    plan = wina.calibrate(
        model, None, config(window=64, prefill=prefill), CALIBRATION, show_progress=False
    )
    wina.sparsify(model, plan)
    assert any("fc1" in name for name in plan.layers)
    prompts = random_tokens(36, seed=4).view(2, 18)
    for both in (prompts, prompts.flip(0)):  # the first row's
        got, alone = decode_logits(model, both), decode_logits(model, both[:1])
        torch.testing.assert_close(got, alone, rtol=1e-3, atol=1e-4)
    with measure_sparsity(model) as counter, torch.no_grad():
        model(prompts[:, :1])
    assert 0.3 < counter.by_projection["model.decoder.layers.0.fc1"] < 0.7


@pytest.mark.parametrize("place", ["mlp", "mlp.gate_proj", "mlp.down_proj", "self_attn.q_proj"])
def test_hooks_go_on_being_called(llama: Any, tokens: Tensor, place: str) -> None:
    module = llama.model.layers[1].get_submodule(place)
    handle = module.register_forward_hook(lambda _, __, y: 2.0 * y)
    want = decode_logits(llama, tokens)
    wina.sparsify(llama, plan_for(llama, sparsity=0.0))
    torch.testing.assert_close(decode_logits(llama, tokens), want, rtol=1e-3, atol=1e-4)
    handle.remove()
    without = decode_logits(llama, tokens)
    assert not torch.allclose(without, want, atol=1e-3)
    seen: list[int] = []
    patched = llama.model.layers[1].get_submodule(place)
    patched.register_forward_pre_hook(lambda *_: seen.append(1))
    decode_logits(llama, tokens)
    assert seen
    wina.restore(llama)
    torch.testing.assert_close(decode_logits(llama, tokens), without, rtol=1e-3, atol=1e-4)


def adapted(model: Any) -> Any:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    made = peft.get_peft_model(
        model, peft.LoraConfig(r=4, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    )
    return made.eval()


def test_an_adapter_that_was_there_before_can_be_unloaded(llama: Any, tokens: Tensor) -> None:
    want = decode_logits(llama, tokens)
    wrapper = adapted(llama)
    wina.sparsify(llama, plan_for(llama))
    wrapper.unload()
    wina.restore(llama)
    assert torch.equal(decode_logits(llama, tokens), want)
    assert all(p.is_contiguous() for p in llama.parameters())


def test_a_wrapper_is_the_model_that_it_is_around(llama: Any, tokens: Tensor) -> None:
    wina.sparsify(llama, plan_for(llama))
    for wrapper in (adapted(llama), torch.compile(llama, backend="eager")):
        assert wina.inspect(wrapper).rows
        with wina.dense(wrapper):
            pass
    wina.restore(wrapper)
    with pytest.raises(PatchStateError, match="is dense"):
        wina.restore(llama)


def test_a_sparsified_wrapper_saves_its_adapters(llama: Any, tmp_path: Path) -> None:
    wrapper = adapted(llama)
    wina.sparsify(wrapper, config(method="wina"), texts=CALIBRATION, show_progress=False)
    wrapper.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").is_file()


def test_what_is_merged_into_rounded_weights_is_not_lost_in_silence(llama: Any) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype="int8"))
    wrapper = adapted(llama)
    with pytest.raises(PatchStateError, match="merge the adapter first"):
        wrapper.merge_and_unload()


def test_a_rotated_model_is_not_saved(llama: Any, tmp_path: Path) -> None:
    wina.rotate(llama, "orthogonal", keep_original=True, show_progress=False)
    with pytest.raises(PatchStateError, match="rotated"):
        llama.save_pretrained(tmp_path)
    wina.sparsify(llama, plan_for(llama, rotation="orthogonal"))
    wina.restore(llama)
    with pytest.raises(PatchStateError, match="rotated"):
        llama.save_pretrained(tmp_path)
    wina.unrotate(llama)
    llama.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert all(map(torch.equal, again.parameters(), llama.parameters()))


@pytest.mark.parametrize("assign", [False, True])
def test_other_weights_are_loaded_into_a_sparse_model(
    llama: Any, tokens: Tensor, assign: bool
) -> None:
    other = tiny_model("llama", seed=7)
    plan = plan_for(llama, sparsity=0.0)
    wina.sparsify(llama, plan)
    llama.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    want = decode_logits(other, tokens)
    torch.testing.assert_close(decode_logits(llama, tokens), want, rtol=1e-3, atol=1e-4)
    wina.restore(llama)
    assert torch.equal(decode_logits(llama, tokens), want)
    assert all(p.is_contiguous() for p in llama.parameters())


@pytest.mark.parametrize(
    "use", [{"backend": "nope"}, {"backend": "triton"}, {"prefill": "last:2"}], ids=str
)
def test_what_makes_no_sense_is_said_before_calibrating(
    llama: nn.Module, use: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wina.api.calibrate", lambda *_: pytest.fail("it calibrates"))
    with pytest.raises(WinaError):
        wina.sparsify(llama, texts=CALIBRATION, **use)


def test_tokens_of_another_tokenizer_and_windows_too_long(llama: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="is this its tokenizer"):
        wina.calibrate(llama, None, config(), random_tokens(2000) + 10_000, show_progress=False)
    long = config(window=5000, calibration_tokens=5000)
    with pytest.raises(CalibrationError, match="the model sees"):
        wina.calibrate(llama, None, long, random_tokens(6000), show_progress=False)


@pytest.mark.parametrize("settings", [{"prefill": None}, {"criterion": 5}, {"method": None}])
def test_settings_of_another_type(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="wrong type"):
        wina.SparsityConfig(**settings)
