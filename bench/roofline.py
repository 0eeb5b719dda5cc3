"""Bytes and multiply-adds of one decoded token, and the speed that a device's bandwidth allows.

Everything is counted that a token must read or multiply: projections, language-model head, norms,
the embedding row, cached keys and values, the thresholds of sparse layers, and on request WINA's
rotation and low-rank or bias corrections. Arithmetic only: nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from wina.bench.devices import Device
from wina.bench.structure import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    LM_HEAD,
    MLP,
    NORMS,
    ROUTER,
    SPARSE_KINDS,
    Structure,
    Weight,
)
from wina.errors import ConfigError

KV_CACHE = "KV cache"
THRESHOLDS = "thresholds"
ROTATION = "rotation"
CORRECTIONS = "corrections"
# In the order in which pictures stack them and tables list them.
KINDS = (
    ATTENTION, MLP, EXPERTS, ROUTER, LM_HEAD, NORMS, EMBEDDING, KV_CACHE, THRESHOLDS, ROTATION,
    CORRECTIONS,
)  # fmt: skip
# Kinds that are read by a matrix product.
PRODUCTS = (*SPARSE_KINDS, ROUTER, LM_HEAD, ROTATION, CORRECTIONS)
ITEMSIZE = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "int8": 1.0, "int4": 0.5}


@dataclass(frozen=True)
class Load:
    """What is decoded.

    Attributes:
        sparsity: share of input channels that one token drops in every projection.
        batch: sequences decoded at once. One step reads the union of what their tokens keep,
            taken as independent: a share 1 − sparsity^batch (masks that agree do better).
        context: tokens in the cache of each sequence.
        itemsize: bytes of a weight element; None for what the model holds.
        cache_itemsize: bytes of a cached element.
        rotation: WINA's rotated model: two products hidden × hidden in each layer.
        rank: of a low-rank correction of every projection; 0 for none.
        bias: whether every projection carries a correcting bias.
    """

    sparsity: float = 0.0
    batch: int = 1
    context: int = 0
    itemsize: float | None = None
    cache_itemsize: float = 2.0
    rotation: bool = False
    rank: int = 0
    bias: bool = False

    def __post_init__(self) -> None:
        if not 0.0 <= self.sparsity <= 1.0:
            raise ConfigError(f"sparsity is a share in [0, 1], not {self.sparsity}")
        if self.batch < 1 or self.context < 0 or self.rank < 0:
            raise ConfigError("batch is at least 1; context and rank are not negative")

    @property
    def dense(self) -> Load:
        """The same work without sparsity and without what sparsity needs beside it."""
        return Load(
            batch=self.batch,
            context=self.context,
            itemsize=self.itemsize,
            cache_itemsize=self.cache_itemsize,
        )


@dataclass(frozen=True)
class Cost:
    """What one decode step costs, by kind: one token of every sequence in the batch.

    Attributes:
        bytes: kind → bytes read from memory.
        macs: kind → multiply-adds (a floating-point operation is half of one).
        batch: sequences of the step.
        sparse: whether sparse kernels serve the projections.
    """

    bytes: dict[str, float]
    macs: dict[str, float]
    batch: int
    sparse: bool = False

    @property
    def total_bytes(self) -> float:
        """Bytes of one step."""
        return sum(self.bytes.values())

    @property
    def total_macs(self) -> float:
        """Multiply-adds of one step."""
        return sum(self.macs.values())

    def reading(self, device: Device) -> float:
        """Seconds of reading, every kind at the share of the bandwidth that its product reaches."""
        at_full = 0.0
        for kind, size in self.bytes.items():
            if kind in SPARSE_KINDS and self.sparse:
                size /= device.sparse_share
            elif kind in PRODUCTS:
                size /= device.dense_share
            at_full += size
        return at_full / (device.bandwidth_gb_s * 1e9)

    def seconds(self, device: Device, overhead_s: float = 0.0) -> float:
        """The least time of a step: the longer of reading and multiplying, and a fixed part."""
        reading = self.reading(device)
        multiplying = 2 * self.total_macs / (device.tflops * 1e12) if device.tflops else 0.0
        return max(reading, multiplying) + overhead_s


def cost(structure: Structure, load: Load) -> Cost:
    """Bytes and multiply-adds of one decode step of a model."""
    read: dict[str, float] = {}
    macs: dict[str, float] = {}

    def add(kind: str, elements: float, itemsize: float, products: float) -> None:
        read[kind] = read.get(kind, 0.0) + elements * itemsize
        macs[kind] = macs.get(kind, 0.0) + products

    sparse = load.sparsity > 0.0
    corrected: list[tuple[Weight, float]] = []  # projections, and how many copies a token uses
    for weight in structure.weights:
        itemsize = _itemsize(weight, load)
        touched = _touched_share(weight, load)
        if weight.kind in SPARSE_KINDS:
            keep = 1.0 - load.sparsity**load.batch
            add(weight.kind, weight.read * keep * touched, itemsize,
                weight.macs * (1.0 - load.sparsity) * load.batch)  # fmt: skip
            corrected.append((weight, weight.read / (weight.shape[0] * weight.shape[1])))
        else:
            rows = load.batch if weight.kind == EMBEDDING else 1
            add(weight.kind, weight.read * rows, itemsize, weight.macs * load.batch)
    cached = structure.cached_tokens(load.context) * load.batch
    if cached:
        products = 2.0 * structure.query_width * cached  # with the keys, then with the values
        add(KV_CACHE, structure.kv_width * cached, load.cache_itemsize, products)
    for weight, copies in corrected:
        N, K = weight.shape
        itemsize = _itemsize(weight, load)
        used = copies * _touched_share(weight, load)
        if sparse:
            add(THRESHOLDS, K * used, 4.0, 0.0)
        if load.rank:
            add(CORRECTIONS, load.rank * (N + K) * used, itemsize,
                load.rank * (N + K) * copies * load.batch)  # fmt: skip
        if load.bias:
            add(CORRECTIONS, N * used, itemsize, 0.0)
    if load.rotation:
        rotation = 2.0 * structure.layers * structure.hidden**2
        widest = max(_itemsize(weight, load) for weight, _ in corrected)
        add(ROTATION, rotation, widest, rotation * load.batch)
    order = [kind for kind in KINDS if kind in read]
    return Cost({k: read[k] for k in order}, {k: macs[k] for k in order}, load.batch, sparse)


def published_macs(structure: Structure, sparsity: float, rotation: bool = False) -> float:
    """ "GFLOPs per token" as WINA's paper (arXiv 2505.19427) counts them, in multiply-adds.

    (1 − sparsity) · Σ linear layers + lm_head. Embeddings and attention scores are left out; so
    is the rotation, unless asked for.
    """
    dense = cost(structure, Load()).macs
    kept = sum((1.0 - sparsity) * dense.get(kind, 0.0) for kind in SPARSE_KINDS)
    turned = 2.0 * structure.layers * structure.hidden**2 if rotation else 0.0
    return kept + dense.get(ROUTER, 0.0) + dense.get(LM_HEAD, 0.0) + turned


def roofline(
    structure: Structure,
    device: Device,
    sparsities: Sequence[float],
    load: Load,
    overhead_s: float = 0.0,
    efficiency: float = 1.0,
) -> list[dict[str, Any]]:
    """Predicted speed at every sparsity, dense first.

    Args:
        structure: of the model.
        device: whose bandwidth bounds the step.
        sparsities: shares to predict; dense is added.
        load: what is decoded; its sparsity is not used.
        overhead_s: seconds of a step that are neither reading nor multiplying.
        efficiency: share of the bandwidth that kernels reach, in (0, 1].

    Returns:
        Rows of {sparsity, bytes, macs (kind → number), total_bytes, total_macs, published_gmacs,
        ms_per_step, tokens_per_s, speedup, bound}.
    """
    if not 0.0 < efficiency <= 1.0:
        raise ConfigError(f"efficiency is a share in (0, 1], not {efficiency}")
    reached = replace(device, bandwidth_gb_s=device.bandwidth_gb_s * efficiency)
    dense = cost(structure, load.dense)
    dense_seconds = dense.seconds(reached, overhead_s)
    rows = []
    for sparsity in dict.fromkeys((0.0, *sparsities)):
        asked = Load(**{**vars(load), "sparsity": sparsity}) if sparsity else load.dense
        step = cost(structure, asked)
        seconds = step.seconds(reached, overhead_s)
        reading = step.reading(reached)
        rows.append(
            {
                "sparsity": sparsity,
                "bytes": step.bytes,
                "macs": step.macs,
                "total_bytes": step.total_bytes,
                "total_macs": step.total_macs,
                "published_gmacs": published_macs(structure, sparsity) / 1e9,
                "published_gmacs_with_rotation": published_macs(structure, sparsity, True) / 1e9,
                "ms_per_step": seconds * 1e3,
                "tokens_per_s": step.batch / seconds,
                "speedup": dense_seconds / seconds,
                "bound": "bytes" if reading >= seconds - overhead_s - 1e-12 else "products",
            }
        )
    return rows


def byte_ideal(structure: Structure, load: Load) -> float:
    """Dense bytes over the bytes of the sparse step: the speed-up that only bytes could give."""
    return cost(structure, load.dense).total_bytes / cost(structure, load).total_bytes


def overhead_for(
    structure: Structure, device: Device, load: Load, dense_tokens_per_s: float
) -> float:
    """Seconds a step that a measured dense speed leaves unexplained by reading, at least 0."""
    measured = load.batch / dense_tokens_per_s
    return max(0.0, measured - cost(structure, load.dense).seconds(device))


def _itemsize(weight: Weight, load: Load) -> float:
    return float(weight.itemsize) if load.itemsize is None else load.itemsize


def _touched_share(weight: Weight, load: Load) -> float:
    """Copies that a batch reads over copies that one token reads, routing taken as independent."""
    return float((1.0 - (1.0 - weight.active) ** load.batch) / weight.active)
