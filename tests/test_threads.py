"""How many threads a container lets run."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from wina.memory import peak_resident, resident
from wina.threads import cpu_quota, thread_warnings


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
    ],
)
def test_quota(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(tmp_path) == quota


def test_more_threads_than_the_quota_are_warned_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wina.threads.usable_cores", lambda: 8)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert thread_warnings(tmp_path) == []
    (tmp_path / "cpu.max").write_text("200000 100000")
    (warning,) = thread_warnings(tmp_path)
    assert "OMP_NUM_THREADS=2" in warning


def test_resident_memory() -> None:
    now, peak = resident(), peak_resident()
    if now is None or peak is None:
        pytest.skip("this system does not tell")
    assert 0 < now <= peak
