"""Building the native kernels: what can go wrong, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from wina.kernels import cpu
from wina.kernels.cpu import build

LOAD = "from wina.kernels import cpu; print(cpu.load())"
PATCH = """
import wina
from wina.testing import tiny_model, random_tokens
model = tiny_model("llama")
config = wina.SparsityConfig(calibration_tokens=128, window=64)
wina.sparsify(model, config, texts=random_tokens(256), show_progress=False)
row = wina.inspect(model).rows[0]
print(row.backend, "|", row.reason)
model.generate(random_tokens(8)[None], max_new_tokens=4)
"""


def run(code: str, folder: Path | None = None, /, **environment: str) -> str:
    answer = subprocess.run(
        [sys.executable, "-c", code],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, **environment},
        check=True,
    )
    return answer.stdout.strip()


@pytest.fixture
def no_compiler(tmp_path: Path) -> dict[str, str]:
    (tmp_path / "bin").mkdir()
    return {"PATH": str(tmp_path / "bin"), "CXX": "", "WINA_CACHE_DIR": str(tmp_path / "cache")}


def test_without_a_compiler_the_reference_serves_and_says_why(no_compiler: dict[str, str]) -> None:
    said = run(PATCH, **no_compiler)
    assert said.startswith("reference | cpu: native CPU kernels: no C++ compiler found")


def test_failing_compiler_is_quoted(tmp_path: Path, no_compiler: dict[str, str]) -> None:
    compiler = tmp_path / "bin" / "g++"
    compiler.write_text("#!/bin/sh\necho 'sparse.cpp:1: error: out of patience' >&2\nexit 1\n")
    compiler.chmod(0o755)
    said = run(LOAD, **{**no_compiler, "PATH": f"{compiler.parent}:/bin:/usr/bin", "CXX": ""})
    assert "out of patience" in said


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """A cache folder with the libraries that this machine has built."""
    assert cpu.load() is None
    folder = build._cache_folder()
    assert folder is not None
    copy = tmp_path / "cache" / "cpu"
    copy.mkdir(parents=True, mode=0o700)
    for library in folder.glob("*.so"):
        (copy / library.name).write_bytes(library.read_bytes())
    assert list(copy.iterdir())
    return copy


def test_cached_kernels_need_no_compiler(no_compiler: dict[str, str], cache: Path) -> None:
    assert run(PATCH, **no_compiler) == "cpu | fastest here"


def test_corrupt_cache_is_not_loaded(no_compiler: dict[str, str], cache: Path) -> None:
    """A truncated library would crash the process: its name carries its digest."""
    for library in cache.iterdir():
        library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    assert "no C++ compiler" in run(LOAD, **no_compiler)


@pytest.mark.slow
def test_corrupt_cache_is_rebuilt(cache: Path) -> None:
    for library in cache.iterdir():
        library.write_bytes(library.read_bytes()[: library.stat().st_size // 2])
    assert run(LOAD, WINA_CACHE_DIR=str(cache.parent)) == "None"
    assert max(library.stat().st_size for library in cache.iterdir()) > 100_000


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_cache_open_to_others_is_not_used(
    tmp_path: Path, mode: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu").chmod(mode)
    monkeypatch.setenv("WINA_CACHE_DIR", str(tmp_path))
    assert build._cache_folder() is None


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder that nobody can write")
def test_read_only_cache_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc: a mode does not stop the super-user."""
    monkeypatch.setenv("WINA_CACHE_DIR", "/proc/wina")
    assert build._cache_folder() is None


def test_relative_cache_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WINA_CACHE_DIR", "here")
    assert build._cache_folder() is None


@pytest.mark.slow
def test_two_processes_build_at_once(tmp_path: Path) -> None:
    environment = {**os.environ, "WINA_CACHE_DIR": str(tmp_path)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", LOAD], stdout=subprocess.PIPE, text=True, env=environment
        )
        for _ in range(2)
    ]
    assert [process.communicate()[0].strip() for process in processes] == ["None", "None"]
    # Whole libraries of the two, or one of the same bytes, and nothing that is half done.
    left = list((tmp_path / "cpu").iterdir())
    assert len(left) in (1, 2)
    assert all(path.stem.endswith(build._digest(path.read_bytes())) for path in left)
    assert run(LOAD, WINA_CACHE_DIR=str(tmp_path), PATH="/nonexistent", CXX="") == "None"


def test_one_openmp_runtime_is_mapped() -> None:
    maps = run(
        LOAD + "; import torch; torch.ones(9).sum();"
        "print(sorted({line.split()[-1] for line in open('/proc/self/maps') if 'gomp' in line}))"
    )
    assert maps.splitlines()[-1].count("gomp") <= 1


SPY = """#!/bin/sh
[ "$1" = --version ] && exit 0
{ pwd; stat -c %a .; for word in "$@"; do echo "$word"; done; } > {log}.$$
exit 1
"""


def test_the_build_takes_nothing_from_the_working_directory(
    tmp_path: Path, no_compiler: dict[str, str]
) -> None:
    """Sources, headers and objects have absolute paths; the compiler's own folder is private."""
    log, here = tmp_path / "log", tmp_path / "here"
    here.mkdir()
    compiler = tmp_path / "bin" / "g++"
    compiler.write_text(SPY.replace("{log}", str(log)))
    compiler.chmod(0o755)
    run(LOAD, here, **{**no_compiler, "PATH": f"{compiler.parent}:/bin:/usr/bin"})
    calls = sorted(tmp_path.glob("log.*"))  # one for each source, side by side
    assert calls
    where, mode, *words = calls[0].read_text().splitlines()
    assert Path(where).parent == tmp_path / "cache" / "cpu"
    assert mode == "700"
    paths = [
        word.removeprefix("-I") for word in words if "/" in word or word.endswith((".cpp", ".o"))
    ]
    assert len(paths) >= 4
    assert all(Path(path).is_absolute() for path in paths)
    assert list(here.iterdir()) == []
    assert list(Path(where).parent.iterdir()) == []  # the private folder is gone


@pytest.mark.parametrize("path", [".", "", "bin"])
def test_a_compiler_of_the_working_directory_is_not_run(
    tmp_path: Path, no_compiler: dict[str, str], path: str
) -> None:
    """As a relative PATH entry, or none, would have it; nor is a library that lies there loaded."""
    compiler = tmp_path / "bin" / "g++"
    compiler.write_text(f"#!/bin/sh\n/bin/touch {tmp_path}/ran\nexit 1\n")
    compiler.chmod(0o755)
    here = tmp_path if path == "bin" else tmp_path / "bin"
    (here / "kernels.so").write_bytes(b"\x7fELF")
    assert "no C++ compiler" in run(LOAD, here, **{**no_compiler, "PATH": path})
    assert not (tmp_path / "ran").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no native kernels there")
def test_a_compiler_that_takes_too_long_leaves_no_child(tmp_path: Path) -> None:
    note = tmp_path / "child"
    compiler = tmp_path / "c++"
    compiler.write_text(f"#!/bin/sh\nsleep 600 &\necho $! > {note}\nwait\n")
    compiler.chmod(0o755)
    with pytest.raises(build._BuildError, match="took more than 1 s"):
        build._run([str(compiler)], timeout=1)
    child = int(note.read_text())
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    pytest.fail(f"the compiler's child {child} still runs")
