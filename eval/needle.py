"""Long-context retrieval: a number stated somewhere in a long text, asked for at its end."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from typing import Any

from wina.errors import ConfigError
from wina.eval.measurement import KINDS, EvalTask, Measurement, Settings, Trial, mean_metric
from wina.texts import bundled

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
CITIES = (
    "Lisbon", "Oslo", "Nairobi", "Lima", "Hanoi", "Quebec", "Tunis", "Dublin", "Seoul", "Cairo",
)  # fmt: skip
_ROUNDS = 4


@KINDS.register("needle")
class NeedleTask(EvalTask):
    """``needle:LENGTH``: texts of LENGTH tokens, the needle at five depths of each.

    The sentence "The secret number of CITY is N." stands among sentences of the bundled held-out
    text (repeated where it is too short), which ends in "The secret number of CITY is". ``found``
    is the share of numbers that the model would generate greedily, ``nats`` the negative
    log-likelihood of the number, which tells more where nothing or everything is found.
    ``limit`` is the number of texts.
    """

    kind = "needle"

    def __init__(self, length: str = "1024") -> None:
        if not length.isdigit() or int(length) < 64:
            raise ConfigError(
                f"needle:{length}: write the length in tokens, at least 64, as in needle:1024"
            )
        self.length = int(length)

    def identity(self) -> Mapping[str, Any]:
        """The length and the depths."""
        return {"length": self.length, "depths": list(DEPTHS)}

    def measure(self, trial: Trial) -> Measurement:
        """Score the numbers with the texts as prompts."""
        lm, settings = trial.lm, trial.settings
        if self.length > lm.max_length:
            raise ConfigError(
                f"needle:{self.length} is longer than the {lm.max_length} tokens that this run "
                "lets the model read (--max-length)"
            )
        requests = []
        for _, prompt, answer in self.texts(lm, settings):
            requests.append(((prompt, answer), *lm._encode_pair(prompt, answer)))
        scores = lm._loglikelihood_tokens(requests, disable_tqdm=True)
        found = [float(greedy) for _, greedy in scores]
        nats = [-score for score, _ in scores]
        return Measurement(
            metrics={"found": mean_metric(found, True), "nats": mean_metric(nats, False)},
            primary="found",
            rows={"found": found, "nats": nats},
            texts=[[*context, *answer] for _, context, answer in requests],
        )

    def texts(self, lm: Any, settings: Settings) -> Iterator[tuple[float, str, str]]:
        """(depth, prompt, answer), the same for the same seed; every depth before the next text."""
        sentences = [
            f"{sentence}."
            for document in bundled("heldout")
            for sentence in document.replace("\n", " ").split(". ")
        ]
        generator = random.Random(settings.seed)
        count = len(DEPTHS) * _ROUNDS if settings.limit is None else settings.limit
        for index in range(count):
            depth = DEPTHS[index % len(DEPTHS)]
            city = CITIES[index % len(CITIES)]
            answer = f" {generator.randrange(10000, 100000)}"
            needle = f"The secret number of {city} is{answer}."
            question = f"The secret number of {city} is"
            room = self.length - len(lm.tok_encode(f"{needle} {question}{answer}"))
            hay = self._hay(lm, sentences, generator.randrange(len(sentences)), room)
            hay.insert(round(depth * len(hay)), needle)
            yield depth, " ".join([*hay, question]), answer

    @staticmethod
    def _hay(lm: Any, sentences: list[str], start: int, room: int) -> list[str]:
        hay: list[str] = []
        while True:
            sentence = sentences[(start + len(hay)) % len(sentences)]
            room -= len(lm.tok_encode(f" {sentence}"))
            if room < 0:
                return hay
            hay.append(sentence)
