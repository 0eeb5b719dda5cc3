import json

import pytest
import torch
from conftest import decode_logits, plan_for
from torch import nn

import wina
from wina.inspection import measure_sparsity


def test_table_of_a_patched_model(llama: nn.Module) -> None:
    plan = plan_for(llama, sparsity=0.4)
    wina.sparsify(llama, plan)
    found = wina.inspect(llama)
    assert [row.projection for row in found.rows] == list(plan.layers)
    row = found.rows[0]
    assert (row.shape, row.sparsity, row.backend) == ((64, 64), 0.4, "cpu")
    text = str(found)
    for word in ("model.layers.0.self_attn.q_proj", "0.400", "cpu", "realised over the model"):
        assert word in text
    assert json.loads(json.dumps(found.to_dict()))["method"] == "wina"


def test_reason_of_a_refusal_is_shown() -> None:
    from wina.testing import tiny_model

    model = tiny_model("llama", torch.float64)
    wina.sparsify(model, plan_for(model))
    row = wina.inspect(model).rows[0]
    assert (row.backend, row.reason) == ("reference", "cpu: no kernel for torch.float64")


def test_dense_model_lists_what_would_be_replaced(llama: nn.Module) -> None:
    found = wina.inspect(llama)
    assert found.method == "dense"
    assert len(found.rows) == 14
    assert "dense" in str(found)


def test_measured_sparsity_counts_decode(llama: nn.Module, tokens: torch.Tensor) -> None:
    wina.sparsify(llama, plan_for(llama))
    with measure_sparsity(llama) as counter:
        decode_logits(llama, tokens)
    assert counter.mean == pytest.approx(0.5, abs=0.1)
    assert set(counter.by_projection) == {row.projection for row in wina.inspect(llama).rows}
    with wina.dense(llama), measure_sparsity(llama) as counter:
        decode_logits(llama, tokens)
    assert counter.mean == 0.0


def test_measuring_does_not_change_the_output(llama: nn.Module, tokens: torch.Tensor) -> None:
    wina.sparsify(llama, plan_for(llama, sparsity=0.0))
    plain = decode_logits(llama, tokens)
    with measure_sparsity(llama):
        torch.testing.assert_close(decode_logits(llama, tokens), plain, rtol=1e-4, atol=1e-4)
