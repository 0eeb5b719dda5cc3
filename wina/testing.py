"""Tiny random models of every architecture, without downloads: for tests and for trying things."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn

from wina.registry import Registry

VOCABULARY = 256 + 2

_SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 257,
}

# model_type → settings that differ from _SMALL (None removes one that the architecture lacks).
TINY: Registry[dict[str, Any]] = Registry("tiny model")

for _name, _settings in {
    "llama": {},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "phi3": {},
    "gemma2": {"head_dim": 16, "sliding_window": 64},
    "gemma3_text": {"head_dim": 16, "sliding_window": 64},
    "olmo2": {},
    "granite": {"residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "smollm3": {"no_rope_layers": [1, 0]},
    "starcoder2": {},
    "gpt_neox": {"num_key_value_heads": None},
    "cohere": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {
        "head_dim": 16, "num_experts": 6, "num_experts_per_tok": 3, "moe_intermediate_size": 48,
    },
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {
        "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": ["full_attention", "full_attention"],
    },
    "falcon": {"num_key_value_heads": None, "intermediate_size": None, "bias": True},
}.items():  # fmt: skip
    TINY.register(_name)(_settings)  # type: ignore[arg-type]


def tiny_model(
    model_type: str, dtype: torch.dtype = torch.float32, seed: int = 0, **overrides: Any
) -> nn.Module:
    """A random model of an architecture, in eval mode.

    Args:
        model_type: a name of :data:`TINY`.
        dtype: of its weights.
        seed: of its weights; biases and norms are random too, so that a lost one is noticed.
        **overrides: fields of its config.
    """
    settings = {**_SMALL, **TINY[model_type], **overrides}
    settings = {
        key: value for key, value in settings.items() if value is not None or key not in _SMALL
    }
    config = transformers.AutoConfig.for_model(model_type, **settings)
    state = torch.random.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = transformers.AutoModelForCausalLM.from_config(config)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
                elif "embed" not in name:
                    # Columns of unequal norm: a criterion that ignores them gives another mask.
                    parameter.mul_(5 * torch.rand(parameter.shape[-1]).add_(0.1))
    finally:
        torch.random.set_rng_state(state)
    module: nn.Module = model.to(dtype).eval()
    return module


def tiny_tokenizer(begins: bool = False) -> Any:
    """A byte tokenizer: token i is byte i, then begin- and end-of-sequence.

    Args:
        begins: put the begin-of-sequence token before every text, as Gemma's tokenizer does.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: index for index, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    found = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    if begins:
        found.backend_tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", found.bos_token_id)]
        )
    return found


def random_tokens(count: int, seed: int = 0) -> Tensor:
    """Token ids [count] of the tiny vocabulary."""
    return torch.randint(0, 256, (count,), generator=torch.Generator().manual_seed(seed))
