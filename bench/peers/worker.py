"""One engine in a process of its own: JSON lines in on stdin, JSON lines out on stdout.

Run as ``python worker.py ENGINE.py OPTIONS``, by any Python that has the engine's packages; wina
need not be installed there, so only the standard library is used here. ``ENGINE.py`` has a class
``Engine(**OPTIONS)`` with a ``version`` and ``generate(prompt, new_tokens)`` → (tokens, seconds per
token of decode). First line out: {"version"}; then for every line in, {"prompt", "new_tokens"}, one
of {"tokens", "seconds_per_token"}; whatever fails, {"error"} and the end.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from typing import Any


def main() -> int:
    """Serve until stdin ends; 1 after an error."""
    # What engines print, also from native code, must not mix with the answers.
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as out:
        os.dup2(2, 1)
        try:
            engine = _load(sys.argv[1]).Engine(**json.loads(sys.argv[2]))
            _say(out, version=engine.version)
            for line in sys.stdin:
                tokens, seconds = engine.generate(**json.loads(line))
                _say(out, tokens=list(tokens), seconds_per_token=seconds)
        except Exception as error:  # of a foreign library: whatever it is, the parent is told
            _say(out, error=f"{type(error).__name__}: {error}")
            return 1
    return 0


def _load(path: str) -> Any:
    spec = importlib.util.spec_from_file_location("engine", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _say(out: Any, **answer: Any) -> None:
    print(json.dumps(answer), file=out, flush=True)


if __name__ == "__main__":
    del sys.path[0]  # this folder: its files must not pass for packages of the same name
    code = main()
    sys.stderr.flush()
    os._exit(code)  # native thread pools of some engines hang or crash when Python takes them down
