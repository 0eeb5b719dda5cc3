"""Perplexity in strides, agreement with dense, needles, generation, texts from files."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import logits, plan_for
from torch import nn

import wina
from wina.errors import ConfigError, WinaError
from wina.eval.agreement import Agreement, Comparison, DenseLogits
from wina.eval.generation import GenerationTask, same_prefix
from wina.eval.measurement import Settings, Trial, mean_metric
from wina.eval.needle import DEPTHS, NeedleTask
from wina.eval.perplexity import score_windows, strided_windows
from wina.eval.perplexity_task import PerplexityTask
from wina.integrations.lm_eval import WinaLM
from wina.patch import patch_of
from wina.testing import random_tokens, tiny_model, tiny_tokenizer
from wina.texts import read_documents


def lm(model: nn.Module, max_length: int = 512) -> WinaLM:
    return WinaLM(
        model, tokenizer=tiny_tokenizer(), max_length=max_length, batch_size=4, show_progress=False
    )


@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 4), (7, 1), (50, 50), (41, 3)])
def test_strides_predict_each_token_once(window: int, stride: int) -> None:
    stream = torch.arange(41)
    windows = strided_windows(stream, window, stride)
    predicted = [int(t) for ids, scored in windows for t in ids[-scored:]]
    skipped = set(range(0, 41, window)) if stride == window else {0}
    assert predicted == [t for t in range(41) if t not in skipped]
    assert all(scored < len(ids) <= window for ids, scored in windows)


@pytest.mark.parametrize(("window", "stride"), [(10, 10), (10, 4), (50, 50), (41, 3)])
def test_windows_with_a_beginning_predict_every_token_once(window: int, stride: int) -> None:
    windows = strided_windows(torch.arange(41), window, stride, torch.tensor([256]))
    assert [int(t) for ids, scored in windows for t in ids[-scored:]] == list(range(41))
    assert all(scored < len(ids) <= window for ids, scored in windows)
    assert all(ids[0] == 256 for ids, _ in windows)


def test_strides_refuse_nonsense() -> None:
    with pytest.raises(ConfigError, match="no room"):
        strided_windows(torch.arange(20), 2, 2, torch.tensor([256, 257]))
    for window, stride in ((8, 9), (8, 0), (1, 1)):
        with pytest.raises(ConfigError, match="between 1 and the window"):
            strided_windows(torch.arange(20), window, stride)


def test_window_scores_are_the_log_probabilities_of_the_last_tokens(llama: nn.Module) -> None:
    ids = random_tokens(20)
    log_p = logits(llama, ids[None])[0].double().log_softmax(-1)
    want = -torch.stack([log_p[i - 1, ids[i]] for i in range(15, 20)]).mean()
    assert score_windows(llama, [(ids, 5)]) == pytest.approx([float(want)], rel=1e-5)


def test_perplexity_task(llama: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Some text to score, word by word. " * 20, encoding="utf-8")
    task = PerplexityTask(str(path))
    found = task.measure(Trial(lm(llama), Settings(window=64, stride=16)))
    assert found.metrics["perplexity"].value == pytest.approx(math.exp(found.metrics["nats"].value))
    short = task.measure(Trial(lm(llama), Settings(limit=2, window=64, stride=64)))
    assert len(short.rows["nats"]) == len(short.texts) == 2
    assert short.metrics["nats"].value == pytest.approx(sum(short.rows["nats"]) / 2)
    assert task.identity() != PerplexityTask("heldout").identity()


def agreement(model: nn.Module, texts: Sequence[Sequence[int]], tokens: int) -> Agreement:
    comparison = Comparison(model, tokens)
    comparison.read(texts)
    return comparison.result()


@pytest.fixture(scope="module")
def exact() -> nn.Module:
    return tiny_model("llama", torch.float64)


def test_agreement_against_the_definition(exact: nn.Module) -> None:
    texts = [random_tokens(n, seed=n).tolist() for n in (30, 12, 1, 40)]
    dense = [logits(exact, torch.tensor([ids]))[0] for ids in texts]
    plan = plan_for(exact)
    wina.sparsify(exact, plan, prefill="all", backend="reference")
    try:
        found = agreement(exact, texts, tokens=60)
        sparse = [logits(exact, torch.tensor([ids]))[0] for ids in texts]
    finally:
        wina.restore(exact)
    used = [30, 12, 1, 17]  # the last text is cut: 60 tokens in all
    kl, same = [], []
    for p, q, length in zip(dense, sparse, used, strict=True):
        log_p, log_q = p[:length].log_softmax(-1), q[:length].log_softmax(-1)
        kl.append((log_p.exp() * (log_p - log_q)).sum(-1))
        same.append(p[:length].argmax(-1) == q[:length].argmax(-1))
    assert found.tokens == 60
    assert found.kl == pytest.approx(float(torch.cat(kl).mean()), rel=1e-4)
    assert found.top1 == pytest.approx(float(torch.cat(same).double().mean()))
    residuals = torch.stack([k.sum() - found.kl * len(k) for k in kl])
    assert found.kl_stderr == pytest.approx(
        float((residuals.square().sum() * 4 / 3).sqrt() / 60), rel=1e-3
    )
    assert found.realised == pytest.approx(0.5, abs=0.1)
    assert set(found.by_projection) == set(plan.layers)


def test_windows_are_scored_and_compared_in_one_pass(exact: nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text("Some text to score, word by word. " * 20, encoding="utf-8")
    task, settings = PerplexityTask(str(path)), Settings(limit=3, window=64, stride=64)
    wina.sparsify(exact, plan_for(exact), prefill="all", backend="reference")
    runs: list[bool] = []
    handle = exact.register_forward_hook(lambda *_: runs.append(patch_of(exact).control.enabled))
    try:
        plain = task.measure(Trial(lm(exact), settings))
        want = agreement(exact, plain.texts, tokens=128)
        known = DenseLogits()
        runs.clear()
        for _ in range(2):
            comparison = Comparison(exact, 128, known)
            compared = task.measure(Trial(lm(exact), settings, comparison=comparison))
            assert (compared, comparison.result()) == (plain, want)
    finally:
        handle.remove()
        wina.restore(exact)
    # Two windows were compared, the third is beyond 128 tokens; the dense model ran for each once.
    assert runs == [True, False, True, False, True, *[True] * 3]


def test_dense_logits_are_kept_within_their_bytes(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama), prefill="all", backend="reference")
    ids = random_tokens(20)[None]
    size = logits(llama, ids).nbytes
    known = DenseLogits(2 * size - 1)
    first = known.of(llama, ids)
    assert known.of(llama, ids) is first
    assert known.of(llama, ids + 1) is not known.of(llama, ids + 1)
    with wina.dense(llama):
        torch.testing.assert_close(first, logits(llama, ids)[0])


def test_a_model_agrees_with_itself(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, sparsity=0.0), prefill="all", backend="reference")
    found = agreement(llama, [random_tokens(20).tolist()], tokens=100)
    assert (found.kl, found.top1, found.kl_stderr) == (0.0, 1.0, None)


def test_needles_are_deterministic_and_lie_where_they_should(llama: nn.Module) -> None:
    reader = lm(llama)
    task = NeedleTask("300")
    texts = list(task.texts(reader, Settings(limit=10)))
    assert texts == list(task.texts(reader, Settings(limit=10)))
    assert texts != list(task.texts(reader, Settings(limit=10, seed=1)))
    assert [depth for depth, *_ in texts] == [*DEPTHS, *DEPTHS]
    for depth, prompt, answer in texts:
        assert len(reader.tok_encode(prompt + answer)) <= 300
        assert prompt.count(f"is{answer}.") == 1
        city = prompt.rsplit("The secret number of ", 1)[1].removesuffix(" is")
        assert f"The secret number of {city} is{answer}." in prompt
        if depth == 0.0:
            assert prompt.startswith("The secret number")
        if depth == 1.0:
            assert prompt.count("The secret number") == 2
            assert f"is{answer}. The secret number of {city} is" in prompt


def test_needle_scores_are_those_of_the_answer(llama: nn.Module) -> None:
    reader = lm(llama)
    found = NeedleTask("300").measure(Trial(reader, Settings(limit=3)))
    _, prompt, answer = next(NeedleTask("300").texts(reader, Settings(limit=3)))
    ids = reader.tok_encode(prompt + answer)
    log_p = logits(llama, torch.tensor([ids]))[0].log_softmax(-1)
    last = len(answer)
    want = -sum(float(log_p[i - 1, ids[i]]) for i in range(len(ids) - last, len(ids)))
    assert found.rows["nats"][0] == pytest.approx(want, rel=1e-4)
    assert set(found.rows["found"]) <= {0.0, 1.0}
    with pytest.raises(ConfigError, match="max-length"):
        NeedleTask("1024").measure(Trial(reader, Settings()))
    with pytest.raises(ConfigError, match="as in needle:1024"):
        NeedleTask("long")


def test_generation_compares_with_the_dense_cell(llama: nn.Module) -> None:
    settings = Settings(limit=3, new_tokens=12)
    task = GenerationTask()
    dense = task.measure(Trial(lm(llama), settings))
    assert dense.rows["same_prefix"] == [12.0] * 3
    assert dense.metrics["equal_tokens"].value == 1.0
    cell = {"samples": [dict(sample) for sample in dense.samples]}
    cell["samples"][0]["tokens"] = [*cell["samples"][0]["tokens"][:5], -1, *range(6)]
    found = task.measure(Trial(lm(llama), settings, cell))
    assert found.rows["same_prefix"] == [5.0, 12.0, 12.0]
    assert 5 / 12 <= found.rows["equal_tokens"][0] < 1
    assert found.samples[0]["text"] == dense.samples[0]["text"]
    with pytest.raises(WinaError, match="other prompts"):
        task.measure(Trial(lm(llama), Settings(limit=2), cell))


def test_same_prefix() -> None:
    assert same_prefix([1, 2, 3], [1, 2, 3]) == 3
    assert same_prefix([1, 2], [1, 2, 3]) == 2
    assert same_prefix([], [1]) == 0


def test_documents_from_files(tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("one\ntwo", encoding="utf-8")
    assert read_documents(str(plain)) == ["one\ntwo"]
    rows = "\n".join(json.dumps(row) for row in ({"text": "a"}, {"page": "b"}))
    (tmp_path / "b.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "c.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    for name in ("b.jsonl", "c.jsonl.gz"):
        assert read_documents(str(tmp_path / name)) == ["a", "b"]
    assert len(read_documents("heldout")[0]) > 1000
    (tmp_path / "d.jsonl").write_text('{"other": 1}', encoding="utf-8")
    with pytest.raises(WinaError, match="line 1: expected JSON with a field"):
        read_documents(str(tmp_path / "d.jsonl"))
    with pytest.raises(WinaError, match="cannot read"):
        read_documents(str(tmp_path / "none.txt"))


def test_documents_from_several_files_and_from_instructions(tmp_path: Path) -> None:
    rows: list[dict[str, str]] = [{"text": str(index)} for index in range(10)]
    rows.append({"instruction": "Add.", "input": "1, 2", "output": "3", "text": "all of it"})
    rows.append({"instruction": "Add.", "input": "", "output": "3"})
    file = tmp_path / "a@3.jsonl"
    file.write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    plain = tmp_path / "b,c.txt"
    plain.write_text("plain", encoding="utf-8")
    assert read_documents(str(file))[-3:] == ["9", "all of it", "Add.\n3"]
    assert read_documents(f"{file}@3") == ["0", "4", "8"]
    assert read_documents(f"{file}@100") == read_documents(str(file))
    assert read_documents(str(plain)) == ["plain"]
    both = read_documents(f"calibration,{file}@2")
    assert both == [*read_documents("calibration"), "0", "6"]
    for wrong in (f"{file}@0", f"{file}@x", f"{file},", "x" * 5000):
        with pytest.raises(WinaError, match="cannot read"):
            read_documents(wrong)


def test_mean_metric() -> None:
    found = mean_metric([1.0, 0.0, 0.0, 1.0], True)
    assert found.value == 0.5
    assert found.stderr == pytest.approx(float(F.relu(torch.tensor(1 / 3 / 4)).sqrt()))
    assert mean_metric([2.0], False).stderr is None
