"""A mesh out of Gaussians: depth, colour and coverage splatted from all around, fused into one surface."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..geometry.cameras import make_K
from ..geometry.rigid import matrix_from_quat
from ..scene import Mesh
from ..shapes.extraction import Report
from ..shapes.fusion import fuse_depths
from ..shapes.gaussians import Gaussians
from .splatting import splat


def cameras_around(centre: np.ndarray, radius: float, count: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """cam_from_world (count,4,4) of cameras spread evenly around a ball, and their K (3,3) for size x size pixels.

    They stand on a Fibonacci sphere three radii from the centre, look at it, and see the whole ball with a margin.
    """
    k = np.arange(count) + 0.5
    up, turn = 1 - 2 * k / count, np.pi * (1 + 5**0.5) * k
    flat = np.sqrt(1 - up**2)
    away = np.stack([np.cos(turn) * flat, np.sin(turn) * flat, up], 1)
    z = -away
    helper = np.where(np.abs(z[:, 2:]) < 0.9, [[0.0, 0.0, 1.0]], [[1.0, 0.0, 0.0]])
    x = np.cross(z, helper)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    rotation = np.stack([x, np.cross(z, x), z], 1)
    pose = np.tile(np.eye(4), (count, 1, 1))
    pose[:, :3, :3] = rotation
    pose[:, :3, 3] = -np.einsum("cij,cj->ci", rotation, np.asarray(centre) + 3 * radius * away)
    focal = 0.5 * size * 0.95 * np.sqrt(3**2 - 1)  # the ball's outline has half angle asin(1/3)
    return pose, make_K(focal, focal, size / 2, size / 2)


@torch.no_grad()
def mesh_from_gaussians(
    gaussians: Gaussians,
    views: int = 48,
    size: int = 256,
    resolution: int = 128,
    *,
    depth: str = "median",
    kind: str = "3d",
    sh_degree: int | None = None,
    min_alpha: float = 0.5,
    truncation: float | None = None,
    unseen: str = "solid",
    keep: int | None = 1,
    backend: str | None = None,
) -> tuple[Mesh, Report]:
    """Watertight coloured mesh, in the Gaussians' frame, by `fuse_depths` of `views` square depth images.

    The cameras stand around the Gaussians (`cameras_around`); pixels covered less than `min_alpha` are background.
    depth: "median", the deepest point of each pixel's ray in the Gaussian at which the transmittance falls to one half,
    or "expected", the blended depth of the Gaussians' centres, which veils and gaps drag behind the surface. kind: "3d"
    or "2d", as `splat` has it; sh_degree: that of the colours, all of their coefficients by default. Box, cell size and
    truncation follow from the Gaussians' extent and `resolution`, cells along the longest side; round Gaussians end
    about one of their standard deviations outside their means.

    Raises ValueError without Gaussians, `StageFailed` when nothing is opaque enough.
    """
    if depth not in ("median", "expected"):
        raise ValueError(f'depth is "median" or "expected", not {depth!r}')
    if kind not in ("3d", "2d"):
        raise ValueError(f'kind is "3d" or "2d", not {kind!r}')
    if not len(gaussians) or views < 4 or size < 16:
        raise ValueError(f"{len(gaussians)} Gaussians, {views} views of {size} pixels: need some, at least 4 and 16")
    if gaussians.colors.ndim == 3 and sh_degree is None:
        sh_degree = round(gaussians.colors.shape[1] ** 0.5) - 1
    opaque = gaussians.opacities > 0.05
    if not bool(opaque.any()):
        opaque = torch.ones_like(opaque)
    means = gaussians.means[opaque].double().cpu().numpy()
    reach = 3 * gaussians.scales[opaque].double().amax(-1).cpu().numpy()[:, None]
    lo = np.quantile(means - reach, 0.001, axis=0)
    hi = np.quantile(means + reach, 0.999, axis=0)
    cell = float((hi - lo).max()) / resolution
    lo, hi = lo - 2 * cell, hi + 2 * cell
    pose, K = cameras_around(0.5 * (lo + hi), 0.5 * float(np.linalg.norm(hi - lo)), views, size)
    depths, colors, masks = [], [], []
    like = {"dtype": gaussians.means.dtype, "device": gaussians.means.device}
    parts = (gaussians.means, gaussians.quats, gaussians.scales, gaussians.opacities, gaussians.colors)
    for i in range(views):
        view, Ks = torch.as_tensor(pose[i : i + 1], **like), torch.as_tensor(K[None], **like)
        out = splat(*parts, view, Ks, size, size, sh_degree=sh_degree, backend=backend, kind=kind, normals=False)
        middle = depth == "median"
        z = _peak_depth(out.median[0], gaussians, view[0], Ks[0], kind) if middle else out.depth[0, ..., 0]
        z = z.cpu().numpy()
        alpha = out.alpha[0].cpu().numpy()
        covered = (alpha[..., 0] > min_alpha) & np.isfinite(z) & (z > 0)
        depths.append(z)
        masks.append(covered)
        colors.append((out.color[0].cpu().numpy() / np.maximum(alpha, 1e-6)).clip(0, 1))
    Ks = np.repeat(K[None], views, 0)
    return fuse_depths(
        np.stack(depths), np.stack(colors), np.stack(masks), Ks, pose, lo, hi, resolution,
        truncation=truncation, unseen=unseen, keep=keep,
    )  # fmt: skip


def _peak_depth(which: Tensor, gaussians: Gaussians, view: Tensor, K: Tensor, kind: str) -> Tensor:
    """(H,W) camera z at which each pixel's ray is deepest in its Gaussian `which` (H,W); 0 where that is negative.

    The maximum along the ray of exp(-d^T Sigma^-1 d / 2): of a flat Gaussian the ray's hit with its plane. Its centre's
    z instead would lie too near wherever the surface slants, as nearer centres come first.
    """
    found = which >= 0
    g = which[found].long()
    y, x = torch.nonzero(found, as_tuple=True)
    ray = torch.stack([(x + 0.5 - K[0, 2]) / K[0, 0], (y + 0.5 - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1).to(K)
    scales = gaussians.scales[g]
    if kind == "2d":
        scales = torch.cat([scales[:, :2], torch.zeros_like(scales[:, :1])], -1)
    scales = scales.clamp_min(1e-3 * scales.amax(-1, keepdim=True))  # nothing is quite flat, so that a ray has a peak
    axes = (view[:3, :3] @ matrix_from_quat(gaussians.quats[g])) / scales[:, None]  # whitens the camera's axes
    centre = gaussians.means[g] @ view[:3, :3].T + view[:3, 3]
    d, m = (ray[:, None] @ axes)[:, 0], (centre[:, None] @ axes)[:, 0]
    z = (d * m).sum(-1) / (d * d).sum(-1)
    reach = 3 * scales.amax(-1)
    return torch.zeros(which.shape, dtype=z.dtype, device=z.device).masked_scatter(
        found, torch.minimum(torch.maximum(z, centre[:, 2] - reach), centre[:, 2] + reach)
    )
