"""Vision-language models: the language tower becomes sparse, the rest stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as t
from conftest import decode_logits, logits, plan_for
from torch import Tensor, nn

import wina
from wina.inspection import measure_sparsity
from wina.linear import SparseLinear

IMAGE = 257
TEXT: dict[str, Any] = {
    "vocab_size": 258, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "bos_token_id": 256, "eos_token_id": 256,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip


def llava() -> nn.Module:
    return t.LlavaForConditionalGeneration(
        t.LlavaConfig(
            text_config=t.LlamaConfig(**TEXT),
            vision_config=t.CLIPVisionConfig(**VISION),
            image_token_id=IMAGE,
        )
    )


def gemma3() -> nn.Module:
    return t.Gemma3ForConditionalGeneration(
        t.Gemma3Config(
            text_config={**TEXT, "head_dim": 16, "sliding_window": 64},
            vision_config={**VISION, "model_type": "siglip_vision_model"},
            image_token_index=IMAGE,
            mm_tokens_per_image=4,
        )
    )


def qwen2_vl() -> nn.Module:
    rope = {"type": "mrope", "mrope_section": [2, 3, 3], "rope_type": "default"}
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 14}
    return t.Qwen2VLForConditionalGeneration(
        t.Qwen2VLConfig(text_config={**TEXT, "rope_scaling": rope}, vision_config=vision)
    )


@pytest.fixture(params=[llava, gemma3, qwen2_vl], ids=lambda make: make.__name__)
def vlm(request: pytest.FixtureRequest) -> nn.Module:
    make: Callable[[], nn.Module] = request.param
    return make().eval()


def test_language_tower_is_sparse(vlm: Any, tokens: Tensor, tmp_path: Path) -> None:
    dense = logits(vlm, tokens)
    wina.sparsify(vlm, plan_for(vlm))
    sparse = [n for n, m in vlm.named_modules() if isinstance(m, SparseLinear)]
    assert len(sparse) == 14
    assert all("language_model" in name for name in sparse)
    torch.testing.assert_close(logits(vlm, tokens), dense)
    with measure_sparsity(vlm) as counter:
        decode_logits(vlm, tokens)
    assert 0.3 < counter.mean < 0.7
    vlm.save_pretrained(tmp_path)
    again = type(vlm).from_pretrained(tmp_path)
    assert wina.inspect(again).to_dict() == wina.inspect(vlm).to_dict()
    wina.restore(vlm)
    assert torch.equal(logits(vlm, tokens), dense)


def test_image_and_text(tokens: Tensor) -> None:
    model: Any = llava().eval()
    prompt = torch.cat([torch.full((1, 4), IMAGE), tokens[:, :8]], dim=1)
    inputs = {"input_ids": prompt, "pixel_values": torch.randn(1, 3, 28, 28)}
    with torch.no_grad():
        want = model(**inputs).logits
    wina.sparsify(model, plan_for(model))
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, want)
    with measure_sparsity(model) as counter:
        out = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape == (1, 17)
    assert 0.3 < counter.mean < 0.7
