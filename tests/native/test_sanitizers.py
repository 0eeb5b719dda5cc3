"""Native kernels under AddressSanitizer, UBSan and ThreadSanitizer: ``make test-sanitizers``.

Each sanitizer watches a library built for it alone while ``operator_calls.py`` calls every
operator, and has to find a mistake planted beside the kernels. Under AddressSanitizer tensors have
red zones, since torch allocates through malloc. Under ThreadSanitizer ``at::parallel_for`` runs on
std::thread (``std_threads/``): what is checked is that chunks of one parallel loop do not conflict,
with each other or with what their caller does before and after; OpenMP's own barriers are taken on
trust.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest
from driver import HERE, drive, said

from wina.kernels import dispatch
from wina.kernels.cpu import build
from wina.kernels.ops import OPERATORS

# Each compiles all kernels, instrumented: some three minutes of one processor that is left alone.
pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]
COMMON = ("-O1", "-g1", "-fno-omit-frame-pointer")  # -g1: lines are all that reports name


@dataclass(frozen=True)
class Sanitizer:
    """How a library is built for a sanitizer, and what has to be loaded before Python.

    Attributes:
        planted: function of ``planted.cpp`` → words of the report that it has to cause.
    """

    flags: tuple[str, ...]
    runtimes: tuple[str, ...]
    environment: dict[str, str]
    planted: dict[str, str]


SANITIZERS = {
    "address and undefined": Sanitizer(
        ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
        ("libasan.so", "libubsan.so"),
        # Python and torch free little at exit.
        {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"},
        {"plant_overflow": "heap-buffer-overflow", "plant_undefined": "signed integer overflow"},
    ),
    "thread": Sanitizer(
        ("-fsanitize=thread", "-fno-openmp", f"-I{HERE / 'std_threads'}"),
        ("libtsan.so",),
        {"TSAN_OPTIONS": "ignore_noninstrumented_modules=1 halt_on_error=1 exitcode=66"},
        {"plant_race": "data race"},
    ),
}


def runtime(compiler: str, name: str) -> str:
    """Path of a library that comes with the compiler; skips where it does not."""
    answer = subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = Path(answer.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"{compiler} comes without {name}")
    return str(path.resolve())


@pytest.mark.parametrize("name", SANITIZERS)
def test_every_operator_is_clean_and_planted_mistakes_are_found(name: str, tmp_path: Path) -> None:
    sanitizer = SANITIZERS[name]
    compiler = build._compiler()
    if compiler is None or not build._is_gcc(compiler):
        pytest.skip("needs GCC")
    # libstdc++ too: AddressSanitizer looks for what throws exceptions when it starts.
    preload = [runtime(compiler, file) for file in (*sanitizer.runtimes, "libstdc++.so.6")]
    library = tmp_path / "kernels.so"
    build.build_library(
        compiler,
        library,
        [*build.SOURCES, HERE / "planted.cpp"],
        [*COMMON, *sanitizer.flags],
    )
    environment = {**sanitizer.environment, "LD_PRELOAD": ":".join(preload)}

    def run(*arguments: object):
        return drive("--library", library, *arguments, **environment)

    for function, words in sanitizer.planted.items():
        answer = run("--calls", 0, "--plant", function)
        assert answer.returncode != 0
        assert words in answer.stderr, answer.stderr[-4000:]
    found = said(run("--calls", 60, "--threads", 4))
    assert dispatch.backends()
    assert set(found["native"]) == set(OPERATORS)
    assert set(found["calls"]) == set(OPERATORS)
