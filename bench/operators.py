"""The operators that benches time: inputs, the dense product to beat, the gate before timing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.errors import ConfigError, WinaError
from wina.kernels import reference
from wina.kernels.dispatch import Backend
from wina.kernels.quantization import GROUP, LINE, QuantizedWeight, quantize
from wina.registry import Registry

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_ACTIVATION = "silu"
# Largest slope of the activation and of the product, for the error bound of the fused operator.
_SLOPE = 1.1


@dataclass(frozen=True)
class Operator:
    """One operator as benches see it.

    Attributes:
        name: of the row.
        matrices: weight matrices [N, K] that one call reads.
        dense: (x, N-major weights) → y in plain torch: what must be beaten.
        sparse: (backend, x, K-major weights [K, N], threshold) → y.
        expected: (x, K-major weights, threshold) → (y, bound of the sum's rounding), float64.
        integers: as ``sparse`` for the one weight as integers; None where that is not timed.
        row_major: weights are [N, K] in the three above, and no channel is dropped.
    """

    name: str
    matrices: int
    dense: Callable[[Tensor, Sequence[Tensor]], Tensor]
    sparse: Callable[[Backend, Tensor, Sequence[Tensor], Tensor], Tensor]
    expected: Callable[[Tensor, Sequence[Tensor], Tensor], tuple[Tensor, Tensor]]
    integers: Callable[[Backend, Tensor, QuantizedWeight, Tensor], Tensor] | None = None
    row_major: bool = False

    def sparsities(self, wanted: Sequence[float]) -> list[float]:
        """Those to time: 0, which is the kernel's own dense time, and the wanted ones it has."""
        return [0.0] if self.row_major else list(dict.fromkeys((0.0, *wanted)))


OPERATORS: Registry[Operator] = Registry("operator")


def _linear(x: Tensor, weight: Tensor, threshold: Tensor) -> tuple[Tensor, Tensor]:
    """(product, Σ|x|·|w|) in float64."""
    x, weight = x.double(), weight.double()
    masked = reference.mask_inputs(x, threshold)
    return masked @ weight, masked.abs() @ weight.abs()


def _expected_linear(
    x: Tensor, weights: Sequence[Tensor], threshold: Tensor
) -> tuple[Tensor, Tensor]:
    y, size = _linear(x, weights[0], threshold)
    return y, 3e-6 * size


def _expected_gate_up(
    x: Tensor, weights: Sequence[Tensor], threshold: Tensor
) -> tuple[Tensor, Tensor]:
    (g, g_size), (u, u_size) = (_linear(x, w, threshold) for w in weights)
    a = reference.ACTIVATIONS[_ACTIVATION](g)
    # Gate and up may be rounded to x's dtype before they are multiplied.
    eps = torch.finfo(x.dtype).eps
    g_error = 3e-6 * g_size + eps * g.abs()
    u_error = 3e-6 * u_size + eps * u.abs()
    return a * u, _SLOPE * g_error * u.abs() + (a.abs() + g_error) * u_error + eps * (a * u).abs()


def _integer_linear(backend: Backend, x: Tensor, w: QuantizedWeight, threshold: Tensor) -> Tensor:
    return backend.sparse_linear_quantized(x, w.packed, w.scales, w.columns, w.bits, threshold)


def _integer_rows(backend: Backend, x: Tensor, w: QuantizedWeight, _: Tensor) -> Tensor:
    return backend.dense_linear_rows_quantized(x, w.packed, w.scales, w.columns, w.bits)


OPERATORS.register("sparse_linear")(
    Operator(
        "sparse_linear",
        1,
        lambda x, w: F.linear(x, w[0]),
        lambda backend, x, w, t: backend.sparse_linear(x, w[0], t),
        _expected_linear,
        _integer_linear,
    )
)
OPERATORS.register("dense_linear_rows")(
    Operator(
        "dense_linear_rows",
        1,
        lambda x, w: F.linear(x, w[0]),
        lambda backend, x, w, _: backend.dense_linear_rows(x, w[0]),
        lambda x, w, t: _expected_linear(x, [w[0].t()], t),
        _integer_rows,
        row_major=True,
    )
)
OPERATORS.register("sparse_gate_up")(
    Operator(
        "sparse_gate_up",
        2,
        lambda x, w: F.silu(F.linear(x, w[0])) * F.linear(x, w[1]),
        lambda backend, x, w, t: backend.sparse_gate_up(x, w[0], w[1], t, t, _ACTIVATION),
        _expected_gate_up,
    )
)


class ColdWeights:
    """Enough copies of an operator's weights that a call never finds its own in a cache.

    One piece of memory serves both layouts: N-major [N, K] for dense torch, and for a backend a
    matrix [K, N] that is contiguous or a transposed view, whichever it reads. So every contender
    moves the same bytes from the same places. Values are those of a trained model's size.
    """

    def __init__(
        self, shape: tuple[int, int], matrices: int, dtype: torch.dtype,
        device: torch.device, cold_bytes: int,
    ) -> None:  # fmt: skip
        self.shape = shape
        self.bytes = shape[0] * shape[1] * dtype.itemsize * matrices
        first = _random_weights(shape, matrices).to(device, dtype)
        self.buffers = _copies(first, self.bytes, cold_bytes)
        self._next = 0

    def take(self) -> Tensor:
        """The next buffer [matrices, N, K]: the one that has been cold for longest."""
        buffer = self.buffers[self._next]
        self._next = (self._next + 1) % len(self.buffers)
        return buffer

    def matrices(self, buffer: Tensor, operator: Operator, backend: Backend) -> list[Tensor]:
        """Weights as a backend's operator reads them: [K, N], or [N, K] where row-major."""
        return list(buffer) if operator.row_major else self.k_major(buffer, backend)

    def k_major(self, buffer: Tensor, backend: Backend) -> list[Tensor]:
        """Weights [K, N] as a backend reads them."""
        N, K = self.shape
        if backend.k_major:
            return [matrix.view(K, N) for matrix in buffer]
        return [matrix.t() for matrix in buffer]


class ColdIntegers:
    """The same for one weight in 8 or 4 bits; a buffer has the integers, then their scales.

    Attributes:
        bytes: of a buffer, all of which a dense product reads.
    """

    def __init__(
        self, shape: tuple[int, int], weight_dtype: str, row_major: bool, device: torch.device,
        cold_bytes: int,
    ) -> None:  # fmt: skip
        N, K = shape
        weight = _random_weights(shape, 1)[0].to(device)
        self._like = quantize(weight if row_major else weight.view(K, N), weight_dtype)
        parts = [t.view(torch.uint8).flatten() for t in (self._like.packed, self._like.scales)]
        self._packed_bytes = parts[0].numel()
        self._used = self._packed_bytes + parts[1].numel()
        # Every copy's integers begin on a cache line.
        first = F.pad(torch.cat(parts), (0, -self._used % LINE))
        self.bytes = self._like.bytes
        self.buffers = _copies(first, self.bytes, cold_bytes)
        self._next = 0

    def take(self) -> Tensor:
        """The next buffer [bytes], the one that has been cold for longest."""
        buffer = self.buffers[self._next]
        self._next = (self._next + 1) % len(self.buffers)
        return buffer

    def weight(self, buffer: Tensor) -> QuantizedWeight:
        """A buffer's weight: [K, N], or [N, K] where row-major."""
        packed, scales = buffer[: self._packed_bytes], buffer[self._packed_bytes : self._used]
        like = self._like
        return QuantizedWeight(
            packed.view(torch.int8).view(like.packed.shape),
            scales.view(torch.bfloat16).view(like.scales.shape),
            like.columns,
            like.bits,
        )


def _random_weights(shape: tuple[int, int], matrices: int) -> Tensor:
    """[matrices, N, K] float32 of a trained model's size."""
    generator = torch.Generator().manual_seed(shape[0] * 31 + shape[1])
    return torch.randn(matrices, *shape, generator=generator) * 0.02


def _copies(first: Tensor, size: int, cold_bytes: int) -> Tensor:
    """[copies, *]: two at least, together as large as no cache is."""
    count = max(2, -(-cold_bytes // size))
    return first.expand(count, *first.shape).contiguous()


def inputs_for(
    shape: tuple[int, int], tokens: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Hidden states [tokens, K], normal."""
    generator = torch.Generator().manual_seed(shape[1] * 17 + tokens)
    return torch.randn(tokens, shape[1], generator=generator).to(device, dtype)


def threshold_for(x: Tensor, sparsity: float) -> Tensor:
    """A threshold vector [K] that drops this share of the channels of x [T, K].

    Exactly so for one token, whatever the ties. For several tokens one cut-off holds for all, so
    each drops about that share, and each its own channels, as tokens of a model do.
    """
    if not 0.0 <= sparsity <= 1.0:
        raise ConfigError(f"sparsity is a share in [0, 1], not {sparsity}")
    T, K = x.shape
    magnitude = x.abs().float()
    if T > 1 and 0.0 < sparsity < 1.0:
        cutoff = magnitude.flatten().kthvalue(max(1, round(sparsity * T * K))).values
        return cutoff.expand(K).contiguous()
    threshold = torch.full((K,), -1.0, device=x.device)
    threshold[magnitude[0].argsort()[: round(sparsity * K)]] = torch.inf
    return threshold


def kept_channels(x: Tensor, threshold: Tensor) -> int:
    """Channels that any token of x [T, K] keeps: what a kernel must read for all of them."""
    return int(reference.keep_mask(x, threshold).any(0).sum())


def gate(
    operator: Operator, backend: Backend, x: Tensor, weights: Sequence[Tensor], threshold: Tensor
) -> None:
    """Raise unless the backend agrees with float64: no speed is reported for a wrong kernel.

    The bound is one rounding of the output, and float32 sums over K terms.
    """
    got = operator.sparse(backend, x, weights, threshold).double()
    want, bound = operator.expected(x, weights, threshold)
    _compare(operator, backend, x, weights[0], threshold, got, want, bound)


def gate_integers(
    operator: Operator, backend: Backend, x: Tensor, weight: QuantizedWeight, threshold: Tensor
) -> None:
    """The same for a weight of integers; sums are exact to the largest that a group can hold."""
    assert operator.integers is not None
    got = operator.integers(backend, x, weight, threshold).double()
    meant = weight.dequantize()
    largest = weight.scales.float().abs() * 2 ** (weight.bits - 1)
    held = largest.repeat_interleave(GROUP, dim=1)[:, : weight.columns]
    want = operator.expected(x, [meant], threshold)[0]
    bound = operator.expected(x, [held], threshold)[1]
    _compare(operator, backend, x, meant, threshold, got, want, bound)


def _compare(
    operator: Operator, backend: Backend, x: Tensor, weight: Tensor, threshold: Tensor,
    got: Tensor, want: Tensor, bound: Tensor,
) -> None:  # fmt: skip
    bound = bound + torch.finfo(x.dtype).eps * want.abs() + 1e-7
    excess = float(((got - want).abs() - bound).max())
    if not excess <= 0:
        dropped = float((threshold > 0).double().mean())
        raise WinaError(
            f"{operator.name} of backend {backend.name} exceeds its error bound by {excess:.3g} "
            f"at {tuple(weight.shape)}, {x.dtype}, {x.shape[0]} tokens, {dropped:.0%} of "
            "thresholds set: not timing it"
        )
