"""Selectors: from scores to a mask.

Every selector ends in the one form that the kernels know, keep j iff not |x_j| ≤ t_j·scale: it
says where the cut-off comes from (calibration or the token itself) and what the token's ``scale``
is. To add one: a file beside this one, ``@SELECTORS.register("name")``, and its import below.
"""

from wina.selectors.base import SELECTORS, Selector
from wina.selectors.importance import Importance
from wina.selectors.relative import Relative
from wina.selectors.statistical import Statistical
from wina.selectors.threshold import Threshold
from wina.selectors.topk import TopK

__all__ = ["SELECTORS", "Importance", "Relative", "Selector", "Statistical", "Threshold", "TopK"]
