"""The near end of :mod:`wina.bench.peers.worker`."""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from wina.errors import WinaError

_HERE = Path(__file__).resolve().parent
_WORKER = _HERE / "worker.py"
ENGINES = _HERE / "engines"


class PeerError(WinaError, RuntimeError):
    """An engine failed in its process. The message holds what it said."""


@dataclass(frozen=True)
class Answer:
    """Of one greedy generation.

    Attributes:
        tokens: generated ids.
        seconds_per_token: of decode, prefill left out.
    """

    tokens: tuple[int, ...]
    seconds_per_token: float


class EngineProcess:
    """An engine that loads in a process of its own and then generates on request.

    Loading goes on in the background; the first request waits for it. Use as a context manager.

    Args:
        python: the interpreter.
        engine: the engine's file.
        options: its keyword arguments, JSON-ready.
        environment: variables beside ours.
        limit_s: seconds that loading or one generation may take.
    """

    def __init__(
        self, python: str, engine: Path, options: Mapping[str, Any],
        environment: Mapping[str, str] | None = None, limit_s: float = 600.0,
    ) -> None:  # fmt: skip
        self.name, self.limit_s = engine.stem, limit_s
        self._errors = tempfile.TemporaryFile(  # noqa: SIM115  # close() closes it
            "w+", encoding="utf-8", errors="replace"
        )
        try:
            self._process = subprocess.Popen(
                [python, str(_WORKER), str(engine), json.dumps(options)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors,
                text=True, encoding="utf-8", env={**os.environ, **(environment or {})},
            )  # fmt: skip
        except OSError as error:
            self._errors.close()
            raise PeerError(f"cannot start {python}: {error}") from None
        self._version: str | None = None

    @property
    def version(self) -> str:
        """What the engine calls itself; waits until it has loaded."""
        if self._version is None:
            self._version = str(self._read()["version"])
        return self._version

    def generate(self, prompt: Sequence[int], new_tokens: int) -> Answer:
        """Greedy tokens that follow ``prompt``, ``new_tokens`` of them."""
        assert self.version
        assert self._process.stdin is not None
        request = json.dumps({"prompt": list(prompt), "new_tokens": new_tokens})
        with suppress(OSError):  # it has ended: what it said is read below
            self._process.stdin.write(request + "\n")
            self._process.stdin.flush()
        answer = self._read()
        return Answer(tuple(answer["tokens"]), float(answer["seconds_per_token"]))

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        alarm = threading.Timer(self.limit_s, self._process.kill)
        alarm.start()
        try:
            line = self._process.stdout.readline()
        finally:
            alarm.cancel()
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            self._process.kill()
            code = self._process.wait()
            raise PeerError(
                f"{self.name} ended with {code} (limit: {self.limit_s:.0f} s){self._said()}"
            ) from None
        if "error" in answer:
            raise PeerError(f"{self.name}: {answer['error']}{self._said()}")
        return answer

    def _said(self) -> str:
        """The last lines of stderr."""
        self._errors.seek(0)
        lines = self._errors.read().strip().splitlines()[-5:]
        return "".join(f"\n  {line}" for line in lines)

    def close(self) -> None:
        """End the process."""
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._errors.close()

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        self.close()
