"""The module that replaces a projection."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wina.control import Control, sequence_length
from wina.corrections import Terms
from wina.group import ProjectionGroup, scales
from wina.kernels import ops
from wina.kernels.dispatch import Choice, LayerSpec, choose
from wina.kernels.reference import keep_mask, mask_inputs
from wina.selectors import Selector


def _mask(x: Tensor, threshold: Tensor, scale: Tensor | None) -> Tensor:
    """:func:`mask_inputs` by a kernel, unless something differentiates it or fuses it."""
    if torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad):
        return mask_inputs(x, threshold, scale)
    return ops.mask_inputs(x, threshold, scale)


class SparseLinear(nn.Linear):
    """y = Wx + b that reads only the active channels' columns of W while decoding.

    Shares the parameters of the ``nn.Linear`` it stands for. The weight keeps its logical shape
    [N, K] and its storage, but lies K-major in it (strides (1, N)): a channel is one contiguous
    row. So state dicts, ``F.linear`` and the kernels all work on the one copy.

    With gradients enabled the product is the differentiable dense one on masked inputs.

    Attributes:
        group: the projections that share a launch with this one, None if it has its own.
        shift: [N] that the correction adds to sparse products, or None.
        sparse_bias: bias and ``shift`` together, None without a shift.
        left, right: [N, r] and [r, K]: the correction adds left·right·(dropped channels); or None.
        center: [K] that is taken off the inputs of sparse products, or None.
        probe: [K + 1] float32 that the selector found for this projection, or None.
        tracked: [B] float32, how far the cut-off of each sequence of the last forward has moved,
            where it follows the text; else None.
    """

    threshold: Tensor
    shift: Tensor | None
    sparse_bias: Tensor | None
    left: Tensor | None
    right: Tensor | None
    center: Tensor | None
    probe: Tensor | None
    tracked: Tensor | None

    def __init__(
        self,
        original: nn.Linear,
        name: str,
        threshold: Tensor,
        sparsity: float,
        selector: Selector,
        control: Control,
        terms: Terms | None = None,
        probe: Tensor | None = None,
    ) -> None:
        nn.Module.__init__(self)  # nn.Linear's would allocate a second weight
        self.in_features = original.in_features
        self.out_features = original.out_features
        self._hold(original)
        self.bias = original.bias
        self.train(original.training)
        self.name = name
        self.sparsity = sparsity
        self.selector = selector
        self.control = control
        tracked = threshold.new_zeros(1) if control.tracking and sparsity else None
        for held, values in (("threshold", threshold), ("probe", probe), ("tracked", tracked)):
            moved = None if values is None else values.to(self.storage.device, torch.float32)
            self.register_buffer(held, moved, persistent=False)
        self._hold_terms(terms or Terms())
        if tracked is not None:
            control.followers.append(self)
        self.choice = choose(self._layer(), control.backend)
        self.group: ProjectionGroup | None = None

    def _hold(self, original: nn.Linear) -> None:
        """Take the weight over."""
        self.weight = original.weight

    def _hold_terms(self, terms: Terms) -> None:
        """Take the correction over, in the dtype of the products."""
        shift = bias = terms.bias
        if shift is not None and self.bias is not None:
            bias = self.bias.detach().float() + shift.to(self.bias.device)
        for name, term in (
            ("shift", shift), ("sparse_bias", bias), ("left", terms.left), ("right", terms.right),
            ("center", terms.center),
        ):  # fmt: skip
            held = None if term is None else term.to(self.storage)
            self.register_buffer(name, held, persistent=False)

    @property
    def storage(self) -> Tensor:
        """A tensor with the device and dtype of the products."""
        return self.weight

    @property
    def matrix(self) -> Tensor:
        """What inputs are multiplied by, [N, K]."""
        return self.weight

    @property
    def weight_dtype(self) -> str:
        """How the weight is kept, such as ``"bfloat16"`` or ``"int4"``."""
        return str(self.weight.dtype).removeprefix("torch.")

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weight in memory."""
        return self.weight.nbytes

    @property
    def product_bias(self) -> Tensor | None:
        """The bias of sparse products, [N] or None."""
        return self.bias if self.sparse_bias is None else self.sparse_bias

    @property
    def one_launch(self) -> bool:
        """Whether its sparse product is a kernel and nothing else, so that it can be shared."""
        return self.left is None and self.center is None

    @property
    def extra_bytes(self) -> int:
        """Bytes a token reads for correction and probe; a shift of a bias is read with it."""
        shift = None if self.bias is not None else self.shift
        terms = (shift, self.left, self.right, self.center, self.probe)
        return sum(term.nbytes for term in terms if term is not None)

    def _layer(self) -> LayerSpec:
        storage = self.storage
        return LayerSpec(
            storage.device, storage.dtype, self.in_features, self.out_features, self.sparsity
        )

    def forward(self, x: Tensor) -> Tensor:
        """Hidden states [..., S, K] → [..., S, N]; a sequence of one token is a decode step."""
        x = self._as_stored(x)
        rows = self.control.rows
        if x.dim() == 2 and rows > 1 and len(x) % rows == 0:  # all tokens of a batch in a row
            return self._forward(x.unflatten(0, (rows, -1))).flatten(0, 1)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        start = self.control.first_sparse(x)
        padded = self.control.sparse_tokens(x)
        if self._needs_gradient(x):
            # A row-major copy of the weight: torch's 16-bit products of the K-major layout, and
            # their gradients, are many times slower on a CPU without 16-bit instructions.
            masked = self.masked(x, start) if padded is None else self._masked_where(x, padded)
            y = F.linear(masked, self.matrix.contiguous(), self.bias)
            return self._corrected(y, x, masked, start, padded)
        if padded is not None:
            masked = self._masked_where(x, padded)
            return self._corrected(self._dense(masked), x, masked, start, padded)
        if start == 0:
            return self._sparse_with_group(x)
        if start >= sequence_length(x):
            return self._dense(x)
        if not self.choice.backend.k_major:  # it multiplies densely anyway: one product, not two
            masked = self.masked(x, start)
            return self._corrected(self._dense(masked), x, masked, start, padded)
        parts = [self._dense(x[..., :start, :]), self._sparse(x[..., start:, :])]
        return torch.cat(parts, dim=-2)

    def scale(self, x: Tensor, counted: Tensor | None = None) -> Tensor | None:
        """The per-token factor of the thresholds for hidden states x [..., S, K].

        The selector's; where cut-offs follow the text, that of the sequence as well.

        Args:
            x: tokens that follow those of the last call, or that begin a text (:meth:`forget`).
            counted: boolean [..., S], False for tokens that stay dense, such as padding; None for
                all tokens.
        """
        scale = self.selector.scale(x, self.threshold, self.sparsity, self.probe)
        if self.tracked is None:
            return scale
        x, state = x.detach(), self._state(x)
        with torch.no_grad():
            if counted is None:
                return self._tracked_scale(x, state, scale)
            # Row by row, without what does not count: each is followed as it would be alone.
            found = x.new_ones(x.shape[:-1], dtype=torch.float32)
            rows = (x.flatten(0, -3), counted.flatten(0, -2), found.flatten(0, -2))
            own = None if scale is None else scale.flatten(0, -2)
            for row, (tokens, where, into) in enumerate(zip(*rows, strict=True)):
                of_row = None if own is None else own[row][where]
                into[where] = self._tracked_scale(tokens[where], state[row : row + 1], of_row)
            return found

    def _tracked_scale(self, x: Tensor, state: Tensor, scale: Tensor | None) -> Tensor:
        return ops.tracked_scale(
            x, self.threshold, state, self.sparsity, self.control.tracking, scale
        )

    def forget(self) -> None:
        """What follows is another text."""
        if self.tracked is not None:
            self.tracked.zero_()

    def _state(self, x: Tensor) -> Tensor:
        """What is known of the sequences of x [..., S, K]; nothing where there were others."""
        assert self.tracked is not None
        sequences = x.shape[:-2].numel() if x.dim() > 1 else 1
        if len(self.tracked) != sequences:
            # Not a tensor of inference mode, which could not be written to outside of it.
            with torch.inference_mode(False):
                self.tracked = self.tracked.new_zeros(sequences)
        return self.tracked

    def masked(self, x: Tensor, start: int) -> Tensor:
        """x [..., S, K] with the inactive channels of tokens from ``start`` on set to zero."""
        if start >= sequence_length(x):
            return x
        tokens = self._centered(x if start == 0 else x[..., start:, :])
        with torch.no_grad():  # the mask is a constant of the gradient
            scale = self._observed_scale(tokens)
        masked = _mask(tokens, self.threshold, scale)
        return masked if start == 0 else torch.cat([x[..., :start, :], masked], dim=-2)

    def _centered(self, x: Tensor) -> Tensor:
        """Hidden states [..., K] as sparse products read them."""
        return x if self.center is None else x - self.center

    def chosen(self, x: Tensor) -> Tensor:
        """x [..., S, K] with the inactive channels of all sparse tokens set to zero."""
        padded = self.control.sparse_tokens(x)
        if padded is not None:
            return self._masked_where(x, padded)
        return self.masked(x, self.control.first_sparse(x))

    def dense(self, x: Tensor) -> Tensor:
        """The dense product of x [..., S, K]."""
        return self._dense(x)

    def _sparse_with_group(self, x: Tensor) -> Tensor:
        if self.group is not None and self.control.observer is None:
            y = self.group.product(self, x)
            if y is not None:
                return y
        return self._sparse(x)

    def _masked_where(self, x: Tensor, sparse: Tensor) -> Tensor:
        """x [..., S, K] masked at the tokens where ``sparse`` [..., S] is True."""
        if self.center is not None:
            x = x - self.center * sparse.unsqueeze(-1)
        with torch.no_grad():
            scale = self.scale(x, sparse)
            if self.control.observer is not None:
                seen = None if scale is None else scale[sparse]
                self.control.observer(self.name, x[sparse], self.threshold, seen)
            keep = keep_mask(x, self.threshold, scale).logical_or_(~sparse.unsqueeze(-1))
        return x * keep

    def _corrected(
        self, y: Tensor, x: Tensor, masked: Tensor, start: int, sparse: Tensor | None
    ) -> Tensor:
        """Products y [..., S, N] of masked inputs, corrected at the tokens that are sparse.

        These are the ones where ``sparse`` [..., S] is True, or else those from ``start`` on.
        """
        if self.shift is not None:
            if sparse is None:
                sparse = torch.arange(sequence_length(x), device=x.device) >= start
            y = y + self.shift * sparse.unsqueeze(-1)
        return self._with_dropped(y, x - masked) if self.left is not None else y

    def _with_dropped(self, y: Tensor, dropped: Tensor) -> Tensor:
        """y plus the low-rank product of the dropped channels [..., K]."""
        assert self.left is not None
        assert self.right is not None
        return y + F.linear(F.linear(dropped, self.right), self.left)

    def _sparse(self, x: Tensor) -> Tensor:
        x = self._centered(x)
        scale = self._observed_scale(x)
        y = self._kernel(x, scale)
        if self.left is None:
            return y
        return self._with_dropped(y, x - _mask(x, self.threshold, scale))

    def _kernel(self, x: Tensor, scale: Tensor | None) -> Tensor:
        return self.choice.backend.sparse_linear(
            x, self.weight.t(), self.threshold, self.product_bias, scale
        )

    def gate_up(self, up: SparseLinear, x: Tensor, activation: str) -> Tensor:
        """activation(sparse product of this)·(sparse product of ``up``), in one launch."""
        x = self._as_stored(x)
        return self.choice.backend.sparse_gate_up(
            x, self.weight.t(), up.weight.t(), self.threshold, up.threshold, activation,
            self.product_bias, up.product_bias, *scales((self, up), x),
        )  # fmt: skip

    def _dense(self, x: Tensor) -> Tensor:
        return self.choice.backend.dense_linear(x, self.weight.t(), self.bias)

    def _observed_scale(self, x: Tensor) -> Tensor | None:
        scale = self.scale(x)
        if self.control.observer is not None:
            self.control.observer(self.name, x, self.threshold, scale)
        return scale

    def _as_stored(self, x: Tensor) -> Tensor:
        """x in the dtype of the weight: under autocast it comes in another one."""
        dtype = self.storage.dtype
        if x.dtype != dtype and torch.is_autocast_enabled(x.device.type):
            return x.to(dtype)
        return x

    def _needs_gradient(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (x.requires_grad or self.storage.requires_grad)

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> SparseLinear:
        # `.to(bfloat16)` casts buffers as well; what masks depend on stays float32 on every path.
        exact = {name: getattr(self, name) for name in ("threshold", "probe", "tracked")}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, values in exact.items():
            moved = None if values is None else values.to(self.threshold.device)
            setattr(self, name, moved)
        self.choice = self._choose_again()
        if self.group is not None:
            self.group.settle()
        return self

    def _load_from_state_dict(self, *arguments: Any, **named: Any) -> None:
        super()._load_from_state_dict(*arguments, **named)
        weight = self._parameters.get("weight")  # it may be another one, row-major
        if weight is not None and self.choice.backend.k_major and not weight.t().is_contiguous():
            weight.data = weight.data.t().contiguous().t()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        # Where a copy arrives in another process no kernels are loaded yet: asking loads them.
        if self.choice.backend.refuses(self._layer()) is not None:
            self.choice = self._choose_again()

    def _choose_again(self) -> Choice:
        """The backend after a move or a cast: the weight keeps the layout it was patched with."""
        want = "reference" if self.control.backend == "reference" else "auto"
        return choose(self._layer(), want, k_major=self.weight.t().is_contiguous())

    def extra_repr(self) -> str:
        """What ``print(model)`` shows."""
        return (
            f"{super().extra_repr()}, sparsity={self.sparsity:.3g}, "
            f"backend={self.choice.backend.name}"
        )
