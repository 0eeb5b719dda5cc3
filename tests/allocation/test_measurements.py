"""What a policy measured once serves every budget."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import CALIBRATION, config
from torch import nn

from wina import SparsityPlan, calibrate
from wina.allocation import Measurements

SPECS = (
    "fisher:tokens=128",
    "greedy:step=0.2:tokens=64",
    "block-error:step=0.5:tokens=64",
    "growing:step=0.5:tokens=64",
)


def plan(
    model: nn.Module, sparsity: float, measurements: Measurements | None, **more: object
) -> SparsityPlan:
    settings = config(method="wina", sparsity=sparsity, calibration_tokens=512, window=64, **more)
    return calibrate(
        model, None, settings, CALIBRATION, show_progress=False, measurements=measurements
    )


def shares(found: SparsityPlan) -> dict[str, float]:
    return {name: layer.sparsity for name, layer in found.layers.items()}


@pytest.mark.parametrize("spec", SPECS)
def test_shared_measurements_give_what_single_ones_give(
    llama: nn.Module, spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = Measurements(0.7, tmp_path, {"model": "m"})
    single = {s: shares(plan(llama, s, None, allocation=spec)) for s in (0.3, 0.7)}
    first = shares(plan(llama, 0.3, kept, allocation=spec))
    assert len(list(tmp_path.glob("*.json"))) == 1

    def fail(*_: object) -> None:
        raise AssertionError("measured again")

    monkeypatch.setattr("wina.allocation.fisher.loss_changes", fail)
    for policy in ("greedy", "block_error", "growing"):
        monkeypatch.setattr(f"wina.allocation.{policy}.visit_blocks", fail)
    again = Measurements(0.7, tmp_path, {"model": "m"})  # a run that goes on
    second = shares(plan(llama, 0.7, again, allocation=spec, selector="topk"))
    for found, wanted in ((first, single[0.3]), (second, single[0.7])):
        assert found == pytest.approx(wanted, abs=1e-9)
    with pytest.raises(AssertionError, match="measured again"):
        plan(llama, 0.3, Measurements(0.7, tmp_path, {"model": "other"}), allocation=spec)
    with pytest.raises(AssertionError, match="measured again"):
        plan(llama, 0.3, again, allocation=spec, criterion="magnitude")


def test_a_damaged_file_is_measured_again(tmp_path: Path) -> None:
    about = {"x": 1}
    assert Measurements(0.5, tmp_path).get(about, lambda: [1.5]) == [1.5]
    next(tmp_path.glob("*.json")).write_text("{")
    assert Measurements(0.5, tmp_path).get(about, lambda: [2.5]) == [2.5]
