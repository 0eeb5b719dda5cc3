"""A model folder of the Llama architecture as a GGUF file, which llama.cpp and OpenVINO read.

The converter of llama.cpp is in no wheel; the package ``gguf`` (names, block formats, file layout)
is. Prompts and answers of the benches are token ids, so the vocabulary holds names only.
"""

from __future__ import annotations

import json
import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

from wina.errors import UnsupportedModelError, WinaError
from wina.progress import progress

# What a matrix becomes; vectors stay in float32, as llama.cpp wants them.
WEIGHTS = {"f32": "F32", "bf16": "BF16", "f16": "F16", "q8_0": "Q8_0", "q4_0": "Q4_0"}
_FILE_TYPES = {
    "f32": "ALL_F32",
    "bf16": "MOSTLY_BF16",
    "f16": "MOSTLY_F16",
    "q8_0": "MOSTLY_Q8_0",
    "q4_0": "MOSTLY_Q4_0",
}

# Rows that llama.cpp rotates in neighbouring pairs, where transformers pairs row i with row
# i + head_dim / 2; and the config's field with their number of heads.
_ROTATED = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}


def write_gguf(folder: Path, target: Path, weights: str, show_progress: bool = True) -> None:
    """Write a model folder as one GGUF file.

    Args:
        folder: ``config.json`` and safetensors of a Llama.
        target: the file.
        weights: a key of :data:`WEIGHTS`. Every matrix gets this type, embeddings as well: the
            fewest bytes, so the fastest file.
        show_progress: draw a bar on stderr.

    Raises:
        UnsupportedModelError: the model is no Llama, or has what the file could not say.
        WinaError: the package ``gguf`` is missing.
    """
    try:
        import gguf
        import numpy as np
    except ImportError:
        raise WinaError("writing GGUF needs the package gguf: pip install 'wina[peers]'") from None
    config = _config(folder)
    kind = gguf.GGMLQuantizationType[WEIGHTS[weights]]
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    writer = gguf.GGUFWriter(target, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.LLAMA])
    _describe(writer, config, gguf.TokenType)
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES[weights]])
    with ExitStack() as stack:
        files = _open(folder, stack)
        names: dict[str, str] = {}
        for name, file in files.items():
            found = known.get_name(name, try_suffixes=(".weight",))
            if found is None:
                raise UnsupportedModelError(f"{name}: llama.cpp's Llama has no such tensor")
            names[name] = found
            shape = file.get_slice(name).get_shape()
            stored = kind if len(shape) == 2 else gguf.GGMLQuantizationType.F32
            if shape[-1] % gguf.GGML_QUANT_SIZES[stored][0]:
                raise UnsupportedModelError(f"{name}: rows of {shape[-1]} do not fit {stored.name}")
            size = gguf.quant_shape_to_byte_shape(shape, stored)
            writer.add_tensor_info(
                found, size, np.dtype(np.uint8), math.prod(size), raw_dtype=stored
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        title = f"writing {target.name}"
        with progress(title, len(names), show_progress) as advance:
            for name in names:
                tensor = _paired(name, files[name].get_tensor(name).float(), config)
                stored = kind if tensor.dim() == 2 else gguf.GGMLQuantizationType.F32
                data = gguf.quants.quantize(tensor.numpy(), stored)
                writer.write_tensor_data(data)
                advance()
    writer.close()


def _config(folder: Path) -> dict[str, Any]:
    """The settings of a Llama that a GGUF file can say in full."""
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise WinaError(f"{folder} is no model folder: {error}") from None
    rope = config.get("rope_parameters") or {"rope_theta": config.get("rope_theta", 10000.0)}
    config["rope_theta"] = rope["rope_theta"]
    heads = config["num_attention_heads"]
    config.setdefault("num_key_value_heads", heads)
    config["head_dim"] = config.get("head_dim") or config["hidden_size"] // heads
    plain = {
        "model_type": ("llama",),
        "hidden_act": ("silu",),
        "attention_bias": (None, False),
        "mlp_bias": (None, False),
        "rope_scaling": (None,),
    }
    for field, allowed in plain.items():
        if config.get(field) not in allowed:
            raise UnsupportedModelError(
                f"{field} is {config.get(field)!r}: only plain Llamas are written as GGUF"
            )
    if rope.get("rope_type", "default") != "default":
        raise UnsupportedModelError(f"rope {rope['rope_type']!r} is not written as GGUF")
    return config


def _describe(writer: Any, config: dict[str, Any], types: Any) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    size = config["vocab_size"]
    writer.add_vocab_size(size)
    # Readers want a byte-level vocabulary with a merge and a special token in it.
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list([f"<{i}>" for i in range(size)])
    writer.add_token_types([types.USER_DEFINED, *[types.NORMAL] * (size - 1)])
    writer.add_token_merges(["< 0"])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])


def _open(folder: Path, stack: ExitStack) -> dict[str, Any]:
    """Tensor name → open safetensors file; a tied head is left out where a file has it."""
    files: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        file = stack.enter_context(safe_open(path, framework="pt"))
        files.update(dict.fromkeys(file.keys(), file))
    if not files:
        raise WinaError(f"{folder} holds no safetensors")
    return files


def _paired(name: str, weight: Tensor, config: dict[str, Any]) -> Tensor:
    """Rows in llama.cpp's order of rotary pairs: (i, i + head_dim / 2) become neighbours."""
    for part, heads in _ROTATED.items():
        if f".{part}." in name:
            halves = weight.view(config[heads], 2, config["head_dim"] // 2, -1)
            return halves.transpose(1, 2).reshape(weight.shape).contiguous()
    return weight
