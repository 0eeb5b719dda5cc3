"""Roundings: against their definitions, and from calibration to the patched model."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import CALIBRATION, config, logits, plan_for
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import wina
import wina.calibrator
from wina.allocation import Measurements
from wina.errors import CalibrationError, ConfigError, PlanError, UnknownNameError
from wina.kernels.quantization import (
    FORMATS,
    GROUP,
    WEIGHT_DTYPES,
    QuantizedWeight,
    choose_scales,
    grouped,
)
from wina.kernels.quantization import quantize as nearest
from wina.plan_file import digest
from wina.quantized_linear import QuantizedSparseLinear
from wina.registry import create
from wina.rounding import GPTQ, ROUNDINGS, USUAL_ROUNDING
from wina.rounding.gptq import _BLOCK
from wina.statistics import second_moments


def correlated(K: int, tokens: int = 400) -> Tensor:
    """Inputs [tokens, K] of unequal energies that say much about each other."""
    mix = torch.randn(K, K) + 2.0 * torch.randn(K, 1) * torch.randn(1, K)
    return torch.randn(tokens, K) @ mix * torch.logspace(-1, 1, K)


def loss(weight: Tensor, rounded: QuantizedWeight, x: Tensor) -> float:
    """Σ‖(W − Ŵ)x‖² in float64."""
    error = weight.double() - rounded.dequantize().t().double()
    return float((x.double() @ error.t()).square().sum())


def same(left: QuantizedWeight, right: QuantizedWeight) -> bool:
    return torch.equal(left.packed, right.packed) and torch.equal(left.scales, right.scales)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", list(ROUNDINGS))
@pytest.mark.parametrize(("N", "K"), [(1, 1), (63, 5), (128, 40), (300, 65)])
def test_every_rounding_gives_the_layout(name: str, N: int, K: int, dtype: str) -> None:
    weight = torch.randn(N, K)
    moments = second_moments(correlated(K))
    found = create(ROUNDINGS, name).round(weight, [moments], dtype)
    want = nearest(weight.t(), dtype)
    assert (found.columns, found.bits) == (N, FORMATS[dtype].bits)
    assert (found.packed.shape, found.packed.dtype) == (want.packed.shape, want.packed.dtype)
    assert (found.scales.shape, found.scales.dtype) == (want.scales.shape, want.scales.dtype)
    assert same(found, create(ROUNDINGS, name).round(weight.clone(), [moments], dtype))


@pytest.mark.parametrize("dtype", FORMATS)
def test_gptq_loses_less_than_nearest(dtype: str) -> None:
    weight, x = torch.randn(96, 64), correlated(64)
    found = GPTQ().round(weight, [second_moments(x)], dtype)
    assert loss(weight, found, x) < 0.7 * loss(weight, nearest(weight.t(), dtype), x)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("scale", [0.0, 3.0])
def test_gptq_of_uncorrelated_inputs_is_nearest(scale: float, dtype: str) -> None:
    weight = torch.randn(150, 70)
    energies = torch.diag(torch.rand(70) * scale)
    assert same(GPTQ().round(weight, [energies], dtype), nearest(weight.t(), dtype))


@pytest.mark.parametrize("K", [1, 24, 70])
def test_gptq_is_the_greedy_elimination_of_its_definition(K: int) -> None:
    """One channel at a time, with the inverse of what is left of H computed anew, in float64."""
    N, damp = 40, 0.02
    weight, form = torch.randn(N, K), FORMATS["int4"]
    H = second_moments(correlated(K)).double()
    order = H.diagonal().argsort(descending=True).tolist()
    found = GPTQ(damp=damp).round(weight, [H.float()], "int4").dequantize().double()
    H += damp * H.diagonal().mean() * torch.eye(K)
    rest, missed = weight.t().double(), 0
    for place, j in enumerate(order):
        if place % _BLOCK == 0:  # these choose their scales together
            block = order[place : place + _BLOCK]
            chosen = choose_scales(grouped(rest[block].float()), form)[:, 0]
            scales = dict(zip(block, chosen.tolist(), strict=True))
        want = (rest[j] / scales[j]).round().clamp(form.lowest, form.highest) * scales[j]
        missed += int((found[j] - want).abs().gt(1e-6).sum())
        inverse = H[order[place:]][:, order[place:]].inverse()
        error = (rest[j] - found[j]) / inverse[0, 0]
        for step, i in enumerate(order[place + 1 :], 1):
            rest[i] -= error * inverse[0, step]
    assert missed <= 0.002 * N * K  # a tie may fall either way in float32


def test_a_wide_projection_is_compensated_in_parts() -> None:
    weight, moments = torch.randn(33, 60), second_moments(correlated(60))
    found = GPTQ(channels=20).round(weight, [moments], "int4")
    for first in (0, 20, 40):
        part = slice(first, first + 20)
        want = GPTQ().round(weight[:, part], [moments[part, part]], "int4")
        assert torch.equal(found.packed[part], want.packed)
    assert not same(found, GPTQ().round(weight, [moments], "int4"))


def test_gptq_names_what_it_cannot_round() -> None:
    weight, moments = torch.randn(4, 3), torch.eye(3)
    with pytest.raises(ConfigError, match="weight holds NaN or Inf"):
        GPTQ().round(weight.log(), [moments], "int4")
    with pytest.raises(CalibrationError, match="too large to square"):
        GPTQ().round(weight, [moments * torch.inf], "int4")
    with pytest.raises(ConfigError, match="damp is a share"):
        create(ROUNDINGS, "gptq:damp=2")
    with pytest.raises(ConfigError, match="channels is a whole number"):
        create(ROUNDINGS, "gptq:channels=0.5")


def test_each_width_has_its_usual_rounding() -> None:
    assert set(USUAL_ROUNDING) == set(WEIGHT_DTYPES)
    assert config(weight_dtype="int4").rounding_spec == "gptq"
    assert config(weight_dtype="int8").rounding_spec == "nearest"
    assert config(weight_dtype="int4", rounding="nearest").rounding_spec == "nearest"
    assert config().rounding_spec is None
    assert config().make_rounding() is None
    with pytest.raises(ConfigError, match="needs a width"):
        config(rounding="gptq")
    with pytest.raises(UnknownNameError, match=r"unknown rounding 'gtpq'.*Did you mean 'gptq'"):
        config(weight_dtype="int4", rounding="gtpq")


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_calibration_rounds_for_the_masked_inputs(llama: nn.Module, sparsity: float) -> None:
    """The first projection: its inputs depend on no other rounding."""
    name = "model.layers.0.self_attn.q_proj"
    module = llama.get_submodule(name)
    assert isinstance(module, nn.Linear)
    seen: list[Tensor] = []
    hook = module.register_forward_hook(lambda _, x, __: seen.append(x[0]))
    layer = plan_for(llama, sparsity=sparsity, weight_dtype="int4").layers[name]
    hook.remove()
    x = seen[-1]  # the models are run before, to see what they are
    assert layer.weight is not None
    assert same(layer.weight, GPTQ().round(module.weight, [second_moments(x)], "int4"))
    if sparsity:  # the hook ran behind the masks
        assert (x[:, 2:] == 0.0).float().mean() > 0.3


def test_more_tokens_than_a_chunk_and_corrections(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wina.calibrator, "CHUNK_TOKENS", 256)
    for correction in ("none", "bias", "sparse-fit"):
        plan = plan_for(llama, weight_dtype="int4", correction=correction)
        assert all(layer.weight is not None for layer in plan.layers.values())
        assert plan.realised == pytest.approx(0.5, abs=0.03)


def test_a_plan_carries_the_integers(llama: nn.Module, tokens: Tensor, tmp_path: Path) -> None:
    plan = plan_for(llama, weight_dtype="int4", prefill="all")
    again = wina.SparsityPlan.load(plan.save(tmp_path))
    for name, layer in plan.layers.items():
        other = again.layers[name].weight
        assert layer.weight is not None
        assert other is not None
        assert same(layer.weight, other)
    wina.sparsify(llama, again)
    for name, layer in plan.layers.items():
        module = llama.get_submodule(name)
        assert isinstance(module, QuantizedSparseLinear)
        assert layer.weight is not None
        assert same(module.quantized, layer.weight)
    assert logits(llama, tokens).isfinite().all()


def test_a_plan_without_its_integers_is_refused(llama: nn.Module, tmp_path: Path) -> None:
    plan_for(llama, weight_dtype="int4").save(tmp_path)
    name = "model.layers.1.mlp.down_proj"
    for key, wrong in (("packed", None), ("scales", torch.zeros(96, 4, dtype=torch.bfloat16))):
        tensors = load_file(tmp_path / "plan.safetensors")
        kept = {k: v for k, v in tensors.items() if k != f"{name}.{key}"}
        if wrong is not None:
            kept[f"{name}.{key}"] = wrong
        folder = tmp_path / key
        rewrite(tmp_path, folder, kept)
        with pytest.raises(PlanError, match=f"{name}"):
            wina.SparsityPlan.load(folder)


def test_another_width_for_a_plan_needs_its_integers(llama: nn.Module) -> None:
    plan = plan_for(llama)
    other = replace(plan, config=replace(plan.config, weight_dtype="int4"))
    with pytest.raises(PlanError, match=r"no rounded weight for .*set rounding='nearest'"):
        wina.sparsify(llama, other)
    wina.sparsify(llama, replace(plan, config=replace(other.config, rounding="nearest")))


def test_plans_of_before_roundings_could_be_chosen(llama: nn.Module, tmp_path: Path) -> None:
    plan_for(llama, weight_dtype="int4", rounding="nearest").save(tmp_path / "new")
    document = json.loads((tmp_path / "new" / "plan.json").read_text())
    del document["config"]["rounding"]
    tensors = load_file(tmp_path / "new" / "plan.safetensors")
    rewrite(tmp_path / "new", tmp_path / "old", tensors, document)
    found = wina.SparsityPlan.load(tmp_path / "old")
    assert found.config.rounding_spec == "nearest"
    wina.sparsify(llama, found)


@pytest.mark.parametrize("settings", [[], "int4", None, {"weight_dtype": 8}, {"weight_dtype": []}])
def test_settings_that_are_none_are_refused(
    llama: nn.Module, tmp_path: Path, settings: object
) -> None:
    plan_for(llama, weight_dtype="int4").save(tmp_path / "new")
    document = json.loads((tmp_path / "new" / "plan.json").read_text())
    document["config"] = settings
    tensors = load_file(tmp_path / "new" / "plan.safetensors")
    rewrite(tmp_path / "new", tmp_path / "altered", tensors, document)
    with pytest.raises(PlanError, match="malformed"):
        wina.SparsityPlan.load(tmp_path / "altered")


def rewrite(
    source: Path,
    folder: Path,
    tensors: dict[str, Tensor],
    document: dict[str, object] | None = None,
) -> None:
    """A plan folder with other contents whose checksums fit."""
    folder.mkdir()
    save_file(tensors, folder / "plan.safetensors")
    document = document or json.loads((source / "plan.json").read_text())
    document.pop("sha256")
    blob = (folder / "plan.safetensors").read_bytes()
    document["tensors_sha256"] = hashlib.sha256(blob).hexdigest()
    document["sha256"] = digest(document)
    (folder / "plan.json").write_text(json.dumps(document))


def test_a_saved_model_comes_back_with_its_integers(
    llama: nn.Module, tokens: Tensor, tmp_path: Path
) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype="int4", prefill="all"))
    llama.save_pretrained(tmp_path)  # type: ignore[operator]
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, module in llama.named_modules():
        if isinstance(module, QuantizedSparseLinear):
            assert same(again.get_submodule(name).quantized, module.quantized)
    assert torch.equal(logits(again, tokens), logits(llama, tokens))


def test_groups_are_cut_and_filled() -> None:
    rows = torch.randn(3, GROUP + 2)
    found = grouped(rows)
    assert found.shape == (3, 2, GROUP)
    assert torch.equal(found.flatten(1)[:, : GROUP + 2], rows)
    assert not found.flatten(1)[:, GROUP + 2 :].any()


def test_an_interrupted_calibration_goes_on(
    llama: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = config(method="wina", weight_dtype="int4", calibration_tokens=512, window=64)
    calls: list[str] = []
    stop_after = 5
    original = GPTQ.round

    def counted(self: GPTQ, weight: Tensor, moments: Tensor | None, dtype: str) -> QuantizedWeight:
        if len(calls) == stop_after:
            raise KeyboardInterrupt
        calls.append(dtype)
        return original(self, weight, moments, dtype)

    def calibrate(large: bool = True, **more: object) -> wina.SparsityPlan:
        kept = Measurements(0.0, tmp_path, {"model": "m"}, large=large)
        wanted = replace(settings, **more)  # type: ignore[arg-type]
        return wina.calibrate(llama, None, wanted, CALIBRATION, False, kept)

    want = wina.calibrate(llama, None, settings, CALIBRATION, False)
    projections = len(want.layers)
    monkeypatch.setattr(GPTQ, "round", counted)
    with pytest.raises(KeyboardInterrupt):
        calibrate()
    calls.clear()
    stop_after = 1000
    found = calibrate()
    assert len(calls) == projections - 5
    for name, layer in found.layers.items():
        other = want.layers[name]
        assert layer.weight is not None
        assert other.weight is not None
        assert same(layer.weight, other.weight)
        assert torch.equal(layer.threshold, other.threshold)
    calls.clear()
    next(tmp_path.glob("*.safetensors")).write_bytes(b"damaged")
    calibrate()
    assert len(calls) == 1
    calls.clear()
    calibrate(sparsity=0.3)
    assert len(calls) == projections  # other masks, other inputs
    calls.clear()
    files = len(list(tmp_path.iterdir()))
    calibrate(large=False, sparsity=0.2)
    assert len(calls) == projections
    assert len(list(tmp_path.iterdir())) == files
