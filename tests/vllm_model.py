"""Sparse folders, and what our patched transformers model makes of tokens, beside vLLM."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import wina
from wina.cli_options import load_model
from wina.integrations.vllm.step import STEP, Scales
from wina.kernels.reference import keep_mask
from wina.patch import patch_of
from wina.testing import random_tokens, tiny_model, tiny_tokenizer

# vLLM's merged layers → what transformers calls their parts.
MERGED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


MARGIN = 1e-4  # relative distance from its threshold within which a channel may fall on either side

Seen = dict[str, list[tuple[Tensor, Tensor]]]
"""Projection → (inputs [t, K], thresholds [K] or [t, K]) of each of its sparse products."""


def make_folder(folder: Path, sparsity: float, model: str = "tiny") -> Path:
    """As a sparsified model saves itself, with a tokenizer: a tiny Llama, or a demo model.

    The sparse products of ``tiny`` have constants, large enough to be missed, those of
    ``tiny-importance`` probes.
    """
    settings = wina.SparsityConfig(sparsity=sparsity, window=128, calibration_tokens=2048)
    tiny = {
        "tiny": {"refinement": "learned:steps=4:constants=0.5:batch=256:text=1024"},
        "tiny-importance": {"selector": "importance"},
    }
    if model in tiny:
        settings = replace(settings, **tiny[model])  # type: ignore[arg-type]
        loaded: Any = tiny_model("llama", hidden_size=128, head_dim=32)
        tokenizer, texts = tiny_tokenizer(), random_tokens(2048, seed=1)
    else:
        loaded, tokenizer = load_model(model, "float32")
        texts = None
    wina.sparsify(loaded, settings, tokenizer=tokenizer, texts=texts, show_progress=False)
    loaded.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


class Recorder:
    """Keeps the inputs of every sparse product."""

    def __init__(self) -> None:
        self.seen: Seen = {}

    def of_vllm(self, layer: str, x: Tensor, thresholds: Tensor, scales: Scales) -> None:
        parent, _, leaf = layer.rpartition(".")
        for part, *cut in zip(MERGED.get(leaf, (leaf,)), thresholds, scales, strict=True):
            self.add(f"{parent}.{part}", x, *cut)

    def of_transformers(
        self, name: str, x: Tensor, threshold: Tensor, scale: Tensor | None
    ) -> None:
        self.add(name, x.flatten(0, -2), threshold, None if scale is None else scale.flatten())

    def add(self, name: str, x: Tensor, threshold: Tensor, scale: Tensor | None) -> None:
        if scale is not None:
            threshold = threshold * scale[:, None]
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


def scored(
    folder: Path, prompt: list[int], masks: Seen | None = None
) -> tuple[list[float], Recorder]:
    """Log-probabilities of a prompt's tokens from the second on, prompts masked, and what was.

    In our patched transformers model; with ``masks`` in transformers' dense one, whose projections
    read what those masks leave of their inputs, and add the plan's constants.
    """
    from transformers import AutoModelForCausalLM

    # Without its plan's prefill, which leaves prompts dense.
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wina.restore(model)
    recorder = Recorder()
    plan = wina.SparsityPlan.load(folder / "wina")
    if masks is None:
        wina.sparsify(model, plan, prefill="all")
        patch_of(model).control.observer = recorder.of_transformers
    for name, steps in (masks or {}).items():
        x, threshold = (torch.cat([x for x, _ in steps]), steps[0][1])
        keep = torch.ones(len(prompt), x.shape[-1])
        keep[-len(x) :] = keep_mask(x, threshold)
        module = model.get_submodule(name)
        module.register_forward_pre_hook(lambda _, inputs, keep=keep: (inputs[0] * keep,))
        constant = plan.layers[name].terms.bias
        if constant is not None:
            added = torch.zeros(len(prompt), len(constant))
            added[-len(x) :] = constant
            module.register_forward_hook(lambda _, __, y, added=added: y + added)
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        found = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    return found.gather(-1, ids[0, 1:, None])[:, 0].tolist(), recorder


def first_differences(theirs: Seen, ours: Seen) -> Tensor:
    """How far from its threshold, relative, each channel lies that the engines mask differently.

    In the first product where there is one; empty if there is none. Before it inputs are the same
    but for rounding, after it they are not.
    """
    assert set(theirs) == set(ours)
    for name, steps in theirs.items():
        x, our_x = (torch.cat([x for x, _ in found]) for found in (steps, ours[name]))
        threshold = steps[0][1]
        assert torch.equal(threshold, ours[name][0][1])
        differs = keep_mask(x, threshold) != keep_mask(our_x, threshold)
        if differs.any():
            return (x.abs() / threshold - 1).abs()[differs]
    return torch.empty(0)


def assert_close_median(found: list[float], expected: list[float]) -> None:
    difference = torch.tensor([abs(a - b) for a, b in zip(found, expected, strict=True)])
    assert float(difference.median()) <= 1e-4


class RankRecorder:
    """Methods that a worker process of vLLM gets (its option ``worker_extension_cls``)."""

    def record(self) -> None:
        """Keep all sparse products from now on."""
        self.recorder = Recorder()
        STEP.observer = self.recorder.of_vllm

    def recorded(self) -> Seen:
        """Of this rank."""
        return self.recorder.seen


def joined(ranks: Iterable[Seen]) -> Seen:
    """What one process would have seen: a rank of o and down holds a share of the channels."""
    found: Seen = {}
    first, *others = ranks
    for name, steps in first.items():
        found[name] = steps
        if name.endswith(("o_proj", "down_proj")):
            shares = zip(*(rank[name] for rank in (first, *others)), strict=True)
            found[name] = [
                (torch.cat(x, dim=-1), torch.cat(threshold))
                for x, threshold in (zip(*step, strict=True) for step in shares)
            ]
    return found


def assert_same_masks(theirs: Seen, ours: Seen, steps: int) -> None:
    """In so many steps, until a channel that lies on its threshold falls on the other side.

    From there on two engines read different inputs. Before, one whole step must have been equal.
    """
    assert set(theirs) == set(ours)
    assert {len(found) for found in theirs.values()} == {steps}
    dropped = total = products = 0
    for step in range(steps):
        for name, found in theirs.items():
            (x, threshold), (our_x, our_threshold) = found[step], ours[name][step]
            # Equal but for the factors of tokens, which are read off hidden states.
            torch.testing.assert_close(threshold, our_threshold, rtol=MARGIN / 10, atol=0)
            keep = keep_mask(x, threshold)
            other = keep != keep_mask(our_x, our_threshold)
            if other.any():
                distance = (x.abs() / threshold - 1).abs()[other].max()
                assert distance <= MARGIN, f"{name}, step {step}"
                break
            products += 1
            dropped, total = dropped + int((~keep).sum()), total + keep.numel()
        else:
            continue
        break
    assert products >= len(theirs)
    assert 0.4 < dropped / total < 0.6
