"""Torch twin of the triangle rasteriser: the specification of `csrc/raster*`, and the path without a compiler.

Any device and dtype; geometry is computed in float64 whatever the input, since the edge functions of a small triangle
cancel too much in float32.
"""

from __future__ import annotations

import torch
from torch import Tensor

BATCH = 1 << 20  # pairs of face and pixel


def rays(x: Tensor, y: Tensor, K: Tensor) -> Tensor:
    """(*B,3) directions through pixel positions, with z = 1."""
    return torch.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], torch.ones_like(x)], -1)


def homogeneous(cam: Tensor, faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """n (T,3,3) with n_i = v_j x v_k, their sum (T,3) and det (T,): the ray d meets the plane at b_i / z = n_i.d / det.

    Olano and Greer, "Triangle scan conversion using 2D homogeneous coordinates" (1997). n_i starts from the lower
    vertex index, so that both triangles of an edge get exactly opposite values.
    """
    n = []
    for i in range(3):
        j, k = faces[:, (i + 1) % 3], faces[:, (i + 2) % 3]
        a, b = cam[torch.minimum(j, k)], cam[torch.maximum(j, k)]
        n.append(torch.linalg.cross(a, b - a) * torch.where(j > k, -1.0, 1.0)[:, None])
    v0 = cam[faces[:, 0]]
    total = torch.linalg.cross(cam[faces[:, 1]] - v0, cam[faces[:, 2]] - v0)
    return torch.stack(n, 1), total, (total * v0).sum(-1)


@torch.no_grad()
def nearest_face(cam: Tensor, faces: Tensor, K: Tensor, width: int, height: int, near: float) -> Tensor:
    """(H,W) int64 face that each pixel centre's ray meets first beyond `near`, -1 where none."""
    cam, K = cam.double(), K.to(cam.device).double()
    n, total, det = homogeneous(cam, faces)
    corner = cam[faces]
    size = corner.abs().sum(-1)
    e1, e2 = corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]
    keep = det.abs() > 1e-14 * size[:, 0] * e1.abs().sum(-1) * e2.abs().sum(-1)
    keep = torch.nonzero(keep & (corner[..., 2] >= near).any(-1))[:, 0]
    n, total, det, corner, size = n[keep], total[keep], det[keep], corner[keep], size[keep]
    ends = rays(cam.new_tensor([0.0, width]), cam.new_tensor([0.0, height]), K).abs().amax(0)
    tolerance = 4e-15 * torch.stack([size[:, 1] * size[:, 2], size[:, 2] * size[:, 0], size[:, 0] * size[:, 1]], -1)
    edge, plane = _over_pixels(n * torch.sign(det)[:, None, None], K), _over_pixels(total / det[:, None], K)  # 1/z
    # On an edge, within rounding, a pixel belongs to the side that holds its centre moved by (+e, +e^2).
    a, b = edge[..., 0], edge[..., 1]
    threshold = torch.where((a > 0) | ((a == 0) & (b > 0)), -tolerance, tolerance) * ends.sum()
    lo, hi = _bounds(corner, K, near)
    limit = cam.new_tensor([width, height])
    low = torch.ceil(lo - 0.5).clamp(min=cam.new_zeros(2), max=limit).long()
    extent = (torch.floor(hi - 0.5).clamp(min=-cam.new_ones(2), max=limit - 1).long() + 1 - low).clamp(min=0)
    count = extent[:, 0] * extent[:, 1]
    best = cam.new_zeros(height * width)  # 1/z
    face = torch.full((height * width,), -1, dtype=torch.int64, device=cam.device)
    batch = torch.div(torch.cumsum(count, 0), BATCH, rounding_mode="floor")
    for some in torch.arange(len(keep), device=cam.device).split(torch.unique(batch, return_counts=True)[1].tolist()):
        t, begin = torch.repeat_interleave(some, count[some]), torch.cumsum(count[some], 0) - count[some]
        k = torch.arange(len(t), device=cam.device) - torch.repeat_interleave(begin, count[some])
        x, y = low[t, 0] + k % extent[t, 0], low[t, 1] + torch.div(k, extent[t, 0], rounding_mode="floor")
        position = torch.stack([x + 0.5, y + 0.5, torch.ones_like(x)], -1).double()
        for e in range(3):
            inside = (edge[t, e] * position).sum(-1) > threshold[t, e]
            t, position = t[inside], position[inside]
        inverse = (plane[t] * position).sum(-1)
        pixel = position[:, 1].long() * width + position[:, 0].long()
        seen = (inverse <= 1 / near) & (inverse > best[pixel])  # of equal depths, the lowest face stays
        t, pixel, inverse = t[seen], pixel[seen], inverse[seen]
        best.scatter_reduce_(0, pixel, inverse, "amax")
        first = inverse == best[pixel]
        face[pixel] = len(faces)
        face.scatter_reduce_(0, pixel[first], keep[t[first]], "amin")
    return face.reshape(height, width)


def _over_pixels(n: Tensor, K: Tensor) -> Tensor:
    """(*B,3) a, b, c with n . d = a x + b y + c for the ray d of pixel position (x, y)."""
    a, b = n[..., 0] / K[0, 0], n[..., 1] / K[1, 1]
    return torch.stack([a, b, n[..., 2] - a * K[0, 2] - b * K[1, 2]], -1)


def _bounds(corner: Tensor, K: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """(T,2) least and greatest pixel position of the part of each triangle beyond `near`, a little widened."""
    after = corner.roll(-1, 1)
    ahead = corner[..., 2] >= near
    cut = ahead != (after[..., 2] >= near)
    run = after[..., 2] - corner[..., 2]
    s = (near - corner[..., 2]) / torch.where(cut, run, torch.ones_like(run))
    crossing = corner + s[..., None] * (after - corner)
    points = torch.cat([corner, crossing], 1)
    valid = torch.cat([ahead, cut], 1)[..., None]
    z = torch.where(valid, torch.cat([corner[..., 2:], torch.full_like(crossing[..., 2:], near)], 1), 1.0)
    p = points[..., :2] / z * torch.stack([K[0, 0], K[1, 1]]) + K[:2, 2]
    lo = torch.where(valid, p, torch.inf).amin(1) - 1e-3
    return lo, torch.where(valid, p, -torch.inf).amax(1) + 1e-3


def surface(cam: Tensor, faces: Tensor, K: Tensor, face: Tensor) -> tuple[Tensor, Tensor]:
    """bary (H,W,3) perspective-correct and depth (H,W) of the given visible faces, 0 where face is -1; differentiable
    in cam (V,3) and K."""
    height, width = face.shape
    bary, depth = cam.new_zeros(height * width, 3), cam.new_zeros(height * width)
    p = torch.nonzero(face.reshape(-1) >= 0)[:, 0]
    used, which = torch.unique(face.reshape(-1)[p], return_inverse=True)
    n, total, det = homogeneous(cam.double(), faces[used])
    d = rays(
        (p % width).double() + 0.5, torch.div(p, width, rounding_mode="floor").double() + 0.5, K.to(cam.device).double()
    )
    u = (n[which] * d[:, None]).sum(-1) / det[which, None]
    z = det[which] / (total[which] * d).sum(-1)
    bary = bary.index_put((p,), (u * z[:, None]).to(cam.dtype))
    depth = depth.index_put((p,), z.to(cam.dtype))
    return bary.reshape(height, width, 3), depth.reshape(height, width)


def interpolate(values: Tensor, faces: Tensor, face: Tensor, bary: Tensor, unit: bool) -> Tensor:
    """(H,W,A) of values (V,A) at face (H,W) and bary (H,W,3), made unit vectors on demand; 0 where face is -1."""
    out = values.new_zeros(face.numel(), values.shape[1])
    p = torch.nonzero(face.reshape(-1) >= 0)[:, 0]
    at = (values[faces[face.reshape(-1)[p]]] * bary.reshape(-1, 3)[p][..., None]).sum(1)
    if unit:
        at = torch.nn.functional.normalize(at, dim=-1)
    return out.index_put((p,), at).reshape(*face.shape, -1)
