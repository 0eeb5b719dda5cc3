"""What this machine reaches with the products of a model, for predictions of whole tokens."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import torch

from wina.bench.devices import Device
from wina.bench.kernels import Grid, bench_kernels
from wina.bench.structure import SPARSE_KINDS, Structure
from wina.bench.timing import Effort

# Rounds of each operator; the shares need no interval.
_ROUNDS = 5


def measured_device(
    structure: Structure, dtype: str, device: str, effort: Effort, show_progress: bool = True
) -> Device:
    """This machine as operators see it: read bandwidth, and the shares that products reach.

    Times a plain read, torch's dense product and the sparse kernel at 50 % on every shape of the
    model's projections, cold, one token, and weighs each by the bytes that a token reads of it.

    Args:
        structure: of the model.
        dtype: of weights and hidden states, a name of :data:`wina.bench.operators.DTYPES`.
        device: ``"cpu"`` or ``"cuda"``.
        effort: for the sizes of buffers.
        show_progress: draw progress on stderr.
    """
    read: defaultdict[tuple[int, int], float] = defaultdict(float)
    for weight in structure.weights:
        if weight.kind in SPARSE_KINDS:
            read[weight.shape[0], weight.shape[1]] += weight.read
    grid = Grid(tuple(read), dtypes=(dtype,), sparsities=(0.5,), device=device)
    brief = replace(effort, rounds=min(effort.rounds, _ROUNDS), passes=1, most_passes=1)
    rows, _ = bench_kernels(grid, brief, show_progress)
    seconds: defaultdict[str, float] = defaultdict(float)
    for row in rows:
        N, K = row["shape"]
        calls = read[N, K] / (N * K)
        for what, microseconds in (
            ("read", row["read_us"]),
            ("dense", row["torch_dense_us"]),
            ("read kept", row["read_us"] * row["kept"] / K),
            ("sparse", row["time_us"]),
        ):
            seconds[what] += calls * microseconds / 1e6
    itemsize = getattr(torch, dtype).itemsize
    name = "this CPU" if device == "cpu" else torch.cuda.get_device_name()
    return Device(
        name,
        sum(read.values()) * itemsize / seconds["read"] / 1e9,
        None,
        f"plain read, {torch.get_num_threads()} threads" if device == "cpu" else "plain read",
        dense_share=seconds["read"] / seconds["dense"],
        sparse_share=seconds["read kept"] / seconds["sparse"],
    )
