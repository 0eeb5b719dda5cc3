"""Tiny models, rotated in a moment."""

from __future__ import annotations

import warnings

from conftest import CALIBRATION
from torch import nn

from wina import rotate


def turned(model: nn.Module, spec: str, **options: object) -> None:
    """Rotate a tiny model without a word."""
    options = {"texts": CALIBRATION, "window": 128, "tokens": 1024, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        rotate(model, spec, show_progress=False, **options)  # type: ignore[arg-type]
