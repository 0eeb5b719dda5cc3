"""vLLM's quantization method ``wina``: sparse decode steps in its engine.

vLLM finds :func:`register` by the entry point ``vllm.general_plugins`` in every process that it
starts. ``step.py`` knows the arithmetic and no vLLM; ``plugin.py`` holds everything of vLLM.
"""

from __future__ import annotations


def register() -> None:
    """Make the method known; vLLM calls it, in each of its processes and maybe more than once."""
    import wina.integrations.vllm.plugin  # noqa: F401  # its decorators register
