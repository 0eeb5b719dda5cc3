"""Projections that read the same hidden state share one launch while decoding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from wina.linear import SparseLinear

# Calls in a row whose other products nobody fetched, after which a group gives up sharing.
_PATIENCE = 8


@dataclass(frozen=True)
class _Shared:
    """Products that wait for their projections.

    Attributes:
        x: the very hidden state that they are products of.
        versions: of x and of all weights when it was multiplied; writing in place raises them.
        products: projection name → y; fetching one takes it out.
    """

    x: Tensor
    versions: tuple[int, ...]
    products: dict[str, Tensor]


def scales(modules: Sequence[SparseLinear], x: Tensor) -> list[Tensor | None]:
    """Every module's factor of its thresholds for hidden states x that all of them read."""
    if all(module.selector.of_x_alone and module.tracked is None for module in modules):
        return [modules[0].scale(x)] * len(modules)
    return [module.scale(x) for module in modules]


class ProjectionGroup:
    """Sparse products of q, k and v (or the like), computed when the first of them is asked for.

    Attention modules call their projections one by one, with the same hidden state. The first call
    computes the products of all; the others fetch theirs. A product is fetched once, and only for
    the very tensor object that it was computed from, unchanged since; anything else is computed
    anew. So nothing stale and nothing of another thread can be handed out, whatever is called in
    between: threads that decode with one model at once replace each other's products and lose the
    saving, no more.

    While ``torch.compile`` traces, writing in place is not seen; that no member's input is written
    to between the calls has been observed when the group was found (:mod:`wina.projections`).
    """

    def __init__(self, members: Sequence[SparseLinear]) -> None:
        self.members = tuple(members)
        self._shared: _Shared | None = None
        self._wasted = 0
        self._fuses = False
        self.settle()

    def settle(self) -> None:
        """Decide whether the members can share a launch, after they were made, moved or cast."""
        kinds = {(m.choice.backend.name, m.weight.dtype, m.weight.device) for m in self.members}
        backend = self.members[0].choice.backend
        self._fuses = (
            len(kinds) == 1
            and backend.sparse_group is not None
            and all(member.one_launch for member in self.members)
        )
        self._shared = None
        self._wasted = 0

    @property
    def fuses(self) -> bool:
        """Whether the members share a launch."""
        return self._fuses and self._wasted < _PATIENCE

    def product(self, member: SparseLinear, x: Tensor) -> Tensor | None:
        """The sparse product of one member, fetched or computed with the others'.

        None where no launch is shared: see :attr:`fuses`; and for tensors of inference mode, which
        do not tell that they were written to.
        """
        if not self.fuses:
            return None
        versions = self._versions(x)
        if versions is None:
            return None
        shared = self._shared
        if shared is not None and shared.x is x and shared.versions == versions:
            y = shared.products.pop(member.name, None)
            if not shared.products:
                self._shared = None
            if y is not None:
                return y
        return self._compute(member, x, versions)

    def _compute(self, member: SparseLinear, x: Tensor, versions: tuple[int, ...]) -> Tensor:
        if self._shared is not None:
            self._wasted += 1
        elif self._wasted:
            self._wasted = 0
        sparse_group = self.members[0].choice.backend.sparse_group
        assert sparse_group is not None
        ys = sparse_group(
            x,
            [m.weight.t() for m in self.members],
            [m.threshold for m in self.members],
            [m.product_bias for m in self.members],
            scales(self.members, x),
        )
        products = {m.name: y for m, y in zip(self.members, ys, strict=True)}
        own: Tensor = products.pop(member.name)
        self._shared = _Shared(x, versions, products)
        return own

    def _versions(self, x: Tensor) -> tuple[int, ...] | None:
        if torch.compiler.is_compiling():
            return ()
        tensors = (x, *(m.weight for m in self.members))
        if any(t.is_inference() for t in tensors):
            return None
        return tuple(t._version for t in tensors)
