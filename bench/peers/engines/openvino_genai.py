"""OpenVINO GenAI, which reads GGUF files itself."""

from __future__ import annotations

from importlib.metadata import version

import numpy as np
import openvino
import openvino_genai


class Engine:
    """A GGUF file in OpenVINO's pipeline, on the CPU.

    Args:
        model: the file.
        threads: of inference.
    """

    def __init__(self, model: str, threads: int) -> None:
        self.version = f"OpenVINO GenAI {version('openvino-genai')}"
        self._pipeline = openvino_genai.LLMPipeline(model, "CPU", INFERENCE_NUM_THREADS=threads)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        """(tokens, seconds per token of decode)."""
        settings = openvino_genai.GenerationConfig()
        settings.max_new_tokens = settings.min_new_tokens = new_tokens
        settings.ignore_eos = True
        settings.do_sample = False
        ids = openvino.Tensor(np.array([prompt], dtype=np.int64))
        result = self._pipeline.generate(ids, settings)
        return list(result.tokens[0]), result.perf_metrics.get_tpot().mean / 1e3
