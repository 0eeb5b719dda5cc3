"""The model ``wina`` of lm-eval."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_for
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from torch import nn

import wina
from wina.errors import WinaError
from wina.eval.in_vllm import beside_vllm
from wina.eval.measurement import EvalTask, Settings
from wina.eval.perplexity_task import PerplexityTask
from wina.integrations import lm_eval as integration
from wina.integrations.lm_eval import WinaLM
from wina.linear import SparseLinear
from wina.patch import is_patched, patch_of
from wina.testing import tiny_model, tiny_tokenizer

CONTEXTS = ("a b c", "The quick brown fox jumps over", "x", "One more context, longer than others")
# The last two differ in their last token only: lm-eval scores them with one row.
CONTINUATIONS = (" is", " a longer end of it", " y", " z")
TEXTS = ("A text of some length.", "Short.", "And another text, the longest of the three texts.")


def scored() -> list[Instance]:
    pairs = [(context, end) for context in CONTEXTS for end in CONTINUATIONS]
    return [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]


def rolling() -> list[Instance]:
    return [Instance("loglikelihood_rolling", {}, (t,), i) for i, t in enumerate(TEXTS)]


def prompts() -> list[Instance]:
    arguments = {"until": ["\n\n"], "max_gen_toks": 8}
    return [Instance("generate_until", {}, (t, arguments), i) for i, t in enumerate(CONTEXTS)]


def lm(model: nn.Module, batch_size: int = 1, **options: Any) -> WinaLM:
    options = {"max_length": 256, "show_progress": False, **options}
    return WinaLM(model, tokenizer=tiny_tokenizer(), batch_size=batch_size, **options)


@pytest.fixture(scope="module")
def exact() -> nn.Module:
    return tiny_model("llama", torch.float64)


@pytest.mark.parametrize("spec", ["all", "last:0.99", "last:0.5"])
def test_no_score_and_no_text_depends_on_the_batch(exact: nn.Module, spec: str) -> None:
    wina.sparsify(exact, plan_for(exact), prefill=spec, backend="reference")
    try:
        alone, together = lm(exact, 1), lm(exact, 5)
        for requests, name in ((scored(), "loglikelihood"), (rolling(), "loglikelihood_rolling")):
            want = torch.tensor([getattr(alone, name)(requests)], dtype=torch.float64)
            got = torch.tensor([getattr(together, name)(requests)], dtype=torch.float64)
            torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
        assert together.generate_until(prompts()) == alone.generate_until(prompts())
    finally:
        wina.restore(exact)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_dense_scores_are_those_of_hf_to_the_bit(llama: nn.Module, batch_size: int) -> None:
    plain = HFLM(llama, tokenizer=tiny_tokenizer(), batch_size=batch_size, max_length=256)
    want = plain.loglikelihood(scored(), disable_tqdm=True)
    long = [("", list(range(1, 200)), list(range(3, 120)))]  # longer than the context
    cut = plain._loglikelihood_tokens(long, disable_tqdm=True)
    texts = plain.generate_until(prompts(), disable_tqdm=True)
    ours = lm(llama, batch_size)
    assert ours.loglikelihood(scored()) == want
    assert ours._loglikelihood_tokens(long) == cut
    assert ours.generate_until(prompts()) == texts
    wina.sparsify(llama, plan_for(llama, sparsity=0.0), prefill="all", backend="reference")
    assert ours.loglikelihood(scored()) == want
    wina.restore(llama)
    wina.sparsify(llama, plan_for(llama), prefill="all", backend="reference")
    assert ours.loglikelihood(scored()) != want


def test_batches_share_rows_and_keep_to_the_token_budget(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = lm(llama, 4)
    requests = [("", [1] * n, [2, last]) for n in (5, 30, 9, 30) for last in (3, 4)]
    batches = ours.batches(requests)
    assert [[sorted(group) for group in batch] for batch in batches] == [
        [[2, 3, 6, 7], [4, 5], [0, 1]]
    ]
    monkeypatch.setattr(integration, "BATCH_TOKENS", 62)
    assert [len(batch) for batch in ours.batches(requests)] == [2, 1]
    monkeypatch.setattr(integration, "BATCH_TOKENS", 1)
    assert [len(batch) for batch in ours.batches(requests)] == [1, 1, 1]
    assert sorted(i for b in ours.batches(requests) for g in b for i in g) == list(range(8))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model")
    tiny_model("llama").save_pretrained(path)  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def from_arguments(arguments: str) -> WinaLM:
    made: WinaLM = get_model("wina").create_from_arg_string(
        f"{arguments},show_progress=False", {"batch_size": 2, "device": "cpu"}
    )
    return made


def test_model_args_take_every_setting(folder: str) -> None:
    made = from_arguments(
        f"pretrained={folder},method=teal,sparsity=0.4,prefill=last:0.5,selector=relative,"
        "mask=group,calibration_tokens=1024,window=128,dtype=float32"
    )
    config = patch_of(made.model).plan.config
    assert (config.method, config.sparsity, config.prefill) == ("teal", 0.4, "last:0.5")
    assert (config.selector, config.mask, config.calibration_tokens) == ("relative", "group", 1024)
    layer = next(m for m in made.model.modules() if isinstance(m, SparseLinear))
    assert layer.choice.backend.name == "reference"
    assert made.loglikelihood(scored())


def test_plans_texts_and_the_dense_model(folder: str, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("Some words to calibrate on. " * 80, encoding="utf-8")
    given = from_arguments(
        f"pretrained={folder},calibration_text={text},calibration_tokens=1024,window=128"
    )
    plan = patch_of(given.model).plan
    assert plan.calibration["text"] == "given by the user"
    plan.save(tmp_path / "plan")
    loaded = from_arguments(f"pretrained={folder},plan={tmp_path / 'plan'},kernels=auto")
    assert patch_of(loaded.model).control.prefill.share == 1.0
    assert not is_patched(from_arguments(f"pretrained={folder},method=dense").model)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=winna", "Did you mean 'wina'"),
        ("prefill=first:0.5", "Known: dense, all, last"),
        ("plan=/nowhere,sparsity=0.5", "a plan brings its settings"),
        ("plan=/nowhere", "no plan folder"),
    ],
)
def test_wrong_arguments_say_what_to_do(folder: str, arguments: str, message: str) -> None:
    with pytest.raises(WinaError, match=message):
        from_arguments(f"pretrained={folder},{arguments}")


def test_a_loaded_model_is_taken_as_it_is(llama: nn.Module) -> None:
    assert not is_patched(lm(llama).model)
    lm(llama, method="teal", calibration_tokens=1024, window=128)
    assert patch_of(llama).plan.config.method == "teal"
    assert lm(llama).loglikelihood(scored())


def test_vllm_is_asked_for_only_with_what_it_needs(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def compare(tasks: Mapping[str, EvalTask]) -> None:
        beside_vllm(tmp_path, tasks, Settings(), 1, 64)

    with pytest.raises(WinaError, match="wina export"):
        compare({})
    wina.sparsify(llama, plan_for(llama))
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    with pytest.raises(WinaError, match="perplexity is no task of lm-eval"):
        compare({"perplexity": PerplexityTask()})
    monkeypatch.setitem(sys.modules, "vllm", None)  # as where it is not installed
    with pytest.raises(WinaError, match=r"make \.venv-vllm/\.installed"):
        compare({})
