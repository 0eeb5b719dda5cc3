"""Projections kept in 8 and 4 bits: from the setting to the patched model and back."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from conftest import config, decode_logits, logits, plan_for
from torch import Tensor, nn

import wina
from wina.errors import ConfigError, PatchStateError
from wina.kernels.quantization import FORMATS, WEIGHT_DTYPES, quantize_as
from wina.linear import SparseLinear
from wina.mlp import SparseGatedMLP
from wina.planes import repeated, summed
from wina.quantized_linear import QuantizedSparseLinear
from wina.rounding import Nearest
from wina.testing import tiny_model

WIDTHS = list(WEIGHT_DTYPES)


def rounded(model: nn.Module, plan: wina.SparsityPlan, dtype: str) -> nn.Module:
    """A dense copy whose projections have the rounded weights."""
    twin = copy.deepcopy(model)
    for name, layer in plan.layers.items():
        weight = twin.get_submodule(name).weight
        assert isinstance(weight, nn.Parameter)
        found = layer.weight or Nearest().round(weight.data, None, dtype)
        whole = summed(found.dequantize().t(), WEIGHT_DTYPES[dtype].planes)
        weight.data = whole.to(weight.dtype)
    return twin


def modules_of(model: nn.Module) -> list[QuantizedSparseLinear]:
    return [m for m in model.modules() if isinstance(m, QuantizedSparseLinear)]


@pytest.mark.parametrize("width", WIDTHS)
def test_sparsity_0_is_the_dense_model_of_rounded_weights(
    model: nn.Module, tokens: Tensor, width: str
) -> None:
    plan = plan_for(model, sparsity=0.0, weight_dtype=width)
    want = logits(rounded(model, plan, width), tokens)
    wina.sparsify(model, plan)
    torch.testing.assert_close(logits(model, tokens), want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode_logits(model, tokens), want[0, 8:], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("width", FORMATS)
def test_thresholds_are_those_of_the_rounded_model(llama: nn.Module, width: str) -> None:
    plan = plan_for(llama, weight_dtype=width, rounding="nearest")
    want = plan_for(rounded(llama, plan, width))
    for name, layer in plan.layers.items():
        torch.testing.assert_close(layer.threshold, want.layers[name].threshold)


def test_calibration_changes_no_weight(llama: nn.Module) -> None:
    before = {n: (p.data_ptr(), p.clone()) for n, p in llama.named_parameters()}
    plan_for(llama, weight_dtype="int4")
    for name, parameter in llama.named_parameters():
        assert parameter.data_ptr() == before[name][0]
        assert torch.equal(parameter, before[name][1])


def test_an_interrupted_calibration_changes_no_weight(
    llama: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {name: value.clone() for name, value in llama.state_dict().items()}
    down = llama.model.layers[1].mlp.down_proj  # type: ignore
    monkeypatch.setattr(down, "forward", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        plan_for(llama, weight_dtype="int4")
    assert all(torch.equal(before[name], value) for name, value in llama.state_dict().items())


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("width", WIDTHS)
def test_decode_equals_the_masked_dense_path(llama: nn.Module, width: str, backend: str) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype=width), backend=backend)
    for module in modules_of(llama):
        x = torch.randn(1, 1, module.in_features) * module.threshold.median()
        with torch.no_grad():
            inputs = repeated(x, module.planes)
            want = nn.functional.linear(module.masked(inputs, 0), module.matrix, module.bias)
            assert not torch.equal(module.masked(inputs, 0), inputs)
            torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("width", WIDTHS)
def test_fused_mlp_equals_its_parts(llama: nn.Module, width: str) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype=width))
    found = [m for m in llama.modules() if isinstance(m, SparseGatedMLP)]
    assert found
    for module in found:
        module.down_proj.threshold.fill_(-1.0)
        x = torch.randn(1, 1, 64)
        with torch.no_grad():
            fused = module(x)
        torch.testing.assert_close(fused, module(x), rtol=1e-3, atol=1e-4)


def test_originals_are_freed_and_restore_says_so(llama: nn.Module, tokens: Tensor) -> None:
    weight = llama.model.layers[0].mlp.up_proj.weight  # type: ignore
    gone = weakref.ref(weight)
    del weight
    plan = plan_for(llama, weight_dtype="int8")
    wina.sparsify(llama, plan)
    gc.collect()
    assert gone() is None
    sparse = decode_logits(llama, tokens)
    with pytest.raises(PatchStateError, match="keep_original=True"):
        wina.restore(llama)
    assert torch.equal(decode_logits(llama, tokens), sparse)


def test_kept_originals_come_back_bit_for_bit(llama: nn.Module, tokens: Tensor) -> None:
    dense, before = logits(llama, tokens), {n: p.data_ptr() for n, p in llama.named_parameters()}
    plan = plan_for(llama, weight_dtype="int4")
    for _ in range(2):
        wina.sparsify(llama, plan, keep_original=True)
        assert modules_of(llama)
        wina.restore(llama)
        assert {n: p.data_ptr() for n, p in llama.named_parameters()} == before
        assert torch.equal(logits(llama, tokens), dense)


def test_an_interrupted_patch_gives_the_model_back(
    llama: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    dense, plan = logits(llama, tokens), plan_for(llama, weight_dtype="int8")
    calls = iter(range(100))

    def interrupted(*arguments: object, **settings: object) -> object:
        if next(calls) == 5:
            raise KeyboardInterrupt
        return quantize_as(*arguments, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr("wina.rounding.base.quantize_as", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wina.sparsify(llama, plan)
    assert not modules_of(llama)
    assert torch.equal(logits(llama, tokens), dense)


@pytest.mark.parametrize("width", WIDTHS)
def test_dense_means_dense_activations_on_rounded_weights(
    llama: nn.Module, tokens: Tensor, width: str
) -> None:
    plan = plan_for(llama, weight_dtype=width)
    want = logits(rounded(llama, plan, width), tokens)
    wina.sparsify(llama, plan)
    with wina.dense(llama):
        torch.testing.assert_close(decode_logits(llama, tokens), want[0, 8:], rtol=1e-3, atol=1e-3)


def test_state_dict_holds_integers_and_loads_into_a_twin(llama: nn.Module, tokens: Tensor) -> None:
    twin = tiny_model("llama", seed=1)
    wina.sparsify(twin, plan_for(twin, weight_dtype="int8"))
    plan = plan_for(llama, weight_dtype="int8")
    wina.sparsify(llama, plan)
    state = llama.state_dict()
    assert state["model.layers.0.mlp.up_proj.packed"].dtype == torch.int8
    assert "model.layers.0.mlp.up_proj.weight" not in state
    twin.load_state_dict(state)
    for module, other in zip(modules_of(twin), modules_of(llama), strict=True):
        module.threshold.copy_(other.threshold)
    assert torch.equal(decode_logits(twin, tokens), decode_logits(llama, tokens))


def test_inspect_shows_width_and_bytes(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype="int4"))
    found = wina.inspect(llama)
    row = next(r for r in found.rows if r.projection.endswith("0.mlp.up_proj"))
    assert (row.weight_dtype, row.weight_bytes) == ("int4", 64 * (64 + 2 * 2))
    assert "int4" in str(found)


def test_a_float_model_shows_its_dtype(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama))
    row = wina.inspect(llama).rows[-1]
    assert (row.weight_dtype, row.weight_bytes) == ("float32", 4 * row.shape[0] * row.shape[1])


def test_casts_keep_scales_and_thresholds(llama: nn.Module, tokens: Tensor) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype="int4"))
    before = [(m.packed.clone(), m.scales.clone()) for m in modules_of(llama)]
    sparse = decode_logits(llama, tokens)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        llama.to(dtype)
        for module, (packed, scales) in zip(modules_of(llama), before, strict=True):
            assert torch.equal(module.packed, packed)
            assert torch.equal(module.scales, scales)
            assert module.threshold.dtype == torch.float32
            assert module.weight.dtype == dtype
        assert decode_logits(llama, tokens).isfinite().all()
    assert decode_logits(llama, tokens).shape == sparse.shape


def test_gradients_reach_the_input(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype="int8"))
    layer = llama.model.layers[0].mlp.down_proj  # type: ignore
    x = torch.randn(1, 1, 96, requires_grad=True)
    layer(x).sum().backward()
    dropped = x.detach().abs()[0, 0] <= layer.threshold
    assert (x.grad[0, 0][dropped] == 0).all()  # type: ignore[index]
    assert (x.grad[0, 0][~dropped] != 0).any()  # type: ignore[index]


@pytest.mark.parametrize("width", WIDTHS)
def test_compiled_block_is_one_graph(llama: nn.Module, width: str) -> None:
    wina.sparsify(llama, plan_for(llama, weight_dtype=width))
    block = llama.model.layers[0]  # type: ignore
    x = torch.randn(1, 1, 64)
    rotary = llama.model.rotary_emb(x, torch.tensor([[3]]))  # type: ignore
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        want = block(x, position_embeddings=rotary)
        got = compiled(x, position_embeddings=rotary)
    torch.testing.assert_close(got, want)


def test_generate_and_round_trip_of_the_plan(llama, tokens: Tensor, tmp_path) -> None:
    plan = plan_for(llama, weight_dtype="int8", prefill="all")
    again = wina.SparsityPlan.load(plan.save(tmp_path))
    assert again.config.weight_dtype == "int8"
    wina.sparsify(llama, again)
    llama.generate(tokens, max_new_tokens=4, do_sample=False)
    assert all(isinstance(m, QuantizedSparseLinear) for m in llama.modules()
               if isinstance(m, SparseLinear))  # fmt: skip


def test_unknown_widths_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"'int3' is not known\. Known: int8, int4"):
        config(weight_dtype="int3")
    with pytest.raises(ConfigError, match="wrong type"):
        wina.SparsityConfig.from_dict({"weight_dtype": 8})
