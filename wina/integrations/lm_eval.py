"""The model ``wina`` of EleutherAI's lm-evaluation-harness: its ``hf`` model, sparsified.

lm-eval looks for no plug-ins of other packages, so a model is known to it once its module has been
imported: ``wina eval lm`` does that and hands over to lm-eval's own command line; in Python,
``import wina.integrations.lm_eval`` comes before ``lm_eval.simple_evaluate(model="wina", ...)``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

import torch
from lm_eval.api.registry import register_model
from lm_eval.models.huggingface import HFLM

from wina.api import sparsify
from wina.config import SparsityConfig
from wina.errors import ConfigError
from wina.patch import is_patched
from wina.plan import SparsityPlan
from wina.progress import progress
from wina.switches import padded_batch
from wina.texts import read_documents

# Tokens of one padded batch of texts to score. Logits take 4 bytes × vocabulary each, twice.
BATCH_TOKENS = 8192

_Request = tuple[Any, list[int], list[int]]


@register_model("wina")
class WinaLM(HFLM):  # type: ignore[misc]
    """lm-eval's ``hf`` model with sparse projections.

    The prefill protocol is counted for each sequence from its own first token, whatever it is
    padded to, so a score does not depend on the batch (beyond rounding).

    Args:
        pretrained: folder or hub id; or a loaded model, which is taken as it is (dense or patched)
            unless settings or a plan are given.
        plan: folder of a saved plan, instead of settings.
        kernels: ``"reference"`` masks and multiplies densely, which is the fastest where many
            tokens are scored at once; ``"auto"`` takes the kernels that are used to generate.
        calibration_text: file to calibrate on; the bundled text by default.
        device: ``cuda`` where there is one, by default.
        show_progress: draw progress bars on stderr.
        **options: any field of :class:`wina.SparsityConfig` (``method``, ``sparsity``,
            ``allocation``, ``selector``, ``prefill``, ``calibration_tokens``, ...); all others are
            those of lm-eval's ``hf`` model. ``prefill`` is ``"all"`` by default here: with the
            dense prefill that generation uses by default nothing that is scored would be sparse.

    Raises:
        wina.errors.WinaError: a setting, a plan or the model does not fit.
    """

    def __init__(
        self,
        pretrained: Any,
        plan: str | None = None,
        kernels: str = "reference",
        calibration_text: str | None = None,
        device: str | None = None,
        show_progress: bool = True,
        **options: Any,
    ) -> None:
        known = {field.name for field in fields(SparsityConfig)}
        settings = {name: options.pop(name) for name in list(options) if name in known}
        config = None
        if plan is None and (settings or isinstance(pretrained, str)):
            config = SparsityConfig.from_dict(_dense_has_no_sparsity({"prefill": "all"} | settings))
        elif set(settings) - {"prefill"}:
            raise ConfigError(
                f"a plan and {', '.join(settings)}= were both given: a plan brings its settings "
                "(only prefill= may be changed)"
            )
        super().__init__(
            pretrained,
            device=device or ("cuda" if torch.cuda.is_available() else "cpu"),
            **options,
        )
        self.show_progress = show_progress
        if plan is not None:
            prefill = str(settings.get("prefill", "all"))
            sparsify(self.model, SparsityPlan.load(plan), prefill=prefill, backend=kernels)
        elif config is not None and config.sparsity > 0:
            texts = None if calibration_text is None else read_documents(calibration_text)
            sparsify(
                self.model, config, tokenizer=self.tokenizer, texts=texts, backend=kernels,
                show_progress=show_progress,
            )  # fmt: skip

    def batches(self, requests: Sequence[_Request]) -> list[list[list[int]]]:
        """Indices of the requests that are scored together: batches of groups.

        A group shares one row: requests whose continuations differ in their last token only. Rows
        go from the longest to the shortest, as in ``hf``; a batch ends earlier than there where it
        would hold more than ``BATCH_TOKENS`` tokens.
        """
        groups: dict[Any, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            shared = tuple(context + continuation[:-1]) if self.logits_cache else index
            groups.setdefault(shared, []).append(index)

        def order(group: list[int]) -> tuple[int, tuple[int, ...]]:
            _, context, continuation = requests[self._row_of(requests, group)]
            tokens = tuple(context + continuation)
            return -len(tokens), tokens

        rows = sorted(groups.values(), key=order)
        size = self.batch_size
        if size == "auto":
            first = [requests[self._row_of(requests, group)] for group in rows[:1]]
            size = self._detect_batch_size(first, 0)
        batches: list[list[list[int]]] = []
        longest = 0
        for group in rows:
            if not batches or len(batches[-1]) >= size or (
                (len(batches[-1]) + 1) * longest > BATCH_TOKENS
            ):  # fmt: skip
                batches.append([])
                longest = self._row_length(requests[self._row_of(requests, group)])
            batches[-1].append(group)
        return batches

    @staticmethod
    def _row_of(requests: Sequence[_Request], group: list[int]) -> int:
        """The request of a group that is run: the one with the longest continuation."""
        return max(group, key=lambda index: len(requests[index][2]))

    def _row_length(self, request: _Request) -> int:
        """Tokens that are fed to the model: all but the last, truncated to the model's context."""
        return min(len(request[1]) + len(request[2]), int(self.max_length) + 1) - 1

    def _loglikelihood_tokens(
        self,
        requests: list[_Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        """Scores by ``hf``'s own code, batch by batch, so that each row's length is known."""
        scores: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        show = self.show_progress and not disable_tqdm
        with progress("scoring", len(requests), show) as advance:
            for batch in self.batches(requests):
                lengths = [
                    self._row_length(requests[self._row_of(requests, group)]) for group in batch
                ]
                indices = [index for group in batch for index in group]
                with self._padded(lengths, max(lengths), "right"):
                    answers = super()._loglikelihood_tokens(
                        [requests[index] for index in indices], True, len(batch)
                    )
                for index, answer in zip(indices, answers, strict=True):
                    scores[index] = answer
                advance(len(indices))
        return scores

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **generation_kwargs: Any
    ) -> Any:
        """Generation of ``hf``, from left-padded prompts whose real lengths the mask tells."""
        lengths = generation_kwargs["attention_mask"].sum(dim=1).tolist()
        with self._padded(lengths, context.shape[1], "left"):
            return super()._model_generate(context, max_length, stop, **generation_kwargs)

    @contextmanager
    def _padded(self, lengths: list[int], size: int, side: str) -> Iterator[None]:
        if not is_patched(self.model):
            yield
            return
        with padded_batch(self.model, lengths, size, side):
            yield


def _dense_has_no_sparsity(settings: dict[str, Any]) -> dict[str, Any]:
    """``method=dense`` need not be told that its sparsity is 0."""
    return {"sparsity": 0.0} | settings if settings.get("method") == "dense" else settings


def main(arguments: Sequence[str]) -> None:
    """lm-eval's own command line, which now knows the model ``wina``."""
    from lm_eval.__main__ import cli_evaluate

    sys.argv = ["wina eval lm", *arguments]
    cli_evaluate()
