from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import plan_for
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

import wina
from wina.errors import PlanError
from wina.patch import is_patched
from wina.plan_file import JSON_FILE, TENSOR_FILE, digest
from wina.testing import tiny_model


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
            document["sha256"] = digest(document)
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
        (edit(lambda d: d.__setitem__("version", 99)), "version 99.*reads version 2"),
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


FIELDS = [
    ("threshold", lambda t: t[:-1], r"q_proj\.threshold has shape \(63,\)"),
    ("threshold", lambda t: t.double(), r"q_proj\.threshold has shape \(64,\) torch.float64"),
    ("threshold", lambda t: t[None], r"q_proj\.threshold has shape \(1, 64\)"),
    ("threshold", lambda t: t * torch.nan, r"q_proj\.threshold must be float32 without NaN"),
    ("sample", lambda t: t[:3], r"q_proj\.sample has shape \(3,\)"),
    ("sample", lambda t: t.half(), r"q_proj\.sample has shape \(16,\) torch.float16"),
    ("cutoff", lambda _: torch.nan, "cutoff of .*q_proj is NaN"),
]


@pytest.mark.parametrize(("field", "change", "message"), FIELDS)
def test_a_meaningless_field_is_named(
    llama: nn.Module, field: str, change: Callable[[object], object], message: str
) -> None:
    """In a plan made by hand, before anything is patched, and so in files (which are parsed so)."""
    plan = plan_for(llama)
    name, layer = next(iter(plan.layers.items()))
    bad = replace(layer, **{field: change(getattr(layer, field))})
    wrong = replace(plan, layers={**plan.layers, name: bad})
    with pytest.raises(PlanError, match=message):
        wina.sparsify(llama, wrong)
    assert not is_patched(llama)


@pytest.mark.parametrize("value", [-1.0, -0.0, 0.0, 1e-45, torch.inf, -torch.inf])
def test_thresholds_with_a_meaning_are_taken(
    llama: nn.Module, tmp_path: Path, value: float
) -> None:
    """−1, or anything below 0, keeps a channel; +inf drops it; −0 is 0."""
    plan = plan_for(llama)
    next(iter(plan.layers.values())).threshold[3] = value
    again = wina.SparsityPlan.load(plan.save(tmp_path))
    wina.sparsify(llama, again)
    layer = llama.model.layers[0].self_attn.q_proj  # type: ignore[union-attr,index]
    with torch.no_grad():
        y = layer(torch.eye(64)[3])  # type: ignore[operator]
    assert bool((y == 0).all()) == (value == torch.inf)


@given(
    values=st.lists(st.floats(width=32, allow_nan=False), min_size=64, max_size=64),
    share=st.floats(0, 1),
    cutoff=st.floats(allow_nan=False, allow_infinity=False),
)
@settings(
    deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_saving_loading_and_saving_gives_the_same_bytes(
    one_plan: wina.SparsityPlan, tmp_path: Path, values: list[float], share: float, cutoff: float
) -> None:
    name, layer = next(iter(one_plan.layers.items()))
    layer = replace(layer, threshold=torch.tensor(values), realised=share, cutoff=cutoff)
    plan = replace(one_plan, layers={**one_plan.layers, name: layer})
    first = plan.save(tmp_path / "a")
    second = wina.SparsityPlan.load(first).save(tmp_path / "b")
    for file in (JSON_FILE, TENSOR_FILE):
        assert (first / file).read_bytes() == (second / file).read_bytes()


@pytest.fixture(scope="module")
def one_plan() -> wina.SparsityPlan:
    return plan_for(tiny_model("llama", num_hidden_layers=1))


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_full_disk_keeps_the_old_plan(llama: nn.Module, folder: Path) -> None:
    """A write that the system refuses half way, for real."""
    import resource

    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    other = plan_for(llama, sparsity=0.3)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            other.save(folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before
    wina.SparsityPlan.load(other.save(folder))


@pytest.mark.parametrize("fits", [0, 1])
def test_failed_save_keeps_the_old_plan(
    llama: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch, fits: int
) -> None:
    """Whichever of its two files finds no room; others cannot read what is not whole yet."""
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    room = iter(range(fits))

    def full(handle: int) -> None:
        assert os.fstat(handle).st_mode & 0o077 == 0
        if next(room, None) is None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space"):
        plan_for(llama, sparsity=0.3).save(folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_loaded_plan_patches_the_same(llama: nn.Module, tmp_path: Path) -> None:
    plan = plan_for(llama)
    wina.sparsify(llama, wina.SparsityPlan.load(plan.save(tmp_path)))
    assert wina.inspect(llama).rows[0].cutoff == next(iter(plan.layers.values())).cutoff
