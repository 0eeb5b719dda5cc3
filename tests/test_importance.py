"""Tokens weighed by what the loss makes of their errors, and cut-offs that follow."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from allocation_problem import problem_of
from conftest import CALIBRATION, config, plan_for
from torch import Tensor, nn

import wina
from wina.allocation import Measurements, gradients
from wina.errors import CalibrationError, ConfigError, PlanError
from wina.importance import TokenImportance
from wina.kernels import ops, reference
from wina.kernels.reference import keep_mask
from wina.plan import SparsityPlan
from wina.plan_file import document_of, parse
from wina.projections import find_projections
from wina.registry import create
from wina.selectors import SELECTORS, Importance
from wina.testing import random_tokens, tiny_model


def test_importance_is_the_gradient_at_the_input(monkeypatch: pytest.MonkeyPatch) -> None:
    """|∂loss/∂x|² where x reaches the loss through one projection alone."""
    model = tiny_model("llama", torch.float64)
    direction = torch.randn(20, model.config.vocab_size)
    monkeypatch.setattr("wina.allocation.gradients._direction", lambda *_: direction)
    windows = random_tokens(40).view(2, 20)
    projections = find_projections(model)
    found = TokenImportance(model, [[p] for p in projections], windows).measured()
    assert list(found) == [p.name for p in projections]
    for name in ("model.layers.0.self_attn.v_proj", "model.layers.1.mlp.down_proj"):
        slopes = []
        for window in windows:
            change = torch.zeros(1, 20, model.get_submodule(name).in_features, dtype=torch.float64)
            change.requires_grad_()
            handle = model.get_submodule(name).register_forward_pre_hook(
                lambda _, inputs, change=change: (inputs[0] + change,)
            )
            (direction * model(input_ids=window[None]).logits[0].float()).sum().backward()
            handle.remove()
            assert change.grad is not None
            slopes.append(change.grad[0].square().sum(-1))
        torch.testing.assert_close(found[name].double(), torch.stack(slopes), rtol=1e-4, atol=1e-12)


def test_projections_with_one_mask_have_one_importance(llama: nn.Module) -> None:
    projections = find_projections(llama)[:3]
    windows = random_tokens(64).view(2, 32)
    apart = TokenImportance(llama, [[p] for p in projections], windows).measured()
    together = TokenImportance(llama, [projections], windows).measured()
    for name in apart:
        torch.testing.assert_close(together[name], sum(apart.values()))


def weighed(windows: int, tokens: int, channels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, what tells a token's importance, and the importance."""
    generator = torch.Generator().manual_seed(tokens)
    x = torch.randn(windows, tokens, channels, generator=generator) * torch.rand(channels) + 1.0
    direction = torch.randn(channels, generator=generator) / channels**0.5
    return x, direction, (x @ direction).exp()


@pytest.mark.parametrize(("tokens", "channels"), [(500, 24), (15, 200)])
def test_the_probe_is_the_ridge_regression(tokens: int, channels: int) -> None:
    """Primal and dual alike, against the normal equations."""
    x, _, importance = weighed(4, tokens, channels)
    x = x + torch.randn(4, 1, channels)  # windows differ
    selector = Importance(strength=0.4, ridge=0.2, steadiness=3)
    (probe,) = selector.fit(x, importance[None])
    assert probe is not None
    assert probe.shape == (channels + 1,)
    wide = x.double()
    standard = (wide - wide.mean((0, 1))) / wide.std((0, 1), correction=0)
    target = (importance.double() / importance.double().mean() + 1e-4).log()
    gram = 0.2 * 4 * tokens * torch.eye(channels, dtype=torch.float64)
    seen = torch.zeros(channels, dtype=torch.float64)
    for inputs, log in zip(standard, target, strict=True):
        level = inputs.mean(0)
        gram += (inputs - level).t() @ (inputs - level) + 3 * tokens * torch.outer(level, level)
        seen += (inputs - level).t() @ (log - log.mean())
    want = -0.4 * standard @ torch.linalg.solve(gram, seen)
    torch.testing.assert_close(wide @ probe[:-1].double() + probe[-1], want, rtol=1e-4, atol=1e-5)


def test_important_tokens_keep_more() -> None:
    x, direction, importance = weighed(2, 2000, 24)
    selector = Importance(ridge=1e-6, steadiness=0)
    (probe,) = selector.fit(x, importance[None])
    scale = selector.scale(x, torch.ones(24), 0.5, probe)
    assert scale is not None
    told = -0.25 * (x - x.mean((0, 1))) @ direction
    torch.testing.assert_close(scale.log(), told.clamp(-0.5, 0.5), rtol=0, atol=0.03)
    kept = keep_mask(x - 1.0, torch.full((24,), 0.3), scale).float().mean(-1)
    assert kept[importance > 2].mean() > kept[importance < 0.5].mean() + 0.02


def test_a_steady_probe_does_not_tell_texts_apart() -> None:
    """What distinguishes windows, and nothing within them, moves no cut-off."""
    x, direction, _ = weighed(8, 400, 24)
    x = x + torch.randn(8, 1, 1) * direction  # along what tells the importance
    importance = (x @ direction).exp()
    spread = {}
    for steadiness in (0, 1000):
        (probe,) = Importance(steadiness=steadiness).fit(x, importance[None])
        assert probe is not None
        said = (x @ probe[:-1]).mean(1)
        spread[steadiness] = float(said.std() / (x @ probe[:-1] - said[:, None]).std())
    assert spread[1000] < 0.2 * spread[0]


def test_constant_channels_say_nothing() -> None:
    x, _, importance = weighed(2, 250, 6)
    x[..., 2] = 7.0
    (probe,) = Importance().fit(x, importance[None])
    assert probe is not None
    assert probe[2] == 0.0
    assert probe.isfinite().all()


@pytest.mark.parametrize("where", ["x", "importance"])
def test_nan_on_the_calibration_text_is_an_error(where: str) -> None:
    x, _, importance = weighed(2, 25, 6)
    (x if where == "x" else importance)[1, 3] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        Importance().fit(x, importance[None])


def test_a_nan_keeps_the_token_whole() -> None:
    x = torch.tensor([[torch.nan, 1e-3], [1e-3, 1e-3]])
    scale = Importance().scale(x, torch.ones(2), 0.5, torch.tensor([1.0, 1.0, 0.0]))
    assert keep_mask(x, torch.ones(2), scale).tolist() == [[True, True], [False, False]]


@pytest.mark.parametrize("spec", ["strength=0", "limit=-1", "ridge=0", "steadiness=-1"])
def test_settings_that_mean_nothing(spec: str) -> None:
    with pytest.raises(ConfigError, match=spec.partition("=")[0]):
        create(SELECTORS, f"importance:{spec}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (1, 1, 64), (2, 3, 70), (0, 16)])
def test_operator(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x = torch.randn(shape).to(dtype)
    probe = torch.randn(shape[-1] + 1) / 4
    want = reference.probe_scale(x.double(), probe, 0.5)
    torch.testing.assert_close(ops.probe_scale(x, probe, 0.5), want, rtol=1e-5, atol=0)


@pytest.mark.parametrize(
    ("probe", "limit"), [(torch.ones(4), 0.5), (torch.ones(5).double(), 0.5), (torch.ones(5), 0.0)]
)
def test_operator_refuses(probe: Tensor, limit: float) -> None:
    with pytest.raises(RuntimeError, match=r"probe|limit"):
        ops.probe_scale(torch.ones(2, 4), probe, limit)


def test_plan_keeps_its_probes(llama: nn.Module, tmp_path: Path) -> None:
    plan = plan_for(llama, selector="importance")
    loaded = SparsityPlan.load(plan.save(tmp_path))
    for name, layer in plan.layers.items():
        assert layer.probe is not None
        assert torch.equal(layer.probe, loaded.layers[name].probe)
    wina.sparsify(llama, loaded)
    rows = wina.inspect(llama).rows
    assert all(row.extra_bytes == 4 * (row.shape[1] + 1) for row in rows)


@pytest.mark.parametrize("values", [torch.zeros(3), torch.full((65,), torch.nan)])
def test_a_probe_that_cannot_be_is_refused(llama: nn.Module, values: Tensor) -> None:
    plan = plan_for(llama, selector="importance")
    layer = plan.layers["model.layers.0.self_attn.q_proj"]
    layer.__dict__["probe"] = values
    with pytest.raises(PlanError, match=r"q_proj\.probe"):
        layer.check()


def test_probes_stay_float32_and_move(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, selector="importance"))
    llama.bfloat16()
    module = llama.model.layers[0].self_attn.q_proj
    assert module.probe.dtype == torch.float32
    assert not any("probe" in key for key in llama.state_dict())


def test_text_in_several_passes_fits_on_the_first(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wina.calibrator.CHUNK_TOKENS", 512)
    plan = plan_for(llama, selector="importance")
    assert plan.realised == pytest.approx(0.5, abs=0.02)
    assert all(layer.probe is not None for layer in plan.layers.values())


@pytest.mark.parametrize(
    "settings",
    [{"mask": "group"}, {"weight_dtype": "int8"}, {"weight_dtype": "int4"}, {"correction": "bias"},
     {"correction": "low-rank"}, {"statistics": "dense"}, {"method": "cats", "sparsity": 0.3}],
)  # fmt: skip
def test_with_other_settings(llama: nn.Module, settings: dict[str, Any]) -> None:
    plan = plan_for(llama, selector="importance", **settings)
    assert plan.realised == pytest.approx(settings.get("sparsity", 0.5), abs=0.02)
    wina.sparsify(llama, plan, backend="reference")
    with torch.no_grad():
        assert llama(input_ids=CALIBRATION[None, :8]).logits.isfinite().all()


def test_every_architecture(model: nn.Module) -> None:
    """Routed experts, which do not see every token, have one cut-off for all of them."""
    plan = plan_for(model, selector="importance")
    assert plan.realised == pytest.approx(0.5, abs=0.02)
    assert sum(layer.probe is not None for layer in plan.layers.values()) >= 4
    wina.sparsify(model, plan)
    with torch.no_grad():
        assert model(input_ids=CALIBRATION[None, :8]).logits.isfinite().all()


def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Watches in each pass of gradients."""
    seen: list[int] = []
    right = gradients.differentiate

    def counted(model: nn.Module, watched: Sequence[Any], *rest: Any, **more: Any) -> None:
        seen.append(len(watched))
        right(model, watched, *rest, **more)

    monkeypatch.setattr("wina.importance.differentiate", counted)
    monkeypatch.setattr(gradients, "differentiate", counted)
    return seen


@pytest.mark.parametrize(("allocation", "watches"), [("uniform", [14]), ("fisher", [28])])
def test_one_pass_for_all_that_looks_at_gradients(
    llama: nn.Module, allocation: str, watches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = passes(monkeypatch)
    plan_for(llama, selector="importance", allocation=allocation)
    assert seen == watches


def test_a_pass_of_others_shows_the_same(llama: nn.Module) -> None:
    problem = problem_of(llama)
    units = [unit.projections for unit in problem.units]
    own = TokenImportance(llama, units, problem.windows).measured()
    shared = TokenImportance(llama, units, problem.windows)
    grids = dict.fromkeys(own, (0.5,))
    gradients.loss_changes(replace(problem, watched=shared.watched), grids, problem.windows)
    found = shared.measured()
    assert all(torch.equal(found[name], own[name]) for name in own)
    # A pass over some of the text is not enough.
    some = TokenImportance(llama, units, problem.windows)
    gradients.loss_changes(replace(problem, watched=some.watched), grids, problem.windows[:2])
    assert list(some.measured()) == list(own)


def test_what_was_measured_serves_all_sparsities(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = passes(monkeypatch)
    measurements = Measurements(0.6)
    for sparsity in (0.3, 0.6):
        settings = config(selector="importance", allocation="fisher", sparsity=sparsity)
        wina.calibrate(
            llama, None, settings, CALIBRATION, show_progress=False, measurements=measurements
        )
    assert len(seen) == 1


def test_wide_projections_are_fitted_on_some_of_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    x, _, importance = weighed(4, 16, 40)
    (whole,) = Importance().fit(x, importance[None])
    monkeypatch.setattr("wina.selectors.importance._MOST", 32)
    (some,) = Importance().fit(x, importance[None])
    (want,) = Importance().fit(x[[0, 3]], importance[None, [0, 3]])
    assert some is not None
    assert want is not None
    assert not torch.equal(some, whole)
    torch.testing.assert_close(some, want)


def test_a_patched_projection_follows_its_probe(llama: nn.Module) -> None:
    plan = plan_for(llama, selector="importance")
    wina.sparsify(llama, plan)
    module = llama.model.layers[1].mlp.down_proj
    layer = plan.layers[module.name]
    assert layer.probe is not None
    x = torch.randn(1, 1, module.in_features)
    scale = reference.probe_scale(x, layer.probe, 0.5)
    with torch.no_grad():
        want = reference.mask_inputs(x, layer.threshold, scale) @ module.weight.t()
        torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(
            want, reference.mask_inputs(x, layer.threshold) @ module.weight.t()
        )


def test_a_projection_without_influence_has_no_probe(llama: nn.Module) -> None:
    with torch.no_grad():
        llama.model.layers[1].self_attn.o_proj.weight.zero_()
    plan = plan_for(llama, selector="importance")
    assert plan.layers["model.layers.1.self_attn.q_proj"].probe is None
    assert plan.layers["model.layers.1.mlp.up_proj"].probe is not None


def test_plans_name_the_selector_that_weighs_tokens(llama: nn.Module, tmp_path: Path) -> None:
    """Plans of before name none, and mean one cut-off for all tokens."""
    plan = plan_for(llama, method="wina-fisher")
    loaded = SparsityPlan.load(plan.save(tmp_path / "new"))
    assert loaded.config.selector == "importance"
    old = replace(plan, config=replace(plan.config, selector="threshold"))
    document = document_of(old, "")
    document["config"]["selector"] = None
    tensors = {
        f"{name}.{leaf}": getattr(layer, leaf)
        for name, layer in plan.layers.items()
        for leaf in ("threshold", "sample")
    }
    assert parse(document, tensors).config.selector_spec == "threshold"


def test_projections_that_read_one_hidden_state_share_the_regression() -> None:
    x, _, importance = weighed(4, 300, 24)
    both = torch.stack([importance, torch.zeros_like(importance), importance.square()])
    found = Importance().fit(x, both)
    assert found[1] is None
    for index in (0, 2):
        (alone,) = Importance().fit(x, both[index : index + 1])
        torch.testing.assert_close(found[index], alone, rtol=1e-4, atol=1e-6)


def test_calibration_fits_once_for_a_group(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts: list[int] = []
    right = Importance.fit

    def fit(self: Importance, x: Tensor, importance: Tensor) -> list[Tensor | None]:
        counts.append(len(importance))
        return right(self, x, importance)

    monkeypatch.setattr(Importance, "fit", fit)
    plan = plan_for(llama, selector="importance")
    assert counts == [3, 1, 2, 1] * 2
    q, k = (plan.layers[f"model.layers.0.self_attn.{name}_proj"].probe for name in "qk")
    assert q is not None
    assert k is not None
    assert not torch.equal(q, k)
