"""What a patched model does: the table of ``wina.inspect``, and realised sparsity measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import StringIO
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from wina.experts import FEWEST_TOKENS
from wina.kernels import ops
from wina.linear import SparseLinear
from wina.mlp import GatedForm, SparseGatedMLP
from wina.patch import is_patched, patch_of
from wina.plan import ExpertsPlan, weighted_mean
from wina.projections import (
    DenseModule,
    dense_modules,
    find_experts,
    find_projections,
    model_type_of,
)
from wina.rotation import rotation_elements
from wina.sparse_experts import SparseExperts


@dataclass(frozen=True)
class InspectionRow:
    """One projection of a model.

    ``weight_dtype`` and ``weight_bytes`` tell how the weight is kept in memory, ``extra_bytes``
    what a token reads for correction and probe on top of the channels that it keeps.
    ``realised`` is what calibration measured, ``fused`` the roles of the projections that share
    its launch while decoding, its own among them, empty where it has one for itself.
    """

    projection: str
    shape: tuple[int, int]
    sparsity: float
    realised: float
    cutoff: float | None
    backend: str
    reason: str
    fused: tuple[str, ...] = ()
    weight_dtype: str = ""
    weight_bytes: int = 0
    extra_bytes: int = 0


@dataclass(frozen=True)
class Inspection:
    """All projections of a model; prints as a table.

    Attributes:
        model_type: such as ``"llama"``.
        method: the method's name, ``"dense"`` for a dense model.
        prefill: share of a prompt's tokens that are sparse.
        realised: share of projection weights a decoded token skips, on calibration text.
        rows: one for each projection, in order of execution.
        dense: modules of the blocks that stay dense, and why.
        rotation_bytes: what a token reads for the model's rotations, see :func:`wina.rotate`.
    """

    model_type: str
    method: str
    prefill: float
    realised: float
    rows: tuple[InspectionRow, ...]
    dense: tuple[DenseModule, ...] = ()
    rotation_bytes: int = 0

    @property
    def extra_bytes(self) -> int:
        """Bytes that a sparse token reads for corrections, probes and rotations."""
        return sum(row.extra_bytes for row in self.rows) + self.rotation_bytes

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready values."""
        return asdict(self)

    def __str__(self) -> str:
        table = Table(title=f"{self.model_type}: {self.method}")
        for column, justify in (
            ("projection", "left"), ("[N, K]", "right"), ("asked", "right"),
            ("realised", "right"), ("cut-off", "right"), ("weights", "left"),
            ("one launch", "left"), ("backend", "left"), ("why", "left"),
        ):  # fmt: skip
            table.add_column(column, justify=justify, no_wrap=True)  # type: ignore[arg-type]
        for row in self.rows:
            table.add_row(
                row.projection,
                f"{row.shape[0]}×{row.shape[1]}",
                f"{row.sparsity:.3f}",
                f"{row.realised:.3f}",
                "" if row.cutoff is None else f"{row.cutoff:.4g}",
                row.weight_dtype,
                "+".join(row.fused),
                row.backend,
                row.reason,
            )
        text = StringIO()
        Console(file=text, width=200, color_system=None).print(table)
        weights = sum(row.weight_bytes for row in self.rows)
        share = self.extra_bytes / max(weights, 1)
        extra = f"; corrections, probes and rotations read {share:.2%} of the weights"
        return (
            f"{text.getvalue()}realised over the model: {self.realised:.3f} of projection weights "
            f"skipped by a decoded token (on calibration text); share of prefill tokens that are "
            f"sparse: {self.prefill:g}{extra if self.extra_bytes and weights else ''}"
            + self._dense_text()
        )

    def _dense_text(self) -> str:
        """A line for every reason to stay dense."""
        reasons: dict[str, list[DenseModule]] = {}
        for module in self.dense:
            reasons.setdefault(module.reason, []).append(module)
        return "".join(
            f"\nstays dense, {sum(m.weights for m in modules):,} weights: {modules[0].name}"
            f"{f' and {len(modules) - 1} more' * (len(modules) > 1)}, each {reason}"
            for reason, modules in reasons.items()
        )


def inspect(model: nn.Module) -> Inspection:
    """List the projections of a model: sparsity asked and realised, cut-off, backend and why.

    Works on dense models too, where it shows what :func:`wina.sparsify` would replace.
    """
    if not is_patched(model):
        projections = find_projections(model)
        rows = tuple(
            InspectionRow(p.name, (p.out_features, p.in_features), 0.0, 0.0, None, "torch", "dense")
            for p in (*projections, *(p for _, ps in find_experts(model).values() for p in ps))
        )
        return Inspection(
            model_type_of(model), "dense", 0.0, 0.0, rows, tuple(dense_modules(model)),
            rotation_elements(model).bytes,
        )  # fmt: skip
    patch = patch_of(model)
    rows = []  # type: ignore[assignment]
    sparse = {m.name: m for m in model.modules() if isinstance(m, SparseLinear)}
    mlps = {n: m.gated.form for n, m in model.named_modules() if isinstance(m, SparseGatedMLP)}
    for name, layer in patch.plan.layers.items():
        choice = sparse[name].choice
        shape = (layer.projection.out_features, layer.projection.in_features)
        rows.append(  # type: ignore[attr-defined]
            InspectionRow(
                name,
                shape,
                layer.sparsity,
                layer.realised,
                layer.cutoff,
                choice.backend.name,
                choice.reason,
                _fused_with(name, layer.projection.role, sparse[name], mlps),
                sparse[name].weight_dtype,
                sparse[name].weight_bytes,
                sparse[name].extra_bytes,
            )
        )
    experts = {m.name: m for m in model.modules() if isinstance(m, SparseExperts)}
    for name, of_experts in patch.plan.experts.items():
        module_name, _, role = name.rpartition(".")
        rows.append(_experts_row(of_experts, experts[module_name], role))  # type: ignore[attr-defined]
    return Inspection(
        patch.plan.model_type,
        patch.plan.config.method,
        patch.control.prefill.share if patch.control.enabled else 0.0,
        patch.plan.realised,
        tuple(rows),
        tuple(
            module
            for module in dense_modules(model)
            if not isinstance(model.get_submodule(module.name), SparseLinear | SparseExperts)
        ),
        rotation_elements(model).bytes,
    )


def _experts_row(layer: ExpertsPlan, module: SparseExperts, role: str) -> InspectionRow:
    projection = layer.projection
    choice = module.choices[role]
    weight = getattr(module, role)
    few = int((layer.tokens < FEWEST_TOKENS).sum())
    return InspectionRow(
        projection.name,
        (projection.out_features, projection.in_features),
        layer.sparsity,
        layer.realised,
        None,
        choice.backend.name,
        f"{choice.reason}; a token reads {projection.copies} of {len(layer.threshold)} experts"
        + (f", {few} of them with the cut-off of all" if few else ""),
        (),
        str(weight.dtype).removeprefix("torch."),
        weight.nbytes,
    )


def _fused_with(
    name: str, role: str, module: SparseLinear, mlps: Mapping[str, GatedForm]
) -> tuple[str, ...]:
    if not module.one_launch:
        return ()
    form = mlps.get(name.rpartition(".")[0])
    if form is not None and role in (form.gate, form.up):
        return (form.gate, form.up)
    if module.group is not None and module.group.fuses:
        return tuple(member.name.rpartition(".")[2] for member in module.group.members)
    return ()


class RealisedSparsity:
    """Counts the channels that sparse products drop while it is attached."""

    def __init__(self, model: nn.Module) -> None:
        layers = patch_of(model).plan.all_layers.values()
        self._projections = [layer.projection for layer in layers]
        # Tensors: reading each count would make a GPU wait for the CPU in every layer.
        self._dropped = {p.name: torch.zeros((), dtype=torch.int64) for p in self._projections}
        # Numbers would be constants to torch.compile: each call would compile anew.
        self._seen = {p.name: torch.zeros((), dtype=torch.int64) for p in self._projections}
        # A gate's mask drops rows of up as well: counted with the columns of down.
        self._rows = {
            f"{name}.{m.gated.form.down}": (f"{name}.{m.gated.form.up}",)
            for name, m in model.named_modules()
            if isinstance(m, SparseGatedMLP) and m.gate_mask
        }

    def __call__(self, name: str, x: Tensor, threshold: Tensor, scale: Tensor | None) -> None:
        """Count one product's channels."""
        # Counting nonzeros is many times faster on a CPU than a sum of booleans.
        dropped = x.numel() - torch.count_nonzero(ops.keep_mask(x.detach(), threshold, scale))
        for reader in (name, *self._rows.get(name, ())):
            self._dropped[reader] = self._dropped[reader].to(dropped.device) + dropped
            self._seen[reader] = self._seen[reader] + x.numel()

    @property
    def by_projection(self) -> Mapping[str, float]:
        """Projection name → share of channels dropped (0 where nothing was seen)."""
        return {
            name: int(self._dropped[name]) / int(seen) if seen else 0.0
            for name, seen in self._seen.items()
        }

    @property
    def mean(self) -> float:
        """Share of projection weights skipped: the mean weighted by K·N."""
        return weighted_mean(self._projections, self.by_projection)


@contextmanager
def measure_sparsity(
    model: nn.Module, counter: RealisedSparsity | None = None
) -> Iterator[RealisedSparsity]:
    """Measure the realised sparsity of everything that runs inside the ``with`` block (slower).

    Args:
        model: sparsified.
        counter: goes on with an earlier count.
    """
    control = patch_of(model).control
    counter = RealisedSparsity(model) if counter is None else counter
    before = control.observer
    control.observer = counter
    try:
        yield counter
    finally:
        control.observer = before
