"""vLLM's OpenAI server with the quantization method ``wina`` (``make test-vllm``)."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM lives in an environment of its own: make test-vllm")

import psutil
import requests
from vllm_model import assert_close_median, forced, make_folder

from wina.testing import random_tokens

pytestmark = pytest.mark.vllm

READY_S, ANSWER_S, END_S = 400, 120, 60
STEP_TOKENS = 256  # no prompt is read in parts: a part of one token would pass for a decode step


@dataclass(frozen=True)
class Server:
    """A running one."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def complete(self, prompt: list[int], new_tokens: int, **settings: Any) -> requests.Response:
        request = {
            "model": "tiny", "prompt": prompt, "max_tokens": new_tokens, "temperature": 0,
            "ignore_eos": True, "logprobs": 0, "return_tokens_as_token_ids": True, **settings,
        }  # fmt: skip
        stream = bool(settings.get("stream"))
        return requests.post(
            f"{self.url}/v1/completions", json=request, timeout=ANSWER_S, stream=stream
        )

    def healthy(self) -> bool:
        try:
            return requests.get(f"{self.url}/health", timeout=5).ok
        except requests.RequestException:
            return False

    def workers(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)


def wait_for(condition: Any, seconds: float) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.5)
    return True


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_folder(tmp_path_factory.mktemp("model"), 0.5)


@pytest.fixture(scope="module")
def server(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("log") / "server.txt"
    environment = {
        **os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1",
        "TRANSFORMERS_OFFLINE": "1", "OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    }  # fmt: skip
    command = [
        sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder),
        "--served-model-name", "tiny", "--host", "127.0.0.1", "--port", str(port),
        "--dtype", "float32", "--enforce-eager", "--max-model-len", "128", "--max-num-seqs", "8",
        "--max-num-batched-tokens", str(STEP_TOKENS), "--no-enable-prefix-caching",
    ]  # fmt: skip
    with log.open("wb") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
    found = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        ready = wait_for(lambda: found.healthy() or process.poll() is not None, READY_S)
        assert ready, log.read_text()[-3000:]
        assert process.poll() is None, log.read_text()[-3000:]
        yield found
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_eight_requests_at_once_one_of_them_aborted(server: Server, folder: Path) -> None:
    prompts = [random_tokens(count, seed=count).tolist() for count in (3, 5, 7, 12, 20, 30, 40)]
    new_tokens = 24

    def abort() -> None:
        with server.complete(random_tokens(10).tolist(), 100, stream=True) as answer:
            next(answer.iter_lines())  # the first token has come; then the client hangs up

    with ThreadPoolExecutor(8) as pool:
        aborted = pool.submit(abort)
        answers = list(pool.map(lambda prompt: server.complete(prompt, new_tokens), prompts))
        aborted.result()
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer.status_code == 200, answer.text
        choice = answer.json()["choices"][0]
        assert choice["finish_reason"] == "length"
        found = choice["logprobs"]
        tokens = [int(name.removeprefix("token_id:")) for name in found["tokens"]]
        assert len(tokens) == new_tokens
        expected, _ = forced(folder, prompt, tokens)
        assert_close_median(found["token_logprobs"], expected)
    assert server.healthy()
    running = "vllm:num_requests_running{"
    metrics = requests.get(f"{server.url}/metrics", timeout=ANSWER_S).text.splitlines()
    assert all(float(line.split()[-1]) == 0 for line in metrics if line.startswith(running))


def test_a_killed_worker_is_a_clean_error(server: Server) -> None:
    """Last: it ends the server. The request in flight fails, and nothing is left running."""
    workers = server.workers()
    engine = [worker for worker in workers if "EngineCore" in " ".join(worker.cmdline())]
    assert engine, [worker.cmdline() for worker in workers]
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.complete, random_tokens(8).tolist(), 110)
        time.sleep(0.2)
        engine[0].kill()
        with suppress(requests.ConnectionError):  # the server had gone before it could say so
            assert answer.result().status_code == 500
    assert wait_for(lambda: server.process.poll() is not None, END_S)
    assert "EngineDeadError" in server.log.read_text()
    assert wait_for(lambda: not any(worker.is_running() for worker in workers), END_S)
