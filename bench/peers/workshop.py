"""The files that engines start from, made once for a model and kept in the cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

import wina
from wina.bench.decode import prompts_for, random_model
from wina.bench.peers.to_gguf import write_gguf
from wina.cache import cache_root
from wina.config import SparsityConfig
from wina.errors import WinaError

PROMPTS = 8


class Workshop:
    """Makes GGUF files, plans and prompts for one model folder.

    Args:
        source: a model folder of the Llama architecture.
        root: where made files lie, in a folder of the model's own.
        show_progress: draw bars on stderr.
    """

    def __init__(self, source: Path, root: Path, show_progress: bool = True) -> None:
        if not (source / "config.json").is_file():
            raise WinaError(f"{source} is no model folder: it has no config.json")
        self.source, self._show = source, show_progress
        self.folder = root / f"{source.name}-{_fingerprint(source)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self._model: nn.Module | None = None

    @classmethod
    def for_shape(cls, shape: str, root: Path, show_progress: bool = True) -> Workshop:
        """For random weights of a named shape, in bfloat16 as such models are published."""

        def save(target: Path) -> None:
            model: Any = random_model(shape, "bfloat16")
            model.save_pretrained(target)

        return cls(_made(root / f"{shape}-random", save), root, show_progress)

    def gguf(self, weights: str) -> Path:
        """The model in a type of :data:`wina.bench.peers.to_gguf.WEIGHTS`."""
        return _made(
            self.folder / f"{weights}.gguf",
            lambda target: write_gguf(self.source, target, weights, self._show),
        )

    def plan(self, config: SparsityConfig) -> Path:
        """Folder of a plan, calibrated on bundled text; random tokens without a tokenizer."""
        settings = json.dumps([wina.__version__, config.to_dict()], sort_keys=True)

        def calibrate(target: Path) -> None:
            model, tokenizer = self.model(), self.tokenizer()
            texts: Any = None
            if tokenizer is None:
                texts = prompts_for(model, None, 1, config.calibration_tokens).flatten()
            plan = wina.calibrate(model, tokenizer, config, texts, self._show)
            plan.save(target)

        return _made(self.folder / f"plan-{_digest(settings)}", calibrate)

    def prompts(self, context: int) -> list[list[int]]:
        """Prompts of ``context`` tokens, the same for every engine."""
        path = _made(self.folder / f"prompts-{context}.json", lambda p: self._ask(p, context))
        prompts: list[list[int]] = json.loads(path.read_text())["prompts"]
        return prompts

    def reference(self, context: int) -> list[int]:
        """The token that transformers puts after each prompt."""
        path = self.folder / f"prompts-{context}.json"
        self.prompts(context)
        tokens: list[int] = json.loads(path.read_text())["next"]
        return tokens

    def _ask(self, path: Path, context: int) -> None:
        prompts = prompts_for(self.model(), self.tokenizer(), PROMPTS, context)
        with torch.inference_mode():
            answer = self.model()(input_ids=prompts).logits[:, -1].argmax(-1)
        path.write_text(json.dumps({"prompts": prompts.tolist(), "next": answer.tolist()}))

    def model(self) -> nn.Module:
        """The dense model in float32, the fastest to calibrate; until :meth:`release`."""
        if self._model is None:
            self._model = self.load("float32")
        return self._model

    def load(self, dtype: str) -> nn.Module:
        """The dense model in a dtype, for the caller to keep."""
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()
        loaded: nn.Module = AutoModelForCausalLM.from_pretrained(self.source, dtype=dtype)
        return loaded.eval()

    def tokenizer(self) -> Any | None:
        """The folder's tokenizer; None for random weights, which have none."""
        if not (self.source / "tokenizer_config.json").is_file():
            return None
        from transformers import AutoTokenizer

        return AutoTokenizer.from_pretrained(self.source)

    def release(self) -> None:
        """Give the model's memory back."""
        self._model = None


def default_root() -> Path:
    """``peers`` in the cache."""
    root = cache_root()
    if root is None:
        raise WinaError("no cache folder: set WINA_CACHE_DIR to an absolute path")
    return root / "peers"


def _made(path: Path, make: Callable[[Path], None]) -> Path:
    """``path``, made first if it is not there: whole or not at all."""
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=".making-", dir=path.parent))
    try:
        make(work / path.name)
        (work / path.name).rename(path)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return path


def _fingerprint(folder: Path) -> str:
    """Of a folder's files, so that another model of the same name is another one."""
    files = [p for p in sorted(folder.iterdir()) if p.suffix in (".safetensors", ".json")]
    facts = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in files]
    return _digest(json.dumps([str(folder.resolve()), facts]))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]
