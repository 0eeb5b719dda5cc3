"""``wina bench``: the commands that measure speed."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wina.bench.cli_models import decode_command, peers_command, profile_command
from wina.bench.cli_options import (
    Against,
    Compare,
    Output,
    Picture,
    Quick,
    Rounds,
    effort_of,
    finish,
    integers,
    measured,
)
from wina.cli_options import Trust, names, numbers
from wina.errors import WinaError

app = typer.Typer(no_args_is_help=True, help="Measure speed. Last stdout line: JSON.")


@app.command("kernels")
def kernels_command(
    shapes: Annotated[str, typer.Option(help="N×K pairs as in 4096x4096,14336x4096")] = "",
    model_shape: Annotated[
        str, typer.Option(help="Projections of named models, by commas: llama-3-8b,…")
    ] = "",
    operators: Annotated[
        str, typer.Option(help="sparse_linear, sparse_gate_up, dense_linear_rows (lm_head).")
    ] = "sparse_linear",
    dtypes: Annotated[
        str, typer.Option(help="Of hidden states and weights, by commas.")
    ] = "float32,bfloat16",
    weight_dtype: Annotated[
        str, typer.Option(help="Weights as integers instead: int8, int4, by commas.")
    ] = "",
    sparsities: Annotated[str, typer.Option(help="By commas.")] = "0,0.5,0.65",
    tokens: Annotated[str, typer.Option(help="Decoded at once, by commas: 1,2,4,8,16.")] = "1",
    backend: Annotated[
        str, typer.Option(help="`auto`, `all` that accept, or names by commas.")
    ] = "auto",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    rounds: Rounds = None,
    quick: Quick = False,
    picture: Picture = None,
    output: Output = None,
    compare: Compare = None,
    against: Against = None,
) -> None:
    """Time the operators on cold weights against F.linear and a plain read of the same bytes."""
    from wina.bench.kernels import Grid, bench_kernels
    from wina.bench.machine import Neighbours
    from wina.bench.shapes import PROJECTION_SHAPES, QUICK_SHAPES, shapes_of
    from wina.bench.timing import noise_warnings

    pairs = [_shape(pair) for pair in names(shapes)]
    pairs += [pair for name in names(model_shape) for pair in shapes_of(name)]
    grid = Grid(
        tuple(dict.fromkeys(pairs)) or (QUICK_SHAPES if quick else PROJECTION_SHAPES),
        names(operators), names(backend), names(dtypes), names(weight_dtype) or ("",),
        numbers(sparsities), integers(tokens), device,
    )  # fmt: skip
    effort = effort_of(quick, rounds)
    neighbours = Neighbours()
    rows, refusals = bench_kernels(grid, effort)
    warnings = noise_warnings(
        rows, ("operator", "backend", "shape", "dtype", "weight_dtype", "sparsity")
    )
    warnings += neighbours.warnings()
    run = measured(
        "kernels",
        f"{device}, cold weights",
        rows,
        vars(grid),
        warnings,
        effort,
        refusals=refusals,
        other_cores=neighbours.cores,
    )
    finish(run, picture, output, compare, against)


@app.command("roofline")
def roofline_command(
    model: Annotated[
        str, typer.Argument(help="Named shape, folder or hub id; only its config is read.")
    ],
    sparsities: Annotated[str, typer.Option(help="By commas.")] = "0.25,0.4,0.5,0.65",
    device: Annotated[
        str | None, typer.Option(help="h100, h200, a100, rtx-4090, …; `cpu` is measured here.")
    ] = None,
    bandwidth: Annotated[float | None, typer.Option(help="GB/s, instead of a device's.")] = None,
    dtype: Annotated[
        str, typer.Option(help="Of weights: bfloat16, float32, float16, int8, int4.")
    ] = "bfloat16",
    batch: Annotated[int, typer.Option(help="Sequences decoded at once.")] = 1,
    context: Annotated[int, typer.Option(help="Cached tokens of each sequence.")] = 0,
    rotation: Annotated[bool, typer.Option(help="Count WINA's rotated model.")] = False,
    rank: Annotated[int, typer.Option(help="Of a low-rank correction.")] = 0,
    bias: Annotated[bool, typer.Option(help="Count a correcting bias.")] = False,
    efficiency: Annotated[
        float, typer.Option(help="Share of the bandwidth that kernels reach.")
    ] = 1.0,
    dense_tokens_per_s: Annotated[
        float | None, typer.Option(help="Measured dense speed: sets the time that is not bytes.")
    ] = None,
    picture: Picture = None,
    output: Output = None,
    compare: Compare = None,
    trust_remote_code: Trust = False,
) -> None:
    """Count bytes and multiply-adds of a decoded token; predict tokens/s from the bandwidth.

    Reads a config, never weights: 70B and mixture-of-experts models work on paper.
    """
    from wina.bench.devices import device_for
    from wina.bench.operators import DTYPES
    from wina.bench.rates import measured_device
    from wina.bench.roofline import ITEMSIZE, Load, overhead_for, roofline
    from wina.bench.runs import document
    from wina.bench.shapes import load_config
    from wina.bench.structure import meta_model, structure_of
    from wina.bench.tables import kinds_table
    from wina.bench.timing import FULL

    if dtype not in ITEMSIZE:
        raise WinaError(f"unknown dtype {dtype!r}. Known: {', '.join(ITEMSIZE)}.")
    structure = structure_of(meta_model(load_config(model, trust_remote_code)))
    if device == "cpu" and bandwidth is None and dtype in DTYPES:
        card = measured_device(structure, dtype, "cpu", FULL)
    else:
        card = device_for(device, bandwidth, FULL.cold_bytes)
    load = Load(
        batch=batch, context=context, itemsize=ITEMSIZE[dtype],
        cache_itemsize=max(2.0, ITEMSIZE[dtype]), rotation=rotation, rank=rank, bias=bias,
    )  # fmt: skip
    overhead = (
        overhead_for(structure, card, load, dense_tokens_per_s) if dense_tokens_per_s else 0.0
    )
    rows = roofline(structure, card, numbers(sparsities), load, overhead, efficiency)
    for row in rows:
        row.update(batch=batch, context=context)
    name = Path(model).name
    run = document(
        "roofline",
        f"{name}, {dtype}, batch {batch}, context {context}: roofline on {card.name} "
        f"({card.bandwidth_gb_s:,.0f} GB/s, {card.source}; dense products reach "
        f"{card.dense_share:.0%} of it, sparse ones {card.sparse_share:.0%})",
        rows,
        {"dtype": dtype, "rotation": rotation, "rank": rank, "bias": bias,
         "efficiency": efficiency, "overhead_ms": overhead * 1e3},
        model=name,
        device=vars(card),
    )  # fmt: skip
    finish(run, picture, output, compare, None, [kinds_table(rows)])


@app.command("plot")
def plot_command(
    files: Annotated[list[Path], typer.Argument(help="Runs saved with --output.")],
    picture: Annotated[Path, typer.Option("--output", "-o", help="PNG to draw.")] = Path(
        "out/bench.png"
    ),
) -> None:
    """Draw saved runs of one bench: speed-up against sparsity, tokens/s, bytes by kind."""
    from wina.bench.plot import draw
    from wina.bench.runs import load

    draw([load(file) for file in files], picture)
    print(picture)


app.command("decode")(decode_command)
app.command("peers")(peers_command)
app.command("profile")(profile_command)


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
