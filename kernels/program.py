"""A decode step as a program, and its definition in plain torch.

What one token does to a decoder is a short list of instructions over vectors. Written down once, it
runs in one operator call (``wina::decode_step``), so that no Python stands between two products.
Knows no models: :mod:`wina.decoding` writes programs.

An instruction is a row of integers: its number in :data:`INSTRUCTIONS`, the register it writes, and
an integer for each operand: the number of a register, constant, cache or float, or the integer
itself; −1 for an operand that is left out.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from wina.kernels import ops, quantized, reference
from wina.kernels.reference import ACTIVATIONS

ACTIVATION_NAMES = tuple(ACTIVATIONS)
REGISTER, CONSTANT, CACHE, NUMBER, INTEGER = "register", "constant", "cache", "number", "integer"


def rms_norm(x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
    """x/√(mean x² + eps)·(weight + offset) over every run of len(weight) elements of x [n·len].

    In float32, rounded once to the dtype of x. One run is a norm of hidden states, several are a
    norm of heads. Zhang and Sennrich, arXiv 1910.07467.
    """
    wide = x.float().view(-1, weight.shape[0])
    scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    return (wide * scale * (weight.float() + offset)).to(x.dtype).view(-1)


def rotate(x: Tensor, cos: Tensor | None, sin: Tensor | None) -> Tensor:
    """Rotary embedding of heads [H, D], the two halves of the first len(cos) elements turned."""
    if cos is None or sin is None:
        return x
    turned, rest = x[:, : cos.shape[0]], x[:, cos.shape[0] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.float() + torch.cat([-second, first], dim=-1) * sin.float()
    return torch.cat([turned, rest], dim=-1)


def attend(
    position: int,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """One token's attention over a static cache, to which its own key and value are written.

    Args:
        position: of the token, counted from 0.
        q: [heads·D], before the rotary embedding.
        k, v: [kv heads·D]; heads is a multiple of kv heads.
        keys, values: caches [kv heads, length, D], length > position; written at ``position``.
        cos, sin: tables [length, R] with R ≤ D, or None where a layer has no rotary embedding.
        scale: of the products q·k.
        softcap: c of c·tanh(q·k·scale/c), 0 for none.
        window: how many of the last tokens are seen, 0 for all.

    Returns:
        [heads·D] in the dtype of q; float32 inside.
    """
    kv_heads, _, D = keys.shape
    tables = [None if table is None else table[position] for table in (cos, sin)]
    keys[:, position] = rotate(k.float().view(kv_heads, D), *tables).to(keys.dtype)
    values[:, position] = v.view(kv_heads, D)
    first = max(0, position + 1 - window) if window else 0
    seen, said = (t[:, first : position + 1].float() for t in (keys, values))
    heads = rotate(q.float().view(-1, D), *tables).view(kv_heads, -1, D)
    scores = heads @ seen.transpose(1, 2) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    return (scores.softmax(-1) @ said).to(q.dtype).view(-1)


def _embed(token: int, table: Tensor, scale: float) -> Tensor:
    return (table[token].float() * scale).to(table.dtype)


def _gate_up(x: Tensor, gate: Tensor, up: Tensor, gate_threshold: Tensor, up_threshold: Tensor,
             activation: int, *rest: Tensor | None) -> Tensor:  # fmt: skip
    name = ACTIVATION_NAMES[activation]
    return ops.sparse_gate_up(x, gate, up, gate_threshold, up_threshold, name, *rest)


def _gate_up_integers(*operands: Any) -> Tensor:
    before, activation, rest = operands[:9], operands[9], operands[10:]
    return quantized.gate_up_operator(*before, ACTIVATION_NAMES[activation], *rest)


def _group_of_three(x: Tensor, *rest: Tensor | None) -> list[Tensor]:
    columns = [list(rest[i::4]) for i in range(4)]
    return ops.sparse_group(x, *columns)


def _gated(gate: Tensor, up: Tensor, activation: int) -> Tensor:
    wide = ACTIVATIONS[ACTIVATION_NAMES[activation]](gate.float()) * up.float()
    return wide.to(gate.dtype)


def _slice(x: Tensor, start: int, length: int) -> Tensor:
    return x[start : start + length]


def _repeat(x: Tensor, times: int) -> Tensor:
    return x.repeat(times)


def _add(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return (x.float() + factor * y.float()).to(x.dtype)


def _logits(x: Tensor, factor: float, softcap: float) -> Tensor:
    wide = x.float() * factor
    return softcap * torch.tanh(wide / softcap) if softcap else wide


@dataclass(frozen=True)
class Instruction:
    """What an instruction does.

    Attributes:
        definition: in plain torch, or the operator that it calls. A list goes to as many registers
            in a row.
        operands: the kind of each of its arguments.
        implicit: names of arguments that every step has (``token``, ``position``), passed first.
    """

    definition: Callable[..., Tensor | list[Tensor]]
    operands: tuple[str, ...]
    implicit: str | None = None


_SPARSE_TAIL = (CONSTANT, CONSTANT, REGISTER, REGISTER)  # threshold, bias, scale, residual
_GATE_UP_TAIL = (CONSTANT, CONSTANT, INTEGER, CONSTANT, CONSTANT, REGISTER, REGISTER)

# The order is the numbering that kernels/cpu/decode.cpp shares.
INSTRUCTIONS: dict[str, Instruction] = {
    "embed": Instruction(_embed, (CONSTANT, NUMBER), "token"),
    "rms_norm": Instruction(rms_norm, (REGISTER, CONSTANT, NUMBER, NUMBER)),
    # bias, threshold, scale, residual
    "dense": Instruction(
        lambda *a: ops.dense_linear_rows(*a),
        (REGISTER, CONSTANT, CONSTANT, CONSTANT, REGISTER, REGISTER),
    ),
    "sparse": Instruction(lambda *a: ops.sparse_linear(*a), (REGISTER, CONSTANT, *_SPARSE_TAIL)),
    "sparse_integers": Instruction(
        lambda *a: quantized.linear_operator(*a),
        (REGISTER, CONSTANT, CONSTANT, INTEGER, INTEGER, *_SPARSE_TAIL),
    ),
    "gate_up": Instruction(_gate_up, (REGISTER, CONSTANT, CONSTANT, *_GATE_UP_TAIL)),
    "gate_up_integers": Instruction(
        _gate_up_integers,
        (REGISTER, CONSTANT, CONSTANT, CONSTANT, CONSTANT, INTEGER, INTEGER, *_GATE_UP_TAIL),
    ),
    "gated": Instruction(_gated, (REGISTER, REGISTER, INTEGER)),
    "slice": Instruction(_slice, (REGISTER, INTEGER, INTEGER)),
    "attend": Instruction(
        attend,
        (REGISTER, REGISTER, REGISTER, CACHE, CACHE, CONSTANT, CONSTANT, NUMBER, NUMBER, INTEGER),
        "position",
    ),
    "add": Instruction(_add, (REGISTER, REGISTER, NUMBER)),
    "logits": Instruction(_logits, (REGISTER, NUMBER, NUMBER)),
    "mean_scale": Instruction(reference.mean_scale, (REGISTER,)),
    "topk_scale": Instruction(reference.topk_scale, (REGISTER, CONSTANT, INTEGER)),
    "group_of_three": Instruction(
        _group_of_three, (REGISTER, *3 * (CONSTANT, CONSTANT, CONSTANT, REGISTER))
    ),
    "dense_integers": Instruction(
        lambda *a: quantized.dense_rows_operator(*a),
        (REGISTER, CONSTANT, CONSTANT, INTEGER, INTEGER, CONSTANT),
    ),
    "probe_scale": Instruction(reference.probe_scale, (REGISTER, CONSTANT, NUMBER)),
    "repeat": Instruction(_repeat, (REGISTER, INTEGER)),
    "tracked_scale": Instruction(
        reference.tracked_scale, (REGISTER, CONSTANT, CACHE, NUMBER, NUMBER, REGISTER)
    ),
}
_TABLE = tuple(INSTRUCTIONS.values())


def decode_step(
    token: int,
    position: int,
    code: Tensor,
    numbers: Tensor,
    constants: Sequence[Tensor],
    caches: Sequence[Tensor],
    outputs: int,
    times: Tensor | None = None,
) -> Tensor:
    """Run a program for one token.

    Args:
        token: what ``embed`` looks up.
        position: of the token in its sequence.
        code: the instructions, int64 [n], see the module.
        numbers: floats that they use, float64.
        constants: weights, thresholds, tables.
        caches: what tokens leave behind: keys and values of every layer, [kv heads, length, D],
            written at ``position``, and states [1] of ``tracked_scale``.
        outputs: length of the result.
        times: seconds that each instruction took are added to it, float64 [instructions].

    Returns:
        The result of the last instruction, float32 [outputs].
    """
    registers: dict[int, Tensor] = {}
    floats = numbers.tolist()
    implicit = {"token": token, "position": position}
    fetch: dict[str, Callable[[int], Any]] = {
        REGISTER: registers.__getitem__,
        CONSTANT: constants.__getitem__,
        CACHE: caches.__getitem__,
        NUMBER: floats.__getitem__,
    }
    words = iter(code.tolist())
    out, done = -1, 0
    for number in words:
        start = time.perf_counter()
        instruction, out = _TABLE[number], next(words)
        arguments: list[Any] = [implicit[instruction.implicit]] if instruction.implicit else []
        for kind in instruction.operands:
            word = next(words)
            if kind == INTEGER:
                arguments.append(word)
            else:
                arguments.append(None if word < 0 else fetch[kind](word))
        result = instruction.definition(*arguments)
        for further, y in enumerate(result if isinstance(result, list) else [result]):
            registers[out + further] = y
        if times is not None:
            times[done] += time.perf_counter() - start
            done += 1
    return registers[out]


def _check(a: ops.Arguments) -> None:
    if a.code.dtype != torch.int64 or a.numbers.dtype != torch.float64:
        raise RuntimeError(
            f"code must be int64 and numbers float64, got {a.code.dtype} and {a.numbers.dtype}"
        )
    lengths = {cache.shape[1] for cache in a.caches if cache.dim() > 1}
    if lengths and not 0 <= a.position < min(lengths):
        raise RuntimeError(f"position {a.position} is outside caches of {min(lengths)} tokens")
    if a.times is not None and a.times.dtype != torch.float64:
        raise RuntimeError(f"times must be float64, got {a.times.dtype}")


step: Callable[..., Tensor] = ops.define(
    decode_step,
    check=_check,
    output=lambda a: a.code.new_empty(a.outputs, dtype=torch.float32),
    mutates=("caches", "times"),
)


def bind(
    code: Tensor,
    numbers: Tensor,
    constants: Sequence[Tensor],
    caches: Sequence[Tensor],
    outputs: int,
) -> Callable[[int, int, Tensor | None], Tensor]:
    """A native program with all but token, position and times given, arguments as of a step.

    A step would take hundreds of tensors out of Python lists again for each token.
    :func:`wina.kernels.cpu.load` must have succeeded.
    """
    bound = torch.classes.wina.BoundStep(code, numbers, list(constants), list(caches), outputs)
    run: Callable[[int, int, Tensor | None], Tensor] = bound.run
    return run


@dataclass(frozen=True)
class Cache:
    """The number of a cache, as an operand."""

    index: int


class Builder:
    """Writes a program down.

    Registers have names; writing one again frees what it held. Those named at the start lie in a
    row. Tensors become constants, floats numbers.
    """

    def __init__(self, registers: Sequence[str] = ()) -> None:
        self.code: list[int] = []
        self.numbers: list[float] = []
        self.constants: list[Tensor] = []
        self._registers = {name: number for number, name in enumerate(registers)}
        self._known: dict[int, int] = {}

    def emit(self, name: str, out: str, *operands: str | Tensor | Cache | float | None) -> str:
        """Append an instruction; returns the register it writes."""
        instruction = INSTRUCTIONS[name]
        words = [
            self._word(kind, operand)
            for kind, operand in zip(instruction.operands, operands, strict=True)
        ]
        number = list(INSTRUCTIONS).index(name)
        target = self._registers.setdefault(out, len(self._registers))
        self.code += [number, target, *words]
        return out

    def _word(self, kind: str, operand: Any) -> int:
        if operand is None:
            return -1
        if kind == REGISTER:
            return self._registers[operand]
        if kind == CACHE:
            return int(operand.index)
        if kind == INTEGER:
            return int(operand)
        if kind == NUMBER:
            self.numbers.append(float(operand))
            return len(self.numbers) - 1
        if id(operand) not in self._known:
            self._known[id(operand)] = len(self.constants)
            self.constants.append(operand)
        return self._known[id(operand)]
