"""What every correction promises: on sparse tokens only, the same on all paths, undone exactly."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import config, plan_for
from torch import Tensor, nn

import wina
from wina.corrections import CORRECTIONS, Terms
from wina.errors import ConfigError, PlanError
from wina.linear import SparseLinear
from wina.mlp import SparseGatedMLP
from wina.plan import SparsityPlan
from wina.switches import padded_batch
from wina.testing import random_tokens, tiny_model

TERMS = {
    "bias": lambda k, n: Terms(bias=torch.randn(n)),
    "low-rank": lambda k, n: Terms(left=torch.randn(n, 3), right=torch.randn(3, k)),
    "center": lambda k, n: Terms(bias=torch.randn(n), center=torch.randn(k) / 4),
    "both": lambda k, n: Terms(torch.randn(n), torch.randn(n, 3), torch.randn(3, k)),
}


def corrected(model: nn.Module, terms: str, **settings: object) -> SparsityPlan:
    """A plan whose corrections are random, so that a lost one is noticed."""
    plan = plan_for(model, **settings)
    layers = {
        name: replace(
            layer,
            terms=TERMS[terms](layer.projection.in_features, layer.projection.out_features),
        )
        for name, layer in plan.layers.items()
    }
    return replace(plan, layers=layers)


def want(module: SparseLinear, x: Tensor, terms: Terms) -> Tensor:
    """The corrected product of tokens [..., K] in float64."""
    if terms.center is not None:
        x = x - terms.center
    keep = x.abs() > module.threshold
    dropped = torch.where(keep, 0.0, x).double()
    y = F.linear(torch.where(keep, x, 0.0).double(), module.weight.double())
    if module.bias is not None:
        y = y + module.bias.double()
    if terms.bias is not None:
        y = y + terms.bias.double()
    if terms.left is not None and terms.right is not None:
        y = y + dropped @ terms.right.double().t() @ terms.left.double().t()
    return y


def sparse_modules(model: nn.Module) -> Iterator[tuple[SparseLinear, Terms]]:
    layers = wina.patch.patch_of(model).plan.layers
    for module in model.modules():
        if isinstance(module, SparseLinear):
            yield module, layers[module.name].terms


@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("width", [None, "int8", "int4"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_sparse_tokens_are_corrected_and_dense_ones_are_not(
    terms: str, backend: str, width: str | None, model_type: str
) -> None:
    model = tiny_model(model_type)
    plan = corrected(model, terms, weight_dtype=width)
    wina.sparsify(model, plan, backend=backend, prefill="last:0.5")
    for module, found in sparse_modules(model):
        x = torch.randn(1, 8, module.in_features) * module.threshold.median()
        expected = want(module, x, found)
        with torch.no_grad():
            dense = module._dense(x)
            mixed, one = module(x), module(x[:, 7:])
            with wina.dense(model):
                off = module(x)
        graph = module(x.clone().requires_grad_())
        for y in (mixed, graph):
            torch.testing.assert_close(y[:, :4], dense[:, :4], rtol=1e-4, atol=1e-3)
            torch.testing.assert_close(y[:, 4:].double(), expected[:, 4:], rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(one.double(), expected[:, 7:], rtol=1e-3, atol=1e-3)
        assert torch.equal(off, dense)
        assert not torch.allclose(one, dense[:, 7:], atol=1e-2)


@pytest.mark.parametrize("terms", list(TERMS))
def test_padding_changes_nothing(llama: nn.Module, terms: str) -> None:
    wina.sparsify(llama, corrected(llama, terms), prefill="last:0.5")
    ids = random_tokens(12, seed=4)[None]
    padded = torch.cat([torch.full((1, 5), 257), ids], dim=1)
    mask = (torch.arange(17) >= 5).long()[None]
    with torch.no_grad():
        alone = llama(input_ids=ids).logits
        with padded_batch(llama, [12], 17, "left"):
            together = llama(
                input_ids=padded, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(0)
            ).logits[:, 5:]
    torch.testing.assert_close(together, alone, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("width", [None, "int8"])
def test_fused_mlp_equals_its_parts(llama: nn.Module, terms: str, width: str | None) -> None:
    wina.sparsify(llama, corrected(llama, terms, weight_dtype=width))
    for module in llama.modules():
        if isinstance(module, SparseGatedMLP):
            module.down_proj.threshold.fill_(-1.0)  # rounding must not move a channel across it
            x = torch.randn(1, 1, 64)
            with torch.no_grad():
                fused = module(x)
                parts = module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x))
            torch.testing.assert_close(fused, parts, rtol=1e-3, atol=1e-3)


def test_restore_gives_the_model_back(llama: nn.Module, tokens: Tensor) -> None:
    before = llama(input_ids=tokens).logits
    names = set(llama.state_dict())
    wina.sparsify(llama, corrected(llama, "both"))
    assert set(llama.state_dict()) == names
    wina.restore(llama)
    assert torch.equal(llama(input_ids=tokens).logits, before)


def test_corrections_follow_a_cast(llama: nn.Module) -> None:
    wina.sparsify(llama, corrected(llama, "both"))
    llama.to(torch.bfloat16)
    for module, _ in sparse_modules(llama):
        assert module(torch.randn(1, 1, module.in_features, dtype=torch.bfloat16)).isfinite().all()


@pytest.mark.parametrize("terms", list(TERMS))
def test_a_plan_keeps_its_corrections(llama: nn.Module, tmp_path: Path, terms: str) -> None:
    plan = corrected(llama, terms)
    loaded = SparsityPlan.load(plan.save(tmp_path))
    for name, layer in plan.layers.items():
        for key, tensor in layer.terms.tensors().items():
            assert torch.equal(tensor, loaded.layers[name].terms.tensors()[key])


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        (Terms(bias=torch.zeros(5)), "bias has shape"),
        (Terms(bias=torch.full((64,), torch.nan)), "without NaN"),
        (Terms(bias=torch.zeros(64, dtype=torch.float64)), "must be float32"),
        (Terms(left=torch.zeros(64, 2)), "two factors"),
        (Terms(left=torch.zeros(64, 2), right=torch.zeros(3, 64)), "left has shape"),
        (Terms(center=torch.zeros(5)), "center has shape"),
        (Terms(None, torch.zeros(64, 2), torch.zeros(2, 64), torch.zeros(64)), "not both"),
    ],
)
def test_a_plan_with_wrong_corrections_is_refused(
    llama: nn.Module, tmp_path: Path, terms: Terms, message: str
) -> None:
    plan = plan_for(llama)
    name = "model.layers.0.self_attn.q_proj"
    layers = {**plan.layers, name: replace(plan.layers[name], terms=terms)}
    with pytest.raises(PlanError, match=message):
        SparsityPlan.load(replace(plan, layers=layers).save(tmp_path))


@pytest.mark.parametrize("name", list(CORRECTIONS))
@pytest.mark.parametrize("statistics", ["sequential", "dense"])
def test_every_correction_calibrates(llama: nn.Module, name: str, statistics: str) -> None:
    before = {key: value.clone() for key, value in llama.state_dict().items()}
    settings = {"correction": name, "statistics": statistics, "sparsity": 0.6}
    if CORRECTIONS[name]().compares and statistics == "dense":
        with pytest.raises(ConfigError, match="compares"):
            config(**settings)
        return
    plan = plan_for(llama, **settings)
    assert all(torch.equal(before[key], value) for key, value in llama.state_dict().items())
    corrected = [bool(layer.terms.tensors()) for layer in plan.layers.values()]
    assert all(corrected) if name != "none" else not any(corrected)
    assert abs(plan.realised - 0.6) < 0.01


# The mode is that of the first tokens, however many follow.
@pytest.mark.parametrize("name", [name for name in CORRECTIONS if name != "mode"])
def test_statistics_in_chunks_are_those_of_all_tokens(
    llama: nn.Module, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first projection has the same inputs in every pass; only its cut-off moves a little."""
    first = "model.layers.0.self_attn.q_proj"
    whole = plan_for(llama, correction=name).layers[first].terms.tensors()
    monkeypatch.setattr(wina.calibrator, "CHUNK_TOKENS", 256)
    parts = plan_for(llama, correction=name).layers[first].terms.tensors()
    for one, other in zip(_functions(whole), _functions(parts), strict=True):
        assert (other - one).norm() < 0.1 * one.norm()


def _functions(terms: dict[str, Tensor]) -> list[Tensor]:
    """What terms do: the factors of a low-rank one may change their signs together."""
    low_rank = [terms["left"] @ terms["right"]] if "left" in terms else []
    return [terms["bias"], *low_rank] if "bias" in terms else low_rank


@pytest.mark.parametrize("terms", list(TERMS))
@pytest.mark.parametrize("model_type", ["llama", "qwen2"])
def test_extra_bytes_are_what_a_token_reads(terms: str, model_type: str) -> None:
    model = tiny_model(model_type)
    plan = corrected(model, terms)
    wina.sparsify(model, plan)
    want = 0
    for module, found in sparse_modules(model):
        free = module.out_features if module.bias is not None and found.bias is not None else 0
        want += 4 * (found.values - free)  # a constant is read in the place of the layer's bias
    assert wina.inspect(model).extra_bytes == want > 0
    assert "corrections, probes and rotations read" in str(wina.inspect(model))
