"""Compiled CPU kernels: ``sparse.cpp``, built on first use by :mod:`wina.kernels.cpu.build`."""

import torch

from wina.kernels.cpu.build import load

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

__all__ = ["DTYPES", "load"]
