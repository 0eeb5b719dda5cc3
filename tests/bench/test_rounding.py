"""The table of rounding ways: the way in use is what the library does."""

import pytest
import torch

from wina.bench.rounding import GROUPS, LEAST_SHARES, WAYS, error, measure, measure_planes
from wina.kernels.quantization import GROUP, quantize
from wina.rounding import Nearest


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


def test_the_planes_in_use_are_the_librarys() -> None:
    weight = torch.randn(50, 300)
    rows = {row["least"]: row for row in measure_planes([weight])}
    assert list(rows) == list(LEAST_SHARES)
    first, second = Nearest().round(weight.t(), None, "int4+int4").dequantize().chunk(2)
    for name, found in (("first", first), ("both", first + second)):
        own = float((weight - found).norm() / weight.norm())
        assert rows[0.92][name] == pytest.approx(own, rel=0.01)
    assert rows[0.64]["first"] <= rows[0.92]["first"] <= rows[1.0]["first"]
