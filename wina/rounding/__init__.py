"""Rounding: which integers stand for the weights of a projection kept in 8 or 4 bits.

To add one: a file beside this one, ``@ROUNDINGS.register("name")``, and its import below.
"""

from wina.rounding.base import ROUNDINGS, USUAL_ROUNDING, Nearest, Rounding
from wina.rounding.gptq import GPTQ

__all__ = ["GPTQ", "ROUNDINGS", "USUAL_ROUNDING", "Nearest", "Rounding"]
