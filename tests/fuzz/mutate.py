"""Damage: small, seeded changes of bytes, JSON values and command lines."""

from __future__ import annotations

import copy
import json
import math
import random
from typing import Any

HOSTILE: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 10**400, 0.5, -0.0, 1e-320,
    1e308, math.nan, math.inf, -math.inf, "", "0", "nan", "a" * 5000, "\0", "\ud800", "../../etc",
    "/etc/passwd", "../" * 40 + "etc/passwd", "%s%n", "__import__('os')", [], {}, [[]], [None],
    {"": None}, [1] * 1000, "\U0001f600", "wina", "dense", "float32",
)  # fmt: skip
HEADS = (0, 1, 7, 8, 2**16, 2**31 - 1, 2**32, 2**40, 2**63 - 1, 2**64 - 1)


SWOLLEN = 0.001  # share of inputs that become a MiB and more: what their size costs shows


def swollen_bytes(rng: random.Random) -> bytes:
    """One to four MiB of something small."""
    part = rng.choice(
        (b" ", b"9", b"a", b"\0", b"[", b"[],", b"0,", b'{"a":0},', b'"",', b"\\u00e9", b"\n",
         "\U0001f600".encode(), b'{"text":""}\n')
    )  # fmt: skip
    return part * (rng.randint(1 << 20, 4 << 20) // len(part))


def swollen_value(rng: random.Random) -> Any:
    """A JSON value of one to four MiB."""
    value = rng.choice((0, 0.5, "", "abc", [], {}, None, {"a": 0}, [[]], 2**40, "a", "\U0001f600"))
    times = rng.randint(1 << 20, 4 << 20) // (2 + len(json.dumps(value)))
    if rng.random() < 0.2:
        return str(value) * times
    return {str(i): value for i in range(times // 4)} if rng.random() < 0.2 else [value] * times


def nested(depth: int) -> Any:
    """A list in a list in a list …"""
    value: Any = []
    for _ in range(depth):
        value = [value]
    return value


def damage_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut, insert, repeat or overwrite bytes, one to four times."""
    out = bytearray(data)
    if rng.random() < SWOLLEN:
        at = rng.randrange(len(out) + 1)
        out[at:at] = swollen_bytes(rng)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out) + 1)
        way = rng.randrange(8)
        if way == 0 and out:
            out[at % len(out)] ^= 1 << rng.randrange(8)
        elif way == 1:
            del out[at:]
        elif way == 2:
            del out[at : at + rng.randint(1, 64)]
        elif way == 3:
            out[at:at] = rng.randbytes(rng.randint(1, 64))
        elif way == 4:
            out[at:at] = out[at : at + rng.randint(1, 256)]
        elif way == 5:
            out[0:8] = rng.choice(HEADS).to_bytes(8, "little")
        elif way == 6:
            out[at : at + 8] = rng.choice(
                (b"nan", b"1e999", b"[[[[", b"\xff\xfe", b'":', b"-", b"}")
            )
        else:
            out[at:at] = rng.choice((b"[" * 3000, b"9" * 5000, b'{"a":' * 2000, b"\0" * 100))
    return bytes(out)


def damage_json(document: Any, rng: random.Random) -> Any:
    """Change one to three values, keys or whole branches of a JSON value."""
    document = copy.deepcopy(document)
    if rng.random() < SWOLLEN and (places := list(_places(document))):
        parent, key = rng.choice(places)
        parent[key] = swollen_value(rng)
        return document
    for _ in range(rng.randint(1, 3)):
        places = list(_places(document))
        if not places:
            return rng.choice(HOSTILE)
        parent, key = rng.choice(places)
        way = rng.randrange(7)
        if way == 0:
            del parent[key]
        elif way == 1:
            other, name = rng.choice(places)
            parent[key] = copy.deepcopy(other[name]) if _is_there(other, name) else None
        elif way == 2 and isinstance(parent, dict):
            parent[str(rng.choice(HOSTILE[:30]))] = parent.pop(key)
        elif way == 3 and isinstance(parent, list):
            parent.append(copy.deepcopy(parent[key]))
        elif way == 4 and isinstance(parent[key], int | float):
            number = parent[key]
            parent[key] = rng.choice((number + 1, -number, number * 10**30, str(key)))
        elif way == 5:
            parent[key] = nested(rng.choice((3, 100)))
        else:
            parent[key] = copy.deepcopy(rng.choice(HOSTILE))
    return document


def _places(value: Any) -> Any:
    """Every (container, key) of a JSON value."""
    items = (
        value.items() if isinstance(value, dict)
        else enumerate(value) if isinstance(value, list) else ()
    )  # fmt: skip
    for key, child in items:
        yield value, key
        yield from _places(child)


def _is_there(container: Any, key: Any) -> bool:
    return key in container if isinstance(container, dict) else key < len(container)


def damage_words(words: list[str], rng: random.Random) -> list[str]:
    """Change, drop, repeat or swap words of a command line; no word names a file outside."""
    words = list(words)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(words)) if words else 0
        way = rng.randrange(6)
        if way == 0 and words:
            del words[at]
        elif way == 1 and words:
            words.insert(at, words[at])
        elif way == 2 and words:
            other = rng.randrange(len(words))
            words[at], words[other] = words[other], words[at]
        elif way == 3:
            words.insert(at, rng.choice(("--", "-", "--help", "--json", "--nope", "-x", "=", "")))
        elif words:
            words[at] = rng.choice(
                ("", "-1", "0", "nan", "inf", "1e400", "9" * 40, "0x10", "wina:", "a,b,,c", "é",
                 "wina,wina", "1,2,3", "norm-power:nan", "last:", "x" * 3000, "None", "float32")
            )  # fmt: skip
    return words
