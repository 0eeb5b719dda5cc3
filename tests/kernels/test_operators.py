"""Every backend against the float64 definition."""

from __future__ import annotations

import inspect

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_cases import DTYPES, assert_equal_up_to_rounding, case, exact
from torch import Tensor

from wina.errors import UnknownNameError
from wina.kernels import counting, cpu, ops, program, quantized, reference
from wina.kernels.dispatch import backends

SIZES = [1, 2, 63, 192, 576, 1000, 4097]
TOKENS = [1, 2, 3, 5, 8, 16, 17]

# Backends of other devices have their own suites (test_triton_*.py).
BACKENDS = [name for name, backend in backends().items() if backend.device in (None, "cpu")]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> object:
    if request.param == "cpu" and (reason := cpu.load()) is not None:
        pytest.fail(f"the native kernels cannot be built here: {reason}")
    return backends()[request.param]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("N", SIZES)
def test_sparse_linear_shapes(backend, N: int, K: int, dtype: torch.dtype) -> None:
    x, weight, threshold = case(1, K, N, dtype, 0.5)
    got = backend.sparse_linear(x, weight, threshold)
    assert_equal_up_to_rounding(got, exact(x, weight, threshold), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", TOKENS)
@pytest.mark.parametrize("sparsity", [0, 0.5, 0.99, 1])
@pytest.mark.parametrize("extras", [False, True], ids=["plain", "bias+scale"])
def test_sparse_linear_tokens(
    backend, T: int, sparsity: float, dtype: torch.dtype, extras: bool
) -> None:
    x, weight, threshold = case(T, 576, 193, dtype, sparsity)
    bias = torch.randn(193).to(dtype) if extras else None
    scale = torch.rand(T) + 0.5 if extras else None
    got = backend.sparse_linear(x, weight, threshold, bias, scale)
    want = exact(x, weight, threshold, bias, scale)
    assert_equal_up_to_rounding(got, want, x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 3, 150])
def test_residual_is_added_before_the_one_rounding(backend, T: int, dtype: torch.dtype) -> None:
    x, weight, threshold = case(T, 192, 101, dtype, 0.5)
    bias, residual = torch.randn(101).to(dtype), (100 * torch.randn(T, 101)).to(dtype)
    got = backend.sparse_linear(x, weight, threshold, bias, None, residual)
    want = exact(x, weight, threshold, bias, None, residual)
    if not backend.k_major:  # its product has been rounded before
        product = exact(x, weight, threshold, bias)
        allowed = torch.finfo(dtype).eps * (want.abs() + product.abs()) + 1e-3
        assert ((got.double() - want).abs() <= allowed).all()
    else:
        assert_equal_up_to_rounding(got, want, x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T", [1, 5, 150])
def test_sparse_group_is_sparse_linear_of_each_weight(T: int, dtype: torch.dtype) -> None:
    assert cpu.load() is None
    x = case(T, 96, 1, dtype, 0.5)[0]
    parts = [case(T, 96, N, dtype, s)[1:] for N, s in ((64, 0.5), (1, 0.9), (33, 0.0))]
    weights, thresholds = [w for w, _ in parts], [t for _, t in parts]
    biases = [torch.randn(64).to(dtype), None, torch.randn(33).to(dtype)]
    scales = [None, torch.rand(T), torch.rand(T)]
    ys = ops.sparse_group(x, weights, thresholds, biases, scales)
    defined = reference.sparse_group(x, weights, thresholds, biases, scales)
    for i, one in enumerate(zip(weights, thresholds, biases, scales, strict=True)):
        assert torch.equal(ys[i], ops.sparse_linear(x, *one))
        assert_equal_up_to_rounding(defined[i], exact(x, *one), x, one[0])


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("K", [2, 63, 576, 4097])
@pytest.mark.parametrize("levels", [2, 1000], ids=["ties", "few ties"])
def test_native_topk_scale_is_exactly_the_definitions(
    K: int, levels: int, dtype: torch.dtype
) -> None:
    assert cpu.load() is None
    x = ((torch.randn(3, 2, K) * levels).round() / levels).to(dtype)
    x[0, 0, 0], x[1, 1, K // 2] = torch.nan, -torch.inf
    for threshold in (torch.ones(K), 1 / torch.rand(K), torch.randn(K)):
        for dropped in {1, max(1, K // 2), K - 1}:
            want = reference.topk_scale(x, threshold, dropped)
            assert torch.equal(ops.topk_scale(x, threshold, dropped), want)


def test_threshold_minus_one_keeps_all_and_inf_drops(backend) -> None:
    x, weight, _ = case(1, 64, 32, torch.float32, 0)
    all_kept = backend.sparse_linear(x, weight, torch.full((64,), -1.0))
    torch.testing.assert_close(all_kept, x @ weight)
    bias = torch.randn(32)
    dropped = backend.sparse_linear(x, weight, torch.full((64,), torch.inf), bias)
    assert torch.equal(dropped, bias[None])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("threshold", [-1.0, 0.5, 3.4e38, torch.inf])
@pytest.mark.parametrize("T", [1, 3, 17])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_inf_are_never_dropped(
    backend, bad: float, threshold: float, T: int, dtype: torch.dtype
) -> None:
    x = torch.randn(T, 40).to(dtype)
    x[T // 2, 17] = bad
    weight = torch.rand(40, 24).to(dtype) + 0.1
    y = backend.sparse_linear(x, weight, torch.full((40,), threshold))
    assert not y[T // 2].isfinite().any()
    others = [t for t in range(T) if t != T // 2]
    assert y[others].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 5, 7), (3, 0, 7), (3, 5, 0), (0, 0, 0)])
def test_zero_sizes(backend, shape: tuple[int, int, int]) -> None:
    T, K, N = shape
    x, weight, threshold = torch.randn(T, K), torch.randn(K, N), torch.zeros(K)
    bias = torch.randn(N)
    y = backend.sparse_linear(x, weight, threshold, bias)
    torch.testing.assert_close(y, exact(x, weight, threshold, bias).float())


def test_leading_dimensions_and_strides(backend) -> None:
    x, weight, threshold = case(12, 96, 40, torch.float32, 0.5)
    flat = backend.sparse_linear(x, weight, threshold)
    torch.testing.assert_close(
        backend.sparse_linear(x.view(3, 4, 96), weight, threshold), flat.view(3, 4, 40)
    )
    torch.testing.assert_close(backend.sparse_linear(x[0], weight, threshold), flat[0])
    spread = torch.zeros(12, 192)
    spread[:, ::2] = x
    torch.testing.assert_close(backend.sparse_linear(spread[:, ::2], weight, threshold), flat)
    turned = x.t().contiguous().t()
    torch.testing.assert_close(backend.sparse_linear(turned, weight, threshold), flat)


def test_each_token_keeps_its_own_channels(backend) -> None:
    x, weight, threshold = case(6, 128, 50, torch.float32, 0.7)
    together = backend.sparse_linear(x, weight, threshold)
    one_by_one = torch.cat([backend.sparse_linear(row[None], weight, threshold) for row in x])
    torch.testing.assert_close(together, one_by_one, rtol=1e-5, atol=1e-5)


def test_sparsity_is_monotone_in_the_threshold(backend) -> None:
    x = torch.randn(1, 200)
    weight = torch.eye(200)
    kept = [
        int((backend.sparse_linear(x, weight, torch.full((200,), t)) != 0).sum())
        for t in (-1.0, 0.2, 0.5, 1.0, 2.0, torch.inf)
    ]
    assert kept == sorted(kept, reverse=True)
    assert kept[0] == 200
    assert kept[-1] == 0


@given(
    T=st.integers(1, 18),
    K=st.integers(1, 90),
    N=st.integers(1, 90),
    sparsity=st.sampled_from([0, 0.3, 0.5, 0.9, 1]),
    dtype=st.sampled_from(DTYPES),
    bias=st.booleans(),
    scale=st.booleans(),
    seed=st.integers(0, 1000),
)
@settings(deadline=None, max_examples=150)
def test_native_kernel_on_random_calls(T, K, N, sparsity, dtype, bias, scale, seed) -> None:
    assert cpu.load() is None
    x, weight, threshold = case(T, K, N, dtype, sparsity, seed)
    b = torch.randn(N).to(dtype) if bias else None
    s = torch.rand(T) * 2 if scale else None
    got = ops.sparse_linear(x, weight, threshold, b, s)
    assert_equal_up_to_rounding(got, exact(x, weight, threshold, b, s), x, weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", list(reference.ACTIVATIONS))
@pytest.mark.parametrize("T", [1, 4, 17])
@pytest.mark.parametrize("shared", [True, False], ids=["one mask", "two masks"])
def test_sparse_gate_up(backend, activation: str, T: int, shared: bool, dtype: torch.dtype) -> None:
    x, gate, gate_threshold = case(T, 192, 101, dtype, 0.5)
    _, up, up_threshold = case(T, 192, 101, dtype, 0.4, seed=1)
    gate, up = gate / 8, up / 8
    if shared:
        up_threshold = gate_threshold
    bias = torch.randn(101).to(dtype)
    got = backend.sparse_gate_up(x, gate, up, gate_threshold, up_threshold, activation, bias)
    g = exact(x, gate, gate_threshold, bias)
    u = exact(x, up, up_threshold)
    want = reference.ACTIVATIONS[activation](g) * u
    # The reference backend rounds g, act(g) and u on the way: four roundings, and float32
    # accumulation over 192 terms.
    size = (1 + g.abs() + g.square() * (activation == "relu2")) * (1 + u.abs())
    tolerance = (4 * torch.finfo(dtype).eps + 1e-5) * size
    assert got.dtype == dtype
    assert ((got.double() - want).abs() <= tolerance).all()


def test_gate_up_honours_both_scales(backend) -> None:
    x, gate, threshold = case(3, 64, 32, torch.float32, 0.5)
    up = torch.randn(64, 32)
    a, b = torch.rand(3) + 0.5, torch.rand(3) + 0.5
    got = backend.sparse_gate_up(x, gate, up, threshold, threshold, "silu", None, None, a, b)
    want = torch.nn.functional.silu(exact(x, gate, threshold, None, a)) * exact(
        x, up, threshold, None, b
    )
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-4)


def test_poisoned_outputs_are_all_written(poisoned_memory: None) -> None:
    assert cpu.load() is None
    for N in (1, 7, 64, 193, 2049):
        x, weight, threshold = case(1, 33, N, torch.float32, 0.5)
        assert ops.sparse_linear(x, weight, threshold).isfinite().all()


@pytest.mark.parametrize("T", [1, 3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_do_not_change_a_bit(T: int, dtype: torch.dtype) -> None:
    assert cpu.load() is None
    x, weight, threshold = case(T, 777, 1537, dtype, 0.5)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(ops.sparse_linear(x, weight, threshold))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("name", list(ops.OPERATORS))
def test_an_operator_has_the_signature_of_its_definition(name: str) -> None:
    operator = ops.OPERATORS[name]
    schema = getattr(torch.ops.wina, name).default._schema
    parameters = inspect.signature(operator.definition).parameters
    assert [a.name for a in schema.arguments] == list(parameters)
    homes = [m for m in (reference, quantized, counting, program) if hasattr(m, name)]
    assert [operator.definition] == [getattr(home, name) for home in homes]


def test_a_kernel_serves_what_it_can_and_the_definition_the_rest() -> None:
    operator = ops.OPERATORS["sparse_linear"]
    call = operator.implementation(lambda a: a.bias, lambda a: a.bias is not None)
    x, weight, threshold = case(2, 8, 4, torch.float64, 0.5)
    bias = torch.ones(4).double()
    assert call(x, weight, threshold, bias=bias) is bias
    assert torch.equal(call(x, weight, threshold), reference.sparse_linear(x, weight, threshold))
    with pytest.raises(RuntimeError, match="threshold"):
        call(x, weight, threshold[1:])
    with pytest.raises(RuntimeError, match="no backward"):
        call(x, weight, threshold, bias.requires_grad_())


def test_a_kernel_of_an_unknown_operator_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="Known: sparse_linear, sparse_gate_up"):
        ops.register("sparse", "CUDA", lambda a: a.x, lambda _: True)


@pytest.mark.parametrize("loaded", [True, False], ids=["native", "default"])
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck(loaded: bool, extras: bool) -> None:
    if loaded:
        assert cpu.load() is None
    # float64 goes through the general path
    dtype = torch.float32 if loaded else torch.float64
    x, weight = torch.randn(3, 32, dtype=dtype), torch.randn(32, 24, dtype=dtype)
    threshold = torch.full((32,), 0.5)
    bias, scale = (torch.randn(24, dtype=dtype), torch.rand(3)) if extras else (None, None)
    residual = torch.randn(3, 24, dtype=dtype) if extras else None
    torch.library.opcheck(ops.sparse_linear, (x, weight, threshold, bias, scale, residual))
    torch.library.opcheck(
        ops.sparse_group,
        (x, [weight, weight[:, :5].contiguous()], [threshold] * 2, [bias, None], [None, scale]),
    )
    torch.library.opcheck(ops.keep_mask, (x, threshold, scale))
    torch.library.opcheck(ops.mask_inputs, (x, threshold, scale))
    torch.library.opcheck(ops.topk_scale, (x, threshold, 7))
    torch.library.opcheck(ops.mean_scale, (x,))
    torch.library.opcheck(ops.probe_scale, (x, torch.randn(33), 0.5))
    up = torch.randn(32, 24, dtype=dtype)
    torch.library.opcheck(
        ops.sparse_gate_up,
        (x, weight, up, threshold, threshold, "silu", bias, bias, scale, scale),
    )


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("K", SIZES)
@pytest.mark.parametrize("scaled", [False, True])
def test_masks_are_their_definitions(K: int, dtype: torch.dtype, scaled: bool) -> None:
    assert cpu.load() is None
    x = torch.randn(2, 9, 2 * K).to(dtype)[..., ::2]
    threshold = torch.rand(K)
    for values, special in (
        (x.view(-1, K)[0], (float("nan"), float("inf"), -float("inf"), 0.0)),
        (threshold, (float("nan"), float("inf"), -1.0, float(x[1, 1, -1].abs()))),
    ):
        values[-len(special) :] = torch.tensor(special)[-K:].to(dtype)
    scale = torch.rand(2, 9) + 0.5 if scaled else None
    want = reference.keep_mask(x, threshold, scale)
    assert 0 < want.sum() < want.numel() or K == 1
    assert torch.equal(ops.keep_mask(x, threshold, scale), want)
    masked = ops.mask_inputs(x, threshold, scale)
    torch.testing.assert_close(masked, torch.where(want, x, 0), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(
    "change",
    [
        {"threshold": torch.zeros(7)},
        {"threshold": torch.zeros(8).double()},
        {"scale": torch.zeros(2)},
        {"scale": torch.zeros(1).double()},
        {"x": torch.zeros(1, 8, dtype=torch.int32)},
    ],
)
@pytest.mark.parametrize("operator", [ops.keep_mask, ops.mask_inputs], ids=str)
def test_wrong_arguments_of_a_mask_are_named(operator, change: dict[str, Tensor]) -> None:
    assert cpu.load() is None
    arguments = {"x": torch.randn(1, 8), "threshold": torch.zeros(8), "scale": torch.ones(1)}
    with pytest.raises(RuntimeError, match=next(iter(change))):
        operator(**{**arguments, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 9)}, "8"),
        ({"weight": torch.randn(8, 4).bfloat16()}, "(?i)dtype|bfloat16"),
        ({"threshold": torch.zeros(7)}, "threshold"),
        ({"threshold": torch.zeros(8).double()}, "threshold"),
        ({"bias": torch.zeros(3)}, "bias|size"),
        ({"residual": torch.zeros(1, 3)}, "residual"),
        ({"residual": torch.zeros(1, 4).half()}, "residual"),
    ],
)
def test_wrong_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    assert cpu.load() is None
    arguments = {"x": torch.randn(1, 8), "weight": torch.randn(8, 4), "threshold": torch.zeros(8)}
    with pytest.raises(RuntimeError, match=message):
        ops.sparse_linear(**{**arguments, **change})


@pytest.mark.parametrize("call", ["native", "definition"])
def test_wrong_groups_and_ranks_are_named(call: str) -> None:
    assert cpu.load() is None
    group, topk = ops.sparse_group, ops.topk_scale
    if call == "definition":
        group, topk = (
            ops.OPERATORS[name].implementation(lambda a: a, lambda _: True)
            for name in ("sparse_group", "topk_scale")
        )
    x, weight, threshold = case(1, 8, 4, torch.float32, 0.5)
    with pytest.raises(RuntimeError, match="one threshold, bias and scale"):
        group(x, [weight, weight], [threshold], [None, None], [None, None])
    with pytest.raises(RuntimeError, match="threshold"):
        group(x, [weight], [threshold[1:]], [None], [None])
    for dropped in (0, 8):
        with pytest.raises(RuntimeError, match=r"dropped must be in \[1, 7\]"):
            topk(x, threshold, dropped)
    with pytest.raises(RuntimeError, match="threshold"):
        topk(x, threshold[1:], 3)


def test_unknown_activation_lists_the_known_ones() -> None:
    w, t = torch.randn(4, 4), torch.zeros(4)
    with pytest.raises(RuntimeError, match="silu"):
        ops.sparse_gate_up(torch.randn(1, 4), w, w, t, t, "swish")


def test_operator_refuses_gradients() -> None:
    weight = torch.randn(8, 4, requires_grad=True)
    with pytest.raises(RuntimeError, match="no backward"):
        ops.sparse_linear(torch.randn(1, 8), weight, torch.zeros(8))


def test_reference_is_differentiable() -> None:
    x = torch.randn(2, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    threshold = torch.full((5,), 0.4)
    assert torch.autograd.gradcheck(
        lambda x, w: reference.sparse_linear(x, w, threshold), (x, weight)
    )
