"""Compiled CPU kernels behind a plain C ABI, Triton ones for CUDA, and for each a torch twin that is its specification.

Every op takes `backend`: "cpu" (compiled, float32 on CPU), "triton" (float32 on CUDA, where the op has such a kernel),
"torch" (any dtype and device), or None to choose the first of these that fits the tensors and is there. The environment
variable HANDHOLD_BACKEND ("cpu", "triton", "torch" or "auto") overrides None.
"""

from ._lib import available, info, resolve_backend, why_unavailable

__all__ = ["available", "info", "resolve_backend", "why_unavailable"]
