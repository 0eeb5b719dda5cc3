"""The kernel that benches compare with computes what it should."""

import pytest
import torch
from operator_cases import assert_equal_up_to_rounding, case, exact

from wina.bench.teal_style import TILES, teal_style


@pytest.mark.parametrize("tile", TILES[:2])
@pytest.mark.parametrize(("K", "N"), [(63, 1000), (576, 130)])
def test_teal_style(K: int, N: int, tile: tuple[int, int, int]) -> None:
    x, weight, _ = case(1, K, N, torch.bfloat16, 0)
    want = exact(x, weight, torch.full((K,), 0.5))
    assert_equal_up_to_rounding(teal_style(x, weight, 0.5, tile), want, x, weight)
