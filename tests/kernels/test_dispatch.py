import pytest
import torch

from wina.errors import ConfigError, UnknownNameError
from wina.kernels import cpu
from wina.kernels.dispatch import LayerSpec, choose

LAYER = LayerSpec(torch.device("cpu"), torch.float32, 64, 32)


def test_native_kernels_serve_the_cpu() -> None:
    choice = choose(LAYER)
    assert (choice.backend.name, choice.reason) == ("cpu", "fastest here")


def test_refusals_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "load", lambda: "no C++ compiler found")
    choice = choose(LAYER)
    assert choice.backend.name == "reference"
    assert choice.reason == "cpu: no C++ compiler found"
    with pytest.raises(ConfigError, match=r"cannot serve.*no C\+\+ compiler"):
        choose(LAYER, "cpu")


def test_wanted_backend() -> None:
    assert choose(LAYER, "reference").reason == "asked for"
    with pytest.raises(UnknownNameError, match="Known: auto, triton, cpu, reference"):
        choose(LAYER, "cuda")
