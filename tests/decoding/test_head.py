"""A language-model head that is read in fewer bits than the model has."""

from __future__ import annotations

import pytest
import torch
from conftest import CALIBRATION, config
from torch import nn

import wina
from wina.decoding import Decoder, choose_engine
from wina.decoding.head import head_dtype, read_rounded, rounded_head
from wina.errors import ConfigError
from wina.testing import random_tokens

PROMPT = random_tokens(20, seed=2)[None]


def sparsify(model: nn.Module, weight_dtype: str | None) -> None:
    wina.sparsify(
        model, config(sparsity=0.0, weight_dtype=weight_dtype), texts=CALIBRATION,
        show_progress=False,
    )  # fmt: skip


def logits_after(model: nn.Module, head: str) -> torch.Tensor:
    engine = choose_engine(model, head=head)
    assert engine.name == "trimmed"
    assert (f"its head is read in {head}" in engine.reason) == (head != "model")
    engine.start(PROMPT, None, 30)
    return engine.step(torch.tensor([3]))[0]


@pytest.mark.parametrize("dtype", ["int8", "int4"])
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_logits_are_those_of_the_rounded_head(
    llama: nn.Module, dtype: str, weight_dtype: str | None
) -> None:
    sparsify(llama, weight_dtype)
    own, got = logits_after(llama, "model"), logits_after(llama, dtype)
    ids = torch.cat([PROMPT, torch.tensor([[3]])], 1)
    with torch.no_grad(), read_rounded(llama, dtype):
        want = llama(ids).logits[0, -1]
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)
    assert (own - want).abs().max() > 10 * (got - want).abs().max()
    with torch.no_grad():
        torch.testing.assert_close(own, llama(ids).logits[0, -1], rtol=1e-3, atol=1e-4)


def test_auto_rounds_the_head_of_integer_projections_only(llama: nn.Module) -> None:
    assert head_dtype(llama) is None
    assert head_dtype(llama, "int4") == "int4"
    sparsify(llama, "int4")
    assert head_dtype(llama) == "int8"
    assert head_dtype(llama, "model") is None
    assert "read in int8" in Decoder(llama).engine.reason


def test_a_head_is_rounded_once_and_again_when_it_changes(llama: nn.Module) -> None:
    first = rounded_head(llama, "int8")
    assert rounded_head(llama, "int8") is first
    assert rounded_head(llama, "int4").bits == 4
    with torch.no_grad():
        llama.get_output_embeddings().weight.mul_(2.0)  # type: ignore[operator]
    assert rounded_head(llama, "int8") is not first


def test_an_unknown_format_is_refused(llama: nn.Module) -> None:
    with pytest.raises(ConfigError, match="auto, model, int8, int4"):
        wina.decode(llama, PROMPT, max_new_tokens=2, head_dtype="int3")
