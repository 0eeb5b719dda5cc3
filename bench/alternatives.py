"""Other ways to skip rows of a weight on a CPU: ``python -m wina.bench.alternatives``.

The table behind "what was compared" in ``kernels/README.md``. One token, half of the channels
dropped, cold weights.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor

from wina.bench.machine import machine_card
from wina.bench.operators import DTYPES, ColdWeights, threshold_for
from wina.bench.timing import interleave, ratio
from wina.kernels import reference
from wina.kernels.dispatch import LayerSpec, choose

COLD_BYTES = 512 << 20

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def gather(x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """Copy the kept rows out, then multiply: every kept byte is read, written and read again."""
    kept = reference.keep_mask(x, threshold)[0].nonzero().squeeze(1)
    return x[:, kept] @ weight[kept]


def masked(x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """Mask x, then multiply densely, on the N-major layout that torch is fastest with."""
    masked_x = reference.mask_inputs(x, threshold)
    return F.linear(masked_x, weight.view(weight.shape[1], weight.shape[0]))


def dense(x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """No skipping: ``F.linear`` on the N-major layout."""
    return F.linear(x, weight.view(weight.shape[1], weight.shape[0]))


def broadcast_sum(x: Tensor, weight: Tensor, threshold: Tensor) -> Tensor:
    """What Inductor fuses into one C++ loop: mask, multiply, add up. It reads every row."""
    kept = torch.where(reference.keep_mask(x, threshold), x, 0.0)
    return (kept.t().float() * weight.float()).sum(0, keepdim=True).to(x.dtype)


def run(N: int = 4096, K: int = 4096, rounds: int = 7) -> None:
    """Print a table and a JSON line for float32 and bfloat16."""
    rows = []
    for name, dtype in DTYPES.items():
        if dtype == torch.float16:
            continue
        choice = choose(LayerSpec(torch.device("cpu"), dtype, K, N))
        products: dict[str, Product] = {
            f"this kernel ({choice.backend.name})": choice.backend.sparse_linear,
            "F.linear, dense": dense,
            "mask, then F.linear": masked,
            "gather rows, then multiply": gather,
            "Inductor, mask-multiply-sum": torch.compile(broadcast_sum),
        }
        weights = ColdWeights((N, K), 1, dtype, torch.device("cpu"), COLD_BYTES)
        x = torch.randn(1, K).to(dtype)
        threshold = threshold_for(x, 0.5)

        def contender(product: Product, x: Tensor, threshold: Tensor) -> Callable[[], float]:
            def call() -> float:
                weight = weights.take()[0].view(K, N)  # noqa: B023 - called in this pass
                start = time.perf_counter()
                product(x, weight, threshold)
                return time.perf_counter() - start

            return call

        with torch.no_grad():
            times = interleave(
                {key: contender(product, x, threshold) for key, product in products.items()},
                rounds,
                f"{name} {N}×{K}",
            )
        own = next(iter(times.values()))
        for key, timing in times.items():
            rows.append(
                {
                    "dtype": name,
                    "shape": [N, K],
                    "way": key,
                    "time_us": timing.median * 1e6,
                    "times_ours": ratio(timing, own),
                }
            )
    table = Table(title=f"one token, [N, K] = {N}×{K}, half of the channels dropped")
    for column in ("dtype", "way", "µs", "times ours"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            str(row["dtype"]),
            str(row["way"]),
            f"{row['time_us']:.0f}",
            f"{row['times_ours']:.1f}",
        )
    Console(width=100).print(table)
    print(json.dumps({"rows": rows, "machine": machine_card()}))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    run()
