"""Point sets without correspondence: samples of a surface, nearest neighbours, similarity fits and ICP.

Arrays in, arrays out (numpy and scipy alone); points are (N,3), in any one unit. A similarity is (s, R, t) and takes x
to s R x + t.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.spatial import cKDTree
from scipy.spatial.transform import Rotation

Similarity = tuple[float, np.ndarray, np.ndarray]


class SurfaceSamples(NamedTuple):
    """Points drawn from a mesh."""

    points: np.ndarray  # (N,3)
    face: np.ndarray  # (N,) int
    bary: np.ndarray  # (N,3)


def sample_surface(vertices: np.ndarray, faces: np.ndarray, count: int, seed: int = 0) -> SurfaceSamples:
    """`count` points drawn uniformly by area from triangles (T,3) of vertices (V,3). Same seed, same points.

    Raises ValueError when the mesh has no finite area.
    """
    rng = np.random.default_rng(seed)
    faces = np.asarray(faces)
    a, b, c = (np.asarray(vertices, float)[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1)
    if not np.isfinite(area).all() or area.sum() <= 0:
        raise ValueError("the mesh has no finite surface to sample")
    edges = np.cumsum(area)
    face = np.minimum(np.searchsorted(edges, rng.random(count) * edges[-1], side="right"), len(faces) - 1)
    u, v = rng.random((2, count, 1))
    flip = u + v > 1  # fold the unit square onto the triangle
    u, v = np.where(flip, 1 - u, u), np.where(flip, 1 - v, v)
    points = a[face] + u * (b[face] - a[face]) + v * (c[face] - a[face])
    return SurfaceSamples(points, face, np.concatenate([1 - u - v, u, v], 1))


def nearest(points: np.ndarray, others: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Distances from each of `points` (N,3) to `others` (M,3), and back: (N,), (M,)."""
    return query(cKDTree(others), points)[0], query(cKDTree(points), others)[0]


def query(tree: cKDTree, points: np.ndarray, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Distances and indices of the k nearest points of a tree: (N,) each for k = 1, else (N,k)."""
    # threads cost more than they save on a few thousand points
    return tree.query(points, k=k, workers=-1 if len(points) > 10_000 else 1)


def chamfer(points: np.ndarray, others: np.ndarray) -> float:
    """Mean squared nearest distance, both directions summed, in the unit of the points squared."""
    there, back = nearest(points, others)
    return float((there**2).mean() + (back**2).mean())


def transform(similarity: Similarity, points: np.ndarray) -> np.ndarray:
    """s R x + t for points (N,3)."""
    s, rotation, t = similarity
    return s * (points @ rotation.T) + t


def umeyama(source: np.ndarray, target: np.ndarray, scale: bool = True) -> Similarity:
    """Least-squares similarity (s, R, t) with s R x + t closest to the target; source, target (N,3) in correspondence.

    Umeyama, "Least-squares estimation of transformation parameters between two point patterns", PAMI 1991, eq. 40-42.
    """
    mean_source, mean_target = source.mean(0), target.mean(0)
    x, y = source - mean_source, target - mean_target
    u, d, vt = np.linalg.svd(y.T @ x)
    sign = np.array([1.0, 1.0, 1.0 if np.linalg.det(u) * np.linalg.det(vt) > 0 else -1.0])
    rotation = (u * sign) @ vt
    spread = np.einsum("ij,ij->", x, x)
    s = float((d * sign).sum() / spread) if scale and spread > 0 else 1.0
    return s, rotation, mean_target - s * rotation @ mean_source


class Registration(NamedTuple):
    """Result of `icp`."""

    similarity: Similarity  # target from source
    error: float  # chamfer of the moved source and the target, unit squared
    iterations: int


def icp(
    source: np.ndarray,
    target: np.ndarray,
    start: Similarity | None = None,
    *,
    normals: np.ndarray | None = None,
    scale: bool = True,
    scale_limits: tuple[float, float] = (0.2, 5.0),
    trim: float = 0.9,
    iterations: int = 40,
    tolerance: float = 1e-6,
    tree: cKDTree | None = None,
) -> Registration:
    """Trimmed iterative closest point of source (N,3) onto target (M,3), from one start (the identity by default).

    Each step pairs every moved source point with its nearest target point, keeps the share `trim` of the closest pairs
    and solves for the similarity: point to point (Besl & McKay, PAMI 1992; Umeyama's scale), or with the target's unit
    normals (M,3) point to plane (Chen & Medioni 1992, linearised; faster along smooth surfaces, needs a start nearer
    by). The scale stays within scale_limits; stops when no number of the similarity moves by `tolerance`. tree: one of
    the target, when it is asked often. Deterministic.
    """
    source, target = _points(source, "source"), _points(target, "target")
    if not 0 < trim <= 1:
        raise ValueError(f"trim is a share in (0, 1], not {trim}")
    if normals is not None and np.shape(normals) != target.shape:
        raise ValueError(f"normals {np.shape(normals)} are not those of the target {target.shape}")
    tree = cKDTree(target) if tree is None else tree
    similarity = (1.0, np.eye(3), np.zeros(3)) if start is None else start
    done = 0
    for done in range(1, iterations + 1):  # noqa: B007
        moved = transform(similarity, source)
        distance, match = query(tree, moved)
        keep = distance <= np.quantile(distance, trim)
        if normals is None:
            s, rotation, t = umeyama(source[keep], target[match[keep]], scale)
        else:
            s, rotation, t = _plane_step(similarity, moved[keep], target[match[keep]], normals[match[keep]], scale)
        limited = float(np.clip(s, *scale_limits))
        t = t + (s - limited) * rotation @ source[keep].mean(0)  # the middle stays where the full scale would put it
        before, similarity = similarity, (limited, rotation, t)
        if all(np.abs(x - y).max() < tolerance for x, y in zip(before, similarity, strict=True)):
            break
    return Registration(similarity, chamfer(transform(similarity, source), target), done)


def _plane_step(similarity: Similarity, moved, target, normals, scale: bool) -> Similarity:
    """One Gauss-Newton step of the distances to the targets' planes, in rotation, shift and log scale."""
    middle = moved.mean(0)
    x = moved - middle
    columns = [np.cross(x, normals), normals] + ([(x * normals).sum(1, keepdims=True)] if scale else [])
    jacobian = np.concatenate(columns, 1)
    residual = ((target - moved) * normals).sum(1)
    size = np.sqrt((x**2).sum(1).mean()) or 1.0  # so that turning and shifting are alike to the damping
    unit = np.concatenate([np.full(3, size), np.ones(3), np.full(jacobian.shape[1] - 6, size)])
    jacobian = jacobian / unit
    normal_matrix = jacobian.T @ jacobian
    damping = 1e-9 * np.trace(normal_matrix) + 1e-300  # a sphere may turn: leave it
    step = np.linalg.solve(normal_matrix + damping * np.eye(len(normal_matrix)), jacobian.T @ residual) / unit
    turn, factor = Rotation.from_rotvec(step[:3]).as_matrix(), float(np.exp(step[6])) if scale else 1.0
    s, rotation, t = similarity
    return s * factor, turn @ rotation, factor * turn @ (t - middle) + middle + step[3:6]


def align(
    source: np.ndarray,
    target: np.ndarray,
    starts: int = 96,
    scale: bool = True,
    points: tuple[int, int] = (1500, 8000),
    *,
    normals: np.ndarray | None = None,
    seed: int = 0,
) -> Registration:
    """The similarity that takes one surface sample onto another, without correspondence or a start.

    `icp` from the identity and `starts` random rotations on points[0] of the points, each set centred on the other and
    scaled to its spread, then the best four again on points[1]; with the target's normals, those once more point to
    plane. source (N,3), target (M,3); scale is held within 0.2 to 5. The result is the best of all starts.
    Deterministic for a seed.
    """
    source, target = _points(source, "source"), _points(target, "target")
    rng = np.random.default_rng(seed)

    def thin(x: np.ndarray, count: int) -> np.ndarray:
        return rng.permutation(len(x))[:count]

    a, b = (x[thin(x, points[0])] for x in (source, target))
    tree = cKDTree(b)
    size = np.sqrt(((b - b.mean(0)) ** 2).mean() / max(((a - a.mean(0)) ** 2).mean(), 1e-30)) if scale else 1.0
    rotations = np.concatenate([np.eye(3)[None], Rotation.random(starts, random_state=seed + 1).as_matrix()])
    guesses = [(size, r, b.mean(0) - size * r @ a.mean(0)) for r in rotations]
    found = (icp(a, b, g, scale=scale, iterations=12, tree=tree) for g in guesses)
    coarse = sorted(found, key=lambda r: r.error)[:4]
    a = source[thin(source, points[1])]
    chosen = thin(target, points[1])
    b = target[chosen]
    tree = cKDTree(b)
    fine = [icp(a, b, r.similarity, scale=scale, tree=tree) for r in coarse]
    if normals is not None:
        n = np.asarray(normals, float)[chosen]
        fine += [icp(a, b, r.similarity, scale=scale, normals=n, tree=tree) for r in fine]
    return min(fine, key=lambda r: r.error)


def _points(x: np.ndarray, name: str) -> np.ndarray:
    x = np.asarray(x, float)
    if x.ndim != 2 or x.shape[1] != 3 or len(x) < 3:
        raise ValueError(f"{name} is three points (N,3) or more, not {x.shape}")
    if not np.isfinite(x).all():
        raise ValueError(f"{name} has points that are not finite")
    return x
