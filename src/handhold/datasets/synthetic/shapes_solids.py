"""Procedural solids: a closed triangle mesh and the signed distance to it, side by side.

The distances are analytic, exact or to first order: Inigo Quilez, "Distance functions" (iquilezles.org/articles/
distfunctions), for boxes and cones; a polygon's distance for lathed and extruded profiles; an implicit function over
the length of its gradient for superquadrics and blobs. Metres, negative inside, numpy float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.ndimage import map_coordinates
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

Distance = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True, eq=False)
class Solid:
    """vertices (V,3), faces (T,3) outward, distance: points (M,3) -> (M,) signed."""

    vertices: np.ndarray
    faces: np.ndarray
    distance: Distance

    def moved(self, shift=(0.0, 0.0, 0.0), turn: np.ndarray | None = None) -> Solid:
        """Turned by `turn` (3,3), then shifted."""
        r = np.eye(3, dtype=np.float32) if turn is None else np.asarray(turn, np.float32)
        t, f = np.asarray(shift, np.float32), self.distance
        return Solid((self.vertices @ r.T + t).astype(np.float32), self.faces, lambda p: f((p - t) @ r))


def union(*solids: Solid) -> Solid:
    """The meshes side by side (they may cut through one another), the least of the distances."""
    offsets = np.cumsum([0] + [len(s.vertices) for s in solids])
    return Solid(
        np.concatenate([s.vertices for s in solids]),
        np.concatenate([s.faces + o for s, o in zip(solids, offsets, strict=False)]),
        lambda p: np.min([s.distance(p) for s in solids], axis=0),
    )


def turn(axis: int, degrees: float) -> np.ndarray:
    """Rotation (3,3) about a coordinate axis."""
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    i, j = (axis + 1) % 3, (axis + 2) % 3
    r = np.eye(3, dtype=np.float32)
    r[i, i], r[i, j], r[j, i], r[j, j] = c, -s, s, c
    return r


def box(size, radius: float = 0.0, cells: int = 4) -> Solid:
    """Box of full `size` (3,) about the origin; edges rounded to `radius`."""
    half = np.asarray(size, np.float32) / 2
    radius = float(min(radius, 0.98 * half.min()))
    core = half - radius
    if radius > 0:
        arc = np.tan(np.linspace(0, np.pi / 4, 3)) * radius
        axes = [np.concatenate([-c - arc[::-1], np.linspace(-c, c, cells)[1:-1], c + arc]) for c in core]
    else:
        axes = [np.linspace(-c, c, cells + 1) for c in half]
    v, f = _cube_lattice(axes)
    if radius > 0:
        inner = np.clip(v, -core, core)
        out = v - inner
        v = inner + radius * out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)

    def distance(p):
        q = np.abs(p) - core
        return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0) - radius

    return Solid(v.astype(np.float32), f, distance)


def _cube_lattice(axes: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Closed surface of a box cut along the given coordinates of each axis."""
    vertices, faces, n = [], [], 0
    for k in range(3):
        i, j = (k + 1) % 3, (k + 2) % 3
        a, b = np.meshgrid(axes[i], axes[j], indexing="ij")
        for end in (0, -1):
            v = np.empty((a.size, 3))
            v[:, i], v[:, j], v[:, k] = a.ravel(), b.ravel(), axes[k][end]
            faces.append(grid_faces(*a.shape, end == 0) + n)
            vertices.append(v)
            n += len(v)
    return weld(np.concatenate(vertices), np.concatenate(faces))


def grid_faces(n: int, m: int, flip: bool) -> np.ndarray:
    """Two triangles for each cell of an (n,m) lattice of vertices, row-major."""
    i = (np.arange(n - 1)[:, None] * m + np.arange(m - 1)).ravel()
    f = np.concatenate([np.stack([i, i + m, i + m + 1], 1), np.stack([i, i + m + 1, i + 1], 1)])
    return f[:, ::-1] if flip else f


def weld(vertices: np.ndarray, faces: np.ndarray, to: float = 1e-6) -> tuple[np.ndarray, np.ndarray]:
    """Equal vertices made one, faces without area dropped."""
    _, first, back = np.unique(np.round(vertices / to).astype(np.int64), axis=0, return_index=True, return_inverse=True)
    f = back.reshape(-1)[faces]
    f = f[(f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 2] != f[:, 0])]
    return vertices[first], f


def polygon_distance(points: np.ndarray, polygon: np.ndarray) -> np.ndarray:
    """Signed distance (M,) of points (M,2) to a closed polygon (N,2), negative inside (even-odd)."""
    a = polygon.astype(np.float32)
    b = np.roll(a, -1, 0)
    e = b - a
    p = points[:, None].astype(np.float32) - a
    t = np.clip((p * e).sum(-1) / np.maximum((e * e).sum(-1), 1e-16), 0, 1)
    d = np.sqrt(((p - t[..., None] * e) ** 2).sum(-1).min(1))
    y = points[:, None, 1]
    up = (a[:, 1] <= y) != (b[:, 1] <= y)
    left = p[..., 0] * e[:, 1] - p[..., 1] * e[:, 0]
    crossing = up & ((left < 0) == (e[:, 1] > 0))
    return np.where(crossing.sum(1) % 2 == 1, -d, d)


def _table(polygon: np.ndarray, lo, hi, shape=(72, 72)) -> Distance:
    """The polygon's distance tabulated on [lo, hi] (2,), read bilinearly; beyond it the distance to it is added."""
    lo, hi = np.asarray(lo, np.float32), np.asarray(hi, np.float32)
    axes = [np.linspace(a, b, n) for a, b, n in zip(lo, hi, shape, strict=True)]
    grid = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 2)
    values = polygon_distance(grid, polygon).reshape(shape).astype(np.float32)
    step = (hi - lo) / (np.asarray(shape) - 1)

    def read(p):
        inside = np.clip(p, lo, hi)
        d = map_coordinates(values, ((inside - lo) / step).T, order=1, mode="nearest")
        return d + np.linalg.norm(p - inside, axis=1)

    return read


def lathe(profile: np.ndarray, sides: int = 32) -> Solid:
    """A profile (N,2) of (radius, height) turned about z, with the outside on the right of its way.

    It starts and ends at radius 0 (closed there); a hollow body's profile comes back down on the inside.
    """
    profile = np.asarray(profile, np.float32)
    angle = np.arange(sides) / sides * 2 * np.pi
    ring = np.stack([np.cos(angle), np.sin(angle)], 1)
    v = np.concatenate(
        [profile[:, None, :1] * ring, np.broadcast_to(profile[:, None, 1:], (len(profile), sides, 1))], -1
    )
    v = np.concatenate([v, v[:, :1]], 1).reshape(-1, 3)
    v, f = weld(v, grid_faces(len(profile), sides + 1, True))
    reach = profile[:, 0].max()
    mirrored = np.concatenate([profile, profile[::-1] * np.array([-1, 1], np.float32)])
    read = _table(mirrored, (0, profile[:, 1].min() - 0.01), (reach + 0.01, profile[:, 1].max() + 0.01), shape=(64, 96))
    return Solid(v.astype(np.float32), f, lambda p: read(np.stack([np.hypot(p[:, 0], p[:, 1]), p[:, 2]], 1)))


def extrusion(outline: np.ndarray, thickness: float, layers: int = 1, bevel: float = 0.0, scale: float = 1.0) -> Solid:
    """A simple polygon (N,2), counter-clockwise, drawn out along z by `thickness` about the origin.

    `bevel` narrows both ends (the distance ignores it); `scale` is the size of the top against the bottom.
    """
    import manifold3d

    outline = np.asarray(outline, np.float64)
    if _area(outline) < 0:
        outline = outline[::-1]
    n = len(outline)
    h = thickness / 2
    levels = [(-h, 1.0, 0.0)] + [(-h + thickness * k / layers, 0.0, 0.0) for k in range(1, layers)] + [(h, 1.0, 0.0)]
    if bevel > 0:
        bevel = min(bevel, 0.45 * thickness)
        levels = [(-h, 1.0, bevel), (-h + bevel, 0.0, 0.0), *levels[1:-1], (h - bevel, 0.0, 0.0), (h, 1.0, bevel)]
    rings = []
    for z, _, inset in levels:
        grow = 1 + (scale - 1) * (z + h) / thickness
        at = _inset(outline, inset) if inset else outline
        rings.append(np.concatenate([at * grow, np.full((n, 1), z)], 1))
    v = np.concatenate(rings)
    i = np.arange(n)
    j = np.roll(i, -1)
    faces = []
    for k in range(len(levels) - 1):
        a, b = k * n, (k + 1) * n
        faces += [np.stack([a + i, a + j, b + j], 1), np.stack([a + i, b + j, b + i], 1)]
    cap = np.asarray(manifold3d.triangulate([outline])).astype(np.int64)
    faces += [cap[:, ::-1], cap + (len(levels) - 1) * n]
    lo, hi = outline.min(0), outline.max(0)
    read = _table(outline, lo - 0.01, hi + 0.01, shape=(64, 64))

    def distance(p):
        grow = 1 + (scale - 1) * (np.clip(p[:, 2], -h, h) + h) / thickness
        d = read(p[:, :2] / grow[:, None]) * grow
        q = np.stack([d, np.abs(p[:, 2]) - h], 1)
        return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0)

    return Solid(v.astype(np.float32), np.concatenate(faces), distance)


def _area(p: np.ndarray) -> float:
    q = np.roll(p, -1, 0)
    return float((p[:, 0] * q[:, 1] - p[:, 1] * q[:, 0]).sum() / 2)


def _inset(p: np.ndarray, by: float) -> np.ndarray:
    """Each vertex of a counter-clockwise polygon moved inwards along the mean of its edges' normals."""
    e = np.roll(p, -1, 0) - p
    normal = np.stack([-e[:, 1], e[:, 0]], 1)
    normal /= np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-12)
    mean = normal + np.roll(normal, 1, 0)
    return p + by * mean / np.maximum(np.linalg.norm(mean, axis=1, keepdims=True), 1e-12)


def tube(spine: np.ndarray, radius: np.ndarray | float, sides: int = 10, flat: float = 1.0) -> Solid:
    """A round tube along a smooth curve (N,3), of radius (N,) or one; closed ends. `flat` scales it across the curve's
    own plane (the distance is then to first order)."""
    spine = np.asarray(spine, np.float32)
    n = len(spine)
    r = np.broadcast_to(np.asarray(radius, np.float32), (n,))
    along = np.gradient(spine, axis=0)
    along /= np.linalg.norm(along, axis=1, keepdims=True)
    start = np.eye(3)[np.abs(along[0]).argmin()]
    u = np.empty((n, 3))
    for k in range(n):  # parallel transport
        start = start - (start @ along[k]) * along[k]
        start = start / np.linalg.norm(start)
        u[k] = start
    w = np.cross(along, u)
    angle = np.arange(sides + 1) / sides * 2 * np.pi
    c, s = np.cos(angle)[None, :, None], np.sin(angle)[None, :, None]
    rings = spine[:, None] + r[:, None, None] * (c * u[:, None] + s * w[:, None])
    first = np.repeat((spine[0] - 0.6 * r[0] * along[0])[None, None], sides + 1, 1)
    last = np.repeat((spine[-1] + 0.6 * r[-1] * along[-1])[None, None], sides + 1, 1)
    v = np.concatenate([first, rings, last]).reshape(-1, 3)
    v, f = weld(v, grid_faces(n + 2, sides + 1, True), 1e-7)
    squash = np.array([1, 1, 1], np.float32)
    if flat != 1.0:
        squash[int(np.ptp(spine, axis=0).argmin())] = flat
    centre = spine.mean(0)
    v = (v - centre) * squash + centre

    def distance(p):
        p = ((p - centre) / squash + centre).astype(np.float32)
        best = np.full(len(p), np.inf, np.float32)
        for a, b, ra, rb in zip(spine[:-1], spine[1:], r[:-1], r[1:], strict=True):
            e = b - a
            t = np.clip((p - a) @ e / max(float(e @ e), 1e-12), 0, 1)
            q = p - a - t[:, None] * e
            best = np.minimum(best, np.sqrt(np.einsum("ij,ij->i", q, q)) - (ra + (rb - ra) * t))
        return best * min(1.0, flat)

    return Solid(v.astype(np.float32), f, distance)


def sphere_lattice(cells: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Unit directions (V,3) and faces of a cube's lattice blown up to a sphere."""
    v, f = _cube_lattice([np.tan(np.linspace(-np.pi / 4, np.pi / 4, cells + 1))] * 3)
    return v / np.linalg.norm(v, axis=1, keepdims=True), f


def implicit(vertices: np.ndarray, faces: np.ndarray, value: Distance) -> Solid:
    """A solid whose distance is value / |gradient of value|, by central differences."""

    def distance(p):
        h = np.float32(5e-4)
        at = np.concatenate([p, *(p + s * h * np.eye(3, dtype=np.float32)[k] for k in range(3) for s in (1, -1))])
        f = value(at).reshape(7, -1)
        gradient = np.stack([f[1 + 2 * k] - f[2 + 2 * k] for k in range(3)]) / (2 * h)
        return f[0] / np.maximum(np.linalg.norm(gradient, axis=0), 0.3)

    return Solid(vertices.astype(np.float32), faces, distance)


def superquadric(size, e1: float, e2: float, cells: int = 12) -> Solid:
    """Superellipsoid of full `size` (3,): exponents e1 (towards the poles) and e2 (around); 1 is round, 0.2 boxy."""
    half = np.asarray(size, np.float32) / 2
    d, f = sphere_lattice(cells)

    def radial(p):  # 1 on the surface, of degree 1
        q = np.maximum(np.abs(p / half), 1e-6)
        return ((q[:, 0] ** (2 / e2) + q[:, 1] ** (2 / e2)) ** (e2 / e1) + q[:, 2] ** (2 / e1)) ** (e1 / 2)

    d = d * half
    v = d / radial(d)[:, None]
    return implicit(v, f, lambda p: (radial(p) - 1) * half.min())


def ellipsoid(size, cells: int = 10) -> Solid:
    return superquadric(size, 1.0, 1.0, cells)


def blob(size, rng: np.random.Generator, roughness: float = 0.2, waves: int = 5, cells: int = 13) -> Solid:
    """An ellipsoid of full `size` whose radius is swelled by a few plane waves on the sphere, by about `roughness`."""
    half = np.asarray(size, np.float32) / 2
    k = rng.normal(size=(waves, 3)).astype(np.float32) * rng.uniform(1.0, 3.2, (waves, 1)).astype(np.float32)
    phase, gain = rng.uniform(0, 6.28, waves), rng.normal(size=waves) * roughness / np.sqrt(waves)
    d, f = sphere_lattice(cells)

    def swell(u):
        return (1 + np.clip((np.sin(u @ k.T + phase) * gain).sum(1), -0.6, 0.8)).astype(np.float32)

    def value(p):
        q = p / half
        n = np.maximum(np.linalg.norm(q, axis=1), 1e-6)
        return (n - swell(q / n[:, None])) * half.min()

    return implicit(d * swell(d)[:, None] * half, f, value)


def split_creases(
    vertices: np.ndarray, faces: np.ndarray, degrees: float = 38.0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Vertices doubled along edges sharper than `degrees`, so that smooth normals keep them sharp.

    Returns vertices (V',3), faces (T,3) and, for each new vertex, the old one.
    """
    t = len(faces)
    normal = np.cross(vertices[faces[:, 1]] - vertices[faces[:, 0]], vertices[faces[:, 2]] - vertices[faces[:, 0]])
    normal = normal / np.maximum(np.linalg.norm(normal, axis=1, keepdims=True), 1e-20)
    corner = np.arange(3 * t).reshape(t, 3)
    start, end = faces.ravel(), np.roll(faces, -1, 1).ravel()
    c_start, c_end = corner.ravel(), np.roll(corner, -1, 1).ravel()
    n = len(vertices)
    key, reverse = start * n + end, end * n + start
    order = key.argsort()
    at = np.searchsorted(key[order], reverse).clip(0, len(key) - 1)
    other = order[at]
    paired = key[other] == reverse
    smooth = (normal[np.arange(3 * t) // 3] * normal[other // 3]).sum(1) > np.cos(np.radians(degrees))
    use = paired & smooth
    a = np.concatenate([c_start[use], c_end[use]])
    b = np.concatenate([c_end[other[use]], c_start[other[use]]])
    groups, label = connected_components(coo_matrix((np.ones(len(a)), (a, b)), (3 * t, 3 * t)), directed=False)
    old = np.zeros(groups, np.int64)
    old[label] = faces.ravel()
    return vertices[old], label.reshape(t, 3).astype(np.int64), old
