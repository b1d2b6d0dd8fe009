"""A surface out of depth images with known cameras: truncated signed distances, averaged (Curless & Levoy, 1996).

Of Gaussians, `handhold.render.fusion` renders the depth images first.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import cv2
import numpy as np
import torch
from scipy.spatial import cKDTree

from ..scene import Mesh
from .extraction import Report, extract_grid, sparse_values

_FOLD = 256  # cv2.remap takes images, not lists: points are folded into rows of this many
_CHUNK = 1 << 14  # points at a time, so that what is known of them stays in the cache


def fuse_depths(
    depths: Any,
    colors: Any | None,
    masks: Any | None,
    Ks: Any,
    cam_from_world: Any,
    lo: Any,
    hi: Any,
    resolution: int = 128,
    *,
    truncation: float | None = None,
    unseen: str = "solid",
    keep: int | None = 1,
    fill_cavities: bool = True,
) -> tuple[Mesh, Report]:
    """Watertight mesh, in the world frame, of what C depth images see inside the box [lo, hi].

    depths (C,H,W) metres along z; colors (C,H,W,3) in [0,1] or None; masks (C,H,W) bool, True on the object (None:
    where the depth is finite and positive); beside the mask is background, empty all along the ray. Ks (C,3,3)
    pixels, centres at +0.5; cam_from_world (C,4,4); numpy or torch. resolution: cells along the box's longest side.
    truncation: metres in front of a surface, and half of them behind, within which views are averaged, 4 cells by
    default. What lies behind a surface is not seen, so it counts less the deeper it lies: walls of two cells come out.

    Distances run along the ray and count by the squared cosine at which the surface is seen; beside the silhouette the
    distance to it bounds the distance to the object, which keeps silhouettes sharp. Space that no view tells of is
    "solid" (what is seen from all around is closed that way) or "empty" (a shell half the truncation thick stays).
    `observed` of the mesh is False on surface no view saw, which gets the colour of the nearest that was seen.

    Raises ValueError for wrong shapes, cameras or an empty box, `StageFailed` when nothing is left.
    """
    if unseen not in ("solid", "empty"):
        raise ValueError(f'unseen space is "solid" or "empty", not {unseen!r}')
    views = _views(depths, colors, masks, Ks, cam_from_world)
    low, high = (np.asarray(_numpy(x), np.float64).reshape(-1) + np.zeros(3) for x in (lo, hi))
    h = float((high - low).max() / resolution) if resolution > 0 else np.nan
    truncation = 4 * h if truncation is None else float(truncation)
    if not truncation > 0:
        raise ValueError(f"truncation is a positive length, not {truncation}")
    for v in views:
        v.weigh(truncation)

    def ask(x: np.ndarray, reach: float) -> np.ndarray:
        return _fused(views, x, max(truncation, 1.01 * reach), 0.5 * truncation, unseen, judge=reach > 0)

    values, low, h, asked = sparse_values(ask, low, high, resolution, 1.5)
    mesh, report = extract_grid(values, low, h, keep=keep, fill_cavities=fill_cavities, evaluations=asked)
    return _painted(mesh, views, truncation, colors is not None), report


class _View:
    """One depth image as maps to sample from."""

    def __init__(self, depth: np.ndarray, color: np.ndarray | None, mask: np.ndarray, K: np.ndarray, pose: np.ndarray):
        self.K, self.pose, self.color = K, pose, color
        self.height, self.width = depth.shape
        self.nearest = np.where(mask, depth, np.nan).astype(np.float32)
        self.beside = cv2.distanceTransform((~mask).astype(np.uint8), cv2.DIST_L2, 5) - 0.5
        if not mask.any():  # no silhouette to be near to
            self.beside = np.full(depth.shape, 1e6, np.float32)

    def weigh(self, truncation: float) -> None:
        """How much each pixel counts: the squared cosine at which its surface is seen."""
        y, x = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32) + 0.5
        ray = np.stack([(x - self.K[0, 2]) / self.K[0, 0], (y - self.K[1, 2]) / self.K[1, 1], np.ones_like(x)], -1)
        p = ray * self.nearest[..., None]
        across, down = np.full_like(p, np.nan), np.full_like(p, np.nan)
        across[:, 1:-1], down[1:-1] = p[:, 2:] - p[:, :-2], p[2:] - p[:-2]
        normal = np.cross(across, down)
        length = np.linalg.norm(normal, axis=-1) * np.linalg.norm(ray, axis=-1)
        with np.errstate(invalid="ignore", divide="ignore"):
            cosine = np.abs((normal * ray).sum(-1)) / length
        self.weight = np.where(np.isfinite(cosine), np.maximum(cosine, 0.05) ** 2, 0.01).astype(np.float32)
        self.truncation = truncation

    def look(self, x: np.ndarray, reach: float, behind: float) -> tuple[np.ndarray, np.ndarray, tuple, np.ndarray]:
        """What the view tells at x (N,3): signed distance along the ray, at most `reach`, and its weight, (N,) each.

        The weight falls to 0 at `behind` the surface, and is 0 wherever the view tells nothing. Also where to look in
        the images, and whether the object is seen there.
        """
        c = (x @ self.pose[:3, :3].T + self.pose[:3, 3]).astype(np.float32)
        z = c[:, 2]
        front = z > 1e-6
        safe = np.where(front, z, np.float32(1))
        px = np.zeros((2, -(-len(x) // _FOLD) * _FOLD), np.float32)
        u, v = px[:, : len(x)]
        u[:] = np.float32(self.K[0, 0]) * c[:, 0] / safe + np.float32(self.K[0, 2] - 0.5)
        v[:] = np.float32(self.K[1, 1]) * c[:, 1] / safe + np.float32(self.K[1, 2] - 0.5)
        on = front & (u >= -0.5) & (v >= -0.5) & (u <= self.width - 0.5) & (v <= self.height - 0.5)
        px[:, : len(x)][:, ~on] = 0
        maps = (*px.reshape(2, -1, _FOLD), len(x))
        depth = _at(self.nearest, maps, cv2.INTER_NEAREST)
        smooth = _at(self.nearest, maps, cv2.INTER_LINEAR)  # NaN when one of the four is background
        depth = np.where(np.abs(smooth - depth) < 0.5 * self.truncation, smooth, depth)
        seen = np.isfinite(depth)
        along = np.sqrt(np.einsum("ij,ij->i", c, c)) / safe
        beside = _at(self.beside, maps, cv2.INTER_LINEAR) * (z / np.float32(self.K[0, 0]))
        signed = np.where(seen, (depth - z) * along, beside)
        weight = np.where(seen, _at(self.weight, maps, cv2.INTER_NEAREST), np.float32(1))
        weight *= np.clip(1 + signed / np.float32(behind), 0, 1)
        weight[~on] = 0
        return np.minimum(signed, np.float32(reach)), weight, maps, seen & on


def _fused(views: list[_View], x: np.ndarray, reach: float, behind: float, unseen: str, judge: bool) -> np.ndarray:
    """Averaged distance (N,) at x (N,3); when judging, about the distance itself, with the average's sign.

    The distance to the silhouette is a lower bound on that to the object, the distance along a ray an upper one: the
    largest of the first or the smallest of the second.
    """
    if len(x) > _CHUNK:
        return np.concatenate(
            [_fused(views, x[i : i + _CHUNK], reach, behind, unseen, judge) for i in range(0, len(x), _CHUNK)]
        )
    total, weights = np.zeros(len(x)), np.zeros(len(x))
    beside, along = np.zeros(len(x), np.float32), np.full(len(x), reach, np.float32)
    for v in views:
        signed, weight, _, seen = v.look(x, reach, reach if judge else behind)
        told = weight > 0
        total += weight * np.where(told, signed, 0)
        weights += weight
        if judge:
            beside = np.where(told & ~seen, np.maximum(beside, signed), beside)
            along = np.where(told & seen, np.minimum(along, np.abs(signed)), along)
    out = np.where(weights > 0, total / np.maximum(weights, 1e-12), -reach if unseen == "solid" else reach)
    if not judge:
        return out
    outside = np.where(beside > 0, np.maximum(beside, np.where(along < reach, along, 0)), along)
    return np.where(out < 0, -along, outside)


def _painted(mesh: Mesh, views: list[_View], truncation: float, colored: bool) -> Mesh:
    """The mesh with what the views saw of it: colours, and which vertices were seen at all."""
    x = mesh.vertices.astype(np.float64)
    total, weights = np.zeros((len(x), 3)), np.zeros(len(x))
    for i in range(0, len(x), _CHUNK):
        part = slice(i, i + _CHUNK)
        for v in views:
            signed, weight, maps, seen = v.look(x[part], truncation, truncation)
            weight = np.where(seen & (np.abs(signed) < 0.5 * truncation), weight**2, 0)
            weights[part] += weight
            if colored:
                total[part] += weight[:, None] * _at(v.color, maps, cv2.INTER_LINEAR)
    observed = weights > 0
    if not colored:
        return replace(mesh, observed=observed)
    rgb = np.full((len(x), 3), 0.5)
    rgb[observed] = total[observed] / weights[observed, None]
    if observed.any() and not observed.all():
        rgb[~observed] = rgb[observed][cKDTree(x[observed]).query(x[~observed])[1]]
    return replace(mesh, colors=rgb.clip(0, 1).astype(np.float32), observed=observed)


def _at(image: np.ndarray, maps: tuple[np.ndarray, np.ndarray, int], how: int) -> np.ndarray:
    """Values (N,) or (N,3) of an image at folded pixel positions."""
    x, y, count = maps
    return cv2.remap(image, x, y, how, borderMode=cv2.BORDER_REPLICATE).reshape(-1, *image.shape[2:])[:count]


def _views(depths: Any, colors: Any | None, masks: Any | None, Ks: Any, cam_from_world: Any) -> list[_View]:
    """Checked, as arrays."""
    depths = np.asarray(_numpy(depths), np.float32)
    if depths.ndim != 3 or not len(depths) or min(depths.shape[1:]) < 3 or max(depths.shape[1:]) > 32000:
        raise ValueError(f"depths are (C,H,W), three pixels or more a side, not {depths.shape}")
    count, height, width = depths.shape
    Ks, poses = (np.asarray(_numpy(x), np.float64) for x in (Ks, cam_from_world))
    if Ks.shape != (count, 3, 3) or poses.shape != (count, 4, 4):
        raise ValueError(
            f"{count} depth images need Ks (C,3,3) and cam_from_world (C,4,4), not {Ks.shape}, {poses.shape}"
        )
    if not (np.isfinite(Ks).all() and np.isfinite(poses).all() and (Ks[:, [0, 1], [0, 1]] > 0).all()):
        raise ValueError("Ks or cam_from_world are not finite, or a focal length is not positive")
    known = np.isfinite(depths) & (depths > 0)
    masks = known if masks is None else np.asarray(_numpy(masks), bool)
    if masks.shape != depths.shape:
        raise ValueError(f"masks {masks.shape} are not the size of the depths {depths.shape}")
    if (masks & ~known).any():
        raise ValueError("the depth is not a positive number on some pixels of the masks")
    if colors is not None:
        colors = np.ascontiguousarray(_numpy(colors), np.float32)
        if colors.shape != (count, height, width, 3) or not np.isfinite(colors).all():
            raise ValueError(f"colors are finite (C,H,W,3) in [0,1], not {colors.shape}")
    return [_View(depths[i], None if colors is None else colors[i], masks[i], Ks[i], poses[i]) for i in range(count)]


def _numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
