from __future__ import annotations

from pathlib import Path

import torch
from conftest import plan_for
from torch import nn

from wina.export import measure, model_card
from wina.patch import is_patched
from wina.testing import tiny_tokenizer


def test_card_says_what_was_measured(llama: nn.Module, tmp_path: Path) -> None:
    plan = plan_for(llama)
    found = measure(
        llama, tiny_tokenizer(), plan, tokens=512, new_tokens=3, rounds=1, show_progress=False
    )
    assert not is_patched(llama)
    assert found.dense != found.sparse
    card = model_card(plan, torch.float32, "me/base", "wina export x", found)
    assert "base_model: me/base" in card
    for value in (f"{found.dense:.2f} | {found.sparse:.2f}", f"| {found.realised:.3f} |"):
        assert value in card
    local = model_card(plan, torch.float32, str(tmp_path), "wina export x")
    assert "base_model" not in local
    assert "| perplexity |" not in local
