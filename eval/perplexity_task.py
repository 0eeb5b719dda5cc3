"""``perplexity:FILE`` as a task of a grid."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wina.eval.measurement import KINDS, EvalTask, Measurement, Metric, Trial, mean_metric
from wina.eval.perplexity import score_windows, strided_windows
from wina.texts import digest, opening, read_documents, token_stream


@KINDS.register("perplexity")
class PerplexityTask(EvalTask):
    """Perplexity of a text in windows; ``limit`` is the number of windows.

    With a stride below the window, a window begins with tokens of the one before, which are
    context and not scored again.
    """

    kind = "perplexity"

    def __init__(self, source: str = "heldout") -> None:
        self.documents = read_documents(source)

    def identity(self) -> Mapping[str, Any]:
        """A hash of the text."""
        return {"text": digest(self.documents)}

    def measure(self, trial: Trial) -> Measurement:
        """Score the windows; a document here is a window."""
        lm, settings = trial.lm, trial.settings
        stream = token_stream(self.documents, lm.tokenizer)
        begin = opening(lm.tokenizer)
        windows = strided_windows(stream, settings.window, settings.stride, begin)
        windows = windows[: settings.limit]
        logits_of = trial.comparison.logits if trial.comparison else None
        nats = score_windows(lm.model, windows, logits_of)
        total = sum(scored for _, scored in windows)
        mean = math.fsum(n * scored for n, (_, scored) in zip(nats, windows, strict=True)) / total
        stderr = mean_metric(nats, False).stderr
        return Measurement(
            metrics={
                "nats": Metric(mean, stderr, False),
                "perplexity": Metric(
                    math.exp(mean), None if stderr is None else math.exp(mean) * stderr, False
                ),
            },
            primary="perplexity",
            rows={"nats": nats},
            texts=[ids.tolist() for ids, _ in windows],
        )
