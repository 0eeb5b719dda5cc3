"""The quantization method ``wina`` of transformers, and the folders that sparse models save."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, decode_logits, logits, plan_for
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import wina
from wina.errors import (
    CalibrationError,
    ConfigError,
    PatchStateError,
    UnsupportedModelError,
)
from wina.kernels.quantization import WEIGHT_DTYPES
from wina.linear import SparseLinear
from wina.patch import is_patched
from wina.quantized_linear import QuantizedSparseLinear
from wina.testing import tiny_model, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path: Path, llama: nn.Module) -> Path:
    """A dense model and its tokenizer, as transformers saves them."""
    llama.save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    return tmp_path / "dense"


def wina_config(**settings: object) -> wina.WinaConfig:
    small = {"calibration_tokens": 1024, "window": 128, "texts": CALIBRATION, **settings}
    return wina.WinaConfig(show_progress=False, **small)  # type: ignore[arg-type]


def load(path: Path, **settings: object) -> nn.Module:
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path, **settings)
    return model


def assert_same(a: nn.Module, b: nn.Module) -> None:
    """The same modules with the same values.

    Outputs are not compared: sums depend on how memory is aligned, and a mask is a step function.
    """
    assert wina.inspect(a).to_dict() == wina.inspect(b).to_dict()
    ours, theirs = a.state_dict(), b.state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    twins = dict(b.named_modules())
    for name, module in a.named_modules():
        assert type(module) is type(twins[name])
        if isinstance(module, SparseLinear):
            assert torch.equal(module.threshold, twins[name].threshold)  # type: ignore[arg-type]


def test_from_pretrained_calibrates_and_patches(folder: Path, llama: nn.Module) -> None:
    model = load(folder, quantization_config=wina_config(sparsity=0.4, method="teal"))
    wina.sparsify(llama, plan_for(llama, sparsity=0.4, method="teal"))
    assert {row.sparsity for row in wina.inspect(model).rows} == {0.4}
    assert_same(model, llama)
    # Nothing says "quantized" any more: such a model could not be cast.
    assert model.half().dtype == torch.float16
    wina.restore(model)
    assert not is_patched(model)


def test_the_tokenizer_of_the_folder_is_used(folder: Path) -> None:
    settings = {"calibration_tokens": 512, "window": 64, "show_progress": False}
    model = load(folder, quantization_config=wina.WinaConfig(**settings))
    assert is_patched(model)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(CalibrationError, match=r"WinaConfig\(tokenizer"):
        load(folder, quantization_config=wina.WinaConfig(**settings))


def test_settings_are_checked() -> None:
    with pytest.raises(ConfigError, match="sparsiti"):
        wina.WinaConfig(sparsiti=0.5)
    with pytest.raises(ConfigError, match="share"):
        wina.WinaConfig(sparsity=1.5)


def test_saved_and_loaded_again(model: nn.Module, tmp_path: Path, tokens: Tensor) -> None:
    wina.sparsify(model, plan_for(model))
    before = decode_logits(model, tokens)
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    assert not hasattr(model.config, "quantization_config")
    assert torch.equal(decode_logits(model, tokens), before)

    again = load(tmp_path)
    assert_same(again, model)
    again.save_pretrained(tmp_path / "twice")  # type: ignore[operator]
    assert_same(load(tmp_path / "twice"), model)


def test_folder_has_usual_weights_and_a_readable_plan(llama: nn.Module, tmp_path: Path) -> None:
    wina.sparsify(llama, plan_for(llama))
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    weights = load_file(tmp_path / "model.safetensors")
    assert all(w.is_contiguous() for w in weights.values())
    assert not any("threshold" in name for name in weights)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["quant_method"], saved["sparsity"]) == ("wina", 0.5)
    assert wina.SparsityPlan.load(tmp_path / "wina").config == plan_for(tiny_model("llama")).config


def test_loads_dense_where_wina_is_not_imported(
    llama: nn.Module, tmp_path: Path, tokens: Tensor
) -> None:
    wina.sparsify(llama, plan_for(llama))
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    wina.restore(llama)
    code = f"""
import sys, torch
sys.modules["wina"] = None  # as where it is not installed
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
with torch.no_grad():
    torch.save(model(torch.tensor({tokens.tolist()})).logits, {str(tmp_path / "logits.pt")!r})
kinds = {{type(m) for n, m in model.named_modules() if n.endswith("_proj")}}
assert kinds == {{torch.nn.Linear}}, kinds
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert answer.returncode == 0, answer.stderr
    assert "Unknown quantization type, got wina" in answer.stderr
    got = torch.load(tmp_path / "logits.pt", weights_only=True)
    torch.testing.assert_close(got, logits(llama, tokens), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("order", ["import wina, transformers", "import transformers, wina"])
def test_import_alone_registers(llama: nn.Module, tmp_path: Path, order: str) -> None:
    wina.sparsify(llama, plan_for(llama))
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    code = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
{order}
model = transformers.AutoModelForCausalLM.from_pretrained({str(tmp_path)!r})
print(type(model.model.layers[0].self_attn.q_proj).__name__)
"""
    answer = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert answer.stdout.strip() == "SparseLinear", answer.stderr


def test_a_plan_with_other_settings_is_not_used(folder: Path, llama: nn.Module) -> None:
    plan_for(llama, method="wina-fisher", sparsity=0.4).save(folder / "wina")
    for sparsity in (0.4, 0.3):
        # No text: only a plan can give thresholds.
        config = wina_config(sparsity=sparsity, texts=CALIBRATION[:1])
        if sparsity == 0.4:
            assert is_patched(load(folder, quantization_config=config))
        else:
            with pytest.raises(CalibrationError):
                load(folder, quantization_config=config)


def test_tuned_weights_are_saved_and_recognised(llama: nn.Module, tmp_path: Path) -> None:
    wina.sparsify(llama, plan_for(llama))
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.mul_(1.5)
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    assert is_patched(load(tmp_path))


@pytest.mark.parametrize("width", list(WEIGHT_DTYPES))
@pytest.mark.parametrize("keep", [False, True])
def test_rounded_weights_come_back_exactly(
    llama: nn.Module, tmp_path: Path, width: str, keep: bool
) -> None:
    original = llama.model.layers[0].mlp.up_proj.weight.clone()  # type: ignore
    wina.sparsify(llama, plan_for(llama, weight_dtype=width), keep_original=keep)
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    saved = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    assert not any(key.endswith(("packed", "scales")) for key in saved)
    assert torch.equal(saved[name], original) == keep
    again = load(tmp_path)
    assert isinstance(again.get_submodule(name.removesuffix(".weight")), QuantizedSparseLinear)
    for sparse in llama.modules():
        if isinstance(sparse, QuantizedSparseLinear):
            # Integers and scale may both have changed their sign.
            assert torch.equal(again.get_submodule(sparse.name).weight, sparse.weight)  # type: ignore


def test_rounded_bfloat16_weights_come_back_nearly_the_same(tmp_path: Path) -> None:
    """A scale times 127 need not be a bfloat16: now and then it is one step off."""
    model = tiny_model("llama", torch.bfloat16)
    wina.sparsify(model, plan_for(model, weight_dtype="int8"))
    model.save_pretrained(tmp_path)  # type: ignore[operator]
    again = load(tmp_path)
    for sparse in model.modules():
        if isinstance(sparse, QuantizedSparseLinear):
            twin = again.get_submodule(sparse.name)
            bound = 2**-7 * sparse.weight.abs().max().item()
            torch.testing.assert_close(twin.weight, sparse.weight, rtol=2**-7, atol=bound)  # type: ignore


def test_restored_model_saves_as_ever(llama: nn.Module, tmp_path: Path) -> None:
    wina.sparsify(llama, plan_for(llama))
    wina.restore(llama)
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    assert not (tmp_path / "wina").exists()
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())


def test_a_copy_saves_itself(llama: nn.Module, tmp_path: Path) -> None:
    wina.sparsify(llama, plan_for(llama))
    twin = copy.deepcopy(llama)
    wina.restore(llama)
    twin.save_pretrained(tmp_path)  # type: ignore[operator]
    assert any(isinstance(m, SparseLinear) for m in load(tmp_path).modules())


def test_push_to_hub_uploads_the_plan(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uploaded: dict[str, list[str]] = {}

    def push(self: nn.Module, repo_id: str, **settings: object) -> None:
        # What PushToHubMixin does: save into an empty folder, upload all of it.
        self.save_pretrained(tmp_path / "pushed", **settings)  # type: ignore[operator]
        found = (tmp_path / "pushed").rglob("*")
        uploaded[repo_id] = sorted(
            str(f.relative_to(tmp_path / "pushed")) for f in found if f.is_file()
        )

    monkeypatch.setattr(type(llama), "push_to_hub", push)
    wina.sparsify(llama, plan_for(llama))
    llama.save_pretrained(tmp_path / "local", push_to_hub=True, repo_id="me/model")  # type: ignore
    assert uploaded["me/model"] == [
        "config.json", "generation_config.json", "model.safetensors", "wina/plan.json",
        "wina/plan.safetensors",
    ]  # fmt: skip


def test_encoder_decoder_is_refused(tmp_path: Path) -> None:
    from transformers import AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

    T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    ).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        AutoModelForSeq2SeqLM.from_pretrained(tmp_path, quantization_config=wina_config())


def test_a_rotated_model_says_how_to_keep_its_plan(llama: nn.Module, tmp_path: Path) -> None:
    wina.rotate(llama, "orthogonal")
    wina.sparsify(llama, plan_for(llama))
    with pytest.raises(PatchStateError, match="save the plan alone"):
        llama.save_pretrained(tmp_path)  # type: ignore[operator]
    assert not list(tmp_path.iterdir())
