from dataclasses import replace

import pytest
import torch

from wina.errors import ConfigError, UnknownNameError
from wina.kernels import cpu, reference
from wina.kernels.dispatch import LayerSpec, backends, choose

LAYER = LayerSpec(torch.device("cpu"), torch.float32, 64, 32)


def test_native_kernels_serve_the_cpu() -> None:
    choice = choose(LAYER)
    assert (choice.backend.name, choice.reason) == ("cpu", "fastest here")


def test_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda: "no C++ compiler found")
    choice = choose(LAYER)
    assert choice.backend.name == "reference"
    assert choice.reason == "cpu: no C++ compiler found"
    with pytest.raises(ConfigError, match=r"cannot serve.*no C\+\+ compiler"):
        choose(LAYER, "cpu")


def test_wanted_backend() -> None:
    assert choose(LAYER, "reference").reason == "asked for"
    with pytest.raises(UnknownNameError, match="Known: auto, triton, cpu-rows, cpu, reference"):
        choose(LAYER, "cuda")


LARGE = LayerSpec(torch.device("cpu"), torch.bfloat16, 576, 1536)


@pytest.mark.parametrize(
    ("layer", "backend"),
    [
        (replace(LARGE, sparsity=0.3), "cpu-rows"),
        (replace(LARGE, sparsity=0.6), "cpu"),
        (replace(LARGE, in_features=2048, out_features=8192, sparsity=0.3), "cpu"),
        (replace(LARGE, in_features=2048, out_features=8192, sparsity=0.05), "cpu-rows"),
        (replace(LAYER, sparsity=0.0), "cpu"),
    ],
    ids=["short rows, few skipped", "short rows", "long rows", "hardly any", "cached"],
)
def test_rows_are_skipped_where_that_pays(layer: LayerSpec, backend: str) -> None:
    assert choose(layer).backend.name == backend


def test_a_layout_that_is_given() -> None:
    assert choose(replace(LARGE, sparsity=0.6), k_major=False).backend.name == "cpu-rows"
    assert choose(replace(LARGE, sparsity=0.1), k_major=True).backend.name == "cpu"
    double = choose(replace(LARGE, dtype=torch.float64), k_major=True)
    assert double.backend.name == "reference"


@pytest.mark.parametrize("dtype", cpu.DTYPES, ids=str)
def test_masked_rows_are_the_sparse_products(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    x, gate, up, bias = (
        torch.randn(shape, generator=generator).to(dtype)
        for shape in ((2, 70), (70, 33), (70, 33), (33,))
    )
    cuts = (torch.rand(70, generator=generator), torch.rand(70, generator=generator))
    scale = torch.rand(2, generator=generator) + 0.5
    rows = backends()["cpu-rows"]
    wide = [t.double() for t in (x, gate, up, bias)]
    tolerance = {"rtol": 2e-2 if dtype != torch.float32 else 1e-5, "atol": 1e-2}
    want = reference.sparse_linear(wide[0], wide[1], cuts[0], wide[3], scale)
    got = rows.sparse_linear(x, gate.t().contiguous().t(), cuts[0], bias, scale)
    torch.testing.assert_close(got.double(), want, **tolerance)
    want = reference.sparse_gate_up(
        *wide[:3], *cuts, "silu", None, wide[3], scale, None
    )  # fmt: skip
    got = rows.sparse_gate_up(
        x, gate.t().contiguous().t(), up.t().contiguous().t(), *cuts, "silu", None, bias, scale,
        None,
    )  # fmt: skip
    torch.testing.assert_close(got.double(), want, **tolerance)
