import pytest
import torch
from torch import nn

from wina.errors import UnsupportedModelError
from wina.projections import decoder_blocks, dense_modules, find_projections, group_members
from wina.testing import TINY, tiny_model

QKV_GATE_UP = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]

GROUPS = {
    "llama": QKV_GATE_UP,
    "mistral": QKV_GATE_UP,
    "qwen2": QKV_GATE_UP,
    "qwen3": QKV_GATE_UP,
    "phi3": [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]],
    "gemma2": QKV_GATE_UP,
    "gemma3_text": QKV_GATE_UP,
    "olmo2": QKV_GATE_UP,
    "granite": QKV_GATE_UP,
    "smollm3": QKV_GATE_UP,
    "starcoder2": [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["c_fc"], ["c_proj"]],
    "gpt_neox": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    # attention and MLP run side by side on one hidden state, but in two modules
    "cohere": QKV_GATE_UP,
    "falcon": [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
}


def test_every_tiny_model_is_listed_here() -> None:
    assert set(GROUPS) == set(TINY)


def test_groups(model: nn.Module) -> None:
    projections = find_projections(model)
    want = GROUPS[str(model.config.model_type)]  # type: ignore[union-attr]
    for block in range(2):
        groups = group_members([p for p in projections if p.block == block])
        assert [[p.role for p in members] for members in groups.values()] == want


def test_all_linear_layers_of_the_blocks_are_found_with_their_shapes(model: nn.Module) -> None:
    found = {p.name: (p.out_features, p.in_features) for p in find_projections(model)}
    want = {
        f"{name}.{child}": tuple(module.weight.shape)
        for name, block in decoder_blocks(model)
        for child, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert found == want


def test_finding_changes_nothing(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    find_projections(model)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


class Linear4bit(nn.Linear):
    """As bitsandbytes has it: a subclass with weights in another format."""


def test_subclass_of_linear_stays_dense(llama: nn.Module) -> None:
    llama.model.layers[1].mlp.up_proj = Linear4bit(64, 96, bias=False)  # type: ignore
    assert len(find_projections(llama)) == 13
    (dense,) = dense_modules(llama)
    assert (dense.name, dense.weights) == ("model.layers.1.mlp.up_proj", 64 * 96)
    assert "Linear4bit" in dense.reason


def test_integer_weights_stay_dense(llama: nn.Module) -> None:
    layer = llama.model.layers[0].mlp.up_proj  # type: ignore
    layer.weight = nn.Parameter(torch.zeros(96, 64, dtype=torch.int8), requires_grad=False)
    (dense,) = dense_modules(llama)
    assert dense.name == "model.layers.0.mlp.up_proj"
    assert "int8" in dense.reason


def test_meta_device_is_named() -> None:
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\..*meta device"):
        find_projections(tiny_model("llama").to("meta"))


def test_unreached_projection_is_named(llama: nn.Module) -> None:
    llama.model.layers[0].spare = nn.Linear(4, 4)  # type: ignore
    with pytest.raises(UnsupportedModelError, match=r"layers\.0\.spare took no part"):
        find_projections(llama)


def test_other_weight_classes_are_named() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=64))
    with pytest.raises(UnsupportedModelError, match=r"h\.0\.attn\.c_attn is a .*Conv1D"):
        find_projections(gpt2)


def test_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    t5 = T5ForConditionalGeneration(
        T5Config(d_model=16, d_ff=16, num_layers=1, num_heads=2, d_kv=8, vocab_size=32)
    )
    with pytest.raises(UnsupportedModelError, match="encoder-decoder"):
        find_projections(t5)


def test_plain_module_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no `config`"):
        find_projections(nn.Linear(2, 2))
