"""Which backend serves a layer: decided once, when a model is patched.

A backend that cannot serve a layer says why; the reasons end up in ``wina.inspect``. To add a
backend: a module with a subclass of :class:`Backend` and a line in :func:`backends`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from wina.errors import ConfigError, UnknownNameError
from wina.kernels import cpu, ops, quantized, reference, triton


@dataclass(frozen=True)
class LayerSpec:
    """What a backend must know of a layer to accept it.

    ``sparsity`` is the share of channels that its calibration drops, 1 where nobody knows.
    """

    device: torch.device
    dtype: torch.dtype
    in_features: int
    out_features: int
    sparsity: float = 1.0


class Backend(ABC):
    """A kernel family.

    Attributes:
        device: type of device it serves, None for all. A choice names the refusals of the
            backends that are for the layer's device.
        k_major: whether weights must lie K-major in memory. Every operator takes them as a
            matrix [K, N]; a backend that is not ``k_major`` reads the transposed view of the
            usual [N, K] layout.
        masked_rows: whether its sparse products are ``dense_linear_rows`` of masked inputs.
        sparse_linear, sparse_gate_up, dense_linear, dense_linear_rows: as in
            :mod:`wina.kernels.reference`.
        sparse_group: likewise, None where products of one hidden state gain nothing by it.
        dense_linear_quantized: as in :mod:`wina.kernels.quantized`; so are
            dense_linear_rows_quantized, sparse_linear_quantized and sparse_gate_up_quantized.
    """

    name: str
    device: str | None
    k_major: bool
    masked_rows: bool = False
    dense_linear: Callable[..., Tensor]
    dense_linear_rows: Callable[..., Tensor]
    sparse_linear: Callable[..., Tensor]
    sparse_gate_up: Callable[..., Tensor]
    sparse_group: Callable[..., list[Tensor]] | None = None
    dense_linear_quantized: Callable[..., Tensor]
    dense_linear_rows_quantized: Callable[..., Tensor]
    sparse_linear_quantized: Callable[..., Tensor]
    sparse_gate_up_quantized: Callable[..., Tensor]

    @abstractmethod
    def refuses(self, layer: LayerSpec) -> str | None:
        """Why this backend cannot serve the layer, or None if it can."""

    def pays(self, layer: LayerSpec) -> bool:
        """Whether the backend is of any use to a layer that it could serve."""
        return True

    def limit(self, layer: LayerSpec) -> str | None:
        """Which calls are a masked dense product all the same, in words; None for no such call."""
        return None


class TritonBackend(Backend):
    """Triton kernels that read only the kept rows (``kernels/triton``)."""

    name = "triton"
    device = "cuda"
    k_major = True
    # cuBLAS reads both layouts at full speed.
    dense_linear = staticmethod(reference.dense_linear)
    dense_linear_rows = staticmethod(reference.dense_linear_rows)
    sparse_linear = staticmethod(ops.sparse_linear)
    sparse_gate_up = staticmethod(ops.sparse_gate_up)
    sparse_group = staticmethod(ops.sparse_group)
    dense_linear_quantized = staticmethod(quantized.dense_linear_quantized)
    dense_linear_rows_quantized = staticmethod(quantized.dense_linear_rows_quantized)
    sparse_linear_quantized = staticmethod(quantized.linear_operator)
    sparse_gate_up_quantized = staticmethod(quantized.gate_up_operator)

    def refuses(self, layer: LayerSpec) -> str | None:
        """Not on CUDA, a dtype without a kernel, too old a card, or no usable Triton."""
        if layer.device.type != "cuda":
            return f"the layer is on {layer.device}"
        if layer.dtype not in triton.DTYPES:
            return f"no kernel for {layer.dtype}"
        return triton.refuses_card(layer.device) or triton.load()

    def limit(self, layer: LayerSpec) -> str | None:
        """More tokens than the break-even of the card's table."""
        found = triton.token_limit(torch.cuda.get_device_name(layer.device))
        how = "measured" if found.measured else "reasoned, not measured"
        return f"masked dense above {found.tokens} tokens ({how})"


class CpuBackend(Backend):
    """Compiled kernels that read only the kept rows (``kernels/cpu``).

    A call of them costs so little that projections gain nothing by sharing one.
    """

    name = "cpu"
    device = "cpu"
    k_major = True
    dense_linear = staticmethod(cpu.dense_linear)
    dense_linear_rows = staticmethod(ops.dense_linear_rows)
    sparse_linear = staticmethod(ops.sparse_linear)
    sparse_gate_up = staticmethod(ops.sparse_gate_up)
    dense_linear_quantized = staticmethod(cpu.dense_linear_quantized)
    dense_linear_rows_quantized = staticmethod(quantized.dense_rows_operator)
    sparse_linear_quantized = staticmethod(quantized.linear_operator)
    sparse_gate_up_quantized = staticmethod(quantized.gate_up_operator)

    def refuses(self, layer: LayerSpec) -> str | None:
        """Not on the CPU, a dtype without a kernel, or no kernel could be built here."""
        if layer.device.type != "cpu":
            return f"the layer is on {layer.device}"
        if layer.dtype not in cpu.DTYPES:
            return f"no kernel for {layer.dtype}"
        return cpu.load()


class CpuRowsBackend(CpuBackend):
    """Dense native products of masked inputs, for layers where skipping rows does not pay.

    They read all of the weight in the layout that it has. Short rows that are skipped one by one
    defeat the hardware's prefetching, and cost more than they save up to a sparsity that
    :data:`wina.kernels.cpu.BREAK_EVEN` knows.
    """

    name = "cpu-rows"
    k_major = False
    masked_rows = True
    dense_linear = staticmethod(cpu.dense_linear_transposed)
    sparse_linear = staticmethod(cpu.masked_linear_rows)
    sparse_gate_up = staticmethod(cpu.masked_gate_up_rows)

    def pays(self, layer: LayerSpec) -> bool:
        """The sparsity is below the break-even of the layer's rows."""
        return layer.sparsity < self._break_even(layer)

    def limit(self, layer: LayerSpec) -> str | None:
        """All calls, and why."""
        return (
            f"always masked dense: skipping its rows pays from {self._break_even(layer):.0%} on, "
            f"its sparsity is {layer.sparsity:.0%}"
        )

    def _break_even(self, layer: LayerSpec) -> float:
        return cpu.break_even(layer.in_features, layer.out_features, layer.dtype)


class ReferenceBackend(Backend):
    """Masks x and multiplies densely, in torch. Right everywhere, faster nowhere."""

    name = "reference"
    device = None
    k_major = False
    dense_linear = staticmethod(reference.dense_linear)
    dense_linear_rows = staticmethod(reference.dense_linear_rows)
    sparse_linear = staticmethod(reference.sparse_linear)
    sparse_gate_up = staticmethod(reference.sparse_gate_up)
    dense_linear_quantized = staticmethod(quantized.dense_linear_quantized)
    dense_linear_rows_quantized = staticmethod(quantized.dense_linear_rows_quantized)
    sparse_linear_quantized = staticmethod(quantized.sparse_linear_quantized)
    sparse_gate_up_quantized = staticmethod(quantized.sparse_gate_up_quantized)

    def refuses(self, layer: LayerSpec) -> str | None:
        """Never. Inputs on a CPU are masked by a native kernel where there is one: build it."""
        if layer.device.type == "cpu" and layer.dtype in cpu.DTYPES:
            cpu.load()
        return None


@cache
def backends() -> dict[str, Backend]:
    """Name → backend, the fastest first."""
    return {
        backend.name: backend
        for backend in (TritonBackend(), CpuRowsBackend(), CpuBackend(), ReferenceBackend())
    }


@dataclass(frozen=True)
class Choice:
    """The backend that serves a layer, and why it is this one."""

    backend: Backend
    reason: str


def choose(layer: LayerSpec, want: str = "auto", k_major: bool | None = None) -> Choice:
    """The fastest backend that accepts the layer, or the one that the user wants.

    Args:
        layer: to be served.
        want: name of a backend, or ``"auto"``.
        k_major: the layout that the weight has for good, if it has; the reference reads any.

    Raises:
        UnknownNameError: no backend has that name.
        ConfigError: the wanted backend refuses the layer; the message says why.
    """
    known = backends()
    if want != "auto":
        if want not in known:
            raise UnknownNameError(f"unknown backend {want!r}. Known: auto, {', '.join(known)}.")
        refusal = known[want].refuses(layer)
        if refusal is not None:
            raise ConfigError(f"backend {want!r} cannot serve {layer}: {refusal}")
        return Choice(known[want], "asked for")
    refusals: list[str] = []
    for backend in known.values():
        if backend.device not in (None, layer.device.type):
            continue
        pays = backend.pays(layer)
        if not pays and k_major is not False:
            continue
        refusal = backend.refuses(layer)
        if refusal is None and not pays:
            refusals.append("the weight is row-major; restore and sparsify again")
        if refusal is None and backend.device and k_major not in (None, backend.k_major):
            layout = "K-major" if k_major else "row-major"
            refusal = f"the weight is {layout}; restore and sparsify again"
        if refusal is None:
            reasons = refusals or ["fastest here"]
            limit = backend.limit(layer)
            return Choice(backend, "; ".join(reasons if limit is None else [*reasons, limit]))
        refusals.append(f"{backend.name}: {refusal}")
    raise AssertionError("the reference backend serves every layer")
