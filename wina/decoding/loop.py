"""Token after token: prompts in, streamed continuations out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wina.decoding.engines import Engine, check_length, choose_engine
from wina.decoding.head import AUTO
from wina.decoding.sampling import choose_token, defaults, end_tokens, processors_for
from wina.errors import ConfigError


class Streamer(Protocol):
    """As transformers' streamers: gets the prompt, then every token."""

    def put(self, value: Tensor) -> None:
        """Token ids [B, S], then [B]."""

    def end(self) -> None:
        """Nothing follows."""


@dataclass(frozen=True)
class Decoded:
    """A continuation.

    Attributes:
        tokens: new token ids [B, n]; a sequence that ended before the others is padded.
        finish: why each sequence ended: ``"length"``, ``"eos"``, ``"stop"`` or ``"time"``.
        engine: name of the engine that served.
        reason: why it was this one.
        first_s: seconds to the first token: the prompt.
        steps_s: seconds of all further tokens together.
    """

    tokens: Tensor
    finish: tuple[str, ...]
    engine: str
    reason: str
    first_s: float
    steps_s: float

    @property
    def tokens_per_s(self) -> float | None:
        """Decoded tokens a second, the prompt's time left out; None for a single token."""
        steps = self.tokens.numel() - self.tokens.shape[0]
        return steps / self.steps_s if steps and self.steps_s else None


class Decoder:
    """Decodes with one model; :func:`decode` makes one for a single call.

    Recognising a model and verifying that costs some tokens' time, so keep the decoder for several
    prompts, one after another: threads have one each. It sees the model as it was: make another
    after casting, moving, patching or restoring it.

    Attributes:
        engine: what runs a token; its ``name`` and ``reason`` say which and why.
    """

    def __init__(self, model: Any, rows: int = 1, head_dtype: str = AUTO) -> None:
        self.model = model
        self.engine: Engine = choose_engine(model, rows, head_dtype)

    def decode(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        config: Any | None = None,
        streamer: Streamer | None = None,
        tokenizer: Any | None = None,
        seed: int | None = None,
        **settings: Any,
    ) -> Decoded:
        """Continue a prompt; arguments as of :func:`decode`."""
        run = _Run(self, input_ids, attention_mask, config, tokenizer, seed, settings)
        if streamer is not None:
            streamer.put(input_ids.cpu())
        for tokens in run:
            if streamer is not None:
                streamer.put(tokens.cpu())
        if streamer is not None:
            streamer.end()
        return run.decoded()

    def stream(self, input_ids: Tensor, **options: Any) -> Iterator[int]:
        """Token ids of one sequence as they come; arguments as of :func:`decode`."""
        if input_ids.shape[0] != 1:
            raise ConfigError("streaming is for one sequence; pass a streamer for several")
        mask, config, tokenizer, seed = (options.pop(name, None) for name in _RUN_OPTIONS)
        for tokens in _Run(self, input_ids, mask, config, tokenizer, seed, options):
            yield int(tokens[0])


_RUN_OPTIONS = ("attention_mask", "config", "tokenizer", "seed")


def decode(model: Any, input_ids: Tensor, *, head_dtype: str = AUTO, **options: Any) -> Decoded:
    """Continue a prompt as fast as this machine can, with a dense or a sparsified model.

    Where a model's layers are recognised, each token is one native operator call over a static
    cache (batch 1, CPU); else the model's own forward runs. Either way greedy decoding gives what
    ``model.generate`` gives, up to rounding, which includes that of the head where it is read in
    fewer bits.

    Args:
        model: a causal language model of transformers.
        input_ids: the prompt [B, S].
        head_dtype: ``"model"`` reads the language-model head as it is, ``"int8"`` or ``"int4"`` a
            rounded copy; ``"auto"`` is int8 where the projections are integers, else the head as it
            is. Only a native step reads copies.
        **options: of this function: ``attention_mask`` [B, S] for prompts padded on the left;
            ``config``, a GenerationConfig (default: the model's); ``streamer`` with ``put`` and
            ``end``, such as transformers' TextStreamer; ``tokenizer``, needed for stop strings;
            ``seed`` of sampling. Anything else is a field of the GenerationConfig:
            ``max_new_tokens``, ``do_sample``, ``temperature``, ``top_k``, ``top_p``,
            ``repetition_penalty``, ``eos_token_id``, ``stop_strings``, ...

    Returns:
        The new tokens, why they ended, the engine and its reason, and times.

    Raises:
        wina.errors.ConfigError: an unknown or unsupported setting, an empty prompt, or one that
            is too long for the model.
    """
    rows = input_ids.shape[0] if input_ids.dim() == 2 else 1
    return Decoder(model, rows, head_dtype).decode(input_ids, **options)


class _Run:
    """One continuation under way; iterating yields tokens [B]."""

    def __init__(
        self,
        decoder: Decoder,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: Any | None,
        tokenizer: Any | None,
        seed: int | None,
        settings: dict[str, Any],
    ) -> None:
        if input_ids.dim() != 2 or not input_ids.numel():
            raise ConfigError(
                f"input_ids must be [batch, tokens] and not empty, got {tuple(input_ids.shape)}"
            )
        self.engine = decoder.engine
        if self.engine.name == "trimmed" and input_ids.shape[0] > 1:
            raise ConfigError(
                f"this decoder was made for one sequence: Decoder(model, rows={len(input_ids)})"
            )
        if getattr(decoder.model, "generation_config", None) is None:
            raise ConfigError(
                f"{type(decoder.model).__name__} has no language-model head: load the model with "
                "AutoModelForCausalLM"
            )
        mask = _needed(attention_mask, input_ids)
        if mask is not None and len(input_ids) == 1:  # alone, a sequence needs no padding
            input_ids, mask = input_ids[:, mask[0].bool()], None
        self.config = settled(config, decoder.model.generation_config, settings)
        rows, prompt = input_ids.shape
        self.new_tokens = _new_tokens(self.config, prompt)
        length = check_length(decoder.model, prompt, self.new_tokens)
        self.prompt = prompt
        self.mask = mask
        self.ids = input_ids.new_empty(rows, length)
        self.ids[:, :prompt] = input_ids
        self.count = prompt
        self.processors = processors_for(self.config, prompt, input_ids.device)
        self.ends = end_tokens(self.config)
        self.padding = self.config.pad_token_id
        if self.padding is None:
            self.padding = self.ends[0] if self.ends else 0
        self.stop = _stop_strings(self.config, tokenizer)
        self.generator = (
            None if seed is None else torch.Generator(input_ids.device).manual_seed(seed)
        )
        self.ended: dict[int, str] = {}  # row → why
        self.first_s = self.steps_s = 0.0

    def __iter__(self) -> Iterator[Tensor]:
        start = time.perf_counter()
        self.engine.text = self
        logits = self.engine.start(self.ids[:, : self.prompt], self.mask, self.ids.shape[1])
        while True:
            with torch.no_grad():
                tokens = choose_token(
                    logits, self.ids[:, : self.count], self.processors,
                    bool(self.config.do_sample), self.generator,
                )  # fmt: skip
            if self.ended:
                tokens[list(self.ended)] = self.padding
            self.ids[:, self.count] = tokens
            self.count += 1
            now = time.perf_counter()
            if self.count == self.prompt + 1:
                self.first_s = now - start
            else:
                self.steps_s += now - start
            yield tokens
            start = time.perf_counter()
            self._note_ends(tokens)
            if self.count == self.ids.shape[1] or len(self.ended) == len(self.ids):
                return
            if self.engine.text is not self:
                raise ConfigError(
                    "another text was begun with this decoder: make a wina.Decoder for each text "
                    "that is decoded at the same time"
                )
            logits = self.engine.step(tokens)

    def _note_ends(self, tokens: Tensor) -> None:
        """Note which sequences ended with these tokens [B], and why."""
        # Lists, not tensors: of one sequence, the usual case, they cost a microsecond.
        if self.ends:
            for row, token in enumerate(tokens.tolist()):
                if token in self.ends:
                    self.ended.setdefault(row, "eos")
        if self.stop is not None:
            stopped = self.stop(self.ids[:, : self.count], None)
            for row in stopped.nonzero().flatten().tolist():
                self.ended.setdefault(row, "stop")
        if self.config.max_time is not None and self.first_s + self.steps_s > self.config.max_time:
            for row in range(len(self.ids)):
                self.ended.setdefault(row, "time")

    def decoded(self) -> Decoded:
        return Decoded(
            self.ids[:, self.prompt : self.count].clone(),
            tuple(self.ended.get(row, "length") for row in range(len(self.ids))),
            self.engine.name, self.engine.reason, self.first_s, self.steps_s,
        )  # fmt: skip


def settled(config: Any | None, models: Any, settings: dict[str, Any]) -> Any:
    """What ``generate`` would go by: a copy of a GenerationConfig, filled up.

    Args:
        config: the user's, None for none.
        models: the model's own, for what the user's does not say.
        settings: fields that come before both.

    Raises:
        ConfigError: there is no such field.
    """
    import copy

    found = copy.deepcopy(models if config is None else config)
    unknown = [name for name in settings if name not in vars(found) and name not in defaults()]
    if unknown:
        raise ConfigError(
            f"unknown setting {', '.join(unknown)}: fields of transformers' GenerationConfig are "
            "taken, such as max_new_tokens, do_sample, temperature, top_k, top_p"
        )
    usual = {**defaults(), "max_length": None}  # nobody means 20 tokens in all
    for name, value in {**usual, **_said(models)}.items():
        if getattr(found, name, None) is None:
            setattr(found, name, value)
    for name, value in settings.items():  # None, too: that there is no such thing
        setattr(found, name, value)
    return found


def _said(config: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(config).items() if value is not None}


def _new_tokens(config: Any, prompt: int) -> int:
    if config.max_new_tokens is not None:
        count = int(config.max_new_tokens)
    else:
        count = int(config.max_length or 0) - prompt
    if count < 1:
        raise ConfigError(
            f"nothing to decode after a prompt of {prompt} tokens: give max_new_tokens, 1 or more"
        )
    return count


def _needed(mask: Tensor | None, input_ids: Tensor) -> Tensor | None:
    """A mask that masks something, else None."""
    if mask is None:
        return None
    if mask.shape != input_ids.shape or not bool(mask.any(dim=1).all()):
        raise ConfigError(
            f"attention_mask must have the shape of input_ids, {tuple(input_ids.shape)}, and a 1 "
            f"in every row; it is {tuple(mask.shape)}"
        )
    return None if bool(mask.all()) else mask


def _stop_strings(config: Any, tokenizer: Any | None) -> Any | None:
    strings = config.stop_strings
    if not strings:
        return None
    if tokenizer is None:
        raise ConfigError("stop strings need the tokenizer: pass tokenizer=")
    from transformers import StopStringCriteria

    found: Sequence[str] = [strings] if isinstance(strings, str) else list(strings)
    return StopStringCriteria(tokenizer, found)
