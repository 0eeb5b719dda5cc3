"""Tasks of lm-eval as tasks of a grid."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from wina.errors import WinaError
from wina.eval.local_tasks import LocalTask, check_files
from wina.eval.measurement import EvalTask, Measurement, Metric, Settings, Trial

# Resamples for the standard error of metrics that are no means (perplexities). lm-eval's default,
# 100000, takes longer than the evaluation of a small model.
BOOTSTRAP = 1000
_SAMPLES = 3


class HarnessTask(EvalTask):
    """A task or group of lm-eval, by its own name or on local files.

    Args:
        name: what the user calls it.
        manager: lm-eval's ``TaskManager``, which knows the written local definitions.
        local: its row of the table of local tasks, or None.
        data: folder of the local files.
    """

    kind = "lm_eval"

    def __init__(
        self, name: str, manager: Any, local: LocalTask | None = None, data: Path | None = None
    ) -> None:
        self.name = name
        self.manager = manager
        self.local = local
        self.registered = local.registered if local else name
        self.files = check_files(local, data) if local and data else {}
        if self.registered not in manager.all_tasks:
            raise WinaError(
                f"unknown task {name!r}. `wina eval lm ls tasks` lists lm-eval's own; those that "
                "can be read from local files with --data are in eval/tasks/local.yaml; others: "
                "perplexity, needle, generation."
            )

    def identity(self) -> Mapping[str, Any]:
        """Hashes of the local files; empty for data sets that lm-eval fetches."""
        return {"files": self.files}

    def measure(self, trial: Trial) -> Measurement:
        """Run lm-eval on the model."""
        lm, settings = trial.lm, trial.settings
        results = evaluate(lm, self.registered, self.manager, settings)
        samples = [
            sample for name in sorted(results["samples"]) for sample in results["samples"][name]
        ]
        metrics = read_metrics(results, self.registered)
        primary = self._primary(metrics)
        first = [s for s in samples if s["filter"] == samples[0]["filter"]]
        return Measurement(
            metrics=metrics,
            primary=primary,
            rows=read_rows(samples, metrics),
            texts=[encode(lm, *_text_of(sample)) for sample in first],
            samples=[
                {"prompt": sample["arguments"][0][0], "text": sample["resps"][0][0]}
                for sample in first[:_SAMPLES]
                if isinstance(sample["resps"][0][0], str)
            ],
        )

    def _primary(self, metrics: Mapping[str, Metric]) -> str:
        wanted = [self.local.primary] if self.local else []
        for name in (*wanted, "acc_norm", "acc", *metrics):
            if name in metrics:
                return name
        raise WinaError(f"lm-eval gave no metric for task {self.name!r}")


def evaluate(lm: Any, task: str, manager: Any, settings: Settings) -> dict[str, Any]:
    """lm-eval's results of one task or group, with its samples; always the same for one seed.

    What ``lm_eval.simple_evaluate`` does, less its report on the machine, which lists all installed
    packages and takes longer than a small task.
    """
    import lm_eval

    os.environ["DISABLE_MULTIPROC"] = "1"  # the bootstrap would start a process for each core
    with quiet():
        loaded = manager.load([task])
        for part in loaded["tasks"].values():
            own = part.get_config("num_fewshot")
            if own != 0 and settings.num_fewshot is not None:
                part.set_config(key="num_fewshot", value=settings.num_fewshot)
            elif own is None:
                part.set_config(key="num_fewshot", value=0)
            part.set_fewshot_seed(seed=settings.seed)
        random.seed(settings.seed)
        np.random.seed(settings.seed)  # tasks draw from the global generators
        torch.manual_seed(settings.seed)
        results: dict[str, Any] | None = lm_eval.evaluate(
            lm=lm,
            task_dict=loaded,
            limit=settings.limit,
            bootstrap_iters=BOOTSTRAP,
            log_samples=True,
            fewshot_as_multiturn=True,
        )
    assert results is not None
    return results


@contextmanager
def quiet() -> Iterator[None]:
    """Drop what lm-eval prints: a bar for every step of every task. What goes wrong is raised."""
    noise = StringIO()
    with redirect_stdout(noise), redirect_stderr(noise):
        yield


def read_metrics(results: Mapping[str, Any], task: str) -> dict[str, Metric]:
    """Metrics of a task or group: ``"acc"``, or ``"exact_match,strict-match"`` with a filter."""
    values = results["results"][task]
    directions = results["higher_is_better"].get(task, {})
    metrics = {}
    for key, value in values.items():
        name, _, filtered = key.partition(",")
        if not filtered or name.endswith("_stderr") or not isinstance(value, int | float):
            continue
        stderr = values.get(f"{name}_stderr,{filtered}")
        metrics[_metric_name(name, filtered)] = Metric(
            float(value),
            float(stderr) if isinstance(stderr, int | float) else None,
            directions.get(name) is not False,
        )
    return metrics


def read_rows(
    samples: Sequence[Mapping[str, Any]], metrics: Mapping[str, Metric]
) -> dict[str, list[float]]:
    """Metric → value of every document. A (sum, weight) pair of lm-eval becomes its quotient."""
    rows: dict[str, list[float]] = {}
    for sample in samples:
        for name in sample["metrics"]:
            key = _metric_name(name, sample["filter"])
            value = sample[name]
            if isinstance(value, tuple | list) and len(value) == 2:
                value = value[0] / value[1]
            if key in metrics and isinstance(value, int | float):
                rows.setdefault(key, []).append(float(value))
    return rows


def _metric_name(name: str, filtered: str) -> str:
    return name if filtered == "none" else f"{name},{filtered}"


def _text_of(sample: Mapping[str, Any]) -> tuple[str, str]:
    """(prompt, continuation) of a document: with the right answer where it is a choice."""
    arguments, target = sample["arguments"], sample["target"]
    choice = target if isinstance(target, int) and 0 <= target < len(arguments) else 0
    request = arguments[choice]
    if len(request) == 1:  # a text scored as a whole
        return "", request[0]
    if isinstance(request[1], str):
        return request[0], request[1]
    return request[0], f" {target}" if isinstance(target, str) else ""


def encode(lm: Any, prompt: str, continuation: str) -> list[int]:
    """Token ids as lm-eval would score them, at most a context of the model."""
    if not prompt:
        ids = [lm.prefix_token_id, *lm.tok_encode(continuation)]
    elif continuation:
        context, rest = lm._encode_pair(prompt, continuation)
        ids = [*context, *rest]
    else:
        ids = lm.tok_encode(prompt)
    return [int(token) for token in ids[: lm.max_length]]
