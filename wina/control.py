"""What all sparse modules of one model share: which tokens are sparse now."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from wina.errors import PatchStateError
from wina.prefill import Prefill

if TYPE_CHECKING:
    from wina.linear import SparseLinear


class Control:
    """Switches that all sparse modules of one model read on every call.

    Attributes:
        dense_blocks: how many ``with wina.dense(model)`` are being run; every module is dense then.
        dense_thread: the thread in which every module is dense, None for no one.
        prefill: which tokens of a multi-token forward are sparse.
        padded: boolean [rows, S] that says it token by token while a padded batch runs
            (:func:`wina.switches.padded_batch`), else None.
        tracking: rate at which cut-offs follow the text, see
            :func:`wina.kernels.reference.tracked_scale`; 0 where they stay.
        rows: sequences of the decoder's forward that is running, or ran last.
        followers: modules whose cut-offs follow the text.
        observer: called with (projection name, x, threshold, scale) of every sparse product;
            set while realised sparsity is measured, None otherwise.
    """

    def __init__(self, prefill: Prefill, backend: str, tracking: float = 0.0) -> None:
        self.dense_blocks = 0
        self.dense_thread: int | None = None
        self.prefill = prefill
        self.backend = backend
        self.tracking = tracking
        self.rows = 1
        self.followers: list[SparseLinear] = []
        self.padded: Tensor | None = None
        self._whole: int | None = None  # tokens of the decoder's output, until the head has run
        self.observer: Callable[[str, Tensor, Tensor, Tensor | None], None] | None = None

    @property
    def enabled(self) -> bool:
        """Whether modules are sparse, in this thread."""
        if self.dense_blocks:
            return False
        return self.dense_thread is None or self.dense_thread != threading.get_ident()

    def watch(self, decoder: nn.Module, head: nn.Module, hooks: list[RemovableHandle]) -> None:
        """Tell a head, which may be given a sequence's last hidden states only, how long it was.

        Args:
            decoder, head: of one model.
            hooks: the handles are added to it one by one, so that none is lost to an interrupt.
        """
        hooks.append(decoder.register_forward_hook(self._note))
        hooks.append(head.register_forward_hook(self._forget))
        hooks.append(decoder.register_forward_pre_hook(self._forget))

    def enter(self, module: nn.Module) -> RemovableHandle:
        """Note what a model, or the decoder in it, is given; a text begins with an empty cache."""
        return module.register_forward_pre_hook(self._begin, with_kwargs=True)

    def _begin(self, _: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids, embeddings = (named.get(name) for name in ("input_ids", "inputs_embeds"))
        first = next((x for x in (ids, embeddings, *given) if isinstance(x, Tensor)), None)
        self.rows = 1 if first is None else first.shape[0]
        if not self.followers:
            return
        cache = named.get("past_key_values")
        length = 0 if cache is None else cache.get_seq_length()
        # A static cache counts on its device, where asking every token would wait for it: there
        # several tokens at once are a prompt.
        several = first is not None and first.shape[1] > 1
        if several if isinstance(length, Tensor) else not length:
            for module in self.followers:
                module.forget()

    def _note(self, _: nn.Module, __: Any, output: Any) -> None:
        self._whole = sequence_length(output[0])

    def _forget(self, *_: Any) -> None:
        self._whole = None

    def first_sparse(self, x: Tensor) -> int:
        """Index, along the sequence, of the first sparse token of hidden states [..., S, K]."""
        length = sequence_length(x)
        if not self.enabled:
            return length
        before = 0 if self._whole is None else max(0, self._whole - length)  # tokens left out
        return max(0, self.prefill.start(before + length) - before)

    def sparse_tokens(self, x: Tensor) -> Tensor | None:
        """Boolean [..., S] of hidden states [..., S, K] where a padded batch is running, or None.

        Decode steps, one token a row, have no padding.
        """
        if self.padded is None or not self.enabled or sequence_length(x) == 1:
            return None
        if x.shape[:-1].numel() != self.padded.numel():
            raise PatchStateError(
                f"a padded batch of shape {tuple(self.padded.shape)} reached a projection as "
                f"{tuple(x.shape)}: its tokens cannot be told apart, so run one sequence at a time"
            )
        return self.padded.view(x.shape[:-1])


def sequence_length(x: Tensor) -> int:
    """S of hidden states [..., S, K]; a single vector [K] is a sequence of one token."""
    return x.shape[-2] if x.dim() > 1 else 1
