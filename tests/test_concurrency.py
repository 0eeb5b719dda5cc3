"""One patched model in several threads and processes: the results of one thread."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import plan_for
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import wina
from wina.kernels import dispatch, ops
from wina.patch import patch_of
from wina.testing import random_tokens

PROMPTS = [random_tokens(6 + i, seed=i)[None] for i in range(4)]
CHILD = """
import pickle, sys, torch
with open(sys.argv[1], "rb") as file:
    model, prompt, want = pickle.load(file)
assert torch._C._dispatch_has_kernel_for_dispatch_key("wina::sparse_linear", "CPU")
with torch.no_grad():
    assert torch.equal(model.generate(prompt, max_new_tokens=6, do_sample=False), want)
import wina
wina.restore(model)
assert all(p.is_contiguous() for p in model.parameters())
"""


def generate(model: nn.Module, prompt: Tensor) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.generate(prompt, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
    return tokens


@pytest.fixture(params=["threshold", "topk"])
def patched(request: pytest.FixtureRequest, llama: nn.Module) -> nn.Module:
    wina.sparsify(llama, plan_for(llama, selector=request.param))
    return llama


@pytest.fixture(params=[False, True], ids=["alone", "sharing launches"])
def sharing(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """q, k and v in one launch or not: the CPU backend shares none by itself."""
    if request.param:
        shared = staticmethod(ops.sparse_group)
        monkeypatch.setattr(dispatch.CpuBackend, "sparse_group", shared)


@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_threads_decode_and_generate_with_one_model(
    llama: nn.Module, sparsity: float | None
) -> None:
    if sparsity is not None:
        wina.sparsify(llama, plan_for(llama, sparsity=sparsity))

    def decode(prompt: Tensor) -> Tensor:
        return wina.decode(llama, prompt, max_new_tokens=6, eos_token_id=None).tokens

    want = {call: [call(p) for p in PROMPTS] for call in (decode, partial(generate, llama))}
    got: list[tuple[Any, int, Tensor]] = []

    def work(call: Any, index: int) -> None:
        got.extend((call, index, call(PROMPTS[index])) for _ in range(4))

    threads = [
        threading.Thread(target=work, args=(call, i)) for call in want for i in range(len(PROMPTS))
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(got) == 4 * len(threads)
    assert all(torch.equal(tokens, want[call][index]) for call, index, tokens in got)
    assert sparsity is None or patch_of(llama).control.enabled


@pytest.mark.usefixtures("sharing")
def test_threads_generate_the_texts_of_one(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, selector="topk"))
    want = [generate(llama, prompt) for prompt in PROMPTS]
    got: dict[int, list[Tensor]] = {}

    def work(index: int) -> None:
        got[index] = [generate(llama, PROMPTS[index]) for _ in range(3)]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, texts in got.items():
        assert all(torch.equal(text, want[index]) for text in texts)
    assert len(got) == len(PROMPTS)


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
def test_any_number_of_threads_gives_the_same_tokens(patched: nn.Module) -> None:
    texts = []
    for count in (1, 2, 4):
        torch.set_num_threads(count)
        texts.append(generate(patched, PROMPTS[0]))
    assert all(torch.equal(texts[0], text) for text in texts)


class Generated(Dataset[Tensor]):
    """What a patched model generates, item by item."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __len__(self) -> int:
        return len(PROMPTS)

    def __getitem__(self, index: int) -> Tensor:
        assert torch._C._dispatch_has_kernel_for_dispatch_key("wina::sparse_linear", "CPU")
        return generate(self.model, PROMPTS[index])


def assert_workers_generate_the_same(model: nn.Module, start: str) -> None:
    want = [generate(model, prompt) for prompt in PROMPTS]
    loader = DataLoader(
        Generated(model),
        batch_size=None,
        num_workers=2,
        multiprocessing_context=start,
        timeout=120,
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, want, strict=True))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_forked_workers_of_a_data_loader(patched: nn.Module) -> None:
    assert_workers_generate_the_same(patched, "fork")


def test_spawned_workers_of_a_data_loader(llama: nn.Module) -> None:
    """They get the model by pickle and start without our kernels."""
    wina.sparsify(llama, plan_for(llama, selector="topk"))
    assert_workers_generate_the_same(llama, "spawn")


def test_a_model_sent_to_another_process_loads_its_kernels(
    patched: nn.Module, tmp_path: Path
) -> None:
    """What spawned workers get."""
    path = tmp_path / "model"
    path.write_bytes(pickle.dumps((patched, PROMPTS[0], generate(patched, PROMPTS[0]))))
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, str(path)], capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr[-2000:]
