"""Launch configurations: tables, chosen by shape and card, never tuned at run time.

``configs/default.json`` holds rules that go by how many column tiles there are for each
multiprocessor; a file named after a device may add tuned shapes (``wina bench tune``). Choosing
reads no device memory and depends on shapes alone, so it is safe under CUDA-graph capture.
"""

from __future__ import annotations

import json
import logging
import math
from dataclasses import asdict, dataclass, fields
from functools import cache
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent / "configs"
# Tokens of a tensor-core tile: no launch takes more.
MAX_TOKENS = 16
# A tuned shape serves others whose K and N are within this factor of its own.
NEAR = 1.5

_log = logging.getLogger("wina")


@dataclass(frozen=True)
class Card:
    """What the choice depends on. ``sms``: number of multiprocessors."""

    name: str
    sms: int


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched.

    Attributes:
        row_bytes: bytes of one weight row in a program's tile; its columns follow from the dtype.
        block_k: rows of the tile, a power of two.
        warps: warps of a program.
        stages: buffers in shared memory: stages − 1 tiles are in flight.
        k_splits: programs that share a column tile, 1 for a single pass.
    """

    row_bytes: int
    block_k: int
    warps: int
    stages: int
    k_splits: int = 1

    def block_n(self, itemsize: float) -> int:
        """Columns of the tile, for weights of ``itemsize`` bytes (0.5 for 4 bits)."""
        return int(self.row_bytes / itemsize)

    def block_t(self, tokens: int) -> int:
        """Tokens of the tile: one, or the 16 rows of a tensor-core product."""
        return 1 if tokens == 1 else MAX_TOKENS

    def splits(self, K: int) -> tuple[int, int]:
        """Number of splits in use, and tiles of ``block_k`` rows in each."""
        tiles = max(1, -(-K // self.block_k))
        blocks = -(-tiles // self.k_splits)
        return -(-tiles // blocks), blocks

    def bytes_in_flight(self) -> int:
        """Weight bytes that a program has requested ahead of use when it keeps all channels."""
        return (self.stages - 1) * self.row_bytes * self.block_k

    @staticmethod
    def align(*sizes: int) -> int:
        """Largest power of two up to 16 that divides all sizes."""
        return math.gcd(16, *sizes)


def choose(kernel: str, card: Card, tokens: int, K: int, N: int, itemsize: float) -> Launch:
    """The configuration for a call.

    Args:
        kernel: a key of the default table, such as ``"sparse_linear"``.
        card: the device.
        tokens: 1 to 16.
        K, N: shape of one weight.
        itemsize: bytes of one weight: 2 or 4 in x's dtype, 1 and 0.5 as 8 and 4 bits.
    """
    many = tokens > 1
    tuned = _nearest(_device_table(card.name).get("shapes", []), kernel, many, K, N, itemsize)
    return tuned or _by_rule(kernel, card.sms, many, K, N, itemsize)


@dataclass(frozen=True)
class Limit:
    """Up to how many tokens kernels serve; ``measured`` on the card, or reasoned."""

    tokens: int
    measured: bool


def token_limit(device: str) -> Limit:
    """The break-even with a dense product on the card of that name."""
    measured = _device_table(device).get("max_tokens")
    tokens = _default_table()["max_tokens"] if measured is None else measured
    return Limit(min(MAX_TOKENS, tokens), measured is not None)


def _by_rule(kernel: str, sms: int, many: bool, K: int, N: int, itemsize: float) -> Launch:
    for rule in _default_table()["rules"][_class_of(kernel, many, itemsize)]:
        launch = Launch(**rule["launch"])
        tiles = -(-N // launch.block_n(itemsize))
        if tiles < rule["tiles_per_sm"] * sms:
            continue
        wanted = rule.get("programs_per_sm", 0) * sms
        # A split of fewer than two tiles would spend its time on the partial sums.
        most = max(1, K // (2 * launch.block_k))
        return Launch(**{**rule["launch"], "k_splits": min(most, max(1, wanted // max(1, tiles)))})
    raise AssertionError("the last rule of every class accepts any number of tiles")


def shipped(kernel: str, many: bool, itemsize: float) -> list[Launch]:
    """Every configuration that the tables can give, K splits aside."""
    rules = _default_table()["rules"][_class_of(kernel, many, itemsize)]
    found = [Launch(**rule["launch"]) for rule in rules]
    for path in sorted(FOLDER.glob("*.json")):
        tuned = json.loads(path.read_text()).get("shapes", [])
        found += [
            Launch(**{**row["launch"], "k_splits": 1})
            for row in tuned
            if _matches(row, kernel, many, itemsize)
        ]
    return list(dict.fromkeys(found))


def kernels() -> list[str]:
    """Kernels that have configurations."""
    return sorted({name.split("/")[0] for name in _default_table()["rules"]})


def save_tuned(
    card: Card, rows: list[dict[str, Any]], max_tokens: int, folder: Path = FOLDER
) -> Path:
    """Write the device's table: tuned shapes {kernel, many, itemsize, K, N, launch}, and up to how
    many tokens kernels beat a dense product there.
    """
    for row in rows:
        if set(row) != {"kernel", "many", "itemsize", "K", "N", "launch"}:
            raise ValueError(f"not a tuned shape: {row}")
    path = folder / f"{_file_stem(card.name)}.json"
    table = {"device": card.name, "max_tokens": max_tokens, "shapes": rows}
    path.write_text(json.dumps(table, indent=1) + "\n")
    return path


def launch_fields(launch: Launch) -> dict[str, int]:
    """The fields of a configuration, JSON-ready, defaults left out."""
    default = {f.name: f.default for f in fields(Launch)}
    return {name: value for name, value in asdict(launch).items() if value != default[name]}


def _class_of(kernel: str, many: bool, itemsize: float) -> str:
    return f"{kernel}/{'many' if many else 'one'}/{8 * itemsize:g}"


@cache
def _default_table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads((FOLDER / "default.json").read_text())
    return table


@cache
def _device_table(device: str) -> dict[str, Any]:
    path = FOLDER / f"{_file_stem(device)}.json"
    if not path.is_file():
        _log.warning(
            "no tuned kernel configurations for %s: using the defaults; "
            "`wina bench tune` makes them",
            device,
        )
        return {}
    table: dict[str, Any] = json.loads(path.read_text())
    return table


def _file_stem(device: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in device.lower()).split())


def _matches(row: dict[str, Any], kernel: str, many: bool, itemsize: float) -> bool:
    return (row["kernel"], row["many"], row["itemsize"]) == (kernel, many, itemsize)


def _nearest(
    table: list[dict[str, Any]], kernel: str, many: bool, K: int, N: int, itemsize: float
) -> Launch | None:
    def distance(row: dict[str, Any]) -> float:
        return max(abs(math.log(row["K"] / K)), abs(math.log(row["N"] / N)))

    near = [row for row in table if K and N and _matches(row, kernel, many, itemsize)]
    near = [row for row in near if distance(row) <= math.log(NEAR)]
    return Launch(**min(near, key=distance)["launch"]) if near else None


@cache
def card_of(device: torch.device) -> Card:
    """The card that a CUDA device is."""
    properties = torch.cuda.get_device_properties(device)
    return Card(properties.name, properties.multi_processor_count)
