"""The claims of docs/numerics.md, held against rows of ``wina.bench.numerics``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

# What sums may be off by, in units of a row's ``sums``: see docs/numerics.md.
ROUNDINGS = {"reference": 8, "cpu": 2, "triton": 8}


def assert_as_documented(rows: Sequence[Mapping[str, Any]]) -> None:
    """Errors are one rounding and float32 sums; nothing that is not finite is hidden."""
    assert rows
    for row in rows:
        assert row["hidden"] == 0, row
        integers = row["weights"] != "as x"
        sixteen = row["dtype"] != "float32"
        # There gate and up are rounded, and may overflow, before they are multiplied.
        early = row["backend"] == "reference" and sixteen and row["operator"] == "sparse_gate_up"
        lost = row["backend"] == "triton" and integers and "Inf" in row["case"]  # as NaN
        if not (early or lost):
            assert row["other_kind"] == 0, row
        if row["error"] is None:
            assert row["not_finite"] > 0, row
            continue
        eps = torch.finfo(getattr(torch, row["dtype"])).eps
        allowed = 1.2 * row["floor"] + ROUNDINGS[row["backend"]] * row["sums"]
        if early:
            allowed += eps
        if row["case"] == "denormals" and row["dtype"] == "bfloat16":
            if row["backend"] == "triton":
                continue  # the interpreter misreads them
            if row["backend"] == "reference" and not integers:
                continue  # torch's matmul flushes them where processors multiply bfloat16
        if row["backend"] == "triton" and row["dtype"] == "bfloat16":
            allowed += eps  # it cuts where a card rounds
        assert row["error"] <= allowed, row


def assert_massive_weights_are_what_integers_round_to(rows: Sequence[Mapping[str, Any]]) -> None:
    """Rounding weights costs the same share of a massive result as of an ordinary one."""
    for row in rows:
        if row["operator"] == "sparse_linear" and row["weights"] != "as x":
            assert row["with_weights"] <= {"int8": 0.01, "int4": 0.12}[row["weights"]], row
