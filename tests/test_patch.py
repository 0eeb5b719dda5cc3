from __future__ import annotations

import copy
import gc

import pytest
import torch
from conftest import CALIBRATION, config, decode_logits, logits, plan_for
from torch import Tensor, nn

import wina
from wina.errors import ConfigError, PatchStateError, PlanError, UnsupportedModelError
from wina.layout import Layout
from wina.linear import SparseLinear
from wina.mlp import SparseGatedMLP
from wina.patch import is_patched
from wina.sparse_experts import SparseExperts
from wina.testing import TINY, random_tokens, tiny_model


def addresses(model: nn.Module) -> dict[str, int]:
    return {name: p.data_ptr() for name, p in model.named_parameters()}


def modules(model: nn.Module) -> dict[str, int]:
    return {name: id(module) for name, module in model.named_modules()}


def test_sparsity_zero_equals_dense(model: nn.Module, tokens: Tensor) -> None:
    dense, dense_decode = logits(model, tokens), decode_logits(model, tokens)
    wina.sparsify(model, plan_for(model, sparsity=0.0, prefill="all"))
    assert (logits(model, tokens) - dense).abs().max() <= 1e-4
    assert (decode_logits(model, tokens) - dense_decode).abs().max() <= 1e-4


def test_restore_gives_back_modules_memory_and_bits(model: nn.Module, tokens: Tensor) -> None:
    dense = logits(model, tokens)
    before = addresses(model), modules(model)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        wina.sparsify(model, plan_for(model))
        assert not torch.equal(decode_logits(model, tokens), dense[0, 8:])
        wina.restore(model)
        assert (addresses(model), modules(model)) == before
        assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
        assert all(p.is_contiguous() for p in model.parameters())
        assert torch.equal(logits(model, tokens), dense)


def test_decode_path_equals_the_masked_dense_path(model: nn.Module) -> None:
    """One token through the kernels, and the same token as a sequence with dense products."""
    wina.sparsify(model, plan_for(model))
    for module in model.modules():
        if isinstance(module, SparseLinear):
            x = torch.randn(1, 1, module.in_features) * module.threshold.median()
            with torch.no_grad():
                want = nn.functional.linear(module.masked(x, 0), module.weight, module.bias)
                assert not torch.equal(module.masked(x, 0), x)
                torch.testing.assert_close(module(x), want, rtol=1e-4, atol=1e-4)


def test_fused_mlp_equals_its_parts(model: nn.Module) -> None:
    wina.sparsify(model, plan_for(model))
    for module in model.modules():
        if isinstance(module, SparseGatedMLP):
            # Rounding in h must not move a channel across down_proj's threshold.
            module.down_proj.threshold.fill_(-1.0)
            x = torch.randn(1, 1, module.gate_proj.in_features)
            with torch.no_grad():
                fused = module(x)
            parts = module(x)  # with gradients enabled the parts run one by one
            torch.testing.assert_close(fused, parts, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", list(TINY))
def test_all_projections_and_gated_mlps_are_replaced(name: str) -> None:
    model = tiny_model(name)
    wina.sparsify(model, plan_for(model))
    kinds = [type(module) for module in model.modules()]
    plain = [m for n, m in model.named_modules() if type(m) is nn.Linear and "layers" in n]
    assert not plain
    mixture = name in ("mixtral", "qwen3_moe", "olmoe", "gpt_oss")
    gated = name not in ("phi3", "starcoder2", "gpt_neox", "falcon") and not mixture
    assert kinds.count(SparseGatedMLP) == (2 if gated else 0)
    assert kinds.count(SparseExperts) == (2 if mixture else 0)
    assert kinds.count(SparseLinear) + 2 * kinds.count(SparseExperts) == len(
        wina.inspect(model).rows
    )


def test_one_copy_of_each_weight_and_state_dict_unchanged(model: nn.Module) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    storage = addresses(model)
    wina.sparsify(model, plan_for(model))
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert addresses(model) == storage
    sparse = [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert all(m.weight.t().is_contiguous() for m in sparse)


def test_tied_embeddings_stay_tied() -> None:
    model = tiny_model("llama", tie_word_embeddings=True)
    wina.sparsify(model, plan_for(model))
    assert model.lm_head.weight is model.model.embed_tokens.weight  # type: ignore


def test_prefill_is_dense_unless_asked(llama: nn.Module, tokens: Tensor) -> None:
    dense = logits(llama, tokens)
    plan = plan_for(llama)
    wina.sparsify(llama, plan)
    torch.testing.assert_close(logits(llama, tokens), dense)
    wina.restore(llama)
    wina.sparsify(llama, plan, prefill="last:0.5")
    half = logits(llama, tokens)
    torch.testing.assert_close(half[:, :24], dense[:, :24])
    assert not torch.allclose(half[:, 24:], dense[:, 24:], atol=1e-3)
    wina.restore(llama)
    wina.sparsify(llama, plan, prefill="all")
    whole = logits(llama, tokens)
    torch.testing.assert_close(whole[:, :2], dense[:, :2])
    assert not torch.allclose(whole[:, 2:24], dense[:, 2:24], atol=1e-3)


def test_dense_interlude(llama: nn.Module, tokens: Tensor) -> None:
    dense = decode_logits(llama, tokens)
    wina.sparsify(llama, plan_for(llama))
    sparse = decode_logits(llama, tokens)
    with wina.dense(llama), wina.dense(llama):
        torch.testing.assert_close(decode_logits(llama, tokens), dense, rtol=1e-4, atol=1e-4)
    assert torch.equal(decode_logits(llama, tokens), sparse)
    with pytest.raises(RuntimeError, match="inside"), wina.dense(llama):
        raise RuntimeError("inside")
    assert torch.equal(decode_logits(llama, tokens), sparse)


def test_generate_runs_and_skips(llama: nn.Module, tokens: Tensor) -> None:
    from wina.inspection import measure_sparsity

    wina.sparsify(llama, plan_for(llama))
    with measure_sparsity(llama) as counter:
        llama.generate(tokens, max_new_tokens=12, do_sample=False)  # type: ignore[operator]
    assert 0.3 < counter.mean < 0.7


def test_batched_decode_equals_one_by_one(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama))
    batch = random_tokens(3 * 10).view(3, 10)
    together = llama(batch, use_cache=True)
    step = random_tokens(3, seed=5)[:, None]
    with torch.no_grad():
        got = llama(step, past_key_values=together.past_key_values).logits
        for row in range(3):
            cache = llama(batch[row : row + 1], use_cache=True).past_key_values
            want = llama(step[row : row + 1], past_key_values=cache).logits
            torch.testing.assert_close(got[row : row + 1], want, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype, tokens: Tensor) -> None:
    model = tiny_model("llama", dtype)
    dense = logits(model, tokens)
    wina.sparsify(model, plan_for(model, sparsity=0.0, prefill="all"))
    bound = 200 * torch.finfo(dtype).eps * dense.abs().max()
    assert (decode_logits(model, tokens) - dense[0, 8:]).abs().max() <= bound
    wina.restore(model)
    assert torch.equal(logits(model, tokens), dense)


def test_cast_after_patching_keeps_thresholds_exact(llama: nn.Module, tokens: Tensor) -> None:
    plan = plan_for(llama)
    wina.sparsify(llama, plan)
    llama.to(torch.bfloat16)
    for module in llama.modules():
        if isinstance(module, SparseLinear):
            assert module.threshold.dtype == torch.float32
            assert torch.equal(module.threshold, plan.layers[module.name].threshold)
            assert module.weight.dtype == torch.bfloat16
    assert decode_logits(llama, tokens).isfinite().all()
    wina.restore(llama)
    assert all(p.is_contiguous() for p in llama.parameters())


def test_cast_to_a_dtype_with_another_backend(tokens: Tensor) -> None:
    model = tiny_model("llama", torch.float64)
    wina.sparsify(model, plan_for(model))
    model.to(torch.float32)
    row = wina.inspect(model).rows[0]
    assert row.backend == "cpu-rows"
    assert row.reason.startswith("the weight is row-major; restore and sparsify again")
    assert decode_logits(model, tokens).isfinite().all()
    wina.restore(model)
    wina.sparsify(model, plan_for(model), backend="cpu")
    assert wina.inspect(model).rows[0].backend == "cpu"
    model.to(torch.float64)
    assert wina.inspect(model).rows[0].backend == "reference"
    assert decode_logits(model, tokens).isfinite().all()


def test_gradients_flow_through_the_masked_dense_product(llama: nn.Module, tokens: Tensor) -> None:
    wina.sparsify(llama, plan_for(llama), prefill="all")
    llama.train()
    llama(tokens, labels=tokens).loss.backward()
    for name, parameter in llama.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    layer = llama.model.layers[0].mlp.down_proj  # type: ignore
    x = torch.randn(1, 1, 96, requires_grad=True)
    layer(x).sum().backward()
    dropped = x.detach().abs()[0, 0] <= layer.threshold
    assert dropped.any()
    assert (x.grad[0, 0][dropped] == 0).all()  # type: ignore[index]


def test_deepcopy_of_a_patched_model_is_independent(llama: nn.Module, tokens: Tensor) -> None:
    dense = logits(llama, tokens)
    wina.sparsify(llama, plan_for(llama))
    sparse = decode_logits(llama, tokens)
    twin = copy.deepcopy(llama)
    wina.restore(llama)
    assert torch.equal(decode_logits(twin, tokens), sparse)
    wina.restore(twin)
    assert torch.equal(logits(twin, tokens), dense)


def test_zero_size_inputs(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama))
    layer = llama.model.layers[0].mlp.gate_proj  # type: ignore
    with torch.no_grad():
        assert layer(torch.empty(0, 1, 64)).shape == (0, 1, 96)
        assert layer(torch.empty(2, 0, 64)).shape == (2, 0, 96)
        assert layer(torch.randn(64)).shape == (96,)
        with wina.dense(llama):
            assert layer(torch.randn(64)).shape == (96,)
        mlp = llama.model.layers[0].mlp  # type: ignore
        assert mlp(torch.empty(0, 1, 64)).shape == (0, 1, 64)


def test_twice_is_refused(llama: nn.Module) -> None:
    plan = plan_for(llama)
    wina.sparsify(llama, plan)
    with pytest.raises(PatchStateError, match="already"):
        wina.sparsify(llama, plan)
    wina.restore(llama)
    with pytest.raises(PatchStateError, match="dense"):
        wina.restore(llama)
    with pytest.raises(PatchStateError, match="dense"), wina.dense(llama):
        pass


def test_plan_of_another_model_is_refused(llama: nn.Module) -> None:
    other_seed = tiny_model("llama", seed=1)
    with pytest.raises(PlanError, match="other weights"):
        wina.sparsify(other_seed, plan_for(llama))
    with pytest.raises(PlanError, match="for a llama model, this is a mistral"):
        wina.sparsify(tiny_model("mistral"), plan_for(llama))
    wider = tiny_model("llama", intermediate_size=128)
    with pytest.raises(PlanError, match="shape"):
        wina.sparsify(wider, plan_for(llama))
    assert not any(is_patched(m) for m in (other_seed, wider))
    assert all(type(m) is not SparseLinear for m in other_seed.modules())


def test_plan_made_in_float32_serves_the_bfloat16_model(llama: nn.Module, tokens: Tensor) -> None:
    plan = plan_for(llama)
    low = tiny_model("llama", torch.bfloat16)
    wina.sparsify(low, plan)
    assert decode_logits(low, tokens).isfinite().all()


def test_wrong_calls(llama: nn.Module) -> None:
    plan = plan_for(llama)
    with pytest.raises(ConfigError, match="both given"):
        wina.sparsify(llama, plan, sparsity=0.5)
    with pytest.raises(ConfigError, match="by keyword"):
        wina.sparsify(llama, 0.5)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="sparsty"):
        wina.sparsify(llama, sparsty=0.5)
    with pytest.raises(wina.WinaError, match="Known: auto, triton, cpu-rows, cpu, reference"):
        wina.sparsify(llama, plan, backend="gpu")
    assert not is_patched(llama)


def test_shared_weights_are_named(llama: nn.Module) -> None:
    layers = llama.model.layers  # type: ignore
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedModelError, match=r"mlp\.up_proj\.weight shares its memory"):
        wina.sparsify(llama, plan_for(llama))


def test_strided_weight_is_named(llama: nn.Module) -> None:
    layer = llama.model.layers[0].mlp.up_proj  # type: ignore
    layer.weight = nn.Parameter(torch.randn(96, 128)[:, ::2])
    with pytest.raises(UnsupportedModelError, match="strides"):
        wina.sparsify(llama, plan_for(llama))


class Interrupt(BaseException):
    """Like Ctrl-C."""


def interrupt(
    monkeypatch: pytest.MonkeyPatch, target: object, name: str, fail_at: int, late: bool = False
) -> None:
    """Let one call be interrupted: before its work, or ``late``, just after it."""
    real = getattr(target, name)
    calls = iter(range(10**6))

    def failing(*args: object, **kwargs: object) -> object:
        hit = next(calls) == fail_at
        if hit and not late:
            raise Interrupt
        result = real(*args, **kwargs)
        if hit:
            raise Interrupt
        return result

    monkeypatch.setattr(target, name, failing)


@pytest.mark.parametrize("fail_at", [0, 1, 5, 13])
@pytest.mark.parametrize("step", ["layout", "copy", "copied", "module", "mlp"])
def test_interrupted_patching_leaves_the_model_whole(
    llama: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, step: str, fail_at: int
) -> None:
    dense, before = logits(llama, tokens), (addresses(llama), modules(llama))
    plan = plan_for(llama)
    target, name = {
        "layout": (Layout, "to_k_major"),
        "copy": (Tensor, "copy_"),
        "copied": (Tensor, "copy_"),
        "module": (SparseLinear, "__init__"),
        "mlp": (SparseGatedMLP, "__init__"),
    }[step]
    if step == "mlp":
        fail_at %= 2
    with monkeypatch.context() as patched:
        interrupt(patched, target, name, fail_at, late=step == "copied")
        with pytest.raises(Interrupt):
            wina.sparsify(llama, plan)
    assert not is_patched(llama)
    assert (addresses(llama), modules(llama)) == before
    assert torch.equal(logits(llama, tokens), dense)


@pytest.mark.parametrize("fail_at", [0, 3, 13])
@pytest.mark.parametrize("late", [False, True])
def test_interrupted_restore_can_be_finished(
    llama: nn.Module, tokens: Tensor, monkeypatch: pytest.MonkeyPatch, fail_at: int, late: bool
) -> None:
    dense = logits(llama, tokens)
    wina.sparsify(llama, plan_for(llama))
    with monkeypatch.context() as patched:
        interrupt(patched, Tensor, "copy_", fail_at, late)
        with pytest.raises(Interrupt):
            wina.restore(llama)
    wina.restore(llama)
    assert torch.equal(logits(llama, tokens), dense)


def test_restored_model_holds_no_copies(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama))
    wina.restore(llama)
    gc.collect()
    assert not [o for o in gc.get_objects() if type(o) in (SparseLinear, SparseGatedMLP)]


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_block_is_one_graph(llama: nn.Module, dynamic: bool) -> None:
    wina.sparsify(llama, plan_for(llama))
    block = llama.model.layers[0]  # type: ignore
    x = torch.randn(1, 1, 64)
    rotary = llama.model.rotary_emb(x, torch.tensor([[3]]))  # type: ignore
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        want = block(x, position_embeddings=rotary)
        got = compiled(x, position_embeddings=rotary)
    torch.testing.assert_close(got, want)


def test_compiled_with_inductor(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama))
    mlp = llama.model.layers[0].mlp  # type: ignore
    compiled = torch.compile(mlp, fullgraph=True)
    x = torch.randn(1, 1, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), mlp(x))


def test_one_line(tokens: Tensor) -> None:
    model = tiny_model("llama")
    plan = wina.sparsify(
        model, sparsity=0.4, method="teal", texts=CALIBRATION, window=128, show_progress=False
    )
    assert plan.config == config(sparsity=0.4, method="teal", calibration_tokens=8192)
    assert is_patched(model)
