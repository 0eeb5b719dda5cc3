"""The columns of a comparison: methods at sparsities, each with settings of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from wina.config import SparsityConfig
from wina.errors import ConfigError
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


def settings_of(label: str) -> dict[str, Any]:
    """Fields of :class:`SparsityConfig` that a method with settings of its own says."""
    name, *own = label.split("/")
    return {"method": name, **parse_settings(own)}


def parse_settings(pairs: Sequence[str]) -> dict[str, Any]:
    """``field=value`` pairs of :class:`SparsityConfig`, values in the type of the field."""
    defaults = {f.name: f.default for f in fields(SparsityConfig)}
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in defaults:
            raise ConfigError(
                f"{pair!r} is no setting: write field=value with a field of: {', '.join(defaults)}"
            )
        kind = type(defaults[name])
        try:
            settings[name] = kind(value) if kind in (int, float) else value
        except ValueError:
            raise ConfigError(f"{pair!r}: expected a value such as {defaults[name]!r}") from None
    return settings
