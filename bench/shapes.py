"""Shapes of real models: configs as published, from which projection shapes are derived.

A row is what a model's ``config.json`` says and its class does not assume anyway. No weights are
ever needed: :mod:`wina.bench.structure` builds the model on the meta device and looks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from wina.bench.structure import meta_model, projection_shapes
from wina.errors import UnsupportedModelError
from wina.registry import Registry


@dataclass(frozen=True)
class ModelShape:
    """One model's architecture.

    Attributes:
        model_type: of transformers, such as ``"llama"``.
        config: the fields of ``config.json`` that set shapes.
        parameters: published total, tied weights counted once; guards the row against typos.
    """

    model_type: str
    config: Mapping[str, Any] = field(repr=False)
    parameters: int


SHAPES: Registry[ModelShape] = Registry("model shape")


def _add(
    name: str,
    model_type: str,
    parameters: int,
    hidden: int,
    intermediate: int,
    layers: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    tied: bool,
    **more: Any,
) -> None:
    config = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        **more,
    }
    SHAPES.register(name)(ModelShape(model_type, MappingProxyType(config), parameters))


# fmt: off
# name, model_type, parameters, hidden, intermediate, layers, heads, KV heads, vocabulary, tied
_add("smollm2-135m", "llama", 134_515_008, 576, 1536, 30, 9, 3, 49152, True)
_add("smollm2-360m", "llama", 361_821_120, 960, 2560, 32, 15, 5, 49152, True)
_add("smollm2-1.7b", "llama", 1_711_376_384, 2048, 8192, 24, 32, 32, 49152, True)
_add("llama-3.2-1b", "llama", 1_235_814_400, 2048, 8192, 16, 32, 8, 128256, True, head_dim=64)
_add("llama-3.2-3b", "llama", 3_212_749_824, 3072, 8192, 28, 24, 8, 128256, True, head_dim=128)
_add("llama-3-8b", "llama", 8_030_261_248, 4096, 14336, 32, 32, 8, 128256, False)
_add("llama-2-7b", "llama", 6_738_415_616, 4096, 11008, 32, 32, 32, 32000, False)
_add("llama-3-70b", "llama", 70_553_706_496, 8192, 28672, 80, 64, 8, 128256, False)
_add("qwen2.5-0.5b", "qwen2", 494_032_768, 896, 4864, 24, 14, 2, 151936, True)
_add("qwen2.5-7b", "qwen2", 7_615_616_512, 3584, 18944, 28, 28, 4, 152064, False)
_add("qwen3-4b", "qwen3", 4_022_468_096, 2560, 9728, 36, 32, 8, 151936, True, head_dim=128)
_add("mistral-7b", "mistral", 7_241_732_096, 4096, 14336, 32, 32, 8, 32000, False,
     sliding_window=4096)
_add("phi-4", "phi3", 14_659_507_200, 5120, 17920, 40, 40, 10, 100352, False)
_add("gemma-3-270m", "gemma3_text", 268_098_176, 640, 2048, 18, 4, 1, 262144, True,
     head_dim=256, sliding_window=512)
_add("gemma-3-1b", "gemma3_text", 999_885_952, 1152, 6912, 26, 4, 1, 262144, True,
     head_dim=256, sliding_window=512)
_add("gemma-3-4b-text", "gemma3_text", 3_880_263_168, 2560, 10240, 34, 8, 4, 262208, True,
     head_dim=256, sliding_window=1024)
_add("mixtral-8x7b", "mixtral", 46_702_792_704, 4096, 14336, 32, 32, 8, 32000, False,
     num_local_experts=8, num_experts_per_tok=2)
_add("qwen3-30b-a3b", "qwen3_moe", 30_532_122_624, 2048, 6144, 48, 32, 4, 151936, False,
     head_dim=128, moe_intermediate_size=768, num_local_experts=128, num_experts_per_tok=8)
# fmt: on

# The quick default of `wina bench kernels`, [N, K]: a small, a middle-sized and a large model.
PROJECTION_SHAPES: tuple[tuple[int, int], ...] = (
    (192, 576),
    (576, 576),
    (1536, 576),
    (576, 1536),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (4096, 4096),
    (14336, 4096),
    (4096, 14336),
)
# For `--quick`: odd on purpose.
QUICK_SHAPES: tuple[tuple[int, int], ...] = ((192, 576), (95, 63))


def shape_config(name: str) -> Any:
    """The transformers config of a named shape."""
    import transformers

    shape = SHAPES[name]
    # Some classes number their special tokens beyond a small vocabulary.
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    return transformers.AutoConfig.for_model(shape.model_type, **{**tokens, **shape.config})


def shapes_of(name: str) -> list[tuple[int, int]]:
    """The different [N, K] among the projections of a named shape, in order of appearance."""
    return projection_shapes(meta_model(shape_config(name)))


def load_config(model: str, trust: bool = False) -> Any:
    """The config of a named shape, a folder or a hub id; a composite's text part.

    Raises:
        UnsupportedModelError: there is none; the message lists the named shapes.
    """
    import transformers

    if model in SHAPES:
        return shape_config(model)
    try:
        config = transformers.AutoConfig.from_pretrained(model, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UnsupportedModelError(
            f"no config for {model!r} ({reason}). Named shapes: {', '.join(SHAPES)}."
        ) from None
    return config.get_text_config()
