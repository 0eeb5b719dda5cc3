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
# Fields that no text depends on here: how long it is and why it ends is the loop's, and the rest is
# of other ways of decoding, or of what `generate` returns.
_OTHERS = frozenset(
    (
        *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "max_time"),
        *("stop_strings", "do_sample"),
        *("eos_token_id", "pad_token_id", "bos_token_id", "decoder_start_token_id"),
        *("early_stopping", "length_penalty", "num_beam_groups", "diversity_penalty"),
        *("use_cache", "cache_implementation", "cache_config", "max_cache_len"),
        *("prefill_chunk_size", "low_memory", "compile_config", "disable_compile"),
        *("continuous_batching_config", "renormalize_logits", "return_dict_in_generate"),
        *("output_attentions", "output_hidden_states", "output_scores", "output_logits"),
        *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule"),
        *("assistant_confidence_threshold", "assistant_early_exit", "assistant_lookbehind"),
        *("target_lookbehind", "assistant_ensemble_weight", "max_matching_ngram_size"),
        *("speculation_type", "generation_kwargs", "transformers_version"),
    )
)

Processor = Callable[[Tensor, Tensor], Tensor]


def processors_for(config: Any, prompt: int, device: torch.device) -> list[Processor]:
    """What transforms logits [B, V], given the ids so far, as a GenerationConfig asks.

    Args:
        config: a ``transformers.GenerationConfig``.
        prompt: tokens of the prompt.
        device: of the logits.

    Raises:
        ConfigError: it asks for another way of decoding, such as beams, or for what makes no sense.
    """
    import transformers

    known = {field for field, *_ in (*_ALWAYS, *_SAMPLING)} | _OTHERS
    usual = defaults()
    for field, value in vars(config).items():
        if field in known or field.startswith("_") or value in (None, [], usual.get(field)):
            continue
        raise ConfigError(f"wina.decode does not know {field}={value!r}: use model.generate for it")
    fields = (*_ALWAYS, *(_SAMPLING if config.do_sample else ()))
    ends = end_tokens(config)
    try:
        processors: list[Processor] = [
            getattr(transformers, name)(*after, least, ends, device=device)
            for field, name, after in (
                ("min_length", "MinLengthLogitsProcessor", ()),
                ("min_new_tokens", "MinNewTokensLengthLogitsProcessor", (prompt,)),
            )
            if ends and (least := getattr(config, field, None))
        ]
        processors += [
            getattr(transformers, name)(value)
            for field, name, nothing in fields
            if (value := getattr(config, field, None)) not in (None, nothing)
        ]
    except ValueError as error:  # a value that makes no sense
        raise ConfigError(str(error)) from None
    return processors


def defaults() -> dict[str, Any]:
    """Field of a GenerationConfig → what ``generate`` takes where nobody says anything."""
    from transformers import GenerationConfig

    # Since 5.2 or so a new config is empty, and generate fills it in.
    filled = getattr(GenerationConfig, "_get_default_generation_params", dict)
    return {**vars(GenerationConfig()), **filled()}


def end_tokens(config: Any) -> list[int]:
    """Ids that end a sequence."""
    ends = config.eos_token_id
    if ends is None:
        return []
    return [int(end) for end in torch.as_tensor(ends).flatten().tolist()]


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
