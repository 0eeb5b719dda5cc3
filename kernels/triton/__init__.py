"""Triton kernels for CUDA cards; registered on first use by :func:`load`.

Importing this package imports no Triton and touches no GPU.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from importlib.metadata import PackageNotFoundError, version

import torch

from wina.kernels.triton.config import MAX_TOKENS, token_limit

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MIN_TRITON = (3, 2)
MIN_CAPABILITY = (8, 0)

__all__ = ["DTYPES", "MAX_TOKENS", "load", "refuses_card", "token_limit"]


@cache
def load() -> str | None:
    """Register the kernels for CUDA tensors; None on success, else why there are none.

    Decided once per process. Raises nothing for a missing or old Triton.
    """
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'wina[gpu]'"
    try:
        found = version("triton")
        if tuple(int(part) for part in found.split(".")[:2]) < MIN_TRITON:
            wanted = ".".join(map(str, MIN_TRITON))
            return f"Triton {found} is older than {wanted}: pip install -U 'triton>={wanted}'"
    except (PackageNotFoundError, ValueError):
        pass  # a build without a usable version: importing it will tell
    try:
        operators = importlib.import_module("wina.kernels.triton.operators")
    except (ImportError, AttributeError) as error:
        return f"Triton cannot be imported: {error}"
    operators.register()
    return None


def refuses_card(device: torch.device) -> str | None:
    """Why a CUDA device is too old for the kernels, or None."""
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY:
        return (
            f"{torch.cuda.get_device_name(device)} has compute capability "
            f"{capability[0]}.{capability[1]}; the kernels need "
            f"{MIN_CAPABILITY[0]}.{MIN_CAPABILITY[1]}"
        )
    return None
