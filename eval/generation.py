"""How long a sparse model's greedy text stays the dense model's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from wina.errors import WinaError
from wina.eval.measurement import KINDS, EvalTask, Measurement, Trial, mean_metric
from wina.texts import digest, read_documents

_WORDS = 24
_LIMIT = 8


@KINDS.register("generation")
class GenerationTask(EvalTask):
    """``generation`` or ``generation:FILE``: prompts are the first words of paragraphs.

    ``same_prefix`` is the number of tokens before the first one that differs from the dense
    model's, ``equal_tokens`` the share of places that hold the same token. A text that goes
    another way is not a worse one: look at the samples. ``limit`` is the number of prompts.
    """

    kind = "generation"

    def __init__(self, source: str = "heldout") -> None:
        paragraphs = [p for text in read_documents(source) for p in text.splitlines()]
        self.prompts = [
            " ".join(words[:_WORDS]) for p in paragraphs if len(words := p.split()) >= _WORDS
        ]
        if not self.prompts:
            raise WinaError(f"generation:{source} has no paragraph of {_WORDS} words or more")

    def identity(self) -> Mapping[str, Any]:
        """A hash of the prompts."""
        return {"text": digest(self.prompts)}

    def measure(self, trial: Trial) -> Measurement:
        """Continue every prompt, and compare with the tokens of the dense model's cell."""
        lm, settings = trial.lm, trial.settings
        limit = _LIMIT if settings.limit is None else settings.limit
        samples: list[dict[str, Any]] = []
        texts = []
        for prompt in self.prompts[:limit]:
            ids = lm.tok_encode(prompt)
            tokens = _continue(lm, ids, settings.new_tokens)
            samples.append({"prompt": prompt, "text": lm.tok_decode(tokens), "tokens": tokens})
            texts.append([*ids, *tokens])
        reference = samples if trial.dense is None else trial.dense["samples"]
        if len(reference) != len(samples):
            raise WinaError("the dense cell of this task has other prompts: remove it, and repeat")
        pairs = [(a["tokens"], b["tokens"]) for a, b in zip(reference, samples, strict=True)]
        prefix = [float(same_prefix(a, b)) for a, b in pairs]
        equal = [
            sum(x == y for x, y in zip(a, b, strict=False)) / max(len(a), len(b), 1)
            for a, b in pairs
        ]
        return Measurement(
            metrics={
                "same_prefix": mean_metric(prefix, True),
                "equal_tokens": mean_metric(equal, True),
            },
            primary="same_prefix",
            rows={"same_prefix": prefix, "equal_tokens": equal},
            texts=texts,
            samples=samples,
        )


def same_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    for index, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return index
    return min(len(a), len(b))


def _continue(lm: Any, ids: Sequence[int], new_tokens: int) -> list[int]:
    batch = torch.tensor([list(ids)], device=lm.device)
    with torch.no_grad():
        output = lm.model.generate(
            batch,
            attention_mask=torch.ones_like(batch),
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=lm.tokenizer.pad_token_id,
        )
    tokens: list[int] = output[0, len(ids) :].tolist()
    return tokens
