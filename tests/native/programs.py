"""Random programs of a decode step: one layer of a model whose sizes end anywhere in a vector."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from wina.kernels.program import ACTIVATION_NAMES, INSTRUCTIONS, Builder, Cache

if TYPE_CHECKING:
    from operator_calls import Draw


def program_of(draw: Draw) -> dict[str, Any]:
    """Arguments of ``wina::decode_step``.

    Thresholds keep every channel but in special draws: two implementations that round differently
    would drop different ones.
    """
    return _Layer(draw).arguments()


class _Layer:
    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        rng = self.rng = draw.rng
        self.hidden, self.inner = draw.K, draw.N
        self.D = rng.choice((rng.randint(1, 40), 64, 2 * rng.randint(1, 40) + 1))
        self.kv_heads = rng.randint(1, 3)
        self.heads = self.kv_heads * rng.randint(1, 4)
        self.length = rng.choice((1, rng.randint(2, 40), rng.randint(100, 400)))
        self.vocabulary = rng.randint(1, 200)
        self.builder = Builder(("q", "k", "v"))
        self.caches: list[Tensor] = []

    def arguments(self) -> Mapping[str, Any]:
        draw, rng = self.draw, self.rng
        table = draw.normal(self.vocabulary, self.hidden)
        if draw.special:
            table.view(-1)[rng.randrange(table.numel())] = rng.choice((math.nan, math.inf, 1e4))
        self.builder.emit("embed", "x", table, rng.choice((1.0, 3.5)))
        self._attention()
        self._mlp()
        self._norm("h", "x", self.hidden)
        self._product("y", "h", self.hidden, self.vocabulary)
        self.builder.emit("logits", "y", "y", rng.choice((1.0, 0.25)), rng.choice((0.0, 30.0)))
        times = torch.zeros(rng.choice((1, 1000)), dtype=torch.float64)
        return {
            "token": rng.choice((0, self.vocabulary - 1)),
            "position": rng.choice((0, self.length - 1, rng.randrange(self.length))),
            "code": torch.tensor(self.builder.code),
            "numbers": torch.tensor(self.builder.numbers, dtype=torch.float64),
            "constants": self.builder.constants,
            "caches": self.caches,
            "outputs": self.vocabulary,
            "times": times if rng.random() < 0.5 and len(times) >= len(INSTRUCTIONS) else None,
        }

    def _attention(self) -> None:
        rng, D = self.rng, self.D
        self._norm("h", "x", self.hidden)
        widths = (self.heads * D, self.kv_heads * D, self.kv_heads * D)
        self._split("h", "qkv", widths)
        if rng.random() < 0.5:
            for name in "qk":
                self._norm(name, name, D)
        R = 2 * rng.randint(0, D // 2)
        tables = (torch.randn(self.length, R), torch.randn(self.length, R)) if R else (None, None)
        first = len(self.caches)
        self.caches += [self.draw.normal(self.kv_heads, self.length, D) for _ in range(2)]
        self.builder.emit(
            "attend", "a", "q", "k", "v", Cache(first), Cache(first + 1), *tables, 1 / math.sqrt(D),
            rng.choice((0.0, 5.0)), rng.choice((0, 1, 37)),
        )  # fmt: skip
        self._into_the_stream("a", self.heads * D)

    def _mlp(self) -> None:
        rng, K, N = self.rng, self.hidden, self.inner
        self._norm("h", "x", K)
        activation = rng.randrange(len(ACTIVATION_NAMES))
        way = rng.randrange(3)
        if way == 0:
            self._split("h", "gu", (N, N))
            self.builder.emit("gated", "g", "g", "u", activation)
        else:
            thresholds = (self._threshold(K), self._threshold(K))
            tail = (*thresholds, activation, self._bias(N), self._bias(N), self._scale("h", K, "s"),
                    self._scale("h", K, "t"))  # fmt: skip
            if way == 1:
                two = (self._weight(K, N), self._weight(K, N))
                self.builder.emit("gate_up", "g", "h", *two, *tail)
            else:
                four = (*self.draw.integers(K, N), *self.draw.integers(K, N))
                self.builder.emit("gate_up_integers", "g", "h", *four, N, self.draw.bits, *tail)
        self._into_the_stream("g", N)

    def _into_the_stream(self, x: str, K: int) -> None:
        if self.rng.random() < 0.5:
            self._product("x", x, K, self.hidden, "x")
        else:
            self._product("y", x, K, self.hidden)
            self.builder.emit("add", "x", "x", "y", self.rng.choice((1.0, 0.22)))

    def _split(self, x: str, names: str, widths: tuple[int, ...]) -> None:
        """A product for each name, one that is cut, or three in one launch."""
        way = self.rng.randrange(3 if len(names) == 3 else 2)
        if way == 0:
            for name, N in zip(names, widths, strict=True):
                self._product(name, x, self.hidden, N)
        elif way == 1:
            self._product("joint", x, self.hidden, sum(widths))
            start = 0
            for name, N in zip(names, widths, strict=True):
                self.builder.emit("slice", name, "joint", start, N)
                start += N
        else:
            operands = [
                part
                for N, scale in zip(widths, "stu", strict=True)
                for part in (self._weight(self.hidden, N), self._threshold(self.hidden),
                             self._bias(N), self._scale(x, self.hidden, scale))
            ]  # fmt: skip
            self.builder.emit("group_of_three", names[0], x, *operands)

    def _norm(self, out: str, x: str, n: int) -> None:
        weight = self.draw.normal(n)
        self.builder.emit("rms_norm", out, x, weight, 1e-5, self.rng.choice((0.0, 1.0)))

    def _product(self, out: str, x: str, K: int, N: int, residual: str | None = None) -> None:
        kind = self.rng.choice(("dense", "masked", "sparse", "sparse_integers"))
        if kind in ("dense", "masked"):
            mask = (None, None)
            if kind == "masked":
                mask = (self._threshold(K), self._scale(x, K, "s"))
            weight = self.draw.normal(N, K) / math.sqrt(K)
            self.builder.emit("dense", out, x, weight, self._bias(N), *mask, residual)
            return
        bias, scale = self._bias(N), self._scale(x, K, "s")
        planes = self.rng.choice((1, 2, 3)) if kind == "sparse_integers" else 1
        tail = (self._threshold(planes * K), bias, scale, residual)
        if kind == "sparse":
            self.builder.emit("sparse", out, x, self._weight(K, N), *tail)
        else:
            if planes > 1:
                x = self.builder.emit("repeat", "w", x, planes)
            packed, scales = self.draw.integers(planes * K, N)
            self.builder.emit(kind, out, x, packed, scales, N, self.draw.bits, *tail)

    def _weight(self, K: int, N: int) -> Tensor:
        return self.draw.normal(K, N) / math.sqrt(K)

    def _bias(self, N: int) -> Tensor | None:
        return self.draw.normal(N) if self.rng.random() < 0.5 else None

    def _threshold(self, K: int) -> Tensor:
        return torch.rand(K) if self.draw.special else torch.full((K,), -1.0)

    def _scale(self, x: str, K: int, out: str) -> str | None:
        own = self._own_scale(x, K, out)
        if self.rng.random() < 0.7:
            return own
        self.caches.append(torch.zeros(1))
        state = Cache(len(self.caches) - 1)
        return self.builder.emit("tracked_scale", out, x, torch.rand(K), state, 0.5, 0.1, own)

    def _own_scale(self, x: str, K: int, out: str) -> str | None:
        way = self.rng.randrange(4)
        if way == 1:
            return self.builder.emit("mean_scale", out, x)
        if way == 3:
            return self.builder.emit("probe_scale", out, x, torch.randn(K + 1) / K**0.5, 0.5)
        if way == 2 and K > 1:
            dropped = self.rng.randint(1, K - 1)
            return self.builder.emit("topk_scale", out, x, torch.rand(K) + 0.1, dropped)
        return None
