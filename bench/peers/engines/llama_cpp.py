"""llama.cpp through the wheel ``xllamacpp``: its server, asked in process."""

from __future__ import annotations

import re
from importlib.metadata import version

import xllamacpp


class Engine:
    """A GGUF file in llama.cpp.

    Args:
        model: the file; token i of its vocabulary is written ``<i>``.
        threads: of every kind.
    """

    def __init__(self, model: str, threads: int) -> None:
        self.version = f"llama.cpp (xllamacpp {version('xllamacpp')})"
        settings = xllamacpp.CommonParams()
        settings.model.path = model
        settings.n_ctx = 2048
        settings.n_parallel = 1
        settings.cpuparams.n_threads = settings.cpuparams_batch.n_threads = threads
        settings.verbosity = 0
        self._server = xllamacpp.Server(settings)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        """(tokens, seconds per token of decode)."""
        answer = self._server.handle_completions(
            {
                "prompt": prompt,
                "n_predict": new_tokens,
                "temperature": 0.0,
                "ignore_eos": True,
                "cache_prompt": False,
            }
        )
        if "timings" not in answer:
            raise RuntimeError(str(answer))
        text, timings = answer["choices"][0]["text"], answer["timings"]
        # Its clock starts when the first token is there.
        seconds = timings["predicted_ms"] / 1e3 / (timings["predicted_n"] - 1)
        return [int(token) for token in re.findall(r"<(\d+)>", text)], seconds
