"""The command line: thin wrappers around the library, heavy imports inside the commands.

Every command that measures prints tables for people and ends its stdout with one JSON line, others
have ``--json``; progress and logs go to stderr. Exit codes: 0, 1 for an expected error in one line,
2 for wrong options, 130 after Ctrl-C.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from wina.bench.cli import app as bench_app
from wina.cli_options import (
    CalibrationText,
    CountAs,
    Dtype,
    Head,
    HeadDtype,
    Json,
    MeasurementsFolder,
    Method,
    Model,
    Sparsity,
    Text,
    Tracking,
    Trust,
    WeightDtype,
    config_of,
    documents_of,
    give_rotation,
    itemsize_of,
    load_model,
    names,
    numbers,
    resolve_model,
    source_note,
)
from wina.errors import WinaError
from wina.eval.cli import app as eval_app

if TYPE_CHECKING:
    from wina.plan import SparsityPlan

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="markdown",
    help="Training-free activation sparsity: read only the weights that a token needs.",
    epilog="Start with `wina demo`. The methods to choose from: `wina methods`.",
    pretty_exceptions_enable=False,
)
app.add_typer(bench_app, name="bench")
app.add_typer(eval_app, name="eval")


def _print_version(asked: bool) -> None:
    if asked:
        from wina import __version__

        print(__version__)
        raise typer.Exit


@app.callback()
def common(
    log: Annotated[
        str,
        typer.Option(envvar="WINA_LOG", help="Log to stderr: debug, info, warning, error."),
    ] = "warning",
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    """What all commands share."""
    level = logging.getLevelNamesMapping().get(log.upper())
    if level is None:
        raise WinaError(f"unknown log level {log!r}. Known: debug, info, warning, error.")
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    logging.getLogger("wina").setLevel(level)


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

    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    name = Path(resolve_model(model)).name
    report = run_demo(loaded, tokenizer, name, names(methods), numbers(sparsities))
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


@app.command("methods")
def list_methods(
    json_output: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables of Markdown.")] = False,
) -> None:
    """List the methods, and the parts that they are made of.

    Each part is a field of `wina.SparsityConfig` and can be given to any method:
    `--method wina-fisher/selector=threshold`.
    """
    from wina import catalogue

    if json_output:
        print(json.dumps(catalogue.to_document()))
    elif markdown:
        print(catalogue.to_markdown(), end="")
    else:
        catalogue.show()


@app.command()
def calibrate(
    output: Annotated[Path, typer.Argument(help="Folder for the plan.")],
    model: Model = "demo",
    method: Method = "wina-fisher",
    sparsity: Sparsity = 0.5,
    selector: Annotated[
        str | None,
        typer.Option(
            help="threshold, importance, relative, topk or statistical; default: the method's."
        ),
    ] = None,
    mask: Annotated[
        str, typer.Option(help="One mask per projection, or per group.")
    ] = "projection",
    text: Text = None,
    tokens: Annotated[int, typer.Option(help="Calibration tokens to read.")] = 8192,
    dtype: Dtype = "auto",
    weight_dtype: WeightDtype = None,
    head: Head = "dense",
    tracking: Tracking = 0.0,
    rounding: Annotated[
        str | None,
        typer.Option(
            help="How integers are found: nearest, or gptq, which takes longer and whose plan "
            "holds the weights; default: gptq for int4, nearest for int8."
        ),
    ] = None,
    offload: Annotated[
        Path | None,
        typer.Option(
            help="For models larger than memory: leave the blocks on disk (in the model's files, "
            "or in this folder where those are no safetensors), one in memory at a time. Needs "
            "accelerate."
        ),
    ] = None,
    measurements: MeasurementsFolder = None,
    json_output: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Calibrate once and keep the plan: thresholds for every projection.

    Use it with `wina.sparsify(model, wina.SparsityPlan.load(folder))`.
    """
    import wina
    from wina.calibration import measurements_in
    from wina.plan_file import check_folder

    check_folder(output)
    config = config_of(
        method, sparsity=sparsity, selector=selector, mask=mask, calibration_tokens=tokens,
        weight_dtype=weight_dtype, rounding=rounding, head=head, tracking=tracking,
    )  # fmt: skip
    loaded, tokenizer = load_model(model, dtype, trust_remote_code, offload=offload)
    texts = documents_of(text)
    give_rotation(loaded, config.rotation_spec, tokenizer)
    plan = wina.calibrate(
        loaded, tokenizer, config, texts, offloaded=offload is not None,
        measurements=measurements_in(measurements, loaded, texts) if measurements else None,
    )  # fmt: skip
    try:
        plan.save(output)
    except OSError as error:
        raise WinaError(f"cannot save the plan: {error}") from None
    said = f"{output}: {method} at {sparsity:.0%}, realised {plan.realised:.3f} on calibration text"
    print(json.dumps(_about(output, plan)) if json_output else said)


@app.command()
def export(
    output: Annotated[Path, typer.Argument(help="Folder for weights, plan, tokenizer and card.")],
    model: Model = "demo",
    plan: Annotated[Path | None, typer.Option(help="Plan folder; default: calibrate now.")] = None,
    method: Method = "wina-fisher",
    sparsity: Sparsity = 0.5,
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure quality and speed for the model card.")
    ] = False,
    text: Text = None,
    dtype: Dtype = "auto",
    weight_dtype: WeightDtype = None,
    head: Head = "dense",
    tracking: Tracking = 0.0,
    json_output: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """Write a sparse model as one folder, ready for a model hub.

    `from_pretrained` loads it back sparse after `import wina`, and dense where wina is not
    installed. To publish it: `hf upload NAME/REPOSITORY FOLDER`.
    """
    import shlex

    import wina
    from wina.export import export as write
    from wina.export import measure as measured_figures
    from wina.plan_file import check_folder

    check_folder(output)
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    if plan is None:
        config = config_of(
            method, sparsity=sparsity, weight_dtype=weight_dtype, head=head, tracking=tracking
        )
        give_rotation(loaded, config.rotation_spec, tokenizer)
        found = wina.calibrate(loaded, tokenizer, config, documents_of(text))
    else:
        found = wina.SparsityPlan.load(plan)
        give_rotation(loaded, found.rotation, tokenizer)
    figures = measured_figures(loaded, tokenizer, found) if measure else None
    # The original weights are saved where the plan rounds them: loading rounds them again.
    wina.sparsify(loaded, found, keep_original=True)
    options: dict[str, object] = {"--model": model, "--dtype": dtype, "--plan": plan}
    if plan is None:
        options |= {"--method": method, "--sparsity": sparsity, "--weight-dtype": weight_dtype}
        options |= {} if head == "dense" else {"--head": head}
        options |= {"--tracking": tracking} if tracking else {}
        options |= {"--text": text}
    words = [str(w) for pair in options.items() if pair[1] is not None for w in pair]
    command = shlex.join(["wina", "export", output.name, *words, *["--measure"] * measure])
    write(loaded, tokenizer, output, model, command, figures)
    said = f"{output}: {found.config.method} at {found.config.sparsity:.0%}, with a model card"
    print(json.dumps(_about(output, found)) if json_output else said)


def _about(folder: Path, plan: SparsityPlan) -> dict[str, object]:
    """What ``--json`` says of a plan that was written."""
    return {
        "folder": str(folder), "realised": plan.realised, "model_type": plan.model_type,
        **plan.config.to_dict(), "selector": plan.config.selector_spec,
    }  # fmt: skip


@app.command()
def recommend(
    share: Annotated[
        float | None,
        typer.Option("--bytes", help="Share of the dense model's bytes that a token may read."),
    ] = None,
    max_loss: Annotated[
        float | None, typer.Option(help="Nats per token that may be lost on held-out text.")
    ] = None,
    model: Model = "demo",
    methods: Annotated[
        str,
        typer.Option(
            help="To choose from, by commas, each with settings of its own. wina-plus, minutes for "
            "each trial, is tried where it is named."
        ),
    ] = "wina-fisher,wina-fisher/head=sparse",
    widths: Annotated[
        str,
        typer.Option(help="To choose from, by commas: loaded (as it is), int8, int4, int4+int4."),
    ] = "loaded,int8,int4,int4+int4",
    count_as: CountAs = "bfloat16",
    tokens: Annotated[
        int, typer.Option(help="Tokens to calibrate on, and of held-out text to score.")
    ] = 2048,
    calibration: CalibrationText = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Choose weight width, sparsity and method for a budget of bytes or of loss.

    `wina recommend --model PATH --bytes 0.4` or `wina recommend --model PATH --max-loss 0.05`

    Calibrates and scores a few choices on bundled texts, and says what to expect. Last stdout line:
    JSON.
    """
    from wina.eval.recommend import Adviser, print_recommendation

    if (share is None) == (max_loss is None):
        raise WinaError("give one of --bytes and --max-loss")
    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    adviser = Adviser(
        loaded, tokenizer, names(methods), names(widths), itemsize_of(count_as), tokens,
        texts=documents_of(calibration),
    )  # fmt: skip
    if share is not None:
        title, chosen = f"at most {share:.0%} of the bytes", adviser.for_bytes(share)
    else:
        assert max_loss is not None
        title, chosen = f"at most {max_loss:g} nats lost", adviser.for_loss(max_loss)
    name = Path(resolve_model(model)).name
    print_recommendation(f"{name}: {title}", chosen, adviser.tried, source_note(model))


@app.command()
def inspect(
    model: Model = "demo",
    plan: Annotated[Path | None, typer.Option(help="Plan folder; default: look only.")] = None,
    json_output: Json = False,
    trust_remote_code: Trust = False,
) -> None:
    """List a model's projections, and what a plan does to them."""
    import wina

    loaded, tokenizer = load_model(model, trust=trust_remote_code, sparse=plan is None)
    if plan is not None:
        saved = wina.SparsityPlan.load(plan)
        give_rotation(loaded, saved.rotation, tokenizer)
        wina.sparsify(loaded, saved)
    found = wina.inspect(loaded)
    print(json.dumps(found.to_dict()) if json_output else found)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    model: Model = "demo",
    plan: Annotated[
        Path | None,
        typer.Option(
            help="Plan folder; default: that in the model's folder, unless a method, a sparsity, a "
            "width, a head or a tracking is given; else calibrate now."
        ),
    ] = None,
    method: Annotated[
        str | None, typer.Option(help="As of wina calibrate; default: wina-fisher.")
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Share of input channels to drop; default: 0.5.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write, at most.")] = 64,
    temperature: Annotated[
        float, typer.Option(help="0 takes the likeliest token; 1 samples as the model says.")
    ] = 0.0,
    top_k: Annotated[int, typer.Option(help="Sample from the k likeliest; 0: from all.")] = 0,
    top_p: Annotated[
        float, typer.Option(help="Sample from the likeliest that make up this probability.")
    ] = 1.0,
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 makes tokens that occurred less likely.")
    ] = 1.0,
    stop: Annotated[
        list[str] | None, typer.Option(help="Text that ends the continuation; may be repeated.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    stream: Annotated[bool, typer.Option(help="Print tokens as they come.")] = True,
    json_output: Json = False,
    dtype: Dtype = "auto",
    weight_dtype: WeightDtype = None,
    head: Annotated[
        str | None, typer.Option(help="sparse or dense, as of wina calibrate; default: dense.")
    ] = None,
    tracking: Annotated[
        float | None, typer.Option(help="As of wina calibrate; default: 0.")
    ] = None,
    head_dtype: HeadDtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Continue a prompt, dense (`--method dense`) or sparse, as fast as this machine can.

    A folder of `wina export` brings its plan along; it serves unless you ask for something else.
    bfloat16 reads half of float32's bytes, `--weight-dtype int8` a quarter, and sparsity takes its
    share of either. Speed, the engine that served and why, and memory are told on stderr.
    """
    from wina.decoding.command import Request, run

    asked = {
        "sparsity": sparsity, "weight_dtype": weight_dtype, "head": head, "tracking": tracking
    }  # fmt: skip
    request = Request(
        prompt, model, plan, method, asked, dtype, head_dtype, trust_remote_code,
        stream and not json_output, json_output, seed,
        {
            "max_new_tokens": max_new_tokens,
            "do_sample": temperature != 0,
            **({"temperature": temperature, "top_k": top_k, "top_p": top_p} if temperature else {}),
            "repetition_penalty": repetition_penalty,
            "stop_strings": stop or None,
        },
    )  # fmt: skip
    run(request)


def main() -> None:
    """Entry point: expected errors are one line on stderr and exit code 1."""
    try:
        app()
    except WinaError as error:
        print(f"wina: {error}", file=sys.stderr)
        sys.exit(1)
