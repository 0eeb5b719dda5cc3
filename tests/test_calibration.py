import pytest
import torch
from conftest import CALIBRATION, config, logits, plan_for
from torch import Tensor, nn

import wina
from wina.allocation import Measurements
from wina.errors import CalibrationError, PatchStateError
from wina.eval.perplexity import perplexity
from wina.methods import METHODS
from wina.needs import Needs
from wina.plan import SparsityPlan
from wina.testing import random_tokens, tiny_model, tiny_tokenizer
from wina.texts import bundled, to_windows

# Methods whose policy has more to do are covered by tests/allocation, those that want a rotated
# model by tests/rotation, those that a gate masks by test_gate_mask.
CHEAP_METHODS = [
    name
    for name, method in ((name, METHODS[name]) for name in METHODS)
    if not (method.dense or method.gate_mask)
    and (method.needs, method.rotation) == (Needs.NOTHING, "none")
]


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.65])
@pytest.mark.parametrize("selector", ["threshold", "relative", "topk", "importance"])
def test_realised_is_what_was_asked_on_tokens_never_seen(
    llama: nn.Module, sparsity: float, selector: str
) -> None:
    settings = {"sparsity": sparsity, "selector": selector, "calibration_tokens": 4096}
    plan = wina.sparsify(
        llama, config(**settings), texts=random_tokens(8192, seed=3), show_progress=False
    )
    assert plan.realised == pytest.approx(sparsity, abs=0.005)
    held_out = to_windows(random_tokens(4096, seed=4), None, 128)
    scored = perplexity(llama, held_out, show_progress=False)
    assert scored.realised == pytest.approx(sparsity, abs=0.01)


def test_sequential_statistics_drift_less_than_dense_ones() -> None:
    """Deep narrow model at high sparsity: upstream masks change what is seen downstream."""
    drift = {}
    for statistics in ("sequential", "dense"):
        model = tiny_model("llama", num_hidden_layers=6)
        wina.sparsify(
            model, config(sparsity=0.65, statistics=statistics), texts=CALIBRATION,
            show_progress=False,
        )  # fmt: skip
        held_out = to_windows(random_tokens(2048, seed=4), None, 128)
        drift[statistics] = abs(perplexity(model, held_out, show_progress=False).realised - 0.65)
    assert drift["sequential"] < 0.01
    assert drift["sequential"] < drift["dense"]


@pytest.mark.parametrize("method", CHEAP_METHODS)
def test_every_method_calibrates_every_projection(method: str, model: nn.Module) -> None:
    plan = plan_for(model, method=method)
    assert list(plan.all_layers) == [row.projection for row in wina.inspect(model).rows]
    for layer in plan.all_layers.values():
        assert layer.threshold.shape[-1] == layer.projection.in_features
        assert layer.realised == pytest.approx(0.5, abs=0.02)


def test_calibration_is_deterministic_and_changes_nothing(llama: nn.Module) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    a, b = plan_for(llama), plan_for(llama)
    for name, layer in a.layers.items():
        assert torch.equal(layer.threshold, b.layers[name].threshold)
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())
    assert not any(module._forward_pre_hooks for module in llama.modules())
    assert not llama.training


def test_chunks_agree_with_one_pass(llama: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = plan_for(llama, calibration_tokens=2048)
    monkeypatch.setattr("wina.calibrator.CHUNK_TOKENS", 512)
    parts = plan_for(llama, calibration_tokens=2048)
    assert parts.realised == pytest.approx(0.5, abs=0.01)
    for name, layer in whole.layers.items():
        assert parts.layers[name].cutoff == pytest.approx(layer.cutoff, rel=0.05)


def test_group_masks_are_shared(llama: nn.Module) -> None:
    plan = plan_for(llama, mask="group")
    q, k, v, _, gate, up, _ = list(plan.layers.values())[:7]
    assert torch.equal(q.threshold, k.threshold)
    assert torch.equal(q.threshold, v.threshold)
    assert torch.equal(gate.threshold, up.threshold)
    assert not torch.equal(q.threshold, gate.threshold)
    own = plan_for(llama)
    q, k = list(own.layers.values())[:2]
    assert not torch.equal(q.threshold, k.threshold)


def test_methods_choose_different_channels(llama: nn.Module) -> None:
    first = {m: next(iter(plan_for(llama, method=m).layers.values())) for m in CHEAP_METHODS}
    patterns = {
        m: tuple((layer.threshold / layer.threshold.mean()).round(decimals=4).tolist())
        for m, layer in first.items()
    }
    # Methods that differ in what they add to a sparse product choose the same channels.
    assert len(set(patterns.values())) == len({METHODS[m].criterion for m in CHEAP_METHODS}) > 3


@pytest.mark.parametrize("method", ["wina", "random"])
def test_sparsity_zero_keeps_everything(llama: nn.Module, method: str) -> None:
    plan = plan_for(llama, method=method, sparsity=0.0)
    assert plan.realised == 0.0
    assert all((layer.threshold == -1).all() for layer in plan.layers.values())


def test_text_needs_a_tokenizer(llama: nn.Module) -> None:
    with pytest.raises(CalibrationError, match="tokenizer"):
        wina.calibrate(llama, show_progress=False)


@pytest.mark.parametrize("texts", [[], [""], ["short"], "one string", [1.5], torch.rand(50)])
def test_unusable_texts_are_refused(llama: nn.Module, texts: object) -> None:
    with pytest.raises(CalibrationError):
        wina.calibrate(llama, tiny_tokenizer(), config(), texts, show_progress=False)  # type: ignore[arg-type]


def test_bundled_text_is_the_default(llama: nn.Module) -> None:
    plan = wina.calibrate(llama, tiny_tokenizer(), config(), show_progress=False)
    assert plan.calibration == {
        "text": "bundled",
        "tokens": 1024,
        "criterion": "l2-norm",
        "allocation": "uniform",
        "refinement": "none",
        "correction": "none",
        "rounding": "none",
        "rotation": "none",
    }
    assert plan.realised == pytest.approx(0.5, abs=0.01)


def test_what_learns_reads_more_of_the_bundled_text(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = {}

    def refine(model: nn.Module, plan: SparsityPlan, *rest: object) -> SparsityPlan:
        read["text"], read["windows"] = rest[1:3]
        return plan

    monkeypatch.setattr("wina.calibration.refine", refine)
    settings = config(refinement="learned:text=500000", calibration_tokens=2048)
    plan = wina.calibrate(llama, tiny_tokenizer(), settings, show_progress=False)
    assert plan.calibration["text"] == "bundled"
    text = tiny_tokenizer().decode(read["text"].flatten())
    for name in ("calibration", "learning"):
        assert bundled(name)[3][200:260] in text
    assert read["windows"].numel() == 2048


def test_what_was_measured_belongs_to_its_windows(llama: nn.Module) -> None:
    """A refinement reads more text, so the windows that policies look at are others then."""
    texts = [text[:400] for text in bundled("learning")[:40]]
    kept = Measurements(0.5)

    def thresholds(measurements: Measurements | None, **settings: str) -> Tensor:
        plan = wina.calibrate(
            llama, tiny_tokenizer(), config(method="wina-fisher", **settings), texts,
            show_progress=False, measurements=measurements,
        )  # fmt: skip
        return torch.cat([layer.threshold for layer in plan.layers.values()])

    thresholds(kept)
    learned = {"refinement": "learned:steps=1:batch=128:text=16384"}
    torch.testing.assert_close(thresholds(kept, **learned), thresholds(None, **learned))


def test_endless_texts_are_not_read_to_the_end(llama: nn.Module) -> None:
    def endless():
        while True:
            yield random_tokens(300)

    assert wina.calibrate(llama, None, config(), endless(), show_progress=False).realised > 0.4


@pytest.mark.parametrize("method", ["wina", "wina-fisher"])
def test_non_finite_activations_name_the_projection(llama: nn.Module, method: str) -> None:
    llama.model.layers[1].input_layernorm.weight.data.fill_(torch.nan)  # type: ignore
    with pytest.raises(CalibrationError, match=r"layers\.1\.self_attn\.q_proj.*NaN"):
        plan_for(llama, method=method)


def test_training_mode_is_put_back(llama: nn.Module) -> None:
    llama.train()
    plan_for(llama)
    assert llama.training


def test_patched_model_is_refused(llama: nn.Module, tokens: torch.Tensor) -> None:
    dense = logits(llama, tokens)
    wina.sparsify(llama, plan_for(llama))
    with pytest.raises(PatchStateError, match="restore"):
        plan_for(llama)
    wina.restore(llama)
    assert torch.equal(logits(llama, tokens), dense)
