"""A tiny Llama with a plan beside it, and what our patched transformers model makes of tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wina
from wina.patch import patch_of
from wina.testing import random_tokens, tiny_model, tiny_tokenizer

# vLLM's merged layers → what transformers calls their parts.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def make_folder(folder: Path, sparsity: float) -> Path:
    """As a sparsified model saves itself, with a tokenizer."""
    model: Any = tiny_model("llama", hidden_size=128, head_dim=32)
    settings = wina.SparsityConfig(sparsity=sparsity, window=128)
    wina.sparsify(model, settings, texts=random_tokens(2048, seed=1), show_progress=False)
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


class Recorder:
    """Keeps the inputs of every sparse product, by projection."""

    def __init__(self) -> None:
        self.seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def of_vllm(self, layer: str, x: Tensor, thresholds: Tensor) -> None:
        parent, _, leaf = layer.rpartition(".")
        for part, threshold in zip(MERGED.get(leaf, (leaf,)), thresholds, strict=True):
            self.add(f"{parent}.{part}", x, threshold)

    def of_transformers(self, name: str, x: Tensor, threshold: Tensor, scale: object) -> None:
        self.add(name, x.flatten(0, -2), threshold)

    def add(self, name: str, x: Tensor, threshold: Tensor) -> None:
        self.seen.setdefault(name, []).append((x.clone(), threshold.clone()))


def forced(folder: Path, prompt: list[int], tokens: list[int]) -> tuple[list[float], Recorder]:
    """Log-probabilities of given tokens in our patched transformers model, and what it masked."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    recorder = Recorder()
    found = []
    with torch.inference_mode():
        patch_of(model).control.observer = recorder.of_transformers
        output = model(input_ids=torch.tensor([prompt]), use_cache=True)
        for token in tokens:
            found.append(float(output.logits[0, -1].log_softmax(-1)[token]))
            output = model(
                input_ids=torch.tensor([[token]]), past_key_values=output.past_key_values
            )
    return found, recorder


def assert_close_median(found: list[float], expected: list[float]) -> None:
    difference = torch.tensor([abs(a - b) for a, b in zip(found, expected, strict=True)])
    assert float(difference.median()) <= 1e-4
