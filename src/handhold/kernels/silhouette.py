"""Silhouettes with gradients at their outlines: the compiled ops and their torch twins behind one function each.

These take vertices in the camera's frame; `handhold.render.raster.soft_silhouette` takes world vertices and cameras.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import _lib, silhouette_torch
from ._checks import check_indices, once
from ._lib import pointer, threads
from .raster import NEAR, _as_K

REACH = 3.5  # sigmas


def coverage(
    cam: Tensor,
    faces: Tensor,
    K: Tensor,
    label: Tensor,
    depth: Tensor,
    body: Tensor,
    n_ids: int = 1,
    near: float = NEAR,
    backend: str | None = None,
) -> Tensor:
    """(H,W,n_ids) share of each pixel that each body's visible part covers, by where the outlines pass between pixel
    centres (the edge blending of Laine et al., "Modular primitives for high-performance differentiable rendering", ACM
    TOG 2020, section 3.5, with these differences: outlines come from the mesh, not from the one triangle that a pixel
    happens to show, so triangles may be smaller than pixels; each edge is measured along one axis, so that moving an
    outline changes the area by what it sweeps).

    cam (V,3) camera frame; label (H,W) int64 body seen at each pixel centre, -1 none, and depth (H,W) of it, both as
    `raster.visible` gives; body (T,) of each face. A pixel whose centre is inside a body keeps 0.5 to 1 of it, one
    outside has up to 0.5, unless several outlines pass through it. Gradients go to cam and K.
    """
    faces = faces.to(device=cam.device, dtype=torch.int64).contiguous()
    label, body = (t.to(device=cam.device, dtype=torch.int64).contiguous() for t in (label, body))
    depth = depth.detach().to(cam).contiguous()
    if label.ndim != 2 or depth.shape != label.shape or body.shape != (len(faces),):
        raise ValueError(
            f"label and depth are (H,W) and body ({len(faces)},), not {tuple(label.shape)}, {tuple(depth.shape)} and "
            f"{tuple(body.shape)}"
        )
    check_indices("label", label, -1, n_ids)
    if _lib.resolve_backend(backend, cam) == "torch":
        return silhouette_torch.coverage(cam, faces, K, label, depth, body, n_ids, near)
    check_indices("faces", faces, 0, len(cam))
    return _Coverage.apply(cam, faces, K, label, depth, body, n_ids, near)


def occupancy(
    cam: Tensor,
    faces: Tensor,
    K: Tensor,
    width: int,
    height: int,
    sigma: float = 1.0,
    near: float = NEAR,
    backend: str | None = None,
) -> Tensor:
    """(H,W) soft occupancy 1 - prod_j (1 - sigmoid(s d_j^2 / sigma^2)) over triangles j, where d_j is the distance in
    pixels from the pixel centre to the triangle's outline, s +1 inside and -1 outside (Liu et al., "Soft Rasterizer",
    ICCV 2019, equations 1 and 3; sigma is a length in pixels here).

    A triangle has no grip beyond 3.5 sigma, where its share is 5e-6, and none when a corner is nearer than `near`.
    Gradients go to cam (V,3) and K.
    """
    faces = faces.to(device=cam.device, dtype=torch.int64).contiguous()
    if _lib.resolve_backend(backend, cam) == "torch":
        return silhouette_torch.occupancy(cam, faces, K, width, height, sigma, REACH * sigma, near)
    check_indices("faces", faces, 0, len(cam))
    return _Occupancy.apply(cam, faces, K, width, height, sigma, near)


class _State:
    """Owns what a compiled forward keeps for backward."""

    def __init__(self, address: int | None, free: str):
        if not address:
            raise MemoryError("not enough memory for this silhouette")
        self.address, self._free = address, getattr(_lib.lib(), free)

    def __del__(self):
        if getattr(self, "address", None):
            self._free(self.address)


class _Coverage(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cam, faces, K, label, depth, body, n_ids, near):
        points, k = cam.detach().contiguous(), K.detach().to("cpu", torch.float32).contiguous()
        height, width = label.shape
        out = torch.empty(height, width, n_ids)
        ctx.state = _State(
            _lib.lib().hh_silhouette_forward(
                len(points), len(faces), width, height, n_ids, *map(pointer, (points, faces, body, k)), near,
                *map(pointer, (label, depth, out)),
            ),
            "hh_silhouette_free",
        )  # fmt: skip
        ctx.save_for_backward(points, k, label)
        ctx.K_like = K.dtype, K.device
        return out

    @staticmethod
    @once
    def backward(ctx, v_out):
        points, k, label = ctx.saved_tensors
        v_out = v_out.contiguous()  # by name: a pointer does not keep its tensor alive
        v_cam, v_k = torch.zeros_like(points), torch.zeros(4)
        _lib.lib().hh_silhouette_backward(ctx.state.address, *map(pointer, (points, k, label, v_out, v_cam, v_k)))
        return v_cam, None, _as_K(v_k, *ctx.K_like), *(None,) * 5


class _Occupancy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cam, faces, K, width, height, sigma, near):
        points, k = cam.detach().contiguous(), K.detach().to("cpu", torch.float32).contiguous()
        out = torch.empty(height, width)
        ctx.state = _State(
            _lib.lib().hh_soft_forward(
                len(points), len(faces), width, height, *map(pointer, (points, faces, k)), near, sigma, REACH * sigma,
                pointer(out), threads(),
            ),
            "hh_soft_free",
        )  # fmt: skip
        ctx.save_for_backward(points, faces, k)
        ctx.K_like = K.dtype, K.device
        return out

    @staticmethod
    @once
    def backward(ctx, v_out):
        points, faces, k = ctx.saved_tensors
        v_out = v_out.contiguous()  # by name: a pointer does not keep its tensor alive
        v_cam, v_k = torch.empty_like(points), torch.empty(4)
        failed = _lib.lib().hh_soft_backward(
            ctx.state.address, len(points), *map(pointer, (points, faces, k, v_out, v_cam, v_k)), threads()
        )
        if failed:
            raise MemoryError("not enough memory for the gradients of this silhouette")
        return v_cam, None, _as_K(v_k, *ctx.K_like), *(None,) * 4
