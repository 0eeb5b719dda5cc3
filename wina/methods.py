"""Methods: published names for combinations of a criterion and an allocation.

A method is a row here; what it does stands in ``criteria/`` and ``allocation/``.
"""

from __future__ import annotations

from dataclasses import dataclass

from wina.registry import Registry


@dataclass(frozen=True)
class Method:
    """A named choice of criterion and allocation, each a spec of its registry."""

    criterion: str
    allocation: str
    source: str
    dense: bool = False


METHODS: Registry[Method] = Registry("method")

METHODS.register("dense")(Method("magnitude", "uniform", "nothing is dropped", dense=True))
METHODS.register("wina")(Method("l2-norm", "uniform", "|x|·‖W‖₂, arXiv 2505.19427"))
METHODS.register("teal")(Method("magnitude", "uniform", "|x|, arXiv 2408.14690"))
METHODS.register("was")(Method("l1-norm", "uniform", "|x|·‖W‖₁, EMNLP 2025 main 57"))
METHODS.register("wisparse")(
    Method("norm-power:0.5", "uniform", "|x|·‖W‖₂^α with α = 0.5, arXiv 2602.14452")
)
METHODS.register("random")(Method("random", "uniform", "random channels, a lower bound"))
