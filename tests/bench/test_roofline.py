from __future__ import annotations

import json
from pathlib import Path

import pytest

from wina.bench.devices import DEVICES, Device, device_for, measured_bandwidth
from wina.bench.rates import measured_device
from wina.bench.roofline import (
    CORRECTIONS,
    KV_CACHE,
    ROTATION,
    THRESHOLDS,
    Load,
    byte_ideal,
    cost,
    overhead_for,
    published_macs,
    roofline,
)
from wina.bench.shapes import SHAPES, shape_config
from wina.bench.structure import (
    ATTENTION,
    EMBEDDING,
    EXPERTS,
    LM_HEAD,
    MLP,
    NORMS,
    ROUTER,
    SPARSE_KINDS,
    Structure,
    meta_model,
    structure_of,
)
from wina.bench.timing import QUICK
from wina.errors import ConfigError, UnsupportedModelError
from wina.projections import find_experts, find_projections
from wina.testing import tiny_model


def structure(name: str) -> Structure:
    return structure_of(meta_model(shape_config(name)))


# arXiv 2505.19427's table: dense, 25, 40, 50, 65 %; what the rotation adds; 50 and 65 % with it.
PUBLISHED = {
    "llama-2-7b": ("6.61", "4.99", "4.02", "3.37", "2.40", "1.07", "4.44", "3.47"),
    "llama-3-8b": ("7.50", "5.76", "4.71", "4.01", "2.97", "1.07", "5.09", "4.04"),
    "qwen2.5-7b": ("7.07", "5.44", "4.46", "3.81", "2.83", "0.72", "4.53", "3.55"),
    "phi-4": ("14.15", "10.74", "8.69", "7.33", "5.28", "2.10", "9.43", "7.38"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_gflops(name: str) -> None:
    shape = structure(name)
    plain = [published_macs(shape, s) for s in (0.0, 0.25, 0.4, 0.5, 0.65)]
    adds = published_macs(shape, 0.5, rotation=True) - published_macs(shape, 0.5)
    turned = [published_macs(shape, s, rotation=True) for s in (0.5, 0.65)]
    assert tuple(f"{m / 1e9:.2f}" for m in (*plain, adds, *turned)) == PUBLISHED[name]


def test_byte_ideal_of_llama_3_8b() -> None:
    shape = structure("llama-3-8b")
    ideals = [byte_ideal(shape, Load(sparsity=s)) for s in (0.25, 0.4, 0.5, 0.65)]
    assert [f"{ideal:.2f}" for ideal in ideals] == ["1.30", "1.59", "1.87", "2.53"]


@pytest.mark.parametrize("name", list(SHAPES))
def test_registry_has_the_published_parameters(name: str) -> None:
    model = meta_model(shape_config(name))
    assert sum(p.numel() for p in model.parameters()) == SHAPES[name].parameters


def test_structure_agrees_with_observation(model: object) -> None:
    found = structure_of(model)  # type: ignore[arg-type]
    projections = find_projections(model)  # type: ignore[arg-type]
    sparse = {w.name: w.shape for w in found.weights if w.kind in SPARSE_KINDS}
    experts = [p for _, roles in find_experts(model).values() for p in roles]  # type: ignore[arg-type]
    observed = {f"{p.name}.weight": (p.out_features, p.in_features) for p in projections}
    observed |= {p.name: (p.out_features, p.in_features) for p in experts}
    # GPT-OSS keeps its experts the other way round.
    assert {k: sorted(v) for k, v in sparse.items()} == {k: sorted(v) for k, v in observed.items()}
    assert sum(w.read for w in found.weights if w.kind == LM_HEAD) == 258 * 64
    assert sum(w.read for w in found.weights if w.kind == EMBEDDING) == 64


def test_experts_count_only_where_active() -> None:
    mixtral = structure("mixtral-8x7b")
    read = cost(mixtral, Load(itemsize=2.0)).bytes
    assert read[EXPERTS] == 2 * 2 * 32 * 3 * 4096 * 14336  # two experts of bfloat16 in each layer
    assert read[ROUTER] == 2 * 32 * 8 * 4096
    # A large batch meets every expert.
    assert cost(mixtral, Load(batch=256, itemsize=2.0)).bytes[EXPERTS] == pytest.approx(
        4 * read[EXPERTS]
    )


def test_expert_modules_in_a_list() -> None:
    """A router and two of three experts, as architectures without fused stacks keep them."""
    model = tiny_model("llama", num_hidden_layers=1)
    model.config.num_experts = 3  # type: ignore[union-attr]
    model.config.num_experts_per_tok = 2  # type: ignore[union-attr]
    block = model.model.layers[0]  # type: ignore[union-attr]
    from torch import nn

    mlps = nn.ModuleList([block.mlp, *(tiny_model("llama").model.layers[0].mlp for _ in range(2))])  # type: ignore
    block.mlp = nn.ModuleDict({"gate": nn.Linear(64, 3, bias=False), "experts": mlps})
    found = structure_of(model)
    totals = {k: sum(w.read for w in found.weights if w.kind == k) for k in found.kinds()}
    assert totals[EXPERTS] == pytest.approx(2 * 3 * 64 * 96)
    assert totals[ROUTER] == 3 * 64
    assert MLP not in totals


def test_kv_cache_and_windows() -> None:
    llama = structure("llama-3-8b")
    assert cost(llama, Load(context=1000)).bytes[KV_CACHE] == 32 * 1000 * 2 * 8 * 128 * 2
    assert cost(llama, Load(context=1000)).macs[KV_CACHE] == 32 * 1000 * 2 * 4096
    gemma = structure("gemma-3-1b")  # four of 26 layers look back farther than 512
    assert gemma.cached_tokens(4096) == 22 * 512 + 4 * 4096
    assert KV_CACHE not in cost(llama, Load()).bytes


def test_overheads_are_counted() -> None:
    llama = structure("llama-3.2-1b")
    plain = cost(llama, Load(sparsity=0.5, itemsize=2.0))
    assert plain.bytes[THRESHOLDS] == 4 * 16 * (6 * 2048 + 8192)
    assert ROTATION not in plain.bytes
    assert CORRECTIONS not in plain.bytes
    full = cost(llama, Load(sparsity=0.5, itemsize=2.0, rotation=True, rank=8, bias=True))
    assert full.macs[ROTATION] == 2 * 16 * 2048**2
    assert full.bytes[ROTATION] == 2 * full.macs[ROTATION]
    inputs = 6 * 2048 + 8192
    outputs = 2048 + 512 + 512 + 2048 + 8192 + 8192 + 2048
    assert full.macs[CORRECTIONS] == 8 * 16 * (inputs + outputs)
    assert full.bytes[CORRECTIONS] == 2 * 16 * (8 * (inputs + outputs) + outputs)


def test_batch_reads_the_union() -> None:
    llama = structure("llama-3.2-1b")
    one, four = (cost(llama, Load(sparsity=0.5, batch=b)) for b in (1, 4))
    assert four.bytes[ATTENTION] == pytest.approx(one.bytes[ATTENTION] * (1 - 0.5**4) / 0.5)
    assert four.macs[ATTENTION] == 4 * one.macs[ATTENTION]


def test_rows_of_a_card() -> None:
    llama = structure("llama-3-70b")
    rows = roofline(llama, DEVICES["h100"], (0.5,), Load(itemsize=2.0, context=4096))
    assert [row["sparsity"] for row in rows] == [0.0, 0.5]
    assert rows[0]["tokens_per_s"] == pytest.approx(3350e9 / rows[0]["total_bytes"])
    assert rows[0]["speedup"] == 1.0
    assert rows[1]["speedup"] == pytest.approx(rows[0]["total_bytes"] / rows[1]["total_bytes"])
    busy = roofline(llama, DEVICES["h100"], (), Load(itemsize=2.0, batch=2048))
    assert busy[0]["bound"] == "products"
    assert rows[0]["bound"] == "bytes"


def test_overhead_from_a_measured_dense_speed() -> None:
    llama, device = structure("llama-3.2-1b"), Device("d", 20.0, None, "given")
    load = Load(itemsize=2.0)
    reading = cost(llama, load).seconds(device)
    overhead = overhead_for(llama, device, load, 1 / (reading + 0.01))
    assert overhead == pytest.approx(0.01)
    rows = roofline(llama, device, (0.5,), load, overhead)
    assert rows[0]["tokens_per_s"] == pytest.approx(1 / (reading + 0.01))
    assert rows[1]["speedup"] < byte_ideal(llama, Load(sparsity=0.5, itemsize=2.0))


def test_every_kind_is_read_at_the_rate_of_its_product() -> None:
    llama, load = structure("llama-3.2-1b"), Load(sparsity=0.5, itemsize=2.0)
    device = Device("d", 20.0, None, "measured", dense_share=0.5, sparse_share=0.8)
    step, dense = cost(llama, load), cost(llama, load.dense)
    products = step.bytes[ATTENTION] + step.bytes[MLP]
    rest = step.total_bytes - products - step.bytes[LM_HEAD]
    want = (products / 0.8 + step.bytes[LM_HEAD] / 0.5 + rest) / 20e9
    assert step.seconds(device) == pytest.approx(want)
    others = dense.bytes[NORMS] + dense.bytes[EMBEDDING]
    assert dense.seconds(device) == pytest.approx(
        ((dense.total_bytes - others) * 2 + others) / 20e9
    )
    (_, half) = roofline(llama, device, (0.5,), Load(itemsize=2.0))
    assert half["speedup"] == pytest.approx(dense.seconds(device) / want)


def test_rates_are_measured_on_the_shapes_of_the_model() -> None:
    found = measured_device(structure_of(tiny_model("llama")), "float32", "cpu", QUICK, False)
    assert found.bandwidth_gb_s > 0
    assert 0 < found.dense_share < 50
    assert 0 < found.sparse_share < 50


def test_devices() -> None:
    assert device_for("h200", None, 0).bandwidth_gb_s == 4800
    assert device_for(None, 123.0, 0) == Device("123 GB/s", 123.0, None, "given")
    assert device_for("cpu", None, 1 << 16).bandwidth_gb_s > 0
    assert measured_bandwidth(1 << 16, rounds=1) > 0
    with pytest.raises(ConfigError, match="positive"):
        device_for(None, 0.0, 0)


def test_unknown_weights_are_refused() -> None:
    from torch import nn

    model = tiny_model("llama")
    model.model.layers[0].mlp.odd = nn.Conv1d(4, 4, 3)  # type: ignore[union-attr]
    with pytest.raises(UnsupportedModelError, match=r"mlp\.odd\.weight is a Conv1d"):
        structure_of(model)


def test_config_of_a_folder(tmp_path: Path) -> None:
    from wina.bench.shapes import load_config

    config = {"model_type": "llama", **SHAPES["smollm2-135m"].config}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert structure_of(meta_model(load_config(str(tmp_path)))) == structure("smollm2-135m")
    with pytest.raises(UnsupportedModelError, match="no config"):
        load_config(str(tmp_path / "none"))


@pytest.mark.parametrize(
    ("model_type", "kind", "elements"),
    [
        # 4 of 128 experts, 36 layers, two matrices of three times the width.
        ("gpt_oss", EXPERTS, 36 * 4 * 3 * 2880 * 2880),
        ("olmoe", EXPERTS, 16 * 8 * 3 * 2048 * 2048),
    ],
)
def test_other_mixtures_on_paper(model_type: str, kind: str, elements: int) -> None:
    import transformers

    found = structure_of(meta_model(transformers.AutoConfig.for_model(model_type)))
    assert sum(w.read for w in found.weights if w.kind == kind) == pytest.approx(elements)


def test_latent_attention_caches_one_vector() -> None:
    import transformers

    deepseek = transformers.AutoConfig.for_model("deepseek_v3", num_hidden_layers=4)
    assert structure_of(meta_model(deepseek)).kv_width == 512 + 64
