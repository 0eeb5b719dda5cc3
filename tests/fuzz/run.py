"""Feed damaged inputs to everything that reads files or arguments: ``--help`` says how.

Input i of a target depends on the seed, the target and i alone, so ``--only TARGET:i`` repeats it.
While an input is fed it may write in its target's folder alone, start, load, connect to and run
nothing, and take 4 times its own size of memory beyond what its target needs for any. The last line
of stdout is one JSON document. Exit code 1: there are findings.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

MEMORY_FACTOR = 4  # bytes that an input may take for each of its own
MOST_MEMORY = 1 << 30  # of all that the process may ask for beyond what it has: its hard end
LARGE = 1 << 20  # bytes of an input whose factor is recorded
WARM = 20  # inputs of each target before memory is bounded: modules and caches are loaded by then
BATCH = 300


def feed(
    targets: list[Any], counts: dict[str, int], seed: int, folder: Path, seconds: float
) -> dict[str, Any]:
    """Feed ``counts`` inputs to each target, or as many as fit into the time; what came of it."""
    from sandbox import Breach, Sandbox, TooMuch, TooSlow, limit_memory

    from wina.errors import WinaError

    sandbox = Sandbox()
    result: dict[str, Any] = {
        "inputs": {}, "refused": {}, "accepted": {}, "found": {}, "memory_taken_once": {}
    }  # fmt: skip
    findings: dict[tuple[str, str], dict[str, Any]] = {}
    slowest, bounded = 0.0, False
    large: dict[str, dict[str, float]] = {}
    spent: dict[str, float] = {}
    mark = folder / "at"

    def one(target: Any, number: int) -> None:
        nonlocal slowest
        name = type(target).__name__
        mark.write_text(f"{name}:{number}")

        def fed() -> None:
            prepared = target.make(random.Random(f"{seed}:{name}:{number}"))
            most = MEMORY_FACTOR * target.size + target.spare if bounded else MOST_MEMORY
            with sandbox.armed(target.folder, target.seconds, most):
                target.feed(prepared)

        began = time.process_time()
        outcome = "accepted"
        try:
            try:
                fed()
            except TooMuch:
                # What an input takes it takes each time; a module or a cache is loaded once.
                once = result["memory_taken_once"]
                once[name] = once.get(name, 0) + 1
                fed()
        except WinaError:
            outcome = "refused"
        except (Exception, Breach, TooMuch, TooSlow) as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{type(error).__name__} at {Path(where.filename).name}:{where.lineno}"
            first = {"place": place, "input": f"{name}:{number}", "error": repr(error)[:300],
                     "times": 0, "trace": traceback.format_exc()[-1500:]}  # fmt: skip
            findings.setdefault((name, place), first)["times"] += 1
            outcome = "found"
        taken = time.process_time() - began
        slowest = max(slowest, taken)
        spent[name] = spent.get(name, 0.0) + taken
        if target.size >= LARGE:
            seen = large.setdefault(name, {"inputs": 0, "most_bytes": 0, "most_memory_per_byte": 0})
            seen["inputs"] += 1
            seen["most_bytes"] = max(seen["most_bytes"], target.size)
            factor = round(sandbox.growth / target.size, 2)
            seen["most_memory_per_byte"] = max(seen["most_memory_per_byte"], factor)
        for key in ("inputs", outcome):
            result[key][name] = result[key].get(name, 0) + 1

    done = dict.fromkeys(counts, 0)
    deadline = time.monotonic() + seconds
    while any(done[name] < counts[name] for name in counts) and time.monotonic() < deadline:
        for target in targets:  # a batch of each in turn
            name = type(target).__name__
            batch = max(1, round(BATCH * target.share)) if bounded else WARM
            for number in range(done[name], min(counts[name], done[name] + batch)):
                one(target, number)
                done[name] = number + 1
        if not bounded and all(done[name] >= min(WARM, counts[name]) for name in counts):
            gc.collect()
            bounded = True
            limit_memory(MOST_MEMORY)
    result["findings"] = list(findings.values())
    result["slowest_processor_s"] = round(slowest, 3)
    result["processor_s"] = {name: round(value, 1) for name, value in spent.items()}
    result["inputs_of_1_MiB_and_more"] = large
    result["memory_bound"] = {
        "bytes_per_byte": MEMORY_FACTOR,
        "and_beside": {type(target).__name__: target.spare for target in targets},
    }
    return result


def work(asked: argparse.Namespace) -> int:
    """What runs in the child process."""
    import torch
    from targets import TARGETS, clean

    torch.set_num_threads(1)
    folder = Path(asked.folder)
    name, _, number = asked.only.partition(":")
    chosen = {n: kind for n, kind in TARGETS.items() if not name or n == name}
    targets = [kind(clean(folder / n)) for n, kind in chosen.items()]
    total = sum(target.share for target in targets)
    counts = {type(t).__name__: max(2, round(asked.inputs * t.share / total)) for t in targets}
    if number:
        prepared = targets[0].make(random.Random(f"{asked.seed}:{name}:{number}"))
        print(prepared)
        targets[0].feed(prepared)
        return 0
    result = feed(targets, counts, asked.seed, folder, asked.seconds)
    print(json.dumps(result))
    return 1 if result["findings"] else 0


def main() -> int:
    """Run the child, and say what ended it if it did not come to its end."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=4000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="TARGET, or TARGET:NUMBER to repeat one input")
    parser.add_argument("--seconds", type=float, default=1e9, help="stop after so many")
    parser.add_argument("--timeout", type=float, default=None, help="seconds, of everything")
    parser.add_argument("--output", type=Path, help="JSON file for the result")
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        return work(asked)
    with tempfile.TemporaryDirectory(prefix="wina-fuzz-") as folder:
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": "1",
            # Large blocks are mapped when asked for and unmapped when freed: what an input takes
            # is not hidden by what others left behind.
            "MALLOC_MMAP_THRESHOLD_": "65536",
        }
        began = time.perf_counter()
        answer = subprocess.run(
            [sys.executable, __file__, *sys.argv[1:], "--folder", folder],
            stdout=subprocess.PIPE, text=True, timeout=asked.timeout, env=environment, check=False,
        )  # fmt: skip
        lines = answer.stdout.strip().splitlines()
        if asked.only and ":" in asked.only:
            print(answer.stdout)
            return answer.returncode
        if answer.returncode not in (0, 1) or not lines or not lines[-1].startswith("{"):
            at = Path(folder) / "at"
            last = at.read_text() if at.is_file() else "(none)"
            print(f"exit code {answer.returncode} at input {last} of seed {asked.seed}")
            return 2
        result = json.loads(lines[-1])
    total = sum(result["inputs"].values())
    result = {"format": "wina-fuzz", "seed": asked.seed, "total": total, **result,
              "seconds": round(time.perf_counter() - began, 1)}  # fmt: skip
    for finding in result["findings"]:
        print(finding["input"], finding["times"], finding["place"], finding["error"], sep="  ")
        print(finding.pop("trace"), file=sys.stderr)  # has paths of this machine
    if asked.output:
        asked.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))
    return answer.returncode


if __name__ == "__main__":
    sys.exit(main())
