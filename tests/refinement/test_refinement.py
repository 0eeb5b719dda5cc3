"""Learned thresholds: true slopes, a met budget, a lower divergence, a model left as it was."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import CALIBRATION, config, divergence, plan_for
from torch import Tensor, nn

import wina
from wina.errors import ConfigError
from wina.inspection import measure_sparsity
from wina.plan import SparsityPlan, weighted_mean
from wina.planes import in_planes
from wina.projections import linear_of
from wina.refinement import Exercise, Learned, Refinement, Slopes
from wina.refining import _divergence, _Mask, _masked, _masks, refine

QUICK = "learned:steps=12:channels=0.1:constants=0.02:batch=256:text=2048"


BESIDE = [
    {"selector": "importance"},
    {"weight_dtype": "int4+int4"},
    {"head": "sparse"},
    {"selector": "importance", "weight_dtype": "int4+int4", "head": "sparse"},
]


class Analytic:
    """A loss and a reading that are known: Σ a·t² and Σ r/(1 + t)."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.costs = {"a": torch.rand(8) + 0.1, "b": 5.0 * torch.rand(4) + 0.5}
        self.reads = {"a": torch.full((8,), 0.75 / 8), "b": torch.full((4,), 0.25 / 4)}
        self.logs = {name: torch.zeros_like(cost) for name, cost in self.costs.items()}

    def slopes(self, _: Tensor) -> Slopes:
        t = {name: logs.exp() for name, logs in self.logs.items()}
        return Slopes(
            float(sum((self.costs[n] * t[n] ** 2).sum() for n in t)),
            float(sum((self.reads[n] / (1 + t[n])).sum() for n in t)),
            {n: 2 * self.costs[n] * t[n] ** 2 for n in t},
            {n: -self.reads[n] * t[n] / (1 + t[n]) ** 2 for n in t},
        )


def test_the_marginal_loss_of_a_byte_becomes_equal_at_the_same_budget() -> None:
    known = Analytic()
    before = known.slopes(torch.empty(0))
    exercise = Exercise(CALIBRATION.reshape(16, 128), known.logs, before.read, known.slopes)
    Learned(steps=150, channels=0.1).refine(exercise)
    after = known.slopes(torch.empty(0))
    assert abs(after.read - before.read) < 0.01
    assert after.loss < 0.9 * before.loss
    prices = torch.cat([-after.of_loss[name] / after.of_read[name] for name in known.logs])
    assert prices.max() / prices.min() < 1.3
    first = torch.cat([-before.of_loss[name] / before.of_read[name] for name in known.logs])
    assert first.max() / first.min() > 5.0


@pytest.mark.parametrize("weighed", [False, True])
def test_slopes_are_those_of_moved_thresholds(weighed: bool) -> None:
    """A loss that is linear in the masked inputs, whose change can be counted.

    Args:
        weighed: every token has a factor of its own for the thresholds.
    """
    torch.manual_seed(0)
    x = torch.randn(1, 200_002, 3)
    g = torch.sign(x) * torch.tensor([1.0, -2.0, 0.5])
    factor = 1.0 + torch.rand(1, 200_002) if weighed else None
    logs = torch.tensor([0.5, 0.8, 1.5]).log()
    mask = _Mask(logs, torch.ones(1), share=0.25, sink_tokens=2, scale=lambda _: factor)
    inputs = x.clone().requires_grad_()
    (masked,) = mask.before(nn.Identity(), (inputs,))
    ((masked * g)[:, 2:].sum() / 200_000).backward()

    cutoffs = mask.logs.exp() if factor is None else mask.logs.exp() * factor[:, 2:].unsqueeze(-1)

    def at(step: float, of: Tensor) -> Tensor:
        keep = x[:, 2:].abs() > cutoffs * math.exp(step)
        return (of[:, 2:] * keep).sum((0, 1)) / 200_000

    torch.testing.assert_close(masked[:, :2], x[:, :2])
    torch.testing.assert_close(masked.count_nonzero() - 6, (masked[:, 2:] != 0).sum())
    loss = (at(0.15, x * g) - at(-0.15, x * g)) / 0.3
    torch.testing.assert_close(mask.of_loss, loss, rtol=0.05, atol=0.002)
    read = (at(0.15, torch.ones_like(x)) - at(-0.15, torch.ones_like(x))) / 0.3 * 0.25 / 3
    torch.testing.assert_close(mask.of_read, read, rtol=0.05, atol=1e-4)
    assert mask.read == pytest.approx(0.25 * float(at(0.0, torch.ones_like(x)).mean()), rel=1e-6)
    kept = x[:, 2:].abs() > cutoffs
    torch.testing.assert_close(inputs.grad[:, 2:], (g[:, 2:] * kept) / 200_000)  # type: ignore[index]


def test_sinks_keep_what_is_always_dropped() -> None:
    x = torch.randn(1, 6, 3)
    logs = torch.tensor([torch.inf, -torch.inf, 0.5])
    mask = _Mask(logs, torch.ones(1), share=1.0, sink_tokens=2, scale=lambda _: None)
    inputs = x.clone().requires_grad_()
    (masked,) = mask.before(nn.Identity(), (inputs,))
    masked.sum().backward()
    kept = torch.stack([torch.zeros(4), torch.ones(4), (x[0, 2:, 2].abs() > logs[2].exp())], 1)
    torch.testing.assert_close(masked[0], x[0] * torch.cat([torch.ones(2, 3), kept]))
    torch.testing.assert_close(inputs.grad, (masked != 0.0).float())
    assert not mask.of_loss[:2].any()
    assert not mask.of_read[:2].any()


def test_constants_that_are_missing_are_learned() -> None:
    """Sparse logits that lack a constant: the divergence falls to zero."""
    target = torch.tensor([0.5, -0.25, 0.0, 0.25])
    shift = torch.zeros(4)
    logits = torch.randn(64, 4)

    def slopes(ids: Tensor) -> Slopes:
        moved = shift.clone().requires_grad_()
        rows = logits[ids.flatten()]
        dense = (rows + target).log_softmax(-1)
        loss = F.kl_div(
            (rows + moved).log_softmax(-1), dense, reduction="batchmean", log_target=True
        )
        (slope,) = torch.autograd.grad(loss, moved)
        return Slopes(float(loss.detach()), 0.5, {}, {}, {"p": slope})

    windows = torch.arange(64).reshape(4, 16)
    exercise = Exercise(windows, {}, 0.5, slopes, {"p": shift})
    Learned(steps=80, constants=0.0, batch=32).refine(exercise)
    assert not shift.any()
    Learned(steps=80, constants=0.03, batch=32).refine(exercise)
    torch.testing.assert_close(shift - shift.mean(), target - target.mean(), atol=0.02, rtol=0)


def test_slopes_of_constants_are_those_of_added_constants() -> None:
    units = torch.tensor([2.0, 3.0])
    mask = _Mask(torch.zeros(3), units, share=1.0, sink_tokens=2, scale=lambda _: None)
    y, g = torch.randn(1, 6, 2).requires_grad_(), torch.randn(1, 6, 2)
    mask.shift += torch.tensor([1.0, -1.0])
    shifted = mask.after(nn.Identity(), None, y)
    torch.testing.assert_close(shifted[:, :2], y[:, :2])
    torch.testing.assert_close(shifted[:, 2:], y[:, 2:] + torch.tensor([2.0, -3.0]))
    (shifted * g).sum().backward()
    torch.testing.assert_close(mask.of_shift, g[0, 2:].sum(0) * torch.tensor([2.0, 3.0]))
    torch.testing.assert_close(y.grad, g)
    mask.forget()
    assert not mask.of_shift.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_divergence_and_its_slope(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wina.refining._AT_ONCE", 100)  # rows of 3, 3, 1 tokens
    sparse, dense = (torch.randn(2, 9, 33) * 2).to(dtype), (torch.randn(2, 9, 33) * 2).to(dtype)
    known = sparse.double().requires_grad_()
    want = F.kl_div(
        known[:, 2:].log_softmax(-1).flatten(0, 1),
        dense.double()[:, 2:].log_softmax(-1).flatten(0, 1),
        reduction="batchmean", log_target=True,
    )  # fmt: skip
    want.backward()
    found, slope = _divergence(sparse, dense, 2)
    assert found == pytest.approx(float(want.detach()), rel=1e-5)
    assert slope.dtype == dtype
    precision = torch.finfo(dtype).eps
    torch.testing.assert_close(slope.double(), known.grad, rtol=precision, atol=precision / 10)


@pytest.mark.parametrize(
    ("parts", "constant"),
    [
        ("channels=0.1:constants=0.02", True),
        ("channels=0:constants=0.05", True),
        ("channels=0.1:constants=0", False),
    ],
)
def test_learning_lowers_the_divergence_at_the_same_bytes(
    llama: nn.Module, parts: str, constant: bool
) -> None:
    ids = CALIBRATION.reshape(-1, 128)
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    settings = {"sparsity": 0.6, "calibration_tokens": 2048}
    plain = plan_for(llama, **settings)
    learned = plan_for(
        llama, refinement=f"learned:steps=12:batch=256:text=2048:{parts}", **settings
    )
    assert all(bool(layer.terms.tensors()) == constant for layer in learned.layers.values())
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert all(p.requires_grad for p in llama.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())
    assert divergence(llama, learned, ids) < 0.95 * divergence(llama, plain, ids)
    wina.sparsify(llama, learned, prefill="all", backend="reference")
    with measure_sparsity(llama) as counter, torch.no_grad():
        llama(input_ids=ids)
    assert abs(counter.mean - 0.6) < 0.002
    assert learned.realised == pytest.approx(counter.mean, abs=1e-6)


@pytest.mark.parametrize(
    "settings", [{"weight_dtype": "int8"}, {"criterion": "magnitude"}, *BESIDE]
)
def test_goes_with_other_parts(llama: nn.Module, settings: dict[str, str]) -> None:
    plan = plan_for(llama, refinement=QUICK, sparsity=0.5, **settings)
    assert abs(plan.realised - 0.5) < 0.002
    assert plan.config.refinement_spec == plan.calibration["refinement"] == QUICK


@pytest.mark.parametrize("settings", [{}, *BESIDE])
def test_what_is_learned_from_is_the_sparse_model(
    llama: nn.Module, settings: dict[str, str]
) -> None:
    plan = plan_for(llama, sparsity=0.6, **settings)
    ids = CALIBRATION.reshape(-1, 128)[:2]
    logs = {name: layer.threshold.clamp_min(0.0).log() for name, layer in plan.layers.items()}
    units = {name: torch.ones(layer.projection.out_features) for name, layer in plan.layers.items()}
    modules = {name: linear_of(llama, name) for name in plan.layers}
    with torch.no_grad():
        dense = llama(input_ids=ids).logits
        with in_planes(modules, plan.config.kept_as), _masked(llama, _masks(plan, logs, units)):
            masked = llama(input_ids=ids).logits
        wina.sparsify(llama, plan, prefill="all", backend="reference")
        sparse = llama(input_ids=ids).logits
    # Where a threshold's logarithm rounds it, a channel on it may fall on the other side.
    assert (masked - sparse).abs().median() < 1e-3 * (dense - sparse).abs().median()


def test_every_architecture_is_refined(model: nn.Module) -> None:
    plan = plan_for(model, refinement="learned:steps=2:batch=128:text=512", sparsity=0.5)
    layers = plan.layers
    share = weighted_mean(
        [layer.projection for layer in layers.values()],
        {name: layer.realised for name, layer in layers.items()},
    )
    assert abs(share - 0.5) < 0.01


class Scatter(Refinement):
    """Moves every threshold by another amount."""

    def refine(self, exercise: Exercise) -> None:
        for logs in exercise.logs.values():
            logs += torch.linspace(-1.0, 2.0, len(logs))


def test_the_budget_is_met_whatever_was_moved_and_fixed_channels_stay(llama: nn.Module) -> None:
    ids = CALIBRATION.reshape(-1, 128)
    plan = plan_for(llama, sparsity=0.5, calibration_tokens=2048)
    name, *_ = plan.layers
    fixed = plan.layers[name].threshold.clone()
    fixed[0], fixed[1] = -1.0, torch.inf
    plan = replace(plan, layers={**plan.layers, name: replace(plan.layers[name], threshold=fixed)})
    found = refine(llama, plan, Scatter(), ids[:2], ids, show_progress=False)
    assert abs(found.realised - 0.5) < 0.002
    threshold = found.layers[name].threshold
    assert threshold[0] == -1.0
    assert threshold[1] == torch.inf
    ratio = (threshold[2:] / fixed[2:]).log().diff()
    torch.testing.assert_close(ratio, torch.full_like(ratio, 3.0 / (len(fixed) - 1)))


@pytest.mark.parametrize("settings", [{}, BESIDE[-1]])
def test_the_kernels_read_what_was_learned(
    llama: nn.Module, tmp_path: Path, settings: dict[str, str]
) -> None:
    plan = plan_for(llama, refinement=QUICK, **settings)
    loaded = SparsityPlan.load(plan.save(tmp_path))
    wina.sparsify(llama, loaded, keep_original=True)
    for name, layer in plan.layers.items():
        assert torch.equal(llama.get_submodule(name).threshold, layer.threshold)
        assert torch.equal(llama.get_submodule(name).shift, layer.terms.bias)  # type: ignore[arg-type]
    token = CALIBRATION[None, :1]
    with torch.no_grad():
        found = llama(input_ids=token).logits
        wina.restore(llama)
        dense = llama(input_ids=token).logits
        wina.sparsify(llama, loaded, backend="reference")
        wanted = llama(input_ids=token).logits
    assert (found - wanted).abs().median() < 1e-3 * (dense - wanted).abs().median()


def test_is_reproducible(llama: nn.Module) -> None:
    first, second = (
        plan_for(llama, refinement="learned:steps=3:constants=0.02:text=512") for _ in range(2)
    )
    for name, layer in first.layers.items():
        assert torch.equal(second.layers[name].threshold, layer.threshold)
        assert torch.equal(second.layers[name].terms.bias, layer.terms.bias)  # type: ignore[arg-type]


def test_a_failure_leaves_a_dense_model(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: object, exercise: Exercise) -> None:
        exercise.slopes(CALIBRATION[None, :64])
        raise KeyboardInterrupt

    monkeypatch.setattr(Learned, "refine", fail)
    with pytest.raises(KeyboardInterrupt):
        plan_for(llama, refinement="learned")
    assert not wina.patch.is_patched(llama)
    assert all(p.requires_grad for p in llama.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in llama.modules())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"selector": "topk"}, "selector 'threshold'"),
        ({"mask": "group"}, "mask 'projection'"),
        ({"method": "cats"}, "mask 'projection'"),
        ({"correction": "bias"}, "correction 'none'"),
    ],
)
def test_what_cannot_be_refined_is_refused(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config(refinement="learned", **settings)


def test_sparsity_zero_learns_nothing(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wina.calibration, "refine", None)
    plan = plan_for(llama, sparsity=0.0, refinement="learned")
    assert all(bool((layer.threshold == -1.0).all()) for layer in plan.layers.values())
