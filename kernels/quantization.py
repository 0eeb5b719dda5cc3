"""Weights in 8 or 4 bits: how they are rounded, how they lie in memory, and back to float32.

A weight [K, N] is K-major: row j is what multiplies x_j. A row is cut into groups of
:data:`GROUP` columns; a group has one scale, and w ≈ scale · q with an integer q. Rows start on
cache lines, so a channel that is skipped is a row of whole lines that are not read.

- ``int8``: byte n of a row is column n, two's complement in [−127, 127].
- ``int4``: a group is one cache line, 16 little-endian words of 32 bits; bits 4p to 4p + 3 of word
  w hold q + 8 of the group's column 16p + w. So a vector of words gives eight runs of consecutive
  columns by a shift and a mask each: nothing has to be widened or shuffled.

Scales are bfloat16, [K, groups], a kept row's beside each other. A product of q with a bfloat16
scale is exact in float32.

A weight may be kept in several planes (:data:`WEIGHT_DTYPES`): the first is the weight rounded,
each further one what is left of it, rounded with scales of its own. They are stacked along K, rows
p·K to (p + 1)·K are plane p, so a product with all planes is one of the inputs repeated:
W ≈ Σ_p W_p and Wx ≈ [W_0 W_1 …]·[x; x; …]. Kernels see no planes, only more rows.

Knows nothing of kernels or models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.errors import ConfigError

GROUP = 128
LINE = 64  # bytes of a cache line
# Weights rounded at a time: bounds the float32 copies. A CPU reads and writes them some sixty
# times, from its second cache if they fit; elsewhere every pass is a launch.
_CHUNK = {"cpu": 1 << 17}
_USUAL_CHUNK = 1 << 22
_SLAB = 64  # rows of a transposed weight that are brought into order at a time
# Clipping further makes a first plane 1 to 2 % better, both planes 30 to 60 % worse
# (bench/rounding.py).
_LEAST_SHARE = 0.92
# Below this a scale's reciprocal overflows; such weights are zero in every sense that matters.
_SMALLEST_SCALE = 1e-37


@dataclass(frozen=True)
class IntegerFormat:
    """A width of weights.

    Attributes:
        bits: of one weight.
        lowest, highest: range of the integer q.
        full: the integer that the largest weight of a group is first mapped to. Four bits have
            one negative value more than positive ones, and a scale may be negative: mapping the
            largest to −8 wastes nothing.
        shrink: scales to try, as shares of the one that ``full`` gives. Clipping the largest
            weight pays where there are few levels.
    """

    bits: int
    lowest: int
    highest: int
    full: int
    shrink: tuple[float, ...]

    def row_bytes(self, N: int) -> int:
        """Bytes from one row to the next: whole cache lines."""
        return -(-N // self.columns_of_line) * LINE

    @property
    def columns_of_line(self) -> int:
        """Columns in a cache line."""
        return LINE * 8 // self.bits


FORMATS = {
    "int8": IntegerFormat(8, -127, 127, 127, (1.0, 0.99)),
    "int4": IntegerFormat(4, -8, 7, -8, tuple(1.0 - 0.04 * i for i in range(10))),
}


@dataclass(frozen=True)
class WeightDtype:
    """How the weight of a projection is kept: planes of one format.

    Attributes:
        of_plane: its format, a key of :data:`FORMATS`.
        planes: 1 for a weight that is simply rounded.
    """

    of_plane: str
    planes: int = 1

    @property
    def name(self) -> str:
        """The key in :data:`WEIGHT_DTYPES`, such as ``"int4+int4"``."""
        return "+".join([self.of_plane] * self.planes)

    @property
    def format(self) -> IntegerFormat:
        """Of every plane."""
        return FORMATS[self.of_plane]

    @property
    def forms(self) -> list[IntegerFormat]:
        """How each plane is rounded.

        A plane that another follows clips less: what it clips is the largest of what it leaves, and
        the scales of the next would have to reach it.
        """
        gentle = tuple(share for share in self.format.shrink if share >= _LEAST_SHARE)
        return [replace(self.format, shrink=gentle)] * (self.planes - 1) + [self.format]

    @property
    def bits(self) -> int:
        """Of a weight that is read in full."""
        return self.planes * self.format.bits

    def bytes_of(self, K: int, N: int) -> int:
        """Bytes of a weight [K, N]: integers and scales of all planes."""
        return self.planes * K * (self.format.row_bytes(N) + 2 * scales_of(N))


WEIGHT_DTYPES = {
    kind.name: kind for kind in (*map(WeightDtype, FORMATS), WeightDtype("int4", planes=2))
}


def format_of(bits: int) -> IntegerFormat:
    """The format of a width; an unknown one raises :class:`ConfigError`."""
    for known in FORMATS.values():
        if known.bits == bits:
            return known
    raise ConfigError(f"no weights of {bits} bits. Known: {', '.join(FORMATS)}.")


def groups_of(N: int) -> int:
    """Scales of a row in use: one for each started group of columns."""
    return -(-N // GROUP)


def scales_of(N: int) -> int:
    """Scales of a row as stored: an even number, so that a pair can be loaded as 32 bits."""
    return groups_of(N) + groups_of(N) % 2


@dataclass(frozen=True)
class QuantizedWeight:
    """A weight [K, N] in the layout above.

    Attributes:
        packed: [K, row bytes], int8.
        scales: [K, :func:`scales_of` (N)], bfloat16.
        columns: N.
        bits: 8 or 4.
    """

    packed: Tensor
    scales: Tensor
    columns: int
    bits: int

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return self.packed.nbytes + self.scales.nbytes

    def cpu(self) -> QuantizedWeight:
        """The same weight on the CPU."""
        return replace(self, packed=self.packed.cpu(), scales=self.scales.cpu())

    def dequantize(self) -> Tensor:
        """The weight that every product with it means, [K, N] float32."""
        return dequantize(self.packed, self.scales, self.columns, self.bits)


def quantize(weight: Tensor, dtype: str) -> QuantizedWeight:
    """Round a K-major weight [K, N] to the nearest values that a format can hold.

    Every group takes, of a few scales, the one with the least squared error (the first of equals):
    the same weight gives the same bits on every machine.

    Args:
        weight: any float dtype and strides, on any device.
        dtype: a key of :data:`FORMATS`.

    Raises:
        ConfigError: unknown format, or the weight holds NaN or Inf.
    """
    if dtype not in FORMATS:
        raise ConfigError(f"unknown weight dtype {dtype!r}. Known: {', '.join(FORMATS)}.")
    return quantize_as(weight, FORMATS[dtype])


def quantize_as(weight: Tensor, form: IntegerFormat) -> QuantizedWeight:
    """:func:`quantize` to a format given as such."""
    K, N = weight.shape
    packed = torch.empty((K, form.row_bytes(N)), dtype=torch.int8, device=weight.device)
    scales = torch.empty((K, scales_of(N)), dtype=torch.bfloat16, device=weight.device)
    rows = max(1, _CHUNK.get(weight.device.type, _USUAL_CHUNK) // max(1, N))
    for first, some in _pieces(weight, rows):
        groups = grouped(finite_rows(some, form))
        scale = choose_scales(groups, form)
        q = integers(groups, scale.unsqueeze(-1), form).to(torch.int8)
        part = from_groups(scale, q, N, form)
        packed[first : first + len(some)] = part.packed
        scales[first : first + len(some)] = part.scales
    return QuantizedWeight(packed, scales, N, form.bits)


def _pieces(weight: Tensor, rows: int) -> Iterator[tuple[int, Tensor]]:
    """(first, ``rows`` rows from there on) of a weight [K, N].

    Where a row is a column in memory, a slab of them is copied at once: one by one, every row would
    read all cache lines of the weight again.
    """
    slab = rows if weight.stride(1) == 1 else max(rows, _SLAB)
    for start in range(0, len(weight), slab):
        held = weight[start : start + slab].contiguous()
        for first in range(0, len(held), rows):
            yield start + first, held[first : first + rows]


def stacked(planes: Sequence[QuantizedWeight]) -> QuantizedWeight:
    """Planes [K, N] of one format as one weight [planes·K, N]."""
    return replace(
        planes[0],
        packed=torch.cat([plane.packed for plane in planes]),
        scales=torch.cat([plane.scales for plane in planes]),
    )


def finite_rows(rows: Tensor, form: IntegerFormat) -> Tensor:
    """Rows of a weight in float32; NaN or Inf raises :class:`ConfigError`."""
    wide = rows.detach().to(torch.float32)
    if not wide.isfinite().all():
        raise ConfigError(f"the weight holds NaN or Inf: it cannot be rounded to int{form.bits}")
    return wide


def grouped(rows: Tensor) -> Tensor:
    """Rows [k, N] cut into groups of columns, the last one padded with zeros.

    Returns:
        [k, groups, GROUP].
    """
    groups = groups_of(rows.shape[1])
    padded = F.pad(rows, (0, groups * GROUP - rows.shape[1]))
    return padded.reshape(len(rows), groups, GROUP)


def from_groups(scales: Tensor, q: Tensor, N: int, form: IntegerFormat) -> QuantizedWeight:
    """The weight with scales [k, groups] and integers [k, groups, GROUP] int8, laid out."""
    unused = scales_of(N) - scales.shape[1]
    stored = F.pad(scales.to(torch.bfloat16), (0, unused))
    return QuantizedWeight(_pack(q, form, form.row_bytes(N)), stored, N, form.bits)


def check_layout(packed: Tensor, scales: Tensor, rows: int, columns: int, bits: int) -> None:
    """Raise a ValueError unless these are the fields of a :class:`QuantizedWeight` of such a size.

    Args:
        packed, scales, columns, bits: its fields.
        rows: K.
    """
    for name, tensor, width, dtype in (
        ("packed", packed, format_of(bits).row_bytes(columns), torch.int8),
        ("scales", scales, scales_of(columns), torch.bfloat16),
    ):
        shape = (rows, width)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise ValueError(
                f"{name} of {columns} columns in {bits} bits must be {shape} {dtype}, contiguous; "
                f"got {tuple(tensor.shape)} {tensor.dtype}"
            )


def dequantize(packed: Tensor, scales: Tensor, columns: int, bits: int) -> Tensor:
    """[K, N] float32 of the fields of a :class:`QuantizedWeight`."""
    groups = groups_of(columns)
    q = _unpack(packed, groups, bits)
    # In place: the widened integers are the only large copy.
    q *= scales[:, :groups].to(torch.float32).unsqueeze(-1)
    return q.flatten(1)[:, :columns]


def choose_scales(weight: Tensor, form: IntegerFormat) -> Tensor:
    """Scales [k, groups] float32, of values that bfloat16 has, for groups [k, groups, GROUP]."""
    at = weight.abs().argmax(-1, keepdim=True)
    largest = weight.gather(-1, at)
    unit = torch.where(largest == 0.0, 1.0, largest)  # of errors, whose squares could overflow
    best_scale = torch.zeros_like(largest)
    best_error = torch.full_like(largest, torch.inf)
    for share in form.shrink:
        # Rounded to bfloat16 first: the integers are chosen for the scale that will be stored.
        scale = (largest * (share / form.full)).to(torch.bfloat16).to(torch.float32)
        error = weight - scale * integers(weight, scale, form)
        error = error.div_(unit).square_().sum(-1, keepdim=True)
        better = error < best_error
        best_scale = torch.where(better, scale, best_scale)
        best_error = torch.where(better, error, best_error)
    return best_scale.squeeze(-1)


def integers(weight: Tensor, scale: Tensor, form: IntegerFormat) -> Tensor:
    """round(weight / scale) in range, float32; 0 where the scale is (nearly) 0."""
    usable = scale.abs() > _SMALLEST_SCALE
    inverse = torch.where(usable, 1.0 / torch.where(usable, scale, 1.0), 0.0)
    return (weight * inverse).round_().clamp_(form.lowest, form.highest)


def _pack(q: Tensor, form: IntegerFormat, row_bytes: int) -> Tensor:
    """Integers [k, groups, GROUP] → bytes [k, row bytes] int8."""
    if form.bits == 8:
        row = q.flatten(1)
        return F.pad(row, (0, max(0, row_bytes - row.shape[1])))[:, :row_bytes]
    # [k, groups, byte of the word, low or high half, word]
    halves = (q + 8).to(torch.uint8).unflatten(-1, (4, 2, GROUP // 8))
    words: Tensor = halves[..., 0, :] | (halves[..., 1, :] << 4)
    return words.transpose(-1, -2).flatten(1).view(torch.int8)


def _unpack(packed: Tensor, groups: int, bits: int) -> Tensor:
    """Bytes [k, row bytes] → integers [k, groups, GROUP], float32 (padding included)."""
    if format_of(bits).bits == 8:
        row = F.pad(packed, (0, groups * GROUP - packed.shape[1]))
        return row.view(len(row), groups, GROUP).to(torch.float32)
    words = packed.view(torch.uint8).unflatten(1, (groups, GROUP // 8, 4)).transpose(-1, -2)
    halves = torch.stack((words & 15, words >> 4), dim=-2)
    return halves.flatten(2).to(torch.float32).sub_(8.0)
