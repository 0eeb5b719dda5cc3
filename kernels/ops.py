"""``torch.ops.wina.*``: what an operator is, and the default of every operator for every device.

An operator is one :func:`define`: its definition, the check of its arguments and the shape of its
output. The schema, the fake implementation and the default follow. A backend enters a faster kernel
for its device with :func:`register`. An operator has no backward: modules take the differentiable
path instead (:mod:`wina.linear`).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from wina.kernels import reference
from wina.registry import Registry

_LIBRARY = torch.library.Library("wina", "DEF")

Arguments = SimpleNamespace
"""The arguments of one call under the names of the operator's definition, defaults filled in."""


@dataclass(frozen=True)
class Operator:
    """What an operator is made of.

    Attributes:
        definition: the operator in plain torch. Its name and annotated signature are the
            operator's.
        check: raises a RuntimeError that names the argument whose shape or dtype does not fit.
        output: an empty result of the right shape, dtype and device.
        mutates: names of the arguments that it writes to.
    """

    definition: Callable[..., Any]
    check: Callable[[Arguments], None]
    output: Callable[[Arguments], Any]
    mutates: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """Of the operator, such as ``"sparse_linear"``."""
        return self.definition.__name__

    @property
    def schema(self) -> str:
        """As torch's dispatcher reads it."""
        return torch.library.infer_schema(
            self.definition, op_name=self.name, mutates_args=self.mutates
        )

    @cached_property
    def _parameters(self) -> Mapping[str, inspect.Parameter]:
        return inspect.signature(self.definition).parameters

    @cached_property
    def _defaults(self) -> dict[str, Any]:
        parameters = self._parameters.items()
        return {name: p.default for name, p in parameters if p.default is not p.empty}

    def bind(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Arguments:
        """The arguments by name."""
        given = dict(zip(self._parameters, args, strict=False))
        return Arguments(**{**self._defaults, **given, **kwargs})

    def define_by(self, arguments: Arguments) -> Any:
        """The definition's result."""
        return self.definition(**vars(arguments))

    def implementation(
        self, kernel: Callable[[Arguments], Any], has_kernel: Callable[[Arguments], bool]
    ) -> Callable[..., Any]:
        """What the dispatcher calls: check, then the kernel, or the definition where none fits."""

        def call(*args: Any, **kwargs: Any) -> Any:
            arguments = self.bind(args, kwargs)
            self._refuse_gradient(arguments)
            self.check(arguments)
            return kernel(arguments) if has_kernel(arguments) else self.define_by(arguments)

        return call

    def fake(self, *args: Any, **kwargs: Any) -> Any:
        """What tracing calls: check, and an output without values."""
        arguments = self.bind(args, kwargs)
        self.check(arguments)
        return self.output(arguments)

    def _refuse_gradient(self, arguments: Arguments) -> None:
        if torch.is_grad_enabled() and any(t.requires_grad for t in tensors(arguments)):
            raise RuntimeError(
                f"wina::{self.name} has no backward; call it under torch.no_grad(), or use "
                f"wina.kernels.reference.{self.name}, which is differentiable"
            )


OPERATORS: Registry[Operator] = Registry("operator")


def tensors(arguments: Arguments) -> list[Tensor]:
    """All tensors among the arguments, those inside of lists too."""
    found: list[Tensor] = []
    for value in vars(arguments).values():
        found += [t for t in (value if isinstance(value, list) else [value]) if torch.is_tensor(t)]
    return found


def define(
    definition: Callable[..., Any],
    check: Callable[[Arguments], None],
    output: Callable[[Arguments], Any],
    mutates: tuple[str, ...] = (),
) -> Callable[..., Any]:
    """Enter an operator, see :class:`Operator`; returns what callers call."""
    operator = Operator(definition, check, output, mutates)
    OPERATORS.register(operator.name)(operator)
    _LIBRARY.define(operator.schema, tags=torch.Tag.pt2_compliant_tag)
    default = operator.implementation(operator.define_by, lambda _: True)
    _LIBRARY.impl(operator.name, default, "CompositeExplicitAutograd")
    torch.library.register_fake(f"wina::{operator.name}", operator.fake, lib=_LIBRARY)
    overload: Callable[..., Any] = getattr(torch.ops.wina, operator.name).default
    return overload


def register(
    name: str,
    key: str,
    kernel: Callable[[Arguments], Any],
    has_kernel: Callable[[Arguments], bool],
) -> None:
    """Make a kernel the implementation of an operator on one kind of device.

    Args:
        name: the operator's.
        key: dispatch key, such as ``"CUDA"``.
        kernel: gets checked arguments.
        has_kernel: whether the kernel serves checked arguments; the definition serves the others.
    """
    _LIBRARY.impl(name, OPERATORS[name].implementation(kernel, has_kernel), key)


def check_linear(
    x: Tensor,
    weight: Tensor,
    threshold: Tensor,
    bias: Tensor | None = None,
    scale: Tensor | None = None,
) -> None:
    """Raise a RuntimeError that names the argument whose shape or dtype does not fit."""
    if weight.dim() != 2 or threshold.dim() != 1 or x.dim() < 1:
        raise RuntimeError(
            "expected x [..., K], weight [K, N] and threshold [K], got shapes "
            f"{tuple(x.shape)}, {tuple(weight.shape)} and {tuple(threshold.shape)}"
        )
    if x.shape[-1] != weight.shape[0] or x.shape[-1] != threshold.shape[0]:
        raise RuntimeError(
            f"x has {x.shape[-1]} channels, weight {weight.shape[0]} rows (K-major), "
            f"threshold {threshold.shape[0]} entries: they must be the same number K"
        )
    if x.dtype != weight.dtype or threshold.dtype != torch.float32:
        raise RuntimeError(
            f"x and weight must share a dtype and threshold be float32, got {x.dtype}, "
            f"{weight.dtype} and {threshold.dtype}"
        )
    check_bias(x, weight.shape[1], bias)
    if scale is not None and (scale.shape != x.shape[:-1] or scale.dtype != torch.float32):
        raise RuntimeError(
            f"scale must be {tuple(x.shape[:-1])} torch.float32, one a token, got "
            f"{tuple(scale.shape)} {scale.dtype}"
        )


def check_bias(x: Tensor, columns: int, bias: Tensor | None) -> None:
    """Raise a RuntimeError unless a bias, if there is one, is [N] in the dtype of x."""
    if bias is not None and (bias.shape != (columns,) or bias.dtype != x.dtype):
        raise RuntimeError(
            f"bias must be [{columns}] {x.dtype}, got {tuple(bias.shape)} {bias.dtype}"
        )


def check_residual(x: Tensor, columns: int, residual: Tensor | None) -> None:
    """Raise a RuntimeError unless a residual, if there is one, is [..., N] in the dtype of x."""
    shape = (*x.shape[:-1], columns)
    if residual is not None and (residual.shape != shape or residual.dtype != x.dtype):
        raise RuntimeError(
            f"residual must be {shape} {x.dtype}, got {tuple(residual.shape)} {residual.dtype}"
        )


def check_activation(name: str) -> None:
    """Raise a RuntimeError if no kernel knows an activation by this name."""
    if name not in reference.ACTIVATIONS:
        raise RuntimeError(
            f"unknown activation {name!r}; known: {', '.join(reference.ACTIVATIONS)}"
        )


def _check_dense_rows(a: Arguments) -> None:
    if a.weight.dim() != 2 or a.x.dim() < 1 or a.x.shape[-1] != a.weight.shape[1]:
        raise RuntimeError(
            "expected x [..., K] and weight [N, K], got shapes "
            f"{tuple(a.x.shape)} and {tuple(a.weight.shape)}"
        )
    if a.x.dtype != a.weight.dtype:
        raise RuntimeError(f"x and weight must share a dtype, got {a.x.dtype} and {a.weight.dtype}")
    if a.threshold is not None:
        check_linear(a.x, a.weight.t(), a.threshold, a.bias, a.scale)
    elif a.scale is not None:
        raise RuntimeError("a scale is of thresholds, which are not given")
    check_bias(a.x, a.weight.shape[0], a.bias)
    check_residual(a.x, a.weight.shape[0], a.residual)


def _check_sparse_linear(a: Arguments) -> None:
    check_linear(a.x, a.weight, a.threshold, a.bias, a.scale)
    check_residual(a.x, a.weight.shape[1], a.residual)


def _check_gate_up(a: Arguments) -> None:
    check_linear(a.x, a.gate, a.gate_threshold, a.gate_bias, a.gate_scale)
    check_linear(a.x, a.up, a.up_threshold, a.up_bias, a.up_scale)
    if a.gate.shape != a.up.shape:
        raise RuntimeError(
            f"gate and up must share a shape [K, N], got {tuple(a.gate.shape)} and "
            f"{tuple(a.up.shape)}"
        )
    check_activation(a.activation)


def _check_group(a: Arguments) -> None:
    counts = [len(values) for values in (a.weights, a.thresholds, a.biases, a.scales)]
    if not counts[0] or len(set(counts)) > 1:
        raise RuntimeError(
            "expected one threshold, bias and scale (or None) for each of at least one weight, "
            f"got {counts[1]}, {counts[2]} and {counts[3]} for {counts[0]}"
        )
    for one in zip(a.weights, a.thresholds, a.biases, a.scales, strict=True):
        check_linear(a.x, *one)


def _check_topk(a: Arguments) -> None:
    if a.x.dim() < 1 or a.threshold.shape != a.x.shape[-1:] or a.threshold.dtype != torch.float32:
        raise RuntimeError(
            f"expected x [..., K] and threshold [K] float32, got shapes {tuple(a.x.shape)} and "
            f"{tuple(a.threshold.shape)} {a.threshold.dtype}"
        )
    if not 0 < a.dropped < a.x.shape[-1]:
        raise RuntimeError(f"dropped must be in [1, {a.x.shape[-1] - 1}], got {a.dropped}")


def check_x(a: Arguments) -> None:
    """Raise a RuntimeError unless x is [..., K] of floating-point numbers."""
    if a.x.dim() < 1 or not a.x.is_floating_point():
        raise RuntimeError(
            f"expected x [..., K] of floating-point numbers, got {tuple(a.x.shape)} {a.x.dtype}"
        )


def _check_threshold(a: Arguments) -> None:
    check_x(a)
    if a.threshold.shape != a.x.shape[-1:] or a.threshold.dtype != torch.float32:
        raise RuntimeError(
            f"expected threshold [{a.x.shape[-1]}] float32 for x {tuple(a.x.shape)}, got "
            f"{tuple(a.threshold.shape)} {a.threshold.dtype}"
        )


def check_of_tokens(x: Tensor, name: str, given: Tensor | None, dtype: torch.dtype) -> None:
    """Raise a RuntimeError unless what is given for each token of x, if it is, fits them."""
    tokens = x.shape[:-1]
    if given is not None and (given.shape != tokens or given.dtype != dtype):
        raise RuntimeError(
            f"expected {name} {tuple(tokens)} {dtype} for x {tuple(x.shape)}, got "
            f"{tuple(given.shape)} {given.dtype}"
        )


def _check_keep(a: Arguments) -> None:
    _check_threshold(a)
    check_of_tokens(a.x, "scale", a.scale, torch.float32)


def _check_probe(a: Arguments) -> None:
    check_x(a)
    if a.probe.shape != (a.x.shape[-1] + 1,) or a.probe.dtype != torch.float32:
        raise RuntimeError(
            f"expected probe [{a.x.shape[-1] + 1}] float32 for x {tuple(a.x.shape)}, got "
            f"{tuple(a.probe.shape)} {a.probe.dtype}"
        )
    if not a.limit > 0.0:
        raise RuntimeError(f"limit must be positive, got {a.limit}")


def _check_tracked(a: Arguments) -> None:
    _check_threshold(a)
    tokens = a.x.shape[:-1]
    if a.state.dim() != 1 or a.state.dtype != torch.float32 or not len(a.state):
        raise RuntimeError(
            f"state must be [sequences] float32, got {tuple(a.state.shape)} {a.state.dtype}"
        )
    if tokens.numel() % len(a.state):
        raise RuntimeError(
            f"{tokens.numel()} tokens of x {tuple(a.x.shape)} are not of {len(a.state)} sequences"
        )
    check_of_tokens(a.x, "scale", a.scale, torch.float32)
    check_of_tokens(a.x, "counted", a.counted, torch.bool)
    if not (0.0 <= a.sparsity <= 1.0 and a.rate > 0.0):
        raise RuntimeError(
            f"sparsity lies in [0, 1] and rate is positive, got {a.sparsity} and {a.rate}"
        )


def one_a_token(x: Tensor) -> Tensor:
    """An empty factor of thresholds [...] float32 for x [..., K]."""
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def columns_of(x: Tensor, weight: Tensor) -> Tensor:
    """An empty product [..., N] of x [..., K] and weight [K, N]."""
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


sparse_linear: Callable[..., Tensor] = define(
    reference.sparse_linear,
    check=_check_sparse_linear,
    output=lambda a: columns_of(a.x, a.weight),
)
sparse_gate_up: Callable[..., Tensor] = define(
    reference.sparse_gate_up,
    check=_check_gate_up,
    output=lambda a: columns_of(a.x, a.gate),
)
sparse_group: Callable[..., list[Tensor]] = define(
    reference.sparse_group,
    check=_check_group,
    output=lambda a: [columns_of(a.x, weight) for weight in a.weights],
)
dense_linear_rows: Callable[..., Tensor] = define(
    reference.dense_linear_rows,
    check=_check_dense_rows,
    output=lambda a: columns_of(a.x, a.weight.t()),
)
keep_mask: Callable[..., Tensor] = define(
    reference.keep_mask, _check_keep, output=lambda a: a.x.new_empty(a.x.shape, dtype=torch.bool)
)
mask_inputs: Callable[..., Tensor] = define(
    reference.mask_inputs, _check_keep, output=lambda a: a.x.new_empty(a.x.shape)
)
topk_scale: Callable[..., Tensor] = define(
    reference.topk_scale, _check_topk, output=lambda a: one_a_token(a.x)
)
mean_scale: Callable[..., Tensor] = define(
    reference.mean_scale, check_x, output=lambda a: one_a_token(a.x)
)
probe_scale: Callable[..., Tensor] = define(
    reference.probe_scale, _check_probe, output=lambda a: one_a_token(a.x)
)
tracked_scale: Callable[..., Tensor] = define(
    reference.tracked_scale,
    _check_tracked,
    output=lambda a: one_a_token(a.x),
    mutates=("state",),
)
