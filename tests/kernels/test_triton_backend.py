"""What the Triton backend decides without a card: refusals, configurations, registration."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from wina.control import Control
from wina.errors import ConfigError
from wina.group import ProjectionGroup
from wina.kernels import ops, triton
from wina.kernels.dispatch import LayerSpec, choose
from wina.kernels.triton import config
from wina.kernels.triton.config import Card, Launch
from wina.linear import SparseLinear
from wina.prefill import parse_prefill
from wina.selectors import Selector, Threshold, TopK

H100 = Card("NVIDIA H100 80GB HBM3", 132)
CUDA = LayerSpec(torch.device("cuda", 0), torch.bfloat16, 64, 32)


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A folder of configurations with the default table only."""
    (tmp_path / "default.json").write_text((config.FOLDER / "default.json").read_text())
    monkeypatch.setattr(config, "FOLDER", tmp_path)
    config._device_table.cache_clear()
    yield tmp_path
    config._device_table.cache_clear()


def test_importing_wina_imports_no_triton() -> None:
    code = "import sys, wina, wina.kernels.triton; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_layer_elsewhere_is_refused() -> None:
    with pytest.raises(ConfigError, match="the layer is on cpu"):
        choose(LayerSpec(torch.device("cpu"), torch.bfloat16, 64, 32), "triton")
    with pytest.raises(ConfigError, match=r"no kernel for torch\.float64"):
        choose(LayerSpec(CUDA.device, torch.float64, 64, 32), "triton")


def test_a_usable_card_is_served_and_others_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    assert choose(CUDA).backend.name == "triton"
    assert choose(CUDA).reason == (
        "fastest here; masked dense above 16 tokens (reasoned, not measured)"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    choice = choose(CUDA)
    assert choice.backend.name == "reference"
    assert "a card has compute capability 7.5; the kernels need 8.0" in choice.reason


@pytest.mark.parametrize(
    ("found", "message"),
    [(None, "Triton is not installed"), ("3.1.0", "Triton 3.1.0 is older than 3.2")],
)
def test_missing_or_old_triton(
    monkeypatch: pytest.MonkeyPatch, found: str | None, message: str
) -> None:
    monkeypatch.setattr(triton.importlib.util, "find_spec", lambda _: found)
    monkeypatch.setattr(triton, "version", lambda _: found)
    triton.load.cache_clear()
    try:
        assert message in str(triton.load())
    finally:
        triton.load.cache_clear()


# On a GPU torch's own dense products and masks of prompts are at memory bandwidth, a CUDA graph is
# the decode step, and calibration waits for the dense model.
FOR_CPUS = {
    "dense_linear_rows", "dense_linear_rows_quantized", "decode_step", "keep_mask", "mask_inputs",
    "count_scores", "kept_sums", "mask_backward",
}  # fmt: skip


def test_loading_registers_for_cuda() -> None:
    assert triton.load() is None
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    served = {name for name in ops.OPERATORS if has_kernel(f"wina::{name}", "CUDA")}
    assert served == set(ops.OPERATORS) - FOR_CPUS


@pytest.mark.parametrize("kernel", config.kernels())
@pytest.mark.parametrize("sms", [1, 46, 108, 132, 1000])
@pytest.mark.parametrize("tokens", [1, 2, 16])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_rule_for_every_call(kernel: str, sms: int, tokens: int, itemsize: int) -> None:
    for K in (1, 63, 4096, 14336):
        for N in (1, 1000, 4096, 128256):
            launch = config.choose(kernel, Card("any", sms), tokens, K, N, itemsize)
            splits, blocks = launch.splits(K)
            assert splits * blocks * launch.block_k >= K
            assert (splits - 1) * blocks * launch.block_k < K
            assert kernel == "sparse_linear" or splits == 1


def test_wide_outputs_take_one_pass_and_narrow_ones_split() -> None:
    assert config.choose("sparse_linear", H100, 1, 4096, 28672, 2).splits(4096)[0] == 1
    splits, _ = config.choose("sparse_linear", H100, 1, 14336, 4096, 2).splits(14336)
    assert splits == 8  # 64 column tiles: 512 programs on 132 multiprocessors


def test_tuned_shapes_come_first_for_their_neighbours(tables: Path) -> None:
    tuned = Launch(128, 128, 8, 4, 2)
    row = {"kernel": "sparse_linear", "many": False, "itemsize": 2, "K": 4096, "N": 4096}
    path = config.save_tuned(
        H100, [{**row, "launch": config.launch_fields(tuned)}], 8, tables
    )  # fmt: skip
    assert path.name == "nvidia-h100-80gb-hbm3.json"
    assert config.token_limit(H100.name) == config.Limit(8, measured=True)
    assert json.loads(path.read_text())["device"] == H100.name
    assert config.choose("sparse_linear", H100, 1, 4096, 4096, 2) == tuned
    assert config.choose("sparse_linear", H100, 1, 3584, 5120, 2) == tuned
    assert config.choose("sparse_linear", H100, 1, 14336, 4096, 2) != tuned
    assert config.choose("sparse_linear", H100, 2, 4096, 4096, 2) != tuned
    assert replace_splits(tuned) in config.shipped("sparse_linear", False, 2)


def replace_splits(launch: Launch) -> Launch:
    return Launch(launch.row_bytes, launch.block_k, launch.warps, launch.stages)


def test_a_card_without_a_table_warns_once(tables: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "wina"):
        for _ in range(3):
            config.choose("sparse_linear", H100, 1, 4096, 4096, 2)
    assert [r.getMessage() for r in caplog.records] == [
        f"no tuned kernel configurations for {H100.name}: using the defaults; "
        "`wina bench tune` makes them"
    ]


def linear_on_a_card(N: int) -> nn.Linear:
    """A layer 64 → N without values."""
    layer = nn.Linear(64, N, device="meta")
    for name, shape in (("weight", (N, 64)), ("bias", (N,))):
        values = torch.empty(shape, device="cuda", dtype=torch.bfloat16)
        setattr(layer, name, nn.Parameter(values, requires_grad=False))
    return layer


class Calls(TorchDispatchMode):
    """Notes the wina operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "wina":
            self.names.append(func._opname)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("selector", [Threshold(), TopK()], ids=["threshold", "topk"])
def test_attention_on_a_card_takes_one_launch_for_q_k_and_v(
    monkeypatch: pytest.MonkeyPatch, selector: Selector
) -> None:
    """Modules on a CUDA device that is not there: shapes and choices without values."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "a card")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    control = Control(parse_prefill("dense", 4), "auto")
    with FakeTensorMode(), torch.no_grad(), Calls() as calls:
        q, k, v, o = (
            SparseLinear(
                linear_on_a_card(N), f"{i}", torch.empty(64, device="cuda"), 0.5, selector, control
            )
            for i, N in enumerate((64, 16, 16, 64))
        )  # fmt: skip
        group = ProjectionGroup([q, k, v])
        for module in group.members:
            module.group = group
        assert (group.fuses, q.choice.backend.name) == (True, "triton")
        x = torch.empty(1, 1, 64, device="cuda", dtype=torch.bfloat16)
        ys = [q(x), k(x), v(x), o(x)]
    assert [tuple(y.shape) for y in ys] == [(1, 1, 64), (1, 1, 16), (1, 1, 16), (1, 1, 64)]
    assert {y.device.type for y in ys} == {"cuda"}
    products = [name for name in calls.names if not name.endswith("scale")]
    assert products == ["sparse_group", "sparse_linear"]
    assert calls.names.count("topk_scale") == (4 if isinstance(selector, TopK) else 0)
