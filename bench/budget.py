"""A bench that must end in time: it asks before each part and notes what it left out."""

from __future__ import annotations

import time


class Budget:
    """Seconds that may be spent, from now on.

    Attributes:
        left_out: parts that were refused, in order.
    """

    def __init__(self, seconds: float) -> None:
        self._end = time.monotonic() + seconds
        self.left_out: list[str] = []

    @property
    def left(self) -> float:
        """Seconds left."""
        return self._end - time.monotonic()

    def allows(self, part: str, seconds: float) -> bool:
        """Whether a part that may take so many seconds fits; a refused one is noted."""
        fits = self.left >= seconds
        if not fits:
            self.left_out.append(part)
        return fits
