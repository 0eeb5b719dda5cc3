"""Decoding equals ``model.generate``, whichever engine serves, and ends when it should."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import CALIBRATION, config
from torch import Tensor, nn

import wina
from wina.decoding import Decoder, choose_engine
from wina.decoding.engines import Trimmed
from wina.decoding.tables import look
from wina.errors import ConfigError, PatchStateError
from wina.kernels import cpu
from wina.linear import SparseLinear
from wina.testing import random_tokens, tiny_model, tiny_tokenizer

# Longer than the sliding windows of the tiny models (64 tokens).
PROMPT = random_tokens(70, seed=2)[None]
FALLBACKS = {
    "starcoder2", "gpt_neox", "cohere", "falcon", "mixtral", "qwen3_moe", "olmoe", "gpt_oss",
}  # fmt: skip


def generated(model, prompt: Tensor, count: int, **options) -> Tensor:
    output = model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False,
        **options,
    )  # fmt: skip
    return output[:, prompt.shape[1] :]


def sparsify(model: nn.Module, sparsity: float, **settings: object) -> None:
    wina.sparsify(
        model, config(sparsity=sparsity, **settings), texts=CALIBRATION, show_progress=False
    )


def test_greedy_decoding_is_that_of_generate(model: nn.Module) -> None:
    decoder = Decoder(model)
    served = "transformers" if model.config.model_type in FALLBACKS else "trimmed"
    assert (decoder.engine.name, decoder.engine.reason != "") == (served, True)
    got = decoder.decode(PROMPT, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(got.tokens, generated(model, PROMPT, 12, eos_token_id=None))
    assert got.finish == ("length",)


@pytest.mark.parametrize("name", ["llama", "gemma3_text", "phi3", "granite"])
@pytest.mark.parametrize(
    "settings",
    [
        {}, {"weight_dtype": "int8"}, {"selector": "topk"}, {"selector": "importance"},
        {"weight_dtype": "int4+int4", "selector": "importance"},
        {"correction": "bias"},
        {"rows": 0.5}, {"rows": 1.0}, {"rows": 1.0, "selector": "topk"},
    ],
    ids=str,
)  # fmt: skip
def test_sparse_logits_are_those_of_the_model(
    name: str, settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    # Weights as small as these stay in a cache; here skipping shall not pay for a share of them.
    rows = settings.get("rows", 0.0)
    monkeypatch.setattr(
        cpu, "break_even", lambda K, N, dtype: 1.0 if rows == 1.0 or (rows and N > K) else 0.0
    )
    model = tiny_model(name)
    sparsify(model, 0.5, **{k: v for k, v in settings.items() if k != "rows"})
    used = {m.choice.backend.name for m in model.modules() if isinstance(m, SparseLinear)}
    assert used == {0.0: {"cpu"}, 0.5: {"cpu", "cpu-rows"}, 1.0: {"cpu-rows"}}[rows]
    engine = choose_engine(model, head="model")
    assert isinstance(engine, Trimmed), engine.reason
    cache = None
    differences = []
    tokens = PROMPT
    got = engine.start(PROMPT, None, 100)
    for _ in range(8):
        with torch.no_grad():
            output = model(tokens, past_key_values=cache, use_cache=True)  # type: ignore[operator]
        cache = output.past_key_values
        differences.append((got - output.logits[:, -1]).abs().max().item())
        tokens = output.logits[:, -1].argmax(-1)[:, None]
        got = engine.step(tokens[0])
    # A channel on its threshold may fall on either side: the median, not the worst.
    assert sorted(differences)[4] < 1e-4
    with wina.dense(model):
        assert torch.equal(
            Decoder(model).decode(PROMPT, max_new_tokens=6, eos_token_id=None).tokens,
            generated(model, PROMPT, 6, eos_token_id=None),
        )


def test_sparsity_zero_gives_the_tokens_of_generate(llama: nn.Module) -> None:
    sparsify(llama, 0.0)
    want = generated(llama, PROMPT, 12, eos_token_id=None)
    assert torch.equal(
        wina.decode(llama, PROMPT, max_new_tokens=12, eos_token_id=None).tokens, want
    )


def test_a_layer_that_computes_something_else_is_not_trusted(llama: nn.Module) -> None:
    mlp = llama.model.layers[1].mlp  # type: ignore[union-attr, index]
    usual = type(mlp)
    mlp.__class__ = type("Twice", (usual,), {"forward": lambda self, x: 2 * usual.forward(self, x)})
    engine = choose_engine(llama)
    assert engine.name == "transformers"
    assert "logits differ" in engine.reason
    assert torch.equal(
        wina.decode(llama, PROMPT, max_new_tokens=5, eos_token_id=None).tokens,
        generated(llama, PROMPT, 5, eos_token_id=None),
    )


def test_what_others_put_into_a_model_is_run_and_stays(llama: nn.Module) -> None:
    layer = llama.model.layers[1]  # type: ignore[union-attr, index]
    usual, calls = layer.forward, []

    def mine(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return usual(*args, **kwargs)

    layer.forward = mine
    found = wina.decode(llama, PROMPT, max_new_tokens=3, eos_token_id=None)
    assert (found.engine, len(calls)) == ("transformers", 3)
    assert "forward of model.layers.1 was replaced" in found.reason
    look(llama, llama.model, 8)
    assert layer.forward is mine
    del layer.forward
    handle = layer.mlp.register_forward_hook(lambda _, __, y: y * 2)
    found = wina.decode(llama, PROMPT, max_new_tokens=3, eos_token_id=None)
    assert "model.layers.1.mlp has a forward hook" in found.reason
    assert torch.equal(found.tokens, generated(llama, PROMPT, 3, eos_token_id=None))
    handle.remove()
    assert choose_engine(llama).name == "trimmed"


def test_a_decoder_is_for_one_model_and_one_text(llama: nn.Module) -> None:
    decoder = Decoder(llama)
    first = decoder.stream(PROMPT, max_new_tokens=4)
    next(first)
    decoder.decode(PROMPT, max_new_tokens=2)
    with pytest.raises(ConfigError, match="another text was begun"):
        list(first)
    sparsify(llama, 0.5)
    with pytest.raises(PatchStateError, match="make another"):
        decoder.decode(PROMPT, max_new_tokens=2)


@pytest.mark.parametrize("prefill", ["all", "last:0.5"])
def test_padded_prompts_are_sparse_as_each_alone(llama: nn.Module, prefill: str) -> None:
    sparsify(llama, 0.5, prefill=prefill)
    alone = random_tokens(9, seed=8)[None]
    prompt = torch.cat([random_tokens(24, seed=9)[None], torch.zeros(1, 24, dtype=torch.long)])
    prompt[1, -9:] = alone
    mask = (torch.arange(24) >= torch.tensor([[0], [15]])).long()
    engine = Decoder(llama, rows=2).engine
    got = engine.start(prompt, mask, 30)[1]
    with torch.no_grad():
        want = llama(alone).logits[0, -1]
    assert torch.allclose(got, want, atol=1e-4)


def test_a_correction_without_an_instruction_falls_back(llama: nn.Module) -> None:
    sparsify(llama, 0.5, correction="low-rank")
    engine = choose_engine(llama)
    assert "low-rank" in engine.reason
    assert not isinstance(engine, Trimmed)


def test_several_sequences_with_padding(llama: nn.Module) -> None:
    prompt = torch.cat([PROMPT, random_tokens(70, seed=5)[None]])
    mask = torch.ones_like(prompt)
    mask[1, :20] = 0
    got = wina.decode(llama, prompt, attention_mask=mask, max_new_tokens=6, eos_token_id=None)
    assert got.engine == "transformers"
    assert "2 sequences" in got.reason
    alone = generated(llama, prompt[1:, 20:], 6, eos_token_id=None)
    assert torch.equal(got.tokens[1:], alone)
    single = wina.decode(
        llama, prompt[1:], attention_mask=mask[1:], max_new_tokens=6, eos_token_id=None
    )
    assert single.engine == "trimmed"
    assert torch.equal(single.tokens, alone)


def test_end_tokens_end(llama: nn.Module) -> None:
    free = wina.decode(llama, PROMPT, max_new_tokens=10, eos_token_id=None).tokens[0]
    end = int(free[4])
    first = free.tolist().index(end)
    got = wina.decode(llama, PROMPT, max_new_tokens=10, eos_token_id=[end, 257])
    assert got.finish == ("eos",)
    assert torch.equal(got.tokens[0], free[: first + 1])


def test_stop_strings(llama: nn.Module) -> None:
    decoder = Decoder(llama)
    # It can only write letters, so that every token is a character of its own.
    letters = tiny_tokenizer()("abcdefghijklmnopqrstuvwxyz").input_ids
    others = [token for token in range(258) if token not in letters]
    with torch.no_grad():
        llama.lm_head.weight[others] = 0  # type: ignore[union-attr, index]
    free = decoder.decode(PROMPT, max_new_tokens=10, eos_token_id=None).tokens[0]
    text = tiny_tokenizer().decode(free)
    got = decoder.decode(
        PROMPT, max_new_tokens=10, eos_token_id=None, stop_strings=[text[2:4]],
        tokenizer=tiny_tokenizer(),
    )  # fmt: skip
    assert got.finish == ("stop",)
    assert text[2:4] in tiny_tokenizer().decode(got.tokens[0])
    assert got.tokens.shape[1] <= 4
    with pytest.raises(ConfigError, match="tokenizer"):
        decoder.decode(PROMPT, max_new_tokens=3, stop_strings="x")


def test_sampling_repeats_with_its_seed(llama: nn.Module) -> None:
    decoder = Decoder(llama)
    options = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5, "top_k": 50,
               "top_p": 0.9, "repetition_penalty": 1.2, "eos_token_id": None}  # fmt: skip
    first, again, other = (
        decoder.decode(PROMPT, seed=seed, **options).tokens for seed in (1, 1, 2)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    greedy = decoder.decode(PROMPT, seed=1, **{**options, "top_k": 1}).tokens
    assert torch.equal(
        greedy, generated(llama, PROMPT, 20, eos_token_id=None, repetition_penalty=1.2)
    )


def test_streaming_gives_the_tokens_one_by_one(llama: nn.Module) -> None:
    class Streamer:
        def __init__(self) -> None:
            self.seen: list[list[int]] = []

        def put(self, value: Tensor) -> None:
            self.seen.append(value.flatten().tolist())

        def end(self) -> None:
            self.seen.append([-1])

    streamer, decoder = Streamer(), Decoder(llama)
    got = decoder.decode(PROMPT, max_new_tokens=5, eos_token_id=None, streamer=streamer)
    tokens = got.tokens[0].tolist()
    assert streamer.seen == [PROMPT[0].tolist(), *([token] for token in tokens), [-1]]
    assert list(decoder.stream(PROMPT, max_new_tokens=5, eos_token_id=None)) == tokens


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 500}, "sees 512 at most"),
        ({"max_new_tokens": 0}, "nothing to decode"),
        ({"max_new_tokens": 4, "num_beams": 3}, "num_beams"),
        ({"max_new_token": 4}, "unknown setting max_new_token"),
    ],
)
def test_settings_that_cannot_be_met(llama, options: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        wina.decode(llama, PROMPT, **options)


def test_the_cache_grows(llama: nn.Module) -> None:
    decoder = Decoder(llama)
    for count in (3, 200, 10):
        got = decoder.decode(PROMPT, max_new_tokens=count, eos_token_id=None)
        assert torch.equal(got.tokens, generated(llama, PROMPT, count, eos_token_id=None))
