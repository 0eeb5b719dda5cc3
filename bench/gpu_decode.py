"""Decode steps of a whole model on a card: compiled, as a CUDA graph, dense against patched."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from wina.api import sparsify
from wina.bench.budget import Budget
from wina.bench.roofline import Load, byte_ideal, cost
from wina.bench.shapes import shape_config
from wina.bench.structure import structure_of
from wina.calibration import calibrate
from wina.config import SparsityConfig
from wina.inspection import measure_sparsity
from wina.linear import SparseLinear
from wina.patch import restore
from wina.plan import SparsityPlan

SPARSITIES = (0.5, 0.4, 0.65)
CONTEXT = 64
STEPS = 32
CALIBRATION_TOKENS = 512
# Seconds to build, compile and time the dense and the patched model; to calibrate and time one more
# sparsity.
_MODEL_S = 240.0
_SPARSITY_S = 25.0
_WARM_UPS = 3


def model_on(device: torch.device, shape: str) -> nn.Module:
    """A bfloat16 model of a named shape with random weights, made on the device itself."""
    import transformers

    torch.manual_seed(0)
    with device:
        model = transformers.AutoModelForCausalLM.from_config(
            shape_config(shape), dtype=torch.bfloat16
        )
    module: nn.Module = model.eval()
    return module


class DecodeStep:
    """One greedy decode step with a static cache, compiled; on a card, replayed from a CUDA graph.

    The weights that it reads are those of the model at the time of the call: they may change in
    place, and so may thresholds.
    """

    def __init__(
        self, model: nn.Module, context: int = CONTEXT, steps: int = STEPS, compiled: bool = True
    ) -> None:
        import transformers

        self.model, self.context, self.steps = model, context, steps
        self.device = next(model.parameters()).device
        config: Any = model.config
        self.cache = transformers.StaticCache(config=config, max_cache_len=context + steps + 8)
        generator = torch.Generator().manual_seed(1)
        prompt = torch.randint(0, config.vocab_size, (1, context), generator=generator)
        prompt = prompt.to(self.device)
        self.token = prompt[:, -1:].clone()
        with torch.no_grad():
            self._forward(prompt)
            self._step = self._decode
            if compiled:
                self._step = torch.compile(self._decode, fullgraph=True, dynamic=False)
            for _ in range(_WARM_UPS):
                self._step()
            self._run = self._captured() if self.device.type == "cuda" else self._step

    def seconds(self, repeats: int = 5) -> float:
        """Median over repeats of the mean seconds of a step."""
        figures = []
        with torch.no_grad():
            for _ in range(repeats):
                self.rewind()
                self.synchronize()
                start = time.perf_counter()
                for _ in range(self.steps):
                    self.run_once()
                self.synchronize()
                figures.append((time.perf_counter() - start) / self.steps)
        return statistics.median(figures)

    def run_once(self) -> None:
        """Decode the token after the last one."""
        with torch.no_grad():
            self._run()

    def rewind(self) -> None:
        """Forget all tokens but the prompt."""
        for layer in self.cache.layers:
            layer.cumulative_length.fill_(self.context)

    def _forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.model(tokens, past_key_values=self.cache, use_cache=True).logits
        return logits

    def _decode(self) -> None:
        self.token.copy_(self._forward(self.token)[:, -1:].argmax(dim=-1))

    def _captured(self) -> Any:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        return graph.replay

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def bench_steps(
    model: nn.Module,
    name: str,
    card: str,
    copy: float,
    budget: Budget,
    sparsities: Sequence[float] = SPARSITIES,
    trace: Path | None = None,
) -> list[dict[str, Any]]:
    """Time decode steps of one model, dense and at every sparsity.

    The model is compiled twice, dense and patched; sparsities change thresholds in place. Dense is
    timed before and after the patched model, and the faster figure counts.

    Args:
        model: a dense decoder on the device to measure.
        name: for rows.
        card: for rows.
        copy: copy bandwidth of the device, bytes per second.
        budget: ends the bench in time.
        sparsities: the first one is always timed, the others while time is left.
        trace: where to write a profiler trace of patched steps.

    Returns:
        Rows, dense first, of {card, model, kernel "decode step", dtype, tokens, context, sparsity,
        realised, time_us, dense_us, tokens_per_s, speedup_vs_compiled_dense, byte_ideal,
        kept_bytes, bandwidth_share}. ``realised`` is what tokens of this very model drop, and
        ``byte_ideal`` and ``kept_bytes`` (all that a step reads) are at that sparsity.
    """
    structure = structure_of(model)
    dense_step = DecodeStep(model)
    dense = dense_step.seconds()
    tokens = torch.randint(
        0, model.config.vocab_size, (CALIBRATION_TOKENS,),  # type: ignore[union-attr, arg-type]
        generator=torch.Generator().manual_seed(2),
    )  # fmt: skip
    plans = [_plan(model, tokens, sparsities[0])]
    plans += [
        _plan(model, tokens, sparsity)
        for sparsity in sparsities[1:]
        if budget.allows(f"{name} decode at {sparsity:.0%}", _SPARSITY_S + _MODEL_S / 2)
    ]
    sparsify(model, plans[0], show_progress=False)
    step = DecodeStep(model)
    measured = []
    for plan in plans:
        _use(model, plan)
        measured.append((plan, _realised(model, step), step.seconds()))
    if trace is not None:
        _trace(step, trace)
    restore(model)
    dense = min(dense, dense_step.seconds())

    def row(sparsity: float, realised: float, seconds: float) -> dict[str, Any]:
        load = Load(sparsity=realised, context=CONTEXT + STEPS // 2)
        read = cost(structure, load).total_bytes
        return {
            "card": card,
            "model": name,
            "kernel": "decode step",
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "tokens": 1,
            "context": CONTEXT,
            "sparsity": sparsity,
            "realised": realised,
            "time_us": seconds * 1e6,
            "dense_us": dense * 1e6,
            "tokens_per_s": 1 / seconds,
            "speedup_vs_compiled_dense": dense / seconds,
            "byte_ideal": byte_ideal(structure, load),
            "kept_bytes": read,
            "bandwidth_share": read / seconds / copy,
        }

    return [row(0.0, 0.0, dense)] + [
        row(plan.config.sparsity, realised, seconds) for plan, realised, seconds in measured
    ]


def fits(budget: Budget, name: str) -> bool:
    """Whether there is time for one model and its first sparsity."""
    return budget.allows(f"{name} decode", _MODEL_S)


def _plan(model: nn.Module, tokens: Tensor, sparsity: float) -> SparsityPlan:
    config = SparsityConfig(
        sparsity=sparsity, calibration_tokens=CALIBRATION_TOKENS, window=CALIBRATION_TOKENS // 4
    )
    return calibrate(model, config=config, texts=tokens, show_progress=False)


def _use(model: nn.Module, plan: SparsityPlan) -> None:
    """Put a plan's thresholds in place of those of a patched model: compiled code stays valid."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.threshold.copy_(plan.layers[module.name].threshold)


def _realised(model: nn.Module, step: DecodeStep) -> float:
    """Share of weights that a few tokens of the model itself skip, counted without the graph."""
    with measure_sparsity(model) as counter, torch.no_grad():
        step.rewind()
        for _ in range(4):
            step._decode()
    return counter.mean


def _trace(step: DecodeStep, path: Path) -> None:
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    if step.device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    step.rewind()
    with profile(activities=activities) as recorded:
        for _ in range(4):
            step.run_once()
        step.synchronize()
    recorded.export_chrome_trace(str(path))
