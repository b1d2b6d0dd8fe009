"""Whether the Triton kernels can run here. Imports no Triton, so it may be asked on any machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os

import torch


@functools.cache
def why_unavailable() -> str:
    """Why `available()` is False, in words; empty when it is True."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; install handhold[gpu] (Linux with an NVIDIA GPU)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; install a CUDA build of torch on a machine with an NVIDIA GPU"
    major, minor = torch.cuda.get_device_capability()
    if major < 7:
        return f"Triton needs compute capability 7.0 or newer, and this GPU has {major}.{minor}"
    return ""


def available() -> bool:
    """True when Triton is installed and torch sees a CUDA device it can compile for."""
    return not why_unavailable()


def interpreted() -> bool:
    """True when the kernels run in Triton's interpreter, on CPU tensors; the variable is read at their import."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def on(t: torch.Tensor):
    """Context in which `t`'s device is the one that kernels are launched on."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()
