"""Numbers and settings as text, the same in every format of the report."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from wina.eval.report.contents import BETTER, SAME, WORSE, Difference, Report, Task
from wina.eval.report.grid import DENSE
from wina.eval.report.significance import LEVEL

MISSING = "–"
MARKS = {BETTER: "▲", WORSE: "▼", SAME: "="}
NOTES = (
    "A difference is called better or worse only if its p, corrected by Holm's method over all "
    f"comparisons of its table, is below {LEVEL}. Everything else is no difference shown, which is "
    "not the same as no difference.",
    "Comparisons pair the documents that both runs scored: McNemar's exact test where a document "
    "is right or wrong, the paired t test for other values, and for means over tasks a z test on "
    "the paired standard errors. Perplexities are tested on the mean nats of their windows or "
    "documents, each counted alike. A metric whose documents do not average to it is not tested.",
    "Only the primary metric of a task is tested. Accuracies rise and perplexities fall with "
    "quality; differences keep the metric's own sign, arrows and colours follow quality.",
    "Tasks of the kinds generation and agreement measure a distance to the dense model, so they "
    "are not compared with it. A text that goes another way is not a worse text.",
    "The mean is over lm-eval's tasks whose primary metric is a share and higher is better; their "
    "standard errors are taken as independent. It is shown only if all of them were measured.",
    "Weights read is one less the realised sparsity: the share of projection weights, by bytes, "
    "that a sparse token read, mean over tasks. Embeddings, the language-model head and the cache "
    "are not counted.",
    "KL(dense ‖ sparse) and top-1 agreement compare next-token distributions on the task's own "
    "text; they notice damage long before an accuracy does.",
)
PACKAGES = ("wina", "lm_eval", "transformers", "torch", "datasets")


def percent(share: float | None, digits: int = 1) -> str:
    """0.1234 → 12.3, without the sign."""
    return MISSING if share is None else _minus(f"{100 * share:.{digits}f}")


def plain(value: float | None) -> str:
    """Four significant digits, no exponent where it can be helped."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return _minus(str(value))
    if value == 0:
        return "0"
    size = math.floor(math.log10(abs(value)))
    if not -4 <= size <= 6:
        return _minus(f"{value:.3g}")
    return _minus(f"{value:.{max(0, 3 - size)}f}")


def small(value: float | None) -> str:
    """Three significant digits: standard errors, KL."""
    if value is None:
        return MISSING
    return f"{value:#.3g}".rstrip(".") if 1e-4 <= abs(value) < 1000 else f"{value:.2g}"


def score(value: float | None, task: Task) -> str:
    """A value of a task: shares times 100."""
    return percent(value) if task.percent else plain(value)


def signed(value: float | None, task: Task | None = None) -> str:
    """A difference with its sign; without a task it is one of shares."""
    if value is None:
        return MISSING
    text = percent(value) if task is None or task.percent else plain(value)
    return text if text.startswith("−") or not value > 0 else f"+{text}"


def margin(stderr: float | None, task: Task) -> str:
    """± standard error of a task's score, or nothing."""
    if task.percent or stderr is None:
        return percent_margin(stderr)
    return f"±{small(stderr)}"


def percent_margin(stderr: float | None) -> str:
    """± standard error of a share times 100, or nothing."""
    return "" if stderr is None else f"±{percent(stderr)}"


def mark(difference: Difference | None) -> str:
    """▲ better, ▼ worse, = no difference shown, nothing if not tested."""
    return "" if difference is None else MARKS.get(difference.verdict, "")


def difference(found: Difference | None, task: Task | None = None) -> str:
    """Difference ± standard error and its mark, in one line; without a task it is of shares."""
    if found is None:
        return MISSING
    error = percent_margin(found.stderr) if task is None else margin(found.stderr, task)
    return " ".join(part for part in (signed(found.value, task), error, mark(found)) if part)


def times(ratio: float | None) -> str:
    """A speed-up."""
    return MISSING if ratio is None else f"{ratio:.2f}×"


def given(value: Any) -> str:
    """A setting, or that it is not known."""
    return MISSING if value is None else str(value)


def ending(text: str, most: int = 400) -> str:
    """The end of a long prompt, where the question stands."""
    return text if len(text) <= most else f"… {text[-most:]}"


def p_value(value: float | None) -> str:
    """A probability."""
    if value is None:
        return MISSING
    return "<0.001" if value < 0.001 else f"{value:.3f}"


def setting(method: str, sparsity: float) -> str:
    """Method and sparsity: ``wina 50%``."""
    return method if method == DENSE else f"{method} {share(sparsity)}"


def share(value: float) -> str:
    """0.5 → 50%."""
    return f"{100 * value:g}%"


def model_name(header: Mapping[str, Any]) -> str:
    """The model's name, or ``unnamed model``."""
    model = header.get("model")
    name = model.get("name") if isinstance(model, Mapping) else model
    return str(name or "unnamed model")


def count(number: Any) -> str:
    """Parameters: 134515008 → 134.5M."""
    if not isinstance(number, (int, float)):
        return ""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.4g}{unit}"
    return str(number)


def protocol(header: Mapping[str, Any]) -> str:
    """Which tokens of a prompt were sparse."""
    name = str(header.get("protocol") or "not stated")
    kind, _, number = name.partition(":")
    if kind == "last" and _is_number(number):
        return f"last {share(float(number))} of the tokens sparse (protocol {name})"
    known = {
        "all": "all tokens sparse (protocol all)",
        "dense": "prompt tokens dense (protocol dense)",
    }
    return known.get(name, f"protocol {name}")


def documents(header: Mapping[str, Any]) -> str:
    """How much of each task was scored."""
    limit = header.get("limit")
    general = "all documents" if limit is None else f"first {limit} documents of each task"
    own = any("@" in str(task) for task in header.get("tasks") or ())
    return f"first N documents of a task@N, else {general}" if own else general


def conditions(report: Report) -> list[str]:
    """What every number depends on: the caption of each table, without the command."""
    header = report.header
    shots = header.get("num_fewshot")
    versions = header.get("versions") or {}
    found = [
        model_name(header),
        protocol(header),
        documents(header),
        "the tasks' own few-shot setting" if shots is None else f"{shots}-shot",
        ", ".join(f"{name} {versions[name]}" for name in PACKAGES if versions.get(name)),
    ]
    return [words for words in found if words]


def details(header: Mapping[str, Any]) -> list[tuple[str, str]]:
    """All that grid.json says, as (name, text)."""
    model = header.get("model")
    found = dict(model) if isinstance(model, Mapping) else {}
    found = {f"model {name}": value for name, value in found.items() if value is not None}
    if "model parameters" in found:
        found["model parameters"] = count(found["model parameters"])
    found |= {name: header[name] for name in header if name not in ("model", "format", "version")}
    return [(name.replace("_", " "), _listed(value)) for name, value in found.items()]


def _listed(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_listed(v)}" for name, v in value.items() if v is not None)
    if isinstance(value, list):
        return ", ".join(_listed(v) for v in value)
    return "none" if value is None else str(value)


def state(report: Report) -> str:
    """Complete, or how much is there."""
    kind = "complete" if report.complete else "incomplete"
    return f"{kind}: {report.measured} of {report.asked} cells"


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _minus(text: str) -> str:
    return (
        text.replace("-", "−")
        if float(text) or not math.isfinite(float(text))
        else text.lstrip("-")
    )
