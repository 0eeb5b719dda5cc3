"""The machine card: what a measured number needs beside it."""

from __future__ import annotations

import os
import platform
import re
import subprocess
import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from wina.threads import cpu_quota, usable_cores

PACKAGES = ("torch", "transformers", "triton", "wina")
_CPUS = Path("/sys/devices/system/cpu")
_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


def machine_card() -> dict[str, Any]:
    """CPU, caches, frequency governor, threads, memory, load, GPU, driver, versions; JSON-ready.

    What a system does not tell is None.
    """
    card: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "usable_cores": usable_cores(),
        "cpu_quota": cpu_quota(),
        "threads": torch.get_num_threads(),
        "caches": cache_sizes(),
        "governor": _read(_CPUS / "cpu0/cpufreq/scaling_governor"),
        "load": _load(),
        "memory_gib": round(_memory_bytes() / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "commit": _commit(),
    }
    for package in PACKAGES:
        try:
            card[package] = version(package)
        except PackageNotFoundError:
            card[package] = None
    card["gpu"] = card["driver"] = None
    if torch.cuda.is_available():
        card["gpu"] = torch.cuda.get_device_name()
        card["gpu_memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
        card["cuda"] = torch.version.cuda
        card["driver"] = _output(
            ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        )
    return card


def cache_sizes() -> dict[str, int]:
    """Bytes of the first core's data caches, such as {"L1": 32768, "L2": 524288}."""
    sizes = {}
    for folder in sorted((_CPUS / "cpu0/cache").glob("index*")):
        size = re.fullmatch(r"(\d+)([KMG]?)", _read(folder / "size") or "")
        level = _read(folder / "level")
        if size and level and _read(folder / "type") != "Instruction":
            sizes[f"L{level}"] = int(size[1]) * _UNITS.get(size[2], 1)
    return sizes


def _cpu_name() -> str:
    for line in (_read(Path("/proc/cpuinfo")) or "").splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


class Neighbours:
    """How many cores other processes kept busy since this object was made (Linux; else None).

    A thread that waits for a core that somebody else has makes every parallel call as long as a
    time slice. Contenders then look alike, steadily, so no spread between rounds would tell.
    """

    LIMIT = 0.1

    def __init__(self) -> None:
        self._start = (time.monotonic(), self._others())

    @property
    def cores(self) -> float | None:
        """Cores used by others, on average."""
        began, before = self._start
        now = self._others()
        if before is None or now is None:
            return None
        return max(0.0, (now - before) / max(time.monotonic() - began, 1e-3))

    def warnings(self) -> list[str]:
        """One line for people if others took more than a tenth of a core."""
        cores = self.cores
        if cores is None or cores <= self.LIMIT:
            return []
        return [
            f"other processes kept {cores:.1f} of {os.cpu_count()} cores busy meanwhile: too noisy "
            "for any claim. Stop them and repeat."
        ]

    @staticmethod
    def _others() -> float | None:
        """Processor seconds of all processes but this one (and its children) so far."""
        fields = (_read(Path("/proc/stat")) or "").partition("\n")[0].split()
        if len(fields) < 9:
            return None
        # user, nice, system, idle, iowait, irq, softirq, steal
        busy = sum(int(fields[i]) for i in (1, 2, 3, 6, 7, 8)) / os.sysconf("SC_CLK_TCK")
        return busy - sum(os.times()[:4])


def _load() -> float | None:
    """Runnable tasks over the last minute: other people's work, when a bench starts."""
    try:
        return round(os.getloadavg()[0], 2)
    except (OSError, AttributeError):
        return None


def _memory_bytes() -> int:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError, AttributeError):
        return 0


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _output(command: Sequence[str]) -> str | None:
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None


def _commit() -> str | None:
    """Commit of the source tree this file lies in; None for an installed package."""
    folder = str(Path(__file__).resolve().parent)
    return _output(["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=12"])
