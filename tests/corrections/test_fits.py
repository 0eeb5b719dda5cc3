"""Corrections in closed form, against float64."""

from __future__ import annotations

import torch

from wina.corrections import Bias, LowRank, Mode, Products, SparseFit, Terms, WeightSVD


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


def test_sparse_fit_is_the_mean_of_what_is_missing() -> None:
    missing = torch.randn(30, 7) + 0.5
    fit = SparseFit().fit()
    for part in missing.split([11, 19]):
        fit.add(Products(torch.zeros(len(part), 5), part))
    found = fit.terms(torch.randn(7, 5)).bias
    assert found is not None
    torch.testing.assert_close(found.double(), missing.double().mean(0), rtol=1e-5, atol=1e-6)


def test_the_mode_is_where_inputs_gather() -> None:
    x = torch.cat([torch.randn(4000, 6) * 0.05 - 0.3, torch.randn(1000, 6) * 2.0 + 1.0])
    assert abs(Mode().mode(x) + 0.3) < 0.05
    assert Mode().mode(torch.full((4, 6), 2.5)) == 2.5
    weight = torch.randn(7, 6)
    fit = Mode().fit()
    center = fit.center(x)
    terms = fit.terms(weight)
    assert center is terms.center
    torch.testing.assert_close(terms.bias, weight @ center)


def product(terms: Terms, x: torch.Tensor) -> torch.Tensor:
    """left·right·x in float64."""
    assert terms.left is not None
    assert terms.right is not None
    return x.double() @ terms.right.double().t() @ terms.left.double().t()


def test_weight_svd_is_the_nearest_matrix_of_its_rank() -> None:
    weight = torch.randn(40, 24)
    terms = WeightSVD(share=0.5).fit().terms(weight)
    assert terms.left is not None
    rank = terms.left.shape[1]
    assert rank == int(0.5 * 40 * 24 / 64)
    u, s, v = torch.linalg.svd(weight.double(), full_matrices=False)
    want = u[:, :rank] * s[:rank] @ v[:rank]
    torch.testing.assert_close(product(terms, torch.eye(24)).t(), want, rtol=1e-4, atol=1e-4)
    assert terms.values == rank * (40 + 24) <= 0.5 * 40 * 24


def test_low_rank_beats_the_weights_svd_on_what_is_dropped() -> None:
    weight = torch.randn(40, 24)
    dropped = torch.randn(300, 24) * torch.logspace(0, -2, 24)
    fit = LowRank(share=0.2).fit()
    fit.add(Products(dropped, None))
    exact = dropped.double() @ weight.double().t()
    ours, svd = (
        (exact - product(terms, dropped)).square().sum()
        for terms in (fit.terms(weight), WeightSVD(share=0.2).fit().terms(weight))
    )
    _, s, _ = torch.linalg.svd(exact, full_matrices=False)
    best = s[int(0.2 * 40 * 24 / 64) :].square().sum()
    assert ours < 0.8 * svd
    torch.testing.assert_close(ours, best, rtol=1e-3, atol=0)
