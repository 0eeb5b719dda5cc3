"""Random calls of every declared operator, in a process of their own: ``--help`` says how.

Arguments are made from the names of an operator's parameters, so a new operator that speaks the
same language is called without a change here, and one with a new word stops the run. A decode step
wants a program (``programs.py``).

The process is told where tensors lie (``--edge``: against an inaccessible page) and which library
serves (``--library``: one that a sanitizer watches). What goes wrong is for those to see; results
are compared with the definitions only roughly.
"""

from __future__ import annotations

import argparse
import ctypes
import inspect
import json
import math
import os
import random
import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from programs import program_of
from torch import Tensor

from wina.kernels import cpu, dispatch, reference
from wina.kernels.ops import OPERATORS, Operator
from wina.kernels.quantization import FORMATS, format_of, scales_of

EDGES = {"end": 1, "start": 2}
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
SPECIAL = (math.nan, math.inf, -math.inf, -0.0, 1e-41, 3e4, -1e4)
THRESHOLDS = (-1.0, 0.0, -0.0, 1e-41, math.inf, math.nan)


@dataclass
class Draw:
    """The sizes of one call and what is random in it."""

    rng: random.Random
    dtype: torch.dtype
    T: int
    K: int
    N: int
    bits: int
    special: bool

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(*shape).to(self.dtype)

    def x(self) -> Tensor:
        x = self.normal(self.T, self.K)
        if self.special:
            x.view(-1)[self.rng.randrange(x.numel())] = self.rng.choice(SPECIAL)
        way = self.rng.randrange(5)
        if way == 0:  # every other column of a wider matrix, its last element the last of all
            wide = self.normal(self.T, 2 * self.K)
            wide[:, 1::2] = x
            return wide[:, 1::2]
        if way == 1:
            return x.t().contiguous().t()
        if way == 2 and self.T == 1:
            return x[0]
        return x

    def leading(self, x: Tensor) -> tuple[int, ...]:
        return tuple(x.shape[:-1])

    def integers(self, rows: int, columns: int) -> tuple[Tensor, Tensor]:
        """Packed bytes and scales of a weight, the padding of its rows filled as well."""
        width = format_of(self.bits).row_bytes(columns)
        packed = torch.randint(-127, 128, (rows, width), dtype=torch.int8)
        scales = torch.randn(rows, scales_of(columns)) / 2**self.bits / math.sqrt(self.K)
        return packed, scales.to(torch.bfloat16)

    def threshold(self) -> Tensor:
        if self.rng.random() < 0.3:
            return torch.full((self.K,), self.rng.choice(THRESHOLDS))
        threshold = torch.rand(self.K) * self.rng.choice((0.1, 1.0, 3.0))
        if self.special:
            threshold[self.rng.randrange(self.K)] = self.rng.choice(THRESHOLDS)
        return threshold

    def often(self, make: Callable[[], Any]) -> Any:
        return make() if self.rng.random() < 0.6 else None


def arguments_of(operator: Operator, draw: Draw) -> dict[str, Any]:
    """Random arguments for an operator, made from its parameters' names."""
    parameters = inspect.signature(operator.definition).parameters
    names = list(parameters)
    integers = "bits" in names
    x = draw.x()
    # Weights are K-major but for the operators whose name says that they read rows.
    shape = (draw.N, draw.K) if "_rows" in operator.name else (draw.K, draw.N)
    made: dict[str, Any] = {"x": x, "columns": shape[1], "bits": draw.bits}
    widths = [draw.N, 1, max(1, draw.N // 3)][: draw.rng.randint(1, 3)]

    def bias() -> Tensor:
        return draw.normal(draw.N)

    def scale() -> Tensor:
        return torch.rand(draw.leading(x)) * 2

    def one(name: str) -> Any:
        if name in ("packed", "gate", "up") and integers:
            packed, scales = draw.integers(*shape)
            made["scales" if name == "packed" else f"{name}_scales"] = scales
            return packed
        if name in ("weight", "gate", "up"):
            return draw.normal(*shape) / math.sqrt(draw.K)
        if name == "weights":
            return [draw.normal(draw.K, N) / math.sqrt(draw.K) for N in widths]
        if name == "thresholds":
            return [draw.threshold() for _ in widths]
        if name == "biases":
            return [draw.often(lambda N=N: draw.normal(N)) for N in widths]  # type: ignore[misc]
        if name == "scales":
            return [draw.often(scale) for _ in widths]
        if name.endswith("threshold"):
            return draw.threshold()
        if name.endswith("bias"):
            return draw.often(bias)
        if name.endswith("scale"):
            needed = parameters[name].default is inspect.Parameter.empty
            return scale() if needed else draw.often(scale)
        if name == "residual":
            return draw.often(lambda: draw.normal(*draw.leading(x), draw.N))
        if name == "activation":
            return draw.rng.choice(list(reference.ACTIVATIONS))
        if name == "gradient":
            return draw.normal(*x.shape)
        if name == "constants":
            return torch.rand(draw.K) * draw.rng.choice((0.0, 1.0, 3.0))
        if name == "cutoffs":
            return torch.rand(draw.rng.randint(0, 20)).sort().values * 2 - 0.1
        if name == "width":
            return 0.3
        if name == "dropped":
            return draw.rng.randint(1, draw.K - 1)
        if name == "probe":
            return torch.randn(draw.K + 1) / math.sqrt(draw.K)
        if name == "limit":
            return draw.rng.choice((0.1, 0.5, 20.0))
        if name == "state":
            tokens = math.prod(draw.leading(x))
            return torch.rand(draw.rng.choice([n for n in (1, 2, tokens) if tokens % n == 0])) - 0.5
        if name == "sparsity":
            return draw.rng.choice((0.0, 0.3, 1.0))
        if name == "rate":
            return (
                1e-3  # a channel at the edge of a cut-off may be dropped by one and not the other
            )
        if name == "counted":
            return draw.often(lambda: torch.rand(draw.leading(x)) < 0.5)
        raise SystemExit(
            f"wina::{operator.name} has a parameter {name!r} that tests/native/operator_calls.py "
            "cannot make: teach it"
        )

    for name in names:
        if name not in made:
            made[name] = one(name)
    return {name: made[name] for name in names}


def random_draw(rng: random.Random) -> Draw:
    """Sizes that end anywhere in a vector, a tile and a cache line."""
    small, odd = rng.randint(1, 40), 2 * rng.randint(20, 150) + 1
    long = 4096 if rng.random() < 0.1 else 256
    return Draw(
        rng=rng,
        dtype=rng.choice(DTYPES[:3] if rng.random() < 0.95 else DTYPES),
        T=rng.choice((1, 1, 1, 2, 3, 4, 5, 8, 16, 17, 33, 130)),
        K=1 + rng.choice((small, odd // 2, odd)),
        N=rng.choice((small, odd, odd - 1, rng.randint(1, 8) * 64, long + small)),
        bits=rng.choice([form.bits for form in FORMATS.values()]),
        special=rng.random() < 0.3,
    )


def compare(operator: Operator, arguments: Mapping[str, Any], got: Any, dtype: torch.dtype) -> None:
    """Stop the run unless a result is roughly what the definition gives in float64."""

    def exact(name: str, value: Any) -> Any:
        if operator.name == "decode_step":  # a list of constants mixes what must stay float32
            return value
        if isinstance(value, list):
            return [exact(name, one) for one in value]
        # Thresholds, their factors and probes are float32 by definition; so are integers' scales.
        if torch.is_tensor(value) and value.dtype == dtype and "scale" not in name:
            return value if "threshold" in name or name == "probe" else value.double()
        return value

    want = operator.definition(**{name: exact(name, v) for name, v in arguments.items()})
    allowed = 1e-4 if torch.finfo(dtype).eps < 1e-6 else 0.05
    as_lists = (list(r) if isinstance(r, (list, tuple)) else [r] for r in (got, want))
    for one, other in zip(*as_lists, strict=True):
        if one.shape != other.shape:
            raise SystemExit(f"{operator.name}: shape {one.shape}, expected {other.shape}")
        one, other = one.double(), other.double()
        largest = float(other.abs().max()) if other.numel() else 0.0
        if not torch.allclose(one, other, rtol=0, atol=allowed * (1 + largest)):
            error = float((one - other).abs().max())
            raise SystemExit(f"{operator.name}: off by {error} at {describe(arguments)}")


def describe(arguments: Mapping[str, Any]) -> str:
    """Arguments in short."""
    shown = {
        name: f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else value
        for name, value in arguments.items()
        if not isinstance(value, list)
    }
    return str(shown)


def copied(value: Any) -> Any:
    """A copy of an argument that a call writes to."""
    if isinstance(value, list):
        return [copied(one) for one in value]
    return value.clone() if torch.is_tensor(value) else value


def run(calls: int, seed: int, threads: int) -> dict[str, int]:
    """Call every operator ``calls`` times; operator → calls made."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for name in OPERATORS:
        operator = OPERATORS[name]
        call = getattr(torch.ops.wina, name).default
        for _ in range(calls):
            torch.set_num_threads(rng.randint(1, threads))
            draw = random_draw(rng)
            if name == "decode_step":
                draw.dtype = torch.float32 if draw.dtype == torch.float64 else draw.dtype
                arguments = program_of(draw)
            else:
                arguments = arguments_of(operator, draw)
            before = {name: copied(arguments[name]) for name in operator.mutates}
            got = call(**arguments)
            arguments = {**arguments, **before}
            if not draw.special:
                compare(operator, arguments, got, draw.dtype)
    return dict.fromkeys(OPERATORS, calls)


def signal_of_reading_outside(edge: str) -> int:
    """The signal that ends a child process which reads one byte outside of a tensor."""
    tensor = torch.ones(5)
    address = tensor.data_ptr() + (tensor.nbytes if edge == "end" else -1)
    child = os.fork()
    if child == 0:
        ctypes.c_char.from_address(address).value  # noqa: B018  # reads
        os._exit(0)
    return os.WTERMSIG(os.waitpid(child, 0)[1])


def main() -> None:
    """Print one JSON line: calls made, tensors placed at an edge, operators with native kernels."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=100, help="of each operator and edge")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2, help="most threads of a call")
    parser.add_argument("--library", help="shared object with the kernels; default: the package's")
    parser.add_argument("--edge", choices=EDGES, action="append", default=[])
    parser.add_argument("--guard", help="shared object of guard_pages.cpp; needed for --edge")
    parser.add_argument("--plant", help="call this function of the library first")
    asked = parser.parse_args()
    assert dispatch.backends()  # whatever declares operators is imported
    if asked.library is None:
        if (reason := cpu.load()) is not None:
            raise SystemExit(reason)
    else:
        torch.ops.load_library(asked.library)
    if asked.plant:
        ctypes.CDLL(asked.library)[asked.plant]()
    has_native = torch._C._dispatch_has_kernel_for_dispatch_key
    said: dict[str, Any] = {
        "native": [name for name in OPERATORS if has_native(f"wina::{name}", "CPU")]
    }
    if asked.edge:
        guard = ctypes.CDLL(asked.guard)
        guard.guarded_tensors.restype = ctypes.c_int64
        for edge in asked.edge:
            guard.guard_tensors(EDGES[edge])
            said[f"outside the {edge}"] = signal.Signals(signal_of_reading_outside(edge)).name
            said["calls"] = run(asked.calls, asked.seed, asked.threads)
        guard.guard_tensors(0)
        said["guarded"] = guard.guarded_tensors()
    else:
        said["calls"] = run(asked.calls, asked.seed, asked.threads)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
