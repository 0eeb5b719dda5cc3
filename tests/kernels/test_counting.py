"""Operators that calibration counts with: the native kernels against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from operator_cases import DTYPES
from torch import Tensor

from wina.kernels import counting, cpu

SIZES = [1, 2, 63, 256, 576, 1000, 4097]
ALL = [*DTYPES, torch.float64]
OPERATORS = {
    "count": (counting.count_operator, counting.count_scores),
    "sums": (counting.sums_operator, counting.kept_sums),
    "backward": (counting.backward_operator, counting.mask_backward),
}


@pytest.fixture(autouse=True)
def native() -> None:
    assert cpu.load() is None


def inputs(K: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x and a gradient [2, 9, K] that are no plain memory, c [K], a factor of each token."""
    torch.manual_seed(seed)
    x = torch.randn(2, 9, 2 * K).to(dtype)[..., ::2]
    gradient = torch.randn(2, K, 9).to(dtype).transpose(1, 2)
    factor = torch.rand(2, 9) + 0.5
    factor[0, :2] = 0.0
    return x, gradient, torch.rand(K), factor


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("scaled", [False, True])
def test_counts(K: int, dtype: torch.dtype, scaled: bool) -> None:
    x, _, constants, factor = inputs(K, dtype)
    x[1, 1, 0], x[1, 2, -1], constants[0] = torch.inf, torch.nan, 0.0
    scale = factor if scaled else None
    found = counting.count_operator(x, constants, scale)
    assert found.sum() == x.numel()
    assert torch.equal(found, counting.count_scores(x, constants, scale))


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("cuts", [0, 1, 20])
def test_sums(K: int, dtype: torch.dtype, cuts: int) -> None:
    x, gradient, constants, _ = inputs(K, dtype)
    cutoffs = torch.rand(cuts).sort().values
    cutoffs[:1] = -1.0
    cutoffs[-1:] = float(x[0, 0, 0].float().abs() * constants[0])  # a score on a cut-off is dropped
    cutoffs = cutoffs.sort().values
    found = counting.sums_operator(x, gradient, constants, cutoffs)
    assert found.shape == (2, 9, cuts)
    assert found.dtype == torch.float32
    scores = x.float().abs() * constants
    exact = [(x.double() * gradient.double() * (scores > cut)).sum(-1) for cut in cutoffs]
    for index, want in enumerate(exact):
        torch.testing.assert_close(found[..., index].double(), want, rtol=1e-5, atol=1e-4)
    by_definition = counting.kept_sums(x, gradient, constants, cutoffs)
    torch.testing.assert_close(by_definition, found, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ALL, ids=str)
@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("width", [0.05, 0.3, 0.5])
def test_backward(K: int, dtype: torch.dtype, width: float) -> None:
    x, gradient, threshold, factor = inputs(K, dtype)
    special = torch.tensor([0.0, torch.inf, torch.finfo(torch.float32).max, 0.3])[:K]
    threshold[-len(special) :] = special
    x[1, 1, -len(special) :] = 0.0
    before, sums = counting.backward_operator(x, gradient, threshold, factor, width)
    want, known = counting.mask_backward(x, gradient, threshold, factor, width)
    assert before.dtype == dtype
    assert torch.equal(before, want)
    assert torch.equal(before[0, :2], gradient[0, :2])  # tokens that stay dense
    assert torch.equal(before[..., threshold == 0.0], gradient[..., threshold == 0.0])
    torch.testing.assert_close(sums, known, rtol=1e-4, atol=1e-4)
    assert torch.equal(sums[2], known[2])


@given(
    seed=st.integers(0, 1000),
    K=st.integers(1, 80),
    threads=st.sampled_from([1, 2, 3]),
    special=st.sampled_from([0.0, -0.0, float("nan"), float("inf"), 1e-41, 3e38]),
)
def test_any_input_and_number_of_threads(seed: int, K: int, threads: int, special: float) -> None:
    x, gradient, constants, factor = inputs(K, torch.float32, seed)
    x[0, 3, seed % K] = special
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = counting.backward_operator(x, gradient, constants, factor, 0.3)
        sums = counting.sums_operator(x, gradient, constants, torch.tensor([0.1, 0.4]))
        counts = counting.count_operator(x, constants, factor)
    finally:
        torch.set_num_threads(before)
    known = counting.mask_backward(x, gradient, constants, factor, 0.3)
    for one, other in zip(found, known, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4, equal_nan=True)
    want = counting.kept_sums(x, gradient, constants, torch.tensor([0.1, 0.4]))
    if not torch.tensor(special).isnan() and abs(special) < 1e30:
        torch.testing.assert_close(sums, want, rtol=1e-4, atol=1e-4)
    assert torch.equal(counts, counting.count_scores(x, constants, factor))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    x, gradient, constants, factor = inputs(24, dtype)
    torch.library.opcheck(counting.count_operator, (x, constants, factor))
    torch.library.opcheck(counting.sums_operator, (x, gradient, constants, torch.rand(3)))
    torch.library.opcheck(counting.backward_operator, (x, gradient, constants, factor, 0.3))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("count", {"constants": torch.zeros(7)}, "constants"),
        ("count", {"constants": torch.zeros(8).double()}, "constants"),
        ("count", {"scale": torch.zeros(2)}, "scale"),
        ("count", {"x": torch.zeros(1, 8, dtype=torch.int32)}, "floating"),
        ("sums", {"gradient": torch.zeros(1, 7)}, "gradient"),
        ("sums", {"gradient": torch.zeros(1, 8).double()}, "gradient"),
        ("sums", {"constants": torch.zeros(7)}, "constants"),
        ("sums", {"cutoffs": torch.zeros(2).double()}, "cutoffs"),
        ("backward", {"threshold": torch.zeros(7)}, "threshold"),
        ("backward", {"scale": torch.zeros(2)}, "scale"),
        ("backward", {"gradient": torch.zeros(2, 8)}, "gradient"),
        ("backward", {"width": 0.0}, "width"),
        ("backward", {"width": 0.6}, "width"),
    ],
)
def test_wrong_arguments_are_named(name: str, change: dict[str, object], message: str) -> None:
    row, one = torch.randn(1, 8), torch.ones(1)
    arguments: dict[str, dict[str, object]] = {
        "count": {"x": row, "constants": torch.ones(8), "scale": one},
        "sums": {
            "x": row, "gradient": row, "constants": torch.ones(8), "cutoffs": torch.zeros(3),
        },
        "backward": {
            "x": row, "gradient": row, "threshold": torch.ones(8), "scale": one, "width": 0.3,
        },
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        OPERATORS[name][0](**{**arguments[name], **change})  # type: ignore[operator]
