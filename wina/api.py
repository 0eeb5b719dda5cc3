"""The one-line entry point, put together from calibration and patching."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from wina.allocation import Measurements
from wina.calibration import calibrate
from wina.config import SparsityConfig
from wina.errors import ConfigError
from wina.patch import apply_plan, check_use
from wina.plan import SparsityPlan
from wina.saving import saves_with_plan


def sparsify(
    model: nn.Module,
    plan: SparsityPlan | SparsityConfig | None = None,
    *,
    tokenizer: Any | None = None,
    texts: Iterable[str] | Iterable[Tensor] | Tensor | None = None,
    prefill: str | None = None,
    backend: str = "auto",
    keep_original: bool = False,
    show_progress: bool = True,
    measurements: Measurements | None = None,
    **settings: Any,
) -> SparsityPlan:
    """Make a decoder read only the weights that matter, in place.

    With a plan, applies it. Otherwise calibrates first, on a bundled text unless ``texts`` are
    given.

    Args:
        model: a dense decoder of transformers, on any device.
        plan: a plan, or a config to calibrate with.
        tokenizer: the model's; needed to calibrate unless ``texts`` are token ids.
        texts: calibration texts, see :func:`wina.calibrate`.
        prefill: overrides the config's prefill protocol.
        backend: ``"auto"`` or the name of a kernel backend.
        keep_original: with ``weight_dtype``, keep the original weights in memory beside the rounded
            ones. Without it they are freed, and :func:`wina.restore` refuses.
        show_progress: draw a progress bar on stderr.
        measurements: see :func:`wina.calibrate`.
        **settings: fields of :class:`SparsityConfig`, such as ``sparsity=0.5, method="teal"``.

    Returns:
        The plan in use, which may be saved.

    Raises:
        wina.errors.WinaError: with what to do; the model is unchanged then.
    """
    if isinstance(plan, SparsityPlan | SparsityConfig) and settings:
        raise ConfigError(
            f"{type(plan).__name__} and {', '.join(settings)}= were both given: pass one of them"
        )
    if plan is None:
        plan = SparsityConfig.from_dict(settings)
    if isinstance(plan, SparsityConfig):
        check_use(model, plan, prefill, backend)  # before the minutes, not after
        plan = calibrate(model, tokenizer, plan, texts, show_progress, measurements)
    elif not isinstance(plan, SparsityPlan):
        raise ConfigError(
            f"expected a SparsityPlan or a SparsityConfig, got {type(plan).__name__} "
            "(sparsity=0.5 is given by keyword)"
        )
    apply_plan(model, plan, prefill, backend, keep_original, show_progress)
    saves_with_plan(model)
    return plan
