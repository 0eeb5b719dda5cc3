"""Resident memory of this process, as Linux counts it."""

from __future__ import annotations

from pathlib import Path


def resident() -> int | None:
    """Bytes in memory now; None where the system does not tell."""
    return _field("VmRSS")


def peak_resident() -> int | None:
    """Bytes in memory at most, so far or since :func:`reset_peak`; None likewise."""
    return _field("VmHWM")


def reset_peak() -> bool:
    """Let the peak be counted from now on; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _field(name: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith(name)), None)
