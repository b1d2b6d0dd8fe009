"""A signed-distance grid of an unknown object, from silhouettes to a coloured surface, and of a known one (`bake_sdf`).

`visual_hull` starts it, `surface` ends it; what happens between (photometric refinement together with the poses) is
`handhold.shapes.sdf_fit`. The grid and its kernels are `handhold.kernels.grid.SdfGrid`.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy import ndimage

from ..geometry.queries import MeshQueries
from ..kernels.grid import SdfGrid
from ..scene import Mesh
from .extraction import extract_grid


@dataclass(frozen=True)
class View:
    """What one frame says about the object."""

    cam_from_object: np.ndarray  # (4,4)
    inside: np.ndarray  # (H,W) bool, object seen
    unknown: np.ndarray  # (H,W) bool, something may hide the object here
    weight: float = 1.0
    occluder_depth: np.ndarray | None = None  # (H,W) depth of a known occluder (the hand), inf where none


def visual_hull(
    views: list[View],
    K: np.ndarray,
    resolution: int,
    lo: np.ndarray,
    h: float,
    quantile: float = 0.9,
    min_share: float = 0.3,
) -> torch.Tensor:
    """Signed distance (R,R,R) of the silhouettes' common inside, negative inside.

    Per view the 2D distance to the silhouette (object or unknown) is scaled by depth over focal length; over views the
    given weighted quantile is taken instead of the maximum, because poses and masks are not exact. Views that do not
    tell (the point is hidden, or beyond the frame) are left out; a point that nearly none tells of, or that is hidden
    in most, is outside. So is a point in front of a known occluder that covers its pixel: it would have been seen.
    """
    axes = [lo[k] + h * np.arange(resolution) for k in range(3)]
    x = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    values, weights = np.empty((len(views), len(x)), np.float32), np.zeros((len(views), len(x)), np.float32)
    seen, hidden = np.zeros(len(x), np.float32), np.full(len(x), 1e-3, np.float32)
    for i, v in enumerate(views):
        solid = v.inside | v.unknown
        outside_px = cv2.distanceTransform((~solid).astype(np.uint8), cv2.DIST_L2, 5)
        inside_px = cv2.distanceTransform(solid.astype(np.uint8), cv2.DIST_L2, 5)
        signed = np.where(solid, 0.5 - inside_px, outside_px - 0.5).astype(np.float32)
        c = x @ v.cam_from_object[:3, :3].T + v.cam_from_object[:3, 3]
        z = np.maximum(c[:, 2], 1e-6)
        px = np.stack([K[0, 0] * c[:, 0] / z + K[0, 2], K[1, 1] * c[:, 1] / z + K[1, 2]], -1).astype(np.float32)
        # remap takes images, not lists: fold the points into one
        map_x, map_y = (np.clip(px[:, k] - 0.5, -1e4, 1e4).reshape(-1, resolution) for k in range(2))
        s = cv2.remap(signed, map_x, map_y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE).ravel() * z / K[0, 0]
        height, width = solid.shape
        off = (px[:, 0] < 0) | (px[:, 1] < 0) | (px[:, 0] > width) | (px[:, 1] > height)
        at = np.clip(np.floor(px).astype(int), 0, [width - 1, height - 1])
        visible = ~off & v.inside[at[:, 1], at[:, 0]]
        seen += v.weight * visible
        hidden += v.weight * (~off & ~visible & v.unknown[at[:, 1], at[:, 0]])
        tells = ~off & (
            visible | ~v.unknown[at[:, 1], at[:, 0]]
        )  # what lies beyond the border or is hidden says nothing
        if v.occluder_depth is not None:
            d = cv2.remap(
                v.occluder_depth.astype(np.float32),
                map_x,
                map_y,
                cv2.INTER_NEAREST,
                borderMode=cv2.BORDER_CONSTANT,
                borderValue=np.inf,
            ).ravel()
            bare = ~off & np.isfinite(d) & (z < d - 0.5 * h)  # in front of the hand that covers it, it would be seen
            s = np.where(bare, np.maximum(s, np.minimum(d - z, 4 * h)), s)
            tells |= bare
        values[i], weights[i] = s, v.weight * tells
    phi = _weighted_quantile(values, weights, quantile)
    known = weights.sum(0) > 0.08 * sum(v.weight for v in views)
    phi = np.where(known, phi, np.maximum(phi, 2 * h))
    share = ndimage.gaussian_filter((seen / (seen + hidden)).reshape(resolution, resolution, resolution), 0.7).ravel()
    phi = np.maximum(phi, 20 * h * (min_share - share))
    return torch.from_numpy(phi.reshape(resolution, resolution, resolution))


def _weighted_quantile(values: np.ndarray, weights: np.ndarray, q: float) -> np.ndarray:
    """Quantile over axis 0 of values (V,N) with weights (V,N)."""
    order = np.argsort(values, 0)
    cumulative = np.cumsum(np.take_along_axis(weights, order, 0), 0)
    at = (cumulative >= q * cumulative[-1] - 1e-6).argmax(0)
    return np.take_along_axis(values, np.take_along_axis(order, at[None], 0), 0)[0].astype(np.float32)


def open_thin(grid: SdfGrid, where: np.ndarray, radius: float) -> None:
    """In place: inside the region `where` (R,R,R) bool, remove what is thinner than about twice `radius` (morphological
    opening).

    Between the fingers of a grasping hand masks leak, and leaks make fins and threads; a thin real part away from the
    hand stays.
    """
    phi = grid.data[..., 0].numpy()
    solid = phi < 0
    core = ndimage.distance_transform_edt(solid) * grid.h > radius
    kept = ndimage.distance_transform_edt(~core) * grid.h <= radius if core.any() else np.zeros_like(solid)
    gone = solid & where & ~kept
    grid.data[..., 0][torch.from_numpy(gone)] = 0.7 * grid.h


def smooth(grid: SdfGrid, sigma: float) -> None:
    """In place: distances blurred by a Gaussian of `sigma` voxels, colours as they were."""
    blurred = ndimage.gaussian_filter(grid.data[..., 0].cpu().numpy(), sigma)
    grid.data[..., 0] = torch.from_numpy(blurred).to(grid.data)


def nodes(grid: SdfGrid) -> np.ndarray:
    """(R^3,3) positions of the grid's entries."""
    lo = grid.lo.cpu().numpy().astype(np.float64)
    axis = grid.h * np.arange(grid.R)
    return np.stack(np.meshgrid(*(lo[k] + axis for k in range(3)), indexing="ij"), -1).reshape(-1, 3)


def surface(grid: SdfGrid, largest_only: bool = True) -> tuple[Mesh, list[str]]:
    """Watertight coloured mesh of the zero set (`extract_grid`), capped at the grid's border, without cavities.

    Returns the mesh (in the grid's frame and units) and notes on what was dropped; an empty mesh for an empty volume.
    """

    def color(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            value, _ = grid.sample(torch.as_tensor(x, dtype=grid.data.dtype, device=grid.data.device))
        return torch.sigmoid(value[:, 1:]).cpu().numpy()

    phi = grid.data[..., 0].detach()
    if not bool((phi < 0).any()):
        return Mesh(np.zeros((0, 3), np.float32), np.zeros((0, 3), np.int32)), ["the object's volume is empty"]
    # what is enclosed cannot have been seen: no cavities
    mesh, report = extract_grid(phi, grid.lo.cpu().numpy(), grid.h, color=color, keep=1 if largest_only else None)
    return mesh, report.notes()


def bake_sdf(
    mesh: Mesh, resolution: int = 64, margin: float = 0.1, lo: np.ndarray | None = None, h: float | None = None
) -> SdfGrid:
    """Signed distance of a mesh, metres, on a cube's grid of `resolution`^3, with the mesh's colours where it has any.

    What is asked per sample inside an optimisation is asked of this grid: a lookup costs a hundredth of an exact query.
    The cube is centred on the mesh and wider by `margin` of its largest side, half on each side; or it begins at lo
    (3,) with voxels of h. Open meshes get the sign of their winding number. Raises ValueError for an unusable mesh.
    """
    if resolution < 3 or resolution > 512:
        raise ValueError(f"resolution is 3 to 512, not {resolution}")
    queries = MeshQueries(mesh.vertices, mesh.faces)
    if (lo is None) != (h is None):
        raise ValueError("give lo and h together, or neither")
    if lo is None:
        used = queries.vertices[np.unique(queries.faces)]
        low, high = used.min(0), used.max(0)
        h = float((high - low).max() * (1 + margin) / (resolution - 1))
        if not h > 0:
            raise ValueError("the mesh is a single point")
        lo = 0.5 * (low + high - h * (resolution - 1))
    data = np.zeros((resolution, resolution, resolution, 4), np.float32)
    axes = [lo[k] + h * np.arange(resolution) for k in range(3)]
    for i in range(resolution):
        x = np.stack(np.meshgrid(axes[0][i : i + 1], axes[1], axes[2], indexing="ij"), -1).reshape(-1, 3)
        found = queries.nearest(x)
        data[i, ..., 0] = np.where(queries.contains(x), -found.distance, found.distance).reshape(resolution, resolution)
        if mesh.colors is not None:
            rgb = (mesh.colors[mesh.faces[found.face]] * found.bary[:, :, None]).sum(1).clip(1e-3, 1 - 1e-3)
            data[i, ..., 1:] = np.log(rgb / (1 - rgb)).reshape(resolution, resolution, 3)
    return SdfGrid(torch.from_numpy(data), lo, h)


def redistance(grid: SdfGrid) -> None:
    """In place: distances of the grid made anew from its surface, which stays (level-set reinitialisation).

    Fitting leaves values that are no distances away from the surface: inside, beside what was removed, in corners that
    no ray asks. Exact distances to the cleaned mesh take their place; a grid without a surface is left as it is.
    """
    mesh, _ = surface(grid)
    if len(mesh.faces):
        lo = grid.lo.cpu().numpy().astype(np.float64)
        exact = bake_sdf(Mesh(mesh.vertices, mesh.faces), grid.R, lo=lo, h=grid.h)
        grid.data[..., 0] = exact.data[..., 0].to(grid.data)
