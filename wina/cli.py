"""The command line: thin wrappers around the library, heavy imports inside the commands.

Every command that measures prints tables for people and ends its stdout with one JSON line;
progress goes to stderr.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wina.errors import WinaError

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Training-free activation sparsity: read only the weights that a token needs.",
    epilog="Start with `wina demo`. Methods: dense, wina, teal, was, wisparse, random.",
    pretty_exceptions_enable=False,
)
bench_app = typer.Typer(no_args_is_help=True, help="Measure speed. Last stdout line: JSON.")
eval_app = typer.Typer(no_args_is_help=True, help="Measure quality. Last stdout line: JSON.")
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")

Model = Annotated[
    str,
    typer.Option("--model", "-m", help="Folder or hub id; `demo` is the bundled demo model."),
]
Dtype = Annotated[
    str, typer.Option(help="Weights as float32, bfloat16, float16, or `auto` (as saved).")
]
Method = Annotated[str, typer.Option(help="Which score decides: wina, teal, was, …")]
Sparsity = Annotated[float, typer.Option(help="Share of input channels to drop, in [0, 1).")]
Trust = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let the model folder run its own code.")
]


def _load(model: str, dtype: str = "auto", trust: bool = False) -> tuple[Any, Any]:
    """(model, tokenizer), on the CPU or wherever transformers puts it."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = _resolve(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
        loaded = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, trust_remote_code=trust)
    except (OSError, ValueError) as error:
        raise WinaError(f"cannot load {path}: {error}") from None
    return loaded.eval(), tokenizer


def _resolve(model: str) -> str:
    from wina.demo_model import DEFAULT, DEMO_MODELS, demo_model_folder

    name = DEFAULT if model == "demo" else model
    return str(demo_model_folder(name)) if name in DEMO_MODELS else model


def _list(values: str) -> list[str]:
    return [value.strip() for value in values.split(",") if value.strip()]


def _numbers(values: str) -> list[float]:
    try:
        return [float(value) for value in _list(values)]
    except ValueError as error:
        raise WinaError(f"expected numbers separated by commas: {error}") from None


@app.command()
def demo(
    model: Model = "demo",
    dtype: Dtype = "auto",
    methods: Annotated[str, typer.Option(help="Methods, separated by commas.")] = "teal,wina",
    sparsities: Annotated[str, typer.Option(help="Sparsities, by commas.")] = "0.4,0.5",
    picture: Annotated[Path, typer.Option(help="Where to draw the PNG.")] = Path("out/demo.png"),
    trust_remote_code: Trust = False,
) -> None:
    """Compare dense and sparse on a real model: quality, speed, text, a picture.

    The demo model (SmolLM2-135M-Instruct, 90 MB) is fetched on first use.
    """
    from wina.demo import draw_demo, print_demo, run_demo

    loaded, tokenizer = _load(model, dtype, trust_remote_code)
    name = Path(_resolve(model)).name
    report = run_demo(loaded, tokenizer, name, _list(methods), _numbers(sparsities))
    picture.parent.mkdir(parents=True, exist_ok=True)
    draw_demo(report, picture)
    print_demo(report, picture)


@app.command("demo-model")
def demo_model(
    name: Annotated[str, typer.Argument(help="smollm2-135m-instruct or gemma-3-270m")] = "demo",
) -> None:
    """Print the folder of a ready demo model, fetching it on first use."""
    from wina.demo_model import DEFAULT, demo_model_folder

    print(demo_model_folder(DEFAULT if name == "demo" else name))


@app.command()
def calibrate(
    output: Annotated[Path, typer.Argument(help="Folder for the plan.")],
    model: Model = "demo",
    method: Method = "wina",
    sparsity: Sparsity = 0.5,
    selector: Annotated[str, typer.Option(help="threshold, relative or topk.")] = "threshold",
    mask: Annotated[
        str, typer.Option(help="One mask per projection, or per group.")
    ] = "projection",
    text: Annotated[Path | None, typer.Option(help="Text file; default: the bundled one.")] = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens to read.")] = 8192,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Calibrate once and keep the plan: thresholds for every projection.

    Use it with `wina.sparsify(model, wina.SparsityPlan.load(folder))`.
    """
    import wina

    config = wina.SparsityConfig(
        method=method, sparsity=sparsity, selector=selector, mask=mask, calibration_tokens=tokens
    )
    loaded, tokenizer = _load(model, dtype, trust_remote_code)
    texts = None if text is None else [_read(text)]
    plan = wina.calibrate(loaded, tokenizer, config, texts)
    plan.save(output)
    print(f"{output}: {method} at {sparsity:.0%}, realised {plan.realised:.3f} on calibration text")


@app.command()
def inspect(
    model: Model = "demo",
    plan: Annotated[Path | None, typer.Option(help="Plan folder; default: look only.")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="JSON instead of a table.")] = False,
    trust_remote_code: Trust = False,
) -> None:
    """List a model's projections, and what a plan does to them."""
    import json

    import wina

    loaded, _ = _load(model, trust=trust_remote_code)
    if plan is not None:
        wina.sparsify(loaded, wina.SparsityPlan.load(plan))
    found = wina.inspect(loaded)
    print(json.dumps(found.to_dict()) if json_output else found)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = "demo",
    plan: Annotated[Path | None, typer.Option(help="Plan folder; default: calibrate now.")] = None,
    method: Method = "wina",
    sparsity: Sparsity = 0.5,
    max_new_tokens: Annotated[int, typer.Option(help="Length of the continuation.")] = 64,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue a prompt greedily with the sparse model, printing tokens as they come."""
    from transformers import TextStreamer

    import wina

    config = wina.SparsityConfig(method=method, sparsity=0.0 if method == "dense" else sparsity)
    loaded, tokenizer = _load(model, dtype, trust_remote_code)
    wina.sparsify(
        loaded, config if plan is None else wina.SparsityPlan.load(plan), tokenizer=tokenizer
    )
    inputs = tokenizer(prompt, return_tensors="pt")
    loaded.generate(
        **inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=TextStreamer(tokenizer)
    )


@bench_app.command("kernels")
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

    pairs = [_shape(pair) for pair in _list(shapes)]
    rows = bench_kernels(
        pairs or PROJECTION_SHAPES,
        _list(dtypes), _numbers(sparsities), backend, rounds,
    )  # fmt: skip
    print_kernels(rows)


@bench_app.command("decode")
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
        loaded, tokenizer = _load(model, dtype)
        prompt = tokenizer("The history of science is", return_tensors="pt").input_ids
    plans = [
        SparsityConfig(method=m, sparsity=s, calibration_tokens=2048)
        for m in _list(methods)
        for s in _numbers(sparsities)
    ]
    rows = bench_decode(loaded, plans, prompt, texts, tokenizer, new_tokens, rounds)
    print_decode(shape or Path(_resolve(str(model))).name, rows)


@eval_app.command("ppl")
def eval_ppl(
    model: Model = "demo",
    methods: Annotated[str, typer.Option(help="By commas.")] = "dense,teal,wina",
    sparsities: Annotated[str, typer.Option(help="By commas.")] = "0.4,0.5,0.65",
    text: Annotated[
        Path | None, typer.Option(help="Text file to score; default: the bundled held-out text.")
    ] = None,
    tokens: Annotated[int, typer.Option(help="Score at most this many; 0: all.")] = 0,
    window: Annotated[int, typer.Option(help="Tokens in one window.")] = 512,
    selector: Annotated[str, typer.Option(help="threshold, relative or topk.")] = "threshold",
    mask: Annotated[str, typer.Option(help="projection or group.")] = "projection",
    statistics: Annotated[str, typer.Option(help="sequential or dense.")] = "sequential",
    prefill: Annotated[str, typer.Option(help="all or last:<share>.")] = "all",
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of methods × sparsities on a text that calibration never saw."""
    from wina.eval.perplexity import compare, print_comparison

    loaded, tokenizer = _load(model, dtype, trust_remote_code)
    texts = None if text is None else [_read(text)]
    rows = compare(
        loaded,
        tokenizer,
        _list(methods),
        _numbers(sparsities),
        texts=texts,
        tokens=tokens or None,
        window=window,
        prefill=prefill,
        settings={
            "selector": selector,
            "mask": mask,
            "statistics": statistics,
            "calibration_tokens": calibration_tokens,
        },
    )
    print_comparison(Path(_resolve(model)).name, rows, prefill)


def _shape(pair: str) -> tuple[int, int]:
    rows, x, columns = pair.partition("x")
    if not (x and rows.isdigit() and columns.isdigit()):
        raise WinaError(f"{pair!r} is no shape: write N x K as in 4096x4096")
    return int(rows), int(columns)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise WinaError(f"cannot read {path}: {error}") from None


def main() -> None:
    """Entry point: expected errors are one line on stderr and exit code 1."""
    try:
        app()
    except WinaError as error:
        print(f"wina: {error}", file=sys.stderr)
        sys.exit(1)
