"""What an input under test may do: read, compute, and write inside one folder. Nothing else.

An audit hook sees every file that is opened, every process, socket, library and piece of code. It
cannot be taken off again, so it looks only while it is armed. Time is bounded by alarms, memory
twice: the peak of resident memory, which the kernel takes anew for every input, may grow by so
much, and the address space of the process ends soon after. Both count what Python, torch and Rust
ask for alike.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType
from typing import Any, NamedTuple

_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_NEVER = (
    "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.startfile",
    "socket.", "ctypes.dlopen", "pickle.find_class", "webbrowser.", "ftplib.", "urllib.", "pty.",
    "os.kill", "os.chown", "os.setxattr",
)  # fmt: skip
_CHANGES = ("os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.chmod",
            "os.truncate", "os.utime", "shutil.", "tempfile.")  # fmt: skip
# Code comes from installed files: modules that are imported late, and regular expressions.
_INSTALLED = tuple(
    {
        *(str(Path(p).resolve()) for p in sysconfig.get_paths().values()),
        str(Path(__file__).resolve().parents[2]),
        "<frozen ",
    }
)


_COMPILERS = (
    "/typing_objects.py",
    "/typing.py",
    "/dataclasses.py",
    "/collections/__init__.py",
    "/inspect.py",
)


HANGS = 600.0  # seconds after which an input that does nothing counts as hung


class Breach(BaseException):
    """Something forbidden was tried."""


class TooSlow(BaseException):
    """An input took too long."""


class TooMuch(BaseException):
    """An input took more memory than its size allows."""


class Sandbox:
    """Watches everything that runs inside ``with sandbox.armed(folder, seconds, most):``.

    Attributes:
        growth: bytes by which the last input raised resident memory at its peak.
    """

    def __init__(self) -> None:
        self.folder = os.devnull
        self.watching = False
        self.breaches: list[str] = []
        self.growth = 0
        sys.addaudithook(self._audit)
        for kind in (signal.SIGALRM, signal.SIGPROF):
            signal.signal(kind, self._late)

    @contextmanager
    def armed(self, folder: Path, seconds: float, most: int) -> Iterator[None]:
        """Watch one input.

        Args:
            folder: the only place where files may be changed.
            seconds: of the processor that it may take. On the clock it is :data:`HANGS`, which is
                long: the machine may have other work.
            most: bytes that it may ask for beyond what the process has.

        Raises:
            Breach, TooSlow, TooMuch: when the block is left, even if they were caught inside.
        """
        self.folder = os.path.realpath(folder)
        self.breaches.clear()
        _forget_peak()
        before = memory()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.setitimer(signal.ITIMER_REAL, HANGS)
        self.watching = True
        try:
            yield
        finally:
            self.watching = False
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            self.growth = memory().peak - before.resident
            # Here, since an input that is refused has been looked at, too.
            if self.breaches:  # whoever tried may have caught the exception
                raise Breach(self.breaches[0])
            if self.growth > most:
                raise TooMuch(f"{self.growth} bytes, {most} allowed")

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching:
            return
        why = self._forbidden(event, arguments)
        if why is not None:
            self.breaches.append(f"{event}: {why}")
            raise Breach(self.breaches[-1])

    def _forbidden(self, event: str, arguments: tuple[Any, ...]) -> str | None:
        if event.startswith(_NEVER):
            return str(arguments)[:200]
        if event == "open":
            path, mode, flags = arguments
            writes = any(c in (mode or "") for c in "wax+") or bool((flags or 0) & _WRITES)
            return self._outside(path) if writes else None
        if event.startswith(_CHANGES):
            places = [a for a in arguments if isinstance(a, str | bytes | os.PathLike)]
            inside = arguments[-1]  # of an open folder, by its number
            if type(inside) is int and inside > 2 and event in ("os.remove", "os.rmdir"):
                places = [Path(f"/proc/self/fd/{inside}") / os.fsdecode(p) for p in places]
            return next((why for a in places if (why := self._outside(a))), None)
        if event == "exec":
            code = arguments[0]
            name = code.co_filename if isinstance(code, CodeType) else str(code)
            return None if self._installed(name) or _of_annotations() else name
        if event == "compile":
            source, name = arguments
            known = source is None or self._installed(str(name)) or _of_annotations()
            return None if known else f"{name}: {source!r:.80}"
        return None

    def _outside(self, path: Any) -> str | None:
        if isinstance(path, int) or path == os.devnull:
            return None
        full = os.path.realpath(os.fsdecode(path))
        return None if full == self.folder or full.startswith(self.folder + os.sep) else full

    def _installed(self, name: str) -> bool:
        return name.startswith(_INSTALLED) and not name.startswith(self.folder)

    @staticmethod
    def _late(*_: Any) -> None:
        raise TooSlow


def _of_annotations() -> bool:
    """Whether it is an annotation or a field of a class, which the standard library compiles."""
    frame = sys._getframe(3)  # whoever caused the event that _forbidden judges
    return frame.f_code.co_filename.endswith(_COMPILERS)


class Memory(NamedTuple):
    """Address space, resident memory and its peak since :func:`_forget_peak`, bytes."""

    space: int
    resident: int
    peak: int


def memory() -> Memory:
    """What this process has."""
    with open("/proc/self/status", encoding="ascii") as file:  # noqa: PTH123
        rows = dict(line.split(":", 1) for line in file)
    return Memory(*(int(rows[name].split()[0]) << 10 for name in ("VmSize", "VmRSS", "VmHWM")))


def _forget_peak() -> None:
    with open("/proc/self/clear_refs", "w", encoding="ascii") as file:  # noqa: PTH123
        file.write("5")


def limit_memory(more: int) -> None:
    """Let this process ask for ``more`` bytes beyond what it has, and no more."""
    most = memory().space + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
