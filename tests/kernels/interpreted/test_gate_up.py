"""sparse_gate_up's kernel in the Triton interpreter against float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, case, exact
from torch import Tensor

from wina.kernels import reference
from wina.kernels.triton.config import Launch
from wina.kernels.triton.gate_up import launch

pytestmark = pytest.mark.usefixtures("poisoned_memory")

CONFIG = Launch(row_bytes=256, block_k=64, warps=4, stages=2)
ACTIVATIONS = list(reference.ACTIVATIONS)


def check(
    T: int, K: int, N: int, dtype: torch.dtype, activation: str, shared: bool, extras: bool,
    sparsity: float = 0.5, seed: int = 0,
) -> None:  # fmt: skip
    x, gate, gate_threshold = case(T, K, N, dtype, sparsity, seed)
    _, up, up_threshold = case(T, K, N, dtype, sparsity * 0.8, seed + 1)
    gate, up = gate / 8, up / 8
    up_threshold = gate_threshold if shared else up_threshold
    gate_bias, up_bias = torch.randn(2, N).to(dtype) if extras else (None, None)
    gate_scale, up_scale = torch.rand(2, T) + 0.5 if extras else (None, None)
    got = launch(
        x, gate, up, gate_threshold, up_threshold, activation,
        gate_bias, up_bias, gate_scale, up_scale, CONFIG,
    )  # fmt: skip
    g = exact(x, gate, gate_threshold, gate_bias, gate_scale)
    u = exact(x, up, up_threshold, up_bias, up_scale)
    want = reference.ACTIVATIONS[activation](g) * u
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= tolerance(x, gate, up, g, u, want, activation)).all()


def tolerance(
    x: Tensor, gate: Tensor, up: Tensor, g: Tensor, u: Tensor, want: Tensor, activation: str
) -> Tensor:
    """One rounding of h, and float32 sums whose error passes through the activation."""
    size = x.double().abs()
    g_error = 3e-6 * (size @ gate.double().abs()) + 1e-6
    u_error = 3e-6 * (size @ up.double().abs()) + 1e-6
    # No activation is steeper than 1.13, but relu2: 2g.
    slope = 1.2 + 2 * g.abs() * (activation == "relu2")
    value = reference.ACTIVATIONS[activation](g).abs()
    return (
        torch.finfo(x.dtype).eps * want.abs()
        + slope * g_error * u.abs()
        + (value + slope * g_error) * u_error
        + 1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("T", [1, 4, 16])
@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "two masks"])
def test_activations(activation: str, T: int, shared: bool, dtype: torch.dtype) -> None:
    check(T, 192, 101, dtype, activation, shared, extras=not shared)


@pytest.mark.parametrize("T", [1, 2])
@pytest.mark.parametrize(("K", "N"), [(1, 1), (63, 1000), (576, 63), (1000, 576), (4097, 65)])
def test_shapes(K: int, N: int, T: int) -> None:
    check(T, K, N, torch.bfloat16, "silu", shared=True, extras=False)


@pytest.mark.parametrize("sparsity", [0, 0.99, 1])
@pytest.mark.parametrize("T", [1, 9])
def test_sparsity(sparsity: float, T: int) -> None:
    check(T, 100, 70, torch.float16, "silu", shared=False, extras=True, sparsity=sparsity)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("T", [1, 3])
def test_nan_shows_in_its_token_only(activation: str, T: int) -> None:
    x, gate, threshold = case(T, 40, 24, torch.float32, 1)
    x[0, 3] = torch.nan
    h = launch(
        x, gate, gate, threshold, threshold, activation, None, None, None, None, CONFIG
    )  # fmt: skip
    assert h[0].isnan().all()
    assert h[1:].isfinite().all()


@given(
    T=st.integers(1, 16),
    K=st.integers(1, 80),
    N=st.integers(1, 80),
    sparsity=st.sampled_from([0.3, 0.5, 0.9]),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from(ACTIVATIONS),
    shared=st.booleans(),
    extras=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=40)
def test_random_calls(T, K, N, sparsity, dtype, activation, shared, extras, seed) -> None:
    check(T, K, N, dtype, activation, shared, extras, sparsity, seed)
