"""Sparse models inside what others built: generation, pipelines, compilers, offloads, adapters."""

from __future__ import annotations

import copy
import json
import socket
import time
from functools import partial
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

import pytest
import torch
from conftest import decode_logits, logits, plan_for
from torch import Tensor
from transformers import AutoModelForCausalLM, pipeline

import wina
from wina.errors import UnsupportedModelError
from wina.inspection import measure_sparsity
from wina.linear import SparseLinear
from wina.testing import tiny_model, tiny_tokenizer

GENERATION: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 20},
    "beams": {"num_beams": 3},
    "static cache": {"cache_implementation": "static", "disable_compile": True},
    "prompt lookup": {"prompt_lookup_num_tokens": 2},
}


def sparse_llama(**settings: object) -> Any:
    model = tiny_model("llama")
    wina.sparsify(model, plan_for(model, **settings))
    return model


@pytest.mark.parametrize("mode", list(GENERATION))
def test_generate(mode: str, tokens: Tensor) -> None:
    model = sparse_llama()
    with measure_sparsity(model) as counter:
        out = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, **GENERATION[mode])
    assert out.shape == (1, tokens.shape[1] + 8)
    assert 0.3 < counter.mean < 0.7


@pytest.mark.parametrize("mode", ["greedy", "beams", "static cache"])
def test_generate_at_sparsity_0_is_that_of_the_dense_model(mode: str, tokens: Tensor) -> None:
    settings = {"max_new_tokens": 8, **GENERATION[mode]}
    want = tiny_model("llama").generate(tokens, **settings)  # type: ignore[operator]
    assert torch.equal(sparse_llama(sparsity=0.0).generate(tokens, **settings), want)


def test_assisted_generation_is_that_of_the_target(tokens: Tensor) -> None:
    """The target checks several tokens at once, which is prefill to it: dense."""
    target, assistant = tiny_model("llama"), sparse_llama()
    # By default an assistant that is unsure, as a random one is, drafts one token.
    assistant.generation_config.assistant_confidence_threshold = 0.0
    assistant.generation_config.num_assistant_tokens = 4
    settings = {"max_new_tokens": 8, "do_sample": False}
    want = target.generate(tokens, **settings)  # type: ignore[operator]
    with measure_sparsity(assistant) as counter:
        got = target.generate(tokens, assistant_model=assistant, **settings)  # type: ignore[operator]
    assert torch.equal(got, want)
    assert 0.3 < counter.mean < 0.7


def test_left_padded_batch(tokens: Tensor) -> None:
    """Rows of a padded batch continue as they do alone."""
    model, dense = sparse_llama(sparsity=0.0), tiny_model("llama")
    batch = torch.full((2, 12), 257)
    batch[0], batch[1, 5:] = tokens[0, :12], tokens[0, 20:27]
    mask = (batch != 257).long()
    out = model.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, prompt in zip(out, (batch[:1], batch[1:, 5:]), strict=True):
        alone = dense.generate(prompt, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        assert torch.equal(row[12:], alone[0, prompt.shape[1] :])
    sparse = sparse_llama()
    with measure_sparsity(sparse) as counter:
        sparse.generate(batch, attention_mask=mask, max_new_tokens=6)
    assert 0.3 < counter.mean < 0.7


def test_pipeline() -> None:
    model = sparse_llama()
    generate = pipeline("text-generation", model=model, tokenizer=tiny_tokenizer())
    with measure_sparsity(model) as counter:
        text = generate("Hello", max_new_tokens=4, min_new_tokens=4)[0]["generated_text"]
    assert text.startswith("Hello")
    assert 0.3 < counter.mean < 0.7


def test_pipeline_from_a_folder(tmp_path: Path) -> None:
    sparse_llama().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    generate = pipeline("text-generation", model=str(tmp_path))
    with measure_sparsity(generate.model) as counter:
        generate("Hello", max_new_tokens=4, min_new_tokens=4)
    assert 0.3 < counter.mean < 0.7


def test_transformers_serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`transformers serve FOLDER`, where wina has been imported: its model is sparse."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason="needs pip install 'transformers[serving]'")
    from transformers.cli.serve import Serve

    from wina.integrations import transformers as integration

    sparse_llama().save_pretrained(tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    tokenizer.save_pretrained(tmp_path)
    served: list[Any] = []

    def sparsify(model: Any, *arguments: Any, **settings: Any) -> Any:
        served.append(model)
        return wina.sparsify(model, *arguments, **settings)

    monkeypatch.setattr(integration, "sparsify", sparsify)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Serve(
        force_model=str(tmp_path), device="cpu", host="127.0.0.1", port=port, non_blocking=True
    )
    try:
        (model,) = served
        end = time.monotonic() + 60
        while not server.server.started and time.monotonic() < end:
            time.sleep(0.05)
        request = Request(
            f"http://127.0.0.1:{port}/v1/chat/completions",
            headers={"Content-Type": "application/json"},
            data=json.dumps({
                "model": str(tmp_path), "max_tokens": 8, "stream": False,
                "messages": [{"role": "user", "content": "a"}],
            }).encode(),
        )  # fmt: skip
        with measure_sparsity(model) as counter, urlopen(request, timeout=60) as answer:
            assert "assistant" in answer.read().decode()
        assert 0.3 < counter.mean < 0.7
    finally:
        server.kill_server()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(backend: str, tokens: Tensor) -> None:
    model, token = sparse_llama(), tokens[:, :1]
    with torch.no_grad():
        want = model(token, use_cache=False).logits
        torch.compiler.reset()
        compiled = torch.compile(model, backend=backend)
        assert (compiled(token, use_cache=False).logits - want).abs().median() <= 1e-4
        with measure_sparsity(model) as counter:
            compiled(token, use_cache=False)
    assert 0.2 < counter.mean < 0.8


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_offloaded_blocks_stay_dense(place: str, tmp_path: Path, tokens: Tensor) -> None:
    dense = tiny_model("llama")
    dense.save_pretrained(tmp_path / "model")  # type: ignore[operator]
    names = ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")
    device_map = {f"model.{name}": "cpu" for name in names} | {"lm_head": "cpu"}
    if place == "disk":
        device_map["model.layers.1"] = "disk"
        model = AutoModelForCausalLM.from_pretrained(
            tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "offload"
        )
    else:
        from accelerate import cpu_offload

        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
        cpu_offload(model.model.layers[1], torch.device("cpu"))
    plan = plan_for(model)
    assert {layer.projection.block for layer in plan.layers.values()} == {0}
    wina.sparsify(model, plan)
    found = wina.inspect(model)
    assert len(found.dense) == 7
    assert "offloaded by accelerate" in str(found)
    with measure_sparsity(model) as counter:
        assert decode_logits(model, tokens).isfinite().all()
    assert 0.3 < counter.mean < 0.7
    wina.restore(model)
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens))


def test_a_model_that_is_offloaded_altogether_is_refused() -> None:
    from accelerate import cpu_offload

    model = tiny_model("llama")
    cpu_offload(model, torch.device("cpu"))
    with pytest.raises(UnsupportedModelError, match="offloaded by accelerate"):
        plan_for(model)


def test_a_device_map_without_offloading_changes_nothing(tmp_path: Path, tokens: Tensor) -> None:
    from accelerate import dispatch_model

    model, twin = sparse_llama(), tiny_model("llama")
    # Hooks on every module, as for several devices.
    twin = dispatch_model(twin, {"": "cpu"}, force_hooks=True)
    wina.sparsify(twin, plan_for(twin))
    assert wina.inspect(twin).to_dict() == wina.inspect(model).to_dict()
    assert (decode_logits(twin, tokens) - decode_logits(model, tokens)).abs().median() <= 1e-4


@pytest.mark.parametrize("on", [False, True])
def test_gradient_checkpointing(on: bool, tokens: Tensor) -> None:
    model, want = sparse_llama(prefill="all"), sparse_llama(prefill="all")
    if on:
        model.gradient_checkpointing_enable()
    assert (decode_logits(model, tokens) - decode_logits(want, tokens)).abs().median() <= 1e-4
    grads = []
    for one in (model, want):
        one.train()
        one(tokens, labels=tokens).loss.backward()
        grads.append(one.model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(grads[0], grads[1], rtol=1e-4, atol=1e-5)


def lora(targets: list[str]) -> Any:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    return peft.LoraConfig(
        r=4, target_modules=targets, init_lora_weights=False, task_type="CAUSAL_LM"
    )


ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL], ids=["some", "all"])
def test_adapter_loaded_after(targets: list[str], tokens: Tensor) -> None:
    settings = lora(targets)
    want, model = tiny_model("llama"), sparse_llama(sparsity=0.0)
    for one in (want, model):
        torch.manual_seed(1)
        one.add_adapter(settings)  # type: ignore[operator]
    assert not torch.equal(logits(want, tokens), logits(tiny_model("llama"), tokens))
    assert (decode_logits(model, tokens) - decode_logits(want, tokens)).abs().max() <= 1e-4
    sparse = sparse_llama()
    sparse.add_adapter(settings)
    with measure_sparsity(sparse) as counter:
        decode_logits(sparse, tokens)
    assert 0.3 < counter.mean < 0.7
    assert not wina.inspect(sparse).dense
    wina.restore(model)
    torch.testing.assert_close(logits(model, tokens), logits(want, tokens))


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ALL], ids=["some", "all"])
def test_adapter_loaded_before(targets: list[str], tokens: Tensor) -> None:
    peft = pytest.importorskip("peft", reason="needs PEFT: pip install peft")
    torch.manual_seed(1)
    model = peft.get_peft_model(tiny_model("llama"), lora(targets)).eval()
    want = copy.deepcopy(model)
    plan = plan_for(model, sparsity=0.0)
    assert len(plan.layers) == 14
    assert not any("lora" in name for name in plan.layers)
    wina.sparsify(model, plan)
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 14
    assert (decode_logits(model, tokens) - decode_logits(want, tokens)).abs().max() <= 1e-4
    wina.restore(model)
    torch.testing.assert_close(logits(model, tokens), logits(want, tokens))


def test_torchao_weights_stay_dense(tokens: Tensor) -> None:
    quantization = pytest.importorskip(
        "torchao.quantization", reason="needs torchao: pip install torchao"
    )
    model = tiny_model("llama")
    quantization.quantize_(
        model.model.layers[0].mlp,  # type: ignore[union-attr,index]
        quantization.Int8WeightOnlyConfig(),
    )
    want = decode_logits(model, tokens)
    wina.sparsify(model, plan_for(model, sparsity=0.0))
    found = wina.inspect(model)
    assert len(found.dense) == 3
    assert "quantized weights of another library" in str(found)
    assert (decode_logits(model, tokens) - want).abs().max() <= 1e-4


@pytest.mark.parametrize("bits", [4, 8])
def test_weights_of_bitsandbytes_stay_dense(bits: int, tokens: Tensor) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    model = tiny_model("llama")
    mlp: Any = model.model.layers[0].mlp  # type: ignore[union-attr,index]
    layer = {4: bnb.nn.Linear4bit, 8: partial(bnb.nn.Linear8bitLt, has_fp16_weights=False)}[bits]
    rounded = layer(64, 96, bias=False)
    rounded.load_state_dict(mlp.up_proj.state_dict())
    mlp.up_proj = rounded.to("cpu")  # that is when it rounds
    assert not mlp.up_proj.weight.is_floating_point()
    want = decode_logits(model, tokens)
    wina.sparsify(model, plan_for(model, sparsity=0.0))
    assert [m.name for m in wina.inspect(model).dense] == ["model.layers.0.mlp.up_proj"]
    assert mlp.up_proj is rounded
    # It rounds what it reads, so the last bits of its inputs matter.
    assert (decode_logits(model, tokens) - want).abs().max() <= 0.02


class Params4bit(torch.nn.Parameter):
    """As bitsandbytes keeps a weight: two elements a byte, one column."""


class Linear4bit(torch.nn.Linear):
    """Stands in for bitsandbytes' layer, which needs no card to be recognised."""

    def __init__(self, linear: torch.nn.Linear) -> None:
        super().__init__(linear.in_features, linear.out_features, bias=False)
        self.whole = [linear.weight.detach().clone()]  # no parameter: it is not in the checkpoint
        packed = torch.zeros(linear.weight.numel() // 2, 1, dtype=torch.uint8)
        self.weight = Params4bit(packed, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.nn.functional.linear(x, self.whole[0])


class QuantizedTensor(torch.Tensor):
    """Stands in for torchao's weights: a plain ``nn.Linear`` holds a tensor of another class."""


def test_layers_of_another_quantization_stay_dense_with_a_reason(tokens: Tensor) -> None:
    model: Any = tiny_model("llama")
    want = decode_logits(model, tokens)
    mlp, attention = model.model.layers[0].mlp, model.model.layers[1].self_attn
    mlp.up_proj = Linear4bit(mlp.up_proj)
    weight = attention.o_proj.weight.detach()
    attention.o_proj.weight = torch.nn.Parameter(
        weight.as_subclass(QuantizedTensor), requires_grad=False
    )
    wina.sparsify(model, plan_for(model, sparsity=0.0))
    reasons = {module.name: module.reason for module in wina.inspect(model).dense}
    assert list(reasons) == ["model.layers.0.mlp.up_proj", "model.layers.1.self_attn.o_proj"]
    assert "Linear4bit, which keeps weight (3072, 1) itself" in next(iter(reasons.values()))
    assert "holds a QuantizedTensor" in reasons["model.layers.1.self_attn.o_proj"]
    assert (decode_logits(model, tokens) - want).abs().max() <= 1e-4


def test_a_model_of_quantized_layers_only_is_refused() -> None:
    model: Any = tiny_model("llama")
    for layer in model.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name, child in list(parent.named_children()):
                if isinstance(child, torch.nn.Linear):
                    setattr(parent, name, Linear4bit(child))
    with pytest.raises(UnsupportedModelError, match=r"q_proj is a .*Linear4bit"):
        plan_for(model)


def test_a_gguf_file(tmp_path: Path, tokens: Tensor) -> None:
    """transformers reads it into floats, so it is a model like any other."""
    pytest.importorskip("gguf", reason="needs gguf: pip install gguf")
    from wina.bench.peers.to_gguf import write_gguf

    dense: Any = tiny_model("llama")
    dense.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    write_gguf(tmp_path, tmp_path / "model.gguf", "f32", show_progress=False)
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="model.gguf", dtype=torch.float32
    ).eval()
    torch.testing.assert_close(logits(model, tokens), logits(dense, tokens))
    wina.sparsify(model, plan_for(model))
    with measure_sparsity(model) as counter:
        decode_logits(model, tokens)
    assert 0.3 < counter.mean < 0.7
