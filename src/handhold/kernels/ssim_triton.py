"""SSIM and its gradient on CUDA in Triton: the specification is `ssim.twin`.

Four launches of 11-tap passes over maps that stay in the L2 cache; the torch twin takes dozens, ten of them one-channel
convolutions. No atomics: the mean is a sum of one partial sum per program.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._triton import on

_GAUSS = [math.exp(-((k - 5) ** 2) / 4.5) for k in range(11)]
TAPS = tl.constexpr(tuple(g / sum(_GAUSS) for g in _GAUSS))
C1, C2 = tl.constexpr(0.01**2), tl.constexpr(0.03**2)
BLOCK = 256


@triton.jit(do_not_specialize=["count"])
def blur_images(x, y, out, count, width, BLOCK: tl.constexpr):
    """Along rows: out (5,count) = blurred x, y, x^2, y^2, x y."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = i % width
    p = tl.zeros((BLOCK,), tl.float32)
    q, xx, yy, xy = p, p, p, p
    for k in tl.static_range(11):
        at = (i < count) & (column + (k - 5) >= 0) & (column + (k - 5) < width)
        a, b = tl.load(x + i + (k - 5), at, 0.0), tl.load(y + i + (k - 5), at, 0.0)
        wa, wb = TAPS[k] * a, TAPS[k] * b
        p, q, xx, yy, xy = p + wa, q + wb, xx + wa * a, yy + wb * b, xy + wa * b
    tl.store(out + i, p, i < count)
    tl.store(out + count + i, q, i < count)
    tl.store(out + 2 * count + i, xx, i < count)
    tl.store(out + 3 * count + i, yy, i < count)
    tl.store(out + 4 * count + i, xy, i < count)


@triton.jit(do_not_specialize=["count"])
def compare(blurred, partial, d, count, width, height, GRADIENT: tl.constexpr, BLOCK: tl.constexpr):
    """Along columns; partial: sum of SSIM per program; d (3,count): dSSIM / d blurred x, x^2, x y."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (i // width) % height
    p = tl.zeros((BLOCK,), tl.float32)
    q, xx, yy, xy = p, p, p, p
    for k in tl.static_range(11):
        at = (i < count) & (row + (k - 5) >= 0) & (row + (k - 5) < height)
        j = i + (k - 5) * width
        p += TAPS[k] * tl.load(blurred + j, at, 0.0)
        q += TAPS[k] * tl.load(blurred + count + j, at, 0.0)
        xx += TAPS[k] * tl.load(blurred + 2 * count + j, at, 0.0)
        yy += TAPS[k] * tl.load(blurred + 3 * count + j, at, 0.0)
        xy += TAPS[k] * tl.load(blurred + 4 * count + j, at, 0.0)
    a1, a2 = 2 * p * q + C1, 2 * (xy - p * q) + C2
    b1, b2 = p * p + q * q + C1, (xx - p * p) + (yy - q * q) + C2
    r = 1.0 / (b1 * b2)
    s = a1 * a2 * r
    tl.store(partial + tl.program_id(0), tl.sum(tl.where(i < count, s, 0.0)))
    if GRADIENT:
        tl.store(d + i, 2 * q * (a2 - a1) * r - 2 * p * s * (1.0 / b1 - 1.0 / b2), i < count)
        tl.store(d + count + i, -s / b2, i < count)
        tl.store(d + 2 * count + i, 2 * a1 * r, i < count)


@triton.jit(do_not_specialize=["count"])
def blur_gradients(d, out, count, width, BLOCK: tl.constexpr):
    """Along rows, three maps."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = i % width
    a = tl.zeros((BLOCK,), tl.float32)
    b, c = a, a
    for k in tl.static_range(11):
        at = (i < count) & (column + (k - 5) >= 0) & (column + (k - 5) < width)
        a += TAPS[k] * tl.load(d + i + (k - 5), at, 0.0)
        b += TAPS[k] * tl.load(d + count + i + (k - 5), at, 0.0)
        c += TAPS[k] * tl.load(d + 2 * count + i + (k - 5), at, 0.0)
    tl.store(out + i, a, i < count)
    tl.store(out + count + i, b, i < count)
    tl.store(out + 2 * count + i, c, i < count)


@triton.jit(do_not_specialize=["count"])
def image_gradient(x, y, d, v_x, count, width, height, BLOCK: tl.constexpr):
    """Along columns: v_x = dSSIM mean / dx = (blur d_x + 2 x blur d_xx + y blur d_xy) / count."""
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    row = (i // width) % height
    a = tl.zeros((BLOCK,), tl.float32)
    b, c = a, a
    for k in tl.static_range(11):
        at = (i < count) & (row + (k - 5) >= 0) & (row + (k - 5) < height)
        j = i + (k - 5) * width
        a += TAPS[k] * tl.load(d + j, at, 0.0)
        b += TAPS[k] * tl.load(d + count + j, at, 0.0)
        c += TAPS[k] * tl.load(d + 2 * count + j, at, 0.0)
    g = a + 2 * tl.load(x + i, i < count, 0.0) * b + tl.load(y + i, i < count, 0.0) * c
    tl.store(v_x + i, g / count, i < count)


def value_and_gradient(x: Tensor, y: Tensor, gradient: bool = True) -> tuple[Tensor, Tensor | None]:
    """Mean SSIM of contiguous float32 images (C,H,W), a 0-d tensor on their device, and its gradient to x (or None)."""
    count, (_, height, width) = x.numel(), x.shape
    if 5 * count >= 2**31:
        raise ValueError(f"images of shape {tuple(x.shape)} are too large for the triton backend's SSIM")
    grid = (triton.cdiv(count, BLOCK),)
    blurred, partial = x.new_empty(5, *x.shape), x.new_empty(grid[0])
    d = x.new_empty(3, *x.shape) if gradient else None
    with on(x):
        blur_images[grid](x, y, blurred, count, width, BLOCK=BLOCK, num_warps=8)
        compare[grid](blurred, partial, d, count, width, height, GRADIENT=gradient, BLOCK=BLOCK, num_warps=8)
        mean = (partial.sum(dtype=torch.float64) / count).to(torch.float32)
        if not gradient:
            return mean, None
        v_x = torch.empty_like(x)
        blur_gradients[grid](d, blurred, count, width, BLOCK=BLOCK, num_warps=8)
        image_gradient[grid](x, y, blurred, v_x, count, width, height, BLOCK=BLOCK, num_warps=8)
    return mean, v_x


class _Ssim(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        x, y = x.detach().contiguous(), y.detach().contiguous()
        mean, v_x = value_and_gradient(x, y, ctx.needs_input_grad[0])
        v_y = value_and_gradient(y, x)[1] if ctx.needs_input_grad[1] else None  # SSIM is symmetric
        ctx.grads = v_x, v_y
        return mean

    @staticmethod
    def backward(ctx, v):
        return tuple(None if g is None else g * v for g in ctx.grads)


def ssim_mean(x: Tensor, y: Tensor) -> Tensor:
    """See `handhold.kernels.ssim.ssim_mean`, which checks the shapes. float32, CUDA; no host synchronisation."""
    return _Ssim.apply(x, y)
