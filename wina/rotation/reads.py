"""Hidden states that a norm gives and projections read, observed on a running model."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wina.errors import UnsupportedModelError
from wina.progress import progress
from wina.projections import decoder_blocks, find_projections
from wina.rotation.norms import is_norm, rms_offset


@dataclass
class Read:
    """A hidden state x̂ = norm(h) and the linear layers that read it.

    Attributes:
        name: of the norm.
        norm: the module.
        offset: what an RMSNorm adds to its weight; None for another norm, which is not folded.
        linears: name → module of the layers that read x̂.
        moments: E[x̂ᵀx̂] [hidden, hidden] float64, None until they are measured.
    """

    name: str
    norm: nn.Module
    offset: float | None
    linears: dict[str, Any]
    moments: Tensor | None = None

    @property
    def projections(self) -> list[str]:
        """Names of the layers that read x̂."""
        return list(self.linears)

    @property
    def hidden(self) -> int:
        """Size of x̂."""
        return int(next(iter(self.linears.values())).in_features)

    def zeros(self) -> Tensor:
        """[hidden, hidden] float64."""
        device = next(iter(self.linears.values())).weight.device
        return torch.zeros(self.hidden, self.hidden, dtype=torch.float64, device=device)

    def folded(self, name: str) -> Tensor:
        """A reader's weight [N, hidden] in float64, multiplied by the norm's weight."""
        weight: Tensor = self.linears[name].weight.detach().double()
        if self.offset is None:
            return weight
        gain: Any = self.norm.weight
        folded: Tensor = weight * (gain.detach().double() + self.offset)
        return folded

    def joint(self) -> Tensor:
        """WᵀW [hidden, hidden] float64 of all readers' weights, one upon the other."""
        return sum((w.t() @ w for w in map(self.folded, self.projections)), start=self.zeros())

    def plain_norm(self) -> nn.Module:
        """A copy of the norm with its weight taken out."""
        plain = copy.deepcopy(self.norm)
        if self.offset is not None:
            weight: Any = plain.weight
            weight.data.fill_(1.0 - self.offset)
        return plain


@dataclass(frozen=True)
class Reads:
    """All that a rotation has to know of a model's structure.

    Attributes:
        blocks: hidden states inside the decoder blocks.
        head: what the language-model head reads; None where that is no norm's output.
        other_norms: names of norms in blocks that give a hidden state which no projection reads.
    """

    blocks: list[Read]
    head: Read | None
    other_norms: list[str]


def find_reads(model: nn.Module) -> Reads:
    """Observe two tokens passing the model: which norm gives what each projection reads.

    Raises:
        UnsupportedModelError: a projection that reads the residual stream has no norm before it.
    """
    names = [projection.name for projection in find_projections(model)]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    linears: dict[str, Any] = {name: model.get_submodule(name) for name in names}
    if isinstance(head, nn.Linear):
        linears["lm_head"] = head
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    outputs, inputs = _observe(model, norms, linears)
    given = {tensor.data_ptr(): name for name, tensor in reversed(outputs.items())}
    hidden = int(model.config.hidden_size)  # type: ignore[union-attr,arg-type]
    reads: dict[str, Read] = {}
    for name, x in inputs.items():
        norm = given.get(x.data_ptr())
        if norm is None or x.shape[-1] != hidden:
            continue
        read = reads.setdefault(norm, Read(norm, norms[norm], rms_offset(norms[norm]), {}))
        read.linears[name] = linears[name]
    block_names = [name for name, _ in decoder_blocks(model)]
    _check_readers(model, names, reads, block_names)
    read_by_head = next((read for read in reads.values() if "lm_head" in read.linears), None)
    return Reads(
        blocks=[read for read in reads.values() if read is not read_by_head],
        head=read_by_head,
        other_norms=[
            name
            for name, y in outputs.items()
            if y.shape[-1] == hidden
            and name not in reads
            and any(name.startswith(f"{block}.") for block in block_names)
        ],
    )


def _check_readers(
    model: nn.Module, names: Sequence[str], reads: dict[str, Read], blocks: Sequence[str]
) -> None:
    """The first projection of every block reads the residual stream: there must be a norm."""
    read = {name for found in reads.values() for name in found.linears}
    for block in blocks:
        first = next((name for name in names if name.startswith(f"{block}.")), None)
        if first is not None and first not in read:
            raise UnsupportedModelError(
                f"{first} reads the residual stream without a norm before it, so a rotation of "
                f"this {type(model).__name__} has no place to stand"
            )


def _observe(
    model: nn.Module, norms: dict[str, nn.Module], linears: dict[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Name → output of each norm, and name → input of each linear layer, all of them alive."""
    outputs: dict[str, Tensor] = {}
    inputs: dict[str, Tensor] = {}

    def after(name: str) -> Any:
        def hook(_: nn.Module, __: Any, y: Any) -> None:
            if isinstance(y, Tensor):
                outputs[name] = y

        return hook

    def before(name: str) -> Any:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            inputs[name] = arguments[0]

        return hook

    handles = [module.register_forward_hook(after(name)) for name, module in norms.items()]
    handles += [module.register_forward_pre_hook(before(n)) for n, module in linears.items()]
    try:
        device = next(model.parameters()).device
        with torch.no_grad():
            model(input_ids=torch.tensor([[0, 1]], device=device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return outputs, inputs


def measure_moments(
    model: nn.Module, reads: Sequence[Read], windows: Tensor, sink_tokens: int, show: bool
) -> None:
    """Fill in the moments of hidden states with the norms' weights taken out.

    Args:
        model: dense.
        reads: whose moments are wanted.
        windows: token ids [windows, S].
        sink_tokens: first tokens of each window to leave out: their massive activations would be
            all that the moments show.
        show: draw a progress bar on stderr.
    """
    device = next(model.parameters()).device
    tokens = 0

    def before(read: Read) -> Any:
        plain = read.plain_norm()

        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = plain(arguments[0])[:, sink_tokens:].flatten(0, -2).double()
            moment = x.t() @ x
            read.moments = moment if read.moments is None else read.moments + moment

        return hook

    handles = [read.norm.register_forward_pre_hook(before(read)) for read in reads]
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), progress("moments of hidden states", len(windows), show) as advance:
            for window in windows.split(1):
                model(input_ids=window.to(device), use_cache=False)
                tokens += window.numel() - sink_tokens
                advance()
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    for read in reads:
        assert read.moments is not None
        read.moments = read.moments / tokens
