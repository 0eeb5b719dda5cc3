"""Refinement: thresholds and constants of a calibrated plan made better, all of them together.

To add one: a file beside this one, ``@REFINEMENTS.register("name")``, and its import below.
"""

from wina.refinement.base import NO_REFINEMENT, REFINEMENTS, Exercise, Refinement, Slopes, Unrefined
from wina.refinement.learned import Learned

__all__ = [
    "NO_REFINEMENT",
    "REFINEMENTS",
    "Exercise",
    "Learned",
    "Refinement",
    "Slopes",
    "Unrefined",
]
