"""``wina eval``: the commands that measure quality."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wina.cli_options import (
    CalibrationText,
    CountAs,
    Dtype,
    HeadDtype,
    MeasurementsFolder,
    Model,
    Text,
    Trust,
    WeightDtype,
    documents_of,
    itemsize_of,
    load_model,
    names,
    numbers,
    resolve_model,
    source_note,
)
from wina.errors import WinaError
from wina.files import write_atomically

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode="markdown",
    help="Measure quality. Last stdout line: JSON.",
)

Tasks = Annotated[
    str,
    typer.Option(
        help="By commas: tasks of lm-eval (piqa, arc_easy, ...), `perplexity` or "
        "`perplexity:FILE`, `needle:TOKENS`, `generation` or `generation:FILE`; with a limit of "
        "its own: `boolq@50`."
    ),
]
Data = Annotated[
    Path | None,
    typer.Option(help="Folder of local data for lm-eval's tasks (table: eval/tasks/local.yaml)."),
]
Limit = Annotated[int | None, typer.Option(help="Documents of each task; default: all.")]
Fewshot = Annotated[int | None, typer.Option(help="Examples in a prompt; default: the task's.")]
Output = Annotated[
    Path, typer.Option("--output", "-o", help="Folder for the results: one file a cell.")
]
Texts = Annotated[
    str, typer.Option(help="Files to score, by commas, or `heldout` for the bundled text.")
]
ByCommas = Annotated[str, typer.Option(help="By commas.")]
SettingsOfAll = Annotated[
    str, typer.Option("--set", help="Settings of all methods: calibration_tokens=4096,seed=1.")
]
Window = Annotated[int, typer.Option(help="Tokens in a window of a scored text.")]
TokensOfEach = Annotated[int, typer.Option(help="Tokens of each text to score.")]
BatchSize = Annotated[int, typer.Option(help="Sequences scored at once; no score depends on it.")]
MaxLength = Annotated[int, typer.Option(help="Context in tokens; longer texts are cut.")]


@app.callback()
def eval_grid(
    context: typer.Context,
    model: Model = "demo",
    methods: Annotated[
        str, typer.Option(help="By commas, each with settings of its own: wina/selector=topk.")
    ] = "dense,teal,wina,wina-fisher",
    sparsities: ByCommas = "0.4,0.5,0.65",
    tasks: Tasks = "",
    data: Data = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for the results: one file a cell.")
    ] = None,
    protocol: Annotated[
        str, typer.Option(help="Sparse tokens of a prompt: all, last:0.99, last:0.5, dense.")
    ] = "all",
    limit: Limit = None,
    num_fewshot: Fewshot = None,
    settings: SettingsOfAll = "",
    calibration: CalibrationText = None,
    agreement_tokens: Annotated[
        int, typer.Option(help="Tokens of each task's text to compare with dense on; 0: none.")
    ] = 2048,
    window: Window = 512,
    stride: Annotated[
        int | None, typer.Option(help="New tokens in each window; default: the window.")
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens that `generation` generates.")] = 48,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 2048,
    seed: Annotated[int, typer.Option(help="Of few-shot examples and needles.")] = 1234,
    device: Annotated[
        str, typer.Option(help="cpu, cuda, ... (default: cuda if there is one).")
    ] = "",
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Measure quality: methods × sparsities × tasks, compared with the dense model.

    `wina eval --methods teal,wina --sparsities 0.4,0.5 --tasks piqa,perplexity -o out/eval`

    A cell that the output folder holds is not measured again, so a run that was stopped goes on
    where it was. Last stdout line: JSON.
    """
    if context.invoked_subcommand is not None:
        return
    if output is None:
        print(context.get_help())
        raise typer.Exit(0 if len(sys.argv) <= 2 else 2)
    _quiet_libraries()
    from wina.config import parse_settings
    from wina.eval.columns import columns_of
    from wina.eval.grid import Grid, GridRun
    from wina.eval.measurement import Settings
    from wina.eval.run import open_tasks, print_grid, rows_of

    common = {"prefill": protocol, **parse_settings(names(settings))}
    columns = columns_of(names(methods), numbers(sparsities), common)
    chosen = Settings(limit, num_fewshot, window, stride or window, new_tokens, seed)
    with open_tasks(names(tasks), data) as opened:
        lm = _load(model, dtype, trust_remote_code, device, batch_size, max_length)
        grid = Grid(
            columns, opened, protocol, chosen, agreement_tokens, model,
            {"command": " ".join(["wina", *sys.argv[1:]])},
        )  # fmt: skip
        cells = GridRun(lm, grid, output, documents_of(calibration)).run()
    title = f"{Path(resolve_model(model)).name}: prefill {protocol}, limit {limit}"
    print_grid(title, rows_of(cells), output)


@app.command("verify")
def eval_verify(
    model: Model = "demo",
    tasks: Tasks = "piqa,arc_easy,arc_challenge,winogrande,openbookqa",
    data: Data = None,
    limit: Limit = 20,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = 1,
    max_length: MaxLength = 2048,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Check that the dense model gives the numbers of plain lm-eval, to the last digit."""
    _quiet_libraries()
    from wina.eval.measurement import Settings
    from wina.eval.run import open_tasks
    from wina.eval.verify import print_verification, verify

    with open_tasks(names(tasks), data) as opened:
        loaded, tokenizer = load_model(model, dtype, trust_remote_code)
        rows = verify(
            loaded, tokenizer, opened, Settings(limit, num_fewshot),
            batch_size=batch_size, max_length=max_length,
        )  # fmt: skip
    print_verification(f"{Path(resolve_model(model)).name}, limit {limit}", rows)
    if not all(row["equal"] for row in rows):
        raise typer.Exit(1)


@app.command("vllm")
def eval_vllm(
    model: Annotated[Path, typer.Option(help="Folder that `wina export` has written.")],
    tasks: Tasks = "piqa,arc_easy",
    data: Data = None,
    limit: Limit = 100,
    num_fewshot: Fewshot = None,
    batch_size: BatchSize = 8,
    max_length: MaxLength = 1024,
) -> None:
    """Check that lm-eval's `--model vllm` gives our accuracy, prompts masked in both.

    To be run in vLLM's environment, with lm-eval and wina beside it.
    """
    _quiet_libraries()
    from wina.eval.in_vllm import beside_vllm, print_beside
    from wina.eval.measurement import Settings
    from wina.eval.run import open_tasks

    with open_tasks(names(tasks), data) as opened:
        rows = beside_vllm(model, opened, Settings(limit, num_fewshot), batch_size, max_length)
    print_beside(f"{model.name}, limit {limit}", rows)
    if not all(row["within"] for row in rows):
        raise typer.Exit(1)


@app.command(
    "lm",
    add_help_option=False,
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def eval_lm(context: typer.Context) -> None:
    """lm-eval's own command line (`wina eval lm --help`), which then knows `--model wina`.

    `wina eval lm --model wina --model_args pretrained=PATH,method=wina,sparsity=0.5 --tasks piqa`
    """
    _require_lm_eval()
    from wina.integrations.lm_eval import main

    main(context.args)


def _load(
    model: str, dtype: str, trust: bool, device: str, batch_size: int, max_length: int
) -> Any:
    import torch

    from wina.integrations.lm_eval import WinaLM

    loaded, tokenizer = load_model(model, dtype, trust)
    loaded.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return WinaLM(
        loaded, tokenizer=tokenizer, batch_size=batch_size, max_length=max_length,
        show_progress=sys.stderr.isatty(),
    )  # fmt: skip


def _quiet_libraries() -> None:
    """lm-eval forks after tokenizers were used, which warns at each fork unless told not to."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    _require_lm_eval()


def _require_lm_eval() -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        raise WinaError("this needs lm-eval: pip install 'wina[eval]'") from None


@app.command("ppl")
def eval_ppl(
    model: Model = "demo",
    methods: ByCommas = "dense,teal,wina,wina-fisher",
    sparsities: ByCommas = "0.4,0.5,0.65",
    text: Text = None,
    calibration: CalibrationText = None,
    tokens: Annotated[int, typer.Option(help="Score at most this many; 0: all.")] = 0,
    window: Window = 512,
    selector: Annotated[
        str | None,
        typer.Option(
            help="threshold, importance, relative, topk or statistical; default: the method's."
        ),
    ] = None,
    correction: Annotated[
        str | None, typer.Option(help="Such as none, bias or low-rank; default: the method's.")
    ] = None,
    refinement: Annotated[
        str | None, typer.Option(help="Such as none or learned; default: the method's.")
    ] = None,
    mask: Annotated[str, typer.Option(help="projection or group.")] = "projection",
    statistics: Annotated[str, typer.Option(help="sequential or dense.")] = "sequential",
    prefill: Annotated[str, typer.Option(help="all or last:<share>.")] = "all",
    calibration_tokens: Annotated[int, typer.Option(help="Tokens to calibrate on.")] = 8192,
    dtype: Dtype = "auto",
    weight_dtype: WeightDtype = None,
    head_dtype: HeadDtype = "auto",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            help="Save the JSON here after every row. Rows of the same model, text and settings "
            "that it holds already are not measured again.",
        ),
    ] = None,
    measurements: MeasurementsFolder = None,
    trust_remote_code: Trust = False,
) -> None:
    """Perplexity of methods × sparsities on a text that calibration never saw.

    `wina eval ppl --text wiki.test.raw --methods wina,wina-fisher/weight_dtype=int4+int4`
    """
    from wina.calibration import measurements_in
    from wina.eval.perplexity import (
        compare,
        comparison_document,
        identity_of,
        print_comparison,
        saved_rows,
    )

    loaded, tokenizer = load_model(model, dtype, trust_remote_code)
    title = Path(resolve_model(model)).name
    texts, calibration_texts = documents_of(text), documents_of(calibration)
    settings = {
        "selector": selector,
        "correction": correction,
        "refinement": refinement,
        "mask": mask,
        "statistics": statistics,
        "calibration_tokens": calibration_tokens,
        "weight_dtype": weight_dtype,
    }
    of_text = {"tokens": tokens, "window": window, "prefill": prefill, "head_dtype": head_dtype}
    identity = identity_of(loaded, texts, calibration_texts, {**settings, **of_text})

    def save(rows: list[dict[str, Any]]) -> None:
        if output is not None:
            output.parent.mkdir(parents=True, exist_ok=True)
            document = json.dumps(comparison_document(title, rows, identity), indent=1)
            write_atomically(output, (document + "\n").encode())

    asked = numbers(sparsities)
    rows = compare(
        loaded,
        tokenizer,
        names(methods),
        asked,
        texts=texts,
        calibration=calibration_texts,
        tokens=tokens or None,
        window=window,
        prefill=prefill,
        settings=settings,
        head_dtype=head_dtype,
        after_row=save,
        known=[] if output is None else saved_rows(output, identity),
        measurements=None
        if measurements is None
        else measurements_in(measurements, loaded, calibration_texts, max(asked)),
    )
    print_comparison(title, rows, prefill, identity)


@app.command("ablation")
def eval_ablation(
    output: Output,
    model: Model = "demo",
    texts: Texts = "heldout",
    sparsities: ByCommas = "0.25,0.4,0.5,0.65",
    criteria: ByCommas = "magnitude,norm-power:0.5,l2-norm,l1-norm",
    rotations: ByCommas = "none,orthogonal",
    allocations: ByCommas = "uniform,greedy,fisher",
    selectors: ByCommas = "threshold,relative,topk",
    tokens: TokensOfEach = 8192,
    window: Window = 512,
    settings: SettingsOfAll = "",
    calibration: CalibrationText = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Every criterion × rotation × allocation × selector: which part is worth what.

    `wina eval ablation -o out/ablation --texts wiki.test.raw,novel.txt --tokens 4096`

    Resumable like any grid; what an allocation measures is measured once for all sparsities and
    selectors. Writes ablation.md, ablation.png and ablation.json beside the cells.
    """
    _quiet_libraries()
    from wina.config import parse_settings
    from wina.eval.ablation import Levels, print_ablation, rows_of_ablation, write_ablation
    from wina.eval.columns import columns_of
    from wina.eval.costs import TokenCosts

    levels = Levels(names(criteria), names(rotations), names(allocations), names(selectors))
    common = {"prefill": "all", **parse_settings(names(settings))}
    columns = columns_of(levels.labels(), numbers(sparsities), common)
    lm = _load(model, dtype, trust_remote_code, "", 1, window)
    cells = _run_columns(lm, model, columns, names(texts), tokens, window, output, calibration)
    rows = rows_of_ablation(cells, TokenCosts(lm.model).dense.projections)
    title = f"{Path(resolve_model(model)).name}, {tokens} tokens of {texts}"
    print_ablation(title, rows, write_ablation(output, title, rows))


@app.command("frontier")
def eval_frontier(
    output: Output,
    model: Model = "demo",
    texts: Texts = "heldout",
    methods: Annotated[
        str, typer.Option(help="By commas, each with settings of its own.")
    ] = "teal,wina,wina-fisher",
    sparsities: Annotated[str, typer.Option(help="By commas; 0 is always there.")] = (
        "0.25,0.4,0.5,0.65"
    ),
    count_as: CountAs = "bfloat16",
    widths: Annotated[
        str, typer.Option(help="By commas: loaded (as it is), int8, int4, int4+int4.")
    ] = "loaded,int8,int4,int4+int4",
    tokens: TokensOfEach = 8192,
    window: Window = 512,
    settings: SettingsOfAll = "",
    calibration: CalibrationText = None,
    dtype: Dtype = "auto",
    trust_remote_code: Trust = False,
) -> None:
    """Quality against bytes read per token: weight widths × sparsities × methods.

    `wina eval frontier -o out/frontier --texts wiki.test.raw --methods wina,wina-fisher`

    Bytes are those of all that a token reads: kept rows with their scales, the head, thresholds,
    corrections and rotations. Writes frontier.md, frontier.png and frontier.json beside the cells.
    """
    _quiet_libraries()
    from wina.config import parse_settings
    from wina.eval.costs import TokenCosts
    from wina.eval.frontier import (
        frontier_columns,
        print_frontier,
        rows_of_frontier,
        write_frontier,
    )

    common = {"prefill": "all", **parse_settings(names(settings))}
    columns = frontier_columns(names(methods), names(widths), numbers(sparsities), common)
    lm = _load(model, dtype, trust_remote_code, "", 1, window)
    cells = _run_columns(lm, model, columns, names(texts), tokens, window, output, calibration)
    rows = rows_of_frontier(cells, TokenCosts(lm.model, itemsize_of(count_as)))
    title = f"{Path(resolve_model(model)).name}, {tokens} tokens of {texts}"
    note = source_note(model)
    print_frontier(title, rows, write_frontier(output, title, rows, note), note)


def _run_columns(
    lm: Any,
    model: str,
    columns: list[Any],
    texts: list[str],
    tokens: int,
    window: int,
    output: Path,
    calibration: str | None,
) -> list[dict[str, Any]]:
    """Perplexity of columns on texts, as a resumable grid: all its cells."""
    from wina.eval.grid import Grid, GridRun
    from wina.eval.measurement import Settings
    from wina.eval.run import open_tasks

    with open_tasks([f"perplexity:{text}" for text in texts], None) as opened:
        grid = Grid(
            columns, opened, "all", Settings(max(1, tokens // window), None, window, window),
            tokens, model, {"command": " ".join(["wina", *sys.argv[1:]])},
        )  # fmt: skip
        return GridRun(lm, grid, output, documents_of(calibration)).run()


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
