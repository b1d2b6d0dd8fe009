"""SSIM as splatting code writes it: an 11 x 11 Gaussian window, depthwise conv2d with zero padding, torch autograd."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import conv2d

C1, C2 = 0.01**2, 0.03**2


def window(channels: int) -> Tensor:
    g = torch.exp(-((torch.arange(11.0) - 5) ** 2) / (2 * 1.5**2))
    g = g / g.sum()
    return (g[:, None] * g[None]).expand(channels, 1, 11, 11).contiguous()


def ssim(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """Mean over two images (C,H,W) in [0,1]."""
    c = len(x)

    def blur(a: Tensor) -> Tensor:
        return conv2d(a[None], w, padding=5, groups=c)[0]

    return _mean(x, y, blur)


def ssim_separable(x: Tensor, y: Tensor, w: Tensor) -> Tensor:
    """The same with two passes of 11 taps."""
    row = w[:, :, 5:6] / w[0, 0, 5].sum()

    def blur(a: Tensor) -> Tensor:
        a = conv2d(a[None], row, padding=(0, 5), groups=len(x))
        return conv2d(a, row.transpose(2, 3), padding=(5, 0), groups=len(x))[0]

    return _mean(x, y, blur)


def _mean(x: Tensor, y: Tensor, blur) -> Tensor:
    mx, my = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
    return ((2 * mx * my + C1) * (2 * cov + C2) / ((mx * mx + my * my + C1) * (vx + vy + C2))).mean()
