from pathlib import Path

import pytest
import torch

from wina.bench.tune import COPY_BYTES, candidates, tune
from wina.errors import WinaError
from wina.kernels.triton.config import kernels


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_tuning_without_a_card_says_so(tmp_path: Path) -> None:
    with pytest.raises(WinaError, match=r"needs a CUDA card.*nothing was measured"):
        tune([(64, 64)], folder=tmp_path)
    assert not list(tmp_path.iterdir())


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
