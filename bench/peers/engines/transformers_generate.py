"""``model.generate`` of transformers, dense or sparsified by wina."""

from __future__ import annotations

from importlib.metadata import version

import torch
import transformers

import wina
from wina.bench.generation import generate


class Engine:
    """A model folder in eager transformers.

    Args:
        model: the folder.
        threads: of torch.
        dtype: of the model.
        plan: folder of a saved :class:`wina.SparsityPlan` to apply; None for the dense model.
    """

    def __init__(self, model: str, threads: int, dtype: str, plan: str | None = None) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.version = f"transformers {version('transformers')}"
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        if plan is not None:
            self.version = f"wina {wina.__version__} in {self.version}"
            wina.sparsify(self._model, wina.SparsityPlan.load(plan), show_progress=False)

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        """(tokens, seconds per token of decode)."""
        run = generate(self._model, torch.tensor([prompt]), new_tokens)
        return list(run.tokens), run.step_s
