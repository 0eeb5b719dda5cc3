"""Corrections: what is added to a sparse product for the channels that it leaves out.

A correction is small next to the weights, read for every token, and counted: :class:`Terms`. To add
one: a file beside this one, ``@CORRECTIONS.register("name")``, and its import below.
"""

from wina.corrections.base import CORRECTIONS, Correction, Fit, Products, Terms, Uncorrected
from wina.corrections.bias import Bias

__all__ = ["CORRECTIONS", "Bias", "Correction", "Fit", "Products", "Terms", "Uncorrected"]
