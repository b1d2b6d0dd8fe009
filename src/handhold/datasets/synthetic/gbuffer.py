"""Which surface every pixel of many pictures sees: each picture has its own vertices, faces and camera.

On the CPU with the compiled kernels, pictures go through `kernels.raster.visible` one by one. Elsewhere a z-buffer in
plain torch draws all pictures at once: the pixels of all triangles' bounding boxes are one long list, worked off in
chunks of equal size, and the nearest face of a pixel wins an atomic minimum over (depth, face) packed in 64 bits. There
is no loop over pictures, and two host synchronisations in all. Edge functions are homogeneous (Olano and Greer,
"Triangle scan conversion using 2D homogeneous coordinates", 1997), set up in float64 about each triangle's own corner
of its bounding box, so that float32 is enough per pixel.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...kernels import _lib, raster
from ...kernels.raster import NEAR

CHUNK = 1 << 23  # candidate pixels worked on at a time on an accelerator
CHUNK_CPU = 1 << 18
_FAR = torch.iinfo(torch.int64).max


@dataclass(frozen=True, eq=False)
class GBuffer:
    """The first surface on each pixel centre's ray; where there is none, face is -1 and the rest 0."""

    face: Tensor  # (B,H,W) int64 row of the picture's faces
    bary: Tensor  # (B,H,W,3) perspective-correct weights of the face's corners
    depth: Tensor  # (B,H,W) camera z, metres

    @property
    def seen(self) -> Tensor:
        """(B,H,W) bool"""
        return self.face >= 0


def batch_faces(faces: Tensor, n: int) -> Tensor:
    """(B,T,3) int64 from faces (T,3) or (B,T,3)."""
    return faces.long().expand(n, *faces.shape[-2:])


@torch.no_grad()
def rasterize_batch(
    cam_vertices: Tensor,
    faces: Tensor,
    K: Tensor,
    width: int,
    height: int,
    near: float = NEAR,
    backend: str | None = None,
) -> GBuffer:
    """cam_vertices (B,V,3) camera frame, metres; faces (T,3) or (B,T,3) int64, both sides drawn, faces without area
    (padding) ignored; K (B,3,3) or (3,3) pixels without skew. Triangles may cross the plane z = `near`; nothing nearer
    is drawn. backend: "torch" for the batched z-buffer on any device, None for the best one.
    """
    n = len(cam_vertices)
    K = K.expand(n, 3, 3)
    if _lib.resolve_backend(backend, cam_vertices) == "torch":
        return _batched(cam_vertices.float(), batch_faces(faces, n), K, width, height, near)
    rows = batch_faces(faces, n)
    views = [
        raster.visible(v.contiguous(), f, k, width, height, near) for v, f, k in zip(cam_vertices, rows, K, strict=True)
    ]
    return GBuffer(*(torch.stack(x) for x in zip(*views, strict=True)))


@torch.no_grad()
def amodal_masks(
    cam_vertices: Tensor, faces: Tensor, label: Tensor, K: Tensor, width: int, height: int, n_labels: int = 5
) -> Tensor:
    """(B,n_labels-1,H,W) bool: the pixels of each label 1 to n_labels - 1 as if its bodies were alone.

    label (T,) or (B,T); the other arguments as for `rasterize_batch`. Faces of other labels become padding.
    """
    n = len(cam_vertices)
    faces, label = batch_faces(faces, n), label.long().expand(n, faces.shape[-2])
    masks = []
    for k in range(1, n_labels):
        some = faces * (label == k)[..., None]
        if faces.device.type == "cpu":  # leave out what no picture has
            used = (label == k).any(0)
            some = some[:, used]
        if some.shape[1] == 0:
            masks.append(torch.zeros(n, height, width, dtype=torch.bool, device=faces.device))
            continue
        masks.append(rasterize_batch(cam_vertices, some, K, width, height).seen)
    return torch.stack(masks, 1)


def _batched(cam: Tensor, faces: Tensor, K: Tensor, width: int, height: int, near: float) -> GBuffer:
    n, t = faces.shape[:2]
    table, low, extent = _setup(cam, faces, K, width, height, near)
    count = extent[:, 0] * extent[:, 1]
    ends = torch.cumsum(count, 0)
    key = torch.full((n * height * width,), _FAR, dtype=torch.int64, device=cam.device)
    total = int(ends[-1]) if len(ends) else 0
    size = CHUNK if cam.device.type != "cpu" else CHUNK_CPU
    for begin in range(0, total, size):
        k = torch.arange(begin, min(begin + size, total), device=cam.device)
        tri = torch.searchsorted(ends, k, right=True)
        k = (k - (ends[tri] - count[tri])).int()
        w, at = extent[tri, 0].int(), low[tri]
        dy = torch.div(k, w, rounding_mode="floor")
        dx = k - dy * w
        value = _values(table[tri], dx, dy)
        inside = (value[:, :3] >= 0).all(1) & (value[:, 3] > 0) & (value[:, 3] <= 1 / near)
        z = 1 / torch.where(inside, value[:, 3], 1.0)
        packed = (z.view(torch.int32).long() << 32) | tri
        pixel = (torch.div(tri, t, rounding_mode="floor") * height + at[:, 1] + dy) * width + at[:, 0] + dx
        key.scatter_reduce_(0, pixel, torch.where(inside, packed, _FAR), "amin")
    face = torch.where(key == _FAR, -1, key & 0xFFFFFFFF).reshape(n, height * width)
    bary, depth = [], []
    rows = max(1, (size * 2) // (height * width))
    y, x = _pixel_grid(height, width, cam.device)
    for some in face.split(rows):
        tri = some.clamp_min(0)
        dx, dy = x - low[tri, 0], y - low[tri, 1]
        if len(table):
            value = _values(table[tri], dx, dy)
            z = 1 / value[..., 3].clamp_min(1e-9)
            u = value[..., :3].clamp_min(0)
            b = u / u.sum(-1, keepdim=True).clamp_min(1e-30)
        else:
            z, b = torch.ones_like(some, dtype=cam.dtype), cam.new_zeros(*some.shape, 3)
        hit = some >= 0
        depth.append(torch.where(hit, z, 0.0))
        bary.append(torch.where(hit[..., None], b, 0.0))
    offset = torch.arange(n, device=cam.device)[:, None] * t
    face = torch.where(face >= 0, face - offset, -1)
    return GBuffer(
        face.reshape(n, height, width),
        torch.cat(bary).reshape(n, height, width, 3),
        torch.cat(depth).reshape(n, height, width),
    )


def _pixel_grid(height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    k = torch.arange(height * width, device=device)
    y = torch.div(k, width, rounding_mode="floor")
    return y, k - y * width


def _values(rows: Tensor, dx: Tensor, dy: Tensor) -> Tensor:
    """(*,4) three edge functions and 1/z at an offset from the box's corner, of table rows (*,12)."""
    return rows[..., :4] + rows[..., 4:8] * dx[..., None] + rows[..., 8:] * dy[..., None]


def _setup(
    cam: Tensor, faces: Tensor, K: Tensor, width: int, height: int, near: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Rows (B*T,12) of edge functions and 1/z (value at the box's first pixel, slopes in x and y), that pixel (B*T,2)
    and the box's extent (B*T,2) in pixels, zero for what is not drawn."""
    n, t = faces.shape[:2]
    x = cam.double()
    c = x.gather(1, faces.reshape(n, -1, 1).expand(-1, -1, 3)).reshape(n, t, 3, 3)
    k = K.to(device=cam.device, dtype=torch.float64)
    focal, centre = k[:, [0, 1], [0, 1]], k[:, :2, 2]
    after, before = c.roll(-1, 2), c.roll(1, 2)
    edges = torch.linalg.cross(after, before)  # n_i = v_j x v_k
    total = torch.linalg.cross(c[:, :, 1] - c[:, :, 0], c[:, :, 2] - c[:, :, 0])
    det = (total * c[:, :, 0]).sum(-1)
    scale = c.abs().amax((-1, -2)) * (c[:, :, 1:] - c[:, :, :1]).abs().amax((-1, -2)).square()
    drawn = (det.abs() > 1e-12 * scale) & (c[..., 2] >= near).any(-1)
    safe = torch.where(drawn, det, 1.0)
    planes = torch.cat([edges * torch.sign(safe)[..., None, None], (total / safe[..., None])[..., None, :]], 2)
    a = planes[..., 0] / focal[:, None, None, 0]
    b = planes[..., 1] / focal[:, None, None, 1]
    at_zero = planes[..., 2] - a * centre[:, None, None, 0] - b * centre[:, None, None, 1]
    lo, hi = _box(c, focal, centre, near)
    limit = torch.tensor([width, height], dtype=torch.float64, device=cam.device)
    low = torch.minimum(torch.ceil(lo - 0.5).clamp_min(0), limit)
    high = torch.minimum(torch.floor(hi - 0.5), limit - 1)
    extent = torch.where(drawn[..., None], (high - low + 1).clamp_min(0), 0.0)
    first = low + 0.5
    value = at_zero + a * first[..., None, 0] + b * first[..., None, 1]
    table = torch.cat([value, a, b], -1).float().reshape(n * t, 12)
    return table, low.long().reshape(-1, 2), extent.long().reshape(-1, 2)


def _box(c: Tensor, focal: Tensor, centre: Tensor, near: float) -> tuple[Tensor, Tensor]:
    """(B,T,2) least and greatest pixel position of the part of each triangle (B,T,3,3) beyond `near`."""
    ahead = c[..., 2] >= near
    nxt = c.roll(-1, 2)
    cut = ahead != ahead.roll(-1, 2)
    run = nxt[..., 2] - c[..., 2]
    s = (near - c[..., 2]) / torch.where(cut, run, 1.0)
    crossing = c + s[..., None] * (nxt - c)
    lo = hi = None
    for points, valid, z in ((c, ahead, c[..., 2]), (crossing, cut, torch.full_like(run, near))):
        p = points[..., :2] / torch.where(valid, z, 1.0)[..., None] * focal[:, None, None] + centre[:, None, None]
        a = torch.where(valid[..., None], p, torch.inf).amin(2)
        b = torch.where(valid[..., None], p, -torch.inf).amax(2)
        lo, hi = (a, b) if lo is None else (torch.minimum(lo, a), torch.maximum(hi, b))
    return lo - 1e-3, hi + 1e-3
