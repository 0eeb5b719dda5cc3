"""Methods: published names for combinations of a criterion, an allocation and a correction.

A method is a row here; what it does stands in ``criteria/``, ``allocation/`` and ``corrections/``.
What a method has to compute before it can decide is said by its parts (:attr:`Method.needs`); at
run time all of them cost one threshold per channel, and what their correction adds.
"""

from __future__ import annotations

from dataclasses import dataclass

from wina.allocation import ALLOCATIONS
from wina.corrections import CORRECTIONS
from wina.needs import Needs, most
from wina.registry import Registry, create


@dataclass(frozen=True)
class Method:
    """A named choice of criterion, allocation and correction, each a spec of its registry."""

    criterion: str
    allocation: str
    source: str
    dense: bool = False
    correction: str = "none"

    @property
    def needs(self) -> Needs:
        """What its allocation policy and its correction have to compute."""
        return most(
            create(ALLOCATIONS, self.allocation).needs, create(CORRECTIONS, self.correction).needs
        )


METHODS: Registry[Method] = Registry("method")

METHODS.register("dense")(Method("magnitude", "uniform", "nothing is dropped", dense=True))
METHODS.register("wina")(Method("l2-norm", "uniform", "|x|·‖W‖₂, arXiv 2505.19427"))
METHODS.register("teal")(Method("magnitude", "uniform", "|x|, arXiv 2408.14690"))
METHODS.register("teal-greedy")(
    Method("magnitude", "greedy:step=0.05", "TEAL with its block-wise greedy allocation")
)
METHODS.register("wina-greedy")(
    Method("l2-norm", "greedy:step=0.025", "WINA with TEAL's greedy allocation, as in its paper")
)
METHODS.register("was")(
    Method("l1-norm", "growing", "|x|·‖W‖₁, block budgets growing with depth, EMNLP 2025 main 57")
)
METHODS.register("wisparse")(
    Method("norm-power:0.5", "uniform", "|x|·‖W‖₂^α with α = 0.5, arXiv 2602.14452")
)
METHODS.register("wina-plus")(
    Method("norm-power:0.5", "fisher", "|x|·‖W‖₂^½, bytes spent where the loss asks for it")
)
METHODS.register("random")(Method("random", "uniform", "random channels, a lower bound"))
