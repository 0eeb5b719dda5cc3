"""Name → class tables, so that methods are data and never branches.

A spec is ``"name"`` or ``"name:number"``: the number is handed to the class, as in
``"norm-power:0.5"`` or ``"last:0.99"``.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from wina.errors import ConfigError, UnknownNameError

T = TypeVar("T")


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
            close = difflib.get_close_matches(str(name), self._entries, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            known = ", ".join(self._entries)
            raise UnknownNameError(f"unknown {self.kind} {name!r}.{hint} Known: {known}.") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries


def split_spec(kind: str, spec: str) -> tuple[str, float | None]:
    """Split ``"name:number"`` into its parts; a malformed number raises :class:`ConfigError`."""
    name, colon, number = spec.partition(":")
    if not colon:
        return name, None
    try:
        return name, float(number)
    except ValueError:
        raise ConfigError(
            f"{kind} {spec!r}: {number!r} is not a number; write it like '{name}:0.5'"
        ) from None


def create(registry: Registry[type[T]], spec: str) -> T:
    """Make the object that ``spec`` names, handing it the spec's number if there is one."""
    name, number = split_spec(registry.kind, spec)
    cls = registry[name]
    factory: Callable[..., T] = cls
    try:
        return factory() if number is None else factory(number)
    except TypeError as error:
        raise ConfigError(f"{registry.kind} {spec!r}: {error}") from None
