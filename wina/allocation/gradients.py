"""What dropping channels does to the loss, from gradients at the projections' inputs.

Dropping the channels D of a projection changes its output by δy = −Σ_{j∈D} W_:,j·x_j and the loss
by gᵀδy = −Σ_{j∈D} (gᵀW_:,j)·x_j to first order, g = ∂loss/∂y. The factor gᵀW_:,j is the gradient of
x_j by way of this projection, so one backward pass gives these sums for every projection and every
sparsity on a grid.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wina.allocation.base import Problem
from wina.errors import CalibrationError
from wina.offload import device_of, recomputed
from wina.prefill import Prefill
from wina.progress import progress
from wina.projections import Projection, decoder_blocks, linear_of
from wina.scores import ChannelScores

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class OperatingPoint:
    """A sparse model to differentiate: sparsity and threshold [K] of each projection, by name."""

    sparsities: Mapping[str, float]
    thresholds: Mapping[str, Tensor]


class LossChange:
    """Estimated change of the loss, in nats per token, at each sparsity of a grid.

    ``first`` is E[gᵀδy] and ``second`` is ½·E[(gᵀδy)²] (the Fisher approximation of the
    curvature), both [grid] float64. δy is relative to the model that was differentiated.
    """

    def __init__(self, grid: Sequence[float]) -> None:
        self.grid = grid
        self.first = torch.zeros(len(grid), dtype=torch.float64)
        self.second = torch.zeros(len(grid), dtype=torch.float64)
        self.tokens = 0

    def add(self, changes: Tensor) -> None:
        """Count gᵀδy of tokens [grid, T]."""
        total, count = self.tokens + changes.shape[1], changes.shape[1]
        changes = changes.double().cpu()
        weight = count / total
        self.first += weight * (changes.mean(1) - self.first)
        self.second += weight * (changes.square().mean(1) / 2 - self.second)
        self.tokens = total


def loss_changes(
    problem: Problem,
    grids: Mapping[str, Sequence[float]],
    windows: Tensor,
    point: OperatingPoint | None = None,
) -> dict[str, LossChange]:
    """Estimate, for every projection by itself, what sparsities do to the loss.

    At the dense model the loss is a random direction of the logits, whose squared gradients give
    the curvature of KL(dense ‖ sparse). At an operating point it is that divergence itself, whose
    gradient has little noise.

    Args:
        problem: model, scores and masks.
        grids: projection name → sparsities to try.
        windows: token ids [windows, S]; one window is differentiated at a time.
        point: the sparse model to differentiate; the dense one by default.
    """
    found = {name: LossChange(grid) for name, grid in grids.items()}
    watched: list[Watch] = [
        _Changes(projection, problem, found[projection.name], point)
        for unit in problem.units
        for projection in unit.projections
    ]
    if point is None and windows.shape == problem.windows.shape:
        watched += problem.watched
    differentiate(problem.model, watched, windows, problem.show_progress, sparse=point is not None)
    return found


def differentiate(
    model: nn.Module,
    watched: Sequence[Watch],
    windows: Tensor,
    show_progress: bool,
    sparse: bool = False,
) -> None:
    """Show every watch the gradient of the loss, see :func:`loss_changes`, one window at a time.

    Args:
        model: dense; it is run and left as it was.
        watched: one for each projection. They may change its inputs.
        windows: token ids [windows, S].
        show_progress: draw a progress bar on stderr.
        sparse: whether they do, so that the loss is the divergence from the dense model.
    """
    device = device_of(model)
    blocks = [block for _, block in decoder_blocks(model)]
    title = "gradients, sparse" if sparse else "gradients, dense"
    generator = torch.Generator().manual_seed(0)
    with (
        progress(title, len(windows), show_progress) as advance,
        frozen(model),
        recomputed(blocks),
    ):
        for window in windows.split(1):
            ids = window.to(device)
            if not sparse:
                with _attached(model, watched):
                    logits = _logits(model, ids)
                    if not (failed := bool(logits.isnan().any())):
                        logits.backward(_direction(logits.detach(), generator))
                if failed:
                    _refuse(model, watched, ids)
            else:
                with torch.no_grad():
                    dense = _logits(model, ids).log_softmax(-1)
                with _attached(model, watched):
                    log_p = _logits(model, ids).log_softmax(-1)
                    F.kl_div(log_p, dense, reduction="sum", log_target=True).backward()
            advance()


def _refuse(model: nn.Module, watched: Sequence[Watch], ids: Tensor) -> NoReturn:
    """Raise :class:`CalibrationError` with the first projection that reads NaN or Inf."""
    names = {module: name for name, module in model.named_modules()}

    def look(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        if not arguments[0].isfinite().all():
            raise CalibrationError(f"{names[module]}: found NaN or Inf among its inputs")

    with ExitStack() as stack, torch.no_grad():
        for watch in watched:
            stack.callback(watch.module.register_forward_pre_hook(look).remove)
        _logits(model, ids)
    raise CalibrationError("the model's logits on the calibration text have NaN")


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits [S, vocabulary] of one window, float32."""
    output: Any = model(input_ids=ids, use_cache=False)
    logits: Tensor = output.logits[0]
    return logits.float()


def _direction(logits: Tensor, generator: torch.Generator) -> Tensor:
    """v [S, vocabulary] for logits of the same shape, with E[v vᵀ] = diag(p) − p pᵀ for each token.

    That is the curvature of KL in the logits. The gradient of a label that is drawn from p has this
    covariance, too, but is nearly zero for most draws of a confident prediction and large for a
    few: v = √p∘ε − p·(√p·ε) with random signs ε says as much with fewer tokens.
    """
    p = logits.softmax(-1, dtype=torch.float32)
    signs = torch.randint(2, p.shape, generator=generator, dtype=torch.int8).to(p.device)
    signed = p.sqrt().mul_(signs.mul_(2).sub_(1))
    return signed - p * signed.sum(-1, keepdim=True)


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Gradients flow through a model in eval mode but never into its parameters."""
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    modes = [(module, module.training) for module in model.modules()]

    def start(_: nn.Module, __: Any, embedded: Tensor) -> Tensor:
        return embedded.detach().requires_grad_() if torch.is_grad_enabled() else embedded

    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    with ExitStack() as stack:  # undoes all that was done, wherever this is stopped
        for module, training in modes:
            stack.callback(setattr, module, "training", training)
        for parameter in wanted:
            stack.callback(parameter.requires_grad_)
        stack.callback(embedding.register_forward_hook(start).remove)
        model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield


@contextmanager
def _attached(model: nn.Module, watched: Sequence[Watch]) -> Iterator[None]:
    with ExitStack() as stack:
        for watch in watched:
            stack.callback(watch.module.register_forward_pre_hook(watch.before).remove)
        yield


class Watch(ABC):
    """Sees one projection: its input on the way forward, the gradient there on the way back."""

    def __init__(self, module: nn.Linear) -> None:
        self.module = module

    def before(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Ask for the gradient of what the projection reads."""
        x = self.taken(arguments[0])
        # A node of its own: where projections read one hidden state, each has its part of it.
        own = x.view_as(x)
        own.register_hook(self.see)
        return (own, *arguments[1:])

    def taken(self, x: Tensor) -> Tensor:
        """What the projection reads in place of its input [..., S, K]."""
        return x

    @abstractmethod
    def see(self, gradient: Tensor) -> None:
        """Take notice of Wᵀ·∂loss/∂output [..., S, K]: ∂loss/∂x by way of this projection."""


class _Changes(Watch):
    """Counts what dropping channels does."""

    def __init__(
        self,
        projection: Projection,
        problem: Problem,
        found: LossChange,
        point: OperatingPoint | None,
    ) -> None:
        super().__init__(linear_of(problem.model, projection.name))
        self.scores: ChannelScores = problem.scores[projection.name]
        self.prefill = Prefill(1.0, problem.sink_tokens)
        self.found = found
        self.sparsity = point.sparsities[projection.name] if point else 0.0
        self.threshold = point.thresholds[projection.name] if point else None
        self.x: Tensor | None = None

    def taken(self, x: Tensor) -> Tensor:
        """x, masked at the operating point."""
        self.x = x.detach()
        if self.threshold is None:
            return x
        start = self.prefill.start(x.shape[-2])
        tokens = x[..., start:, :]
        with torch.no_grad():
            keep = self.scores.keep(tokens, self.threshold, self.sparsity)
        masked = torch.where(keep, tokens, 0.0)
        return torch.cat([x[..., :start, :], masked], dim=-2)

    def see(self, gradient: Tensor) -> None:
        """Count gᵀδy of the tokens that are sparse."""
        assert self.x is not None
        start = self.prefill.start(self.x.shape[-2])
        x = self.x[..., start:, :].flatten(0, -2)
        self.x = None
        gradient = gradient[..., start:, :].flatten(0, -2)
        kept = self.scores.kept_sums(x, gradient, (0.0, *self.found.grid))
        here = kept[:, 0]
        if self.threshold is not None:
            masked = torch.where(self.scores.keep(x, self.threshold, self.sparsity), x, 0.0)
            here = (masked.float() * gradient.float()).sum(-1)
        self.found.add((kept[:, 1:] - here.unsqueeze(1)).t())
