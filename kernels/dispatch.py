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
    """What a backend must know of a layer to accept it."""

    device: torch.device
    dtype: torch.dtype
    in_features: int
    out_features: int


class Backend(ABC):
    """A kernel family.

    Attributes:
        device: type of device it serves, None for all. A choice names the refusals of the
            backends that are for the layer's device.
        k_major: whether weights must lie K-major in memory. Every operator takes them as a
            matrix [K, N]; a backend that is not ``k_major`` reads the transposed view of the
            usual [N, K] layout.
        sparse_linear, sparse_gate_up, dense_linear, dense_linear_rows: as in
            :mod:`wina.kernels.reference`.
        sparse_group: likewise, None where products of one hidden state gain nothing by it.
        dense_linear_quantized: as in :mod:`wina.kernels.quantized`; so are
            dense_linear_rows_quantized, sparse_linear_quantized and sparse_gate_up_quantized.
    """

    name: str
    device: str | None
    k_major: bool
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


class ReferenceBackend(Backend):
    """Plain torch: masks x and multiplies densely. Right everywhere, faster nowhere."""

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
        """Never."""
        return None


@cache
def backends() -> dict[str, Backend]:
    """Name → backend, the fastest first."""
    return {
        backend.name: backend for backend in (TritonBackend(), CpuBackend(), ReferenceBackend())
    }


@dataclass(frozen=True)
class Choice:
    """The backend that serves a layer, and why it is this one."""

    backend: Backend
    reason: str


def choose(layer: LayerSpec, want: str = "auto") -> Choice:
    """The fastest backend that accepts the layer, or the one that the user wants.

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
        refusal = backend.refuses(layer)
        if refusal is None:
            reasons = refusals or ["fastest here"]
            limit = backend.limit(layer)
            return Choice(backend, "; ".join(reasons if limit is None else [*reasons, limit]))
        refusals.append(f"{backend.name}: {refusal}")
    raise AssertionError("the reference backend serves every layer")
