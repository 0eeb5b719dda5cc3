"""Bytes and instructions of the Triton kernels by model and card: ``python -m wina.bench.traffic``.

Counted, not measured: bytes from shapes and launch configurations, instructions from the loop of
the cubin that the compiler makes for the card. No card is needed and no time is printed. With
``--weights int8`` or ``int4``: the same for weights kept in that width, scales included.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

from rich.console import Console
from rich.table import Table

from wina.kernels.quantization import FORMATS, WEIGHT_DTYPES
from wina.kernels.triton.config import Card, choose


@dataclass(frozen=True)
class Published:
    """Data sheet of a card: DRAM bytes per second, boost clock in Hz, warp schedulers of an SM."""

    card: Card
    capability: int
    bandwidth: float
    clock: float
    schedulers: int = 4


CARDS = (
    Published(Card("A100 SXM 80 GB", 108), 80, 2.039e12, 1.41e9),
    Published(Card("H100 SXM", 132), 90, 3.35e12, 1.98e9),
    Published(Card("RTX 4090", 128), 89, 1.008e12, 2.52e9),
)

# (model, kernel, what it computes, K, N of every weight)
CALLS: tuple[tuple[str, str, str, int, tuple[int, ...]], ...] = (
    ("Llama-3-8B", "sparse_group", "q, k and v", 4096, (4096, 1024, 1024)),
    ("Llama-3-8B", "sparse_linear", "o", 4096, (4096,)),
    ("Llama-3-8B", "sparse_gate_up", "gate and up", 4096, (14336, 14336)),
    ("Llama-3-8B", "sparse_linear", "down", 14336, (4096,)),
    ("Qwen2.5-7B", "sparse_group", "q, k and v", 3584, (3584, 512, 512)),
    ("Qwen2.5-7B", "sparse_linear", "o", 3584, (3584,)),
    ("Qwen2.5-7B", "sparse_gate_up", "gate and up", 3584, (18944, 18944)),
    ("Qwen2.5-7B", "sparse_linear", "down", 18944, (3584,)),
)
ITEMSIZE = 2
SPARSITY = 0.5


@dataclass(frozen=True)
class Traffic:
    """One call of one bfloat16 token.

    Attributes:
        dense_bytes: weight bytes at sparsity 0; ``kept_bytes`` at 50 %.
        other_bytes: x, thresholds and output once, float32 partial sums written and read.
        cached_bytes: x and thresholds that programs read again, served by the caches.
        programs: of the product's launch; ``k_splits`` of them share a column tile.
        loads: 16-byte weight copies issued, masked off or not, for the whole call.
        instructions: warp instructions of the loop for the whole call.
        issue_share: share of the card's issue slots that the loop needs while kept bytes stream
            at the data sheet's bandwidth; above 1 the instructions, not DRAM, are the limit.
    """

    model: str
    call: str
    shape: tuple[int, int]
    card: str
    dense_bytes: int
    kept_bytes: int
    other_bytes: int
    cached_bytes: int
    programs: int
    k_splits: int
    loads: int
    instructions: int
    issue_share: float


def count(
    model: str,
    kernel: str,
    call: str,
    K: int,
    columns: tuple[int, ...],
    on: Published,
    weights: str | None = None,
) -> Traffic:
    """Count one call on one card, with bfloat16 weights or those of a key of ``FORMATS``."""
    from wina.kernels.triton.compiled import Variant, compile_variant

    itemsize: float = ITEMSIZE if weights is None else FORMATS[weights].bits / 8
    if kernel == "sparse_gate_up":  # a program walks along both weights
        launch = choose(kernel, on.card, 1, K, columns[0], itemsize)
        out = columns[0]
    else:
        launch = choose("sparse_linear", on.card, 1, K, sum(columns), itemsize)
        out = sum(columns)
    splits, _ = launch.splits(K)
    tiles = sum(-(-N // launch.block_n(itemsize)) for N in columns)
    dense = K * sum(_row_bytes(N, weights) for N in columns)
    kept = round(dense * (1 - SPARSITY))
    inputs = K * (ITEMSIZE + 4 * len(columns))
    partial = 2 * splits * out * 4 if splits > 1 else 0
    iterations = tiles * -(-K // launch.block_k)
    loop = compile_variant(
        Variant(
            kernel, "bfloat16", False, replace(launch, k_splits=1), splits=splits, weights=weights
        ),
        on.capability,
    ).instructions
    instructions = iterations * loop * launch.warps
    seconds = kept / on.bandwidth
    slots = on.card.sms * on.schedulers * on.clock * seconds
    programs = tiles // len(columns) if kernel == "sparse_gate_up" else tiles
    return Traffic(
        model, call, (out, K), on.card.name, dense, kept, inputs + out * ITEMSIZE + partial,
        tiles * K * (ITEMSIZE + 4) - inputs,
        programs * splits, splits, dense // 16, instructions, instructions / slots,
    )  # fmt: skip


def _row_bytes(N: int, weights: str | None) -> int:
    """Bytes of a row in memory, with its scales."""
    if weights is None:
        return N * ITEMSIZE
    return WEIGHT_DTYPES[weights].bytes_of(1, N)


def calls(weights: str | None) -> Sequence[tuple[str, str, str, int, tuple[int, ...]]]:
    """The calls of a decoded token: integer weights have a launch each."""
    if weights is None:
        return CALLS
    return [
        (model, "sparse_linear", one, K, (columns[i],)) if kernel == "sparse_group" else
        (model, kernel, call, K, columns)
        for model, kernel, call, K, columns in CALLS
        for i, one in enumerate(("q", "k, v") if kernel == "sparse_group" else (call,))
    ]  # fmt: skip


def main() -> None:
    """Print the table, then one JSON line."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--weights", choices=list(FORMATS), help="default: bfloat16")
    weights = parser.parse_args().weights
    rows = [
        count(model, kernel, call, K, columns, on, weights)
        for on in CARDS
        for model, kernel, call, K, columns in calls(weights)
    ]
    table = Table(title=f"one bfloat16 token, {weights or 'bfloat16'} weights, counted")
    for column in (
        "card", "model", "call", "[N, K]", "dense MB", "kept MB at 50 %", "other KB",
        "from caches MB", "programs (K splits)", "16-byte copies", "warp instructions",
        "issue slots at full bandwidth",
    ):  # fmt: skip
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(
            row.card, row.model, row.call, "×".join(map(str, row.shape)),
            f"{row.dense_bytes / 1e6:.1f}", f"{row.kept_bytes / 1e6:.1f}",
            f"{row.other_bytes / 1e3:.0f}", f"{row.cached_bytes / 1e6:.1f}",
            f"{row.programs} ({row.k_splits})", f"{row.loads / 1e6:.2f} M",
            f"{row.instructions / 1e6:.2f} M", f"{row.issue_share:.0%}",
        )  # fmt: skip
    Console(width=170).print(table)
    print(json.dumps({"rows": [asdict(row) for row in rows]}))


if __name__ == "__main__":
    main()
