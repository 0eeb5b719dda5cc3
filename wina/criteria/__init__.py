"""Criteria: from a weight to one constant per input channel.

A channel's score is |x_j|·c_j; a criterion says what c is. Published methods differ here by one
line (METHOD names are in :mod:`wina.methods`). To add one: a file beside this one with a class
decorated ``@CRITERIA.register("name")``, and its import below. Importing nothing but torch, a
criterion knows of no model.
"""

from wina.criteria.base import CRITERIA, Criterion
from wina.criteria.magnitude import Magnitude
from wina.criteria.random import Random
from wina.criteria.weight_norm import L1Norm, L2Norm, NormPower

__all__ = ["CRITERIA", "Criterion", "L1Norm", "L2Norm", "Magnitude", "NormPower", "Random"]
