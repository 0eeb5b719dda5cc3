from pathlib import Path

import pytest
import torch

from wina.bench import tune as tuning
from wina.bench.tune import COPY_BYTES, break_even, candidates, tune
from wina.errors import WinaError
from wina.kernels.triton import sparse_linear
from wina.kernels.triton.config import kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_tuning_without_a_card_says_so(tmp_path: Path) -> None:
    with pytest.raises(WinaError, match=r"needs a CUDA card.*nothing was measured"):
        tune([(64, 64)], folder=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("dense", "most"), [(20.0, 16), (5.0, 4), (0.5, 1)])
def test_break_even_is_the_last_batch_that_is_not_slower(
    monkeypatch: pytest.MonkeyPatch, dense: float, most: int
) -> None:
    """A stand-in clock: sparse takes a second a token, dense always the same."""
    monkeypatch.setattr(sparse_linear, "launch", lambda x, *_: len(x))
    monkeypatch.setattr(tuning.reference, "dense_linear", lambda *_: dense)
    monkeypatch.setattr(tuning, "cold_copies", lambda weights: [weights])
    monkeypatch.setattr(tuning, "seconds_in_graph", lambda call, copies: float(call(copies[0])))
    row = {"kernel": "sparse_linear", "many": True, "itemsize": 4, "K": 32, "N": 16}
    launch = {"row_bytes": 128, "block_k": 32, "warps": 4, "stages": 3}
    rows = [{**row, "launch": launch}, {**row, "many": False, "launch": launch}]
    assert break_even(rows, torch.float32, 0.5, torch.device("cpu")) == most


@pytest.mark.parametrize("kernel", kernels())
@pytest.mark.parametrize("limit", [99 << 10, 227 << 10])
def test_candidates_fit_the_card(kernel: str, limit: int) -> None:
    found = list(candidates(kernel, 4096, limit))
    assert len(found) > 10
    assert len(set(found)) == len(found)
    for launch in found:
        assert launch.stages * launch.row_bytes * launch.block_k <= limit
        assert launch.row_bytes * launch.block_k >= COPY_BYTES * 32 * launch.warps
        assert kernel == "sparse_linear" or launch.k_splits == 1
