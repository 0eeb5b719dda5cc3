"""wina: training-free activation sparsity for LLM decoding.

>>> import wina
>>> wina.sparsify(model, sparsity=0.5, tokenizer=tokenizer)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING, Any

from wina.api import sparsify
from wina.calibration import calibrate
from wina.config import SparsityConfig
from wina.decoding import decode
from wina.errors import WinaError
from wina.inspection import inspect
from wina.integrations.on_import import when_imported
from wina.patch import restore
from wina.plan import SparsityPlan
from wina.rotation import rotate, unrotate
from wina.switches import dense

if TYPE_CHECKING:
    from wina.integrations.transformers import WinaConfig

__version__ = "0.1.0"

__all__ = [
    "SparsityConfig",
    "SparsityPlan",
    "WinaConfig",
    "WinaError",
    "calibrate",
    "decode",
    "dense",
    "inspect",
    "restore",
    "rotate",
    "sparsify",
    "unrotate",
]


def _register_with_transformers() -> None:
    import wina.integrations.transformers  # noqa: F401  # registers on import


# transformers takes seconds to import, so `import wina` leaves it to whoever needs it.
when_imported("transformers.quantizers.auto", _register_with_transformers)


def __getattr__(name: str) -> Any:
    if name == "WinaConfig":  # derives from a class of transformers
        from wina.integrations.transformers import WinaConfig

        return WinaConfig
    raise AttributeError(f"module 'wina' has no attribute {name!r}")
