"""Structural similarity with its gradient (Wang et al., IEEE TIP 2004): 11 taps, sigma 1.5, zero padding."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from . import _lib
from ._checks import once
from ._lib import pointer, threads

C1, C2 = 0.01**2, 0.03**2


def ssim_mean(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
    """Mean SSIM of two images (C,H,W) in [0,1]: a scalar, differentiable in both (the compiled one once).

    Raises ValueError on shapes that differ and on images that are empty or not finite.
    """
    if x.ndim != 3 or x.shape != y.shape:
        raise ValueError(f"ssim takes two images (C,H,W) of one shape, not {tuple(x.shape)} and {tuple(y.shape)}")
    if not x.numel() or not (_lib.all_finite(x) and _lib.all_finite(y)):
        raise ValueError(f"ssim takes finite images with at least one pixel; these are {tuple(x.shape)}")
    chosen = _lib.resolve_backend(backend, x, y, triton=_triton)
    if chosen == "triton":
        return _triton().ssim_mean(x, y)
    if chosen == "torch":
        return twin(x, y)
    return _Ssim.apply(x, y)


def _triton():
    from . import ssim_triton

    return ssim_triton


def twin(x: Tensor, y: Tensor) -> Tensor:
    """The same in plain torch: the specification of csrc/ssim_isa.h."""
    return ssim_map(x, y).mean()


def ssim_map(x: Tensor, y: Tensor) -> Tensor:
    """(C,H,W) SSIM of the windows around each pixel, in plain torch."""
    t = torch.arange(11, dtype=x.dtype, device=x.device) - 5
    t = torch.exp(-t * t / 4.5)
    t = t / t.sum()

    row = t.expand(len(x), 1, 1, 11)  # depthwise on one image is several times faster than channels as a batch

    def blur(a: Tensor) -> Tensor:
        a = torch.nn.functional.conv2d(a[None], row, padding=(0, 5), groups=len(x))
        return torch.nn.functional.conv2d(a, row.transpose(2, 3), padding=(5, 0), groups=len(x))[0]

    p, q = blur(x), blur(y)
    xx, yy, xy = blur(x * x) - p * p, blur(y * y) - q * q, blur(x * y) - p * q
    return (2 * p * q + C1) * (2 * xy + C2) / ((p * p + q * q + C1) * (xx + yy + C2))


def _value_and_grad(x: Tensor, y: Tensor) -> tuple[float, Tensor]:
    mean, v_x = ctypes.c_double(), torch.empty_like(x)
    if _lib.lib().hh_ssim(pointer(x), pointer(y), *x.shape, ctypes.addressof(mean), pointer(v_x), threads()):
        raise MemoryError("not enough memory for SSIM")
    return mean.value, v_x


class _Ssim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        x, y = x.detach().contiguous(), y.detach().contiguous()
        value, v_x = _value_and_grad(x, y)
        v_y = _value_and_grad(y, x)[1] if ctx.needs_input_grad[1] else None  # SSIM is symmetric
        ctx.grads = v_x if ctx.needs_input_grad[0] else None, v_y
        return torch.tensor(value, dtype=torch.float32)

    @staticmethod
    @once
    def backward(ctx, v):
        return tuple(None if g is None else g * v for g in ctx.grads)
