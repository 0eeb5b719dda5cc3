"""``wina eval``: the commands that measure quality."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from wina.cli_options import (
    Dtype,
    Model,
    Trust,
    WeightDtype,
    load_model,
    names,
    numbers,
    read_text,
    resolve_model,
)

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
    weight_dtype: WeightDtype = None,
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
            "weight_dtype": weight_dtype,
        },
    )
    print_comparison(Path(resolve_model(model)).name, rows, prefill)
