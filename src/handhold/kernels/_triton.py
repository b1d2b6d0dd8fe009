"""Whether the Triton kernels can run here. Imports no Triton, so it may be asked on any machine."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
import shutil

import torch


@functools.cache
def why_unavailable() -> str:
    """Why `available()` is False, in words; empty when it is True."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run: pip install 'handhold[gpu]' (Linux with an NVIDIA GPU)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device; install a CUDA build of torch on a machine with an NVIDIA GPU"
    try:
        major, minor = torch.cuda.get_device_capability()
    except RuntimeError as e:
        return f"CUDA does not start ({e})"
    if major < 7:
        return f"Triton needs compute capability 7.0 or newer, and this GPU has {major}.{minor}"
    # Triton compiles its launcher with the compiler of CC, else gcc or clang; it does not look for cc.
    compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"Triton needs a C compiler, and there is no {' or '.join(compilers)}; install gcc or set CC"
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
