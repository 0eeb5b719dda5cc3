"""Options and readers that the commands of all areas share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wina.errors import WinaError

if TYPE_CHECKING:
    from wina.config import SparsityConfig

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Folder or hub id; `demo` is the bundled demo model."),
]
Dtype = Annotated[
    str, typer.Option(help="Weights as float32, bfloat16, float16, or `auto` (as saved).")
]


def _methods() -> list[str]:
    from wina.methods import METHODS

    return list(METHODS)


Method = Annotated[
    str,
    typer.Option(
        help="What decides: wina, teal, was, …, all in `wina methods`; with settings of its own "
        "after slashes: wina-fisher/selector=threshold.",
        autocompletion=_methods,
    ),
]
Sparsity = Annotated[float, typer.Option(help="Share of input channels to drop, in [0, 1).")]
WeightDtype = Annotated[
    str | None,
    typer.Option(
        help="Keep the projections' weights as int8 (to the nearest), int4 (GPTQ while "
        "calibrating, see --rounding of `wina calibrate`) or int4+int4 (of each channel a token "
        "reads 8, 4 or no bits; the sparsity is the share of all bits that is not read); "
        "default: as loaded."
    ),
]
Head = Annotated[
    str,
    typer.Option(
        help="sparse makes the language-model head one of the projections: it gets a share of the "
        "sparsity, and their width."
    ),
]
Tracking = Annotated[
    float,
    typer.Option(
        help="Rate at which cut-offs follow the text, so that the share that is dropped stays "
        "what was asked for on any text; 0.03 is enough, 0: they stay."
    ),
]
HeadDtype = Annotated[
    str,
    typer.Option(
        help="How decoding reads a dense language-model head: model (as it is), int8, int4, or "
        "auto: int8 where the projections are integers."
    ),
]
CountAs = Annotated[
    str,
    typer.Option(
        help="Weights that are not rounded count with the bytes of this type, whatever they are "
        "evaluated in: bfloat16, float16, float32."
    ),
]
_FILE = "a text file, or .jsonl with a field text, page or content, each maybe .gz"
Text = Annotated[str | None, typer.Option(help=f"What to read: {_FILE}; default: a bundled text.")]
CalibrationText = Annotated[
    str | None,
    typer.Option(
        "--calibration",
        help=f"What to calibrate on: {_FILE}, or with instruction, input, output. Several by "
        "commas, `calibration` for the bundled one, FILE@200 for 200 documents of a file; default: "
        "the bundled one.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout instead of text.")]
MeasurementsFolder = Annotated[
    Path | None,
    typer.Option(
        "--measurements",
        help="Folder for what allocations measure and for weights rounded by gptq: a run that was "
        "stopped finds them there, and one at another sparsity the measurements.",
    ),
]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model folder run its own code.")
]


def load_model(
    model: str,
    dtype: str = "auto",
    trust: bool = False,
    sparse: bool = False,
    offload: Path | None = None,
) -> tuple[Any, Any]:
    """(model, tokenizer), on the CPU or wherever transformers puts it.

    A folder with a plan of its own gives a sparse model where ``sparse`` says so, else a dense one.
    With ``offload`` its blocks stay on disk, in its own files or in this folder, and come to memory
    for a call.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    from wina.saving import QUANT_METHOD

    logging.disable_progress_bar()
    path = resolve_model(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
        quantization = getattr(config, "quantization_config", None) or {}
        if not sparse and quantization.get("quant_method") == QUANT_METHOD:
            del config.quantization_config
        where = {} if offload is None else _blocks_on_disk(config, trust, offload)
        loaded = AutoModelForCausalLM.from_pretrained(
            path, config=config, dtype=dtype, trust_remote_code=trust, **where
        )
    except (OSError, ValueError, ImportError) as error:
        raise WinaError(f"cannot load {path}: {error}") from None
    return loaded.eval(), tokenizer


def _blocks_on_disk(config: Any, trust: bool, folder: Path) -> dict[str, Any]:
    """Arguments for ``from_pretrained``: the decoder blocks on disk, the rest on a GPU or here."""
    import torch
    from transformers import AutoModelForCausalLM

    from wina.projections import decoder_blocks

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config, trust_remote_code=trust)
    blocks = [name for name, _ in decoder_blocks(empty)]
    here: int | str = 0 if torch.cuda.is_available() else "cpu"
    places: dict[str, int | str] = {}

    def place(name: str, module: torch.nn.Module) -> None:
        if name in blocks:
            places[name] = "disk"
        elif any(block.startswith(f"{name}.") for block in blocks) or not name:
            for child, inner in module.named_children():
                place(f"{name}.{child}".lstrip("."), inner)
        else:
            places[name] = here

    place("", empty)
    return {"device_map": places, "offload_folder": str(folder)}


def give_rotation(model: Any, spec: str, tokenizer: Any) -> None:
    """Rotate a loaded model for good, if a method or a plan asks for it."""
    from wina.rotation import NO_ROTATION, rotate

    if spec != NO_ROTATION:
        rotate(model, spec, tokenizer=tokenizer)


def resolve_model(model: str) -> str:
    """A folder or hub id; the names of demo models become their folders."""
    from wina.demo_model import DEFAULT, DEMO_MODELS, demo_model_folder

    name = DEFAULT if model == "demo" else model
    return str(demo_model_folder(name)) if name in DEMO_MODELS else model


def itemsize_of(dtype: str) -> float:
    """Bytes of an element of a type."""
    from wina.bench.roofline import ITEMSIZE

    if dtype not in ITEMSIZE:
        raise WinaError(f"unknown type {dtype!r}. Known: {', '.join(ITEMSIZE)}.")
    return ITEMSIZE[dtype]


def source_note(model: str) -> str:
    """What must be known of a demo model's weights before its rounded rows are read, or nothing."""
    from wina.demo_model import DEMO_MODELS

    name = Path(resolve_model(model)).name
    if name not in DEMO_MODELS:
        return ""
    return (
        f"The weights of {name} come from a file of {DEMO_MODELS[name].weights}: rounding them "
        "again loses less, or other, than rounding a full checkpoint would."
    )


def names(values: str) -> list[str]:
    """Split at commas."""
    return [value.strip() for value in values.split(",") if value.strip()]


def numbers(values: str) -> list[float]:
    """Split at commas and read as numbers."""
    try:
        return [float(value) for value in names(values)]
    except ValueError as error:
        raise WinaError(f"expected numbers separated by commas: {error}") from None


def config_of(method: str, **options: Any) -> SparsityConfig:
    """The settings of a command.

    Args:
        method: may have settings of its own, as of :func:`wina.config.settings_of`; they win.
        **options: fields of :class:`wina.SparsityConfig`, None for what is not said.
    """
    from wina.config import SparsityConfig

    given = {name: value for name, value in options.items() if value is not None}
    return SparsityConfig.from_label(method, **given)


def documents_of(source: str | None) -> list[str] | None:
    """The documents that an option names, None for the bundled ones."""
    from wina.texts import read_documents

    return None if source is None else read_documents(source)
