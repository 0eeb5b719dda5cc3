"""Weights in planes: eight, four or no bits of a channel, chosen token by token."""

from __future__ import annotations

import pytest
import torch
from conftest import config, decode_logits, logits, plan_for
from torch import Tensor, nn

import wina
from wina.criteria import CRITERIA
from wina.errors import ConfigError
from wina.inspection import measure_sparsity
from wina.kernels.quantization import WEIGHT_DTYPES, QuantizedWeight, quantize
from wina.planes import in_planes, moments_of_planes, repeated, summed
from wina.prefill import parse_prefill
from wina.quantized_linear import QuantizedSparseLinear
from wina.registry import create
from wina.rounding import GPTQ, ROUNDINGS, Nearest
from wina.scores import ChannelScores
from wina.selectors import SELECTORS
from wina.switches import prefill_protocol

PLANES = WEIGHT_DTYPES["int4+int4"]


def planes_of(weight: QuantizedWeight) -> tuple[Tensor, Tensor]:
    """Both planes [N, K], float64."""
    first, second = weight.dequantize().double().chunk(2)
    return first.t(), second.t()


def modules_of(model: nn.Module) -> list[QuantizedSparseLinear]:
    return [m for m in model.modules() if isinstance(m, QuantizedSparseLinear)]


def test_the_second_plane_is_what_the_first_leaves() -> None:
    weight = torch.randn(150, 40)
    first, second = planes_of(Nearest().round(weight, None, PLANES.name))
    rest = (weight.double() - first).float()
    assert torch.equal(second, quantize(rest.t(), "int4").dequantize().t().double())
    one, both = ((weight - w).norm() / weight.norm() for w in (first, first + second))
    assert both < 0.09 * one < 0.01


def test_a_first_plane_clips_less_which_costs_little_and_spares_the_second() -> None:
    weight = torch.randn(150, 400)
    alone = quantize(weight.t(), "int4").dequantize().t()
    beyond = quantize((weight - alone).t(), "int4").dequantize().t()
    first, second = planes_of(Nearest().round(weight, None, PLANES.name))
    assert (weight - first).norm() < 1.05 * (weight - alone).norm()
    assert (weight - first - second).norm() < 0.75 * (weight - alone - beyond).norm()


def test_a_channel_of_a_plane_costs_its_column() -> None:
    weight = Nearest().round(torch.randn(96, 48) * torch.rand(48), None, PLANES.name)
    stacked = weight.dequantize().t()
    first, second = planes_of(weight)
    for spec, power in (("l2-norm", 1.0), ("norm-power:0.5", 0.5), ("magnitude", 0.0)):
        scores = ChannelScores(
            [stacked], create(CRITERIA, spec), create(SELECTORS, "threshold"), 0, planes=2
        )
        whole = (first + second).norm(dim=0)
        want = torch.cat([whole**power, whole ** (power - 1) * second.norm(dim=0)])
        torch.testing.assert_close(scores.constants, want.float())


def test_a_channel_without_weights_costs_nothing() -> None:
    weight = torch.randn(96, 48)
    weight[:, 7] = 0.0
    stacked = Nearest().round(weight, None, PLANES.name).dequantize().t()
    scores = ChannelScores(
        [stacked], create(CRITERIA, "l2-norm"), create(SELECTORS, "threshold"), 0, planes=2
    )
    assert scores.constants[7] == scores.constants[48 + 7] == 0.0
    assert scores.constants.isfinite().all()


def test_modules_are_in_planes_only_inside_the_block() -> None:
    module = nn.Linear(24, 40)
    weight, x = module.weight.data, torch.randn(3, 24)
    want = nn.functional.linear(
        x, summed(Nearest().round(weight, None, PLANES.name).dequantize().t(), 2), module.bias
    )
    with in_planes({"it": module}, PLANES) as weights:
        assert torch.equal(weights["it"], weight)
        assert module.weight.shape == (40, 48)
        torch.testing.assert_close(module(x), want)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert (module.in_features, len(module._forward_pre_hooks)) == (24, 0)
    with pytest.raises(ZeroDivisionError), in_planes({"it": module}, PLANES):
        raise ZeroDivisionError
    assert module.weight.shape == (40, 24)


@pytest.mark.parametrize("kind", [None, WEIGHT_DTYPES["int8"]])
def test_one_plane_changes_nothing(kind: object) -> None:
    module = nn.Linear(24, 40)
    with in_planes({"it": module}, kind) as weights:  # type: ignore[arg-type]
        assert weights == {}
        assert module.weight.shape == (40, 24)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_a_product_reads_each_plane_where_its_channel_is_kept(
    llama: nn.Module, backend: str, rounding: str
) -> None:
    plan = plan_for(llama, weight_dtype=PLANES.name, rounding=rounding)
    wina.sparsify(llama, plan, backend=backend)
    for module in modules_of(llama):
        assert module.planes == 2
        assert module.weight_dtype == PLANES.name
        x = torch.randn(1, 1, module.in_features) * module.threshold.median()
        kept = x.double().abs() > module.threshold.double().view(2, 1, -1)
        assert 0 < kept[0].sum() < kept[0].numel()
        planes = planes_of(module.quantized)
        want = sum((x.double() * k) @ w.t() for k, w in zip(kept, planes, strict=True))
        with torch.no_grad():
            torch.testing.assert_close(module(x).double(), want, rtol=1e-4, atol=1e-4)


def test_no_channel_is_read_in_its_second_plane_alone(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype=PLANES.name, method="wina-fisher"))
    for module in modules_of(llama):
        first, second = module.threshold.chunk(2)
        assert (second > 3.0 * first)[first > 0].all()


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_as_many_bytes_are_skipped_as_asked(
    llama: nn.Module, tokens: Tensor, rounding: str
) -> None:
    plan = plan_for(llama, weight_dtype=PLANES.name, rounding=rounding, method="wina-fisher")
    assert plan.realised == pytest.approx(0.5, abs=0.02)
    assert all(len(m.threshold) == 2 * m.projection.in_features for m in plan.layers.values())
    wina.sparsify(llama, plan)
    with measure_sparsity(llama) as seen, prefill_protocol(llama, parse_prefill("all", 2)):
        logits(llama, tokens)
    assert 0.3 < seen.mean < 0.7


def test_at_the_same_bytes_less_is_lost_than_by_dropping_from_8_bits() -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(256, 512), torch.randn(400, 512) * torch.logspace(-1, 1, 512)
    want = x.double() @ weight.double().t()
    losses = {}
    for name in ("int8", "int4+int4"):
        planes = WEIGHT_DTYPES[name].planes
        stacked = Nearest().round(weight, None, name).dequantize().t()
        score = repeated(x, planes).abs() * stacked.norm(dim=0)
        kept = torch.where(score > score.quantile(0.5), repeated(x, planes), 0.0)
        losses[name] = (kept.double() @ stacked.double().t() - want).square().sum()
    assert losses["int4+int4"] < 0.5 * losses["int8"]


def test_moments_are_of_inputs_that_no_later_plane_reads() -> None:
    x = torch.randn(2, 5, 6)
    first = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0])
    second = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 0.0])
    found = moments_of_planes(torch.cat([x * first, x * second], dim=-1), 2)
    for got, mask in zip(found, (first - second, second), strict=True):
        z = (x * mask).flatten(0, 1)
        torch.testing.assert_close(got, z.t() @ z)


def test_gptq_makes_up_for_what_the_first_plane_does_to_masked_inputs() -> None:
    torch.manual_seed(0)
    K = 64
    weight, x = torch.randn(96, K), torch.randn(800, K) @ torch.randn(K, K)
    stacked = Nearest().round(weight, None, PLANES.name).dequantize().t()
    scores = repeated(x, 2).abs() * stacked.norm(dim=0)
    kept = torch.where(scores > scores.quantile(0.5), repeated(x, 2), 0.0).double()
    want = kept[:, :K] @ weight.double().t()  # channels that are dropped are no rounding's fault
    moments = moments_of_planes(kept.float(), 2)
    losses = [
        (kept @ rounding.round(weight, moments, PLANES.name).dequantize().double() - want)
        .square().sum()
        for rounding in (GPTQ(), Nearest())
    ]  # fmt: skip
    assert losses[0] < 0.9 * losses[1]


@pytest.mark.parametrize("rounding", list(ROUNDINGS))
def test_plans_come_back_and_calibration_changes_no_weight(
    llama: nn.Module, tokens: Tensor, rounding: str, tmp_path
) -> None:
    before = {n: (p.data_ptr(), p.clone()) for n, p in llama.named_parameters()}
    plan = plan_for(llama, weight_dtype=PLANES.name, rounding=rounding)
    for name, parameter in llama.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])
    again = wina.SparsityPlan.load(plan.save(tmp_path))
    wina.sparsify(llama, plan, keep_original=True)
    want = decode_logits(llama, tokens)
    wina.restore(llama)
    wina.sparsify(llama, again)
    assert torch.equal(decode_logits(llama, tokens), want)


def test_gradients_pass_both_planes(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype=PLANES.name))
    layer = llama.model.layers[0].mlp.down_proj  # type: ignore
    x = torch.randn(1, 1, 96, requires_grad=True)
    layer(x).sum().backward()
    dropped = x.detach().abs()[0, 0] <= layer.threshold[:96]
    assert (x.grad[0, 0][dropped] == 0).all()  # type: ignore[index]
    assert (x.grad[0, 0][~dropped] != 0).any()  # type: ignore[index]


def test_what_needs_whole_channels_is_refused() -> None:
    for settings, what in (
        ({"correction": "bias"}, "correction 'none'"),
        ({"method": "cats"}, "gate's mask"),
    ):
        with pytest.raises(ConfigError, match=f"'int4\\+int4' needs .*{what}"):
            config(weight_dtype=PLANES.name, **settings)
