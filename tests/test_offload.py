"""Models larger than memory: calibrated where they are, one projection or block in memory."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from conftest import logits
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import wina
from wina.calibration import calibrate
from wina.cli import app
from wina.cli_options import load_model
from wina.errors import UnsupportedModelError
from wina.offload import device_of, is_offloaded, recomputed, weight_and_bias
from wina.projections import decoder_blocks, dense_modules
from wina.testing import random_tokens, tiny_model, tiny_tokenizer

PARTS = [
    {"method": "wina"},
    {"method": "wina-fisher"},
    {"method": "teal-greedy"},
    {"method": "wina", "allocation": "block-error:tokens=64"},
    {"method": "wina", "allocation": "fisher:rounds=2:tokens=128"},
    {"method": "wina", "correction": "low-rank"},
    {"method": "scap"},
    {"method": "was", "mask": "group"},
    {"method": "cats", "sparsity": 0.3},
]


def offloaded(name: str, place: str, folder: Path) -> Any:
    model: Any = tiny_model(name)
    if place == "cpu":
        cpu_offload(model, torch.device("cpu"))
        return model
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return load_model(str(folder), offload=folder / "offload")[0]


def plan_of(model: nn.Module, **settings: Any) -> wina.SparsityPlan:
    config = wina.SparsityConfig(
        **{"sparsity": 0.5, "calibration_tokens": 512, "window": 64, **settings}
    )
    tokens = random_tokens(512, seed=3)
    return calibrate(model, None, config, tokens, show_progress=False, offloaded=True)


@pytest.mark.parametrize("settings", PARTS, ids=lambda part: "-".join(map(str, part.values())))
@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_the_plan_is_that_of_the_model_in_memory(
    settings: dict[str, Any], place: str, tmp_path: Path
) -> None:
    want = plan_of(tiny_model("llama"), **settings)
    model = offloaded("llama", place, tmp_path)
    before = {name: module.__dict__.get("forward") for name, module in model.named_modules()}
    found = plan_of(model, **settings)
    assert list(found.layers) == list(want.layers)
    for name, layer in want.layers.items():
        assert torch.equal(found.layers[name].threshold, layer.threshold), name
        assert torch.equal(found.layers[name].sample, layer.sample), name
    # Nothing stays in memory, and what accelerate put there is there again.
    inside = [m for _, block in decoder_blocks(model) for m in block.modules()]
    assert all(p.is_meta for m in inside if is_offloaded(m) for p in m.parameters(recurse=False))
    assert {n: m.__dict__.get("forward") for n, m in model.named_modules()} == before
    wina.sparsify(tiny_model("llama"), found, backend="reference")


def test_a_biased_model_that_is_offloaded(tmp_path: Path) -> None:
    settings = {"method": "wina-fisher", "correction": "bias"}
    want = plan_of(tiny_model("qwen2"), **settings)
    found = plan_of(offloaded("qwen2", "disk", tmp_path), **settings)
    for name, layer in want.layers.items():
        assert torch.equal(found.layers[name].threshold, layer.threshold), name
        assert layer.terms.bias is not None
        assert torch.equal(found.layers[name].terms.bias, layer.terms.bias), name  # type: ignore[arg-type]


def test_experts_that_are_offloaded_stay_dense_and_are_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = offloaded("mixtral", "cpu", tmp_path)
    found = plan_of(model)
    assert not found.experts
    assert {name.rpartition(".")[2] for name in found.layers} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert "of the weights of the blocks stay dense" in caplog.text
    dense = {module.name.rpartition(".")[2] for module in dense_modules(model, offloaded=True)}
    assert dense == {"gate", "experts"}


def test_weights_are_brought_in_and_go_again(tmp_path: Path) -> None:
    want: Any = tiny_model("qwen2")
    model = offloaded("qwen2", "disk", tmp_path)
    for part in ("q_proj", "o_proj"):
        theirs = getattr(want.model.layers[0].self_attn, part)
        module = getattr(model.model.layers[0].self_attn, part)
        weight, bias = weight_and_bias(module)
        assert torch.equal(weight, theirs.weight)
        assert (bias is None) == (theirs.bias is None)
        assert bias is None or torch.equal(bias, theirs.bias)
        assert module.weight.is_meta
    assert device_of(model) == torch.device("cpu")


class Alive:
    """How many weights that were brought in are alive, at most."""

    def __init__(self, model: nn.Module) -> None:
        self.seen: list[weakref.ref[Tensor]] = []
        self.most = 0
        for module in model.modules():
            if isinstance(module, nn.Linear) and is_offloaded(module):
                module.register_forward_hook(self._count)
                hook: Any = module._hf_hook
                hook.pre_forward = self._watched(module, hook.pre_forward)

    def _watched(self, module: Any, pre_forward: Any) -> Any:
        def watched(*arguments: Any, **keywords: Any) -> Any:
            result = pre_forward(*arguments, **keywords)
            self.seen.append(weakref.ref(module.weight.untyped_storage()))
            self._count()
            return result

        return watched

    def _count(self, *_: Any) -> None:
        self.most = max(self.most, sum(one() is not None for one in self.seen))


@pytest.mark.parametrize("again", [True, False])
def test_gradients_need_one_block_at_a_time(again: bool, tmp_path: Path) -> None:
    model = offloaded("llama", "disk", tmp_path)
    alive = Alive(model)  # seven projections of a block, and the head
    blocks = [block for _, block in decoder_blocks(model)]
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()(random_tokens(16)[None]).requires_grad_()
    with recomputed(blocks if again else []):
        model(inputs_embeds=embedded, use_cache=False).logits.sum().backward()
    assert (alive.most <= 8) == again, alive.most
    assert embedded.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"weight_dtype": "int8"}, "weight_dtype"), ({"method": "wina-plus"}, "refinement")],
)
def test_what_needs_weights_in_memory_is_refused(
    settings: dict[str, Any], name: str, tmp_path: Path
) -> None:
    with pytest.raises(UnsupportedModelError, match=f"{name}=.*needs the weights in memory"):
        plan_of(offloaded("llama", "cpu", tmp_path), **settings)


def test_command(tmp_path: Path) -> None:
    offloaded("llama", "disk", tmp_path / "model")
    command = [
        "calibrate", "--model", str(tmp_path / "model"), "--tokens", "1024", "--method",
        "wina-fisher", "--json", "--sparsity",
    ]  # fmt: skip
    kept = tmp_path / "kept"

    def realised(name: str, sparsity: str, *more: str) -> list[float]:
        answer = CliRunner().invoke(app, [*command, sparsity, str(tmp_path / name), *more])
        assert answer.exit_code == 0, answer.output
        assert json.loads(answer.stdout)["sparsity"] == float(sparsity)
        plan = wina.SparsityPlan.load(tmp_path / name)
        return [layer.sparsity for layer in plan.layers.values()]

    there = ["--offload", str(tmp_path / "offload"), "--measurements", str(kept)]
    want = realised("a", "0.5")
    assert realised("b", "0.5", *there) == want
    before = {path: path.stat().st_mtime_ns for path in kept.iterdir()}
    # The curves of Fisher; the importance of tokens, and its hash.
    assert sorted(path.suffix for path in before) == [".json", ".json", ".safetensors"]
    realised("c", "0.4", *there)
    assert {path: path.stat().st_mtime_ns for path in kept.iterdir()} == before
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    wina.sparsify(model, wina.SparsityPlan.load(tmp_path / "b"))
    assert logits(model, random_tokens(8)[None]).isfinite().all()
