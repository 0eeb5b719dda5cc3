"""Writes the program of a decode step for a model whose parts it recognises."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from wina.decoding.forms import (
    ATTENTION_FORMS,
    EPS,
    LAYER_FORMS,
    LOGITS_DIVISOR,
    LOGITS_FACTOR,
    LOGITS_SOFTCAP,
    MLP_FORMS,
    RESIDUAL_FACTOR,
    SOFTCAP,
    USES_ROPE,
    AttentionForm,
    MlpForm,
    UnrecognisedError,
    first_of,
)
from wina.decoding.tables import Seen
from wina.kernels.program import ACTIVATION_NAMES, Builder, Cache
from wina.kernels.quantization import QuantizedWeight
from wina.linear import SparseLinear
from wina.mlp import SparseGatedMLP, recognise_activation
from wina.quantized_linear import QuantizedSparseLinear
from wina.selectors import Importance, Relative, Selector, Threshold, TopK


@dataclass(frozen=True)
class CacheShape:
    """Keys or values of one layer: [kv heads, length, head size]."""

    kv_heads: int
    head_size: int

    def zeros(self, length: int, like: Tensor) -> Tensor:
        """One for so many tokens."""
        return like.new_zeros(self.kv_heads, length, self.head_size, requires_grad=False)


class StateShape:
    """How far the cut-off of one projection has moved: [1]."""

    def zeros(self, length: int, like: Tensor) -> Tensor:
        """One that has not moved."""
        return torch.zeros(1, device=like.device)


@dataclass(frozen=True)
class Program:
    """A decode step, ready to run but for its caches.

    Attributes:
        code, numbers: see :func:`wina.kernels.program.decode_step`.
        constants: with the calibrated thresholds.
        dense_constants: with thresholds that keep every channel.
        caches: what tokens leave behind: each layer's keys, then its values, and states between.
        outputs: the vocabulary's size.
    """

    code: Tensor
    numbers: Tensor
    constants: list[Tensor]
    dense_constants: list[Tensor]
    caches: list[CacheShape | StateShape]
    outputs: int


def write_program(model: Any, seen: Seen, head: QuantizedWeight | None = None) -> Program:
    """The program of one token of a model.

    Args:
        model: a causal language model of transformers, dense or sparsified.
        seen: what its layers were seen to be given.
        head: to read in place of the weight of the language-model head.

    Raises:
        UnrecognisedError: a part has no known form; the message names it.
    """
    return _Writer(model, seen, head).write()


def decoder_of(model: Any) -> nn.Module:
    """The module that holds a model's ``layers``."""
    base: Any = getattr(model, model.base_model_prefix, None)
    layers = getattr(base, "layers", None)
    if not isinstance(base, nn.Module) or not isinstance(layers, nn.ModuleList) or not len(layers):
        raise UnrecognisedError(f"{type(model).__name__} keeps no decoder layers in `layers`")
    return base


# Registers of query, key and value, in a row: one instruction can write all three.
_HIDDEN = ("q", "k", "v")


class _Writer:
    def __init__(self, model: Any, seen: Seen, head: QuantizedWeight | None) -> None:
        self.model = model
        self.head = head
        self.decoder: Any = decoder_of(model)
        self.seen = seen
        self.program = Builder(_HIDDEN)
        self.caches: list[CacheShape | StateShape] = []
        self.keep_all: dict[int, Tensor] = {}  # id of a threshold → its dense stand-in

    def write(self) -> Program:
        embedding = self.model.get_input_embeddings()
        head = self.model.get_output_embeddings()
        if head is None or not isinstance(head, nn.Linear):
            raise UnrecognisedError("the language-model head is no nn.Linear")
        self.program.emit("embed", "x", embedding.weight.detach(), self.seen.embedding_scale)
        for index, layer in enumerate(self.decoder.layers):
            self._layer(index, layer)
        self._norm("h", "x", self.decoder.norm, "the last norm")
        config = self.model.config
        if self.head is None:
            self._linear("y", "h", head)
        else:
            self.program.emit(
                "dense_integers", "y", "h", self.head.packed, self.head.scales, self.head.columns,
                self.head.bits, _bias(head),
            )  # fmt: skip
        factor = first_of(self.model, LOGITS_FACTOR, 1.0) / first_of(config, LOGITS_DIVISOR, 1.0)
        self.program.emit("logits", "y", "y", factor, first_of(config, LOGITS_SOFTCAP, 0.0))
        constants = self.program.constants
        return Program(
            torch.tensor(self.program.code, dtype=torch.int64),
            torch.tensor(self.program.numbers, dtype=torch.float64),
            constants,
            [self.keep_all.get(id(constant), constant) for constant in constants],
            self.caches,
            head.out_features,
        )

    def _layer(self, index: int, layer: Any) -> None:
        form = _form_of(layer, LAYER_FORMS, lambda form: form.children, f"layer {index}")
        factor = first_of(layer, RESIDUAL_FACTOR, 1.0)
        self._block(layer, form.before_attention, form.after_attention, factor,
                    lambda x, residual: self._attention(index, getattr(layer, form.attention), x,
                                                        residual))  # fmt: skip
        self._block(
            layer, form.before_mlp, form.after_mlp, factor,
            lambda x, residual: self._mlp(getattr(layer, form.mlp), x, residual),
        )  # fmt: skip

    def _block(
        self, layer: Any, before: str | None, after: str | None, factor: float,
        inside: Callable[[str, str | None], str],
    ) -> None:  # fmt: skip
        """x += factor·after(inside(before(x))); the sum is the product's own where it can be."""
        x = "x" if before is None else self._norm("h", "x", getattr(layer, before), before)
        fused = after is None and factor == 1.0
        y = inside(x, "x" if fused else None)
        if after is not None:
            y = self._norm("y", y, getattr(layer, after), after)
        if not fused:
            self.program.emit("add", "x", "x", y, factor)

    def _attention(self, index: int, attention: Any, x: str, residual: str | None) -> str:
        what = f"the attention of layer {index}"
        form: AttentionForm = _form_of(
            attention, ATTENTION_FORMS, lambda form: {*form.inputs, form.output}, what,
            optional={*ATTENTION_FORMS[0].norms},
        )  # fmt: skip
        size = int(attention.head_dim)
        output = getattr(attention, form.output)
        queries = output.in_features
        projections = [getattr(attention, name) for name in form.inputs]
        kv = (sum(p.out_features for p in projections) - queries) // 2
        q, k, v = self._split(projections, x, "qkv", (queries, kv, kv))
        for register, name in zip((q, k), form.norms, strict=True):
            if getattr(attention, name, None) is not None:
                self._norm(register, register, getattr(attention, name), f"{name} of {what}")
        cos, sin = self.seen.rope[index] if first_of(attention, USES_ROPE, 1.0) else (None, None)
        number = len(self.caches)
        self.caches += [CacheShape(kv // size, size)] * 2
        self.program.emit(
            "attend", "a", q, k, v, Cache(number), Cache(number + 1), cos, sin,
            float(attention.scaling), first_of(attention, SOFTCAP, 0.0), self.seen.windows[index],
        )  # fmt: skip
        return self._linear("x" if residual else "y", "a", output, residual)

    def _mlp(self, mlp: Any, x: str, residual: str | None) -> str:
        form: MlpForm = _form_of(
            mlp, MLP_FORMS, lambda form: {*form.inputs, form.output, form.activation}, "an MLP"
        )
        name = (
            mlp.gated.activation
            if isinstance(mlp, SparseGatedMLP)
            else recognise_activation(getattr(mlp, form.activation))
        )
        if name is None:
            raise UnrecognisedError(f"no kernel knows the activation {type(mlp).__name__} uses")
        activation = ACTIVATION_NAMES.index(name)
        projections = [getattr(mlp, part) for part in form.inputs]
        down = getattr(mlp, form.output)
        if len(projections) == 2 and _fusible(*projections):
            self._gate_up("g", x, projections[0], projections[1], activation)
        else:
            gate, up = self._split(projections, x, "gu", (down.in_features,) * 2)
            self.program.emit("gated", "g", gate, up, activation)
        return self._linear("x" if residual else "y", "g", down, residual)

    def _split(
        self, projections: Sequence[nn.Linear], x: str, names: str, widths: Sequence[int]
    ) -> list[str]:
        """Products of several projections, or of a joint one cut into widths; one register each."""
        if len(projections) == 3 and _groups(projections):
            operands = [
                part
                for projection, scale in zip(projections, "stu", strict=True)
                for part in (_k_major(projection), self._threshold(projection),
                             self._bias(projection), self._scale(projection, x, scale, x))
            ]  # fmt: skip
            self.program.emit("group_of_three", names[0], x, *operands)
            return list(names)
        if len(projections) > 1:
            planes = {_planes_of(projection) for projection in projections}
            once = self._repeated(projections[0], x) if len(planes) == 1 else None
            return [
                self._linear(name, x, projection, repeated=once)
                for name, projection in zip(names, projections, strict=True)
            ]
        joint = self._linear("joint", x, projections[0])
        start = 0
        for name, width in zip(names, widths, strict=True):
            self.program.emit("slice", name, joint, start, width)
            start += width
        return list(names)

    def _norm(self, out: str, x: str, norm: Any, what: str) -> str:
        weight, eps = getattr(norm, "weight", None), first_of(norm, EPS, -1.0)
        if not isinstance(weight, Tensor) or eps < 0 or len(list(norm.parameters())) != 1:
            raise UnrecognisedError(f"{what} ({type(norm).__name__}) is no RMS norm")
        return self.program.emit("rms_norm", out, x, weight.detach(), eps, _offset(norm, eps))

    def _linear(
        self, out: str, x: str, linear: nn.Linear, residual: str | None = None,
        repeated: str | None = None,
    ) -> str:  # fmt: skip
        """The product of x with a projection; ``repeated`` holds x for its planes already."""
        if not isinstance(linear, SparseLinear):
            if not isinstance(linear, nn.Linear):
                raise UnrecognisedError(f"{type(linear).__name__} is no nn.Linear")
            return self.program.emit(
                "dense", out, x, linear.weight.detach(), _bias(linear), None, None, residual
            )
        threshold = self._threshold(linear)
        wide = repeated or self._repeated(linear, x)
        bias, scale = self._bias(linear), self._scale(linear, x, "s", wide)
        x = wide
        if linear.choice.backend.masked_rows:
            drops = bool((threshold >= 0).any())  # else nothing is, whatever the scale
            mask = (threshold, scale) if drops else (None, None)
            return self.program.emit("dense", out, x, linear.weight.detach(), bias, *mask, residual)
        tail = (threshold, bias, scale, residual)
        if isinstance(linear, QuantizedSparseLinear):
            return self.program.emit(
                "sparse_integers", out, x, linear.packed, linear.scales, linear.out_features,
                linear.bits, *tail,
            )  # fmt: skip
        return self.program.emit("sparse", out, x, _k_major(linear), *tail)

    def _gate_up(
        self, out: str, x: str, gate: SparseLinear, up: SparseLinear, activation: int
    ) -> None:
        wide = self._repeated(gate, x)
        tail = (
            self._threshold(gate), self._threshold(up), activation,
            self._bias(gate), self._bias(up),
            self._scale(gate, x, "s", wide), self._scale(up, x, "t", wide),
        )  # fmt: skip
        if isinstance(gate, QuantizedSparseLinear) and isinstance(up, QuantizedSparseLinear):
            self.program.emit(
                "gate_up_integers", out, wide, gate.packed, gate.scales, up.packed, up.scales,
                gate.out_features, gate.bits, *tail,
            )  # fmt: skip
        else:
            self.program.emit("gate_up", out, x, _k_major(gate), _k_major(up), *tail)

    def _repeated(self, linear: nn.Linear, x: str) -> str:
        """The register of x as the planes of a weight read it."""
        planes = _planes_of(linear)
        return x if planes == 1 else self.program.emit("repeat", "w", x, planes)

    def _threshold(self, linear: SparseLinear) -> Tensor:
        threshold = linear.threshold
        self.keep_all.setdefault(id(threshold), torch.full_like(threshold, -1.0))
        return threshold

    def _bias(self, linear: SparseLinear) -> Tensor | None:
        """The bias of a sparse product: a correction's shift is in it, and not in its stand-in."""
        if not linear.one_launch:
            raise UnrecognisedError("no instruction for a low-rank correction or a center")
        bias, shifted = _bias(linear), linear.sparse_bias
        if shifted is None:
            return bias
        self.keep_all[id(shifted)] = torch.zeros_like(shifted) if bias is None else bias
        return shifted

    def _scale(self, linear: SparseLinear, x: str, out: str, wide: str) -> str | None:
        """The register of a token's factor; ``wide`` is x as the planes of the weight read it."""
        scale = _SCALES.get(type(linear.selector))
        if scale is None:
            raise UnrecognisedError(
                f"no instruction for the selector {type(linear.selector).__name__}"
            )
        own = scale(self.program, linear, x, out)
        if linear.tracked is None:
            return own
        self.caches.append(StateShape())
        return self.program.emit(
            "tracked_scale", out, wide, linear.threshold, Cache(len(self.caches) - 1),
            linear.sparsity, linear.control.tracking, own,
        )  # fmt: skip


def _topk(program: Builder, linear: SparseLinear, x: str, out: str) -> str:
    channels = linear.in_features
    if linear.threshold.numel() != channels:
        raise UnrecognisedError("no instruction for the top-k of channels in planes")
    dropped = min(round(linear.sparsity * channels), channels - 1)
    if dropped <= 0:
        raise UnrecognisedError("top-k that drops nothing")
    # A constant of its own: the dense stand-in of the product's thresholds must not reach it.
    return program.emit("topk_scale", out, x, linear.threshold.clone(), dropped)


def _probe(program: Builder, linear: SparseLinear, x: str, out: str) -> str | None:
    assert isinstance(linear.selector, Importance)
    if linear.probe is None:
        return None
    return program.emit("probe_scale", out, x, linear.probe, linear.selector.limit)


# How the factor of a token's thresholds is computed.
_SCALES: dict[type[Selector], Callable[[Builder, SparseLinear, str, str], str | None]] = {
    Threshold: lambda program, linear, x, out: None,
    Relative: lambda program, linear, x, out: program.emit("mean_scale", out, x),
    TopK: _topk,
    Importance: _probe,
}


def _form_of(
    module: nn.Module, forms: Sequence[Any], names: Callable[[Any], set[str]], what: str,
    optional: set[str] = frozenset(),  # type: ignore[assignment]
) -> Any:  # fmt: skip
    """The form whose names are those of a module's children."""
    children = {
        name
        for name, child in module.named_children()
        if not isinstance(child, nn.Dropout | nn.Identity)
    }
    for form in forms:
        if names(form) <= children <= names(form) | optional:
            return form
    known = ", ".join(sorted(children))
    raise UnrecognisedError(f"{what} ({type(module).__name__}) has parts of no known form: {known}")


def _offset(norm: Any, eps: float) -> float:
    """What is added to a norm's weight, 0 or 1 (Gemma), found by comparing values."""
    weight = norm.weight.detach()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(weight.shape, generator=generator).to(weight)
    with torch.no_grad():
        y = norm(x[None])[0].float()
    wide = x.float()
    scaled = wide * torch.rsqrt(wide.square().mean() + eps)
    for offset in (0.0, 1.0):
        if torch.allclose(y, scaled * (weight.float() + offset), rtol=2e-2, atol=1e-5):
            return offset
    raise UnrecognisedError(f"{type(norm).__name__} computes something else than an RMS norm")


def _groups(projections: Sequence[nn.Linear]) -> TypeGuard[Sequence[SparseLinear]]:
    """Whether float products can share a launch."""
    return all(
        isinstance(p, SparseLinear)
        and not isinstance(p, QuantizedSparseLinear)
        and not p.choice.backend.masked_rows
        for p in projections
    )


def _fusible(gate: nn.Linear, up: nn.Linear) -> bool:
    return (
        isinstance(gate, SparseLinear)
        and isinstance(up, SparseLinear)
        and gate.weight_dtype == up.weight_dtype
        and not (gate.choice.backend.masked_rows or up.choice.backend.masked_rows)
    )


def _planes_of(linear: nn.Linear) -> int:
    return linear.planes if isinstance(linear, QuantizedSparseLinear) else 1


def _bias(linear: nn.Linear) -> Tensor | None:
    return None if linear.bias is None else linear.bias.detach()


def _k_major(linear: SparseLinear) -> Tensor:
    if not linear.choice.backend.k_major:
        raise UnrecognisedError(
            f"{linear.name} is served by the backend {linear.choice.backend.name} "
            f"({linear.choice.reason})"
        )
    return linear.weight.detach().t()
