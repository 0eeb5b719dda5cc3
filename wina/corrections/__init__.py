"""Corrections: what is added to a sparse product for the channels that it leaves out.

A correction is small next to the weights, read for every token, and counted: :class:`Terms`. To add
one: a file beside this one, ``@CORRECTIONS.register("name")``, and its import below.
"""

from wina.corrections.base import (
    CORRECTIONS,
    NO_CORRECTION,
    Correction,
    Fit,
    Products,
    Terms,
    Uncorrected,
)
from wina.corrections.bias import Bias
from wina.corrections.low_rank import LowRank, WeightSVD
from wina.corrections.mode import Mode
from wina.corrections.sparse_fit import SparseFit

__all__ = [
    "CORRECTIONS",
    "NO_CORRECTION",
    "Bias",
    "Correction",
    "Fit",
    "LowRank",
    "Mode",
    "Products",
    "SparseFit",
    "Terms",
    "Uncorrected",
    "WeightSVD",
]
