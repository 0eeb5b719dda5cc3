"""What a user asks for: method, sparsity, and how to calibrate."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from wina.allocation import ALLOCATIONS, Allocation
from wina.corrections import CORRECTIONS, Correction
from wina.criteria import CRITERIA, Criterion
from wina.errors import ConfigError
from wina.kernels.quantization import WEIGHT_DTYPES, WeightDtype
from wina.methods import METHODS
from wina.prefill import Prefill, parse_prefill
from wina.refinement import NO_REFINEMENT, REFINEMENTS, Refinement
from wina.registry import Registry, create, spelled_out
from wina.rotation import NO_ROTATION, ROTATIONS
from wina.rounding import ROUNDINGS, USUAL_ROUNDING, Rounding
from wina.selectors import SELECTORS, Selector

MASKS = ("projection", "group")
STATISTICS = ("sequential", "dense")
HEADS = ("dense", "sparse")
_LATER = (("head", "dense"), ("tracking", 0.0))


USUAL_METHOD = "wina-fisher"


@dataclass(frozen=True)
class SparsityConfig:
    """Settings of a sparsification. Every field is checked when the object is made.

    Attributes:
        method: a name of :data:`wina.methods.METHODS`, which sets criterion and allocation.
        sparsity: share of input channels dropped on average, in [0, 1).
        criterion: overrides the method's, such as ``"norm-power:0.3"``.
        selector: overrides the method's: ``"threshold"`` (one calibrated cut-off),
            ``"importance"`` (lower for tokens whose errors cost more, which calibration learns),
            ``"relative"``, ``"topk"`` or ``"statistical"``.
        allocation: overrides the method's.
        correction: overrides the method's, such as ``"bias"``.
        refinement: overrides the method's: how thresholds are improved, and constants added, once
            they are calibrated, such as ``"learned"``.
        mask: ``"projection"`` (each its own) or ``"group"`` (q, k, v share one, and gate, up).
        prefill: ``"dense"``, ``"all"`` or ``"last:<share>"``, see :mod:`wina.prefill`.
        sink_tokens: first tokens of a sequence that stay dense outside of decode.
        statistics: ``"sequential"`` (a projection is calibrated on what sparse projections before
            it produce, so that the realised sparsity is the one asked for) or ``"dense"``.
        calibration_tokens: tokens of calibration text to use.
        window: tokens in one calibration sequence.
        seed: of everything random.
        weight_dtype: ``"int8"`` or ``"int4"`` keeps the projections' weights in that width
            (:mod:`wina.kernels.quantization`); None leaves them as they are. ``"int4+int4"`` keeps
            eight bits, of which a token reads eight, four or none of each channel
            (:mod:`wina.planes`): ``sparsity`` is then the share of all these bits that is not read.
            Statistics and thresholds are those of the rounded weights.
        rounding: overrides the width's: how integers are found, ``"nearest"`` (int8's and
            int4+int4's) or ``"gptq"`` (int4's), which looks at the calibration text as well.
        head: ``"sparse"`` makes the language-model head one of the projections: it gets a share of
            the budget, and the weights' width. ``"dense"`` leaves it as it is.
        tracking: how fast the cut-offs follow a text, so that the share that is dropped stays
            ``sparsity`` on texts unlike the calibration text, too: each projection's moves by
            exp(tracking·(asked − dropped)) a token, anew for every sequence
            (:func:`wina.kernels.reference.tracked_scale`). 0: they stay. 0.03 is enough.
        rotation: overrides the method's: what :func:`wina.rotate` must have done to the model, or
            ``"none"``, which asks for nothing.
    """

    method: str = USUAL_METHOD
    sparsity: float = 0.5
    criterion: str | None = None
    selector: str | None = None
    allocation: str | None = None
    correction: str | None = None
    refinement: str | None = None
    mask: str = "projection"
    prefill: str = "dense"
    sink_tokens: int = 2
    statistics: str = "sequential"
    calibration_tokens: int = 8192
    window: int = 512
    seed: int = 0
    weight_dtype: str | None = None
    rounding: str | None = None
    rotation: str | None = None
    head: str = "dense"
    tracking: float = 0.0

    def __post_init__(self) -> None:
        for known in fields(self):
            value, default = getattr(self, known.name), known.default
            words = (str, type(None)) if default is None else (str,)
            if isinstance(default, str | None) and not isinstance(value, words):
                raise ConfigError(f"setting {known.name!r} has the wrong type: {value!r}")
        method = METHODS[self.method]
        _check_number("sparsity", self.sparsity)
        if not 0.0 <= self.sparsity < 1.0:
            raise ConfigError(f"sparsity is a share in [0, 1), not {self.sparsity}")
        if method.dense and self.sparsity != 0.0:
            raise ConfigError(f"method {self.method!r} drops nothing: sparsity must be 0")
        for name in ("sink_tokens", "calibration_tokens", "window", "seed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise ConfigError(f"{name} must be a non-negative integer, not {value!r}")
        if self.window <= self.sink_tokens + 1:
            raise ConfigError(
                f"window ({self.window}) must exceed sink_tokens ({self.sink_tokens}) by 2"
            )
        _check_choice("mask", self.mask, MASKS)
        if self.weight_dtype is not None:
            _check_choice("weight_dtype", self.weight_dtype, tuple(WEIGHT_DTYPES))
        elif self.rounding is not None:
            raise ConfigError(
                f"rounding {self.rounding!r} needs a width to round to: set weight_dtype to "
                f"{' or '.join(repr(name) for name in WEIGHT_DTYPES)}"
            )
        self.make_rounding()
        _check_choice("statistics", self.statistics, STATISTICS)
        self.make_criterion()
        if self.rotation_spec != NO_ROTATION:
            create(ROTATIONS, self.rotation_spec)
        self.make_allocation()
        if self.make_correction().compares and self.statistics == "dense":
            raise ConfigError(
                f"correction {self.correction_spec!r} compares with the dense model: "
                "statistics must be 'sequential'"
            )
        if method.gate_mask and (self.allocation_spec, self.correction_spec) != ("gated", "none"):
            raise ConfigError(
                f"method {self.method!r} masks what the gate says: its allocation is 'gated' and "
                "it takes no correction"
            )
        if method.gate_mask and self.mask != "projection":
            raise ConfigError(f"method {self.method!r} has masks of its own: mask='projection'")
        _check_choice("head", self.head, HEADS)
        _check_number("tracking", self.tracking)
        if not 0.0 <= self.tracking <= 1.0:
            raise ConfigError(f"tracking is a rate in [0, 1], not {self.tracking}")
        if self.tracking and method.gate_mask:
            raise ConfigError(f"method {self.method!r} masks what the gate says: set tracking=0")
        self._check_refinement()
        self._check_whole()
        self.make_selector()
        self.make_prefill()

    @property
    def kept_as(self) -> WeightDtype | None:
        """How weights are kept; None for weights as they are."""
        return None if self.weight_dtype is None else WEIGHT_DTYPES[self.weight_dtype]

    @property
    def planes(self) -> int:
        """Of every weight: thresholds are [planes·K]."""
        return 1 if self.kept_as is None else self.kept_as.planes

    def _check_whole(self) -> None:
        """What looks at whole channels of a block has no meaning for planes, or behind all blocks.

        The head's own products are not computed while it is calibrated.
        """
        wanted = {
            "correction 'none'": self.make_correction().fit() is None,
            "a method without a gate's mask": not METHODS[self.method].gate_mask,
        }
        lacking = [what for what, holds in wanted.items() if not holds]
        for setting, here in (
            (f"weight_dtype {self.weight_dtype!r}", self.planes > 1),
            (f"head {self.head!r}", self.head == "sparse"),
        ):
            if here and lacking:
                raise ConfigError(f"{setting} needs {lacking[0]}")
        if self.head == "sparse" and self.make_allocation().by_block:
            raise ConfigError(
                f"allocation {self.allocation_spec!r} looks at one block at a time, and the head "
                "is in none: set head='dense', or another allocation"
            )

    def _check_refinement(self) -> None:
        """Refined thresholds are those of each projection, and fixed: nothing else may use them."""
        self.make_refinement()
        if self.refinement_spec == NO_REFINEMENT:
            return
        wanted = {
            "selector 'threshold' or 'importance'": self.selector_spec == "threshold"
            or self.make_selector().weighs_tokens,
            "mask 'projection'": self.mask == "projection" and not METHODS[self.method].gate_mask,
            "correction 'none'": self.make_correction().fit() is None,
        }
        for what, holds in wanted.items():
            if not holds:
                raise ConfigError(f"refinement {self.refinement_spec!r} needs {what}")

    @property
    def criterion_spec(self) -> str:
        """The criterion in use: the field, or else the method's."""
        return self.criterion or METHODS[self.method].criterion

    @property
    def selector_spec(self) -> str:
        """The selector in use: the field, or else the method's."""
        return self.selector or METHODS[self.method].selector

    @property
    def rotation_spec(self) -> str:
        """The rotation that is asked for: the field, or else the method's."""
        return self.rotation or METHODS[self.method].rotation

    @property
    def allocation_spec(self) -> str:
        """The allocation policy in use: the field, or else the method's."""
        return self.allocation or METHODS[self.method].allocation

    @property
    def correction_spec(self) -> str:
        """The correction in use: the field, or else the method's."""
        return self.correction or METHODS[self.method].correction

    @property
    def refinement_spec(self) -> str:
        """The refinement in use: the field, or else the method's."""
        return self.refinement or METHODS[self.method].refinement

    @property
    def rounding_spec(self) -> str | None:
        """The rounding in use: the field, or else the width's; None for weights as they are."""
        return self.rounding or (self.weight_dtype and USUAL_ROUNDING[self.weight_dtype])

    def make_criterion(self, role: str = "") -> Criterion:
        """The criterion of a projection, by the last part of its name."""
        return create(CRITERIA, self.criterion or METHODS[self.method].criterion_of(role))

    def make_allocation(self) -> Allocation:
        """The allocation policy."""
        return create(ALLOCATIONS, self.allocation_spec)

    def make_correction(self) -> Correction:
        """The correction."""
        return create(CORRECTIONS, self.correction_spec)

    def make_refinement(self) -> Refinement:
        """The refinement."""
        return create(REFINEMENTS, self.refinement_spec)

    def make_rounding(self) -> Rounding | None:
        """The rounding, None for weights as they are."""
        return create(ROUNDINGS, self.rounding_spec) if self.rounding_spec else None

    def make_selector(self) -> Selector:
        """The selector."""
        return create(SELECTORS, self.selector_spec)

    def make_prefill(self) -> Prefill:
        """The prefill protocol."""
        return parse_prefill(self.prefill, self.sink_tokens)

    def parts(self) -> dict[str, str]:
        """Kind of part → its spec, with every parameter: what the method's name stands for now.

        Criteria of some roles only are ``criterion of <role>``. What is not asked for is left out.
        """
        method = METHODS[self.method]
        own = {} if self.criterion else method.criteria
        rotation = self.rotation_spec
        specs: list[tuple[str, Registry[Any], str | None]] = [
            ("criterion", CRITERIA, self.criterion or method.criterion),
            *((f"criterion of {role}", CRITERIA, spec) for role, spec in own.items()),
            ("selector", SELECTORS, self.selector_spec),
            ("allocation", ALLOCATIONS, self.allocation_spec),
            ("refinement", REFINEMENTS, self.refinement_spec),
            ("correction", CORRECTIONS, self.correction_spec),
            ("rounding", ROUNDINGS, self.rounding_spec),
            ("rotation", ROTATIONS, None if rotation == NO_ROTATION else rotation),
        ]
        return {kind: spelled_out(known, spec) for kind, known, spec in specs if spec}

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready fields."""
        return asdict(self)

    def record(self) -> dict[str, Any]:
        """:meth:`to_dict` for what is kept and compared.

        A selector that weighs tokens is named: it may be the method's, which had another before,
        and nothing of then is taken for the same.
        """
        named = {"selector": self.selector_spec} if self.make_selector().weighs_tokens else {}
        # Fields that came later are left out where they say what was so before them.
        return {**{k: v for k, v in self.to_dict().items() if (k, v) not in _LATER}, **named}

    @property
    def label(self) -> str:
        """The method as :func:`settings_of` reads it, with what else a decoded token depends on."""
        return self.method if self.head == "dense" else f"{self.method}/head={self.head}"

    @classmethod
    def from_label(cls, label: str, **settings: Any) -> SparsityConfig:
        """A method with settings of its own (:func:`settings_of`), which win over ``settings``."""
        return cls.from_dict({**settings, **settings_of(label)})

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> SparsityConfig:
        """Inverse of :meth:`to_dict`; an unknown field raises :class:`ConfigError`."""
        if not isinstance(values, Mapping):
            raise ConfigError(f"settings are an object with names, not {values!r}")
        known = {field.name: field for field in fields(cls)}
        unknown = sorted(set(values) - set(known))
        if unknown:
            raise ConfigError(f"unknown setting {unknown[0]!r}. Known: {', '.join(known)}.")
        for name, value in values.items():
            kind = type(known[name].default)
            allowed = (
                (str, type(None))
                if known[name].default is None
                else ((int, float) if kind is float else (kind,))
            )
            if not isinstance(value, allowed) or isinstance(value, bool):
                raise ConfigError(f"setting {name!r} has the wrong type: {value!r}")
        return cls(**values)


def settings_of(label: str) -> dict[str, Any]:
    """Fields of :class:`SparsityConfig` of a method with settings of its own.

    Args:
        label: such as ``"wina"`` or ``"wina-fisher/weight_dtype=int4+int4/head=sparse"``.
    """
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


def _check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not _is_finite(value):
        raise ConfigError(f"{name} must be a finite number, not {value!r}")


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer that no float can hold
        return False


def _check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ConfigError(f"{name} {value!r} is not known. Known: {', '.join(known)}.")
