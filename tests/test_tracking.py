"""Cut-offs that follow the text, so that the share that is dropped stays what was asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import config, plan_for
from torch import Tensor, nn
from transformers import StaticCache

import wina
from wina.config import SparsityConfig
from wina.decoding import choose_engine
from wina.errors import ConfigError
from wina.inspection import measure_sparsity
from wina.kernels import cpu, ops, reference
from wina.linear import SparseLinear
from wina.plan import SparsityPlan
from wina.switches import padded_batch
from wina.testing import random_tokens, tiny_model


def drawn(*shape: int, loud: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator) * loud).to(dtype)


def by_hand(
    x: Tensor, threshold: Tensor, s: float, sparsity: float, rate: float, block: int = 16
) -> tuple[list[float], float]:
    """Factors of one sequence [S, K], token by token, in float64."""
    factors, waiting = [], 0.0
    for t, token in enumerate(x.double()):
        factors.append(float(torch.tensor(s).exp()))
        dropped = (token.abs() <= threshold.double() * factors[-1]).double().mean()
        waiting += rate * (sparsity - float(dropped))
        if (t + 1) % block == 0 or t + 1 == len(x):
            s, waiting = min(max(s + waiting, -1.0), 1.0), 0.0
    return factors, s


@pytest.mark.parametrize("native", [True, False], ids=["native", "definition"])
def test_the_rule(native: bool) -> None:
    if native:
        assert cpu.load() is None
    operator = ops.tracked_scale if native else reference.tracked_scale
    x, threshold = drawn(3, 40, 50, loud=2.0), torch.full((50,), 0.6745)
    state = torch.tensor([0.0, 0.3, -0.2])
    before = state.tolist()
    scale = operator(x, threshold, state, 0.5, 0.05)
    assert scale.shape == (3, 40)
    for row in range(3):
        factors, end = by_hand(x[row], threshold, before[row], 0.5, 0.05)
        assert scale[row].tolist() == pytest.approx(factors, rel=1e-5)
        assert float(state[row]) == pytest.approx(end, abs=1e-5)
    assert scale[0, 0] == 1.0
    assert float(state.min()) > 0.0  # twice as loud as calibrated: the cut-offs have to rise


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (1, 1, 64), (2, 37, 70), (4, 1, 33), (1, 0, 16), (19, 8)])
@pytest.mark.parametrize("extras", [False, True])
def test_native_is_the_definition(shape: tuple[int, ...], dtype: torch.dtype, extras: bool) -> None:
    assert cpu.load() is None
    x = drawn(*shape, dtype=dtype)
    threshold = torch.rand(shape[-1])
    scale = torch.rand(shape[:-1]) + 0.5 if extras else None
    counted = torch.rand(shape[:-1]) < 0.7 if extras else None
    states = [torch.zeros(shape[0] if len(shape) > 2 else 1) for _ in range(2)]
    got = ops.tracked_scale(x, threshold, states[0], 0.4, 0.03, scale, counted)
    want = reference.tracked_scale(x, threshold, states[1], 0.4, 0.03, scale, counted)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=1e-5)


def test_the_share_is_kept_where_a_fixed_cut_off_drifts() -> None:
    x, threshold = drawn(1, 512, 200, loud=1.3), torch.full((200,), 0.6745)
    state = torch.zeros(1)
    scale = ops.tracked_scale(x, threshold, state, 0.5, 0.02)

    def dropped(factor: Tensor | None) -> float:
        return 1.0 - float(reference.keep_mask(x, threshold, factor).float().mean())

    assert dropped(None) < 0.42
    assert abs(dropped(scale) - 0.5) < 0.03
    # What the docstring says of the mean.
    assert dropped(scale) == pytest.approx(0.5 - float(state) / (0.02 * 512), abs=1e-4)


def test_the_factor_is_bounded() -> None:
    state = torch.zeros(2)
    x = torch.stack([torch.zeros(200, 8), torch.full((200, 8), 9.0)])
    scale = ops.tracked_scale(x, torch.ones(8), state, 0.5, 1.0)
    assert state.tolist() == [-1.0, 1.0]
    assert float(scale.log().abs().max()) <= 1.0 + 1e-6


def test_tokens_that_do_not_count_change_nothing() -> None:
    x, counted = drawn(1, 32, 16), torch.zeros(1, 32, dtype=torch.bool)
    counted[:, :16] = True
    states = [torch.zeros(1), torch.zeros(1)]
    ops.tracked_scale(x, torch.full((16,), 0.3), states[0], 0.5, 0.1, None, counted)
    ops.tracked_scale(x[:, :16], torch.full((16,), 0.3), states[1], 0.5, 0.1)
    assert float(states[0]) == pytest.approx(float(states[1]))
    assert float(states[0]) != 0.0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"threshold": torch.ones(5)}, "threshold"), ({"state": torch.zeros(4)}, "sequences"),
        ({"state": torch.zeros(0)}, "state"), ({"state": torch.zeros(2).double()}, "state"),
        ({"scale": torch.ones(2)}, "scale"), ({"counted": torch.ones(2, 3)}, "counted"),
        ({"sparsity": 1.5}, "sparsity"), ({"rate": 0.0}, "rate"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("native", [True, False], ids=["native", "default"])
def test_operator_refuses(change: dict[str, Any], match: str, native: bool) -> None:
    assert cpu.load() is None
    dtype = torch.float32 if native else torch.float64
    arguments = {
        "x": torch.ones(2, 3, 4, dtype=dtype), "threshold": torch.ones(4),
        "state": torch.zeros(2), "sparsity": 0.5, "rate": 0.1,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=match):
        ops.tracked_scale(**{**arguments, **change})


def test_opcheck() -> None:
    assert cpu.load() is None
    x, threshold = torch.randn(2, 20, 8), torch.full((8,), 0.5)
    torch.library.opcheck(ops.tracked_scale, (x, threshold, torch.zeros(2), 0.5, 0.1))
    extras = (torch.rand(2, 20), torch.rand(2, 20) < 0.5)
    torch.library.opcheck(ops.tracked_scale, (x, threshold, torch.zeros(2), 0.5, 0.1, *extras))


@pytest.mark.parametrize("rate", [-0.1, 1.5, float("nan"), "fast"])
def test_rates_that_mean_nothing(rate: Any) -> None:
    with pytest.raises(ConfigError, match="tracking"):
        SparsityConfig(tracking=rate)


def test_masks_of_a_gate_do_not_follow() -> None:
    with pytest.raises(ConfigError, match="tracking"):
        SparsityConfig(method="cats", tracking=0.02)


def test_configs_of_before_are_the_same() -> None:
    assert "tracking" not in SparsityConfig().record()
    assert SparsityConfig(tracking=0.02).record()["tracking"] == 0.02
    assert SparsityConfig.from_label("wina/tracking=0.02").tracking == 0.02
    assert SparsityConfig.from_dict({"tracking": 0}).tracking == 0.0


SELECTORS = ["threshold", "importance", "relative", "topk"]


def tracked(model: nn.Module, **settings: Any) -> SparsityPlan:
    plan = plan_for(model, **{"sparsity": 0.5, "tracking": 0.1, **settings})
    wina.sparsify(model, plan)
    return plan


def modules(model: nn.Module) -> list[SparseLinear]:
    return [m for m in model.modules() if isinstance(m, SparseLinear)]


def test_nothing_is_kept_without_a_rate(llama: nn.Module) -> None:
    tracked(llama, tracking=0.0)
    assert all(module.tracked is None for module in modules(llama))


def test_a_projection_follows_its_text(llama: nn.Module) -> None:
    tracked(llama)
    module = llama.model.layers[1].mlp.down_proj
    x = drawn(1, 64, module.in_features) * module.threshold * 2.0
    with torch.no_grad(), measure_sparsity(llama) as counter:
        module.control.prefill = SparsityConfig(prefill="all", sink_tokens=0).make_prefill()
        module(x)
    assert float(module.tracked) > 0.0
    assert 0.0 < counter.by_projection[module.name] < 0.5
    again = float(module.tracked)
    with torch.no_grad():
        module(0.0 * x[:, :1])  # a token more of the same sequence, of which nothing is kept
        assert float(module.tracked) == pytest.approx(again - 0.05, abs=1e-6)
        module.forget()
        module(x)  # a new one
    assert float(module.tracked) == pytest.approx(again)


def test_prompts_begin_anew_where_they_are_dense(llama: nn.Module) -> None:
    tracked(llama)
    tokens = random_tokens(24).view(1, 24)
    first = llama.generate(tokens, max_new_tokens=12, do_sample=False)
    assert any(float(m.tracked) != 0.0 for m in modules(llama))
    assert torch.equal(first, llama.generate(tokens, max_new_tokens=12, do_sample=False))


@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("weight_dtype", [None, "int8"])
def test_the_decode_program_follows_as_modules_do(
    llama: nn.Module, selector: str, weight_dtype: str | None
) -> None:
    tracked(llama, selector=selector, weight_dtype=weight_dtype)
    tokens = random_tokens(40).view(1, 40)
    engine = choose_engine(llama, head="model")
    assert engine.name == "trimmed", engine.reason
    for _ in range(2):  # the second time begins anew
        got = [engine.start(tokens[:, :20], None, 40)]
        got += [engine.step(token[None]) for token in tokens[0, 20:]]
        with torch.no_grad():
            out = llama(tokens[:, :20], use_cache=True)
            want = [out.logits[:, -1]]
            for token in tokens[0, 20:]:
                out = llama(token.view(1, 1), past_key_values=out.past_key_values)
                want.append(out.logits[:, -1])
        torch.testing.assert_close(torch.cat(got), torch.cat(want), rtol=1e-3, atol=1e-4)


def test_the_decode_program_follows_planes_and_a_head() -> None:
    model = tiny_model("llama")
    tracked(model, weight_dtype="int4+int4", head="sparse")
    tokens = random_tokens(30).view(1, 30)
    result = wina.decode(model, tokens, max_new_tokens=8)
    assert result.engine == "trimmed", result.reason
    want = model.generate(tokens, max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert torch.equal(result.tokens, want[:, 30:])


def test_a_dense_interlude_is_not_counted(llama: nn.Module) -> None:
    tracked(llama)
    tokens = random_tokens(30).view(1, 30)
    engine = choose_engine(llama, head="model")
    engine.start(tokens[:, :20], None, 40)
    want = [engine.step(tokens[0, 20:21]), engine.step(tokens[0, 21:22])]
    engine.start(tokens[:, :20], None, 40)
    assert torch.equal(engine.step(tokens[0, 20:21]), want[0])
    position = engine._position
    with wina.dense(llama):
        engine.step(tokens[0, 25:26])
    engine._position = position
    assert torch.equal(engine.step(tokens[0, 21:22]), want[1])


@pytest.mark.parametrize(("prefill", "length"), [("dense", 1), ("all", 3), ("all", 1), ("all", 40)])
def test_every_text_begins_anew(llama: nn.Module, prefill: str, length: int) -> None:
    tracked(llama, prefill=prefill, tracking=0.5)
    tokens = random_tokens(length, seed=2)[None]
    first, second = (
        llama.generate(tokens, max_new_tokens=8, do_sample=False, output_logits=True,
                       return_dict_in_generate=True).logits
        for _ in range(2)
    )  # fmt: skip
    assert torch.equal(torch.stack(first), torch.stack(second))


def test_texts_in_a_static_cache_begin_anew_unasked(llama: nn.Module) -> None:
    tracked(llama, tracking=0.5)
    tokens = random_tokens(12, seed=2)[None]
    static = {"cache_implementation": "static", "disable_compile": True, "do_sample": False}
    first, second = (llama.generate(tokens, max_new_tokens=8, **static) for _ in range(2))
    assert torch.equal(first, second)
    assert any(float(module.tracked) != 0.0 for module in modules(llama))
    cache = StaticCache(llama.config, max_cache_len=32)
    control = modules(llama)[0].control
    with torch.no_grad():
        llama(tokens, past_key_values=cache)
    assert isinstance(cache.get_seq_length(), Tensor)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "__bool__", lambda _: pytest.fail("it waits for the device"))
        control._begin(llama, (), {"input_ids": tokens[:, :1], "past_key_values": cache})


def test_a_prompt_in_parts_goes_on(llama: nn.Module) -> None:
    tracked(llama, prefill="all", sink_tokens=0)
    tokens = random_tokens(48).view(1, 48)
    with torch.no_grad():
        whole = llama(tokens).logits
        first = llama(tokens[:, :32], use_cache=True)
        rest = llama(tokens[:, 32:], past_key_values=first.past_key_values).logits
    torch.testing.assert_close(torch.cat([first.logits, rest], 1), whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("selector", SELECTORS)
def test_padded_rows_are_followed_as_each_alone(
    llama: nn.Module, selector: str, padding: str
) -> None:
    tracked(llama, prefill="all", selector=selector)
    rows, size = [random_tokens(length, seed=length) for length in (17, 40, 48)], 48
    ids, mask = torch.zeros(2, 3, size, dtype=torch.long)
    for row, tokens in enumerate(rows):
        where = slice(size - len(tokens), size) if padding == "left" else slice(len(tokens))
        ids[row, where], mask[row, where] = tokens, 1
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        with padded_batch(llama, [len(tokens) for tokens in rows], size, padding):
            together = llama(ids, attention_mask=mask, position_ids=positions).logits
        for row, tokens in enumerate(rows):
            alone = llama(tokens[None]).logits[0]
            torch.testing.assert_close(together[row, mask[row] > 0], alone, rtol=1e-3, atol=1e-4)


def test_rows_of_a_batch_are_followed_on_their_own(llama: nn.Module) -> None:
    tracked(llama, prefill="all")
    tokens = random_tokens(80).view(2, 40)
    with torch.no_grad():
        both = llama(tokens).logits
        alone = torch.cat([llama(row[None]).logits for row in tokens])
    torch.testing.assert_close(both, alone, rtol=1e-4, atol=1e-5)


def test_batches_of_inference_mode_and_of_others_take_turns(llama: nn.Module) -> None:
    tracked(llama, prefill="all")
    tokens = random_tokens(80).view(2, 40)
    with torch.inference_mode():
        want = llama(tokens).logits
    with torch.no_grad():
        torch.testing.assert_close(llama(tokens).logits, want.clone())


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_not_counted(llama: nn.Module, side: str) -> None:
    tracked(llama, prefill="all")
    tokens, attention = random_tokens(40).view(1, 40), torch.ones(1, 40, dtype=torch.int64)
    padding, own = (slice(0, 12), slice(12, 40)) if side == "left" else (slice(28, 40), slice(28))
    attention[:, padding] = 0
    positions = (attention.cumsum(-1) - 1).clamp_min(0)
    found = []
    for other in (0, 7):
        tokens[:, padding] = other
        with torch.no_grad(), padded_batch(llama, [28], 40, side):
            logits = llama(tokens, attention_mask=attention, position_ids=positions).logits[:, own]
        found.append((logits, [float(m.tracked) for m in modules(llama)]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == pytest.approx(found[1][1], abs=1e-6)
    assert any(found[0][1])


def test_casts_leave_the_state_in_float32(llama: nn.Module) -> None:
    tracked(llama)
    llama.to(torch.bfloat16)
    assert all(module.tracked.dtype == torch.float32 for module in modules(llama))
    llama.generate(random_tokens(8).view(1, 8), max_new_tokens=4, do_sample=False)


def test_it_compiles(llama: nn.Module) -> None:
    tracked(llama)
    module = llama.model.layers[0].self_attn.o_proj
    x = drawn(1, 1, module.in_features, loud=2.0)
    with torch.no_grad():
        want = [module(x), module(x)]
        ends = float(module.tracked)
        module.tracked.zero_()
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        got = [compiled(x), compiled(x)]
    torch.testing.assert_close(got, want)
    assert float(module.tracked) == pytest.approx(ends)


def test_plans_keep_the_rate(llama: nn.Module, tmp_path: Any) -> None:
    plan = plan_for(llama, tracking=0.02)
    loaded = SparsityPlan.load(plan.save(tmp_path))
    assert loaded.config.tracking == 0.02
    assert config(tracking=0.02).tracking == 0.02
