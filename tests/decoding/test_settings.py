"""Settings of a generation mean what they mean to transformers, or are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModel, GenerationConfig

import wina
from wina.errors import ConfigError
from wina.testing import random_tokens

PROMPT = random_tokens(12, seed=3)[None]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 0.6, "top_p": 0.9},
        {"top_k": 5},
        {"top_k": 0},
        {"top_k": None},
        {"min_p": 0.1, "typical_p": 0.9},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"config": GenerationConfig(temperature=0.7)},
    ],
    ids=str,
)
def test_sampling_draws_what_generate_draws(llama: Any, settings: dict[str, Any]) -> None:
    torch.manual_seed(5)
    got = wina.decode(llama, PROMPT, max_new_tokens=12, do_sample=True, **settings).tokens
    for_generate = dict(settings)
    config = for_generate.pop("config", None)
    torch.manual_seed(5)
    want = llama.generate(
        PROMPT, generation_config=config, max_new_tokens=12, do_sample=True, **for_generate
    )
    assert torch.equal(got[0], want[0, PROMPT.shape[1] :])


def test_an_end_is_kept_away(llama: Any) -> None:
    first = int(wina.decode(llama, PROMPT, max_new_tokens=1).tokens[0, 0])
    for settings in ({"min_new_tokens": 4}, {"min_length": PROMPT.shape[1] + 4}):
        settings |= {"max_new_tokens": 8, "eos_token_id": first, "pad_token_id": 0}
        got = wina.decode(llama, PROMPT, **settings).tokens[0]
        mask = torch.ones_like(PROMPT)  # else it takes 0 for padding
        want = llama.generate(PROMPT, attention_mask=mask, do_sample=False, **settings)[0, 12:]
        assert torch.equal(got, want)
        assert first not in got[:4]
    found = wina.decode(llama, PROMPT, max_new_tokens=8, eos_token_id=torch.tensor([first]))
    assert (found.tokens.numel(), found.finish) == (1, ("eos",))
    llama.generation_config.eos_token_id = first
    assert wina.decode(llama, PROMPT, max_new_tokens=8).finish == ("eos",)
    assert wina.decode(llama, PROMPT, max_new_tokens=8, eos_token_id=None).finish == ("length",)


def test_time_ends_a_text(llama: nn.Module) -> None:
    found = wina.decode(llama, PROMPT, max_new_tokens=20, max_time=0.0, eos_token_id=None)
    assert (found.tokens.numel(), found.finish) == (1, ("time",))


@pytest.mark.parametrize(
    "settings",
    [
        {"exponential_decay_length_penalty": (2, 1.5)}, {"forced_eos_token_id": 1},
        {"encoder_repetition_penalty": 1.5}, {"top_h": 0.4}, {"eta_cutoff": 1e-3},
        {"suppress_tokens": [3]}, {"begin_suppress_tokens": [3]}, {"token_healing": True},
        {"num_beams": 2}, {"guidance_scale": 1.5}, {"dola_layers": "high"},
    ],
    ids=str,
)  # fmt: skip
def test_what_would_change_the_text_and_is_not_known_is_refused(
    llama: nn.Module, settings: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=f"does not know {next(iter(settings))}="):
        wina.decode(llama, PROMPT, max_new_tokens=2, **settings)


def test_what_changes_nothing_is_taken(llama: nn.Module) -> None:
    plain = wina.decode(llama, PROMPT, max_new_tokens=4).tokens
    found = wina.decode(
        llama, PROMPT, max_new_tokens=4, suppress_tokens=[], bad_words_ids=[], num_beams=1,
        use_cache=True, output_scores=True, top_k=50,
    )  # fmt: skip
    assert torch.equal(found.tokens, plain)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"to_dict": 3}, "unknown setting to_dict"),
        ({"do_sample": True, "temperature": 0.0}, "temperature"),
        ({"do_sample": True, "top_p": 2.0}, "top_p"),
        ({"repetition_penalty": -1.0}, "penalty"),
        ({"attention_mask": torch.zeros(1, 12)}, "a 1 in every row"),
        ({"attention_mask": torch.ones(1, 5)}, "shape of input_ids"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused(
    llama: nn.Module, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        wina.decode(llama, PROMPT, max_new_tokens=2, **settings)


def test_a_model_without_a_head_is_refused(llama: Any) -> None:
    with pytest.raises(ConfigError, match="no language-model head"):
        wina.decode(AutoModel.from_config(llama.config).eval(), PROMPT, max_new_tokens=2)
