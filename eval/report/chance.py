"""What guessing scores on known tasks, so that a small model's score is not taken for knowledge."""

from __future__ import annotations

_CHANCE = {
    "arc_challenge": 0.25,
    "arc_easy": 0.25,
    "boolq": 0.5,
    "copa": 0.5,
    "hellaswag": 0.25,
    "mmlu": 0.25,
    "openbookqa": 0.25,
    "piqa": 0.5,
    "sciq": 0.25,
    "winogrande": 0.5,
    "gsm8k": 0.0,  # answers are generated
    "lambada": 0.0,
    "triviaqa": 0.0,
}


def chance(task: str) -> float | None:
    """Expected score of a uniform guess, by the name that a task's name contains; None: unknown."""
    return next((level for name, level in _CHANCE.items() if name in task.lower()), None)
