"""What has to be computed before a method can decide, for people who choose one."""

from __future__ import annotations

from enum import StrEnum


class Needs(StrEnum):
    """What an allocation policy, a refinement or a correction has to compute, from free to dear."""

    NOTHING = "nothing"
    ACTIVATIONS = "activations of the dense model, and its blocks run again sparse"
    GRADIENTS = "gradients of the dense model's loss"
    EVALUATIONS = "gradients of the sparse model's loss as well"


def most(*needs: Needs) -> Needs:
    """The dearest of several."""
    return max(needs, key=list(Needs).index)
