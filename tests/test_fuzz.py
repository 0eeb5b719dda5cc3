"""A short run of the fuzzer, and proof that it sees what it is there to see."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from wina.files import parse_json

HERE = Path(__file__).parent
FUZZER = HERE / "fuzz" / "run.py"
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads and resets /proc/self")

# Each does one thing that an input must not do; `folder` is where it may write.
CRIMES = {
    "write outside": ("open(folder + '/../outside', 'w')", "Breach"),
    "write through a link": ("open(folder + '/link/outside', 'w')", "Breach"),
    "write where it is": ("open('here', 'w')", "Breach"),
    "remove outside": ("os.remove(folder + '/../kept')", "Breach"),
    "temporary file outside": ("tempfile.mkdtemp()", "Breach"),
    "command": ("os.system('true')", "Breach"),
    "process": ("subprocess.run(['true'])", "Breach"),
    "fork": ("os.fork()", "Breach"),
    "socket": ("socket.create_connection(('127.0.0.1', 9))", "Breach"),
    "library": ("ctypes.CDLL('libm.so.6')", "Breach"),
    "eval": ("eval('1')", "Breach"),
    "unpickle": ("pickle.loads(b'cos\\nsystem\\n.')", "Breach"),
    "import from the folder": ("sys.path.insert(0, folder) or __import__('planted')", "Breach"),
    "caught by the reader": ("swallow(lambda: os.system('true'))", "Breach"),
    "memory": ("b'a' * (9 << 20)", "TooMuch"),
    "memory of torch": ("torch.ones(9 << 18).sum()", "TooMuch"),
    "memory, then refused": ("refuse(b'a' * (9 << 20))", "TooMuch"),
    "caught, then refused": ("refuse(swallow(lambda: os.system('true')))", "Breach"),
    "no end": ("loop()", "TooSlow"),
    "nothing": ("open(folder + '/inside', 'w').close() or torch.ones(1 << 18).sum()", "None"),
}
CHILD = """
import ctypes, json, os, pickle, socket, subprocess, sys, tempfile, torch
from pathlib import Path
from types import FunctionType
from sandbox import Breach, Sandbox, TooMuch, TooSlow
folder = sys.argv[1]

def swallow(action):
    try:
        action()
    except BaseException:
        pass

def refuse(_):
    raise ValueError

def loop():
    while True:
        pass

crimes = {name: compile(code, "<string>", "eval") for name, code in json.loads(sys.argv[2]).items()}
torch.ones(1 << 18).sum()
sandbox, seen = Sandbox(), {}
for name, crime in crimes.items():
    seen[name] = "None"
    try:
        with sandbox.armed(Path(folder), 0.5, 8 << 20):
            FunctionType(crime, globals())()
    except (Breach, TooMuch, TooSlow) as error:
        seen[name] = type(error).__name__
print(json.dumps(seen))
"""


def run(command: list[str], **settings: object) -> subprocess.CompletedProcess[str]:
    paths = [str(HERE), str(HERE / "fuzz"), *map(str, sys.path)]
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
        "MALLOC_MMAP_THRESHOLD_": "65536",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
        **settings,  # type: ignore[call-overload]
    )


def test_the_sandbox_sees_what_an_input_must_not_do(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "kept").touch()
    (folder / "link").symlink_to(tmp_path)
    (folder / "planted.py").write_text("value = 1\n")
    codes = {name: code for name, (code, _) in CRIMES.items()}
    answer = run(["-c", CHILD, str(folder), json.dumps(codes)], cwd=tmp_path)
    assert answer.returncode == 0, answer.stderr[-3000:]
    assert json.loads(answer.stdout) == {name: seen for name, (_, seen) in CRIMES.items()}
    assert {path.name for path in tmp_path.iterdir()} == {"folder", "kept"}


def test_damaged_inputs_are_refused() -> None:
    answer = run([str(FUZZER), "--inputs", "1000"])
    assert answer.returncode == 0, answer.stdout[-3000:]
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result["total"] >= 990
    often = [target for target, count in result["inputs"].items() if count >= 20]
    assert len(often) >= 5
    assert all(result["refused"].get(target) for target in often)
    assert result["findings"] == []


@pytest.mark.parametrize("value", ["[]", "{}", "0.5", '"a"', "[0]"])
def test_json_that_would_grow_in_memory_is_refused(value: str) -> None:
    with pytest.raises(ValueError, match="too many values"):
        parse_json("[" + ",".join([value] * (1 << 20)) + "]")


def test_long_json_of_ordinary_values_is_read() -> None:
    row = {"name": "model.layers.10.mlp.down_proj", "sparsity": 0.5123, "cutoff": 1.25, "block": 3}
    rows = [{**row, "note": "a" * 300}] * 20_000
    assert parse_json(json.dumps(rows)) == rows
