"""``wina bench tune``: measures launch configurations on the card at hand and keeps the fastest,
and from how many tokens on a dense product is faster than any.

Writes the device's table in ``kernels/triton/configs`` (or another folder, to look first). Every
candidate is compared with the definition before it is timed: a fast wrong kernel is no candidate.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from wina.bench.card import cold_copies, require_card, seconds_in_graph
from wina.bench.operators import DTYPES
from wina.kernels import reference
from wina.kernels.triton.config import FOLDER, Launch, card_of, kernels, launch_fields, save_tuned
from wina.progress import progress

# A copy of 16 bytes a thread for every tile: less would leave threads idle.
COPY_BYTES = 16


def candidates(kernel: str, K: int, shared_limit: int) -> Iterator[Launch]:
    """Configurations that fit the card's shared memory (bytes of one block).

    ``sparse_gate_up`` never splits K: h is written once.
    """
    for row_bytes in (64, 128, 256):
        for block_k in (32, 64, 128, 256):
            for warps in (4, 8):
                tile = row_bytes * block_k
                if tile < COPY_BYTES * 32 * warps or tile > 4096 * warps:
                    continue
                for stages in (3, 4, 5, 6):
                    # The weight tiles, and a twelfth more for x and thresholds.
                    if stages * tile * 13 // 12 > shared_limit:
                        continue
                    for splits in (1,) if kernel == "sparse_gate_up" else (1, 2, 4, 8, 16):
                        if splits == 1 or splits * block_k * 2 <= K:
                            yield Launch(row_bytes, block_k, warps, stages, splits)


def tune(
    shapes: Sequence[tuple[int, int]],
    dtype: str = "bfloat16",
    sparsity: float = 0.5,
    folder: Path = FOLDER,
    show_progress: bool = True,
) -> list[dict[str, Any]]:
    """Find the fastest configuration of every kernel at every shape [N, K], for 1 and 8 tokens.

    Returns:
        The rows written: {kernel, many, itemsize, K, N, launch}, with ``time_us`` beside them.

    Raises:
        WinaError: there is no CUDA card.
    """
    device = require_card("tuning launch configurations")
    from wina.kernels.triton.compiled import SHARED_PER_BLOCK

    major, minor = torch.cuda.get_device_capability(device)
    limit = SHARED_PER_BLOCK.get(10 * major + minor, min(SHARED_PER_BLOCK.values()))
    rows: list[dict[str, Any]] = []
    for kernel in kernels():
        for N, K in shapes:
            for tokens in (1, 8):
                found = list(candidates(kernel, K, limit))
                best = _fastest(
                    kernel, found, tokens, K, N, DTYPES[dtype], sparsity, device, show_progress
                )
                rows.append(
                    {
                        "kernel": kernel,
                        "many": tokens > 1,
                        "itemsize": DTYPES[dtype].itemsize,
                        "K": K,
                        "N": N,
                        "launch": launch_fields(best[0]),
                        "time_us": best[1] * 1e6,
                    }
                )
    table = [{name: value for name, value in row.items() if name != "time_us"} for row in rows]
    most = break_even(table, DTYPES[dtype], sparsity, device)
    save_tuned(card_of(device), table, most, folder)
    return rows


def break_even(
    rows: Sequence[dict[str, Any]], dtype: torch.dtype, sparsity: float, device: torch.device
) -> int:
    """The most tokens at which tuned sparse_linear is no slower than cuBLAS, all shapes together.

    Args:
        rows: tuned shapes, as :func:`wina.kernels.triton.config.save_tuned` takes them.
        dtype: of x and weights.
        sparsity: of every token, each with its own mask.
        device: the card.

    Returns:
        1, 2, 4, 8 or 16; one token is always sparse.
    """
    from wina.kernels.triton import sparse_linear

    shapes = [row for row in rows if row["kernel"] == "sparse_linear" and row["many"]]
    most = 1
    for tokens in (2, 4, 8, 16):
        sparse = dense = 0.0
        for row in shapes:
            config = Launch(**row["launch"])
            x, weights, threshold = _case(1, tokens, row["K"], row["N"], dtype, sparsity, device)
            copies = cold_copies(weights)
            sparse += seconds_in_graph(
                lambda ws, x=x, t=threshold, c=config: sparse_linear.launch(  # type: ignore[misc]
                    x, ws[0], t, None, None, c
                ),
                copies,
            )
            dense += seconds_in_graph(
                lambda ws, x=x: reference.dense_linear(x, ws[0]),  # type: ignore[misc]
                copies,
            )
        if sparse > dense:
            break
        most = tokens
    return most


def _case(
    products: int, tokens: int, K: int, N: int, dtype: torch.dtype, sparsity: float,
    device: torch.device,
) -> tuple[Tensor, list[Tensor], Tensor]:  # fmt: skip
    """x [T, K], weights [K, N] and a threshold [K]: one cut-off for all channels, so the tokens'
    masks differ, as they do in a model.
    """
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(tokens, K, generator=generator, device=device).to(dtype)
    weights = [
        (torch.randn(K, N, generator=generator, device=device) / K**0.5).to(dtype)
        for _ in range(products)
    ]
    return x, weights, x.abs().float().quantile(sparsity).expand(K).contiguous()


def _fastest(
    kernel: str,
    found: Sequence[Launch],
    tokens: int,
    K: int,
    N: int,
    dtype: torch.dtype,
    sparsity: float,
    device: torch.device,
    show_progress: bool,
) -> tuple[Launch, float]:
    from triton.runtime.errors import OutOfResources

    products = 2 if kernel == "sparse_gate_up" else 1
    x, weights, threshold = _case(products, tokens, K, N, dtype, sparsity, device)
    run, want = _call(kernel, x, threshold, weights)
    copies = cold_copies(weights)
    best: tuple[Launch, float] | None = None
    with progress(f"{kernel} {N}×{K}, {tokens} tokens", len(found), show_progress) as advance:
        for launch in found:
            advance()
            try:
                got = run(launch, weights)
            except OutOfResources:  # the estimate of shared memory was too low
                continue
            error = float((got.double() - want).abs().max())
            if not error <= 4 * torch.finfo(dtype).eps * (1 + float(want.abs().max())):
                raise AssertionError(f"{kernel} with {launch} is wrong by {error:.3g}")
            seconds = seconds_in_graph(lambda ws, chosen=launch: run(chosen, ws), copies)  # type: ignore[misc]
            if best is None or seconds < best[1]:
                best = (launch, seconds)
    assert best is not None
    return best


def _call(
    kernel: str, x: Tensor, threshold: Tensor, weights: list[Tensor]
) -> tuple[Callable[[Launch, list[Tensor]], Tensor], Tensor]:
    """The kernel as a function of its configuration and weights, and the exact result."""
    from wina.kernels.triton import gate_up, sparse_linear

    exact = [w.double() for w in weights]
    if kernel == "sparse_linear":
        return (
            lambda launch, ws: sparse_linear.launch(x, ws[0], threshold, None, None, launch),
            reference.sparse_linear(x.double(), exact[0], threshold),
        )
    return (
        lambda launch, ws: gate_up.launch(
            x, ws[0], ws[1], threshold, threshold, "silu", None, None, None, None, launch
        ),
        reference.sparse_gate_up(x.double(), exact[0], exact[1], threshold, threshold, "silu"),
    )


def print_tuned(rows: Sequence[dict[str, Any]]) -> None:
    """A table for people, then the JSON line."""
    from rich.console import Console
    from rich.table import Table

    from wina.bench.machine import machine_card

    table = Table(title="fastest launch configurations")
    for column in ("kernel", "tokens", "[N, K]", "launch", "µs"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row["kernel"], "2–16" if row["many"] else "1", f"{row['N']}×{row['K']}",
            json.dumps(row["launch"]), f"{row['time_us']:.1f}",
        )  # fmt: skip
    Console(width=140).print(table)
    print(json.dumps({"rows": list(rows), "machine": machine_card()}))
