"""Rotates a model in place, and back.

The papers keep the residual stream itself in a rotated basis and multiply it by Q_prevᵀ·Q_next
between half-blocks. Here the stream stays as it is and the output of each norm is multiplied by
its Q: projections read the same hidden states for the same two products [hidden, hidden] a layer,
while embeddings, head, biases and whatever writes to the stream stay untouched. So norms after a
block's output, LayerNorms and tied embeddings need no special care. With one basis shared by the
whole model (``shared=1``) the stream is rotated, and nothing is left to do at run time.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from wina.errors import CalibrationError, ConfigError, PatchStateError, UnsupportedModelError
from wina.progress import progress
from wina.projections import decoder_blocks
from wina.registry import create
from wina.rotation.base import NO_ROTATION, ROTATIONS, Basis, eigenvectors
from wina.rotation.norms import RotatedNorm
from wina.rotation.reads import Read, Reads, find_reads, measure_moments
from wina.texts import bundled, to_windows

_ATTRIBUTE = "_wina_rotation"
SINK_TOKENS = 2
# How far logits may move, relative to their own norm. Norms work in float32 inside.
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}


@dataclass
class Rotation:
    """What was done to a model.

    Attributes:
        spec: the method, as it was asked for.
        fingerprint: of the bases: two models rotated alike have the same.
        kept: whether the original weights are still there.
    """

    spec: str
    fingerprint: str = ""
    kept: bool = True
    _weights: list[tuple[nn.Parameter, Tensor]] = field(default_factory=list, repr=False)
    _modules: list[tuple[nn.Module, str, nn.Module]] = field(default_factory=list, repr=False)
    _untied: tuple[Any, nn.Parameter] | None = field(default=None, repr=False)

    def write(self, parameter: nn.Parameter, values: Tensor) -> None:
        """Give a parameter new values in its own dtype."""
        self._weights.append((parameter, parameter.data))
        parameter.data = values.to(parameter.dtype).contiguous()

    def replace(self, model: nn.Module, name: str, new: nn.Module) -> None:
        """Put another module in a place."""
        parent_name, _, leaf = name.rpartition(".")
        parent = model.get_submodule(parent_name)
        old = parent._modules[leaf]
        assert old is not None
        self._modules.append((parent, leaf, old))
        parent._modules[leaf] = new

    def untie(self, model: nn.Module, head: Any) -> None:
        """Give the head a weight of its own."""
        self._untied = (model.config, head.weight)
        head.weight = nn.Parameter(head.weight.detach().clone())
        model.config.tie_word_embeddings = False  # type: ignore[union-attr]

    def undo(self, model: nn.Module) -> None:
        """Put back every weight and module, bit for bit."""
        for parent, leaf, old in reversed(self._modules):
            parent._modules[leaf] = old
        for parameter, values in reversed(self._weights):
            parameter.data = values
        if self._untied is not None:
            config, weight = self._untied
            model.get_output_embeddings().weight = weight  # type: ignore[operator]
            config.tie_word_embeddings = True

    def forget(self) -> None:
        """Free the original weights."""
        self._weights.clear()
        self._modules.clear()
        self._untied = None
        self.kept = False


@dataclass(frozen=True)
class RotationTotals:
    """What rotations cost a decoded token: elements read, as many multiply-adds, and bytes."""

    elements: int
    bytes: int


def rotate(
    model: nn.Module,
    method: str = "orthogonal",
    *,
    tokenizer: Any | None = None,
    texts: Iterable[str] | Iterable[Tensor] | Tensor | None = None,
    tokens: int = 8192,
    window: int = 512,
    keep_original: bool = False,
    show_progress: bool = True,
) -> Rotation:
    """Rotate the hidden states that projections read, in place. The function stays the same.

    While it works it needs memory for both the old and the new weights of what it rewrites.

    Args:
        model: a dense decoder of transformers.
        method: a name of :data:`ROTATIONS` with its parameters: ``"orthogonal"`` (WINA),
            ``"pca"`` (LaRoSA), ``"orthogonal:shared=1"`` (one basis, free at run time).
        tokenizer: for texts, where the method needs some.
        texts: strings or token ids; the bundled calibration text by default.
        tokens: of the texts to use.
        window: tokens in one sequence.
        keep_original: keep the original weights, so that :func:`unrotate` can put them back.
        show_progress: draw progress on stderr.

    Raises:
        UnsupportedModelError: this model cannot be rotated; the message names the module and why.
        PatchStateError: the model is sparsified or rotated already.
    """
    if method == NO_ROTATION:
        raise ConfigError(f"nothing to do: the rotation is {NO_ROTATION!r}")
    basis = create(ROTATIONS, method)
    if rotation_of(model) != NO_ROTATION:
        raise PatchStateError(f"the model is rotated already, by {rotation_of(model)!r}")
    if hasattr(model, "_wina_patch"):
        raise PatchStateError("the model is sparsified: call wina.restore(model) before rotating")
    reads = find_reads(model)
    if basis.shared:
        _check_shared(model, reads)
    if basis.needs_text:
        chosen = bundled("calibration") if texts is None else texts
        windows = to_windows(chosen, tokenizer, window, tokens)
        if windows.shape[1] <= SINK_TOKENS:
            raise CalibrationError(f"the text is too short: {windows.numel()} tokens")
        measure_moments(model, reads.blocks, windows, SINK_TOKENS, show_progress)
    probe = torch.arange(24)[None] % int(model.config.vocab_size)  # type: ignore[union-attr,arg-type]
    before = _logits(model, probe)
    done = Rotation(method)
    try:
        title = f"rotating by {method}"
        with progress(title, len(reads.blocks), show_progress) as advance:
            bases = _bases(basis, reads.blocks, advance)
            if basis.shared:
                _rotate_stream(model, reads, bases[0], done)
            else:
                _rotate_reads(model, reads.blocks, bases, done)
        _check_function(before, _logits(model, probe), model)
    except BaseException:
        done.undo(model)
        raise
    done.fingerprint = _fingerprint(bases)
    if not keep_original:
        done.forget()
    model.__dict__[_ATTRIBUTE] = done
    if hasattr(model, "save_pretrained"):
        model.__dict__["save_pretrained"] = partial(_refuse_to_save, method)
    return done


def _refuse_to_save(method: str, *_: Any, **__: Any) -> None:
    raise PatchStateError(
        f"the model is rotated ({method}), and no other program could read its weights: "
        "wina.unrotate it first, or save the plan alone (plan.save) and rotate the loaded model"
    )


def unrotate(model: nn.Module) -> None:
    """Put the original weights back, bit for bit.

    Raises:
        PatchStateError: the model is not rotated, is sparsified, or its weights were not kept.
    """
    done = model.__dict__.get(_ATTRIBUTE)
    if not isinstance(done, Rotation):
        raise PatchStateError("the model is not rotated: wina.rotate(model, ...) was not called")
    if hasattr(model, "_wina_patch"):
        raise PatchStateError("the model is sparsified: call wina.restore(model) first")
    if not done.kept:
        raise PatchStateError(
            "the original weights were not kept: load the model again, or pass keep_original=True "
            "to wina.rotate"
        )
    done.undo(model)
    model.__dict__.pop("save_pretrained", None)
    del model.__dict__[_ATTRIBUTE]


def rotation_of(model: nn.Module) -> str:
    """The spec of a model's rotation, ``"none"`` for a model as it was loaded."""
    done = model.__dict__.get(_ATTRIBUTE)
    return done.spec if isinstance(done, Rotation) else NO_ROTATION


def check_rotation(model: nn.Module, spec: str) -> None:
    """Raise :class:`PatchStateError` unless the model has this rotation, or none is asked for."""
    if spec not in (NO_ROTATION, rotation_of(model)):
        raise PatchStateError(
            f"this method wants a model rotated by {spec!r}, its rotation is "
            f"{rotation_of(model)!r}: call wina.rotate(model, {spec!r}, tokenizer=...) first, or "
            "set rotation='none' to do without"
        )


@contextmanager
def rotated(
    model: nn.Module, spec: str, tokenizer: Any | None = None, show_progress: bool = True
) -> Iterator[nn.Module]:
    """Let a model have this rotation inside the ``with`` block; it is as before afterwards."""
    if spec in (NO_ROTATION, rotation_of(model)):
        yield model
        return
    rotate(model, spec, tokenizer=tokenizer, keep_original=True, show_progress=show_progress)
    try:
        yield model
    finally:
        unrotate(model)


def rotation_elements(model: nn.Module) -> RotationTotals:
    """What the rotations of a model add to each decoded token; zero for a shared basis."""
    rotations = [m.rotation for m in model.modules() if isinstance(m, RotatedNorm)]
    return RotationTotals(
        sum(rotation.numel() for rotation in rotations), sum(r.nbytes for r in rotations)
    )


def _bases(basis: Basis, reads: list[Read], advance: Any) -> list[Tensor]:
    """Q of every hidden state, or the one of them all."""
    found = []
    total: Tensor | None = None
    for read in reads:
        gram = basis.gram(read)
        if basis.shared:
            gram = gram / gram.trace()
            total = gram if total is None else total + gram
        else:
            found.append(eigenvectors(gram, read.joint()))
        advance()
    return found if total is None else [eigenvectors(total, total)]


def _rotate_reads(model: nn.Module, reads: list[Read], bases: list[Tensor], done: Rotation) -> None:
    for read, rotation in zip(reads, bases, strict=True):
        for name, linear in read.linears.items():
            done.write(linear.weight, read.folded(name) @ rotation)
        _unit_norm(read, done)
        dtype = next(iter(read.linears.values())).weight.dtype
        done.replace(model, read.name, RotatedNorm(read.norm, rotation.to(dtype)))


def _rotate_stream(model: nn.Module, reads: Reads, rotation: Tensor, done: Rotation) -> None:
    assert reads.head is not None
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head = reads.head.linears["lm_head"]
    if head.weight is embedding.weight:
        warnings.warn(
            "the embeddings are tied to the head: a rotated model needs both, so they are untied "
            f"({head.weight.nbytes / 1e6:.0f} MB more in memory; as many bytes are read per token)",
            stacklevel=3,
        )
        done.untie(model, head)
    readers: set[str] = set()
    for read in (*reads.blocks, reads.head):
        for name, linear in read.linears.items():
            readers.add(name)
            done.write(linear.weight, read.folded(name) @ rotation)
        _unit_norm(read, done)
    for name, linear in _writers(model, readers):
        weight = linear.weight
        if weight.shape[0] != rotation.shape[0]:
            raise UnsupportedModelError(
                f"{name} neither reads the residual stream nor writes to it: its output has "
                f"{weight.shape[0]} channels"
            )
        done.write(weight, rotation.t() @ weight.detach().double())
        if linear.bias is not None:
            done.write(linear.bias, linear.bias.detach().double() @ rotation)
    done.write(embedding.weight, embedding.weight.detach().double() @ rotation)


def _writers(model: nn.Module, readers: set[str]) -> list[tuple[str, Any]]:
    """Linear layers of the blocks that do not read the stream: they write to it."""
    return [
        (name, module)
        for prefix, block in decoder_blocks(model)
        for name, module in block.named_modules(prefix=prefix)
        if isinstance(module, nn.Linear) and name not in readers
    ]


def _unit_norm(read: Read, done: Rotation) -> None:
    if read.offset is not None:
        weight: Any = read.norm.weight
        done.write(weight, torch.full_like(weight, 1.0 - read.offset))


def _check_shared(model: nn.Module, reads: Reads) -> None:
    """Raise unless the residual stream itself can be rotated."""
    kind = type(model).__name__
    if reads.head is None:
        raise UnsupportedModelError(
            f"the head of this {kind} does not read a norm's output: the rotation of the stream "
            "cannot be undone there"
        )
    for read in (*reads.blocks, reads.head):
        if read.offset is None:
            raise UnsupportedModelError(
                f"{read.name} is a {type(read.norm).__name__}, no RMSNorm: it does not give the "
                "same in a rotated basis. Use a rotation without shared=1."
            )
    if reads.other_norms:
        raise UnsupportedModelError(
            f"{reads.other_norms[0]} normalises what a block adds to the residual stream or feeds "
            "fused experts: its weight cannot be folded into a projection. Use a rotation without "
            "shared=1."
        )


def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    with torch.no_grad():
        output: Any = model(input_ids=ids.to(next(model.parameters()).device), use_cache=False)
    logits: Tensor = output.logits
    return logits.double()


def _check_function(before: Tensor, after: Tensor, model: nn.Module) -> None:
    change = float((after - before).norm() / before.norm())
    allowed = _TOLERANCE[next(model.parameters()).dtype]
    if not change <= allowed:
        dtype = next(model.parameters()).dtype
        why = (
            f"{str(dtype).removeprefix('torch.')} rounds the rotated weights once more, which this "
            "model does not bear (load it in float32), or something"
            if dtype.itemsize < 4
            else "something"
        )
        raise UnsupportedModelError(
            f"the rotated {type(model).__name__} computes something else (logits moved by "
            f"{change:.2g}): {why} besides projections reads a norm's output. It was undone."
        )


def _fingerprint(bases: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for rotation in bases:
        sample = rotation.flatten()[:: max(1, rotation.numel() // 64)].float()
        digest.update(sample.numpy(force=True).tobytes())
    return digest.hexdigest()[:16]
