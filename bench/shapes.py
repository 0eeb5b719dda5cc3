"""Shapes of real models, for benches on random weights."""

from __future__ import annotations

from typing import Any

from wina.registry import Registry

# Name → (model_type, config fields) as published in each model's config.json.
SHAPES: Registry[tuple[str, dict[str, Any]]] = Registry("model shape")

SHAPES.register("smollm2-135m")(
    (
        "llama",
        {
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "vocab_size": 49152,
            "tie_word_embeddings": True,
        },
    )
)
SHAPES.register("llama-3.2-1b")(
    (
        "llama",
        {
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 128256,
            "tie_word_embeddings": True,
        },
    )
)

# [N, K] of single projections: SmolLM2's and Llama-3.2-1B's, then Llama-3-8B's and Mistral-7B's.
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
