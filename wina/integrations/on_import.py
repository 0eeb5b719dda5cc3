"""Runs something once another package has been imported, without importing it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType


class _Watcher(MetaPathFinder):
    """Finds nothing itself; lets the module that it waits for run the callback when it is ready."""

    def __init__(self, name: str, callback: Callable[[], object]) -> None:
        self.name = name
        self.callback = callback

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the awaited module, as the other finders give it, with the callback added."""
        if fullname != self.name or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def execute_and_tell(module: ModuleType) -> None:
                execute(module)
                self.callback()

            spec.loader.exec_module = execute_and_tell  # type: ignore[method-assign]
        return spec


def when_imported(name: str, callback: Callable[[], object]) -> None:
    """Call ``callback`` when the module ``name`` has been imported: now, if it has been already."""
    if name in sys.modules:
        callback()
    else:
        sys.meta_path.insert(0, _Watcher(name, callback))
