"""Triangle meshes seen by one camera: the compiled op and its torch twin behind one function each.

These take vertices in the camera's frame; `handhold.render.raster` takes world vertices and several cameras.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from . import _lib, raster_torch
from ._checks import check_indices, check_intrinsics, check_size, once
from ._lib import pointer, threads

NEAR = 0.01  # metres
MAX_PIXELS = 1 << 26


def check(vertices: Tensor, faces: Tensor, K: Tensor, width: int, height: int, near: float = NEAR) -> None:
    """Raises ValueError or TypeError unless vertices (*,V,3), faces (T,3) and K (*,3,3) are safe to draw."""
    if not vertices.is_floating_point():
        raise TypeError(f"vertices are {vertices.dtype}, not floating point")
    if vertices.ndim < 2 or vertices.shape[-1] != 3:
        raise ValueError(f"vertices are {tuple(vertices.shape)}, not (V,3)")
    if faces.is_floating_point() or faces.is_complex() or faces.dtype == torch.bool:
        raise TypeError(f"faces are {faces.dtype}, not integers")
    if faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"faces are {tuple(faces.shape)}, not (T,3)")
    if len(faces) >= 1 << 30 or vertices.shape[-2] >= 1 << 30:
        raise ValueError(f"{len(faces)} faces and {vertices.shape[-2]} vertices are too many")
    if len(faces) and not (int(faces.min()) >= 0 and int(faces.max()) < vertices.shape[-2]):
        raise ValueError(f"faces name vertices from {int(faces.min())} to {int(faces.max())} of {vertices.shape[-2]}")
    if not torch.isfinite(vertices).all():
        raise ValueError("vertices must be finite; leave out bodies without a pose")
    if K.shape[-2:] != (3, 3) or not torch.isfinite(K).all():
        raise ValueError("K must be (3,3) and finite")
    check_intrinsics(K)
    check_size(width, height)
    if width * height > MAX_PIXELS:
        raise ValueError(f"an image of {width} x {height} pixels cannot be drawn (at most {MAX_PIXELS} in all)")
    if not 0 < near < float("inf"):
        raise ValueError(f"near is {near}; it must be positive")


def visible(
    cam: Tensor, faces: Tensor, K: Tensor, width: int, height: int, near: float = NEAR, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first surface on each pixel centre's ray: face (H,W) int64, bary (H,W,3), depth (H,W).

    cam (V,3) vertices in the camera frame, metres; faces (T,3); K (3,3) pixels (fx, fy, cx, cy are used). Where no
    surface is beyond `near`, face is -1 and the rest 0. bary are the perspective-correct weights of the face's corners,
    depth its camera z; both have gradients to cam and K at a fixed face. Arguments are those `check` lets pass.
    """
    faces = faces.to(device=cam.device, dtype=torch.int64).contiguous()
    if _lib.resolve_backend(backend, cam) == "torch":
        face = raster_torch.nearest_face(cam, faces, K.detach(), width, height, near)
        return face, *raster_torch.surface(cam, faces, K, face)
    check_indices("faces", faces, 0, len(cam))
    return _Visible.apply(cam, faces, K, width, height, near)


class _Visible(torch.autograd.Function):
    @staticmethod
    def forward(ctx, cam, faces, K, width, height, near):
        points, k = cam.detach().contiguous(), K.detach().to("cpu", torch.float32).contiguous()
        face = torch.empty(height, width, dtype=torch.int64)
        bary, depth = torch.empty(height, width, 3), torch.empty(height, width)
        failed = _lib.lib().hh_mesh_raster(
            len(faces), width, height, *map(pointer, (points, faces, k)), near, *map(pointer, (face, bary, depth)),
            threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("not enough memory to rasterise this mesh")
        ctx.save_for_backward(points, faces, k, face)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(face)
        ctx.K_like = K.dtype, K.device
        return face, bary, depth

    @staticmethod
    @once
    def backward(ctx, _, v_bary, v_depth):
        if v_bary is None and v_depth is None:
            return (None,) * 6
        points, faces, k, face = ctx.saved_tensors
        v_bary, v_depth = (None if v is None else v.contiguous() for v in (v_bary, v_depth))
        v_cam, v_k = torch.empty_like(points), torch.empty(4)
        failed = _lib.lib().hh_mesh_raster_backward(
            len(points), *face.shape[::-1], *map(pointer, (points, faces, k, face, v_bary, v_depth, v_cam, v_k)),
            threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("not enough memory for the gradients of this mesh")
        return v_cam, None, _as_K(v_k, *ctx.K_like), None, None, None


def _as_K(v: Tensor, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(3,3) gradient from that of fx, fy, cx, cy."""
    out = torch.zeros(3, 3, dtype=dtype, device=device)
    out[[0, 1, 0, 1], [0, 1, 2, 2]] = v.to(out)
    return out


def interpolate(
    values: Tensor, faces: Tensor, face: Tensor, bary: Tensor, unit: bool = False, backend: str | None = None
) -> Tensor:
    """(H,W,A) per-vertex values (V,A) on the surface `visible` found, made unit vectors on demand; 0 where there is
    none. Differentiable in values and bary (H,W,3). face (H,W) int64 holds rows of faces (T,3), or -1."""
    faces = faces.to(device=values.device, dtype=torch.int64).contiguous()
    if _lib.resolve_backend(backend, values, bary) == "torch":
        return raster_torch.interpolate(values, faces, face, bary, unit)
    face = face.to(torch.int64).contiguous()
    if bary.shape != (*face.shape, 3):
        raise ValueError(f"bary is {tuple(bary.shape)}, not {(*face.shape, 3)}")
    check_indices("faces", faces, 0, len(values))
    check_indices("face", face, -1, len(faces))
    return _Interpolate.apply(values, faces, face, bary, unit)


class _Interpolate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, faces, face, bary, unit):
        x, w = values.detach().contiguous(), bary.detach().contiguous()
        out = torch.empty(*face.shape, x.shape[1])
        _lib.lib().hh_mesh_interpolate(
            face.numel(), x.shape[1], unit, *map(pointer, (x, faces, face, w, out)), threads()
        )  # fmt: skip
        ctx.save_for_backward(x, faces, face, w, out)
        ctx.unit = unit
        return out

    @staticmethod
    @once
    def backward(ctx, v_out):
        x, faces, face, w, out = ctx.saved_tensors
        v_out = v_out.contiguous()  # by name: a pointer does not keep its tensor alive
        v_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        v_w = torch.empty_like(w) if ctx.needs_input_grad[3] else None
        failed = _lib.lib().hh_mesh_interpolate_backward(
            face.numel(), *x.shape, ctx.unit, *map(pointer, (x, faces, face, w, out, v_out, v_x, v_w)),
            threads(),
        )  # fmt: skip
        if failed:
            raise MemoryError("not enough memory for the gradients of this mesh")
        return v_x, None, None, v_w, None


def depth_image(vertices: np.ndarray, faces: np.ndarray, K: np.ndarray, width: int, height: int) -> np.ndarray:
    """(H,W) float32 depth of a mesh's front surface at the pixel centres, inf where there is none.

    vertices (V,3) camera frame, any unit; faces (T,3); K (3,3) pixels.
    """
    v = torch.from_numpy(np.ascontiguousarray(vertices, np.float32))
    f, k = torch.from_numpy(np.ascontiguousarray(faces, np.int64)), torch.from_numpy(np.asarray(K, np.float32))
    check(v, f, k, width, height)
    face, _, depth = visible(v, f, k, width, height, near=1e-6)
    return torch.where(face < 0, torch.inf, depth).numpy()
