"""``wina bench decode``, ``peers`` and ``profile``: the commands that run whole models."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from wina.bench.cli_options import (
    Against,
    Compare,
    Model,
    Output,
    Picture,
    Quick,
    Shape,
    check_subject,
    effort_of,
    finish,
    integers,
    measured,
)
from wina.cli_options import Trust, load_model, names, numbers, resolve_model
from wina.errors import WinaError


def decode_command(
    model: Model = None,
    shape: Shape = None,
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
        str,
        typer.Option(
            help="By commas: eager (model.generate), wina (wina.decode), compiled; with `:dense` "
            "or `:sparse` for that model only."
        ),
    ] = "eager,wina",
    compiled: Annotated[
        bool, typer.Option(help="Also with torch.compile (takes minutes on a CPU).")
    ] = False,
    rounds: Annotated[int | None, typer.Option(help="Interleaved rounds (default 6).")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 2048,
    cached: Annotated[
        bool,
        typer.Option("--cached", help="Keep a shape's model and plans in the cache, as `peers`."),
    ] = False,
    prepare_only: Annotated[
        bool, typer.Option("--prepare-only", help="With --cached: make them; measure nothing.")
    ] = False,
    predict: Annotated[
        bool, typer.Option(help="Measure single operators first, for a prediction.")
    ] = True,
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
    from wina.bench.peers.workshop import Workshop, default_root
    from wina.bench.timing import noise_warnings
    from wina.config import SparsityConfig
    from wina.plan import SparsityPlan
    from wina.threads import thread_warnings

    check_subject(model, shape)
    if device == "cuda" and not torch.cuda.is_available():
        raise WinaError("device 'cuda' was asked for, but torch sees no GPU")
    sweep = Sweep(
        integers(batch), integers(context), new_tokens,
        tuple(dict.fromkeys([*names(engines), *(["compiled"] if compiled else [])])),
    )  # fmt: skip
    if cached and shape is None:
        raise WinaError("--cached is for --shape")
    plans: list[Any] = [
        SparsityConfig.from_label(m, sparsity=s, calibration_tokens=calibration_tokens)
        for m in names(methods)
        for s in numbers(sparsities)
    ]
    tokenizer: Any = None
    texts: Any = None
    began = time.perf_counter()
    loaded: Any
    if shape is not None and cached:
        shop = Workshop.for_shape(shape, default_root())
        saved = [shop.plan(plan) for plan in plans]
        shop.release()
        if prepare_only:
            return
        plans = [SparsityPlan.load(folder) for folder in saved]
        loaded = shop.load(dtype)
    elif shape is not None:
        loaded = random_model(shape, dtype)
        texts = calibration_texts(loaded)
    else:
        assert model is not None
        loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    loaded = loaded.to(device)
    load_s = time.perf_counter() - began
    effort = effort_of(quick, rounds if quick else rounds or 6)
    neighbours = Neighbours()
    rows = bench_decode(loaded, plans, sweep, tokenizer, texts, effort, predict=predict)
    warnings = noise_warnings(
        [row for row in rows if row["method"] != "dense"],
        ("engine", "method", "sparsity", "batch", "context"),
    )
    warnings += [*neighbours.warnings(), *thread_warnings()]
    name = shape or Path(resolve_model(str(model))).name
    run = measured(
        "decode", f"{name}, {dtype}, {device}: greedy decode", rows, vars(sweep), warnings, effort,
        model=name, other_cores=neighbours.cores, load_s=load_s,
    )  # fmt: skip
    finish(run, picture, output, compare, against)


def peers_command(
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Folder of a Llama, or `demo`.")
    ] = None,
    shape: Shape = None,
    weight_dtypes: Annotated[
        str, typer.Option(help="By commas: f32, bf16, q8_0, q4_0.")
    ] = "bf16,q8_0,q4_0",
    peers: Annotated[str, typer.Option(help="By commas.")] = "llama.cpp,openvino,transformers",
    peer_python: Annotated[
        str, typer.Option(help="Python that has the peers' packages; default: this one.")
    ] = sys.executable,
    method: Annotated[
        str, typer.Option(help="Of our engine, such as wina or wina/head=sparse.")
    ] = "wina",
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

    check_subject(model, shape)
    contest = Contest(
        names(peers), names(weight_dtypes), method, numbers(sparsities), context, new_tokens,
        threads, calibration_tokens=2048 if shape is None else 512,
    )  # fmt: skip
    if shape is not None:
        shop = Workshop.for_shape(shape, default_root())
    else:
        shop = Workshop(Path(resolve_model(str(model))), default_root())
    effort = effort_of(quick, rounds if quick else rounds or 6)
    neighbours = Neighbours()
    outcome = bench_peers(shop, contest, peer_python, effort, prepare_only=prepare_only)
    warnings = [f"{m['engine']} is missing: {m['reason']}" for m in outcome.missing]
    warnings += [f"{w['engine']} in {w['dtype']} is wrong: {w['reason']}" for w in outcome.wrong]
    ours = [row for row in outcome.rows if row["method"] != "dense" and "verdict" in row]
    warnings += noise_warnings(ours, ("dtype", "sparsity"))
    warnings += neighbours.warnings()
    name = shape or shop.source.name
    run = measured(
        "peers", f"{name}: greedy decode of one sequence", outcome.rows, vars(contest), warnings,
        effort, model=name, missing=outcome.missing, wrong=outcome.wrong,
        other_cores=neighbours.cores,
    )  # fmt: skip
    finish(run, None, output, compare)


def profile_command(
    model: Model = None,
    shape: Shape = None,
    method: Annotated[str, typer.Option(help="wina, teal, wina/head=sparse, …")] = "wina",
    sparsities: Annotated[
        str, typer.Option(help="By commas; `dense` is the model as it was loaded.")
    ] = "dense,0.5",
    dtype: Annotated[str, typer.Option(help="float32, bfloat16 or float16.")] = "bfloat16",
    weight_dtypes: Annotated[
        str,
        typer.Option(
            help="Of projections, by commas, each at every sparsity: own, int8, int4, int4+int4."
        ),
    ] = "own",
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens to time.")] = 64,
    picture: Picture = None,
    output: Output = None,
    compare: Compare = None,
    trust_remote_code: Trust = False,
) -> None:
    """Where a decoded token's time goes: products, attention, norms, Python; a stacked bar each."""
    from wina.bench.decode import prompts_for, random_model
    from wina.bench.machine import Neighbours
    from wina.bench.profile import profile_rows
    from wina.bench.runs import document

    check_subject(model, shape)
    tokenizer: Any = None
    if shape is not None:
        loaded: Any = random_model(shape, dtype)
    else:
        loaded, tokenizer = load_model(str(model), dtype, trust_remote_code)
    prompt = prompts_for(loaded, tokenizer, 1, context)
    neighbours = Neighbours()
    rows = profile_rows(
        loaded, tokenizer, prompt, new_tokens, method,
        [None if wanted == "dense" else numbers(wanted)[0] for wanted in names(sparsities)],
        [None if width == "own" else width for width in names(weight_dtypes)],
    )  # fmt: skip
    name = shape or Path(resolve_model(str(model))).name
    run = document(
        "profile", f"{name}, {dtype}: milliseconds of a decoded token", rows,
        {"new_tokens": new_tokens}, neighbours.warnings(), model=name,
        other_cores=neighbours.cores,
    )  # fmt: skip
    finish(run, picture, output, compare)
