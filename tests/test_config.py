import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wina import SparsityConfig
from wina.errors import ConfigError, UnknownNameError
from wina.methods import METHODS
from wina.prefill import parse_prefill


@given(
    method=st.sampled_from([m for m in METHODS if m not in ("dense", "wina-plus")]),
    sparsity=st.floats(0, 0.99),
    selector=st.sampled_from(["threshold", "relative", "topk", "importance"]),
    prefill=st.sampled_from(["dense", "all", "last:0.5", "last:0.99"]),
)
def test_round_trip(method: str, sparsity: float, selector: str, prefill: str) -> None:
    config = SparsityConfig(method=method, sparsity=sparsity, selector=selector, prefill=prefill)
    assert SparsityConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize("sparsity", [-0.1, 1.0, 1.5, math.nan, math.inf, "0.5", None, True])
def test_sparsity_must_be_a_share(sparsity: object) -> None:
    with pytest.raises(ConfigError, match="sparsity"):
        SparsityConfig(sparsity=sparsity)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("field", "known"),
    [
        ("method", "wina, teal"),
        ("criterion", "l2-norm, l1-norm, norm-power"),
        ("selector", "threshold, topk"),
        ("allocation", "uniform"),
        ("prefill", "dense, all"),
    ],
)
def test_unknown_names_list_the_known_ones(field: str, known: str) -> None:
    with pytest.raises(UnknownNameError, match=known):
        SparsityConfig(**{field: "wanda"})


@pytest.mark.parametrize(
    "settings",
    [
        {"mask": "layer"},
        {"statistics": "none"},
        {"window": 2},
        {"calibration_tokens": -1},
        {"seed": 1.5},
        {"method": "dense", "sparsity": 0.5},
        {"criterion": "norm-power:9"},
        {"prefill": "last"},
        {"prefill": "last:1.5"},
    ],
)
def test_refused(settings: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SparsityConfig(**settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("values", [{"sparsty": 0.5}, {"window": "512"}, {"method": None}])
def test_from_dict_refuses(values: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        SparsityConfig.from_dict(values)


@pytest.mark.parametrize(
    ("spec", "length", "start"),
    [
        ("dense", 100, 100),
        ("dense", 1, 0),
        ("all", 100, 2),
        ("all", 1, 0),
        ("all", 2, 2),
        ("last:0.5", 100, 50),
        ("last:0.99", 100, 2),
        ("last:0.1", 3, 3),
    ],
)
def test_prefill_start(spec: str, length: int, start: int) -> None:
    assert parse_prefill(spec, sink_tokens=2).start(length) == start


def test_what_is_kept_names_a_selector_that_weighs_tokens() -> None:
    """Else results of a method before it had one would be taken for those of today."""
    settings = SparsityConfig(method="wina-fisher")
    # Fields that came later are left out where they say what was so before them.
    assert {**settings.record(), "head": "dense", "tracking": 0.0} == {
        **settings.to_dict(), "selector": "importance",
    }  # fmt: skip
    plain = SparsityConfig(method="wina")
    assert {**plain.record(), "head": "dense", "tracking": 0.0} == plain.to_dict()
    assert SparsityConfig.from_dict(plain.record()) == plain


def test_the_default_is_the_best_that_calibrates_in_a_minute() -> None:
    assert SparsityConfig().method == "wina-fisher"
    assert SparsityConfig().parts() == {
        "criterion": "norm-power:alpha=0.5",
        "selector": "importance:strength=0.25:limit=0.5:ridge=0.5:steadiness=100",
        "allocation": "fisher:rounds=1:most=0.95:step=0.05:tokens=8192",
        "refinement": "none",
        "correction": "none",
    }


def test_parts_are_those_in_use() -> None:
    paper = SparsityConfig(method="wina-paper", criterion="random").parts()
    assert paper["criterion"] == "random"
    assert paper["rotation"].startswith("orthogonal")
    assert not [kind for kind in paper if kind.startswith("criterion of")]
    assert SparsityConfig(method="wina-paper").parts()["criterion of k_proj"] == "l2-norm"
    assert SparsityConfig(weight_dtype="int4").parts()["rounding"].startswith("gptq:")
    refined = SparsityConfig(refinement="learned:steps=3").parts()["refinement"]
    assert refined.startswith("learned:steps=3:channels=")
