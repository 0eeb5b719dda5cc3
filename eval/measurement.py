"""What a task of a grid is, and what measuring it gives."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from wina.eval.agreement import Comparison
from wina.registry import Registry


@dataclass(frozen=True)
class Metric:
    """A number of a task, with its standard error over documents where there is one."""

    value: float
    stderr: float | None
    higher_is_better: bool


@dataclass(frozen=True)
class Measurement:
    """A task, measured on one model.

    Attributes:
        metrics: by name.
        primary: the metric that a table shows.
        rows: metric → value of every document, in the order of the documents.
        texts: token ids that the task feeds to the model, one list a document: what the sparse
            model's predictions are compared with the dense model's on.
        samples: prompts and generated texts, for people.
    """

    metrics: Mapping[str, Metric]
    primary: str
    rows: Mapping[str, Sequence[float]]
    texts: Sequence[Sequence[int]] = ()
    samples: Sequence[Mapping[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Settings:
    """What a grid asks of every task.

    Attributes:
        limit: documents of a task (of each subject of a group), None for all.
        num_fewshot: examples in a prompt of lm-eval's tasks, None for the task's own number.
        window: tokens in a window of ``perplexity``.
        stride: new tokens in each window of ``perplexity``.
        new_tokens: tokens that ``generation`` generates.
        seed: of everything random; the default is lm-eval's, for its few-shot examples.
    """

    limit: int | None = None
    num_fewshot: int | None = None
    window: int = 512
    stride: int = 512
    new_tokens: int = 48
    seed: int = 1234


@dataclass(frozen=True)
class Trial:
    """A model that a task measures, and how.

    Attributes:
        lm: a :class:`wina.integrations.lm_eval.WinaLM`, its model dense or patched.
        settings: of the grid.
        dense: the saved cell of the dense model for this task; None for the dense model.
        comparison: of a sparse model with the dense one. A task that runs the model on its texts as
            they stand may run them through it, which spares a second pass; a task that does not is
            compared afterwards, on the texts of its measurement.
    """

    lm: Any
    settings: Settings = field(default_factory=Settings)
    dense: Mapping[str, Any] | None = None
    comparison: Comparison | None = None


class EvalTask(ABC):
    """Something to measure on a dense or sparsified model.

    A kind is registered under the word before the colon of a task's name: ``perplexity:FILE`` is
    made as ``Perplexity("FILE")``. Names of no kind are lm-eval's tasks.

    Attributes:
        kind: for readers of the cell.
    """

    kind: str

    @abstractmethod
    def identity(self) -> Mapping[str, Any]:
        """What else the result depends on, JSON-ready, such as hashes of the files read."""

    @abstractmethod
    def measure(self, trial: Trial) -> Measurement:
        """Measure a model as the trial says."""


class Limited(EvalTask):
    """A task with a limit of its own: ``boolq@50``."""

    def __init__(self, task: EvalTask, limit: int) -> None:
        self.task = task
        self.limit = limit
        self.kind = task.kind

    def identity(self) -> Mapping[str, Any]:
        """The task's, and the limit."""
        return {**self.task.identity(), "limit": self.limit}

    def measure(self, trial: Trial) -> Measurement:
        """Measure the task on so many documents."""
        settings = replace(trial.settings, limit=self.limit)
        return self.task.measure(replace(trial, settings=settings))


KINDS: Registry[type[EvalTask]] = Registry("kind of task")


def mean_metric(values: Sequence[float], higher_is_better: bool) -> Metric:
    """Mean over documents, and its standard error from their sample variance."""
    count = len(values)
    mean = math.fsum(values) / count
    if count < 2:
        return Metric(mean, None, higher_is_better)
    variance = math.fsum((value - mean) ** 2 for value in values) / (count - 1)
    return Metric(mean, math.sqrt(variance / count), higher_is_better)
