"""A calibrated plan with thresholds and constants refined, and its budget met again."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wina.allocation.gradients import frozen
from wina.inspection import measure_sparsity
from wina.kernels import ops
from wina.kernels.counting import backward_operator
from wina.linear import SparseLinear
from wina.patch import apply_plan, restore
from wina.plan import ProjectionPlan, SparsityPlan, weighted_mean
from wina.planes import in_planes
from wina.prefill import Prefill
from wina.progress import progress
from wina.projections import decoder_of, head_name, linear_of
from wina.refinement import Exercise, Refinement, Slopes

# A threshold's slope is read off the inputs within this distance of it, in log |x|: a triangle as
# wide takes in a fifth of the tokens, and a mask within it differs by little.
_WIDTH = 0.3
# The realised share on the calibration text is met to this.
_TOLERANCE = 1e-3
_TRIES = 6
_BATCH = 4  # windows in a forward pass that counts
_AT_ONCE = 1 << 20  # probabilities in memory


def refine(
    model: nn.Module,
    plan: SparsityPlan,
    refinement: Refinement,
    text: Tensor,
    windows: Tensor,
    show_progress: bool,
) -> SparsityPlan:
    """The plan with what a refinement finds, its thresholds scaled to the plan's budget.

    The masks are put on the dense model. Weights in planes are, as while they are calibrated; other
    weights are not rounded meanwhile, and fused experts stay dense. The budget is met in the sparse
    model as it will be.

    Args:
        model: dense; it is run and left as it was.
        plan: calibrated for it, with one cut-off for all tokens, or a factor of it for each token.
        refinement: moves the thresholds, and constants.
        text: calibration tokens [windows, S] for the refinement.
        windows: calibration tokens [windows, S] on which the budget is met.
        show_progress: draw progress bars on stderr.
    """
    device = next(model.parameters()).device
    windows, text = windows.to(device), text.to(device)
    layers = plan.layers
    logs = {name: layer.threshold.clamp_min(0.0).log().to(device) for name, layer in layers.items()}
    start = {name: log.clone() for name, log in logs.items()}
    asked = weighted_mean(
        [layer.projection for layer in layers.values()],
        {name: layer.sparsity for name, layer in layers.items()},
    )
    modules = {name: linear_of(model, name) for name in layers}
    with in_planes(modules, plan.config.kept_as), frozen(model):
        masks = _masks(plan, logs, _spreads(model, plan, windows[:1]))
        shifts = {name: mask.shift for name, mask in masks.items()}
        slopes = partial(_slopes, model, plan, masks, refinement.moves_constants)
        refinement.refine(Exercise(text, logs, 1.0 - asked, slopes, shifts, show_progress))
        constants = {name: mask.constant.cpu() for name, mask in masks.items()}
    moved = _shifted(_moved(plan, start, logs), constants)
    return _settled(model, moved, asked, windows, show_progress)


def _slopes(
    model: nn.Module,
    plan: SparsityPlan,
    masks: Mapping[str, _Mask],
    constants: bool,
    ids: Tensor,
) -> Slopes:
    """What moving the thresholds and constants of masks does on windows [B, S]."""
    start = Prefill(1.0, plan.config.sink_tokens).start(ids.shape[1])
    for mask in masks.values():
        mask.forget()
    with torch.no_grad():
        dense = _logits(model, ids)
    with _masked(model, masks, constants):
        sparse = _logits(model, ids)
        loss, slope = _divergence(sparse.detach(), dense, start)
        sparse.backward(slope)
    return Slopes(
        loss,
        sum(mask.read for mask in masks.values()),
        {name: mask.of_loss for name, mask in masks.items()},
        {name: mask.of_read for name, mask in masks.items()},
        {name: mask.of_shift for name, mask in masks.items()},
    )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    """Of windows [B, S], [B, S, vocabulary]."""
    output: Any = model(input_ids=ids, use_cache=False)
    logits: Tensor = output.logits
    return logits


def _divergence(sparse: Tensor, dense: Tensor, start: int) -> tuple[float, Tensor]:
    """KL(dense ‖ sparse), mean over the tokens from ``start`` on, and ∂/∂sparse.

    Probabilities are float32, and of a few tokens at a time: a large vocabulary would be most of
    the memory otherwise.

    Args:
        sparse, dense: logits [B, S, vocabulary]. The slope is written over ``dense``.
        start: tokens before this one do not count; their slope is 0.
    """
    windows, length, vocabulary = sparse.shape
    tokens = windows * (length - start)
    rows = max(1, _AT_ONCE // vocabulary)
    total = torch.zeros((), dtype=torch.float64, device=sparse.device)
    for q_logits, p_logits in zip(sparse, dense, strict=True):
        p_logits[:start] = 0.0
        for some, slope in zip(
            q_logits[start:].split(rows), p_logits[start:].split(rows), strict=True
        ):
            log_q, log_p = some.float().log_softmax(-1), slope.float().log_softmax(-1)
            p = log_p.exp()
            total += log_p.sub_(log_q).mul_(p).sum(dtype=torch.float64)
            slope.copy_(log_q.exp_().sub_(p).div_(tokens))
    return float(total) / tokens, dense


class _Mask:
    """Mask and constant of one projection, and their slopes after a run forwards and backwards.

    Attributes:
        logs: log t [K].
        scale: tokens [..., K] → the factor of the thresholds for each [...], None for 1.
        unit: of ``shift``: standard deviation of each output, [N] float32.
        shift: what is added to each output, in its unit, [N] float32.
        share: of the model's projection weights, this projection's.
        read: share of the model's projection weights that it let through.
        of_loss, of_read, of_shift: see :class:`Slopes`.
    """

    def __init__(
        self,
        logs: Tensor,
        unit: Tensor,
        share: float,
        sink_tokens: int,
        scale: Callable[[Tensor], Tensor | None],
    ) -> None:
        self.logs = logs
        self.scale = scale
        self.unit = unit
        self.shift = torch.zeros_like(unit)
        self.share = share
        self.prefill = Prefill(1.0, sink_tokens)
        self.forget()

    def forget(self) -> None:
        """Set what a run finds to zero: it may not come by this projection."""
        self.read = 0.0
        self.of_loss = self.of_read = torch.zeros_like(self.logs)
        self.of_shift = torch.zeros_like(self.unit)

    @property
    def constant(self) -> Tensor:
        """What is added to each output [N]."""
        return self.shift * self.unit

    def before(self, _: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Mask the input of the projection."""
        x = arguments[0]
        with torch.no_grad():
            scale = self.scale(x)
            scale = torch.ones(x.shape[:-1], device=x.device) if scale is None else scale
            scale[..., : self.prefill.start(x.shape[-2])] = 0.0  # all is kept
        masked: Tensor = _Masking.apply(x, scale, self)  # type: ignore[no-untyped-call]
        return (masked, *arguments[1:])

    def after(self, _: nn.Module, __: Any, y: Tensor) -> Tensor:
        """Add the constant to the output of the projection."""
        shifted: Tensor = _Shifting.apply(y, self)  # type: ignore[no-untyped-call]
        return shifted


class _Masking(torch.autograd.Function):
    """x with small channels at zero. Its backward also gives the slopes of the thresholds.

    A token that a higher threshold drops costs −x_j·∂loss/∂(what is kept of x_j) to first order;
    which tokens these are says :func:`wina.kernels.counting.mask_backward`. Tokens with a scale of
    zero stay dense and do not count.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, mask: _Mask) -> Tensor:
        threshold = mask.logs.exp().clamp_max_(torch.finfo(torch.float32).max)
        ctx.mask = mask
        ctx.save_for_backward(x, threshold, scale)
        return ops.mask_inputs(x, threshold, scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, threshold, scale = ctx.saved_tensors
        mask: _Mask = ctx.mask
        before, sums = backward_operator(x, gradients[0], threshold, scale, _WIDTH)
        cost, near, kept = sums.unbind()
        each = mask.share / (max(1, int(torch.count_nonzero(scale))) * x.shape[-1])
        mask.of_loss = -cost
        mask.of_read = near * -each
        mask.read = each * float(kept.sum())
        return before, None, None


class _Shifting(torch.autograd.Function):
    """y with the constant added to sparse tokens. Its backward also gives the constant's slope."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, mask: _Mask) -> Tensor:
        ctx.mask, ctx.start = mask, mask.prefill.start(y.shape[-2])
        shifted = y.clone()
        shifted[..., ctx.start :, :] += mask.constant.to(y.dtype)
        return shifted

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        tokens = gradients[0][..., ctx.start :, :].flatten(0, -2)
        ctx.mask.of_shift = tokens.sum(0, dtype=torch.float32) * ctx.mask.unit
        return gradients[0], None


def _masks(
    plan: SparsityPlan, logs: Mapping[str, Tensor], units: Mapping[str, Tensor]
) -> dict[str, _Mask]:
    weights = {name: layer.projection.weights for name, layer in plan.layers.items()}
    total = sum(weights.values())
    sink = plan.config.sink_tokens
    selector = plan.config.make_selector()

    def scale_of(name: str) -> Callable[[Tensor], Tensor | None]:
        layer, device = plan.layers[name], logs[name].device
        probe = None if layer.probe is None else layer.probe.to(device)
        return lambda x: selector.scale(x, layer.threshold.to(device), layer.sparsity, probe)

    return {
        name: _Mask(logs[name], units[name], weights[name] / total, sink, scale_of(name))
        for name in logs
    }


def _spreads(model: nn.Module, plan: SparsityPlan, windows: Tensor) -> dict[str, Tensor]:
    """Standard deviation over tokens of every output of projections of the dense model."""
    sink_tokens = plan.config.sink_tokens
    found = {}

    def hook_of(name: str) -> Any:
        def hook(_: nn.Module, __: Any, y: Tensor) -> None:
            tokens = y[..., sink_tokens:, :].flatten(0, -2)
            found[name] = tokens.float().std(0, correction=0)

        return hook

    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        for name in plan.layers:
            module = model.get_submodule(name)
            stack.callback(module.register_forward_hook(hook_of(name)).remove)
        model.eval()
        with torch.no_grad():
            model(input_ids=windows, use_cache=False)
    return found


@contextmanager
def _masked(
    model: nn.Module, masks: Mapping[str, _Mask], constants: bool = False
) -> Iterator[None]:
    with ExitStack() as stack:
        for name, mask in masks.items():
            module = model.get_submodule(name)
            stack.callback(module.register_forward_pre_hook(mask.before).remove)
            if constants:
                stack.callback(module.register_forward_hook(mask.after).remove)
        yield


def _moved(
    plan: SparsityPlan, start: Mapping[str, Tensor], logs: Mapping[str, Tensor]
) -> SparsityPlan:
    """The plan with the moved thresholds; those that keep or drop always are the very same."""

    def moved(name: str, layer: ProjectionPlan) -> ProjectionPlan:
        learned = start[name].isfinite().cpu()
        by = (logs[name] - start[name]).cpu()[learned]
        threshold = torch.where(learned, logs[name].exp().cpu(), layer.threshold)
        # Channels have factors of their own now; the cut-off goes with their geometric mean.
        cutoff = layer.cutoff * math.exp(float(by.mean())) if len(by) else layer.cutoff
        return replace(layer, threshold=threshold, cutoff=cutoff)

    return replace(plan, layers={name: moved(name, layer) for name, layer in plan.layers.items()})


def _shifted(plan: SparsityPlan, constants: Mapping[str, Tensor]) -> SparsityPlan:
    """The plan with constants as biases; as it was if all are zero."""
    if not any(bool(constant.any()) for constant in constants.values()):
        return plan
    layers = {
        name: replace(layer, terms=replace(layer.terms, bias=constants[name]))
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers)


def _settled(
    model: nn.Module, plan: SparsityPlan, asked: float, windows: Tensor, show_progress: bool
) -> SparsityPlan:
    """The plan with all thresholds scaled by one factor, so that ``asked`` is realised.

    Found by secants on log factor, in the sparse model.
    """
    projections = [layer.projection for layer in plan.layers.values()]
    apply_plan(model, plan, prefill="all", backend="reference", keep_original=True)
    try:
        modules = {m.name: m for m in model.modules() if isinstance(m, SparseLinear)}
        device = next(model.parameters()).device
        # Logits are large, and needed only where a head is one of the projections.
        run = model if head_name(model) in plan.layers else decoder_of(model)
        steps = _TRIES * len(windows.split(_BATCH))

        def realised(log_factor: float) -> Mapping[str, float]:
            for name, layer in plan.layers.items():
                modules[name].threshold = _scaled(layer.threshold, log_factor).to(device)
            with measure_sparsity(model) as counter, torch.no_grad():
                for ids in windows.split(_BATCH):
                    run(input_ids=ids, use_cache=False)
                    advance()
            return counter.by_projection

        with progress("meeting the budget", steps, show_progress) as advance:
            tried: list[tuple[float, float]] = []
            log_factor = 0.0
            while True:
                shares = realised(log_factor)
                tried.append((log_factor, weighted_mean(projections, shares) - asked))
                if abs(tried[-1][1]) <= _TOLERANCE or len(tried) == _TRIES:
                    break
                log_factor = _next(tried)
    finally:
        restore(model)
    return replace(
        plan,
        layers={
            name: replace(
                layer,
                threshold=_scaled(layer.threshold, log_factor),
                cutoff=layer.cutoff if layer.cutoff < 0 else layer.cutoff * math.exp(log_factor),
                sparsity=shares[name],
                realised=shares[name],
            )
            for name, layer in plan.layers.items()
        },
    )


def _scaled(threshold: Tensor, log_factor: float) -> Tensor:
    """Thresholds times a factor; −1, which keeps a channel, is no size."""
    return torch.where(threshold < 0.0, threshold, threshold * math.exp(log_factor))


def _next(tried: Sequence[tuple[float, float]]) -> float:
    """Where a line through the last two tries is zero.

    The share grows by about 0.35 for each e in the factor.
    """
    (here, error), slope = tried[-1], 0.35
    if len(tried) > 1:
        (before, error_before) = tried[-2]
        slope = min(max((error - error_before) / (here - before), 0.1), 1.0)
    return here - error / slope
