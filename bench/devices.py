"""Memory bandwidth of cards, as their makers publish it, and of this machine, measured."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass

import torch
from torch import Tensor

from wina.errors import ConfigError
from wina.registry import Registry


@dataclass(frozen=True)
class Device:
    """What bounds a decoded token.

    Attributes:
        name: for tables.
        bandwidth_gb_s: bytes that can be read, in 10⁹ per second.
        tflops: peak of dense 16-bit products with 32-bit sums, 10¹² floating-point operations per
            second; None where only bytes are to count.
        source: where the numbers come from.
        dense_share, sparse_share: shares of the bandwidth that dense products, and sparse ones on
            the bytes they keep, reach.
    """

    name: str
    bandwidth_gb_s: float
    tflops: float | None
    source: str
    dense_share: float = 1.0
    sparse_share: float = 1.0


DEVICES: Registry[Device] = Registry("device")

for _key, _name, _bandwidth, _tflops in (
    ("a100", "A100 SXM 80 GB", 2039.0, 312.0),
    ("a100-40gb", "A100 SXM 40 GB", 1555.0, 312.0),
    ("a6000", "RTX A6000", 768.0, 155.0),
    ("h100", "H100 SXM", 3350.0, 989.0),
    ("h200", "H200 SXM", 4800.0, 989.0),
    ("l40s", "L40S", 864.0, 362.0),
    ("rtx-3090", "RTX 3090", 936.0, 71.0),
    ("rtx-4090", "RTX 4090", 1008.0, 165.0),
    ("rtx-5090", "RTX 5090", 1792.0, 210.0),
):
    DEVICES.register(_key)(Device(_name, _bandwidth, _tflops, "maker's data sheet"))


def device_for(name: str | None, bandwidth_gb_s: float | None, read_bytes: int) -> Device:
    """The device that a user means: a bandwidth given, ``"cpu"`` measured here, or a card.

    Args:
        name: of :data:`DEVICES`, or ``"cpu"``; None with a bandwidth.
        bandwidth_gb_s: overrides the device's.
        read_bytes: size of the buffer that a measurement reads.
    """
    if bandwidth_gb_s is not None:
        if not 0 < bandwidth_gb_s < float("inf"):
            raise ConfigError(f"bandwidth is a positive number of GB/s, not {bandwidth_gb_s}")
        return Device(name or f"{bandwidth_gb_s:g} GB/s", bandwidth_gb_s, None, "given")
    if name == "cpu":
        measured = measured_bandwidth(read_bytes)
        return Device("this CPU", measured, None, f"plain read, {torch.get_num_threads()} threads")
    return DEVICES[name or "h100"]


def plain_read(buffer: Tensor) -> Tensor:
    """Read a buffer once and do next to nothing with it: the bandwidth ceiling.

    A sum of the bytes as 64-bit integers is a single vectorised pass in torch; buffers of odd
    sizes are read in the widest integers that fit, which is slower.
    """
    flat = buffer.view(-1)
    for width in (torch.int64, torch.int32, torch.int16):
        parts = width.itemsize // flat.itemsize
        if parts <= 1 or (flat.numel() % parts == 0 and flat.storage_offset() % parts == 0):
            return flat.view(width).sum()
    return flat.sum()


def measured_bandwidth(read_bytes: int, rounds: int = 5) -> float:
    """10⁹ bytes per second that a plain read of a buffer in main memory reaches: the median."""
    buffer = torch.zeros(max(read_bytes, 1 << 16) // 8, dtype=torch.int64)
    plain_read(buffer)
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        plain_read(buffer)
        seconds.append(time.perf_counter() - start)
    return buffer.numel() * 8 / statistics.median(seconds) / 1e9
