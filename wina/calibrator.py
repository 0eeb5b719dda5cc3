"""One pass of calibration: statistics of every projection, and at once its masks.

The work is done inside one forward pass of the decoder. When a projection is about to run, its
scores over all calibration tokens are counted, its cut-off is read off the histogram, and its
inputs are masked with it at once; its correction is fitted and added to its products. So whatever
runs later sees what the sparse model will produce ("sequential" statistics), and the realised
sparsity is the one asked for. With "dense" statistics the inputs are not masked.

A correction that compares with the dense model gets it in the same pass: the windows run twice, as
the two halves of one batch, and only the second half is masked.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wina.allocation.measurements import Measurements
from wina.config import SparsityConfig
from wina.corrections import Products, Terms
from wina.errors import CalibrationError, UnsupportedModelError
from wina.experts import ExpertsCalibrator
from wina.kernels.quantization import WEIGHT_DTYPES, QuantizedWeight
from wina.methods import METHODS
from wina.mlp import recognise_gated_mlp
from wina.offload import device_of, forward_replaced, weight_of
from wina.plan import ProjectionPlan, weight_sample
from wina.planes import moments_of_planes
from wina.prefill import Prefill
from wina.progress import Advance, progress
from wina.projections import Projection, decoder_of, group_members, head_name, linear_of
from wina.scores import ChannelScores
from wina.statistics import ScoreHistogram

# Tokens whose activations are alive at once. More calibration tokens than this are taken in
# several passes, at first with cut-offs from the first chunk.
CHUNK_TOKENS = 16384


class Calibrator:
    """Finds the cut-offs of all projections of a model, each with a sparsity of its own."""

    def __init__(
        self,
        model: nn.Module,
        projections: Sequence[Projection],
        scores: Mapping[str, ChannelScores],
        sparsities: Mapping[str, float],
        config: SparsityConfig,
        measurements: Measurements | None = None,
        importance: Mapping[str, Tensor] | None = None,
        weights: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.decoder = decoder_of(model)
        self.prefill = Prefill(1.0, config.sink_tokens)
        self.experts: dict[str, ExpertsCalibrator] = {}
        self.copies = 2 if config.make_correction().compares else 1
        self.layers = {}
        shares = hashlib.sha256(json.dumps(dict(sparsities), sort_keys=True).encode()).hexdigest()
        for projection in projections:
            name = projection.name
            module = linear_of(model, name)
            weighed = importance.get(name) if importance and sparsities[name] > 0.0 else None
            self.layers[name] = Layer(
                projection, module, scores[name], sparsities[name], config, weighed,
                (weights or {}).get(name),
            )  # fmt: skip
            if measurements is not None:
                about = {"rounded": name, "config": config.record(), "sparsities": shares}
                self.layers[name].kept = partial(measurements.tensors, about)
        for members in group_members([layer.projection for layer in self.layers.values()]).values():
            readers = [self.layers[member.name] for member in members]
            for reader in readers:
                reader.readers = readers
        self.gates = self._gates(model) if METHODS[config.method].gate_mask else []
        self.head = self.layers.get(head_name(model) or "")
        if self.head is not None:
            self.head.multiplies = False

    def _gates(self, model: nn.Module) -> list[tuple[nn.Module, Layer]]:
        """(activation module, its down projection) of every gated MLP.

        The scores of down are those of the activation's output, and up drops the same channels,
        as outputs.
        """
        found: list[tuple[nn.Module, Layer]] = []
        for name, module in model.named_modules():
            gated = recognise_gated_mlp(module)
            if gated is None or f"{name}.{gated.form.down}" not in self.layers:
                continue
            down = self.layers[f"{name}.{gated.form.down}"]
            down.fed = True
            up = self.layers[f"{name}.{gated.form.up}"]
            up.sparsity, up.rows_of = 0.0, down
            found.append((module.get_submodule(gated.form.activation), down))
        if not found or len({id(activation) for activation, _ in found}) < len(found):
            raise UnsupportedModelError(
                f"{type(model).__name__} has no gated MLPs with an activation module each: nothing "
                "can be selected by a gate"
            )
        return found

    def plans(self) -> dict[str, ProjectionPlan]:
        """What was found for the projections, by name."""
        return {name: layer.plan() for name, layer in self.layers.items()}

    def run(self, windows: Tensor, title: str, show_progress: bool) -> None:
        """Find all cut-offs."""
        chunks = windows.split(max(1, CHUNK_TOKENS // windows.shape[1]))
        passes = 1 if len(chunks) == 1 else 1 + len(chunks)
        with progress(title, passes * len(self.layers), show_progress) as advance:
            self._forward(chunks[0], advance)
            if len(chunks) > 1:
                for layer in self.layers.values():
                    layer.restart_statistics()
                for experts in self.experts.values():
                    experts.restart_statistics()
                for chunk in chunks:
                    self._forward(chunk, advance)
                for layer in self.layers.values():
                    layer.finish()
                for experts in self.experts.values():
                    experts.set_cutoffs()

    def _forward(self, windows: Tensor, advance: Advance) -> None:
        def before(layer: Layer) -> Any:
            def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
                masked = arguments[0] if layer.fed else layer.see(arguments[0])
                layer.round_weight(masked)
                advance()
                return (masked, *arguments[1:])

            return hook

        def after(layer: Layer) -> Any:
            def hook(_: nn.Module, __: Any, y: Tensor) -> Tensor:
                layer.put_back()
                return layer.correct(y)

            return hook

        def gate(layer: Layer) -> Any:
            return lambda _, __, activated: layer.see(activated)

        counted = torch.arange(windows.shape[1]) >= self.prefill.start(windows.shape[1])
        counted = counted.repeat(len(windows))
        # Where a correction compares, the first copy of the text runs dense.
        counted = torch.cat([torch.zeros_like(counted)] * (self.copies - 1) + [counted])
        device = device_of(self.decoder)
        with ExitStack() as stack:  # undoes all that was done, wherever this is stopped
            stack.callback(self.decoder.train, self.decoder.training)
            self.decoder.eval()
            for module, down in self.gates:
                stack.callback(module.register_forward_hook(gate(down)).remove)
            for layer in self.layers.values():
                stack.callback(layer.put_back)
                linear = layer.module
                stack.callback(linear.register_forward_pre_hook(before(layer)).remove)
                stack.callback(linear.register_forward_hook(after(layer)).remove)
            for experts in self.experts.values():
                masked = partial(experts.forward, counted.to(device))
                stack.enter_context(forward_replaced(experts.fused.module, masked))
            with torch.no_grad():
                twice = torch.cat([windows] * self.copies)
                hidden = self.decoder(input_ids=twice.to(device), use_cache=False)[0]
                if self.head is not None:
                    # Its logits are not needed, and would be large.
                    stack.enter_context(forward_replaced(self.head.module, lambda x: x))
                    self.head.module(hidden)


def _anew(measure: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Nothing is kept."""
    return measure()


class Layer:
    """One projection while it is calibrated."""

    def __init__(
        self,
        projection: Projection,
        module: nn.Linear,
        scores: ChannelScores,
        sparsity: float,
        config: SparsityConfig,
        importance: Tensor | None = None,
        whole: Tensor | None = None,
    ) -> None:
        self.projection = projection
        self.module = module
        self.whole = whole  # the weight [N, K], where the module has planes of it
        self.planes = config.planes
        self.scores = scores
        self.sparsity = sparsity
        self.prefill = Prefill(1.0, config.sink_tokens)
        self.sequential = config.statistics == "sequential"
        self.weight_dtype = config.weight_dtype
        self.rounding = config.make_rounding()
        self.weight: QuantizedWeight | None = None  # on the CPU, where the rounding looks at inputs
        self.kept: Callable[[Callable[[], Mapping[str, Tensor]]], Mapping[str, Tensor]] = _anew
        self.original: nn.Parameter | None = None
        self.histogram = ScoreHistogram()
        self.threshold: Tensor | None = None
        self.importance = importance  # of the calibration tokens, [windows, S], until it is used
        self.readers = [self]  # all that read its hidden state
        self.probe: Tensor | None = None
        self.cutoff = 0.0
        self.dropped = 0
        self.correction = config.make_correction()
        self.fit = self.correction.fit()
        self.terms: Terms | None = None
        self.center: Tensor | None = None
        self.left_out: Tensor | None = None
        self.multiplies = True  # else nobody asks for its products
        self.fed = False  # its scores come from the gate, not from its own input
        self.rows_of: Layer | None = None  # its outputs are dropped with that layer's inputs

    def round_weight(self, x: Tensor) -> None:
        """Let the module compute with the weight that it will have, until :meth:`put_back`.

        Args:
            x: the inputs [B, S, K] that it is about to get, masked. A rounding looks at the first
                ones, at those of all tokens of a chunk.
        """
        if self.rounding is None or self.weight_dtype is None:
            return
        assert isinstance(self.module.weight, nn.Parameter)
        self.original = self.module.weight
        if self.rounding.looks and self.weight is None:
            found = self.kept(partial(self._rounded_for, x))
            columns = self.projection.out_features
            bits = WEIGHT_DTYPES[self.weight_dtype].format.bits
            self.weight = QuantizedWeight(found["packed"], found["scales"], columns, bits)
        if self.multiplies:
            own = nn.Parameter(self._in_use(self.original.data), requires_grad=False)
            self.module.weight = own

    def _rounded_for(self, x: Tensor) -> dict[str, Tensor]:
        """The fields of the weight that the rounding finds for inputs x [B, S, K]."""
        assert self.rounding is not None
        assert self.weight_dtype is not None
        copies = 2 if self.correction.compares else 1
        moments = moments_of_planes(x.chunk(copies)[-1], self.planes)
        weight = self.module.weight.data if self.whole is None else self.whole
        try:
            found = self.rounding.round(weight, moments, self.weight_dtype).cpu()
        except CalibrationError as error:
            raise CalibrationError(f"{self.projection.name}: {error}") from None
        return {"packed": found.packed, "scales": found.scales}

    def _in_use(self, weight: Tensor) -> Tensor:
        """The weight [N, K] as the sparse model will have it, in its own dtype."""
        if self.rounding is None or self.weight_dtype is None:
            return weight
        found = self.weight or self.rounding.round(weight, None, self.weight_dtype)
        return found.dequantize().t().to(weight)

    def put_back(self) -> None:
        """Give the module its own weight again, the very same tensor."""
        if self.original is not None:
            self.module.weight = self.original
            self.original = None

    def see(self, x: Tensor) -> Tensor:
        """Count the scores of inputs [B, S, K]; return them masked with the current cut-off.

        Where a correction compares, the first half of the batch is dense, and stays so.
        """
        if self.correction.compares:
            dense, sparse = x.chunk(2)
            return torch.cat([dense, self._see(sparse)])
        return self._see(x)

    def _see(self, x: Tensor) -> Tensor:
        start = self.prefill.start(x.shape[-2])
        tokens = x[..., start:, :]
        if self.fit is not None and not self.histogram.total:
            self.center = self.fit.center(tokens.flatten(0, -2))
        if self.center is not None:
            tokens = tokens - self.center.to(tokens.dtype)
        try:
            if self.importance is not None:
                self._fit_probes(x)
            self.scores.count(self.histogram, tokens, self.sparsity, self.probe)
        except CalibrationError as error:
            raise CalibrationError(f"{self.projection.name}: {error}") from None
        if self.threshold is None:
            self.set_cutoff()
        assert self.threshold is not None
        keep = self.scores.keep(tokens, self.threshold, self.sparsity, self.probe)
        self.dropped += keep.numel() - int(torch.count_nonzero(keep))
        if self.fit is not None:
            self.left_out = torch.where(keep, 0.0, tokens)
        if not self.sequential:
            return x
        # A dropped channel is finite, so a product does it, in a quarter of the time of a choice.
        return torch.cat([x[..., :start, :], tokens * keep], dim=-2)

    def _fit_probes(self, x: Tensor) -> None:
        """Find the selector's probes of inputs [B, S, K] or [B·S, K] for all that read them.

        There are none where projections do not see all tokens, as routed experts do: there is
        nothing then that tells which ones these are.
        """
        weighed = {
            layer: layer.importance for layer in self.readers if layer.importance is not None
        }
        importance = torch.stack(list(weighed.values()))
        for layer in weighed:
            layer.importance = None
        length = importance.shape[2]
        windows, rest = divmod(x.shape[:-1].numel(), length)
        if rest or windows > importance.shape[1]:
            return
        start = self.prefill.start(length)
        tokens = x.reshape(windows, length, -1)[:, start:, : self.projection.in_features]
        if self.center is not None:
            tokens = tokens - self.center.to(tokens.dtype)
        probes = self.scores.selector.fit(tokens, importance[:, :windows, start:])
        for layer, probe in zip(weighed, probes, strict=True):
            layer.probe = probe

    def correct(self, y: Tensor) -> Tensor:
        """Fit the correction to the products y [B, S, N] of masked inputs, and add it to them."""
        if self.fit is None or self.left_out is None:
            return y
        dropped, self.left_out = self.left_out, None
        start = y.shape[-2] - dropped.shape[-2]
        copies = 2 if self.correction.compares else 1
        halves = [half[..., start:, :].flatten(0, -2) for half in y.chunk(copies)]
        missing = halves[0] - halves[1] if copies == 2 else None
        self.fit.add(Products(dropped.flatten(0, -2), missing))
        if self.terms is None:
            self.set_terms()
        assert self.terms is not None
        if not self.sequential:
            return y
        corrected = y.clone()
        corrected.chunk(copies)[-1][..., start:, :] += self.terms.of(dropped)
        return corrected

    def set_cutoff(self) -> None:
        """Take the cut-off from the scores counted so far."""
        self.cutoff = self.scores.cutoff(self.histogram, self.sparsity)
        self.threshold = self.scores.threshold(self.cutoff)

    def restart_statistics(self) -> None:
        """Forget the counts; cut-off and correction stay in use until :meth:`finish`."""
        self.histogram = ScoreHistogram()
        self.dropped = 0
        self.fit = self.correction.fit()

    def finish(self) -> None:
        """Take cut-off and correction from the statistics of all tokens."""
        self.set_cutoff()
        self.set_terms()

    def set_terms(self) -> None:
        """Take the correction from the products seen so far."""
        if self.fit is not None:
            self.terms = self.fit.terms(self._in_use(weight_of(self.module)))

    def plan(self) -> ProjectionPlan:
        """What was found."""
        assert self.threshold is not None
        seen = self.rows_of or self
        total = seen.histogram.total
        return ProjectionPlan(
            projection=self.projection,
            sparsity=seen.sparsity,
            realised=seen.dropped / total if total else 0.0,
            cutoff=self.cutoff,
            threshold=self.threshold.cpu(),
            sample=weight_sample(weight_of(self.module)),
            terms=(self.terms or Terms()).cpu(),
            probe=None if self.probe is None else self.probe.cpu(),
            weight=self.weight,
        )
