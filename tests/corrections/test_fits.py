"""Corrections in closed form, against float64."""

from __future__ import annotations

import torch

from wina.corrections import Bias, Products


def test_bias_is_the_weighted_mean_of_what_is_dropped() -> None:
    weight = torch.randn(7, 5)
    dropped = torch.randn(30, 5) * (torch.rand(30, 5) < 0.5) + 0.3
    fit = Bias().fit()
    for part in dropped.split([11, 19]):
        fit.add(Products(part, None))
    found = fit.terms(weight).bias
    assert found is not None
    want = dropped.double().mean(0) @ weight.double().t()
    torch.testing.assert_close(found.double(), want, rtol=1e-5, atol=1e-6)
