"""Integer weights on a card: compared with the float64 definition, then timed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from wina.bench.budget import Budget
from wina.bench.card import cold_copies, seconds_in_graph
from wina.bench.gpu_check import compare, threshold_of
from wina.kernels import quantized, reference
from wina.kernels.quantization import FORMATS, QuantizedWeight, quantize
from wina.kernels.triton import DTYPES

SPARSITIES = (0.0, 0.5, 0.65)
# (projection, K, N) of Llama-3-8B.
SHAPES = (("o", 4096, 4096), ("down", 14336, 4096), ("gate_up", 4096, 14336))
# Seconds that the rows of one projection and format may take, quantizing included.
_ROWS_S = 8.0


def check_quantized_kernels(device: torch.device) -> int:
    """Compare both operators with the definition in float64; the number of calls compared.

    Raises:
        WinaError: a result is off; the message names the call.
    """
    compared = 0
    for T, K, N, dtype, form in _odd_calls():
        generator = torch.Generator(device).manual_seed(T + K + N)
        x = torch.randn(T, K, generator=generator, device=device).to(dtype)
        weights = [
            quantize(torch.randn(K, N, generator=generator, device=device) / K**0.5, form)
            for _ in range(2)
        ]
        threshold = threshold_of(x, 0.5)
        bias = torch.randn(N, generator=generator, device=device).to(dtype)
        masked = reference.mask_inputs(x, threshold).double()
        gate, up = (weight.dequantize().double() for weight in weights)
        g, u = masked @ gate + bias.double(), masked @ up
        # Kernels multiply integers with an offset, so errors go with the largest value of a row.
        row = torch.maximum(gate.abs(), up.abs()).amax(1, keepdim=True)
        size = masked.abs() @ row + bias.double().abs()
        eps, name = torch.finfo(dtype).eps, f"{T} tokens, K={K}, N={N}, {dtype}, {form}"
        got = _linear(x, weights[0], threshold, bias)
        compare(f"sparse_linear_quantized of {name}", got, g,
                eps * g.abs() + 1e-5 * size + 1e-6)  # fmt: skip
        h = _gate_up(x, weights, threshold, bias)
        allowed = (eps + 1e-5) * (1 + g.abs()) * (1 + u.abs())
        allowed = allowed + 2e-5 * size * (1 + g.abs() + u.abs())
        compare(f"sparse_gate_up_quantized of {name}", h, F.silu(g) * u, allowed)
        compared += 2
    return compared


def _odd_calls() -> Iterator[tuple[int, int, int, torch.dtype, str]]:
    for K, N in ((1, 1), (63, 1000), (576, 127), (1536, 4097)):
        for T in (1, 5, 16):
            for dtype in DTYPES:
                for form in FORMATS:
                    yield T, K, N, dtype, form


def bench_quantized(
    device: torch.device,
    copy: float,
    budget: Budget,
    shapes: Sequence[tuple[str, int, int]] = SHAPES,
) -> list[dict[str, Any]]:
    """Time one bfloat16 token on weights in 8 and 4 bits, against cuBLAS on bfloat16 weights.

    Args:
        device: the card.
        copy: its copy bandwidth in bytes per second.
        budget: ends the bench in time; what is left out is noted there.
        shapes: (projection, K, N); ``gate_up`` is a pair of weights.

    Returns:
        Rows of {card, kernel, projection, weights, shape [N, K], dtype, tokens, sparsity, time_us,
        cublas_us, speedup_vs_cublas, kept_bytes, bandwidth_share}; scales count as bytes.
    """
    rows: list[dict[str, Any]] = []
    for projection, K, N in shapes:
        pair = projection == "gate_up"
        x = torch.randn(1, K, device=device).bfloat16()
        dense = [torch.randn(N, K, device=device).bfloat16() for _ in range(1 + pair)]
        cublas: float | None = None
        for form in FORMATS:
            if not budget.allows(f"{form} {projection}", _ROWS_S):
                continue
            if cublas is None:
                cublas = seconds_in_graph(
                    lambda ws, x=x: [F.linear(x, w) for w in ws],  # type: ignore[misc]
                    cold_copies(dense),
                )
            weights = [quantize(w.t(), form) for w in dense]
            copies = cold_copies([t for w in weights for t in (w.packed, w.scales)])
            for sparsity in SPARSITIES:
                threshold = threshold_of(x, sparsity)

                def call(
                    ts: list[Tensor], x: Tensor = x, t: Tensor = threshold, pair: bool = pair,
                    N: int = N, bits: int = weights[0].bits,
                ) -> object:  # fmt: skip
                    if not pair:
                        return quantized.linear_operator(x, ts[0], ts[1], N, bits, t)
                    return quantized.gate_up_operator(x, *ts, N, bits, t, t, "silu")

                seconds = seconds_in_graph(call, copies)
                kept_rows = int(reference.keep_mask(x, threshold).sum())
                kept = kept_rows * sum(w.bytes for w in weights) // K
                rows.append(
                    {
                        "card": _name(device),
                        "kernel": "sparse_gate_up_quantized" if pair else "sparse_linear_quantized",
                        "projection": projection,
                        "weights": form,
                        "shape": [N, K],
                        "dtype": "bfloat16",
                        "tokens": 1,
                        "sparsity": sparsity,
                        "time_us": seconds * 1e6,
                        "cublas_us": cublas * 1e6,
                        "speedup_vs_cublas": cublas / seconds,
                        "kept_bytes": kept,
                        "bandwidth_share": kept / seconds / copy,
                    }
                )
    return rows


def _linear(x: Tensor, weight: QuantizedWeight, threshold: Tensor, bias: Tensor | None) -> Tensor:
    return quantized.linear_operator(
        x, weight.packed, weight.scales, weight.columns, weight.bits, threshold, bias
    )


def _gate_up(
    x: Tensor, weights: Sequence[QuantizedWeight], threshold: Tensor, bias: Tensor | None
) -> Tensor:
    gate, up = weights
    return quantized.gate_up_operator(
        x, gate.packed, gate.scales, up.packed, up.scales, gate.columns, gate.bits,
        threshold, threshold, "silu", bias, None,
    )  # fmt: skip


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
