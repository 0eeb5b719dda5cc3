"""Decoder blocks run again on their own dense inputs, with some projections sparse."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wina.allocation.base import Problem, Unit
from wina.offload import device_of, forward_replaced, weight_and_bias
from wina.prefill import Prefill
from wina.progress import progress
from wina.projections import decoder_blocks, decoder_of, linear_of
from wina.statistics import ScoreHistogram


class Block:
    """One decoder block with the input that the dense model gives it.

    Masks use quantiles of what the dense block sees, as TEAL's histograms do.

    Attributes:
        units: what gets a sparsity each in it.
        output: of the dense block, [windows, S, hidden].
    """

    def __init__(self, run: Callable[[], Any], units: Sequence[Unit], problem: Problem) -> None:
        self.units = units
        self._run_block = run
        self._scores = problem.scores
        self._prefill = Prefill(1.0, problem.sink_tokens)
        self._owner = {p.name: unit.name for unit in units for p in unit.projections}
        self._linears: dict[str, nn.Linear] = {}
        for name in self._owner:
            self._linears[name] = linear_of(problem.model, name)
        self._histograms: dict[str, ScoreHistogram] = {}
        self._base = {unit.name: 0.0 for unit in units}
        self._outputs: dict[str, Tensor] = {}
        self.output = self._run(self._first_product)

    @property
    def weights(self) -> int:
        """Number of weights of the block's projections."""
        return sum(unit.weights for unit in self.units)

    def relative_errors(self, settings: Iterable[Mapping[str, float]]) -> list[float]:
        """‖Y − Ŷ‖₂²/‖Y‖₂² of the block's output for each setting of its units' sparsities.

        Norms are means over tokens; blocks whose outputs are large become comparable.
        """
        size = float(self.output.float().norm(dim=-1).mean())
        return [(self.error(sparsities) / size) ** 2 for sparsities in settings]

    def error(self, sparsities: Mapping[str, float], last: float = 1.0) -> float:
        """‖Y − Ŷ‖₂ of the block's output, averaged over the last share of each window's tokens.

        Projections that run before the first one that differs from :meth:`settle` are not
        computed again.
        """
        fresh = False

        def product(name: str, x: Tensor) -> Tensor:
            nonlocal fresh
            unit = self._owner[name]
            fresh = fresh or sparsities[unit] != self._base[unit]
            return self._product(name, x, sparsities[unit]) if fresh else self._outputs[name]

        length = self.output.shape[1]
        start = length - max(1, round(last * length))
        change = (self._run(product) - self.output)[:, start:]
        return float(change.float().norm(dim=-1).mean())

    def settle(self, sparsities: Mapping[str, float]) -> None:
        """Take these sparsities as the state that trials differ from."""

        def product(name: str, x: Tensor) -> Tensor:
            self._outputs[name] = self._product(name, x, sparsities[self._owner[name]])
            return self._outputs[name]

        self._base = dict(sparsities)
        self._run(product)

    def _first_product(self, name: str, x: Tensor) -> Tensor:
        histogram = ScoreHistogram()
        # The cut-offs of topk are its tokens' own, so any sparsity will do here.
        self._scores[name].count(histogram, x[..., self._prefill.start(x.shape[-2]) :, :], 0.5)
        self._histograms[name] = histogram
        self._outputs[name] = self._product(name, x, 0.0)
        return self._outputs[name]

    def _product(self, name: str, x: Tensor, sparsity: float) -> Tensor:
        linear, scores = self._linears[name], self._scores[name]
        if sparsity > 0.0:
            start = self._prefill.start(x.shape[-2])
            tokens = x[..., start:, :]
            threshold = scores.threshold(scores.cutoff(self._histograms[name], sparsity))
            masked = torch.where(scores.keep(tokens, threshold, sparsity), tokens, 0.0)
            x = torch.cat([x[..., :start, :], masked], dim=-2)
        return F.linear(x, *weight_and_bias(linear))

    def _run(self, product: Callable[[str, Tensor], Tensor]) -> Tensor:
        with _products(self._linears, product):
            output = self._run_block()
        hidden: Tensor = output if isinstance(output, Tensor) else output[0]
        return hidden


def visit_blocks(
    problem: Problem, windows: Tensor, visit: Callable[[Block], None], title: str
) -> None:
    """Call ``visit`` with every decoder block, one after the other, in one dense forward pass."""
    decoder = decoder_of(problem.model)
    blocks = decoder_blocks(problem.model)
    device = device_of(decoder)

    def hook_of(index: int) -> Callable[..., None]:
        units = [unit for unit in problem.units if unit.projections[0].block == index]

        def hook(module: nn.Module, arguments: Any, keywords: Any, _: Any) -> None:
            visit(Block(lambda: module.forward(*arguments, **keywords), units, problem))
            advance()

        return hook

    with progress(title, len(blocks), problem.show_progress) as advance, ExitStack() as stack:
        stack.callback(decoder.train, decoder.training)
        for index, (_, block) in enumerate(blocks):
            hook = hook_of(index)
            stack.callback(block.register_forward_hook(hook, with_kwargs=True).remove)
        decoder.eval()
        with torch.no_grad():
            decoder(input_ids=windows.to(device), use_cache=False)


@contextmanager
def _products(
    linears: Mapping[str, nn.Linear], product: Callable[[str, Tensor], Tensor]
) -> Iterator[None]:
    """Let ``product`` compute what these modules compute."""

    with ExitStack() as stack:
        for name, linear in linears.items():
            stack.enter_context(forward_replaced(linear, partial(product, name)))
        yield
