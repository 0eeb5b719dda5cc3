"""Name → class tables, so that methods are data and never branches.

A spec is ``"name"``, ``"name:number"`` or ``"name:key=number:key=number"``: the numbers are handed
to the class, as in ``"norm-power:0.5"``, ``"last:0.99"`` or ``"fisher:rounds=2:most=0.9"``.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from wina.errors import ConfigError, UnknownNameError

T = TypeVar("T")

_SHOWN = 100  # characters of what somebody gave as a name that a message repeats


class Registry(Generic[T]):
    """The known entries of one kind, in the order of their registration."""

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters an object under ``name``; a second entry of that name raises."""

        def enter(entry: T) -> T:
            if name in self._entries:
                raise ConfigError(f"{self.kind} {name!r} is registered twice")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        try:
            return self._entries[name]
        except KeyError:
            close = difflib.get_close_matches(str(name)[:_SHOWN], self._entries, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = ", ".join(self._entries)
            raise UnknownNameError(
                f"unknown {self.kind} {_quoted(name)}.{hint} Known: {known}."
            ) from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def _quoted(name: object) -> str:
    text = str(name)
    return repr(name) if len(text) <= _SHOWN else f"{text[:_SHOWN]!r}... ({len(text)} characters)"


def parse_spec(kind: str, spec: str) -> tuple[str, dict[str, float]]:
    """Split a spec into its name and its numbers; a number without a key has the key ``""``.

    Raises:
        ConfigError: a number is malformed, or a key is given twice.
    """
    name, colon, rest = spec.partition(":")
    numbers: dict[str, float] = {}
    for part in rest.split(":") if colon else ():
        key, equals, number = part.partition("=")
        key, number = (key.strip(), number) if equals else ("", key)
        if key in numbers:
            raise ConfigError(f"{kind} {_quoted(spec)} gives {_quoted(key or 'its number')} twice")
        try:
            numbers[key] = float(number)
        except ValueError:
            raise ConfigError(
                f"{kind} {_quoted(spec)}: {_quoted(number)} is not a number; write it like "
                "'name:0.5' or 'name:key=0.5'"
            ) from None
    return name, numbers


def split_spec(kind: str, spec: str) -> tuple[str, float | None]:
    """Split ``"name:number"`` into its parts; anything else raises :class:`ConfigError`."""
    name, numbers = parse_spec(kind, spec)
    for key in numbers:
        if key:
            raise ConfigError(f"{kind} {_quoted(spec)} takes one number, not {key}=")
    return name, numbers.get("")


def create(registry: Registry[type[T]], spec: str) -> T:
    """Make the object that ``spec`` names, handing it the spec's numbers."""
    name, numbers = parse_spec(registry.kind, spec)
    factory: Callable[..., T] = registry[name]
    positional = [value for key, value in numbers.items() if not key]
    try:
        return factory(*positional, **{key: value for key, value in numbers.items() if key})
    except TypeError as error:
        raise ConfigError(f"{registry.kind} {spec!r}: {error}") from None


def spelled_out(registry: Registry[type[T]], spec: str) -> str:
    """A spec with every parameter in it: what it means, whatever the defaults are by then."""
    name, numbers = parse_spec(registry.kind, spec)
    create(registry, spec)  # raises for numbers that do not fit
    bound = inspect.signature(registry[name]).bind(
        *(value for key, value in numbers.items() if not key),
        **{key: value for key, value in numbers.items() if key},
    )
    bound.apply_defaults()
    return ":".join([name, *(f"{key}={value:.12g}" for key, value in bound.arguments.items())])


def whole(name: str, value: float, least: int = 1) -> int:
    """A parameter of a spec as an integer; anything else raises :class:`ConfigError`."""
    if value != int(value) or value < least:
        raise ConfigError(f"{name} is a whole number of at least {least}, not {value:g}")
    return int(value)


def share(name: str, value: float, zero: bool = False) -> float:
    """A parameter of a spec in (0, 1], or 0 if ``zero``; else raises :class:`ConfigError`."""
    if not (0.0 < value <= 1.0 or (zero and value == 0.0)):
        raise ConfigError(f"{name} is a share in {'[' if zero else '('}0, 1], not {value:g}")
    return value
