"""Differentiable Gaussian splatting: colour, alpha, expected depth and each body's share, in one pass per camera."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..kernels.splat import rasterize


@dataclass(frozen=True)
class Splatted:
    """What `splat` returns, for C cameras of H x W pixels."""

    color: Tensor  # (C,H,W,3), over the background (black when none is given)
    alpha: Tensor  # (C,H,W,1)
    depth: Tensor  # (C,H,W,1) expected camera z in metres: sum of weight * z over alpha; 0 where alpha is 0
    ids: Tensor | None = (
        None  # (C,H,W,n_ids) alpha that each body contributes; sums to alpha when every Gaussian has an id
    )


def splat(
    means: Tensor,
    quats: Tensor,
    scales: Tensor,
    opacities: Tensor,
    colors: Tensor,
    viewmats: Tensor,
    Ks: Tensor,
    width: int,
    height: int,
    sh_degree: int | None = None,
    backgrounds: Tensor | None = None,
    backend: str | None = None,
    ids: Tensor | None = None,
    n_ids: int | None = None,
) -> Splatted:
    """Render N Gaussians from C cameras (Kerbl et al., SIGGRAPH 2023; conventions of gsplat's `rasterization`).

    means (N,3) world metres; quats (N,4) wxyz, normalised inside; scales (N,3) metres; opacities (N,) in [0,1];
    colors (N,3), or (N,K,3) spherical-harmonic coefficients when sh_degree (0-3) is given; viewmats (C,4,4)
    camera-from-world, OpenCV axes; Ks (C,3,3) pixels, pixel centres at +0.5, no gradient; backgrounds (C,3).
    ids (N,): body of each Gaussian, 0..n_ids-1 (n_ids defaults to the largest id + 1; at most 12); -1 belongs to none.
    Gradients flow to everything else, viewmats included. Raises ValueError on wrong shapes.
    """
    if viewmats.ndim != 3 or Ks.ndim != 3 or len(viewmats) != len(Ks):
        raise ValueError(f"viewmats and Ks are (C,4,4) and (C,3,3), not {tuple(viewmats.shape)} and {tuple(Ks.shape)}")
    if ids is None:
        n_ids = 0
    elif n_ids is None:
        n_ids = int(ids.max()) + 1 if len(ids) else 1
    shape = (means, quats, scales, opacities, colors)
    views = [
        rasterize(*shape, V, K, width, height, sh_degree, ids, n_ids, backend)
        for V, K in zip(viewmats, Ks, strict=True)
    ]
    if len(views) == 1:
        out, alpha = views[0][0][None], views[0][1][None, ..., None]
    else:
        out = torch.stack([v[0] for v in views])
        alpha = torch.stack([v[1] for v in views])[..., None]
    color, depth, *shares = out.split(
        [3, 1] + ([n_ids] if n_ids else []), -1
    )  # one node in the graph, unlike three slices
    if backgrounds is not None:
        color = color + (1 - alpha) * backgrounds[:, None, None, :]
    return Splatted(color, alpha, depth / alpha.clamp(min=1e-10), shares[0] if shares else None)
