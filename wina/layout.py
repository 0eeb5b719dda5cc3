"""How a weight lies in its own memory: row-major, or K-major as kernels read it."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Layout:
    """Turns weights over inside their own storage, without losing one to an interrupt.

    While a weight is rewritten its values are held beside it, so that :meth:`recover` can finish.
    """

    def __init__(self) -> None:
        self._pending: tuple[nn.Parameter, Tensor] | None = None

    def to_k_major(self, parameter: nn.Parameter) -> None:
        """Lay a weight [..., N, K] K-major: same values, shape and storage, last strides (1, N)."""
        data = parameter.data
        if data.mT.is_contiguous():
            return
        values = data.mT.clone(memory_format=torch.contiguous_format)
        self._pending = (parameter, values)
        turned = _memory(parameter).view(values.shape)
        turned.copy_(values)
        parameter.data = turned.mT
        self._pending = None

    def to_row_major(self, parameter: nn.Parameter) -> None:
        """Inverse of :meth:`to_k_major`."""
        if parameter.data.is_contiguous():
            return
        self._pending = (
            parameter, parameter.data.mT.clone(memory_format=torch.contiguous_format)
        )  # fmt: skip
        self.recover()

    def recover(self) -> None:
        """Finish a weight whose rewriting was interrupted: it ends row-major."""
        if self._pending is None:
            return
        parameter, values = self._pending
        straight = _memory(parameter).view(values.mT.shape)
        straight.copy_(values.mT)
        parameter.data = straight
        self._pending = None


def _memory(parameter: nn.Parameter) -> Tensor:
    """The elements of a dense parameter as they lie in memory, [numel]."""
    return parameter.data.as_strided((parameter.numel(),), (1,))
