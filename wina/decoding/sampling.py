"""From logits to a token, with transformers' own processors."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from wina.errors import ConfigError

# Fields of a GenerationConfig that process logits, in transformers' order: (field, class, value
# that does nothing). Those of the second group only matter to sampling.
_ALWAYS = (
    ("repetition_penalty", "RepetitionPenaltyLogitsProcessor", 1.0),
    ("no_repeat_ngram_size", "NoRepeatNGramLogitsProcessor", 0),
)
_SAMPLING = (
    ("temperature", "TemperatureLogitsWarper", 1.0),
    ("top_k", "TopKLogitsWarper", 0),
    ("top_p", "TopPLogitsWarper", 1.0),
    ("min_p", "MinPLogitsWarper", None),
    ("typical_p", "TypicalLogitsWarper", 1.0),
    ("epsilon_cutoff", "EpsilonLogitsWarper", 0.0),
)
# Fields that ask for another way of decoding, and the value that does not.
_REFUSED = (
    ("num_beams", 1),
    ("penalty_alpha", None),
    ("prompt_lookup_num_tokens", None),
    ("guidance_scale", None),
    ("sequence_bias", None),
    ("bad_words_ids", None),
    ("suppress_tokens", None),
    ("constraints", None),
    ("force_words_ids", None),
    ("num_return_sequences", 1),
)

Processor = Callable[[Tensor, Tensor], Tensor]


def processors_for(config: Any, prompt: int, device: torch.device) -> list[Processor]:
    """What transforms logits [B, V], given the ids so far, as a GenerationConfig asks.

    Args:
        config: a ``transformers.GenerationConfig``.
        prompt: tokens of the prompt.
        device: of the logits.

    Raises:
        ConfigError: it asks for another way of decoding, such as beams.
    """
    import transformers

    for field, nothing in _REFUSED:
        value = getattr(config, field, None)
        if value not in (None, nothing):
            raise ConfigError(
                f"wina.decode does not know {field}={value!r}: use model.generate for it"
            )
    fields = (*_ALWAYS, *(_SAMPLING if config.do_sample else ()))
    processors: list[Processor] = [
        getattr(transformers, name)(value)
        for field, name, nothing in fields
        if (value := getattr(config, field, None)) not in (None, nothing)
    ]
    ends = end_tokens(config)
    if config.min_new_tokens and ends:
        processors.insert(
            0,
            transformers.MinNewTokensLengthLogitsProcessor(
                prompt, config.min_new_tokens, ends, device=device
            ),
        )
    return processors


def end_tokens(config: Any) -> list[int]:
    """Ids that end a sequence."""
    ends = config.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in ends] if isinstance(ends, Sequence) else [int(ends)]


def choose_token(
    logits: Tensor,
    ids: Tensor,
    processors: Sequence[Processor],
    sample: bool,
    generator: torch.Generator | None,
) -> Tensor:
    """The next token [B] for logits [B, V] float32 and ids [B, S] so far."""
    for process in processors:
        logits = process(ids, logits)
    if not sample:
        if logits.device.type == "cpu":  # numpy's is the faster one there
            return torch.from_numpy(logits.numpy().argmax(-1))
        return logits.argmax(-1)
    drawn: Tensor = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    return drawn.squeeze(1)
