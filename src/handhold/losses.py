"""Losses of images, surfaces and fields: pure functions of tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from .kernels.ssim import ssim_map, ssim_mean
from .render.depth import normals_from_depth


def l1(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean absolute difference; with `weight` (broadcast against x), the weighted mean over all entries of x."""
    d = (x - y).abs()
    return d.mean() if weight is None else _weighted(d, weight)


def l2(x: Tensor, y: Tensor, weight: Tensor | None = None) -> Tensor:
    """Mean squared difference; `weight` as in `l1`."""
    d = (x - y).square()
    return d.mean() if weight is None else _weighted(d, weight)


def _weighted(d: Tensor, weight: Tensor) -> Tensor:
    weight = weight.to(d).expand_as(d)
    return (d * weight).sum() / weight.sum().clamp(min=1e-8)


def ssim(x: Tensor, y: Tensor, backend: str | None = None) -> Tensor:
    """Mean structural similarity (Wang et al., IEEE TIP 2004) in [-1,1], 1 for equal images; a scalar, differentiable.

    x, y: (H,W,3) or (C,H,W), values in [0,1]. Window: Gaussian of 11 taps, sigma 1.5, zero padding; C1 1e-4, C2 9e-4.
    An image whose last axis is 3 is taken as (H,W,3). As a loss use 1 - ssim (3DGS: 0.8 l1 + 0.2 (1 - ssim)).
    """
    if x.ndim == 3 and x.shape[-1] == 3:
        x, y = x.permute(2, 0, 1), y.permute(2, 0, 1)
    return ssim_mean(x, y, backend)


def ssim_within(x: Tensor, y: Tensor, where: Tensor) -> Tensor:
    """Mean SSIM of the pixels `where` (H,W) bool of two images (H,W,3), both black elsewhere.

    The mean of Wang et al.'s map over the pixels in question: the whole image's would count the background as alike.
    """
    sure = where[..., None].to(x)
    both = ssim_map((x * sure).permute(2, 0, 1), (y * sure).permute(2, 0, 1))
    return both[:, where].mean()


def photometric(x: Tensor, y: Tensor, ssim_weight: float = 0.2, backend: str | None = None) -> Tensor:
    """(1 - w) L1 + w (1 - SSIM) of two images (H,W,3) (Kerbl et al., SIGGRAPH 2023, eq. 7)."""
    loss = (1 - ssim_weight) * l1(x, y)
    return loss + ssim_weight * (1 - ssim(x, y, backend)) if ssim_weight else loss


def psnr(x: Tensor, y: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of images in [0,1]."""
    return -10 * torch.log10((x - y).square().mean().clamp(min=1e-12))


def eikonal(gradient: Tensor) -> Tensor:
    """Mean (|gradient| - 1)^2 of (M,3) (Gropp et al., ICML 2020, eq. 2).

    Never gated by its own size: without it an SDF is no distance, and neither densities nor sample bounds mean metres.
    Where the field's gradient is exactly 0 it has none itself.
    """
    square = gradient.square().sum(-1)
    norm = torch.where(square > 0, square, torch.ones_like(square)).sqrt() * (square > 0)
    return (norm - 1).square().mean()


def depth_normal_consistency(normals: Tensor, alpha: Tensor, depth: Tensor, viewmats: Tensor, Ks: Tensor) -> Tensor:
    """How far composited normals are from the surface that the depth image shows (Huang et al., 2DGS, 2024, eq. 14).

    The mean over pixels of sum_i w_i (1 - n_i . N), N from `normals_from_depth`. normals (C,H,W,3) premultiplied, world
    frame, and alpha, depth (C,H,W,1) as `splat` returns them; viewmats (C,4,4), Ks (C,3,3). Pixels without N count 0.
    """
    surface = normals_from_depth(depth, viewmats, Ks)
    seen = surface.detach().square().sum(-1, keepdim=True) > 0
    return torch.where(seen, alpha - (normals * surface).sum(-1, keepdim=True), torch.zeros_like(alpha)).mean()
