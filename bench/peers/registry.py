"""Which engines are measured, what each needs, and from which files it starts."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from wina.bench.peers.process import ENGINES, EngineProcess
from wina.bench.peers.workshop import Workshop
from wina.config import SparsityConfig
from wina.errors import WinaError
from wina.registry import Registry


@dataclass(frozen=True)
class Width:
    """Weights of one width, as our engine has it.

    Attributes:
        dtype: of the model: activations, and whatever is not a projection.
        weight_dtype: of the projections, as in :class:`SparsityConfig`.
        exact: whether engines are expected to find the next tokens of the unrounded model.
    """

    dtype: str
    weight_dtype: str | None = None
    exact: bool = True


WIDTHS: Registry[Width] = Registry("weight dtype")
WIDTHS.register("f32")(Width("float32"))
WIDTHS.register("bf16")(Width("bfloat16"))
WIDTHS.register("q8_0")(Width("bfloat16", "int8"))
WIDTHS.register("q4_0")(Width("bfloat16", "int4", exact=False))


def _gguf(shop: Workshop, kind: str) -> dict[str, Any]:
    return {"model": str(shop.gguf(kind))}


@dataclass(frozen=True)
class Peer:
    """An engine in a process of its own.

    Attributes:
        title: for tables.
        engine: file in ``engines/``, without its suffix.
        forms: name of a width → what this engine calls it.
        modules: what its Python must be able to import.
        install: the command that gets them.
        own_python: whether it runs in our Python, where wina and transformers are.
        prepare: (workshop, form) → arguments of its ``Engine`` beside the threads; makes the
            files that are not there yet.
    """

    title: str
    engine: str
    forms: Mapping[str, str]
    modules: tuple[str, ...] = ()
    install: str = ""
    own_python: bool = False
    prepare: Callable[[Workshop, str], dict[str, Any]] = field(default=_gguf, repr=False)

    def missing(self, python: str) -> str | None:
        """Why it cannot run, and what to do; None if it can.

        Raises:
            WinaError: ``python`` is no Python.
        """
        if self.own_python:
            return None
        code = (
            "import importlib.util as u, json, sys;"
            "print(json.dumps([m for m in sys.argv[1:] if u.find_spec(m) is None]))"
        )
        try:
            answer = subprocess.run(
                [python, "-c", code, *self.modules], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError) as error:
            raise WinaError(f"--peer-python {python} does not run: {error}") from None
        absent = json.loads(answer.stdout)
        return f"no {', '.join(absent)} in {python}: {self.install}" if absent else None

    def start(self, python: str, options: Mapping[str, Any], threads: int) -> EngineProcess:
        """Start it on what ``prepare`` returned."""
        environment = {"OMP_NUM_THREADS": str(threads)}
        if self.own_python:
            python = sys.executable
            environment["PYTHONPATH"] = os.pathsep.join(entry or "." for entry in sys.path)
        file = ENGINES / f"{self.engine}.py"
        return EngineProcess(python, file, {**options, "threads": threads}, environment)


def _folder(shop: Workshop, dtype: str) -> dict[str, Any]:
    return {"model": str(shop.source), "dtype": dtype}


PEERS: Registry[Peer] = Registry("peer")
PEERS.register("llama.cpp")(
    Peer(
        title="llama.cpp",
        engine="llama_cpp",
        forms=MappingProxyType({"f32": "f32", "bf16": "bf16", "q8_0": "q8_0", "q4_0": "q4_0"}),
        modules=("xllamacpp",),
        install="pip install xllamacpp",
    )
)
PEERS.register("openvino")(
    Peer(
        title="OpenVINO GenAI",
        engine="openvino_genai",
        # Its reader of GGUF knows no bfloat16; float16 is as wide.
        forms=MappingProxyType({"bf16": "f16", "q8_0": "q8_0", "q4_0": "q4_0"}),
        modules=("openvino_genai", "numpy"),
        install="pip install openvino-genai",
    )
)
PEERS.register("transformers")(
    Peer(
        title="transformers",
        engine="pytorch",
        forms=MappingProxyType({"f32": "float32", "bf16": "bfloat16"}),
        own_python=True,
        prepare=_folder,
    )
)

OURS = Peer(
    title="wina",
    engine="pytorch",
    forms=MappingProxyType({name: WIDTHS[name].dtype for name in WIDTHS}),
    own_python=True,
    prepare=_folder,
)


def own_options(
    shop: Workshop, width: str, method: str, sparsity: float, tokens: int
) -> dict[str, Any]:
    """What OURS starts from; calibrates on ``tokens`` tokens where there is no plan yet."""
    dtype = WIDTHS[width].weight_dtype
    config = SparsityConfig.from_label(
        method,
        sparsity=sparsity,
        calibration_tokens=tokens,
        weight_dtype=dtype,
        rounding=dtype and "nearest",  # quick, and the time is that of any integers
    )
    plan = shop.plan(config)
    return {**OURS.prepare(shop, OURS.forms[width]), "plan": str(plan)}
