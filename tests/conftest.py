"""Shared fixtures. Everything here is tiny, random and offline."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# One tiny forward is a thousand small loops: more threads only wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "2")

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import wina
from wina import SparsityConfig, SparsityPlan, calibrate
from wina.prefill import Prefill
from wina.switches import prefill_protocol
from wina.testing import TINY, random_tokens, tiny_model

ARCHITECTURES = list(TINY)
CALIBRATION = random_tokens(2048, seed=1)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    left_off = not torch.is_grad_enabled()
    torch.set_grad_enabled(True)  # else tests that come later would fail in this one's place
    assert not left_off, "gradients were left switched off"


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New tensors of ``torch.empty`` hold NaN: an element that nobody wrote shows."""
    empty = torch.empty

    def poisoned(*args: object, **kwargs: object) -> Tensor:
        tensor: Tensor = empty(*args, **kwargs)  # type: ignore[call-overload]
        return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor

    monkeypatch.setattr(torch, "empty", poisoned)
    return


@pytest.fixture(params=ARCHITECTURES)
def model(request: pytest.FixtureRequest) -> nn.Module:
    """A tiny random model of every architecture."""
    return tiny_model(request.param)


@pytest.fixture
def llama() -> nn.Module:
    return tiny_model("llama")


@pytest.fixture
def tokens() -> Tensor:
    """Token ids [1, 48]."""
    return random_tokens(48, seed=2)[None]


def config(**settings: object) -> SparsityConfig:
    """A config that calibrates in a moment, by the method that has the fewest parts."""
    quick = {"method": "wina", "calibration_tokens": 1024, "window": 128}
    return SparsityConfig(**{**quick, **settings})  # type: ignore[arg-type]


def plan_for(model: nn.Module, **settings: object) -> SparsityPlan:
    return calibrate(model, config=config(**settings), texts=CALIBRATION, show_progress=False)


def logits(model: nn.Module, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        output: Tensor = model(tokens).logits
    return output


def divergence(model: nn.Module, plan: SparsityPlan, ids: Tensor) -> float:
    """KL(dense ‖ sparse) over the sparse tokens, nats."""
    wina.sparsify(model, plan)
    with torch.no_grad(), prefill_protocol(model, Prefill(1.0, 2)):
        sparse = model(input_ids=ids).logits[:, 2:].log_softmax(-1)
        with wina.dense(model):
            dense = model(input_ids=ids).logits[:, 2:].log_softmax(-1)
    wina.restore(model)
    return float(F.kl_div(sparse, dense, reduction="sum", log_target=True)) / ids.numel()


def decode_logits(model: nn.Module, tokens: Tensor, prompt: int = 8) -> Tensor:
    """Logits [S − prompt, vocabulary] of tokens fed one by one after a prompt."""
    with torch.no_grad():
        cache = model(tokens[:, :prompt], use_cache=True).past_key_values
        rows = []
        for i in range(prompt, tokens.shape[1]):
            output = model(tokens[:, i : i + 1], past_key_values=cache, use_cache=True)
            rows.append(output.logits[0, -1])
    return torch.stack(rows)
