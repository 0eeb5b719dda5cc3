"""The dense model through our harness against plain lm-eval: every number must be the same."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from wina.errors import WinaError
from wina.eval.harness import BOOTSTRAP, HarnessTask, evaluate, quiet, read_metrics
from wina.eval.measurement import EvalTask, Settings


def verify(
    model: Any, tokenizer: Any, tasks: Mapping[str, EvalTask], settings: Settings, **options: Any
) -> list[dict[str, Any]]:
    """Evaluate by ``lm_eval.simple_evaluate`` on ``hf``, and by us, both dense.

    Args:
        model: a dense model.
        tokenizer: the model's.
        tasks: of lm-eval only.
        settings: of the tasks.
        **options: of both models, such as ``batch_size``.

    Returns:
        Rows of {task, metric, hf, wina, equal}, a row for every metric and standard error.
    """
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    from wina.integrations.lm_eval import WinaLM

    plain = HFLM(model, tokenizer=tokenizer, **options)
    ours = WinaLM(model, tokenizer=tokenizer, show_progress=False, **options)
    rows = []
    for name, task in tasks.items():
        if not isinstance(task, HarnessTask):
            raise WinaError(f"{name} is no task of lm-eval: there is nothing to compare with")
        with quiet():
            stock = lm_eval.simple_evaluate(
                plain, tasks=[task.registered], task_manager=task.manager, limit=settings.limit,
                num_fewshot=settings.num_fewshot, fewshot_random_seed=settings.seed,
                bootstrap_iters=BOOTSTRAP,
            )  # fmt: skip
        found = [
            read_metrics(results, task.registered)
            for results in (stock, evaluate(ours, task.registered, task.manager, settings))
        ]
        for metric, want in found[0].items():
            got = found[1][metric]
            rows += [
                {"task": name, "metric": f"{metric}{suffix}", "hf": a, "wina": b, "equal": a == b}
                for suffix, a, b in (
                    ("", want.value, got.value),
                    (" s.e.", want.stderr, got.stderr),
                )
                if a is not None
            ]
    return rows


def print_verification(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for people, then the JSON line."""
    table = Table(title=title)
    for column in ("task", "metric", "lm-eval hf", "wina, dense", "equal"):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            row["task"], row["metric"], repr(row["hf"]), repr(row["wina"]),
            "yes" if row["equal"] else "NO",
        )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"rows": list(rows), "equal": all(row["equal"] for row in rows)}))
