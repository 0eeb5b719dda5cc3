"""Allocation: how much sparsity each projection gets.

To add a policy: a file beside this one, ``@ALLOCATIONS.register("name")``, and its import below.
"""

from wina.allocation.base import ALLOCATIONS, Allocation
from wina.allocation.uniform import Uniform

__all__ = ["ALLOCATIONS", "Allocation", "Uniform"]
