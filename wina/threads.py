"""How many processors this process may use, against how many threads torch takes.

torch starts as many threads as ``OMP_NUM_THREADS`` says, else one for each physical core of the
machine, whatever share of them a container was given. A thread without a processor makes all the
others wait at the end of every product.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

_GROUPS = Path("/sys/fs/cgroup")


def cpu_quota(groups: Path = _GROUPS) -> float | None:
    """Processors' worth of time that the container may use (cgroups); None for no limit."""
    try:
        quota, period = (groups / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            quota, period = (
                (groups / "cpu" / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip()
                for name in ("quota", "period")
            )
        except OSError:
            return None
    if quota in ("max", "-1"):
        return None
    try:
        return int(quota) / int(period)
    except (ValueError, ZeroDivisionError):
        return None


def usable_cores() -> int:
    """Processors that this process may be scheduled on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not Linux
        return os.cpu_count() or 1


def thread_warnings(groups: Path = _GROUPS) -> list[str]:
    """One line for people if torch has more threads than processors to run them."""
    threads, cores, quota = torch.get_num_threads(), usable_cores(), cpu_quota(groups)
    allowed = cores if quota is None else min(cores, max(1, int(quota)))
    if threads <= allowed:
        return []
    why = f"{cores} usable cores" if quota is None else f"a CPU quota of {quota:g}"
    return [
        f"torch has {threads} threads for {why}: they will wait for each other. Set "
        f"OMP_NUM_THREADS={allowed} before starting, or torch.set_num_threads({allowed})."
    ]
