"""``wina eval``: the commands that measure quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wina.cli_options import (
    Dtype,
    Model,
    Trust,
    load_model,
    names,
    numbers,
    read_text,
    resolve_model,
)
from wina.errors import WinaError

app = typer.Typer(no_args_is_help=True, help="Measure quality. Last stdout line: JSON.")


@app.command("ppl")
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

    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    texts = None if text is None else [read_text(text)]
    rows = compare(
        loaded,
        tokenizer,
        names(methods),
        numbers(sparsities),
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
    print_comparison(Path(resolve_model(model)).name, rows, prefill)


@app.command("report")
def eval_report(
    folder: Annotated[Path, typer.Argument(help="Folder of a grid, finished or not.")],
    output: Annotated[Path | None, typer.Option(help="Where to write; default: FOLDER.")] = None,
    bench: Annotated[
        list[Path] | None,
        typer.Option(help="Run of `wina bench decode --output`, for tokens/s. May be repeated."),
    ] = None,
    open_page: Annotated[bool, typer.Option("--open/--no-open", help="Show the page.")] = False,
) -> None:
    """Write a grid's report: report.html (one page, no network), .md, .csv and .json.

    Methods × sparsities × tasks with standard errors, paired tests against dense, the bytes read,
    agreement with the dense model, and pictures. Decode runs in FOLDER are shown, too.
    """
    try:
        from wina.eval.report.write import print_written, write_report
    except ModuleNotFoundError as error:
        raise WinaError(f"the report needs {error.name}: pip install 'wina[eval]'") from None
    written = write_report(folder, output, bench or ())
    print_written(written)
    if open_page:
        typer.launch(str(written.paths["report.html"]))
