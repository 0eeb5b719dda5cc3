"""Decode and prefill of whole models: dense transformers against patched ones, in turn."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from wina.api import sparsify
from wina.bench.generation import (
    ENGINES,
    Engine,
    Generation,
    decode_seconds,
    generate,
    model_bytes,
    peak_memory,
)
from wina.bench.operators import DTYPES
from wina.bench.rates import measured_device
from wina.bench.roofline import Load, byte_ideal, cost, overhead_for
from wina.bench.shapes import shape_config
from wina.bench.structure import Structure, structure_of
from wina.bench.timing import FULL, Effort, Timing, claim, compare, interleave, ratio
from wina.config import SparsityConfig
from wina.errors import ConfigError
from wina.inspection import measure_sparsity
from wina.patch import restore
from wina.plan import SparsityPlan
from wina.texts import bundled, to_windows

__all__ = ["Sweep", "bench_decode", "decode_seconds", "prompts_for", "random_model"]


SIDES = ("dense", "sparse")


@dataclass(frozen=True)
class Sweep:
    """What to generate: every combination of these.

    Attributes:
        batches: sequences at once.
        contexts: tokens of the prompts.
        new_tokens: of each sequence.
        engines: names of :data:`wina.bench.generation.ENGINES`; ``"eager:dense"`` is for the dense
            model only, ``"wina:sparse"`` for the patched one only.
    """

    batches: Sequence[int] = (1,)
    contexts: Sequence[int] = (16,)
    new_tokens: int = 48
    engines: Sequence[str] = ("eager",)

    def __post_init__(self) -> None:
        if self.new_tokens < 3:
            raise ConfigError("new_tokens is at least 3: a first one, and two to time")
        if min((*self.batches, *self.contexts), default=0) < 1:
            raise ConfigError("batches and contexts are counted from 1")
        for name in self.engines:
            engine, _, side = name.partition(":")
            ENGINES[engine]
            if side not in ("", *SIDES):
                raise ConfigError(f"{name!r}: an engine is for {' or '.join(SIDES)}, or for both")
        for side in SIDES:
            if not self.engines_of(side):
                raise ConfigError(f"no engine is for the {side} model")

    def engines_of(self, side: str) -> list[str]:
        """Names of the engines that a model is run by; ``side`` is one of ``SIDES``."""
        parts = [name.partition(":") for name in self.engines]
        return [engine for engine, _, only in parts if only in ("", side)]

    def loads(self) -> list[tuple[int, int]]:
        """(batch, context) of every generation."""
        return [(b, c) for b in self.batches for c in self.contexts]


def random_model(shape: str, dtype: str) -> nn.Module:
    """A model of a named shape with random weights."""
    import transformers

    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}. Known: {', '.join(DTYPES)}.")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(shape_config(shape), dtype=DTYPES[dtype])
    module: nn.Module = model.eval()
    return module


def calibration_texts(model: nn.Module) -> Tensor:
    """Random token ids [2048] to calibrate a model of random weights on."""
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    return torch.randint(0, vocabulary, (2048,), generator=torch.Generator().manual_seed(1))


def prompts_for(model: nn.Module, tokenizer: Any | None, batch: int, context: int) -> Tensor:
    """Prompts [batch, context]: held-out text, repeated where short; random without a tokenizer."""
    vocabulary: int = model.config.vocab_size  # type: ignore[union-attr, assignment]
    needed = batch * context
    if tokenizer is None:
        generator = torch.Generator().manual_seed(1)
        return torch.randint(0, vocabulary, (batch, context), generator=generator)
    windows = to_windows(bundled("heldout"), tokenizer, context, needed)
    tokens = torch.cat([window.flatten() for window in windows])
    return tokens.repeat(-(-needed // len(tokens)))[:needed].view(batch, context)


@dataclass(frozen=True)
class _Runs:
    """All rounds of one contender under one load."""

    generations: tuple[Generation, ...]
    working: int | None
    peak: int

    @property
    def decode(self) -> Timing:
        return Timing(tuple(g.step_s for g in self.generations))

    @property
    def first(self) -> Timing:
        return Timing(tuple(g.first_s for g in self.generations))

    def __add__(self, other: _Runs) -> _Runs:
        return _Runs(
            self.generations + other.generations,
            None
            if None in (self.working, other.working)
            else max(self.working or 0, other.working or 0),
            max(self.peak, other.peak),
        )


def bench_decode(
    model: nn.Module,
    plans: Sequence[SparsityPlan | SparsityConfig],
    sweep: Sweep,
    tokenizer: Any | None = None,
    texts: Any = None,
    effort: Effort = FULL,
    show_progress: bool = True,
    predict: bool = True,
) -> list[dict[str, Any]]:
    """Time prefill and greedy decode of the dense model and of every plan, in turn.

    The dense model is timed as transformers loads it, beside a patched copy, so both are in
    memory at once, but for embeddings and head, which they share. A plan of sparsity 0 gives
    ``speedup_vs_own_dense`` to the others of its method.

    Args:
        model: a dense decoder.
        plans: plans, or configs to calibrate with.
        sweep: batches, contexts, engines.
        tokenizer: the model's; None for random prompts and calibration ``texts`` of token ids.
        texts: calibration texts, see :func:`wina.calibrate`.
        effort: how many rounds.
        show_progress: draw progress on stderr.
        predict: measure single operators first, for ``predicted_speedup``.

    Returns:
        Dense rows, then sparse ones, of {engine, method, sparsity, realised, dtype, batch,
        context, new_tokens, threads, first_token_ms, prefill_tokens_per_s, prefill_vs_dense,
        tokens_per_s, ms_per_step, ms_p50, ms_p95, speedup_vs_dense, speedup_vs_best_dense,
        speedup_vs_own_dense, byte_ideal, predicted_speedup, low, high, uncertainty, rounds,
        verdict, spread, weights_gib, working_gib, memory_gib, peak_gib}. ``byte_ideal`` is dense
        bytes over the bytes that the sparse model reads at the sparsity realised in this very
        run; ``speedup_vs_dense`` is over the same engine where it ran the dense model, else over
        the fastest that did; ``predicted_speedup`` comes from the rates that single operators
        reach, measured before, and adds the time of dense decode that they do not explain.
    """
    bench = _Bench(model, sweep, effort, tokenizer, show_progress, predict)
    patched = _beside(model)
    for asked in plans:
        plan = sparsify(
            patched, asked, show_progress=show_progress,
            **({"tokenizer": tokenizer, "texts": texts} if isinstance(asked, SparsityConfig)
               else {}),
        )  # fmt: skip
        bench.add(patched, plan)
        restore(patched)
    return bench.rows()


def _beside(model: nn.Module) -> nn.Module:
    """A copy that shares what no plan changes and is large."""
    ends = (model.get_input_embeddings(), model.get_output_embeddings())  # type: ignore[operator]
    shared = {id(p): p for module in ends if module is not None for p in module.parameters()}
    return copy.deepcopy(model, shared)


class _Bench:
    """Gathers the rounds of all plans, then makes rows of them."""

    def __init__(
        self, model: nn.Module, sweep: Sweep, effort: Effort, tokenizer: Any | None,
        show_progress: bool, predict: bool,
    ) -> None:  # fmt: skip
        self.model, self.sweep, self.effort = model, sweep, effort
        self.show_progress = show_progress
        parameter = next(model.parameters())
        self.device = parameter.device
        self.dtype = str(parameter.dtype).removeprefix("torch.")
        self.itemsize = parameter.itemsize
        self.structure: Structure = structure_of(model)
        self.prompts = {
            load: prompts_for(model, tokenizer, *load).to(self.device) for load in sweep.loads()
        }
        self.memory = (
            measured_device(self.structure, self.dtype, self.device.type, effort, show_progress)
            if predict
            else None
        )
        self.dense: dict[tuple[str, tuple[int, int]], _Runs] = {}
        self.sparse_rows: list[dict[str, Any]] = []

    def add(self, patched: nn.Module, plan: SparsityPlan) -> None:
        """Time one plan under every load, dense and sparse of all engines in turn."""
        label = f"{plan.config.label} at {plan.config.sparsity:.0%}"
        for load, prompt in self.prompts.items():
            with measure_sparsity(patched) as counter:
                generate(patched, prompt, min(self.sweep.new_tokens, 16))
            title = f"decoding {label}, batch {load[0]}, context {load[1]}"
            runs = self._interleave(patched, prompt, title)
            dense = {name: runs[name, "dense"] for name in self.sweep.engines_of("dense")}
            for name, run in dense.items():
                key = (name, load)
                self.dense[key] = self.dense[key] + run if key in self.dense else run
            best = _fastest(dense)
            for name in self.sweep.engines_of("sparse"):
                row = self._row(
                    ENGINES[name], load, runs[name, "sparse"], plan, counter.mean,
                    dense.get(name, best),
                )  # fmt: skip
                row["speedup_vs_best_dense"] = ratio(best.decode, runs[name, "sparse"].decode)
                row["weights_gib"] = model_bytes(patched) / 2**30
                self.sparse_rows.append(row)

    def _interleave(
        self, patched: nn.Module, prompt: Tensor, title: str
    ) -> dict[tuple[str, str], _Runs]:
        models = {"dense": self.model, "sparse": patched}
        found: dict[tuple[str, str], list[Generation]] = {}
        memory: dict[tuple[str, str], tuple[int | None, int]] = {}
        contenders: dict[str, Callable[[], float | None]] = {}
        # All models of a class share one cache of compiled code, which is small and fails silently.
        torch.compiler.reset()
        with ExitStack() as stack:
            for side, module in models.items():
                for name in self.sweep.engines_of(side):
                    run = stack.enter_context(ENGINES[name].on(module))
                    kept = found.setdefault((name, side), [])

                    def once(
                        run: Callable[[Tensor, int], Generation] = run,
                        kept: list[Generation] = kept,
                    ) -> float:
                        kept.append(run(prompt, self.sweep.new_tokens))
                        return kept[-1].step_s

                    contenders[f"{name} {side}"] = once
                    memory[name, side] = peak_memory(
                        lambda run=run: run(prompt, self.sweep.new_tokens),  # type: ignore[misc]
                        self.device,
                    )
            # The run that measured memory has warmed each up.
            interleave(contenders, self.effort.rounds, title, self.show_progress, warm=True)
        return {key: _Runs(tuple(every), *memory[key]) for key, every in found.items()}

    def rows(self) -> list[dict[str, Any]]:
        """Dense rows, then sparse ones."""
        rows = []
        for (name, load), runs in self.dense.items():
            row = self._row(ENGINES[name], load, runs, None, 0.0, runs)
            row["weights_gib"] = model_bytes(self.model) / 2**30
            best = _fastest({n: r for (n, other), r in self.dense.items() if other == load})
            row["speedup_vs_best_dense"] = ratio(best.decode, runs.decode)
            rows.append(row)
        rows += self.sparse_rows
        for row in rows:
            own = _own_dense(row, self.sparse_rows)
            row["speedup_vs_own_dense"] = (
                row["speedup_vs_dense"] / own["speedup_vs_dense"] if own else None
            )
            working = row["working_gib"]
            row["memory_gib"] = None if working is None else row["weights_gib"] + working
        return rows

    def _row(
        self, engine: Engine, load: tuple[int, int], runs: _Runs, plan: SparsityPlan | None,
        realised: float, dense: _Runs,
    ) -> dict[str, Any]:  # fmt: skip
        batch, context = load
        steps = sorted(1e3 * s for g in runs.generations for s in g.steps_s)
        decode = runs.decode
        against = compare(dense.decode, decode)
        work = Load(
            sparsity=realised,
            batch=batch,
            context=context + self.sweep.new_tokens // 2,
            cache_itemsize=self.itemsize,
        )
        return {
            "engine": engine.name,
            "method": plan.config.label if plan else "dense",
            "sparsity": plan.config.sparsity if plan else 0.0,
            "realised": realised,
            "dtype": self.dtype,
            "batch": batch,
            "context": context,
            "new_tokens": self.sweep.new_tokens,
            "threads": torch.get_num_threads(),
            "first_token_ms": runs.first.median * 1e3,
            "prefill_tokens_per_s": batch * context / runs.first.median,
            "prefill_vs_dense": ratio(dense.first, runs.first),
            "tokens_per_s": batch / decode.median,
            "ms_per_step": decode.median * 1e3,
            "ms_p50": statistics.median(steps),
            "ms_p95": steps[min(len(steps) - 1, round(0.95 * len(steps)))],
            "speedup_vs_dense": against.ratio,
            "byte_ideal": byte_ideal(self.structure, work),
            "predicted_speedup": self._predicted(
                work, plan is not None, batch / dense.decode.median
            ),
            **claim(against, self.effort),
            "spread": decode.spread,
            "working_gib": None if runs.working is None else runs.working / 2**30,
            "peak_gib": runs.peak / 2**30,
        }

    def _predicted(self, work: Load, patched: bool, dense_tokens_per_s: float) -> float | None:
        if self.memory is None:
            return None
        overhead = overhead_for(self.structure, self.memory, work, dense_tokens_per_s)
        dense = cost(self.structure, work.dense).seconds(self.memory, overhead)
        step = replace(cost(self.structure, work), sparse=patched)  # at sparsity 0, too
        return dense / step.seconds(self.memory, overhead)


def _fastest(runs: Mapping[str, _Runs]) -> _Runs:
    """The fastest run among transformers' engines; among ours where there is no other."""
    theirs = [run for name, run in runs.items() if not ENGINES[name].ours]
    return min(theirs or runs.values(), key=lambda r: r.decode.median)


def _own_dense(row: dict[str, Any], rows: Sequence[dict[str, Any]]) -> dict[str, Any] | None:
    """The row of the same method, engine and load at sparsity 0, if it was asked for."""
    same = ("engine", "method", "batch", "context")
    return next(
        (r for r in rows if r["sparsity"] == 0.0 and all(r[f] == row[f] for f in same)), None
    )
