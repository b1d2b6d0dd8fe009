"""Surface that no frame has seen, completed from its mirror image where the seen surface is symmetric.

Most things that hands hold have a plane of mirror symmetry or more, and a palm hides one side alone. A plane is found
where the seen surface, reflected, comes to lie on seen surface: symmetry by registration of the reflection (Cicconet et
al., ICCV workshops 2017), here by Gauss-Newton on the reflected points' distances in the signed-distance grid. A plane
whose reflection would stand in space that frames see to be empty is refused. Then the distance of a point near unseen
surface is that of its image. What frames have seen stays as it was seen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
import torch
from scipy.spatial import cKDTree

from ..kernels.grid import SdfGrid
from ..scene import Mesh
from .sdf import nodes, redistance
from .texture import vertex_normals

MOST = 3  # planes, about perpendicular to each other
SHARED = 0.2  # of the seen surface that a reflection must bring onto seen surface
OFF = {0.5: 0.025, 0.8: 0.045}  # quantile: of the object's half diagonal that reflected surface may be off there
STANDS_OUT = 0.12  # of the half diagonal: so far off is a handle, not an error
AMISS = 0.06, 0.1  # share that may stand out or face across what it comes to lie on: seen surface, and all
ENDS = 0.25, 0.01  # likewise of the points that face along the normal, which tell the offset; and their least share
INTRUDES = 0.03  # share that may stand in space that is seen to be empty
CLEARANCE = 0.002  # metres: masks are not exact
EDGE, SURE = 0.002, 0.008  # metres from unseen surface at which seen surface begins to count, and counts wholly
REACH = 0.3  # of the half diagonal: so far from the surface that is there its completion may lie
_COSINE = 0.25  # of two planes that are about perpendicular

Space = Callable[[np.ndarray], np.ndarray]  # points (N,3) -> metres (N,) outside what frames allow; 0 or less: inside


@dataclass(frozen=True)
class Mirror:
    """A plane x.normal = offset about which the seen surface is symmetric."""

    normal: np.ndarray  # (3,) unit, object frame
    offset: float
    error: float  # metres that reflected surface is off, median
    shared: float  # of the seen surface that lies on seen surface when reflected

    def __call__(self, x: np.ndarray) -> np.ndarray:
        """Points (N,3) reflected."""
        return _reflected(x, self.normal, self.offset)


def _reflected(x: np.ndarray, normal: np.ndarray, offset: float = 0.0) -> np.ndarray:
    return x - 2 * (x @ normal - offset)[:, None] * normal


def trust(mesh: Mesh) -> np.ndarray:
    """(V,) in [0,1]: 0 where unseen, rising with the distance from unseen surface, towards which a fit leans."""
    seen = np.asarray(mesh.observed, bool)
    if seen.all():
        return np.ones(len(seen))
    far = cKDTree(mesh.vertices[~seen]).query(mesh.vertices, workers=-1)[0]
    return np.where(seen, np.clip((far - EDGE) / (SURE - EDGE), 0, 1), 0.0)


def mirrors(mesh: Mesh, grid: SdfGrid, outside: Space, seed: int = 0, count: int = 1200) -> list[Mirror]:
    """Planes of symmetry of the seen surface, the best first; empty where there is none, or too little to tell.

    mesh: the grid's surface with `observed`; outside: see `Space`. Deterministic for a seed.
    """
    v, sure = mesh.vertices.astype(np.float64), trust(mesh)
    if (sure > 0.5).sum() < 100:
        return []
    area = vertex_areas(mesh)
    centre = (area[:, None] * v).sum(0) / area.sum()
    share = area * (sure > 0.5)
    pick = np.random.default_rng(seed).choice(len(v), min(count, int((share > 0).sum())), False, share / share.sum())
    normals = vertex_normals(v, mesh.faces)
    size = float(np.linalg.norm(np.ptp(v, axis=0))) / 2
    search = _Search(v[pick], normals[pick], normals, sure > 0.5, cKDTree(v), grid, centre, size)
    starts = np.concatenate([principal_axes(v - centre, area), _hemisphere(96)])
    cost = [search.cost(n, float(n @ centre)) for n in starts]
    found: list[Mirror] = []
    for k in np.argsort(cost)[:12]:
        normal, offset = search.refined(starts[k], float(starts[k] @ centre))
        if any(abs(normal @ m.normal) > 0.99 for m in found):
            continue
        mirror = search.judged(normal, offset, outside)
        if mirror is not None:
            found.append(mirror)
    kept: list[Mirror] = []
    for m in sorted(found, key=lambda m: m.error):
        if len(kept) < MOST and all(abs(m.normal @ k.normal) < _COSINE for k in kept):
            kept.append(m)
    return kept


@dataclass(frozen=True)
class _Search:
    """Seen points, to be reflected onto the surface."""

    x: np.ndarray  # (N,3)
    facing: np.ndarray  # (N,3) their normals
    normals: np.ndarray  # (V,3) of the whole surface
    seen: np.ndarray  # (V,) bool
    tree: cKDTree
    grid: SdfGrid
    centre: np.ndarray
    size: float  # half the diagonal

    def landed(self, normal: np.ndarray, offset: float):
        """Reflected points (N,3), distances (N,), their gradients (N,3), on seen surface (N,) bool, cosines (N,)."""
        y = _reflected(self.x, normal, offset)
        near = self.tree.query(y)[1]
        distance, gradient = _distances(self.grid, y)
        turned = _reflected(self.facing, normal)
        return y, distance, gradient, self.seen[near], (turned * self.normals[near]).sum(1)

    def cost(self, normal: np.ndarray, offset: float) -> float:
        _, distance, _, seen, _ = self.landed(normal, offset)
        if seen.mean() < 0.7 * SHARED:
            return np.inf
        return float(np.minimum(np.abs(distance[seen]), 0.1 * self.size).mean())

    def refined(self, normal: np.ndarray, offset: float, rounds: int = 20) -> tuple[np.ndarray, float]:
        """Gauss-Newton on the distances of reflected points, over the normal's two angles and the offset."""
        at = offset - normal @ self.centre  # the plane's distance from the centre: turning leaves it
        for _ in range(rounds):
            offset = at + normal @ self.centre
            _, distance, gradient, seen, cosine = self.landed(normal, offset)
            weight = seen * (cosine > 0.5) / (1 + (distance / (0.03 * self.size)) ** 2) ** 2
            if weight.sum() < 30:
                break
            turns = np.linalg.svd(normal[None])[2][1:]  # (2,3) across the normal
            along, arm = self.x @ normal - offset, self.x - self.centre
            columns = [
                -2 * ((arm @ t) * (gradient @ normal) + along * (gradient @ t)) for t in turns
            ] + [2 * (gradient @ normal)]  # fmt: skip
            j = np.stack(columns, 1)
            a = (j * weight[:, None]).T @ j + 1e-9 * len(j) * np.eye(3)
            step = -np.linalg.solve(a, (j * weight[:, None]).T @ distance)
            normal = normal + step[:2] @ turns
            normal, at = normal / np.linalg.norm(normal), at + step[2]
            if np.abs(step).max() < 1e-5:
                break
        return normal, float(at + normal @ self.centre)

    def judged(self, normal: np.ndarray, offset: float, outside: Space) -> Mirror | None:
        y, distance, _, seen, cosine = self.landed(normal, offset)
        if seen.mean() < SHARED:
            return None
        ends = np.abs(self.facing @ normal) > 0.7
        amiss = (np.abs(distance) > STANDS_OUT * self.size) | (cosine < 0.3)
        if amiss[seen].mean() > AMISS[0] or amiss.mean() > AMISS[1]:
            return None
        if ends.mean() < ENDS[1] or amiss[ends].mean() > ENDS[0]:
            return None
        off = np.abs(distance[seen])
        if any(np.quantile(off, q) > bar * self.size for q, bar in OFF.items()):
            return None
        if (~seen).any() and (outside(y[~seen]) > 2 * CLEARANCE).mean() > INTRUDES:
            return None
        return Mirror(normal, offset, float(np.median(off)), float(seen.mean()))


def complete(
    grid: SdfGrid, mesh: Mesh, planes: Sequence[Mirror], outside: Space, solids: Iterable = ()
) -> tuple[SdfGrid, np.ndarray]:
    """The grid with unseen surface taken from its images, and how much of each node (R,R,R) is, in [0,1].

    mesh: the grid's surface with `observed`; several planes: all products of their reflections count; solids: other
    bodies (`tracking.object.Solid`), into which nothing is completed.
    """
    out = SdfGrid(grid.data, grid.lo, grid.h)
    redistance(out)
    sure, tree = trust(mesh), cKDTree(mesh.vertices)
    near = out.data[..., 0].abs().numpy().ravel() < REACH * np.linalg.norm(np.ptp(mesh.vertices, axis=0)) / 2
    open_ = np.flatnonzero(near)
    own = sure[tree.query(nodes(out)[open_], workers=-1)[1]]
    open_, own = open_[own < 1], own[own < 1]
    x = nodes(out)[open_]
    best, total, value = np.zeros(len(x)), np.full(len(x), 1e-12), np.zeros(len(x))
    for count in range(1, len(planes) + 1):
        for chosen in combinations(planes, count):
            y = x
            for mirror in chosen:
                y = mirror(y)
            theirs = sure[tree.query(y, workers=-1)[1]]
            weight = theirs**2
            value += weight * _distances(out, y)[0]
            total += weight
            best = np.maximum(best, theirs)
    share = (1 - own) * best / ((1 - own) * best + own + 0.02)
    use = np.flatnonzero(share > 0.02)
    x, share, open_ = x[use], share[use], open_[use]
    image = value[use] / total[use]
    image = np.maximum(image, outside(x) - CLEARANCE)
    for solid in solids:
        image = np.maximum(image, -solid.distance(x))
    flat = out.data[..., 0].reshape(-1)
    at = torch.from_numpy(open_)
    mixed = (1 - share) * flat[at].double().numpy() + share * image
    flat[at] = torch.from_numpy(mixed).to(flat)
    out.data[..., 0] = flat.reshape(out.R, out.R, out.R)
    filled = np.zeros(out.R**3)
    filled[open_] = share
    return out, filled.reshape(out.R, out.R, out.R)


def _distances(grid: SdfGrid, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    with torch.no_grad():
        value, gradient = grid.sample(torch.as_tensor(x, dtype=grid.data.dtype, device=grid.data.device))
    return value[:, 0].double().cpu().numpy(), gradient.double().cpu().numpy()


def principal_axes(x: np.ndarray, weight: np.ndarray) -> list[np.ndarray]:
    """Unit principal axes of points (N,3) about their middle, the longest first."""
    moment = (weight[:, None, None] * (x[:, :, None] * x[:, None])).sum(0) / weight.sum()
    return list(np.linalg.eigh(moment)[1].T[::-1])


def vertex_areas(mesh: Mesh) -> np.ndarray:
    """(V,) a third of the area of each vertex's faces."""
    a, b, c = (np.asarray(mesh.vertices, np.float64)[mesh.faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1) / 6
    return np.bincount(mesh.faces.ravel(), np.repeat(area, 3), minlength=len(mesh.vertices)) + 1e-12


def _hemisphere(count: int) -> np.ndarray:
    """(count,3) unit vectors, evenly over half the sphere (Fibonacci)."""
    k = np.arange(count)
    z, turn = (k + 0.5) / count, k * np.pi * (3 - np.sqrt(5))
    r = np.sqrt(1 - z * z)
    return np.stack([r * np.cos(turn), r * np.sin(turn), z], 1)
