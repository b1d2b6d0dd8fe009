"""What a depth image says about the surface."""

from __future__ import annotations

import torch
from torch import Tensor


def points_from_depth(depth: Tensor, viewmats: Tensor, Ks: Tensor) -> Tensor:
    """World points (C,H,W,3) of the pixel centres at camera z `depth` (C,H,W,1), metres.

    viewmats (C,4,4) camera-from-world; Ks (C,3,3) pixels, without skew.
    """
    C, H, W, _ = depth.shape
    viewmats, Ks = viewmats.to(depth), Ks.to(depth)
    like = {"dtype": depth.dtype, "device": depth.device}
    x, y = torch.arange(W, **like) + 0.5, torch.arange(H, **like) + 0.5
    fx, fy, cx, cy = (Ks[:, i, j, None, None] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
    ray = torch.stack([((x - cx) / fx).expand(C, H, W), ((y[:, None] - cy) / fy).expand(C, H, W)], -1)
    in_camera = torch.cat([ray * depth, depth], -1)
    R, t = viewmats[:, None, None, :3, :3], viewmats[:, None, None, :3, 3]
    return ((in_camera - t)[..., None, :] @ R)[..., 0, :]


def normals_from_depth(depth: Tensor, viewmats: Tensor, Ks: Tensor) -> Tensor:
    """Unit normals (C,H,W,3) of a depth image, world frame, turned to the camera; differentiable.

    depth (C,H,W,1) camera z in metres, 0 where nothing is seen; viewmats (C,4,4) camera-from-world; Ks (C,3,3) pixels.
    The cross product of central differences of the world points (Huang et al., 2D Gaussian Splatting, 2024, eq. 15);
    zero on the image's border and beside pixels without depth.
    """
    if depth.ndim != 4 or depth.shape[-1] != 1:
        raise ValueError(f"depth is {tuple(depth.shape)}, not (C,H,W,1)")
    if viewmats.shape != (len(depth), 4, 4) or Ks.shape != (len(depth), 3, 3):
        raise ValueError(
            f"viewmats and Ks are ({len(depth)},4,4) and ({len(depth)},3,3), "
            f"not {tuple(viewmats.shape)} and {tuple(Ks.shape)}"
        )
    p = points_from_depth(depth, viewmats, Ks)
    if min(p.shape[1:3]) < 3:
        return torch.zeros_like(p)
    across, down = p[:, 1:-1, 2:] - p[:, 1:-1, :-2], p[:, 2:, 1:-1] - p[:, :-2, 1:-1]
    seen = depth > 0
    seen = seen[:, 1:-1, 2:] & seen[:, 1:-1, :-2] & seen[:, 2:, 1:-1] & seen[:, :-2, 1:-1]
    normal = torch.linalg.cross(down, across)  # towards the camera: x is right, y is down, z is forward
    length2 = normal.square().sum(-1, keepdim=True)
    seen = seen & (length2 > 0)
    normal = normal * torch.rsqrt(torch.where(seen, length2, torch.ones_like(length2)))
    return torch.nn.functional.pad(torch.where(seen, normal, torch.zeros_like(normal)), (0, 0, 1, 1, 1, 1))
