"""What the compiler makes of the kernels, without a card.

``python -m wina.kernels.triton.compiled`` prints the table.

Compiles a kernel ahead of time for a compute capability and reads, off PTX and cubin, registers,
spills, shared memory and the width of weight loads. It knows nothing of running kernels.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from wina.kernels import reference
from wina.kernels.triton import gate_up, group, selection, sparse_linear
from wina.kernels.triton.config import Launch, shipped

TARGETS = (80, 86, 89, 90, 100)
# Largest shared memory of one block in bytes (CUDA C++ programming guide, "Technical
# specifications per compute capability"), and of one multiprocessor.
SHARED_PER_BLOCK = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10}
SHARED_PER_SM = {80: 164 << 10, 86: 100 << 10, 89: 100 << 10, 90: 228 << 10, 100: 228 << 10}
THREADS_PER_SM = {80: 2048, 86: 1536, 89: 1536, 90: 2048, 100: 2048}
REGISTERS_PER_SM = 65536
_POINTERS = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4, "int8": 1, "int4": 0.5}
# Weights stored as integers, loaded as words: BITS.
_INTEGERS = {"int8": 8, "int4": 4}
_WEIGHTS = ("w_ptr", "gate_ptr", "up_ptr")
_SCALES = ("s_ptr", "gate_s_ptr", "up_s_ptr")
_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Kernel:
    """A kernel as it is compiled here.

    Attributes:
        function: the Triton function.
        loops: loops over a weight in its binary, 0 for a kernel that reads none.
        optional: pointers that a call may leave out.
    """

    function: Any
    loops: int
    optional: tuple[str, ...] = ()


KERNELS = {
    "sparse_linear": Kernel(
        sparse_linear.sparse_linear_kernel, 1, ("bias_ptr", "scale_ptr", "residual_ptr")
    ),
    "sparse_gate_up": Kernel(
        gate_up.gate_up_kernel,
        2,
        ("gate_bias_ptr", "up_bias_ptr", "gate_scale_ptr", "up_scale_ptr"),
    ),
    "sparse_group": Kernel(
        group.sparse_group_kernel,
        1,
        tuple(f"{what}{slot}_ptr" for what in ("bias", "scale") for slot in range(group.SLOTS)),
    ),
    "add_splits": Kernel(sparse_linear.add_splits_kernel, 0, ("bias_ptr", "residual_ptr")),
    "add_group_splits": Kernel(
        group.add_group_splits_kernel, 0, tuple(f"bias{slot}_ptr" for slot in range(group.SLOTS))
    ),
    "topk_scale": Kernel(selection.topk_scale_kernel, 0),
    "mean_scale": Kernel(selection.mean_scale_kernel, 0),
    "probe_scale": Kernel(selection.probe_scale_kernel, 0),
    "tracked_scale": Kernel(selection.tracked_scale_kernel, 0, ("own_ptr",)),
}


@dataclass(frozen=True)
class Variant:
    """One compilation: a kernel's configuration with its optional arguments."""

    kernel: str
    dtype: str
    many: bool
    launch: Launch
    extras: bool = False
    activation: str = "silu"
    align: int = 16
    splits: int = 1
    weights: str | None = None

    @property
    def itemsize(self) -> float:
        """Bytes of one weight; weights are of x's ``dtype`` unless ``weights`` names another."""
        return _BYTES[self.weights or self.dtype]

    def __str__(self) -> str:
        options = (
            self.kernel, self.weights or "", self.dtype, "many" if self.many else "one",
            f"{self.launch.row_bytes}Bx{self.launch.block_k}",
            f"w{self.launch.warps}", f"s{self.launch.stages}",
            self.activation if "gate" in self.kernel else "", "extras" if self.extras else "",
            "" if self.splits == 1 else f"splits{self.splits}",
            "" if self.align == 16 else f"align{self.align}",
        )  # fmt: skip
        return " ".join(option for option in options if option)


@dataclass(frozen=True)
class Resources:
    """What one compiled variant uses.

    Attributes:
        registers: of a thread.
        spilled: bytes of local memory and stack of a thread.
        spills_in_loops: loads and stores of local memory inside of loops.
        shared: bytes of shared memory of a program.
        loads: width in bytes of a thread's load → how many there are; weights are 16 wide, x
            and thresholds of one token 4 or narrower (x of several tokens is 16 wide as well).
        unmasked: 16-byte copies that carry no source size, hence read rows that nobody keeps.
        instructions: machine instructions of the innermost loop's body.
        resident: programs that fit on a multiprocessor.
    """

    registers: int
    spilled: int
    spills_in_loops: int
    shared: int
    loads: dict[int, int]
    unmasked: int
    instructions: int
    resident: int


def variants(thorough: bool) -> Iterator[Variant]:
    """Every shipped configuration with plain arguments; with ``thorough``, all arguments too.

    Activations, which stand outside of the loop, take turns on one configuration of bfloat16.
    """
    for dtype in _POINTERS:
        for weights in (None, *_INTEGERS):
            for many in (False, True):
                yield from _products(dtype, weights, many, thorough)
        sums = Launch(
            int(sparse_linear.ADD_SPLITS_BLOCK_N * _BYTES[dtype]),
            1,
            sparse_linear.ADD_SPLITS_WARPS,
            1,
        )
        for kernel in ("add_splits", "add_group_splits"):
            yield Variant(kernel, dtype, False, sums, extras=True, splits=8)
        every = thorough and dtype == "bfloat16"
        for channels in (576, 4096, selection.MAX_CHANNELS)[0 if every else 2 :]:
            _, block, warps = selection.tile_of(channels)
            for kernel in ("topk_scale", "mean_scale", "probe_scale", "tracked_scale"):
                launch, extras = Launch(0, block, warps, 1), kernel == "tracked_scale"
                yield Variant(kernel, dtype, True, launch, extras=extras)


def _products(dtype: str, weights: str | None, many: bool, thorough: bool) -> Iterator[Variant]:
    itemsize = _BYTES[weights or dtype]
    for launch in shipped("sparse_linear", many, itemsize):
        for kernel in ("sparse_linear", "sparse_group")[: None if weights is None else 1]:
            plain = Variant(kernel, dtype, many, launch, weights=weights)
            yield plain
            if thorough:
                yield replace(plain, extras=True)
                yield replace(plain, splits=4)
    for i, launch in enumerate(shipped("sparse_gate_up", many, itemsize)):
        plain = Variant("sparse_gate_up", dtype, many, launch, weights=weights)
        yield plain
        if thorough:
            turns = None if (dtype, weights, i) == ("bfloat16", None, 0) else 1
            for activation in list(reference.ACTIVATIONS)[:turns]:
                yield replace(plain, extras=True, activation=activation)


def _arguments(variant: Variant) -> tuple[Any, dict[str, Any], dict[str, str]]:
    """Kernel, constants and the types of the other arguments."""
    pointer, launch = _POINTERS[variant.dtype], variant.launch
    kernel = KERNELS[variant.kernel]
    names = kernel.function.arg_names
    bits = _INTEGERS.get(variant.weights or "", 0)
    constants: dict[str, Any] = {
        "ALIGN": variant.align,
        "K_ALIGN": variant.align,
        "SPLITS": variant.splits,
        "ACTIVATION": variant.activation,
        "BLOCK_T": launch.block_t(2 if variant.many else 1),
        "BLOCK_K": launch.block_k,
        "BLOCK_N": launch.block_n(variant.itemsize),
        "STAGES": launch.stages,
        "BITS": bits,
        "BLOCK": launch.block_k,
    }
    if variant.splits == 1:
        constants["partial_ptr"] = None
    if not variant.extras:
        constants.update(dict.fromkeys(kernel.optional))
    if not bits:
        constants.update(dict.fromkeys(_SCALES))
    constants = {name: value for name, value in constants.items() if name in names}
    types = {}
    for name in names:
        if name in constants:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            integer = name in _SCALES or (bits and name in _WEIGHTS)
            float32 = re.search(r"(^|_)t\d?_ptr|scale|partial|probe|state|own", name)
            types[name] = "*i32" if integer else "*fp32" if float32 else pointer
        else:
            types[name] = "fp32" if name in ("limit", "sparsity", "rate") else "i32"
    return kernel.function, constants, types


@cache
def compile_variant(variant: Variant, capability: int) -> Resources:
    """Compile for ``sm_<capability>`` and read off what the binary uses."""
    kernel, constants, types = _arguments(variant)
    # The allocator of torch aligns tensors to far more than 16 bytes.
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(kernel.arg_names)
        if types[name].startswith("*")
    }
    launch = variant.launch
    binary = triton.compile(
        ASTSource(kernel, types, constants, aligned),
        target=GPUTarget("cuda", capability, 32),
        options={
            "num_warps": launch.warps,
            "num_stages": launch.stages,
            "enable_fp_fusion": True,
        },
    )
    registers, spilled, static = _usage(binary.asm["cubin"])
    shared = max(binary.metadata.shared, static)
    threads = 32 * launch.warps
    resident = min(
        THREADS_PER_SM[capability] // threads,
        REGISTERS_PER_SM // (threads * max(8, -(-registers // 8) * 8)),
        SHARED_PER_SM[capability] // max(1, shared + 1024),  # 1 KiB of each block is reserved
    )
    loops = loops_of(binary.asm["cubin"])
    return Resources(
        registers,
        spilled,
        sum(spills for _, spills in loops),
        shared,
        global_loads(binary.asm["ptx"]),
        unmasked_copies(binary.asm["ptx"]),
        max((instructions for instructions, _ in loops), default=0),
        resident,
    )


def global_loads(ptx: str) -> dict[int, int]:
    """Width in bytes → number, of the loads and asynchronous copies from global memory."""
    found: Counter[int] = Counter()
    for line in ptx.splitlines():
        copy = re.search(r"cp\.async\.c[ag]\.shared\.global.*?0x([0-9a-f]+)\s*,", line)
        plain = re.search(r"ld\.global\S*?(?:\.v(\d))?\.b(\d+)\s", line)
        if copy:
            found[int(copy.group(1), 16)] += 1
        elif plain:
            found[int(plain.group(1) or 1) * int(plain.group(2)) // 8] += 1
    return dict(found)


def unmasked_copies(ptx: str) -> int:
    """16-byte asynchronous copies of a fixed source size; a masked one is told 0 or 16."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global.*?0x10\s*(,\s*%r\d+)?", ptx)
    return sum(not source_size for source_size in copies)


def wide_weight_loads(variant: Variant) -> int:
    """16-byte loads of a thread if all weights are loaded so, prologue and loop."""
    launch = variant.launch
    tile = launch.row_bytes * launch.block_k
    return KERNELS[variant.kernel].loops * launch.stages * tile // (16 * 32 * launch.warps)


def _tool(name: str, cubin: bytes, *arguments: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(_TOOLS / name), *arguments, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _usage(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack and local memory, bytes of static shared memory."""
    text = _tool("cuobjdump", cubin, "--dump-resource-usage")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", text)
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resource usage:\n{text}")
    registers, stack, shared, local = map(int, found.groups())
    return registers, stack + local, shared


def loops_of(cubin: bytes) -> list[tuple[int, int]]:
    """(instructions, loads and stores of local memory) of each loop: label to branch back."""
    labels: dict[str, int] = {}
    local: list[bool] = []
    found = []
    for line in _tool("nvdisasm", cubin).splitlines():
        label = re.match(r"\s*(\.L_x_\d+):", line)
        if label:
            labels[label.group(1)] = len(local)
        elif re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+\S", line):
            local.append(re.search(r"\b(STL|LDL)\b", line) is not None)
            back = re.search(r"BRA(?:\.\S+)?\s.*`\((\.L_x_\d+)\)", line)
            # A branch to itself pads the end of every kernel.
            if back and back.group(1) in labels and len(local) - labels[back.group(1)] > 1:
                body = local[labels[back.group(1)] :]
                found.append((len(body), sum(body)))
    return found


def main() -> None:
    """Print the table of registers, shared memory and load widths."""
    from rich.console import Console
    from rich.table import Table

    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--targets", type=int, nargs="+", default=list(TARGETS), choices=TARGETS)
    parser.add_argument("--all", action="store_true", help="every combination of arguments")
    asked = parser.parse_args()
    table = Table(title="compiled kernels (no card involved)")
    for column in (
        "variant", "sm", "registers", "spilled", "shared B", "loads (bytes: number)",
        "loop", "programs/SM", "KiB in flight/SM",
    ):  # fmt: skip
        table.add_column(column, justify="left" if column == "variant" else "right")
    for variant in variants(asked.all):
        for target in asked.targets:
            use = compile_variant(variant, target)
            loads = ", ".join(f"{width}: {n}" for width, n in sorted(use.loads.items()))
            in_flight = use.resident * variant.launch.bytes_in_flight() >> 10
            table.add_row(
                str(variant), str(target), str(use.registers), str(use.spilled), str(use.shared),
                loads, str(use.instructions), str(use.resident), str(in_flight),
            )  # fmt: skip
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
