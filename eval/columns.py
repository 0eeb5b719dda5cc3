"""The columns of a comparison: methods at sparsities, each with settings of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from wina.config import SparsityConfig, settings_of
from wina.rotation import NO_ROTATION

# How a forward with many tokens is computed: a mask and a dense product, on weights left as they
# are. So the dense model is the very same computation without the masks.
BACKEND = "reference"


@dataclass(frozen=True)
class Column:
    """A model of the grid: a method at a sparsity.

    Attributes:
        label: the method as the user wrote it.
        sparsity: 0 for the dense model.
        config: its settings, the prefill protocol included; None for the dense model.
    """

    label: str
    sparsity: float
    config: SparsityConfig | None

    @property
    def rotation(self) -> str:
        """What the model has to be rotated by."""
        return NO_ROTATION if self.config is None else self.config.rotation_spec

    @property
    def title(self) -> str:
        """For people."""
        return self.label if self.config is None else f"{self.label} at {self.sparsity:.0%}"


def columns_of(
    methods: Sequence[str], sparsities: Sequence[float], common: Mapping[str, Any]
) -> list[Column]:
    """The dense model, then every method at every sparsity.

    A method is a name of :data:`wina.methods.METHODS`, followed by settings of its own where
    wanted, as in ``wina/selector=topk/allocation=uniform``.

    Args:
        methods: ``"dense"`` may be left out: everything is compared with it.
        sparsities: in [0, 1).
        common: settings that all methods share.
    """
    columns = [Column("dense", 0.0, None)]
    for label in methods:
        settings = {**common, **settings_of(label)}
        if settings["method"] == "dense":
            continue
        columns += [
            Column(label, value, SparsityConfig.from_dict({**settings, "sparsity": value}))
            for value in sparsities
        ]
    return columns
