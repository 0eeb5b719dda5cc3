"""Decode many tokens and patch many times: ``python tests/long_run.py --help``.

Tokens are decoded by ``model.generate``, then as many by ``wina.decode``. The last line of stdout
is JSON: resident memory after a warm-up and at the end, and whether what must not change did not.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path

import torch
from torch import Tensor, nn

import wina
from wina.bench.machine import machine_card
from wina.testing import random_tokens, tiny_model

WARM_UP = 0.1  # share of the work after which memory is measured first
TOKENS = 200  # of one generation


def resident() -> int:
    """Bytes of memory in use by this process."""
    gc.collect()
    with Path("/proc/self/status").open(encoding="ascii") as file:
        return next(int(line.split()[1]) << 10 for line in file if line.startswith("VmRSS"))


def generate(model: nn.Module) -> Tensor:
    with torch.no_grad():
        tokens: Tensor = model.generate(  # type: ignore[operator]
            random_tokens(8)[None], max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False
        )
    return tokens


def decode(model: nn.Module) -> Tensor:
    prompt = random_tokens(8)[None]
    return wina.decode(model, prompt, max_new_tokens=TOKENS, min_new_tokens=TOKENS).tokens


def repeat(times: int, work: object) -> tuple[int, int]:
    """Resident memory after the warm-up and after all repetitions."""
    early = max(1, round(WARM_UP * times))
    before = 0
    for i in range(times):
        work()  # type: ignore[operator]
        if i + 1 == early:
            before = resident()
    return before, resident()


def main() -> None:
    """Run, and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--cycles", type=int, default=1_000)
    asked = parser.parse_args()
    model = tiny_model("llama")
    config = wina.SparsityConfig(calibration_tokens=256, window=64)
    plan = wina.calibrate(model, config=config, texts=random_tokens(256), show_progress=False)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    probe = random_tokens(64, seed=3)[None]
    with torch.no_grad():
        dense = model(probe).logits

    wina.sparsify(model, plan)
    decoded: dict[str, tuple[int, int]] = {}
    equal = True
    for way in (generate, decode):
        texts = [way(model)]
        times = asked.tokens // TOKENS
        decoded[way.__name__] = repeat(times, lambda way=way, texts=texts: texts.append(way(model)))
        equal = equal and all(torch.equal(texts[0], text) for text in texts)
    wina.restore(model)

    def cycle() -> None:
        wina.sparsify(model, plan)
        wina.restore(model)

    patched = repeat(asked.cycles, cycle)
    with torch.no_grad():
        again = model(probe).logits
    zero = wina.SparsityConfig(sparsity=0.0, prefill="all", calibration_tokens=256, window=64)
    wina.sparsify(model, zero, texts=random_tokens(256), show_progress=False)
    with torch.no_grad():
        at_zero = model(probe).logits
    with torch.no_grad():
        wina.restore(model)
        after_zero = model(probe).logits
    print(json.dumps({
        "command": f"python tests/long_run.py --tokens {asked.tokens} --cycles {asked.cycles}",
        "machine": machine_card(),
        "tokens": asked.tokens,
        "cycles": asked.cycles,
        "resident_bytes_while_decoding": decoded,
        "resident_bytes_while_patching": patched,
        "growth": [after / before - 1 for before, after in (*decoded.values(), patched)],
        "every_text_equal": equal,
        "restored_bit_for_bit": bool(torch.equal(dense, again)) and all(
            value.equal(values[name]) for name, value in model.state_dict().items()
        ),
        "dense_again_after_sparsity_0": bool(torch.equal(dense, after_zero)),
        "largest_difference_of_logits_at_sparsity_0": float((at_zero - dense).abs().max()),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
