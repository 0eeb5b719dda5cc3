"""Projections that share a launch: equal to separate products, and never a stale result."""

from __future__ import annotations

import threading

import pytest
import torch
from conftest import CALIBRATION, config, decode_logits, plan_for
from torch import Tensor, nn

import wina
from wina.inspection import measure_sparsity
from wina.kernels import dispatch, ops
from wina.linear import SparseLinear
from wina.testing import random_tokens, tiny_model


@pytest.fixture(autouse=True)
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The CPU backend shares launches too; the number of weights of each one it is asked for."""
    seen: list[int] = []

    def counted(x, weights, *rest):
        if not torch.compiler.is_compiling():
            seen.append(len(weights))
        return ops.sparse_group(x, weights, *rest)

    monkeypatch.setattr(dispatch.CpuBackend, "sparse_group", staticmethod(counted))
    return seen


@pytest.fixture
def attention(llama: nn.Module) -> nn.Module:
    wina.sparsify(llama, plan_for(llama))
    return llama.model.layers[0].self_attn


def alone(module: SparseLinear, x: Tensor) -> Tensor:
    """The product that a projection computes for itself."""
    return module._sparse(x)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.no_grad():
        yield


def test_q_k_and_v_are_one_call(attention: nn.Module, calls: list[int]) -> None:
    x = torch.randn(1, 1, 64)
    for module in (attention.q_proj, attention.k_proj, attention.v_proj):
        assert torch.equal(module(x), alone(module, x))
    assert calls == [3]
    attention.o_proj(x)
    assert calls == [3]


def test_any_order_and_repetition(attention: nn.Module, calls: list[int]) -> None:
    x, other = torch.randn(2, 1, 1, 64)
    q, k, v = attention.q_proj, attention.k_proj, attention.v_proj
    for module, inputs in ((v, x), (v, x), (q, x), (k, other), (q, other), (k, x), (k, other)):
        assert torch.equal(module(inputs), alone(module, inputs))


def test_an_input_written_to_in_between_is_noticed(attention: nn.Module) -> None:
    x = torch.randn(1, 1, 64)
    attention.q_proj(x)
    x.mul_(2)
    assert torch.equal(attention.k_proj(x), alone(attention.k_proj, x))
    x[..., :3] = 1
    assert torch.equal(attention.v_proj(x), alone(attention.v_proj, x))


def test_a_weight_written_to_in_between_is_noticed(attention: nn.Module) -> None:
    x = torch.randn(1, 1, 64)
    attention.q_proj(x)
    attention.k_proj.weight.mul_(2)
    assert torch.equal(attention.k_proj(x), alone(attention.k_proj, x))


def test_a_product_is_handed_out_once(attention: nn.Module) -> None:
    x = torch.randn(1, 1, 64)
    attention.q_proj(x)
    first = attention.k_proj(x)
    first.zero_()
    assert torch.equal(attention.k_proj(x), alone(attention.k_proj, x))


def test_tensors_of_inference_mode_are_not_shared(attention: nn.Module, calls: list[int]) -> None:
    with torch.inference_mode():
        x = torch.randn(1, 1, 64)
        q = attention.q_proj(x)
        x.mul_(2)
        assert torch.equal(attention.k_proj(x), alone(attention.k_proj, x))
    assert not torch.equal(q, alone(attention.q_proj, x))
    assert calls == []


def test_nothing_is_kept_after_a_step(llama: nn.Module, tokens: Tensor, calls: list[int]) -> None:
    wina.sparsify(llama, plan_for(llama))
    decode_logits(llama, tokens[:, :12])
    assert len(calls) == 2 * 4  # layers, steps
    groups = {m.group for m in llama.modules() if isinstance(m, SparseLinear)} - {None}
    assert len(groups) == 2
    assert all(group._shared is None for group in groups)


def test_prefill_dense_gradients_and_observers_go_their_own_way(
    llama: nn.Module, tokens: Tensor, calls: list[int]
) -> None:
    wina.sparsify(llama, plan_for(llama), prefill="last:0.5")
    llama(tokens)
    one = tokens[:, :1]
    with wina.dense(llama):
        llama(one)
    with measure_sparsity(llama):
        llama(one)
    with torch.enable_grad():
        llama(one)
    assert calls == []
    llama(one)
    assert calls == [3, 3]


def test_threads_on_one_model(attention: nn.Module) -> None:
    """Each thread has its own hidden state; whatever they interleave, products are right."""
    wrong: list[str] = []

    def decode(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for _ in range(200):
                x = torch.randn(1, 1, 64, generator=generator)
                modules = (attention.q_proj, attention.k_proj, attention.v_proj)
                wrong.extend(m.name for m in modules if not torch.equal(m(x), alone(m, x)))

    threads = [threading.Thread(target=decode, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_caller_that_never_fetches_ends_the_sharing(
    attention: nn.Module, calls: list[int]
) -> None:
    for _ in range(30):
        attention.q_proj(torch.randn(1, 1, 64))
    assert 0 < len(calls) < 15


def test_after_an_exception_in_between(attention: nn.Module) -> None:
    x = torch.randn(1, 1, 64)
    attention.q_proj(x)
    with pytest.raises(RuntimeError):
        attention.k_proj(torch.randn(1, 1, 63))
    assert torch.equal(attention.k_proj(x), alone(attention.k_proj, x))


def test_restoring_and_moving(llama: nn.Module, tokens: Tensor, calls: list[int]) -> None:
    wina.sparsify(llama, plan_for(llama))
    llama.bfloat16()
    llama(tokens[:, :1])
    assert calls == [3, 3]
    llama.double()  # the reference serves, each product alone
    llama(tokens[:, :1])
    assert calls == [3, 3]
    wina.restore(llama)
    assert type(llama.model.layers[0].self_attn.q_proj) is nn.Linear


@pytest.mark.parametrize("selector", ["threshold", "topk", "relative", "importance"])
@pytest.mark.parametrize("model_type", ["qwen2", "gemma3_text", "gpt_neox", "starcoder2"])
def test_models_decode_as_without_sharing(
    model_type: str, selector: str, tokens: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(model_type)
    wina.sparsify(model, config(selector=selector), texts=CALIBRATION, show_progress=False)
    together = decode_logits(model, tokens[:, :16])
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.group = None
    assert torch.equal(together, decode_logits(model, tokens[:, :16]))


@pytest.mark.parametrize("selector", ["threshold", "topk", "relative", "importance"])
def test_compiles_without_a_graph_break(llama: nn.Module, selector: str) -> None:
    wina.sparsify(llama, plan_for(llama, selector=selector))
    step = torch.compile(
        lambda t: llama(t, use_cache=False).logits, fullgraph=True, backend="aot_eager"
    )
    for seed in (1, 2):
        token = random_tokens(1, seed)[None]
        torch.testing.assert_close(step(token), llama(token).logits)
    groups = {m.group for m in llama.modules() if isinstance(m, SparseLinear)} - {None}
    assert groups
    assert all(group._shared is None for group in groups)


def test_the_compiled_step_calls_the_fused_operator(attention: nn.Module) -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> object:
        graphs.append(graph)
        return graph.forward

    def attend(x: Tensor) -> Tensor:
        q, k, v = attention.q_proj(x), attention.k_proj(x), attention.v_proj(x)
        return torch.cat([q, k, v], dim=-1)

    x = torch.randn(1, 1, 64)
    y = torch.compile(attend, fullgraph=True, backend=backend)(x)
    assert torch.equal(y, attend(x))
    called = [str(node.target) for node in graphs[0].graph.nodes]
    assert sum("sparse_group" in name for name in called) == 1
    assert not any("sparse_linear" in name for name in called)


@pytest.mark.parametrize(("selector", "operator", "times"), [
    ("relative", "mean_scale", 4), ("topk", "topk_scale", 7), ("importance", "probe_scale", 7),
    ("threshold", "mean_scale", 0),
])  # fmt: skip
def test_what_depends_on_the_hidden_state_alone_is_found_once(
    llama: nn.Module, selector: str, operator: str, times: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By q, k and v together, o, gate and up together, down."""
    wina.sparsify(llama, plan_for(llama, selector=selector))
    seen: list[int] = []
    right = getattr(ops, operator)

    def counted(*arguments):
        seen.append(1)
        return right(*arguments)

    monkeypatch.setattr(ops, operator, counted)
    llama(random_tokens(1)[None])
    assert len(seen) == 2 * times


def test_export(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama))
    mlp, attention = llama.model.layers[0].mlp, llama.model.layers[0].self_attn

    class Projections(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.mlp = attention, mlp

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            a = self.attention
            return a.q_proj(x), a.k_proj(x), a.v_proj(x), self.mlp(x)

    x = torch.randn(1, 1, 64)
    program = torch.export.export(Projections(), (x,))
    for got, want in zip(program.module()(x), Projections()(x), strict=True):
        torch.testing.assert_close(got, want)


def test_inspect_shows_what_shares_a_launch(llama: nn.Module) -> None:
    wina.sparsify(llama, plan_for(llama))
    rows = {row.projection: row for row in wina.inspect(llama).rows}
    layer = "model.layers.0"
    assert rows[f"{layer}.self_attn.k_proj"].fused == ("q_proj", "k_proj", "v_proj")
    assert rows[f"{layer}.mlp.up_proj"].fused == ("gate_proj", "up_proj")
    assert rows[f"{layer}.self_attn.o_proj"].fused == ()
    assert "q_proj+k_proj+v_proj" in str(wina.inspect(llama))
