"""The claims of docs/numerics.md, held against rows of ``wina.bench.numerics``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# Sums of float32 products, relative to the result; where most of it cancels, to what is left.
ACCUMULATION, AFTER_CANCELLATION = 6e-6, 3e-4

# A gate's absolute error grows with the activation; silu makes it a relative one near 0.
MASSIVE_GATE = 1e-2


def assert_as_documented(rows: Sequence[Mapping[str, Any]]) -> None:
    """Errors are one rounding and float32 sums; nothing that is not finite is hidden."""
    assert rows
    for row in rows:
        assert row["hidden"] == 0, row
        integers = row["weights"] != "as x"
        sixteen = row["dtype"] != "float32"
        # There gate and up are rounded, and may overflow, before they are multiplied.
        early = row["backend"] == "reference" and sixteen and row["operator"] == "sparse_gate_up"
        if not (early or (row["case"] == "an Inf" and integers)):  # the latter may show as NaN
            assert row["other_kind"] == 0, row
        if row["error"] is None:
            assert row["not_finite"] > 0, row
            continue
        eps = torch.finfo(getattr(torch, row["dtype"])).eps
        allowed = 1.2 * row["floor"] + ACCUMULATION
        if row["case"] == "partial sums beyond float16":
            allowed += AFTER_CANCELLATION
        if (
            row["case"] == "massive activations"
            and row["operator"] == "sparse_gate_up"
            and integers
        ):
            allowed += MASSIVE_GATE
        if early:
            allowed += eps
        if row["backend"] == "triton" and row["dtype"] == "bfloat16":
            if row["case"] == "denormals":
                continue  # the interpreter misreads them
            allowed += eps  # it cuts where a card rounds
        assert row["error"] <= allowed, row


def assert_massive_weights_are_what_integers_round_to(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rounding weights costs the same share of a massive result as of an ordinary one."""
    for row in rows:
        if row["operator"] == "sparse_linear" and row["weights"] != "as x":
            assert row["with_weights"] <= {"int8": 0.01, "int4": 0.12}[row["weights"]], row
