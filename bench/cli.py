"""``wina bench``: the commands that measure speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from wina.cli_options import load_model, names, numbers, resolve_model
from wina.errors import WinaError

app = typer.Typer(no_args_is_help=True, help="Measure speed. Last stdout line: JSON.")


@app.command("kernels")
def bench_kernels_command(
    shapes: Annotated[str, typer.Option(help="N×K pairs as in 4096x4096,14336x4096")] = "",
    dtypes: Annotated[str, typer.Option(help="By commas.")] = "float32,bfloat16",
    sparsities: Annotated[str, typer.Option(help="By commas.")] = "0,0.5,0.65",
    backend: Annotated[str, typer.Option(help="auto, cpu or reference.")] = "auto",
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 15,
) -> None:
    """Time the operators on cold weights against F.linear and a plain read of the same bytes."""
    from wina.bench.kernels import bench_kernels, print_kernels
    from wina.bench.shapes import PROJECTION_SHAPES

    pairs = [_shape(pair) for pair in names(shapes)]
    rows = bench_kernels(
        pairs or PROJECTION_SHAPES,
        names(dtypes), numbers(sparsities), backend, rounds,
    )  # fmt: skip
    print_kernels(rows)


@app.command("decode")
def bench_decode_command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, hub id or `demo`.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights at a named shape: llama-3.2-1b, …")
    ] = None,
    methods: Annotated[str, typer.Option(help="By commas.")] = "wina",
    sparsities: Annotated[str, typer.Option(help="By commas.")] = "0.5",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 48,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 4,
) -> None:
    """Time `model.generate`: dense transformers against the patched model, in turn."""
    import torch

    from wina.bench.decode import bench_decode, print_decode, random_model
    from wina.config import SparsityConfig

    if (model is None) == (shape is None):
        raise WinaError("pass either --model or --shape")
    tokenizer: Any = None
    texts: Any = None
    if shape is not None:
        loaded: Any = random_model(shape, dtype)
        generator = torch.Generator().manual_seed(1)
        texts = torch.randint(0, loaded.config.vocab_size, (2048,), generator=generator)
        prompt = texts[None, :16]
    else:
        assert model is not None
        loaded, tokenizer = load_model(model, dtype)
        prompt = tokenizer("The history of science is", return_tensors="pt").input_ids
    plans = [
        SparsityConfig(method=m, sparsity=s, calibration_tokens=2048)
        for m in names(methods)
        for s in numbers(sparsities)
    ]
    rows = bench_decode(loaded, plans, prompt, texts, tokenizer, new_tokens, rounds)
    print_decode(shape or Path(resolve_model(str(model))).name, rows)


@app.command("tune")
def bench_tune_command(
    shapes: Annotated[str, typer.Option(help="N×K pairs as in 4096x4096,14336x4096")] = "",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16 or float32.")] = "bfloat16",
    output: Annotated[Path | None, typer.Option(help="Folder; default: the package's.")] = None,
) -> None:
    """Measure launch configurations of the Triton kernels on this card and keep the fastest."""
    from wina.bench.shapes import PROJECTION_SHAPES
    from wina.bench.tune import print_tuned, tune
    from wina.kernels.triton.config import FOLDER

    pairs = [_shape(pair) for pair in names(shapes)]
    print_tuned(tune(pairs or PROJECTION_SHAPES, dtype, folder=output or FOLDER))


def _shape(pair: str) -> tuple[int, int]:
    rows, x, columns = pair.partition("x")
    if not (x and rows.isdigit() and columns.isdigit()):
        raise WinaError(f"{pair!r} is no shape: write N x K as in 4096x4096")
    return int(rows), int(columns)
