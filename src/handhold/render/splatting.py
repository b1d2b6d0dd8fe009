"""Differentiable Gaussian splatting: colour, alpha, depths, normals and each body's share."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ..kernels._checks import check_intrinsics, check_size, version
from ..kernels._lib import capturing
from ..kernels.splat import check_finite, check_shapes, compose, like_means, rasterize
from ..kernels.splat_torch import largest, meet, planes


@dataclass(frozen=True)
class _Inputs:
    """What a second look at the scene needs: the arguments of `splat`."""

    shape: tuple[Tensor, ...]  # means, quats, scales, opacities
    viewmats: Tensor
    Ks: Tensor
    size: tuple[int, int]
    kind: str
    backend: str | None
    grad: bool
    versions: tuple[int, ...]

    def check_unchanged(self, wanted: str) -> None:
        if self.versions != tuple(map(version, (*self.shape, self.viewmats, self.Ks))):
            raise RuntimeError(
                f"the Gaussians or cameras were changed in place after splat(); read .{wanted} before the optimiser's "
                "step" + (", or call splat(..., normals=True)" if wanted == "normals" else "")
            )


@dataclass(frozen=True)
class Splatted:
    """What `splat` returns, for C cameras of H x W pixels. `normals` and `median_depth` are made when first read."""

    color: Tensor  # (C,H,W,3), over the background (black when none is given)
    alpha: Tensor  # (C,H,W,1)
    depth: Tensor  # (C,H,W,1) expected camera z in metres: sum of weight * z over alpha; 0 where alpha is 0
    # (C,H,W,n_ids) alpha that each body contributes; sums to alpha when every Gaussian has an id
    ids: Tensor | None = None
    # (C,H,W) int32: the Gaussian at which the transmittance falls to 1/2, front to back; -1 where it never does
    median: Tensor | None = field(default=None, repr=False)
    _normals: Tensor | None = field(default=None, repr=False)
    _inputs: _Inputs | None = field(default=None, repr=False)

    @cached_property
    def normals(self) -> Tensor:
        """(C,H,W,3) world frame: shortest axes (2D: disk normals), turned to the camera, premultiplied by weight.

        Their length is at most alpha. Made by a second pass over the scene unless `splat` was told normals=True.
        """
        if self._normals is not None:
            return self._normals
        if self._inputs is None:
            raise ValueError("normals are known only of what splat() returned")
        i = self._inputs
        i.check_unchanged("normals")
        with torch.set_grad_enabled(i.grad):
            views = [
                rasterize(*i.shape, surface_normals(*i.shape[:3], V, i.kind), V, K, *i.size, None, None, 0, i.backend,
                          kind=i.kind)[0][..., :3]
                for V, K in zip(i.viewmats, i.Ks, strict=True)
            ]  # fmt: skip
            return torch.stack(views)

    @cached_property
    def median_depth(self) -> Tensor:
        """(C,H,W,1) camera z, in metres, at which half of the light is stopped; 0 where less than half ever is.

        Of the `median` Gaussian: its centre's z, or for 2D Gaussians where the ray meets it. Differentiable through
        that Gaussian and the camera.
        """
        if self._inputs is None:
            raise ValueError("the median depth is known only of what splat() returned")
        i = self._inputs
        i.check_unchanged("median_depth")
        with torch.set_grad_enabled(i.grad):
            views = zip(self.median, i.viewmats, i.Ks, strict=True)
            return torch.stack([_median_depth(m, V, K, i) for m, V, K in views])[..., None]


def surface_normals(means: Tensor, quats: Tensor, scales: Tensor, viewmat: Tensor, kind: str = "3d") -> Tensor:
    """(N,3) unit normals in the world: the shortest axis (kind "2d": the third), on the side of the camera.

    means (N,3), quats (N,4) wxyz, scales (N,3), viewmat (4,4) camera-from-world. Which axis and which side are
    constants to the gradient, which therefore reaches only the quaternions.
    """
    # One row per coordinate: elementwise work along (N,3) is several times slower on a CPU.
    q = quats.T.contiguous()
    q = q / largest(q, 0)
    w, x, y, z = (q * torch.rsqrt(q.square().sum(0).clamp(min=torch.finfo(q.dtype).tiny))).unbind(0)
    with torch.no_grad():
        if kind == "2d":
            a, b, c = torch.zeros_like(w), torch.zeros_like(w), torch.ones_like(w)
        else:
            s0, s1, s2 = scales.T.contiguous()
            first = (s0 <= s1) & (s0 <= s2)
            second = ~first & (s1 <= s2)
            a, b, c = first.to(w), second.to(w), (~(first | second)).to(w)
        center = -viewmat[:3, :3].T @ viewmat[:3, 3]
        tx, ty, tz = (center - means).T.contiguous()

    def turned(w, x, y, z, a, b, c):  # R e = (2 w^2 - 1) e + 2 (v . e) v + 2 w v x e
        along, stay, w2 = 2 * (x * a + y * b + z * c), 2 * w * w - 1, 2 * w
        return (
            stay * a + along * x + w2 * (y * c - z * b),
            stay * b + along * y + w2 * (z * a - x * c),
            stay * c + along * z + w2 * (x * b - y * a),
        )

    with torch.no_grad():
        nx, ny, nz = turned(w, x, y, z, a, b, c)
        side = torch.where(nx * tx + ny * ty + nz * tz < 0, -1.0, 1.0).to(w)
        a, b, c = side * a, side * b, side * c
    return torch.stack(turned(w, x, y, z, a, b, c), 1)


def _median_depth(median: Tensor, viewmat: Tensor, K: Tensor, i: _Inputs) -> Tensor:
    found = median >= 0
    means, quats, scales, _ = i.shape
    which = median[found].long()
    if i.kind == "2d":
        of_pixel = [t.index_select(0, which) for t in (means, quats, scales)]
        p = of_pixel[0] @ viewmat[:3, :3].T + viewmat[:3, 3]
        y, x = torch.nonzero(found, as_tuple=True)
        z = meet(*planes(p, *of_pixel[1:], viewmat, K.to(p)), x + 0.5, y + 0.5)[1]
    else:
        z = (means @ viewmat[2, :3] + viewmat[2, 3]).index_select(0, which)
    return torch.zeros(median.shape, dtype=z.dtype, device=z.device).masked_scatter(found, z)


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
    kind: str = "3d",
    normals: bool | None = None,
) -> Splatted:
    """Render N Gaussians from C cameras (Kerbl et al., SIGGRAPH 2023; conventions of gsplat's `rasterization`).

    means (N,3) world metres; quats (N,4) wxyz, normalised inside; scales (N,3) metres; opacities (N,) in [0,1];
    colors (N,3), or (N,K,3) spherical-harmonic coefficients when sh_degree (0-3) is given; viewmats (C,4,4)
    camera-from-world, OpenCV axes; Ks (C,3,3) pixels, no skew, pixel centres at +0.5; backgrounds (C,3).
    ids (N,): body of each Gaussian, 0..n_ids-1 (n_ids defaults to the largest id + 1; at most 12); -1 belongs to none.
    kind "2d": flat disks in the plane of the first two axes, the third scale ignored, met by each pixel's ray (Huang et
    al., 2D Gaussian Splatting, SIGGRAPH 2024); depth is then where the ray meets the disk.
    normals: whether to composite them in the same pass; False leaves them to a second pass when `.normals` is first
    read. By default True for 2D Gaussians, False for 3D ones.

    Gradients flow to every float tensor, viewmats and Ks included. backend: "cpu" (compiled, float32), "triton" (CUDA)
    or "torch" (anything); chosen by the tensors when None. Raises ValueError or TypeError on wrong shapes,
    dtypes, sizes, ids or values that are not finite, before any kernel runs.
    """
    if viewmats.ndim != 3 or Ks.ndim != 3 or len(viewmats) != len(Ks) or not len(Ks):
        raise ValueError(f"viewmats and Ks are (C,4,4) and (C,3,3), not {tuple(viewmats.shape)} and {tuple(Ks.shape)}")
    if viewmats.shape[1:] != (4, 4) or Ks.shape[1:] != (3, 3):
        raise ValueError(f"viewmats and Ks are (C,4,4) and (C,3,3), not {tuple(viewmats.shape)} and {tuple(Ks.shape)}")
    check_size(width, height)
    check_shapes(means, quats, scales, opacities, colors, sh_degree, ids, 0, None, kind)
    n_ids = _check_ids(ids, n_ids, len(means))
    viewmats, Ks = like_means("viewmats", viewmats, means), Ks.to(means.dtype)
    if backgrounds is not None and backgrounds.shape != (len(Ks), 3):
        raise ValueError(f"backgrounds is {tuple(backgrounds.shape)}, not {(len(Ks), 3)}")
    backgrounds = None if backgrounds is None else like_means("backgrounds", backgrounds, means)
    shape = (means, quats, scales, opacities)
    check_finite(
        means=means, quats=quats, scales=scales, opacities=opacities, colors=colors, viewmats=viewmats, Ks=Ks,
        backgrounds=backgrounds,
    )  # fmt: skip
    check_intrinsics(Ks)
    together = kind == "2d" if normals is None else normals
    views = []
    for V, K in zip(viewmats, Ks, strict=True):
        features = surface_normals(means, quats, scales, V, kind) if together else None
        views.append(
            rasterize(*shape, colors, V, K, width, height, sh_degree, ids, n_ids, backend, features=features, kind=kind)
        )
    if len(views) == 1:
        out, alpha, median = (t[None] for t in views[0])
    else:
        out, alpha, median = (torch.stack(parts) for parts in zip(*views, strict=True))
    color, alpha, depth, rest = compose(out, alpha, backgrounds, backend)
    rest = rest.split([3, n_ids], -1) if together and n_ids else (rest,)
    normal = rest[0] if together else None
    share = rest[-1] if n_ids else None
    versions = tuple(map(version, (*shape, viewmats, Ks)))
    inputs = _Inputs(shape, viewmats, Ks, (width, height), kind, backend, torch.is_grad_enabled(), versions)
    return Splatted(color, alpha, depth, share, median, normal, inputs)


def _check_ids(ids: Tensor | None, n_ids: int | None, n: int) -> int:
    if ids is None:
        if n_ids:
            raise ValueError(f"n_ids is {n_ids}, but there are no ids; give the body of each Gaussian")
        return 0
    if ids.shape != (n,):
        raise ValueError(f"ids is {tuple(ids.shape)}, not {(n,)}")
    if not n:
        return n_ids or 1
    if capturing(ids):
        if n_ids is None:
            raise ValueError("while a CUDA graph is captured, ids cannot be read: give n_ids as well")
        return n_ids
    low, high = (int(v) for v in torch.aminmax(ids))
    count = max(high + 1, 1) if n_ids is None else n_ids
    if low < -1 or high >= count:
        raise ValueError(f"ids run from {low} to {high}; they must be -1 (no body) or 0 to {count - 1}")
    return count
