"""Peak memory while patching and restoring: the model and one weight."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, sys, torch, wina
from wina.testing import tiny_model, random_tokens

def read(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(key)) * 1024

model = tiny_model("llama", hidden_size=1024, intermediate_size=4096, num_hidden_layers=4)
config = wina.SparsityConfig(calibration_tokens=64, window=32)
plan = wina.calibrate(model, config=config, texts=random_tokens(64), show_progress=False)
wina.sparsify(model, plan)  # builds the kernels
wina.restore(model)
largest = max(p.numel() * p.itemsize for p in model.parameters())
total = sum(p.numel() * p.itemsize for p in model.parameters())
def extra(step):
    gc.collect()
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts again
    before = read("VmRSS")
    step()
    return read("VmHWM") - before

rounds = [
    (extra(lambda: wina.sparsify(model, plan)), extra(lambda: wina.restore(model)))
    for _ in range(3)
]
for extras in zip(*rounds):
    print(min(extras), largest, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads the high-water mark from /proc")
def test_peak_is_the_model_and_one_weight() -> None:
    # Every tensor gets pages of its own and gives them back, and the smallest of three rounds
    # counts: what the allocator holds back, and pages of libraries that return, are no weights.
    answer = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 16)},
    )
    lines = [tuple(map(int, line.split())) for line in answer.stdout.splitlines()]
    assert len(lines) == 2
    for extra, largest, total in lines:
        assert total > 12 * largest
        assert extra <= largest + (8 << 20)  # and what Python itself needs
