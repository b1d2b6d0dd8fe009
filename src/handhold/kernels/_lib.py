"""Loading of libhandhold_kernels and the choice of backend."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import HandholdError

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

ABI_VERSION = 3
BACKENDS = ("cpu", "triton", "torch")

_I, _L, _F, _P = ctypes.c_int, ctypes.c_int64, ctypes.c_float, ctypes.c_void_p
_LO = _F * 3  # grid origin
_SIGNATURES = {
    "hh_grid_sample": (None, [_L, _P, _P, _I, _LO, _F, _P, _P, _I]),
    "hh_grid_backward": (_I, [_L, _P, _P, _I, _LO, _F, _P, _P, _P, _P, _P, _I]),
    "hh_grid_march": (None, [_L, _P, _P, _P, _I, _LO, _F, _F, _F, _P, _P, _P, _I]),
    "hh_grid_reg": (_I, [_P, _I, _LO, _F, _F, _F, _F, _P, _P, _P, _I]),
    "hh_grid_blur": (None, [_P, _I, _P, _I, _I]),
    "hh_grid_extract": (None, [_P, _I, _P, _I]),
    "hh_grid_update": (_I, [_P, _I, *[_F] * 4, _I, *[_P] * 6, _I, *[_F] * 4, _I, _F, _P, _P, _P, _I]),
    "hh_render_forward": (None, [_L, _I, _P, _P, _P, _P, _I, _LO, _F, _F, _P, _P, _P, _P, _I]),
    "hh_render_backward": (_I, [_L, _I, _P, _P, _P, _P, _I, _LO, _F, _F, *[_P] * 10, _I]),
    "hh_encode_forward": (None, [_L, _P, _P, _I, _I, _P, _P, _P, _I, _P, _P, _I]),
    "hh_encode_backward": (None, [_L, _P, _P, _I, _I, _P, _P, _P, _I, _P, _P, _P, _P, _I]),
    "hh_fourier_forward": (None, [_L, _P, _I, _P, _I, _P, _P, _I]),
    "hh_fourier_backward": (None, [_L, _P, _I, _P, _I, _P, _P, _P, _I]),
    "hh_triplane_forward": (None, [_L, _P, _P, _I, _I, _P, _I, _P, _P, _I]),
    "hh_triplane_backward": (None, [_L, _P, _P, _I, _I, _P, _I, _P, _P, _P, _P, _I]),
    "hh_splat_forward": (_P, [_I] * 8 + [_P] * 13 + [_I]),
    "hh_splat_backward": (_I, [_P] * 16 + [_I]),
    "hh_splat_free": (None, [_P]),
    "hh_splat_image": (None, [_L, _L, _I] + [_P] * 7 + [_I]),
    "hh_splat_image_backward": (_I, [_L, _L, _I] + [_P] * 10 + [_I]),
    "hh_all_finite": (_I, [_I, _P, _P, _I]),
    "hh_mesh_raster": (_I, [_L, _I, _I, _P, _P, _P, _F, _P, _P, _P, _I]),
    "hh_mesh_raster_backward": (_I, [_L, _I, _I] + [_P] * 8 + [_I]),
    "hh_mesh_interpolate": (None, [_L, _I, _I] + [_P] * 5 + [_I]),
    "hh_mesh_interpolate_backward": (_I, [_L, _L, _I, _I] + [_P] * 8 + [_I]),
    "hh_silhouette_forward": (_P, [_L, _L, _I, _I, _I] + [_P] * 4 + [_F] + [_P] * 3),
    "hh_silhouette_backward": (None, [_P] * 7),
    "hh_silhouette_free": (None, [_P]),
    "hh_soft_forward": (_P, [_L, _L, _I, _I] + [_P] * 3 + [_F] * 3 + [_P, _I]),
    "hh_soft_backward": (_I, [_P, _L] + [_P] * 6 + [_I]),
    "hh_soft_free": (None, [_P]),
    "hh_ssim": (_I, [_P, _P, _I, _I, _I, _P, _P, _I]),
    "hh_bvh_build": (_P, [_L, _L, _P, _P]),
    "hh_bvh_free": (None, [_P]),
    "hh_bvh_closest": (None, [_P, _L, _P, _P, _P, _P, _I]),
    "hh_bvh_winding": (None, [_P, _L, _P, _F, _P, _I]),
    "hh_bvh_rays": (None, [_P, _L, _P, _P, _P, _P, _P, _I]),
}


@functools.cache
def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None and the reason."""
    from . import __path__ as folders

    ending = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    paths = [Path(f) / f"libhandhold_kernels{ending}" for f in folders]
    found = [p for p in paths if p.is_file()]
    if not found:
        return None, "they were not built; install a C++ compiler (g++ or clang++) and install handhold again"
    try:
        lib = ctypes.CDLL(str(found[0]))
        lib.hh_isa.restype = ctypes.c_char_p
        if lib.hh_abi_version() != ABI_VERSION:
            return None, f"{found[0]} was built from another version of handhold; build it again"
        for name, (result, arguments) in _SIGNATURES.items():
            getattr(lib, name).restype, getattr(lib, name).argtypes = result, arguments
    except (OSError, AttributeError) as e:
        return None, f"{found[0]} cannot be loaded ({e})"
    lib.path = str(found[0])
    return lib, ""


def available() -> bool:
    """True when the compiled kernels are built for this machine and load."""
    return _load()[0] is not None


def why_unavailable() -> str:
    """Why `available()` is False, in words; empty when it is True."""
    return _load()[1]


def info() -> dict:
    """What `handhold doctor` shows: backend, path, instruction set, threads, the reason when not available, Triton."""
    import torch

    from . import _triton

    lib, why = _load()
    return {
        "available": lib is not None,
        "backend": resolve_backend(),
        "path": lib.path if lib else None,
        "isa": lib.hh_isa().decode() if lib else None,
        "threads": torch.get_num_threads(),
        "why_unavailable": why,
        "triton": _triton.available(),
    }


def lib() -> ctypes.CDLL:
    """The loaded library; raises `HandholdError` when there is none."""
    found, why = _load()
    if found is None:
        raise HandholdError(f"The compiled kernels are not available: {why}, or set HANDHOLD_BACKEND=torch.")
    return found


def _triton_missing(on_gpu: bool) -> str:
    """Why Triton kernels cannot run; empty when they can. Without tensors on the GPU: whether Triton is installed."""
    from . import _triton

    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; run: pip install 'handhold[gpu]'"
    return _triton.why_unavailable() if on_gpu and not _triton.interpreted() else ""


def resolve_backend(
    backend: str | None = None, *tensors: torch.Tensor | None, triton: Callable[[], object] | None = None
) -> str:
    """ "cpu", "triton" or "torch" for an op on these tensors.

    `triton` imports the op's Triton kernels where it has some; without it the op never runs on Triton. An explicit
    backend raises when it or the tensors do not allow it; HANDHOLD_BACKEND=cpu or =triton raises only when the kernels
    are missing, since tensors that do not suit them always take the torch path.
    """
    from . import _triton

    single = all(t is None or str(t.dtype) == "torch.float32" for t in tensors)
    fits = single and all(t is None or t.device.type == "cpu" for t in tensors)
    on_gpu = (
        single and any(t is not None for t in tensors) and all(t is None or t.device.type == "cuda" for t in tensors)
    )
    wish = backend
    if backend is None:
        wish = os.environ.get("HANDHOLD_BACKEND", "auto").strip().lower() or "auto"
        if wish not in (*BACKENDS, "auto"):
            raise HandholdError(f"HANDHOLD_BACKEND is {wish!r}; set it to cpu, triton, torch or auto.")
    elif backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}; choose from {BACKENDS}")
    if wish == "cpu":
        lib()
        if backend and not fits:
            raise TypeError("the cpu backend takes float32 tensors on the CPU")
    if wish == "triton":
        if missing := _triton_missing(on_gpu):
            raise HandholdError(f"The triton backend is not available: {missing}.")
        if backend and triton is None:
            raise ValueError("this operation has no triton backend; use backend='torch'")
        if backend and not on_gpu and not (single and _triton.interpreted()):
            raise TypeError("the triton backend takes float32 tensors on a CUDA device")
    if backend:
        return backend
    if wish == "torch":
        return "torch"
    if on_gpu and wish != "cpu" and triton is not None and not _triton_missing(on_gpu):
        try:
            triton()
            return "triton"
        except ImportError:
            pass
    return "cpu" if fits and available() else "torch"


def capturing(*tensors: torch.Tensor) -> bool:
    """True while a CUDA graph is captured with these tensors: nothing may be read back, so values go unchecked."""
    import torch

    for device in {t.device for t in tensors if t.is_cuda}:
        with torch.cuda.device(device):  # the current stream is one of a device
            if torch.cuda.is_current_stream_capturing():
                return True
    return False


def all_finite(t: torch.Tensor) -> bool:
    """True when no entry is NaN or infinite. Many times faster than isfinite().all(), which writes masks out."""
    return t.numel() == 0 or capturing(t) or all(math.isfinite(v) for v in t.detach().aminmax())


def pointer(t: torch.Tensor | None) -> int | None:
    """Address of a contiguous CPU tensor's data, for ctypes; None stays None (a null pointer)."""
    if t is None:
        return None
    if not t.is_cpu or not t.is_contiguous():
        raise TypeError(
            f"a compiled kernel takes contiguous tensors on the CPU, not strides {t.stride()} on {t.device}"
        )
    return t.data_ptr()


def threads() -> int:
    import torch

    return torch.get_num_threads()
