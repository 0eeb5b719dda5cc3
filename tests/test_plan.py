from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import plan_for
from torch import nn

import wina
from wina.errors import PlanError
from wina.plan import JSON_FILE, TENSOR_FILE, _digest


@pytest.fixture
def folder(llama: nn.Module, tmp_path: Path) -> Path:
    return plan_for(llama).save(tmp_path / "plan")


def test_round_trip(llama: nn.Module, tmp_path: Path) -> None:
    plan = plan_for(llama, method="teal", selector="relative")
    loaded = wina.SparsityPlan.load(plan.save(tmp_path))
    assert (loaded.config, loaded.model_type) == (plan.config, plan.model_type)
    assert loaded.realised == plan.realised
    assert list(loaded.layers) == list(plan.layers)
    for name, layer in plan.layers.items():
        other = loaded.layers[name]
        assert torch.equal(other.threshold, layer.threshold)
        assert torch.equal(other.sample, layer.sample)
        assert (other.projection, other.sparsity, other.realised, other.cutoff) == (
            layer.projection, layer.sparsity, layer.realised, layer.cutoff,
        )  # fmt: skip


def test_saving_is_reproducible(folder: Path, tmp_path: Path) -> None:
    again = wina.SparsityPlan.load(folder).save(tmp_path / "again")
    for name in (JSON_FILE, TENSOR_FILE):
        assert (folder / name).read_bytes() == (again / name).read_bytes()


def test_people_can_read_it(folder: Path) -> None:
    document = json.loads((folder / JSON_FILE).read_text())
    assert document["config"]["method"] == "wina"
    row = document["projections"][0]
    assert row["name"] == "model.layers.0.self_attn.q_proj"
    assert row["sparsity"] == 0.5
    assert str(Path.cwd()) not in (folder / JSON_FILE).read_text()


def edit(change: Callable[[dict], None], seal: bool = True) -> Callable[[Path], None]:  # type: ignore[type-arg]
    """Alter the JSON; with ``seal`` its checksum is made to fit again."""

    def apply(folder: Path) -> None:
        path = folder / JSON_FILE
        document = json.loads(path.read_text())
        change(document)
        if seal:
            document.pop("sha256")
            document["sha256"] = _digest(document)
        path.write_text(json.dumps(document))

    return apply


def truncate(name: str, size: int) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])  # type: ignore[return-value, func-returns-value]


def flip(name: str) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        data = bytearray((folder / name).read_bytes())
        data[-5] ^= 1
        (folder / name).write_bytes(data)

    return apply


def projection(key: str, value: object) -> Callable[[dict], None]:  # type: ignore[type-arg]
    return lambda document: document["projections"][0].__setitem__(key, value)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / JSON_FILE).unlink(), "no plan folder"),
        (lambda folder: (folder / TENSOR_FILE).unlink(), "no plan folder"),
        (truncate(JSON_FILE, 100), "not JSON"),
        (truncate(JSON_FILE, 0), "not JSON"),
        (truncate(TENSOR_FILE, 50), "altered"),
        (flip(TENSOR_FILE), "altered"),
        (edit(lambda d: d.__setitem__("version", 99)), "version 99.*reads versions 2 and 3"),
        (edit(lambda d: d.__setitem__("format", "other")), "not a wina-plan"),
        (edit(lambda d: d["config"].__setitem__("sparsity", 0.6), seal=False), "checksum"),
        (edit(lambda d: d["config"].__setitem__("sparsity", 7)), "sparsity"),
        (edit(lambda d: d["config"].__setitem__("speed", 7)), "speed"),
        (edit(lambda d: d.pop("model_type")), "model_type"),
        (edit(lambda d: d.__setitem__("projections", 5)), "malformed"),
        (edit(projection("in_features", 63)), "threshold has shape"),
        (edit(projection("name", 5)), "name has the wrong type"),
        (edit(projection("name", "model.other")), "model.other"),
        (edit(projection("realised", 1.5)), "realised"),
        (edit(projection("cutoff", "high")), "cutoff"),
        (lambda folder: (folder / JSON_FILE).write_text("[" * 100_000), "not JSON"),
        (lambda folder: (folder / JSON_FILE).write_text("[]"), "not a wina-plan"),
    ],
)
def test_damaged_files_are_refused(
    folder: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(folder)
    with pytest.raises(PlanError, match=message):
        wina.SparsityPlan.load(folder)


def test_nan_thresholds_are_refused(llama: nn.Module, tmp_path: Path) -> None:
    plan = plan_for(llama)
    next(iter(plan.layers.values())).threshold[3] = torch.nan
    with pytest.raises(PlanError, match=r"q_proj\.threshold.*NaN"):
        wina.SparsityPlan.load(plan.save(tmp_path))


def test_failed_save_keeps_the_old_plan(
    llama: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {p.name: p.read_bytes() for p in folder.iterdir()}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        plan_for(llama, sparsity=0.3).save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_loaded_plan_patches_the_same(llama: nn.Module, tmp_path: Path) -> None:
    plan = plan_for(llama)
    wina.sparsify(llama, wina.SparsityPlan.load(plan.save(tmp_path)))
    assert wina.inspect(llama).rows[0].cutoff == next(iter(plan.layers.values())).cutoff
