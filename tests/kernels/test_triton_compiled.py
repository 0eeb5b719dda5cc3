"""Every kernel and shipped configuration, compiled for real cards without one."""

from __future__ import annotations

from dataclasses import replace

import pytest

from wina.kernels.triton import compiled
from wina.kernels.triton.compiled import TARGETS, Variant, compile_variant, variants
from wina.kernels.triton.config import Launch

QUICK = [
    (v, cc)
    for v in variants(thorough=False)
    for cc in TARGETS
    if (v.dtype == "bfloat16" and (cc in (80, 90) or v.kernel == "sparse_linear"))
    or (v.dtype == "float32" and cc == 90)
    if v.weights is None or (v.dtype, cc) == ("bfloat16", 90)
]
# float16 differs from bfloat16 in conversions only: one target of each generation.
ALL = [(v, cc) for v in variants(True) for cc in TARGETS if v.dtype != "float16" or cc in (80, 90)]


def ids(pairs: list[tuple[Variant, int]]) -> list[str]:
    return [f"{variant} sm_{target}" for variant, target in pairs]


# The only plain call that spills outside of its loop: one register, stored and loaded once.
SPILLS = {("sparse_gate_up bfloat16 one 128Bx128 w4 s3 silu", 80): 8}


def check(variant: Variant, target: int, spilled: int = 0) -> None:
    """``spilled``: bytes that may wait in local memory outside of loops."""
    use = compile_variant(variant, target)
    assert use.spills_in_loops == 0, "spills registers inside of a loop"
    # A value or two may wait in local memory while a loop runs; the widest selection issues all its
    # loads at once, before its loop, and runs once a token.
    widest = variant.kernel == "topk_scale" and variant.launch.block_k > 16384
    # The scales and biases of both products on top of 128 sums a thread, which plain calls hold.
    fullest = (variant.kernel, variant.weights) == ("sparse_gate_up", "int4") and variant.extras
    most = 256 if widest else 128 if fullest else spilled
    assert use.spilled <= most, "spills registers to local memory"
    assert use.shared <= compiled.SHARED_PER_BLOCK[target]
    if compiled.KERNELS[variant.kernel].loops:
        assert use.resident >= 2, "one program cannot hide its own barriers"
    assert use.unmasked == 0, "reads rows that no token keeps"
    assert use.loads.get(16, 0) >= compiled.wide_weight_loads(variant), (
        f"weight loads are narrower than 16 bytes a thread: {use.loads}"
    )


@pytest.mark.parametrize(("variant", "target"), QUICK, ids=ids(QUICK))
def test_resources(variant: Variant, target: int) -> None:
    check(variant, target, SPILLS.get((str(variant), target), 0))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "target"), ALL, ids=ids(ALL))
def test_resources_of_every_combination(variant: Variant, target: int) -> None:
    check(variant, target, 8)


@pytest.mark.parametrize("many", [False, True])
def test_rows_aligned_to_16_bytes_are_enough(many: bool) -> None:
    """N = 1000 in 16 bits: a multiple of 8, not of the 16 that Triton specialises on."""
    variant = next(v for v in variants(False) if v.many == many and v.dtype == "bfloat16")
    check(replace(variant, align=8), 90)


def test_narrow_loads_are_noticed() -> None:
    variant = Variant("sparse_linear", "bfloat16", False, Launch(128, 64, 4, 5), align=4)
    with pytest.raises(AssertionError, match="narrower"):
        check(variant, 90)


def test_the_loads_counted_are_those_in_ptx() -> None:
    ptx = """
    @%p1 cp.async.cg.shared.global.L2::cache_hint [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2, %rd2;
    cp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4, %r2;
    @%p2 ld.global.b16 { %rs1 }, [ %rd2 + 0 ];
    ld.global.L1::evict_first.v4.b32 { %r3, %r4, %r5, %r6 }, [ %rd3 + 0 ];
    """
    assert compiled.global_loads(ptx) == {16: 2, 4: 1, 2: 1}
    assert compiled.unmasked_copies(ptx) == 0
    assert compiled.unmasked_copies("cp.async.cg.shared.global [ %r1 ], [ %rd1 ], 0x10;") == 1
