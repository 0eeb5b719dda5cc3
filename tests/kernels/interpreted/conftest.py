"""These tests run where Triton interprets kernels: in a child of ``test_triton_interpreter.py``.

``TRITON_INTERPRET`` decides at import what a kernel is, and the tests that compile kernels need
the other choice, so the two cannot share a process.
"""

import os
from typing import Any

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
collect_ignore_glob = [] if INTERPRETED else ["test_*.py"]

if INTERPRETED:
    import numpy as np
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    _create_dot = InterpreterBuilder.create_dot

    def _widened(handle: Any) -> Any:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)

    def _dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return _create_dot(self, _widened(a), _widened(b), *rest)

    # The interpreter (Triton 3.9) keeps bfloat16 as uint16 and multiplies those integers.
    InterpreterBuilder.create_dot = _dot
