"""Questions to a triangle mesh: closest point, signed distance, winding number, ray hits, intersection of two meshes.

Points and vertices are numpy arrays or torch tensors, in any leading shape (*B,3), answered in the points' kind, dtype
and device; the search itself runs on the CPU in double precision, on a tree over the triangles that is built once
(`MeshQueries`). Without the compiled kernels (or with backend="torch") the same answers come from torch, slower.
What is asked per sample inside an optimisation belongs in a grid: `handhold.shapes.sdf.bake_sdf`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch

from ..kernels import _lib
from ..kernels.bvh import TriangleTree
from . import meshes


class Nearest(NamedTuple):
    """Result of `MeshQueries.nearest`, one row per query."""

    points: Any  # (*B,3) on the surface
    face: Any  # (*B) int64
    bary: Any  # (*B,3) weights of the face's corners
    distance: Any  # (*B) unsigned


class Hits(NamedTuple):
    """Result of `MeshQueries.first_hits`, one row per ray."""

    t: Any  # (*B) in units of the direction's length, inf where nothing is hit
    face: Any  # (*B) int64, -1 where nothing is hit
    bary: Any  # (*B,3)


class Intersection(NamedTuple):
    """What two solids share."""

    volume: float  # m^3
    depth: float  # deepest vertex of either mesh inside the other, metres to that one's surface; 0 when apart


class MeshQueries:
    """Owns the tree of one mesh, for many queries.

    vertices (V,3) metres, finite; faces (T,3) integer, outward by the right-hand rule where a sign is asked for.
    Moving the mesh rigidly needs no new tree: move the points into its frame instead. backend: None (compiled where
    available), "cpu" or "torch". Raises ValueError for an empty mesh, wrong shapes, non-finite vertices and indices
    out of range.
    """

    def __init__(self, vertices: Any, faces: Any, backend: str | None = None):
        self._given = vertices if isinstance(vertices, torch.Tensor) else None
        self.vertices, self.faces = check_mesh(vertices, faces)
        self.backend = _lib.resolve_backend(backend)
        self._tree = TriangleTree(self.vertices, self.faces) if self.backend == "cpu" else None

    def nearest(self, points: Any) -> Nearest:
        """Exact closest point of the surface to each of points (*B,3).

        Torch: the distance is differentiable in the points and in the vertices given to the constructor (the face and
        its weights are held, which is exact for the distance; zero gradient at distance zero). The returned points
        carry the vertices' gradient alone.
        """
        x, back = _rows_of(points, "points")
        face, bary, d2 = self._closest(x)
        if not isinstance(points, torch.Tensor):
            at = (self.vertices[self.faces[face]] * bary[:, :, None]).sum(1)
            return Nearest(back(at), back(face), back(bary), back(np.sqrt(d2)))
        if not (
            torch.is_grad_enabled()
            and (points.requires_grad or (self._given is not None and self._given.requires_grad))
        ):
            at = (self.vertices[self.faces[face]] * bary[:, :, None]).sum(1)
            return Nearest(back(at), back(face), back(bary), back(np.sqrt(d2)))
        corners = torch.from_numpy(self.faces[face])
        vertices = torch.from_numpy(self.vertices) if self._given is None else self._given
        vertices = vertices.to(points)
        weights = back(bary)
        at = (vertices[corners.to(points.device)] * weights.reshape(-1, 3)[..., None]).sum(-2).reshape(points.shape)
        square = (points - at).square().sum(-1)
        touching = square == 0
        distance = torch.where(touching, 0, torch.where(touching, 1, square).sqrt())
        return Nearest(at, back(face), weights, distance)

    def winding_number(self, points: Any, exact: bool = False) -> Any:
        """Generalised winding number (*B): 1 inside a closed outward mesh, 0 outside, in between near holes.

        Jacobson et al., "Robust inside-outside segmentation", SIGGRAPH 2013; by the hierarchical expansion of Barill
        et al., SIGGRAPH 2018, to 0.05, mostly far better; or with `exact` from every triangle.
        """
        x, back = _rows_of(points, "points")
        return back(self._winding(x, exact))

    def contains(self, points: Any) -> Any:
        """(*B) bool: the winding number is beyond one half (either orientation of the mesh)."""
        x, back = _rows_of(points, "points")
        return back(np.abs(self._winding(x, False)) > 0.5)

    def signed_distance(self, points: Any) -> Any:
        """(*B) distance to the surface, negative where `contains`; differentiable as `nearest` is."""
        inside = self.contains(points.detach() if isinstance(points, torch.Tensor) else points)
        distance = self.nearest(points).distance
        return (
            (1 - 2 * inside.to(distance.dtype)) * distance
            if isinstance(points, torch.Tensor)
            else np.where(inside, -distance, distance)
        )

    def first_hits(self, origins: Any, directions: Any) -> Hits:
        """First hit of each ray o + t d, t >= 0, from either side; origins, directions (*B,3)."""
        o, back = _rows_of(origins, "origins")
        d, _ = _rows_of(directions, "directions")
        if o.shape != d.shape:
            raise ValueError(f"origins {o.shape} and directions {d.shape} differ")
        face, bary, t = self._tree.rays(o, d) if self._tree else _brute_rays(self.vertices[self.faces], o, d)
        return Hits(back(t), back(face), back(bary))

    def _closest(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self._tree:
            return self._tree.closest(x)
        found = meshes.closest_point(*(torch.from_numpy(a) for a in (x, self.vertices, self.faces)), backend="torch")
        return found.face.numpy(), found.bary.numpy(), found.distance.numpy() ** 2

    def _winding(self, x: np.ndarray, exact: bool) -> np.ndarray:
        if self._tree:
            return self._tree.winding(x, np.inf if exact else 2.0)
        return _brute_winding(self.vertices[self.faces], x)


def nearest_points(points: Any, vertices: Any, faces: Any, backend: str | None = None) -> Nearest:
    """`MeshQueries.nearest` of a mesh that is asked once: points (*B,3), vertices (V,3), faces (T,3)."""
    return MeshQueries(vertices, faces, backend).nearest(points)


def signed_distance(points: Any, vertices: Any, faces: Any, backend: str | None = None) -> Any:
    """`MeshQueries.signed_distance` of a mesh that is asked once."""
    return MeshQueries(vertices, faces, backend).signed_distance(points)


def winding_number(points: Any, vertices: Any, faces: Any, exact: bool = False, backend: str | None = None) -> Any:
    """`MeshQueries.winding_number` of a mesh that is asked once."""
    return MeshQueries(vertices, faces, backend).winding_number(points, exact)


def penetration_depth(a: MeshQueries, b: MeshQueries) -> float:
    """Deepest vertex of either mesh inside the other, as its distance to that one's surface; 0 when there is none.

    The measure of the field (maximum penetration), not the shortest translation that parts them; as fine as the
    meshes' vertices.
    """
    depth = 0.0
    for one, other in ((a, b), (b, a)):
        used = one.vertices[np.unique(one.faces)]
        lo, hi = other.vertices[other.faces].min((0, 1)), other.vertices[other.faces].max((0, 1))
        used = used[((used >= lo) & (used <= hi)).all(1)]
        used = used[other.contains(used)] if len(used) else used
        if len(used):
            depth = max(depth, float(other.nearest(used).distance.max()))
    return depth


def intersection(a: MeshQueries, b: MeshQueries) -> Intersection:
    """Volume that two closed meshes share (exact, a mesh boolean by manifold3d), and `penetration_depth`.

    All faces of a mesh may wind inward. Raises ValueError when a mesh is not closed and consistently oriented: fill its
    holes first (`meshes.fill_holes`), or take `intersection_by_sampling`.
    """
    shared = _solid(a, "first") ^ _solid(b, "second")
    return Intersection(max(0.0, float(shared.volume())), penetration_depth(a, b))


def intersection_by_sampling(a: MeshQueries, b: MeshQueries, spacing: float) -> Intersection:
    """As `intersection` for any two meshes, open ones too: cells of a grid of `spacing` whose centre both contain."""
    if not spacing > 0:
        raise ValueError(f"spacing is a positive length, not {spacing}")
    boxes = [(m.vertices[m.faces].min((0, 1)), m.vertices[m.faces].max((0, 1))) for m in (a, b)]
    lo, hi = np.maximum(boxes[0][0], boxes[1][0]), np.minimum(boxes[0][1], boxes[1][1])
    volume = 0.0
    if (hi > lo).all():
        counts = np.maximum(1, np.round((hi - lo) / spacing)).astype(int)
        if counts.prod() > 1 << 27:
            raise ValueError(f"{spacing} m cuts the common box into {counts.prod()} cells; take a wider spacing")
        cell = (hi - lo) / counts
        y, z = (lo[k] + cell[k] * (np.arange(counts[k]) + 0.5) for k in (1, 2))
        plane = np.stack(np.meshgrid([0.0], y, z, indexing="ij"), -1).reshape(-1, 3)
        for i in range(counts[0]):
            plane[:, 0] = lo[0] + cell[0] * (i + 0.5)
            inside = plane[a.contains(plane)]
            volume += float(b.contains(inside).sum()) if len(inside) else 0.0
        volume *= float(cell.prod())
    return Intersection(volume, penetration_depth(a, b))


def _solid(mesh: MeshQueries, name: str):
    import manifold3d

    if not meshes.is_watertight(mesh.faces):
        raise ValueError(f"the {name} mesh is not closed: fill its holes, or take intersection_by_sampling")
    a, b, c = (mesh.vertices[mesh.faces[:, k]] for k in range(3))
    outward = np.einsum("ij,ij->", a, np.cross(b, c)) >= 0  # six times the signed volume
    faces = mesh.faces if outward else mesh.faces[:, ::-1]
    data = manifold3d.Mesh64(np.ascontiguousarray(mesh.vertices), np.ascontiguousarray(faces.astype(np.uint64)))
    solid = manifold3d.Manifold(data)
    if solid.status() != manifold3d.Error.NoError:
        raise ValueError(f"the {name} mesh is not a solid ({solid.status()}): take intersection_by_sampling")
    return solid


def check_mesh(vertices: Any, faces: Any) -> tuple[np.ndarray, np.ndarray]:
    """A mesh as contiguous float64 (V,3) and int64 (T,3); raises ValueError or TypeError when it is not one."""
    v = np.ascontiguousarray(_numpy(vertices), np.float64)
    f = _numpy(faces)
    if v.ndim != 2 or v.shape[1] != 3 or f.ndim != 2 or f.shape[1] != 3:
        raise ValueError(f"a mesh is vertices (V,3) and faces (T,3), not {v.shape} and {f.shape}")
    if f.dtype.kind not in "iu":
        raise TypeError(f"faces are integers, not {f.dtype}")
    f = np.ascontiguousarray(f, np.int64)
    if not len(f):
        raise ValueError("the mesh has no faces")
    if f.min() < 0 or f.max() >= len(v):
        raise ValueError(f"faces speak of vertices {f.min()} to {f.max()}; there are {len(v)}")
    if not np.abs(v).max() < 1e15:  # also false for NaN
        raise ValueError("vertices are not finite")
    return v, f


def _numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)


def _rows_of(x: Any, name: str):
    """x (*B,3) as (N,3) float64, and what turns rows back into x's leading shape, kind, dtype and device."""
    rows = _numpy(x)
    if rows.ndim < 1 or rows.shape[-1] != 3:
        raise ValueError(f"{name} are (...,3), not {rows.shape}")
    lead, kind = rows.shape[:-1], rows.dtype if rows.dtype.kind == "f" else np.dtype(np.float64)
    rows = np.ascontiguousarray(rows.reshape(-1, 3), np.float64)
    if rows.size and not np.abs(rows).max() < 1e15:
        raise ValueError(f"{name} are not finite")

    def back(out: np.ndarray) -> Any:
        out = out.reshape(lead + out.shape[1:])
        out = out.astype(kind, copy=False) if out.dtype.kind == "f" else out
        return torch.from_numpy(out).to(x.device) if isinstance(x, torch.Tensor) else out

    return rows, back


def _brute_winding(corners: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Winding number (N,) from every triangle (T,3,3): Van Oosterom & Strackee, 1983."""
    out = np.zeros(len(x))
    step = max(1, 2_000_000 // len(corners))
    for i in range(0, len(x), step):
        a, b, c = (corners[None, :, k] - x[i : i + step, None] for k in range(3))
        la, lb, lc = (np.linalg.norm(e, axis=-1) for e in (a, b, c))
        det = (a * np.cross(b, c)).sum(-1)
        den = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
        out[i : i + step] = np.arctan2(det, den).sum(1) / (2 * np.pi)
    return out


def _brute_rays(corners: np.ndarray, o: np.ndarray, d: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First hits from every triangle (T,3,3): Moeller & Trumbore, 1997."""
    face, bary, t_hit = np.full(len(o), -1), np.zeros((len(o), 3)), np.full(len(o), np.inf)
    ab, ac = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    step = max(1, 2_000_000 // len(corners))
    for i in range(0, len(o), step):
        rays, ao = d[i : i + step, None], o[i : i + step, None] - corners[None, :, 0]
        x, y = np.cross(rays, ac[None]), np.cross(ao, ab[None])
        with np.errstate(divide="ignore", invalid="ignore"):
            det = (ab * x).sum(-1)
            u, v, t = (ao * x).sum(-1) / det, (rays * y).sum(-1) / det, (ac * y).sum(-1) / det
            hit = (det != 0) & (u >= -1e-12) & (v >= -1e-12) & (u + v <= 1 + 1e-12) & (t >= 0)
        t = np.where(hit, t, np.inf)
        k = t.argmin(1)
        rows = np.flatnonzero(np.isfinite(t.min(1)))
        at = k[rows]
        face[i + rows], t_hit[i + rows] = at, t[rows, at]
        bary[i + rows] = np.stack([1 - u[rows, at] - v[rows, at], u[rows, at], v[rows, at]], 1)
    return face, bary, t_hit
