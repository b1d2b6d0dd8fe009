"""Compiled CPU kernels behind a plain C ABI, each with a torch twin that is its specification.

Every op takes `backend`: "cpu" (compiled, float32 on CPU), "torch" (any dtype and device), or None to choose: the
compiled one when it is there and the tensors are CPU float32. The environment variable HANDHOLD_BACKEND ("cpu", "torch"
or "auto") overrides None.
"""

from ._lib import available, info, resolve_backend, why_unavailable

__all__ = ["available", "info", "resolve_backend", "why_unavailable"]
