"""wina: training-free activation sparsity for LLM decoding.

>>> import wina
>>> wina.sparsify(model, sparsity=0.5, tokenizer=tokenizer)  # doctest: +SKIP
"""

from wina.api import sparsify
from wina.calibration import calibrate
from wina.config import SparsityConfig
from wina.errors import WinaError
from wina.inspection import inspect
from wina.patch import dense, restore
from wina.plan import SparsityPlan
from wina.rotation import rotate, unrotate

__version__ = "0.1.0"

__all__ = [
    "SparsityConfig",
    "SparsityPlan",
    "WinaError",
    "calibrate",
    "dense",
    "inspect",
    "restore",
    "rotate",
    "sparsify",
    "unrotate",
]
