"""The quantization method ``wina`` in vLLM itself, on a tiny random Llama (``make test-vllm``).

Masks are step functions, so tokens of two engines are compared at sparsity 0 only; at 50 % masks
are, except where a channel lies on its threshold, and log-probabilities of given tokens.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

# One process and thread, no network: set before vLLM is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="1", VLLM_NO_USAGE_STATS="1",
    TRANSFORMERS_OFFLINE="1", OMP_NUM_THREADS="1",
)  # fmt: skip

import torch
from vllm_model import Recorder, assert_close_median, forced, make_folder

import wina
from wina.integrations.vllm.step import STEP, DecodedChannels
from wina.kernels.reference import keep_mask
from wina.testing import random_tokens, tiny_model

pytestmark = pytest.mark.vllm

PROMPTS = [random_tokens(count, seed=count).tolist() for count in (12, 7)]
NEW_TOKENS = 16
MARGIN = 1e-4
CHANNELS = 2 * (128 * 5 + 128 + 96)  # layers × (inputs of q, k, v, gate, up; of o; of down)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[float, Path]:
    root = tmp_path_factory.mktemp("models")
    return {s: make_folder(root / f"s{s}", s) for s in (0.0, 0.5)}


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    before = vars(STEP).copy()
    yield
    vars(STEP).update(before)


def generate(
    folder: Path, prompts: list[list[int]] = PROMPTS, observer: Callable[..., None] | None = None,
    **settings: Any,
) -> tuple[list[list[int]], list[list[float]]]:  # fmt: skip
    """(tokens, their log-probabilities) of greedy generation, one list for each prompt."""
    from vllm import LLM, SamplingParams

    engine = LLM(
        str(folder), dtype="float32", max_model_len=128, max_num_seqs=4, skip_tokenizer_init=True,
        **{"enforce_eager": True, **settings},
    )  # fmt: skip
    STEP.observer = observer
    sampling = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False
    )
    try:
        outputs = engine.generate(
            [{"prompt_token_ids": prompt} for prompt in prompts], sampling, use_tqdm=False
        )
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


def test_at_sparsity_0_tokens_are_those_of_the_dense_engine(folders: dict[float, Path]) -> None:
    counter = DecodedChannels()
    tokens, _ = generate(folders[0.0], observer=counter)
    assert counter.seen > 0
    assert counter.realised == 0
    assert tokens == dense_tokens(folders[0.0])


def test_at_50_percent_masks_and_log_probabilities_are_ours(folders: dict[float, Path]) -> None:
    prompt = PROMPTS[0]
    theirs = Recorder()
    (tokens,), (found,) = generate(folders[0.5], [prompt], theirs.of_vllm)
    expected, ours = forced(folders[0.5], prompt, tokens)
    assert set(theirs.seen) == set(ours.seen)
    dropped = total = 0
    for name, steps in theirs.seen.items():
        # Ours has one step more: it reads the last token, too.
        assert len(steps) == len(tokens) - 1 == len(ours.seen[name]) - 1
        for (x, threshold), (our_x, our_threshold) in zip(steps, ours.seen[name], strict=False):
            assert torch.equal(threshold, our_threshold)
            keep = keep_mask(x, threshold)
            clear = (x.abs() / threshold - 1).abs() > MARGIN
            assert torch.equal(keep[clear], keep_mask(our_x, threshold)[clear]), name
            dropped, total = dropped + int((~keep).sum()), total + keep.numel()
    assert 0.4 < dropped / total < 0.6
    assert_close_median(found, expected)


def test_a_compiled_run_is_sparse_and_prompts_stay_dense(folders: dict[float, Path]) -> None:
    counter = DecodedChannels()
    compiled, _ = generate(
        folders[0.5], observer=counter, enforce_eager=False,
        compilation_config={"mode": 2, "backend": "eager"},
    )  # fmt: skip
    assert 0.4 < counter.realised < 0.6
    assert counter.seen == len(PROMPTS) * (NEW_TOKENS - 1) * CHANNELS
    assert compiled == generate(folders[0.5])[0]


def test_steps_that_mix_prompts_and_decoding(folders: dict[float, Path]) -> None:
    counter = DecodedChannels()
    # The first prompt fills a step, so the second one is read beside the first one's decoding.
    tokens, found = generate(folders[0.5], observer=counter, max_num_batched_tokens=len(PROMPTS[0]))
    assert counter.seen == len(PROMPTS) * (NEW_TOKENS - 1) * CHANNELS
    for prompt, ids, values in zip(PROMPTS, tokens, found, strict=True):
        expected, _ = forced(folders[0.5], prompt, ids)
        assert_close_median(values, expected)


def test_prompts_can_be_masked_for_evaluations(folders: dict[float, Path]) -> None:
    counter = DecodedChannels()
    settings = {"quantization_config": {"quant_method": "wina", "prefill": "all"}}
    generate(folders[0.5], observer=counter, hf_overrides=settings)
    sparse_prompt = sum(len(prompt) - 2 for prompt in PROMPTS)  # all but the sinks
    assert counter.seen == (sparse_prompt + len(PROMPTS) * (NEW_TOKENS - 1)) * CHANNELS


def test_two_ranks_are_as_one(folders: dict[float, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    prompt = PROMPTS[0]
    (tokens,), (found,) = generate(folders[0.5], [prompt], tensor_parallel_size=2)
    expected, ours = forced(folders[0.5], prompt, tokens)
    dropped = [~keep_mask(x, threshold) for steps in ours.seen.values() for x, threshold in steps]
    assert 0.4 < torch.cat([mask.flatten() for mask in dropped]).float().mean() < 0.6
    assert_close_median(found, expected)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"plan": "elsewhere"}, "no plan.json in .*elsewhere"),
        ({"sparsty": 0.5}, "unknown setting 'sparsty'"),
        ({"prefill": "last:0.5"}, "take dense or all"),
    ],
)
def test_what_does_not_fit_is_said(
    folders: dict[float, Path], settings: dict[str, Any], message: str
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
        ("method", "cats"),
    ],
)
def test_a_plan_that_is_not_served_is_refused(
    folders: dict[float, Path], setting: str, value: str, tmp_path: Path
) -> None:
    from wina.integrations.vllm.plugin import WinaConfig

    plan = wina.SparsityPlan.load(folders[0.5] / "wina")
    asked = wina.SparsityConfig(**{**plan.config.to_dict(), setting: value})
    calibration = {**plan.calibration, "rotation": asked.rotation_spec}
    replace(plan, config=asked, calibration=calibration).save(tmp_path / "plan")
    config = WinaConfig.from_config({"quant_method": "wina", "plan": str(tmp_path / "plan")})
    with pytest.raises(wina.WinaError, match=f"{value!r} is not served in vLLM"):
        config.maybe_update_config(str(folders[0.5]))


def test_a_plan_for_other_weights_is_refused(folders: dict[float, Path], tmp_path: Path) -> None:
    other: Any = tiny_model("llama", seed=1, hidden_size=128, head_dim=32)
    other.save_pretrained(tmp_path)
    settings = {"quant_method": "wina", "plan": str(folders[0.5] / "wina")}
    with pytest.raises(Exception, match="other weights than the model the plan was made for"):
        generate(tmp_path, hf_overrides={"quantization_config": settings})
