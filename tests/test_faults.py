"""Whatever stops wina, wherever, the model is whole afterwards."""

from __future__ import annotations

import signal

import pytest
import torch
from conftest import CALIBRATION, config, decode_logits, plan_for
from faults import Injected, Snapshot, fail_at, steps_of
from torch import Tensor, nn

import wina
from wina.errors import PatchStateError
from wina.linear import SparseLinear
from wina.patch import is_patched
from wina.testing import random_tokens, tiny_model

PATCHING = ("patch.py", "control.py", "layout.py", "linear.py", "quantized_linear.py", "mlp.py",
            "group.py", "plan.py")  # fmt: skip
CALIBRATING = ("calibration.py", "scores.py", "statistics.py", "allocation/gradients.py",
               "allocation/blocks.py", "allocation/base.py")  # fmt: skip


def small(model_type: str) -> nn.Module:
    return tiny_model(model_type, num_hidden_layers=1)


@pytest.mark.parametrize(
    ("model_type", "weight_dtype"),
    [("llama", None), ("phi3", None), ("gpt_neox", None), ("llama", "int8")],
)
def test_patching_and_restoring_stopped_at_any_line(
    model_type: str, weight_dtype: str | None
) -> None:
    model = small(model_type)
    plan = plan_for(model, weight_dtype=weight_dtype, head="sparse", tracking=0.03)
    before = Snapshot(model)

    def patch() -> None:
        wina.sparsify(model, plan, keep_original=True, show_progress=False)

    steps = steps_of(patch, PATCHING)
    assert len(steps) > 80
    undoing = steps_of(lambda: wina.restore(model), PATCHING)
    before.assert_unchanged(model)
    for step in steps:
        fail_at(step, patch, PATCHING, MemoryError)
        if is_patched(model):  # it was all done but for telling so
            wina.restore(model)
        before.assert_unchanged(model, step)
    for step in undoing:
        patch()
        fail_at(step, lambda: wina.restore(model), PATCHING)
        if is_patched(model):
            wina.restore(model)
        before.assert_unchanged(model, step)


def test_undoing_a_failed_patch_can_be_stopped_too(llama: nn.Module) -> None:
    plan = plan_for(llama)
    before = Snapshot(llama)

    def patch() -> None:
        with pytest.MonkeyPatch.context() as patched:
            patched.setattr("wina.patch._form_groups", lambda *_, **__: 1 / 0)
            wina.sparsify(llama, plan)

    with pytest.raises(ZeroDivisionError):
        patch()
    before.assert_unchanged(llama)

    def until_the_end() -> None:
        with pytest.raises(ZeroDivisionError):
            patch()

    steps = steps_of(until_the_end, ("patch.py",))
    for step in steps[-25:]:  # inside of the undoing
        try:
            fail_at(step, patch, ("patch.py",))
        except ZeroDivisionError:
            pytest.fail("the second exception was swallowed")
        if is_patched(llama):
            wina.restore(llama)
        before.assert_unchanged(llama, step)


@pytest.mark.parametrize(
    ("method", "weight_dtype", "every"),
    [("wina", "int8", 1), ("wina-fisher", None, 6)],
)
def test_calibrating_stopped_at_any_line(method: str, weight_dtype: str | None, every: int) -> None:
    model = small("llama")
    before = Snapshot(model)

    def calibrate() -> None:
        settings = config(
            method=method, weight_dtype=weight_dtype, calibration_tokens=96, window=32
        )
        wina.calibrate(model, config=settings, texts=CALIBRATION, show_progress=False)

    steps = steps_of(calibrate, CALIBRATING)
    before.assert_unchanged(model)
    assert len(steps) > 50
    for step in steps[::every]:
        fail_at(step, calibrate, CALIBRATING)
        before.assert_unchanged(model, step)


def test_originals_that_are_being_freed() -> None:
    """Rounded for good, or not at all: never sparse modules in a model that counts as dense."""
    model = small("llama")
    plan = plan_for(model, weight_dtype="int8")
    for step in steps_of(
        lambda: wina.sparsify(small("llama"), plan, show_progress=False), ("patch.py",)
    )[-6:]:
        model = small("llama")
        fail_at(step, lambda m=model: wina.sparsify(m, plan, show_progress=False), ("patch.py",))
        sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
        assert is_patched(model) == bool(sparse), step


def test_nested_misuse_changes_nothing(llama: nn.Module, tokens: Tensor) -> None:
    plan = plan_for(llama)
    before = Snapshot(llama)
    wina.sparsify(llama, plan)
    sparse = decode_logits(llama, tokens)
    for wrong in (
        lambda: wina.sparsify(llama, plan),
        lambda: wina.sparsify(llama, sparsity=0.3, texts=CALIBRATION, show_progress=False),
        lambda: wina.calibrate(llama, texts=CALIBRATION, show_progress=False),
    ):
        with pytest.raises(PatchStateError):
            wrong()
    with wina.dense(llama), pytest.raises(PatchStateError):
        wina.sparsify(llama, plan)
    assert torch.equal(decode_logits(llama, tokens), sparse)
    with wina.dense(llama):  # restored inside of the block
        wina.restore(llama)
    before.assert_unchanged(llama)
    wina.sparsify(llama, plan)
    assert torch.equal(decode_logits(llama, tokens), sparse)
    wina.restore(llama)
    before.assert_unchanged(llama)


@pytest.mark.parametrize("at", [0, 1, 4])
def test_generation_that_is_interrupted_can_be_repeated(llama: nn.Module, at: int) -> None:
    wina.sparsify(llama, plan_for(llama))
    prompt = random_tokens(8)[None]

    def generate() -> Tensor:
        with torch.no_grad():
            result: Tensor = llama.generate(prompt, max_new_tokens=6, do_sample=False)  # type: ignore[operator]
        return result

    want = generate()
    module = llama.model.layers[1].self_attn.k_proj  # type: ignore[union-attr,index]
    calls = iter(range(1000))

    def interrupt(*_: object) -> None:
        if next(calls) == at:
            raise Injected

    handle = module.register_forward_pre_hook(interrupt)  # type: ignore[union-attr,operator]
    with pytest.raises(Injected):
        generate()
    handle.remove()
    assert torch.equal(generate(), want)


@pytest.mark.parametrize("at", [1, 3])
@pytest.mark.parametrize("sparse", [False, True])
def test_ctrl_c_stops_decoding_and_leaves_the_model_as_it_was(
    llama: nn.Module, at: int, sparse: bool
) -> None:
    """A real SIGINT while ``wina.decode`` hands out tokens."""
    before = Snapshot(llama)
    if sparse:
        wina.sparsify(llama, plan_for(llama))
    prompt = random_tokens(8)[None]
    want = wina.decode(llama, prompt, max_new_tokens=6).tokens

    class Pressed:
        put_count = 0

        def put(self, tokens: Tensor) -> None:
            self.put_count += 1
            if self.put_count > at:
                signal.raise_signal(signal.SIGINT)

        def end(self) -> None:
            raise AssertionError("it went on")

    # Whoever started the tests in the background may have left SIGINT ignored.
    before_signal = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            wina.decode(llama, prompt, max_new_tokens=6, streamer=Pressed())
    finally:
        signal.signal(signal.SIGINT, before_signal)
    assert torch.is_grad_enabled()
    assert torch.equal(wina.decode(llama, prompt, max_new_tokens=6).tokens, want)
    if sparse:
        wina.restore(llama)
    before.assert_unchanged(llama)
