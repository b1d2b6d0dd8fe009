"""What the frames say about a surface: which parts were seen, in which colour, and what becomes of the rest."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import torch
from scipy import sparse
from scipy.sparse.linalg import splu

from ..geometry import meshes
from ..kernels.raster import depth_image
from ..scene import Mesh


def observe(
    mesh: Mesh,
    frames: np.ndarray,
    inside: np.ndarray,
    K: np.ndarray,
    cam_from_object: np.ndarray,
    weight: np.ndarray,
    tolerance: float,
    min_views: int = 2,
) -> Mesh:
    """Vertex colours as the weighted median-like mean over the frames that see each vertex, and `observed`.

    A frame sees a vertex when it is in front (within `tolerance`, in mesh units), faces the camera and lies inside the
    object's mask. Colours of unseen vertices spread from their neighbours.
    """
    v, f = mesh.vertices.astype(np.float64), mesh.faces
    normals = vertex_normals(v, f)
    height, width = frames.shape[1:3]
    total, count, views = np.zeros((len(v), 3)), np.zeros(len(v)), np.zeros(len(v), int)
    samples = []
    for i in np.flatnonzero(np.isfinite(cam_from_object[:, 0, 0]) & (weight > 0)):
        r, t = cam_from_object[i, :3, :3], cam_from_object[i, :3, 3]
        c = v @ r.T + t
        if (c[:, 2] < 1e-3).any():
            continue
        depth = depth_image(c, f, K, width, height)
        px = (c[:, :2] / c[:, 2:] * K[[0, 1], [0, 1]] + K[:2, 2]).astype(np.float32)
        at = np.floor(px).astype(int)
        ok = (at >= 0).all(1) & (at[:, 0] < width) & (at[:, 1] < height)
        at = np.clip(at, 0, [width - 1, height - 1])
        solid = cv2.erode(inside[i].astype(np.uint8), np.ones((3, 3), np.uint8)) > 0
        facing = -np.einsum("ij,ij->i", normals @ r.T, c / np.linalg.norm(c, axis=1, keepdims=True))
        front = c[:, 2] < depth[at[:, 1], at[:, 0]] + tolerance
        ok &= solid[at[:, 1], at[:, 0]] & (facing > 0.2) & front
        k = np.flatnonzero(ok)
        if not len(k):
            continue
        color = frames[i][at[k, 1], at[k, 0]]
        if len(k) < 32000:  # as many as remap takes in one row
            color = cv2.remap(frames[i], px[None, k, 0] - 0.5, px[None, k, 1] - 0.5, cv2.INTER_LINEAR)[0]
        w = weight[i] * facing[k] ** 2
        samples.append((k, color.astype(np.float64) / 255.0, w))
        total[k] += w[:, None] * samples[-1][1]
        count[k] += w
        views[k] += 1
    mean = total / np.maximum(count, 1e-9)[:, None]
    # once more without what disagrees with the mean: a finger's edge, a highlight
    total[:], count[:] = 0, 1e-9
    for k, color, w in samples:
        w = w * np.exp(-0.5 * (np.abs(color - mean[k]).max(1) / 0.12) ** 2) + 1e-6 * w
        total[k] += w[:, None] * color
        count[k] += w
    observed = views >= min_views
    colors = total / count[:, None]
    if observed.any() and not observed.all():
        colors = spread(colors, observed, f)
    return replace(mesh, colors=np.clip(colors, 0, 1).astype(np.float32), observed=observed)


def vertex_normals(v: np.ndarray, f: np.ndarray) -> np.ndarray:
    """(V,3) unit normals, area weighted; `geometry.meshes.vertex_normals` for arrays."""
    return meshes.vertex_normals(torch.from_numpy(v), torch.from_numpy(f.astype(np.int64))).numpy()


def graph_laplacian(f: np.ndarray, count: int) -> sparse.csr_matrix:
    """(V,V) I - D^-1 A of the mesh's edges."""
    e = np.unique(np.sort(np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]]), 1), axis=0)
    a = sparse.coo_matrix((np.ones(len(e)), (e[:, 0], e[:, 1])), (count, count)).tocsr()
    a = a + a.T
    degree = np.maximum(np.asarray(a.sum(1)).ravel(), 1)
    return (sparse.identity(count) - sparse.diags(1 / degree) @ a).tocsr()


def spread(values: np.ndarray, known: np.ndarray, f: np.ndarray) -> np.ndarray:
    """Harmonic fill of per-vertex values (V,D) over the vertices that are not `known`."""
    lap = graph_laplacian(f, len(values))
    free = np.flatnonzero(~known)
    a = lap[free][:, free] + 1e-8 * sparse.identity(len(free))
    b = -lap[free][:, np.flatnonzero(known)] @ values[known]
    out = values.copy()
    out[free] = splu(a.tocsc()).solve(np.asarray(b))
    return out


def fair_hidden(mesh: Mesh, rings: int = 3, hold: float = 1e-6, known: np.ndarray | None = None) -> Mesh:
    """Surface no frame has seen is bent as little as its seen surroundings allow (bi-Laplacian fairing; Botsch and
    Kobbelt, 2004).

    The last `rings` of seen vertices around it move too: they lean towards whatever hid their neighbours. `hold` keeps
    the system solvable where nothing around is seen. All other vertices stay, and so do those `known` (V,) bool from
    elsewhere.
    """
    if mesh.observed is None or mesh.observed.all() or not mesh.observed.any():
        return mesh
    v = mesh.vertices.astype(np.float64)
    lap = graph_laplacian(mesh.faces, len(v))
    near = (lap != 0).astype(np.int8)
    hidden = ~mesh.observed
    if known is not None:
        hidden &= ~known
        if not hidden.any():
            return mesh
    for _ in range(rings):
        hidden = (near @ hidden.astype(np.int8)) > 0
    if hidden.all():
        return mesh
    energy = (lap.T @ lap).tocsr()
    free, fixed = np.flatnonzero(hidden), np.flatnonzero(~hidden)
    a = energy[free][:, free] + hold * sparse.identity(len(free))
    b = hold * v[free] - energy[free][:, fixed] @ v[fixed]
    v[free] = splu(a.tocsc()).solve(np.asarray(b))
    return replace(mesh, vertices=v.astype(np.float32))
