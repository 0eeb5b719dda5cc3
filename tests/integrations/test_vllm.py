"""The quantization method ``wina`` in vLLM itself (``make test-vllm``).

On a tiny random Llama; what is marked slow on demo models, which first use fetches. Masks are
step functions, so tokens of two engines are compared at sparsity 0 only; at 50 % masks are, up to
the first channel that lies on its threshold, and log-probabilities of given tokens.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

# One process and thread, no network: set before vLLM is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
    TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1",
)  # fmt: skip

from transformers import AutoTokenizer
from vllm_model import (
    MARGIN,
    RankRecorder,
    Recorder,
    Seen,
    assert_close_median,
    assert_same_masks,
    first_differences,
    forced,
    joined,
    make_folder,
    scored,
)

import wina
from wina.integrations.vllm.step import STEP, DecodedChannels
from wina.testing import random_tokens, tiny_model

pytestmark = pytest.mark.vllm

PROMPTS = [random_tokens(count, seed=count).tolist() for count in (12, 7)]
NEW_TOKENS = 16
TEXT = (
    "To keep bread fresh for longer, wrap it in a clean cloth and put it into a wooden box. "
    "A plastic bag holds the moisture of the crust, so that it turns soft within a day."
)
MASKED_PROMPTS = {"quant_method": "wina", "prefill": "all"}
CHANNELS = 2 * (128 * 5 + 128 + 96)  # layers × (inputs of q, k, v, gate, up; of o; of down)


Folders = dict[float, Path]
SMOL = pytest.param("smollm2-135m-instruct", marks=pytest.mark.slow)
GEMMA = pytest.param("gemma-3-270m", marks=pytest.mark.slow)  # 4 heads, where SmolLM2 has 9


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Folders]:
    """Sparsity → folder, of a model; made once."""

    @cache
    def make(model: str) -> Folders:
        root = tmp_path_factory.mktemp(model)
        return {s: make_folder(root / f"s{s}", s, model) for s in (0.0, 0.5)}

    return make


@pytest.fixture(scope="session")
def folders(made: Callable[[str], Folders]) -> Folders:
    return made("tiny")


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = vars(STEP).copy()
    yield
    vars(STEP).update(before)


def start(folder: Path, **settings: Any) -> Any:
    """An engine in this process."""
    from vllm import LLM

    return LLM(
        str(folder), dtype="float32", max_model_len=128, max_num_seqs=4, skip_tokenizer_init=True,
        **{"enforce_eager": True, **settings},
    )  # fmt: skip


def generate(
    folder: Path, prompts: list[list[int]] = PROMPTS, observer: Callable[..., None] | None = None,
    ranks: list[Seen] | None = None, **settings: Any,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """(tokens, their log-probabilities) of greedy generation, one list for each prompt.

    ``ranks`` is filled with the sparse products of each worker process.
    """
    from vllm import SamplingParams

    if ranks is not None:
        settings["worker_extension_cls"] = f"{RankRecorder.__module__}.{RankRecorder.__name__}"
    engine = start(folder, **settings)
    STEP.observer = observer
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False
    )
    try:
        if ranks is not None:
            engine.collective_rpc("record")
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
        if ranks is not None:
            ranks += engine.collective_rpc("recorded")
    finally:
        engine.llm_engine.engine_core.shutdown()
    completions = [output.outputs[0] for output in outputs]
    tokens = [list(c.token_ids) for c in completions]
    return tokens, [
        [step[token].logprob for step, token in zip(c.logprobs, ids, strict=True)]
        for c, ids in zip(completions, tokens, strict=True)
    ]


def dense_tokens(folder: Path) -> list[list[int]]:
    """Of vLLM without the plug-in."""
    return generate(folder, hf_overrides={"quantization_config": None})[0]


@pytest.mark.parametrize("model", ["tiny", SMOL])
def test_at_sparsity_0_tokens_are_those_of_the_dense_engine(
    made: Callable[[str], Folders], model: str
) -> None:
    counter = DecodedChannels()
    tokens, _ = generate(made(model)[0.0], observer=counter)
    assert counter.seen > 0
    assert counter.realised == 0
    assert tokens == dense_tokens(made(model)[0.0])


@pytest.mark.parametrize("model", ["tiny", "tiny-importance", SMOL])
def test_at_50_percent_masks_and_log_probabilities_are_ours(
    made: Callable[[str], Folders], model: str
) -> None:
    folder, prompt = made(model)[0.5], PROMPTS[0]
    theirs = Recorder()
    (tokens,), (found,) = generate(folder, [prompt], theirs.of_vllm)
    expected, ours = forced(folder, prompt, tokens)
    assert_same_masks(theirs.seen, ours.seen, steps=len(tokens) - 1)
    assert_close_median(found, expected)


def test_a_compiled_run_is_sparse_and_prompts_stay_dense(folders: Folders) -> None:
    counter = DecodedChannels()
    compiled, _ = generate(
        folders[0.5], observer=counter, enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
    )  # fmt: skip
    assert 0.4 < counter.realised < 0.6
    assert counter.seen == len(PROMPTS) * (NEW_TOKENS - 1) * CHANNELS
    assert compiled == generate(folders[0.5])[0]


def test_steps_that_mix_prompts_and_decoding(folders: Folders) -> None:
    counter = DecodedChannels()
    # The first prompt fills a step, so the second one is read beside the first one's decoding.
    tokens, found = generate(folders[0.5], observer=counter, max_num_batched_tokens=len(PROMPTS[0]))
    assert counter.seen == len(PROMPTS) * (NEW_TOKENS - 1) * CHANNELS
    for prompt, ids, values in zip(PROMPTS, tokens, found, strict=True):
        expected, _ = forced(folders[0.5], prompt, ids)
        assert_close_median(values, expected)


def test_prompts_can_be_masked_for_evaluations(folders: Folders) -> None:
    counter = DecodedChannels()
    overrides = {"quantization_config": MASKED_PROMPTS}
    generate(folders[0.5], observer=counter, hf_overrides=overrides)
    sparse_prompt = sum(len(prompt) - 2 for prompt in PROMPTS)  # all but the sinks
    assert counter.seen == (sparse_prompt + len(PROMPTS) * (NEW_TOKENS - 1)) * CHANNELS


@pytest.mark.parametrize("model", ["tiny", SMOL])
def test_masked_prompts_differ_from_ours_by_channels_on_their_thresholds_only(
    made: Callable[[str], Folders], model: str
) -> None:
    """With vLLM's masks transformers scores as vLLM does, whatever its own masks would be."""
    from vllm import SamplingParams

    folder, theirs = made(model)[0.5], Recorder()
    prompt = AutoTokenizer.from_pretrained(folder)(TEXT)["input_ids"][:96]
    engine = start(folder, hf_overrides={"quantization_config": MASKED_PROMPTS})
    STEP.observer = theirs.of_vllm
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    try:
        (output,) = engine.generate({"prompt_token_ids": prompt}, sampling, use_tqdm=False)
    finally:
        engine.llm_engine.engine_core.shutdown()
    steps = zip(output.prompt_logprobs[1:], prompt[1:], strict=True)
    found = [step[token].logprob for step, token in steps]
    same_masks, _ = scored(folder, prompt, theirs.seen)
    assert found == pytest.approx(same_masks, abs=1e-4)
    _, ours = scored(folder, prompt)
    assert (first_differences(theirs.seen, ours.seen) <= MARGIN).all()


@pytest.fixture
def two_ranks(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Settings of an engine."""
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    return {"tensor_parallel_size": 2}


@pytest.mark.parametrize("model", ["tiny", GEMMA])
def test_two_ranks_at_sparsity_0_are_as_one(
    made: Callable[[str], Folders], model: str, two_ranks: dict[str, int]
) -> None:
    assert generate(made(model)[0.0], **two_ranks)[0] == generate(made(model)[0.0])[0]


@pytest.mark.parametrize("model", ["tiny", GEMMA])
def test_two_ranks_have_the_masks_of_one(
    made: Callable[[str], Folders], model: str, two_ranks: dict[str, int]
) -> None:
    folder, prompt, ranks = made(model)[0.5], PROMPTS[0], []
    (tokens,), (found,) = generate(folder, [prompt], ranks=ranks, **two_ranks)
    expected, ours = forced(folder, prompt, tokens)
    assert len(ranks) == 2
    assert_same_masks(joined(ranks), ours.seen, steps=len(tokens) - 1)
    assert_close_median(found, expected)


def test_two_stages_are_as_one(folders: Folders, two_ranks: dict[str, int]) -> None:
    prompt = PROMPTS[0]
    (tokens,), (found,) = generate(
        folders[0.5], [prompt], tensor_parallel_size=1, pipeline_parallel_size=2,
        # vLLM's CPU runner does not warm an eager pipeline up, and then fails.
        enforce_eager=False, compilation_config={"mode": 2, "backend": "eager"},
    )  # fmt: skip
    expected, _ = forced(folders[0.5], prompt, tokens)
    assert_close_median(found, expected)


def test_the_method_can_be_named_where_config_json_does_not(
    folders: Folders, tmp_path: Path
) -> None:
    """``vllm serve FOLDER --quantization wina``: the plan in the folder is found."""
    folder = tmp_path / "model"
    shutil.copytree(folders[0.5], folder)
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    counter = DecodedChannels()
    generate(folder, observer=counter, quantization="wina")
    assert 0.4 < counter.realised < 0.6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "elsewhere"}, "no plan.json in .*elsewhere"),
        ({"sparsty": 0.5}, "unknown setting 'sparsty'"),
        ({"prefill": "last:0.5"}, "take dense or all"),
    ],
)
def test_what_does_not_fit_is_said(
    folders: Folders, settings: dict[str, Any], message: str
) -> None:
    from wina.integrations.vllm.plugin import WinaConfig

    def read() -> None:
        config = WinaConfig.from_config({"quant_method": "wina", **settings})
        config.maybe_update_config(str(folders[0.5]))

    with pytest.raises(wina.WinaError, match=message):
        read()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("selector", "topk"),
        ("correction", "bias"),
        ("rotation", "orthogonal"),
        ("weight_dtype", "int8"),
        ("head", "sparse"),
        ("tracking", 0.02),
        ("method", "cats"),
    ],
)
def test_a_plan_that_is_not_served_is_refused(
    folders: Folders, setting: str, value: str | float, tmp_path: Path
) -> None:
    from wina.integrations.vllm.plugin import WinaConfig

    plan = wina.SparsityPlan.load(folders[0.5] / "wina")
    asked = wina.SparsityConfig(**{**plan.config.to_dict(), "refinement": None, setting: value})
    calibration = {**plan.calibration, "rotation": asked.rotation_spec}
    replace(plan, config=asked, calibration=calibration).save(tmp_path / "plan")
    config = WinaConfig.from_config({"quant_method": "wina", "plan": str(tmp_path / "plan")})
    with pytest.raises(wina.WinaError, match=f"{value!r} is not served in vLLM"):
        config.maybe_update_config(str(folders[0.5]))


def test_a_plan_for_other_weights_is_refused(folders: Folders, tmp_path: Path) -> None:
    other: Any = tiny_model("llama", seed=1, hidden_size=128, head_dim=32)
    other.save_pretrained(tmp_path)
    settings = {"quant_method": "wina", "plan": str(folders[0.5] / "wina")}
    with pytest.raises(Exception, match="other weights than the model the plan was made for"):
        generate(tmp_path, hf_overrides={"quantization_config": settings})


def test_ranks_that_share_a_hidden_state_refuse_probes(
    folders: Folders, made: Callable[[str], Folders], monkeypatch: pytest.MonkeyPatch
) -> None:
    from wina.integrations.vllm import plugin

    monkeypatch.setattr(plugin, "RowParallelLinear", SimpleNamespace)
    for folder, refused in ((folders[0.5], False), (made("tiny-importance")[0.5], True)):
        plan = wina.SparsityPlan.load(folder / "wina")
        parts = [plan.layers["model.layers.0.mlp.down_proj"]]
        method = plugin.WinaLinearMethod("down", parts, plan.config.make_selector())
        for ranks in (1, 2):
            layer = SimpleNamespace(tp_size=ranks, weight=torch.zeros(1))
            if refused and ranks == 2:
                with pytest.raises(wina.WinaError, match="tensor_parallel_size=1"):
                    method._probes(layer)
            else:
                assert (method._probes(layer) is not None) == refused
