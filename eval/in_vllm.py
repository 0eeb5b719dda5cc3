"""A saved sparse model through lm-eval's own model ``vllm``, beside our harness."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wina.errors import WinaError
from wina.eval.harness import HarnessTask, evaluate, read_metrics
from wina.eval.measurement import EvalTask, Settings
from wina.plan_file import JSON_FILE
from wina.saving import PLAN_FOLDER, QUANT_METHOD


def vllm_model(folder: Path, max_length: int, batch: int, **engine: Any) -> Any:
    """lm-eval's model ``vllm`` on a folder, in this process, with prompts masked.

    Args:
        folder: of a saved sparse model.
        max_length: context in tokens.
        batch: sequences in a step of the engine.
        **engine: arguments of ``vllm.LLM``.

    Raises:
        WinaError: vLLM is not installed here.
    """
    # One process, so that what it masks can be counted.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
    try:
        import vllm  # noqa: F401
    except ImportError:
        raise WinaError(
            "this needs vLLM, lm-eval and wina in one environment, as `make .venv-vllm/.installed` "
            "makes one"
        ) from None
    from lm_eval.api.registry import get_model

    # Log-likelihoods are prefill, which the plug-in leaves dense unless it is told not to.
    masked = {"quantization_config": {"quant_method": QUANT_METHOD, "prefill": "all"}}
    engine = {"dtype": "float32", "enforce_eager": True, "hf_overrides": masked, **engine}
    return get_model("vllm")(
        pretrained=str(folder), max_model_len=max_length, max_num_seqs=batch, **engine
    )


def beside_vllm(
    folder: Path, tasks: Mapping[str, EvalTask], settings: Settings, batch: int, max_length: int
) -> list[dict[str, Any]]:
    """Evaluate a saved sparse model by us and in vLLM, both in float32 with all prompts masked.

    Args:
        folder: of a saved sparse model, with its tokenizer.
        tasks: of lm-eval only, those that score continuations.
        settings: of the tasks.
        batch: sequences scored at once.
        max_length: context in tokens.

    Returns:
        A row for every metric of a task: {task, metric, wina, vllm, stderr, difference, within,
        documents, realised, median_dlogp, rounding_dlogp}. ``stderr`` is that of ours, ``within``
        says whether the difference is at most that; ``realised`` is the share of channels that vLLM
        dropped, and ``median_dlogp`` the median difference of the continuations' log-probabilities.
        ``rounding_dlogp`` is what the last one is between ours and ours with every embedding moved
        to the next float32: what rounding alone does, without vLLM.
    """
    from wina.integrations.lm_eval import WinaLM
    from wina.integrations.vllm.step import STEP, DecodedChannels

    if not (folder / PLAN_FOLDER / JSON_FILE).is_file():
        raise WinaError(f"{folder} holds no plan: name a folder that `wina export` has written")
    for name, task in tasks.items():
        if not isinstance(task, HarnessTask):
            raise WinaError(f"{name} is no task of lm-eval: there is nothing to compare with")
    engine = vllm_model(folder, max_length, batch)
    ours = WinaLM(
        _dense(folder), plan=str(folder / PLAN_FOLDER), tokenizer=str(folder), batch_size=batch,
        max_length=max_length, show_progress=False,
    )  # fmt: skip
    rows = []
    for name, task in tasks.items():
        assert isinstance(task, HarnessTask)
        own = evaluate(ours, task.registered, task.manager, settings)
        STEP.observer = counter = DecodedChannels()
        theirs = evaluate(engine, task.registered, task.manager, settings)
        STEP.observer = None
        with _rounded_up(ours.model.get_input_embeddings().weight):
            rounded = evaluate(ours, task.registered, task.manager, settings)
        scores, distances = _scores(own), []
        for others in (theirs, rounded):
            pairs = zip(scores, _scores(others), strict=True)
            distances.append(median(abs(a - b) for a, b in pairs))
        metrics = [read_metrics(results, task.registered) for results in (own, theirs)]
        for metric, found in metrics[0].items():
            other = metrics[1][metric].value
            rows.append({
                "task": name, "metric": metric, "wina": found.value, "vllm": other,
                "stderr": found.stderr, "difference": other - found.value,
                "within": abs(other - found.value) <= (found.stderr or 0.0),
                "documents": sum(map(len, own["samples"].values())),
                "realised": counter.realised,
                "median_dlogp": distances[0], "rounding_dlogp": distances[1],
            })  # fmt: skip
    return rows


def _dense(folder: Path) -> Any:
    from wina.cli_options import load_model

    return load_model(str(folder), "float32")[0]


@contextmanager
def _rounded_up(weight: Tensor) -> Iterator[None]:
    """Every value is the next larger one of its dtype meanwhile."""
    before = weight.detach().clone()
    with torch.no_grad():
        weight.copy_(before.nextafter(torch.full_like(before, torch.inf)))
        try:
            yield
        finally:
            weight.copy_(before)


def _scores(results: Mapping[str, Any]) -> list[float]:
    """Log-probabilities of all continuations, in the order of the documents."""
    samples = [s for name in sorted(results["samples"]) for s in results["samples"][name]]
    answers = [answer for sample in samples for answer in sample["filtered_resps"]]
    if not all(isinstance(answer, tuple | list) for answer in answers):
        raise WinaError("only tasks that score continuations can be compared")
    return [float(answer[0]) for answer in answers]


def print_beside(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """A table for people, then the JSON line."""
    table = Table(title=title)
    for column in (
        "task",
        "metric",
        "wina",
        "vLLM",
        "s.e.",
        "within",
        "masked",
        "median |Δ log p|",
        "of rounding",
    ):
        table.add_column(column, no_wrap=True)
    for row in rows:
        table.add_row(
            row["task"], row["metric"], f"{row['wina']:.4f}", f"{row['vllm']:.4f}",
            f"{row['stderr'] or 0:.4f}", "yes" if row["within"] else "NO",
            f"{row['realised']:.3f}", f"{row['median_dlogp']:.1e}",
            f"{row['rounding_dlogp']:.1e}",
        )  # fmt: skip
    Console(width=120).print(table)
    print(json.dumps({"rows": list(rows), "within": all(row["within"] for row in rows)}))
