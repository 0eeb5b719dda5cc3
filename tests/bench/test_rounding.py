"""The table of rounding ways: the way in use is what the library does."""

import pytest
import torch

from wina.bench.rounding import GROUPS, WAYS, error, measure
from wina.kernels.quantization import GROUP, quantize


@pytest.mark.parametrize(("way", "dtype"), [("int8", "int8"), ("int4 −8, clipped", "int4")])
def test_the_way_in_use_is_the_librarys(way: str, dtype: str) -> None:
    weight = torch.randn(50, 300)
    own = (weight - quantize(weight, dtype).dequantize()).square().sum() / weight.square().sum()
    assert error(weight, GROUP, **WAYS[way]) == pytest.approx(float(own.sqrt()), rel=0.01)


def test_smaller_groups_and_clipping_are_never_worse() -> None:
    rows = measure([torch.randn(30, 256)])
    assert [row["group"] for row in rows] == list(GROUPS)
    for way in WAYS:
        errors = [row[way] for row in rows[:3]]
        assert errors == sorted(errors)
    assert all(row["int4 −8, clipped"] <= row["int4 −8"] for row in rows)
