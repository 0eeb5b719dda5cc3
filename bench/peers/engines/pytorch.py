"""A model in PyTorch: dense in transformers' own loop, or sparsified and run by ``wina.decode``."""

from __future__ import annotations

from contextlib import ExitStack
from importlib.metadata import version

import torch
import transformers

import wina
from wina.bench.generation import ENGINES


class Engine:
    """A model folder.

    Args:
        model: the folder.
        threads: of torch.
        dtype: of the model.
        plan: folder of a saved :class:`wina.SparsityPlan` to apply; None for the dense model
            in eager transformers.
    """

    def __init__(self, model: str, threads: int, dtype: str, plan: str | None = None) -> None:
        torch.set_num_threads(threads)
        transformers.utils.logging.disable_progress_bar()
        self.version = f"transformers {version('transformers')}"
        self._model = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        if plan is not None:
            self.version = f"wina {wina.__version__} in {self.version}"
            wina.sparsify(self._model, wina.SparsityPlan.load(plan), show_progress=False)
        self._open = ExitStack()
        engine = ENGINES["eager" if plan is None else "wina"]
        self._run = self._open.enter_context(engine.on(self._model))

    def generate(self, prompt: list[int], new_tokens: int) -> tuple[list[int], float]:
        """(tokens, seconds per token of decode)."""
        run = self._run(torch.tensor([prompt]), new_tokens)
        return list(run.tokens), run.step_s
