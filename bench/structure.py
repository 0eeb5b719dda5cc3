"""What a decoded token reads of a model, by kind, observed on modules rather than looked up.

Works on a model on any device. :func:`meta_model` makes one of a config without allocating a
weight, so a 70-billion-parameter model costs a tenth of a second. Knows nothing of time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from wina.errors import UnsupportedModelError
from wina.projections import Architecture, architecture_of, decoder_blocks

# Kinds whose products are sparse, then those that every token pays in full.
ATTENTION = "attention projections"
MLP = "MLP projections"
EXPERTS = "active experts"
ROUTER = "router"
LM_HEAD = "lm_head"
NORMS = "norms and biases"
EMBEDDING = "embedding row"
SPARSE_KINDS = (ATTENTION, MLP, EXPERTS)


@dataclass(frozen=True)
class Weight:
    """One parameter, and what one decoded token does with it.

    Attributes:
        name: of the parameter.
        kind: one of the kinds above.
        shape: [N, K] of the product it takes part in; () for norms, biases and embedding rows.
        read: elements that one token reads when nothing is skipped.
        active: share of equal copies (experts) that a token reads; 1 for all but experts.
        itemsize: bytes of one element as the model holds it.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    read: float
    active: float
    itemsize: int

    @property
    def macs(self) -> float:
        """Multiply-adds of one dense token; scaling and adding vectors is not counted."""
        return self.read if self.shape else 0.0


@dataclass(frozen=True)
class Structure:
    """All that a decoded token meets in a model.

    Attributes:
        weights: every parameter, shared ones once.
        hidden: width of the residual stream.
        layers: number of decoder blocks.
        query_width: heads × head size of one layer.
        kv_width: elements that one cached token adds in one layer, keys and values together.
        windows: for every layer the most tokens that its attention looks back, None for all.
    """

    model_type: str
    weights: tuple[Weight, ...]
    hidden: int
    layers: int
    query_width: int
    kv_width: int
    windows: tuple[int | None, ...]

    def kinds(self) -> list[str]:
        """Kinds that occur, sparse ones first."""
        found = dict.fromkeys(w.kind for w in self.weights)
        return sorted(found, key=lambda kind: kind not in SPARSE_KINDS)

    def cached_tokens(self, context: int) -> int:
        """Cached tokens that attention reads at a context length, summed over the layers."""
        return sum(context if w is None else min(context, w) for w in self.windows)


def meta_model(config: Any) -> nn.Module:
    """A model of a transformers config on the meta device: all shapes, no memory."""
    import transformers

    try:
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError) as error:
        raise UnsupportedModelError(
            f"transformers builds no causal language model of a {config.model_type!r} config: "
            f"{error}"
        ) from None
    model.tie_weights()  # type: ignore[operator]
    return model.eval()


def structure_of(model: nn.Module) -> Structure:
    """Sort the parameters of a decoder by what a decoded token does with them.

    Linear layers of a block count as attention where a module on their path has ``attn`` or
    ``attention`` in its name, else as MLP. Parameters [experts, ...] with three dimensions, and
    lists of as many expert modules, count as experts, of which ``num_experts_per_tok`` are active.

    Raises:
        UnsupportedModelError: the model is no decoder of known form; the message says why.
    """
    config: Any = model.config
    weights: list[Weight] = []
    seen: set[int] = set()
    architecture = architecture_of(model)
    experts, chosen = _experts(config)
    for block_name, block in decoder_blocks(model):
        for name, module, parameter in _parameters(block, block_name, seen):
            inside = name.removeprefix(f"{block_name}.")
            weights.append(_block_weight(inside, name, module, parameter, architecture,
                                         experts, chosen))  # fmt: skip
    embedding: Any = model.get_input_embeddings()  # type: ignore[operator]
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None:
        matrix = head.weight
        weights.append(_matrix("lm_head.weight", LM_HEAD, matrix))
        seen.add(id(matrix))
    for name, module, parameter in _parameters(model, "", seen):
        rows = isinstance(module, nn.Embedding)
        read = parameter.shape[-1] if rows else parameter.numel()
        kind = EMBEDDING if rows else NORMS
        weights.append(Weight(name, kind, (), read, 1.0, parameter.itemsize))
    if head is not None and head.weight is embedding.weight:  # tied: the row is read as well
        row = embedding.weight
        weights.append(Weight("embedding", EMBEDDING, (), row.shape[-1], 1.0, row.itemsize))
    heads = int(config.num_attention_heads)
    hidden = int(config.hidden_size)
    head_size = int(getattr(config, "head_dim", None) or hidden // heads)
    return Structure(
        model_type=str(config.model_type),
        weights=tuple(weights),
        hidden=hidden,
        layers=int(config.num_hidden_layers),
        query_width=heads * head_size,
        kv_width=_latent_width(config) or 2 * _kv_heads(config, heads) * head_size,
        windows=_windows(config),
    )


def projection_shapes(model: nn.Module) -> list[tuple[int, int]]:
    """The different [N, K] among projections and experts, in order of appearance."""
    shapes = {w.shape: None for w in structure_of(model).weights if w.kind in SPARSE_KINDS}
    return [(shape[0], shape[1]) for shape in shapes]


def _parameters(
    root: nn.Module, prefix: str, seen: set[int]
) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """(name, owner, parameter) of every parameter that was not seen before."""
    for path, module in root.named_modules(prefix=prefix):
        for leaf, parameter in module.named_parameters(recurse=False):
            if id(parameter) not in seen:
                seen.add(id(parameter))
                yield f"{path}.{leaf}".lstrip("."), module, parameter


def _block_weight(
    inside: str,
    name: str,
    module: nn.Module,
    parameter: Tensor,
    architecture: Architecture,
    experts: int,
    chosen: int,
) -> Weight:
    parts = inside.split(".")
    if parameter.dim() < 2:
        return Weight(name, NORMS, (), parameter.numel(), 1.0, parameter.itemsize)
    linear = isinstance(module, nn.Linear) or type(module).__name__ in architecture.linear_types
    stacked = parameter.shape[0] == experts and "experts" in parts[:-1] and not linear
    if stacked and parameter.dim() == 2:
        share = chosen / experts  # a stack of biases
        return Weight(name, NORMS, (), parameter.numel() * share, share, parameter.itemsize)
    if stacked and parameter.dim() == 3:
        return _matrix(name, EXPERTS, parameter[0], chosen / experts, experts)
    if "experts" in parts[:-2] and experts:  # a list of modules: each is one copy of many
        return _matrix(name, EXPERTS, parameter, chosen / experts, 1)
    if parameter.shape[0] == experts and "experts" not in parts:
        return _matrix(name, ROUTER, parameter)
    if not linear or parameter.dim() != 2:
        raise UnsupportedModelError(
            f"{name} is a {type(module).__name__} of shape {tuple(parameter.shape)}: the roofline "
            "knows linear layers, expert stacks, norms and embeddings"
        )
    if parts[-2] in architecture.skip:
        return _matrix(name, ROUTER, parameter)
    attention = any("attn" in part or "attention" in part for part in parts)
    return _matrix(name, ATTENTION if attention else MLP, parameter)


def _matrix(name: str, kind: str, matrix: Tensor, active: float = 1.0, copies: int = 1) -> Weight:
    shape = (matrix.shape[0], matrix.shape[1])
    return Weight(name, kind, shape, matrix.numel() * copies * active, active, matrix.itemsize)


def _experts(config: Any) -> tuple[int, int]:
    """(experts of a layer, experts that a token uses); (0, 0) for a dense model."""
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    total = next((getattr(config, n) for n in names if getattr(config, n, None)), 0)
    chosen = getattr(config, "num_experts_per_tok", None) or 0
    return (int(total), int(chosen)) if total and chosen else (0, 0)


def _kv_heads(config: Any, heads: int) -> int:
    if getattr(config, "multi_query", False) and not getattr(
        config, "new_decoder_architecture", False
    ):
        return 1
    names = ("num_key_value_heads", "num_kv_heads")
    return int(next((getattr(config, n) for n in names if getattr(config, n, None)), heads))


def _latent_width(config: Any) -> int | None:
    """Elements cached by multi-head latent attention, which keeps one vector for all heads."""
    rank = getattr(config, "kv_lora_rank", None)
    return int(rank) + int(getattr(config, "qk_rope_head_dim", 0)) if rank else None


def _windows(config: Any) -> tuple[int | None, ...]:
    layers = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        return (window,) * layers
    return tuple(window if "sliding" in kind else None for kind in kinds)
