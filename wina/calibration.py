"""Checkpoint + text → plan.

The work is done inside one forward pass of the decoder. When a projection is about to run, its
scores over all calibration tokens are counted, its cut-off is read off the histogram, and its
inputs are masked with it at once; so whatever runs later sees what the sparse model will produce
("sequential" statistics), and the realised sparsity is the one asked for. With "dense" statistics
the inputs are not masked.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor, nn

from wina.config import SparsityConfig
from wina.criteria import Criterion
from wina.errors import CalibrationError, PatchStateError
from wina.kernels.quantization import quantize
from wina.kernels.reference import keep_mask, mask_inputs
from wina.plan import ProjectionPlan, SparsityPlan, weight_sample
from wina.prefill import Prefill
from wina.progress import Advance, progress
from wina.projections import (
    Projection,
    decoder_of,
    find_projections,
    group_members,
    model_type_of,
)
from wina.selectors import Selector
from wina.statistics import ScoreHistogram
from wina.texts import bundled, to_windows

# Tokens whose activations are alive at once. More calibration tokens than this are taken in
# several passes, at first with cut-offs from the first chunk.
CHUNK_TOKENS = 16384
# Rows of an input whose scores are computed at a time.
_SCORE_ROWS = 1024


def calibrate(
    model: nn.Module,
    tokenizer: Any | None = None,
    config: SparsityConfig | None = None,
    texts: Iterable[str] | Iterable[Tensor] | Tensor | None = None,
    show_progress: bool = True,
) -> SparsityPlan:
    """Find the thresholds of every projection.

    Args:
        model: a dense decoder of transformers. It is run, never changed.
        tokenizer: its tokenizer; not needed when ``texts`` are token ids.
        config: defaults to ``SparsityConfig()``.
        texts: strings, a column of a dataset, or token ids; the bundled text by default.
        show_progress: draw a progress bar on stderr.

    Returns:
        The plan for :func:`wina.sparsify`.

    Raises:
        UnsupportedModelError: a module does not fit; the message names it.
        CalibrationError: the text is too short, or a projection received NaN or Inf.
        PatchStateError: the model is sparsified already.
    """
    config = config or SparsityConfig()
    if hasattr(model, "_wina_patch"):
        raise PatchStateError(
            "the model is sparsified: call wina.restore(model) before calibrating"
        )
    projections = find_projections(model)
    windows = to_windows(
        bundled("calibration") if texts is None else texts,
        tokenizer,
        config.window,
        config.calibration_tokens,
    )
    if windows.shape[1] <= config.sink_tokens + 1:
        raise CalibrationError(f"the text is too short: {windows.numel()} tokens")
    plan = _Calibrator(model, projections, config).run(windows, show_progress)
    source = "bundled" if texts is None else "given by the user"
    return SparsityPlan(
        config=config,
        model_type=model_type_of(model),
        calibration={"text": source, "tokens": windows.numel()},
        layers=plan,
    )


class _Calibrator:
    def __init__(
        self, model: nn.Module, projections: Sequence[Projection], config: SparsityConfig
    ) -> None:
        self.decoder = decoder_of(model)
        self.projections = projections
        self.config = config
        sparsities = config.make_allocation().allocate(projections, config.sparsity)
        modules = dict(model.named_modules())
        criterion = config.make_criterion()
        groups = group_members(projections)
        self.layers = {}
        for projection in projections:
            module = modules[projection.name]
            assert isinstance(module, nn.Linear)
            own = config.mask == "projection"
            sharers = [projection] if own else groups[projection.group]
            unit = projection.name if own else projection.group
            self.layers[projection.name] = _Layer(
                projection=projection,
                module=module,
                sharing=[modules[p.name].weight for p in sharers],
                sparsity=sparsities[projection.name],
                config=config,
                criterion=criterion,
                generator=Generator().manual_seed(config.seed + zlib.crc32(unit.encode())),
            )

    def run(self, windows: Tensor, show_progress: bool) -> dict[str, ProjectionPlan]:
        chunks = windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))
        passes = 1 if len(chunks) == 1 else 1 + len(chunks)
        title = f"calibrating {self.config.method} at {self.config.sparsity:.0%}"
        with progress(title, passes * len(self.layers), show_progress) as advance:
            self._forward(chunks[0], advance)
            if len(chunks) > 1:
                for layer in self.layers.values():
                    layer.restart_statistics()
                for chunk in chunks:
                    self._forward(chunk, advance)
                for layer in self.layers.values():
                    layer.set_cutoff()
        return {name: layer.plan() for name, layer in self.layers.items()}

    def _forward(self, windows: Tensor, advance: Advance) -> None:
        def before(layer: _Layer) -> Any:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                masked = layer.see(arguments[0])
                layer.round_weight()
                advance()
                return (masked, *arguments[1:])

            return hook

        def after(layer: _Layer) -> Any:
            return lambda *_: layer.put_back()

        handles = []
        for layer in self.layers.values():
            handles += [
                layer.module.register_forward_pre_hook(before(layer)),
                layer.module.register_forward_hook(after(layer)),
            ]
        training = self.decoder.training
        device = next(self.decoder.parameters()).device
        self.decoder.eval()
        try:
            with torch.no_grad():
                self.decoder(input_ids=windows.to(device), use_cache=False)
        finally:
            self.decoder.train(training)
            for handle in handles:
                handle.remove()
            for layer in self.layers.values():
                layer.put_back()


class _Layer:
    """One projection while it is calibrated."""

    def __init__(
        self,
        projection: Projection,
        module: nn.Linear,
        sharing: Sequence[Tensor],
        sparsity: float,
        config: SparsityConfig,
        criterion: Criterion,
        generator: Generator,
    ) -> None:
        self.projection = projection
        self.module = module
        self.sharing = sharing
        self.sparsity = sparsity
        self.criterion = criterion
        self.generator = generator
        self.selector: Selector = config.make_selector()
        self.prefill = Prefill(1.0, config.sink_tokens)
        self.sequential = config.statistics == "sequential"
        self.weight_dtype = config.weight_dtype
        self.original: Tensor | None = None
        self.histogram = ScoreHistogram()
        self.constants: Tensor | None = None
        self.threshold: Tensor | None = None
        self.cutoff = 0.0
        self.dropped = 0

    def round_weight(self) -> None:
        """Let the module compute with the weight that it will have, until :meth:`put_back`."""
        if self.weight_dtype is not None:
            self.original = self.module.weight.data
            self.module.weight.data = self._rounded(self.original).to(self.original.dtype)

    def put_back(self) -> None:
        """Give the module its own weight again, the very same tensor."""
        if self.original is not None:
            self.module.weight.data = self.original
            self.original = None

    def _rounded(self, weight: Tensor) -> Tensor:
        """A weight [N, K] as it will be in use: criteria see the rounded one."""
        if self.weight_dtype is None:
            return weight
        return quantize(weight.t(), self.weight_dtype).dequantize().t()

    def see(self, x: Tensor) -> Tensor:
        """Count the scores of inputs [B, S, K]; return them masked with the current cut-off."""
        if self.constants is None:
            weights = [self._rounded(weight) for weight in self.sharing]
            self.constants = self.criterion.constants(weights, self.generator)
        start = self.prefill.start(x.shape[-2])
        tokens = x[..., start:, :]
        for rows in tokens.reshape(-1, x.shape[-1]).split(_SCORE_ROWS):
            try:
                self.histogram.add(self._scores(rows))
            except CalibrationError as error:
                raise CalibrationError(f"{self.projection.name}: {error}") from None
        if self.threshold is None:
            self.set_cutoff()
        assert self.threshold is not None
        scale = self.selector.scale(tokens, self.threshold, self.sparsity)
        self.dropped += int((~keep_mask(tokens, self.threshold, scale)).sum())
        if not self.sequential:
            return x
        masked = mask_inputs(tokens, self.threshold, scale)
        return torch.cat([x[..., :start, :], masked], dim=-2)

    def _scores(self, rows: Tensor) -> Tensor:
        assert self.constants is not None
        scores = rows.abs().to(torch.float32) * self.constants
        scale = self.selector.scale(rows, 1.0 / self.constants, self.sparsity)
        return scores if scale is None else scores / scale.clamp_min(1e-30).unsqueeze(-1)

    def set_cutoff(self) -> None:
        """Take the cut-off from the scores counted so far."""
        assert self.constants is not None
        keep_all = self.sparsity == 0.0
        self.cutoff = -1.0 if keep_all else self.selector.cutoff(self.histogram, self.sparsity)
        self.threshold = (
            torch.full_like(self.constants, -1.0) if keep_all else self.cutoff / self.constants
        )

    def restart_statistics(self) -> None:
        """Forget the counts, keep the cut-off: it stays in use until :meth:`set_cutoff`."""
        self.histogram = ScoreHistogram()
        self.dropped = 0

    def plan(self) -> ProjectionPlan:
        assert self.threshold is not None
        total = self.histogram.total
        return ProjectionPlan(
            projection=self.projection,
            sparsity=self.sparsity,
            realised=self.dropped / total if total else 0.0,
            cutoff=self.cutoff,
            threshold=self.threshold.cpu(),
            sample=weight_sample(self.module.weight),
        )
