"""``wina bench``: the commands that measure speed."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from wina.cli_options import Trust, load_model, names, numbers, resolve_model
from wina.errors import WinaError

if TYPE_CHECKING:
    from rich.table import Table

    from wina.bench.timing import Effort

Output = Annotated[Path | None, typer.Option(help="JSON file to save the run to.")]
Compare = Annotated[Path | None, typer.Option(help="Saved run to compare with.")]
Against = Annotated[
    str | None, typer.Option(help="Git ref to measure with the same arguments and compare with.")
]

# Options that make no sense while another git ref is measured.
HERE_ONLY = ("--output", "--compare", "--against", "--picture")
Picture = Annotated[Path | None, typer.Option(help="PNG to draw.")]
Quick = Annotated[bool, typer.Option(help="Show that it runs, in seconds; no claim is made.")]
Rounds = Annotated[int | None, typer.Option(help="Interleaved rounds.")]

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
    effort = _effort(quick, rounds)
    neighbours = Neighbours()
    rows, refusals = bench_kernels(grid, effort)
    warnings = noise_warnings(
        rows, ("operator", "backend", "shape", "dtype", "weight_dtype", "sparsity")
    )
    warnings += neighbours.warnings()
    run = _document(
        "kernels",
        f"{device}, cold weights",
        rows,
        vars(grid),
        warnings,
        effort,
        refusals=refusals,
        other_cores=neighbours.cores,
    )
    _finish(run, picture, output, compare, against)


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
    _finish(run, picture, output, compare, None, [kinds_table(rows)])


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


@app.command("decode")
def decode_command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, hub id or `demo`.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights at a named shape: llama-3.2-1b, …")
    ] = None,
    methods: Annotated[str, typer.Option(help="By commas.")] = "teal,wina",
    sparsities: Annotated[
        str, typer.Option(help="By commas; 0 times our own dense kernel.")
    ] = "0.5",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "float32",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    batch: Annotated[str, typer.Option(help="Sequences at once, by commas.")] = "1",
    context: Annotated[str, typer.Option(help="Tokens of the prompts, by commas.")] = "16",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 48,
    engines: Annotated[
        str, typer.Option(help="By commas: eager (model.generate), wina (wina.decode), compiled.")
    ] = "eager,wina",
    compiled: Annotated[
        bool, typer.Option(help="Also with torch.compile (takes minutes on a CPU).")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds (default 6).")] = None,
    quick: Quick = False,
    picture: Picture = None,
    output: Output = None,
    compare: Compare = None,
    against: Against = None,
    trust_remote_code: Trust = False,
) -> None:
    """Time prefill and decode, dense and sparse in turn: `model.generate` and `wina.decode`."""
    import torch

    from wina.bench.decode import Sweep, bench_decode, calibration_texts, random_model
    from wina.bench.machine import Neighbours
    from wina.bench.timing import noise_warnings
    from wina.config import SparsityConfig
    from wina.threads import thread_warnings

    if (model is None) == (shape is None):
        raise WinaError("pass either --model or --shape")
    if device == "cuda" and not torch.cuda.is_available():
        raise WinaError("device 'cuda' was asked for, but torch sees no GPU")
    sweep = Sweep(
        integers(batch), integers(context), new_tokens,
        tuple(dict.fromkeys([*names(engines), *(["compiled"] if compiled else [])])),
    )  # fmt: skip
    plans = [
        SparsityConfig(method=m, sparsity=s, calibration_tokens=2048)
        for m in names(methods)
        for s in numbers(sparsities)
    ]
    tokenizer: Any = None
    texts: Any = None
    began = time.perf_counter()
    if shape is not None:
        loaded: Any = random_model(shape, dtype)
        texts = calibration_texts(loaded)
    else:
        assert model is not None
        loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    loaded = loaded.to(device)
    load_s = time.perf_counter() - began
    effort = _effort(quick, rounds if quick else rounds or 6)
    neighbours = Neighbours()
    rows = bench_decode(loaded, plans, sweep, tokenizer, texts, effort)
    warnings = noise_warnings(
        [row for row in rows if row["method"] != "dense"],
        ("engine", "method", "sparsity", "batch", "context"),
    )
    warnings += [*neighbours.warnings(), *thread_warnings()]
    name = shape or Path(resolve_model(str(model))).name
    run = _document(
        "decode", f"{name}, {dtype}, {device}: greedy decode", rows, vars(sweep), warnings, effort,
        model=name, other_cores=neighbours.cores, load_s=load_s,
    )  # fmt: skip
    _finish(run, picture, output, compare, against)


@app.command("peers")
def peers_command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder of a Llama, or `demo`.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights at a named shape: llama-3.2-1b, …")
    ] = None,
    weight_dtypes: Annotated[
        str, typer.Option(help="By commas: f32, bf16, q8_0, q4_0.")
    ] = "bf16,q8_0,q4_0",
    peers: Annotated[str, typer.Option(help="By commas.")] = "llama.cpp,openvino,transformers",
    peer_python: Annotated[
        str, typer.Option(help="Python that has the peers' packages; default: this one.")
    ] = sys.executable,
    method: Annotated[str, typer.Option(help="Of our engine.")] = "wina",
    sparsities: Annotated[str, typer.Option(help="Of our engine, by commas.")] = "0.5",
    new_tokens: Annotated[int, typer.Option(help="Tokens to generate.")] = 128,
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 16,
    threads: Annotated[int, typer.Option(help="Of every engine.")] = 2,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds (default 6).")] = None,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="Write files and plans; measure nothing.")
    ] = False,
    quick: Quick = False,
    output: Output = None,
    compare: Compare = None,
) -> None:
    """Time decode of one sequence in llama.cpp, OpenVINO, transformers and wina, in turn.

    Each engine runs in a process of its own. Peers are no dependencies: one that is not installed
    is reported with the command that gets it. They may live in another environment, whose Python
    `--peer-python` names:

    python -m venv peers && peers/bin/pip install xllamacpp openvino-genai
    """
    from wina.bench.machine import Neighbours
    from wina.bench.peers.measure import Contest, bench_peers
    from wina.bench.peers.workshop import Workshop, default_root
    from wina.bench.timing import noise_warnings

    if (model is None) == (shape is None):
        raise WinaError("pass either --model or --shape")
    contest = Contest(
        names(peers), names(weight_dtypes), method, numbers(sparsities), context, new_tokens,
        threads, calibration_tokens=2048 if shape is None else 512,
    )  # fmt: skip
    if shape is not None:
        shop = Workshop.for_shape(shape, default_root())
    else:
        shop = Workshop(Path(resolve_model(str(model))), default_root())
    effort = _effort(quick, rounds if quick else rounds or 6)
    neighbours = Neighbours()
    outcome = bench_peers(shop, contest, peer_python, effort, prepare_only=prepare_only)
    warnings = [f"{m['engine']} is missing: {m['reason']}" for m in outcome.missing]
    warnings += [f"{w['engine']} in {w['dtype']} is wrong: {w['reason']}" for w in outcome.wrong]
    ours = [row for row in outcome.rows if row["method"] != "dense" and "verdict" in row]
    warnings += noise_warnings(ours, ("dtype", "sparsity"))
    warnings += neighbours.warnings()
    name = shape or shop.source.name
    run = _document(
        "peers", f"{name}: greedy decode of one sequence", outcome.rows, vars(contest), warnings,
        effort, model=name, missing=outcome.missing, wrong=outcome.wrong,
        other_cores=neighbours.cores,
    )  # fmt: skip
    _finish(run, None, output, compare)


@app.command("profile")
def profile_command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder, hub id or `demo`.")
    ] = None,
    shape: Annotated[
        str | None, typer.Option(help="Random weights at a named shape: llama-3.2-1b, …")
    ] = None,
    method: Annotated[str, typer.Option(help="wina, teal, …")] = "wina",
    sparsities: Annotated[
        str, typer.Option(help="By commas; `dense` is the model as it was loaded.")
    ] = "dense,0.5",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    weight_dtypes: Annotated[
        str,
        typer.Option(help="Of projections, by commas, each at every sparsity: own, int8, int4."),
    ] = "own",
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens to time.")] = 64,
    picture: Picture = None,
    output: Output = None,
    compare: Compare = None,
    trust_remote_code: Trust = False,
) -> None:
    """Where a decoded token's time goes: products, attention, norms, Python; a stacked bar each."""
    import torch

    from wina.api import sparsify
    from wina.bench.decode import calibration_texts, prompts_for, random_model
    from wina.bench.machine import Neighbours
    from wina.bench.profile import profile_decode
    from wina.bench.runs import document
    from wina.config import SparsityConfig
    from wina.patch import is_patched, restore

    if (model is None) == (shape is None):
        raise WinaError("pass either --model or --shape")
    tokenizer: Any = None
    if shape is not None:
        loaded: Any = random_model(shape, dtype)
    else:
        loaded, tokenizer = load_model(str(model), dtype, trust_remote_code)
    prompt = prompts_for(loaded, tokenizer, 1, context)
    neighbours = Neighbours()
    rows: list[dict[str, Any]] = []
    wanted_rows = [
        (wanted, width)
        for width in names(weight_dtypes)
        for wanted in names(sparsities)
        if width == "own" or wanted != "dense"
    ]
    for wanted, width in wanted_rows:
        dense = wanted == "dense"
        if is_patched(loaded):
            restore(loaded)
        if not dense:
            config = SparsityConfig(
                method=method, sparsity=numbers(wanted)[0], calibration_tokens=2048,
                weight_dtype=None if width == "own" else width,
            )  # fmt: skip
            texts = None if tokenizer else calibration_texts(loaded)
            sparsify(loaded, config, tokenizer=tokenizer, texts=texts, keep_original=True)
        row = {
            "engine": "wina decode",
            "method": "dense" if dense else method,
            "sparsity": 0.0 if dense else numbers(wanted)[0],
            "dtype": dtype,
            "weight_dtype": "" if width == "own" else width,
            "context": context,
            "threads": torch.get_num_threads(),
            **profile_decode(loaded, prompt, new_tokens),
        }
        row["speedup"] = (rows[0] if rows else row)["ms_per_token"] / row["ms_per_token"]
        rows.append(row)
    name = shape or Path(resolve_model(str(model))).name
    run = document(
        "profile", f"{name}, {dtype}: milliseconds of a decoded token", rows,
        {"new_tokens": new_tokens}, neighbours.warnings(), model=name,
        other_cores=neighbours.cores,
    )  # fmt: skip
    _finish(run, picture, output, compare)


def integers(values: str) -> list[int]:
    """Split at commas and read as whole numbers."""
    try:
        return [int(value) for value in names(values)]
    except ValueError as error:
        raise WinaError(f"expected whole numbers separated by commas: {error}") from None


def _effort(quick: bool, rounds: int | None) -> Effort:
    from wina.bench.timing import FULL, QUICK

    effort = QUICK if quick else FULL
    if rounds is None:
        return effort
    if rounds < 1:
        raise WinaError(f"rounds are counted from 1, not {rounds}")
    return replace(effort, rounds=rounds)


def _document(
    bench: str, title: str, rows: list[dict[str, Any]], arguments: Mapping[str, Any],
    warnings: list[str], effort: Effort, **more: Any,
) -> dict[str, Any]:  # fmt: skip
    from wina.bench.runs import document

    settings = {**arguments, "rounds": effort.rounds, "quick": not effort.claims}
    return document(bench, title, rows, settings, warnings, **more)


def _finish(
    run: dict[str, Any], picture: Path | None, output: Path | None, compare: Path | None,
    against: str | None = None, tables: Sequence[Table] = (),
) -> None:  # fmt: skip
    """Draw, show, compare and save a run."""
    from wina.bench.plot import draw
    from wina.bench.tables import publish

    if picture is not None:
        draw([run], picture)
    publish(run, tables, output, compare, against, without_options(sys.argv[1:], HERE_ONLY))


def without_options(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """A command line without some options and their values."""
    kept: list[str] = []
    skip = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        if skip:
            skip = False
        elif name in options:
            skip = not equals
        else:
            kept.append(argument)
    return kept


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
