"""Raises an exception at any line that wina executes; tells whether a model is as it was."""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from torch import Tensor, nn

import wina

_ROOT = Path(wina.__file__).resolve().parent


class Injected(BaseException):
    """Like Ctrl-C."""


def lines_of(action: Callable[[], object], files: Sequence[str]) -> list[tuple[str, int]]:
    """Every line of these files of the package that an action executes, in order."""
    seen: list[tuple[str, int]] = []
    _traced(action, files, lambda place: seen.append(place))
    return seen


def steps_of(action: Callable[[], object], files: Sequence[str]) -> list[int]:
    """Numbers of the steps to fail at: each line's last execution, when most is done.

    The head of a ``with`` statement runs again when the block is left. An exception there, before
    ``__exit__`` is called, is beyond what Python lets anybody clean up, so heads fail on entry.
    """
    lines = lines_of(action, files)
    first = {place: number for number, place in reversed(list(enumerate(lines)))}
    last = {place: number for number, place in enumerate(lines)}
    heads = {(file, line) for file in files for line in _heads(_ROOT / file)}
    return sorted(first[place] if place in heads else last[place] for place in last)


def _heads(path: Path) -> set[int]:
    """Lines of the heads of ``with`` statements."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    blocks = [node for node in nodes if isinstance(node, ast.With)]
    return {line for node in blocks for line in range(node.lineno, node.body[0].lineno)}


def fail_at(
    step: int,
    action: Callable[[], object],
    files: Sequence[str],
    error: type[BaseException] = Injected,
) -> None:
    """Run an action that is stopped before its ``step``-th line; the error does not come out."""
    count = -1

    def visit(place: tuple[str, int]) -> None:
        nonlocal count
        count += 1
        if count == step:
            raise error(f"before {place[0]}:{place[1]}")

    try:
        _traced(action, files, visit)
    except error:
        return
    raise AssertionError(f"there was no step {step}, or its error was swallowed")


def _traced(
    action: Callable[[], object], files: Sequence[str], visit: Callable[[tuple[str, int]], None]
) -> None:
    watched = {str(_ROOT / file): file for file in files}

    def local(frame: FrameType, event: str, _: Any) -> Any:
        if event == "line":
            visit((watched[frame.f_code.co_filename], frame.f_lineno))
        return local

    def enter(frame: FrameType, event: str, argument: Any) -> Any:
        return local if frame.f_code.co_filename in watched else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        action()
    finally:
        sys.settrace(before)


class Snapshot:
    """All that a model is made of."""

    def __init__(self, model: nn.Module) -> None:
        self.values = {name: value.clone() for name, value in model.state_dict().items()}
        self.parts = self._parts(model)

    def assert_unchanged(self, model: nn.Module, where: object = "") -> None:
        """Same modules, hooks, modes and memory; same layout; every bit the same."""
        assert self._parts(model) == self.parts, where
        for name, value in model.state_dict().items():
            assert value.equal(self.values[name]), (where, name)

    @staticmethod
    def _parts(model: nn.Module) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        for name, module in model.named_modules():
            hooks = (
                module._forward_pre_hooks, module._forward_hooks, module._backward_hooks,
                module._backward_pre_hooks,
            )  # fmt: skip
            own = sorted(key for key in module.__dict__ if key in ("forward", "_wina_patch"))
            parts[name] = (id(module), module.training, [len(hook) for hook in hooks], own)
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parts[f"{name} "] = (
                id(parameter), parameter.data_ptr(), parameter.stride(), parameter.dtype,
                parameter.requires_grad, parameter.grad is None,
            )  # fmt: skip
        return parts


def same(a: Tensor, b: Tensor) -> bool:
    """Bit for bit."""
    return a.shape == b.shape and a.dtype == b.dtype and a.equal(b)
