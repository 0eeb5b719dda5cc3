"""Allocation: how much sparsity each projection gets.

To add a policy: a file beside this one, ``@ALLOCATIONS.register("name")``, and its import below.
"""

from wina.allocation.base import ALLOCATIONS, Allocation, Problem, Unit
from wina.allocation.block_error import BlockError
from wina.allocation.fisher import Fisher
from wina.allocation.gated import Gated
from wina.allocation.greedy import Greedy
from wina.allocation.growing import Growing
from wina.allocation.measurements import Measurements
from wina.allocation.uniform import Uniform

__all__ = [
    "ALLOCATIONS",
    "Allocation",
    "BlockError",
    "Fisher",
    "Gated",
    "Greedy",
    "Growing",
    "Measurements",
    "Problem",
    "Uniform",
    "Unit",
]
