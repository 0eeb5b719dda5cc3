"""Builds the native CPU operators on first use and loads them into torch.

``load()`` is the only entry point. It knows the compiler, the flags, the cache folder and how to
share it between processes; it knows nothing of the operators' schemas or of when to use them.
Tests take :func:`build_library` to build what the cache never sees.

The compiler is driven directly rather than through ``torch.utils.cpp_extension.load``: the shared
object must appear in the cache in one atomic rename, and must be linked *without* ``-fopenmp``, so
that it uses the OpenMP runtime torch has already loaded instead of mapping a second one.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from wina.cache import cache_root
from wina.progress import progress

__all__ = ["build_library", "load"]

FOLDER = Path(__file__).resolve().parent
SOURCES = tuple(sorted(FOLDER.glob("*.cpp")))
HEADERS = tuple(sorted(FOLDER.glob("*.h")))
HEADER = FOLDER / "common.h"  # that every source includes
COMPILE_FLAGS = (
    "-std=c++17",
    "-O3",
    "-ffp-contract=fast",
    "-fno-math-errno",
    "-fPIC",
    "-fvisibility=hidden",
    "-w",
)
TORCH = Path(torch.__file__).resolve().parent
INCLUDE_PATHS = (str(TORCH / "include"), str(TORCH / "include/torch/csrc/api/include"))
LINK_FLAGS = ("-shared", "-ltorch_cpu", "-lc10")
TYPICAL_SECONDS = 50
COMPILE_TIMEOUT = 600
COMPILER_LINES = 15
OPERATORS = (
    "sparse_linear",
    "sparse_gate_up",
    "sparse_group",
    "sparse_linear_quantized",
    "sparse_gate_up_quantized",
    "dense_linear_rows",
    "dense_linear_rows_quantized",
    "keep_mask",
    "mask_inputs",
    "topk_scale",
    "mean_scale",
    "probe_scale",
    "tracked_scale",
    "count_scores",
    "kept_sums",
    "mask_backward",
    "decode_step",
)

_log = logging.getLogger("wina")
_lock = threading.Lock()
_done = False
_reason: str | None = None


class _BuildError(Exception):
    """Why there are no native operators, in words for the user."""


def load() -> str | None:
    """Make the native CPU operators available, building them if this machine has not yet.

    Returns None when they are registered, else the reason why not. The answer is computed once
    per process; later calls return it at once. Reads ``CXX``, ``WINA_CACHE_DIR``,
    ``XDG_CACHE_HOME`` and ``HOME`` when called, and never raises for a missing compiler, a failed
    build, an unwritable cache or a corrupt cached file.
    """
    global _done, _reason
    with _lock:
        if not _done:
            try:
                _reason = _load()
            except _BuildError as error:
                _reason = str(error)
            except OSError as error:
                _reason = f"native CPU kernels: {error}"
            if _reason is not None:
                _log.info("%s", _reason)
            _done = True
        return _reason


def _load() -> str | None:
    if _registered():
        return None
    if sys.platform == "win32":
        return "native CPU kernels: Windows is not supported"
    source = b"\0".join(path.read_bytes() for path in (*HEADERS, *SOURCES))
    compiler = _compiler()
    key = _key(source)
    folder = _cache_folder()
    for cached in sorted(folder.glob(f"{key}-*.so")) if folder else []:
        # A truncated file would not fail in dlopen, it would crash: the name carries its digest.
        intact = cached.stem == f"{key}-{_digest(cached.read_bytes())}"
        failure = _try_library(cached) if intact else "its contents do not match its name"
        if failure is None:
            return None
        _log.info("rebuilding %s, which does not load: %s", cached, failure)
        cached.unlink(missing_ok=True)
    if compiler is None:
        return "native CPU kernels: no C++ compiler found (looked for $CXX, g++, c++, clang++)"
    # Inside the cache folder, so that the rename below stays on one file system.
    with tempfile.TemporaryDirectory(prefix="build-", dir=folder) as private:
        built = Path(private) / "wina.so"
        with _announced():
            build_library(compiler, built)
        if folder is not None:
            kept = folder / f"{key}-{_digest(built.read_bytes())}.so"
            try:
                built = built.replace(kept)
            except OSError as error:  # the private copy still serves this process
                _log.info("could not keep %s: %s", kept, error)
        failure = _try_library(built)
    return None if failure is None else f"native CPU kernels: built, but not loadable: {failure}"


def _registered() -> bool:
    has_operator = torch._C._dispatch_has_kernel
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    names = [f"wina::{op}" for op in OPERATORS]
    return all(has_operator(name) and has_kernel(name, "CPU") for name in names)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:24]


def _try_library(path: Path) -> str | None:
    """Load a shared object; None on success, else what the loader said."""
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None if _registered() else f"{path} registered nothing"


def _compiler() -> str | None:
    """Absolute path of the first C++ compiler, GCC first: torch's wheels carry GCC's OpenMP."""
    for candidate in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        found = shutil.which(candidate) if candidate else None
        # A relative PATH entry would let the current directory choose the compiler.
        if found and Path(found).is_absolute():
            return found
    return None


def _machine_flags() -> tuple[str, ...]:
    """Compile for this machine: the key of the cache includes it."""
    machine = platform.machine().lower()
    if machine in ("x86_64", "amd64", "i686"):
        return ("-march=native",)
    return ("-mcpu=native",) if machine.startswith(("aarch64", "arm", "ppc")) else ()


def _is_gcc(compiler: str) -> bool:
    answer = _run([compiler, "--version"], timeout=30)
    return answer.returncode == 0 and "Free Software Foundation" in answer.stdout


def _openmp_flags(compiler: str) -> tuple[str, ...]:
    """``-fopenmp`` where its symbols are those of the runtime torch uses, else nothing.

    Without it ``at::parallel_for`` runs serially: correct, on one thread.
    """
    return ("-fopenmp",) if sys.platform == "linux" and _is_gcc(compiler) else ()


def _key(source: bytes) -> str:
    parts = (
        repr((COMPILE_FLAGS, LINK_FLAGS)),
        str(torch.__version__),
        str(torch._C._GLIBCXX_USE_CXX11_ABI),
        repr(_machine_flags()),
        sys.version,
        platform.platform(),
        _cpu(),
    )
    return _digest(b"\0".join([source, *(part.encode() for part in parts)]))


def _cpu() -> str:
    """What ``-march=native`` depends on: the CPU's model and instruction sets."""
    wanted = ("model name", "flags", "Features", "CPU implementer", "CPU part", "isa")
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))


def _cache_folder() -> Path | None:
    """The per-user cache, created if need be; None if it cannot be used safely."""
    root = cache_root()
    if root is None:
        _log.info("no cache folder: building in a temporary folder")
        return None
    folder = root / "cpu"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        status = folder.stat()
    except OSError as error:
        _log.info("cache folder %s: %s; building in a temporary folder", folder, error)
        return None
    # Code is loaded from here: nobody else may be able to put a file into it.
    if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        _log.info("cache folder %s is open to other users: building in a temporary folder", folder)
        return None
    if not os.access(folder, os.W_OK | os.X_OK):
        _log.info("cache folder %s is not writable: building in a temporary folder", folder)
        return None
    return folder


def build_library(
    compiler: str, output: Path, sources: Sequence[Path] = SOURCES, extra: Sequence[str] = ()
) -> None:
    """Compile sources against torch into a shared object: the kernels, unless told otherwise.

    Args:
        compiler: absolute path.
        output: the shared object; objects are made, and removed, beside it.
        sources: C++ files of different names.
        extra: further flags of every step, last. A library made with any is for whoever asked for
            it: the cache's key does not know them, so it must not go there.
    """
    includes = [word for path in INCLUDE_PATHS for word in ("-isystem", path)]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    flags = [*COMPILE_FLAGS, *_machine_flags(), *_openmp_flags(compiler), abi, *includes, *extra]
    libraries = str(TORCH / "lib")
    later = ["-undefined", "dynamic_lookup"] if sys.platform == "darwin" else []
    objects = [output.with_name(f"{source.stem}.o") for source in sources]
    headers: list[Path] = []

    def run(command: list[str]) -> None:
        answer = _run(command, timeout=COMPILE_TIMEOUT, cwd=str(output.parent))
        if answer.returncode != 0:
            said = (answer.stderr or answer.stdout).strip().splitlines()[-COMPILER_LINES:]
            lines = "\n".join(said)
            raise _BuildError(f"native CPU kernels: {compiler} failed:\n{lines}")

    # Torch's headers take longer than what they are included for. GCC finds what is precompiled in
    # the folder where it runs, and the header itself where that should not fit.
    if len(sources) > 1 and _is_gcc(compiler):
        headers.append(output.with_name(f"{HEADER.name}.gch"))
        run([compiler, *flags, "-x", "c++-header", str(HEADER), "-o", str(headers[0])])
        flags += ["-include", HEADER.name, "-I", str(FOLDER)]

    def compile_one(source: Path, target: Path) -> None:
        run([compiler, *flags, "-c", str(source), "-o", str(target)])

    # No more at a time than there are processors: all would take longer, up to their time limit.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, sources, objects))
    run([compiler, *map(str, objects), "-o", str(output), f"-L{libraries}", *LINK_FLAGS,
         *later, *extra])  # fmt: skip
    for made in (*objects, *headers):
        made.unlink()


def _run(
    command: list[str], *, timeout: float, cwd: str | None = None
) -> subprocess.CompletedProcess[str]:
    # A group of its own: a compiler driver's children must not outlive it.
    with subprocess.Popen(
        command,
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    ) as process:
        try:
            out, err = process.communicate(timeout=timeout)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if isinstance(error, subprocess.TimeoutExpired):
                raise _BuildError(
                    f"native CPU kernels: {command[0]} took more than {timeout:.0f} s"
                ) from None
            raise
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@contextmanager
def _announced() -> Iterator[None]:
    """Say on stderr and in the log that a build is running."""
    message = f"building native CPU kernels (once, about {TYPICAL_SECONDS} s)"
    _log.info("%s ...", message)
    start = time.monotonic()
    with progress(message, 1):
        yield
    _log.info("built native CPU kernels in %.1f s", time.monotonic() - start)
