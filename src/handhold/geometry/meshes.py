"""Triangle meshes as two tensors, vertices (V,3) and faces (T,3): areas, normals, volume, sampling, closest points.

Faces wind counter-clockwise seen from outside. Everything is differentiable in the vertices; choices of index (which
triangle is closest, which triangle is sampled) are not.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..kernels import _lib
from ..kernels.bvh import TriangleTree


def corners(vertices: Tensor, faces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The three corner points of each triangle, each (*B,T,3), from vertices (*B,V,3)."""
    return vertices[..., faces[:, 0], :], vertices[..., faces[:, 1], :], vertices[..., faces[:, 2], :]


def face_cross(vertices: Tensor, faces: Tensor) -> Tensor:
    """(*B,T,3) outward normals, twice the triangle's area long."""
    a, b, c = corners(vertices, faces)
    return torch.linalg.cross(b - a, c - a)


def face_areas(vertices: Tensor, faces: Tensor) -> Tensor:
    """(*B,T) areas."""
    return 0.5 * face_cross(vertices, faces).norm(dim=-1)


def face_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """(*B,T,3) unit outward normals; zero on degenerate triangles."""
    return torch.nn.functional.normalize(face_cross(vertices, faces), dim=-1)


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """(*B,V,3) unit normals, the area-weighted mean of the triangles around each vertex, zero where there are none.

    faces (T,3), or (B,T,3) when each of the meshes (B,V,3) has its own."""
    if faces.ndim == 3:
        b, t, _ = faces.shape
        at = faces.reshape(b, -1, 1).expand(-1, -1, 3)
        p, q, r = vertices.gather(1, at).reshape(b, t, 3, 3).unbind(2)
        n = torch.linalg.cross(q - p, r - p).repeat_interleave(3, 1)
        return torch.nn.functional.normalize(torch.zeros_like(vertices).scatter_add_(1, at, n), dim=-1)
    n = face_cross(vertices, faces)
    out = torch.zeros_like(vertices)
    for k in range(3):
        out = out.index_add(-2, faces[:, k], n)
    return torch.nn.functional.normalize(out, dim=-1)


def area(vertices: Tensor, faces: Tensor) -> Tensor:
    """(*B) surface area."""
    return face_areas(vertices, faces).sum(-1)


def volume(vertices: Tensor, faces: Tensor) -> Tensor:
    """(*B) signed enclosed volume by the divergence theorem: positive when a watertight mesh's normals point
    outward."""
    a, b, c = corners(vertices, faces)
    return (a * torch.linalg.cross(b, c)).sum((-1, -2)) / 6


def edges(faces: np.ndarray | Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Undirected edges (E,2), sorted, and how many triangles share each (E,)."""
    f = np.asarray(faces)
    e = np.sort(np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]]), 1)
    return np.unique(e, axis=0, return_counts=True)


def is_watertight(faces: np.ndarray | Tensor) -> bool:
    """True when every directed edge occurs once and its reverse occurs once: closed, manifold edges, one
    orientation."""
    f = np.asarray(faces)
    if len(f) == 0:
        return False
    e = np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]]).astype(np.int64)
    n = int(f.max()) + 1
    key, rev = e[:, 0] * n + e[:, 1], e[:, 1] * n + e[:, 0]
    return len(np.unique(key)) == len(key) and bool(np.isin(rev, key).all())


def euler_characteristic(faces: np.ndarray | Tensor) -> int:
    """V - E + F over the vertices in use; 2 for a closed surface without handles."""
    f = np.asarray(faces)
    return len(np.unique(f)) - len(edges(f)[0]) + len(f)


def boundary_loops(faces: np.ndarray | Tensor) -> list[np.ndarray]:
    """Closed rings of vertices along the holes, each in the direction in which the triangles run along it."""
    f = np.asarray(faces).astype(np.int64)
    e = np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
    have = {(int(a), int(b)) for a, b in e}
    after = {a: b for a, b in sorted(have) if (b, a) not in have}
    loops = []
    while after:
        start = next(iter(after))
        ring, v = [], start
        while v in after:
            ring.append(v)
            v = after.pop(v)
        if v == start:
            loops.append(np.asarray(ring))
    return loops


def fill_holes(faces: np.ndarray, n_vertices: int, strips: int = 1) -> tuple[np.ndarray, list[np.ndarray]]:
    """Close every hole with a fan around one new vertex, and `strips` - 1 strips of triangles around that.

    Returns faces (T',3) and the rings; `hole_vertices` says where the new vertices belong.
    """
    rings, fans, start = boundary_loops(faces), [], n_vertices
    for r in rings:
        for _ in range(strips - 1):
            inner = start + np.arange(len(r))
            a, b = np.roll(r, -1), np.roll(inner, -1)
            fans += [np.stack([a, r, inner], 1), np.stack([a, inner, b], 1)]
            start, r = start + len(r), inner
        fans.append(np.stack([np.roll(r, -1), r, np.full(len(r), start)], 1))
        start += 1
    return np.concatenate([np.asarray(faces), *fans]).astype(np.asarray(faces).dtype), rings


def hole_vertices(x: Tensor, rings: list[np.ndarray], strips: int = 1) -> Tensor:
    """Values (N,*C) of the new vertices of `fill_holes`, from those of the others (V,*C): evenly from ring to mean."""
    out = []
    for r in rings:
        outer = x[torch.as_tensor(r, device=x.device)]
        middle = outer.mean(0, keepdim=True)
        out += [torch.lerp(outer, middle, k / strips) for k in range(1, strips)] + [middle]
    return torch.cat(out) if out else x[:0]


def subdivide(faces: np.ndarray, n_vertices: int) -> tuple[np.ndarray, np.ndarray]:
    """Every triangle (T,3) into four by the middles of its edges.

    Returns parents (V',2), of which each new vertex is the middle, and faces (4T,3). The first `n_vertices` vertices
    are the old ones, their own parents twice, so that any values of vertices carry over: the parents' mean.
    """
    f = np.asarray(faces)
    sides = np.sort(np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]]), 1)
    found, which = np.unique(sides, axis=0, return_inverse=True)
    ab, bc, ca = (n_vertices + which.reshape(3, -1)).astype(f.dtype)
    a, b, c = f.T
    finer = np.concatenate([np.stack(x, 1) for x in ((a, ab, ca), (b, bc, ab), (c, ca, bc), (ab, bc, ca))])
    return np.concatenate([np.arange(n_vertices)[:, None].repeat(2, 1), found]), finer


def sample_surface(
    vertices: Tensor, faces: Tensor, count: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`count` points, uniform by area: points (count,3), their face (count,), barycentric weights (count,3)."""
    p = face_areas(vertices.detach(), faces)
    face = torch.multinomial(p.double() / p.sum(), count, replacement=True, generator=generator)
    u = torch.rand(count, 2, generator=generator, dtype=vertices.dtype, device=vertices.device)
    r = u[:, 0].sqrt()
    bary = torch.stack([1 - r, r * (1 - u[:, 1]), r * u[:, 1]], -1)
    return interpolate(vertices, faces, face, bary), face, bary


def interpolate(values: Tensor, faces: Tensor, face: Tensor, bary: Tensor) -> Tensor:
    """Per-vertex values (V,C) at face indices (*N) and barycentric weights (*N,3) -> (*N,C)."""
    return (values[faces[face]] * bary[..., None]).sum(-2)


def closest_on_triangles(p: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Barycentric weights (*N,3) of the point of triangle (a,b,c) that is closest to p; all (*N,3). Degenerate-safe."""
    tiny = torch.finfo(p.dtype).tiny

    def along(o: Tensor, e: Tensor) -> Tensor:
        return (((p - o) * e).sum(-1) / (e * e).sum(-1).clamp_min(tiny)).clamp(0, 1)

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-1)

    ab, ac, bc = b - a, c - a, c - b
    d00, d01, d11 = dot(ab, ab), dot(ab, ac), dot(ac, ac)
    d20, d21 = dot(p - a, ab), dot(p - a, ac)
    den = d00 * d11 - d01 * d01
    flat = den <= 1e-12 * d00 * d11
    den = torch.where(flat, torch.ones_like(den), den)
    v, w = (d11 * d20 - d01 * d21) / den, (d00 * d21 - d01 * d20) / den
    inside = (v >= 0) & (w >= 0) & (v + w <= 1) & ~flat
    zero = torch.zeros_like(v)
    s, t, u = along(a, ab), along(a, ac), along(b, bc)
    options = torch.stack(
        [torch.stack([1 - s, s, zero], -1), torch.stack([1 - t, zero, t], -1), torch.stack([zero, 1 - u, u], -1)], -2
    )
    at = options @ torch.stack([a, b, c], -2)
    best = (at - p[..., None, :]).square().sum(-1).argmin(-1)
    on_edge = options.gather(-2, best[..., None, None].expand(*best.shape, 1, 3)).squeeze(-2)
    return torch.where(inside[..., None], torch.stack([1 - v - w, v, w], -1), on_edge)


class Closest(NamedTuple):
    """Result of `closest_point`, one row per query."""

    points: Tensor  # (N,3) on the surface
    face: Tensor  # (N,) int
    bary: Tensor  # (N,3)
    distance: Tensor  # (N,) unsigned


@torch.no_grad()
def closest_point(
    query: Tensor, vertices: Tensor, faces: Tensor, chunk: int = 2048, backend: str | None = None
) -> Closest:
    """Exact closest surface point of each query (N,3) on the mesh (V,3), (T,3); `queries.MeshQueries` keeps the tree.

    On the CPU by a tree over the triangles, where the compiled kernels are available (backend "cpu"). Else, and on
    other devices (backend "torch"): triangles are tried in the order of a lower bound, the distance to their bounding
    sphere. A query is settled when the best distance found is below the bound of the next triangle; the few that are
    not are tried against more of them.
    """
    if query.device.type == "cpu" and _lib.resolve_backend(backend) == "cpu":
        face, bary, d2 = TriangleTree(vertices.detach().numpy(), faces.numpy()).closest(query.detach().numpy())
        face, bary = torch.from_numpy(face), torch.from_numpy(bary).to(query.dtype)
        return Closest(
            interpolate(vertices, faces, face, bary), face, bary, torch.from_numpy(d2).sqrt().to(query.dtype)
        )
    a, b, c = corners(vertices, faces)
    centre = (a + b + c) / 3
    radius = torch.stack([(x - centre).norm(dim=-1) for x in (a, b, c)]).amax(0)
    tri = torch.stack([a, b, c], -2)
    n, t = len(query), len(faces)
    face = torch.zeros(n, dtype=torch.long, device=query.device)
    bary, distance = query.new_zeros(n, 3), query.new_full((n,), float("inf"))
    left = torch.arange(n, device=query.device)
    for k in (8, 32, 128, 512, t):
        k, open_ = min(k, t), []
        for rows in left.split(max(1, min(chunk, 1_000_000 // k))):
            p = query[rows]
            bound = torch.cdist(p, centre, compute_mode="donot_use_mm_for_euclid_dist") - radius
            low, ids = bound.topk(min(k + 1, t), largest=False)
            if k == t:
                settled = torch.ones_like(rows, dtype=torch.bool)
            ids = ids[:, :k]
            corner = tri[ids]
            w = closest_on_triangles(p[:, None].expand(-1, k, -1), *corner.unbind(-2))
            d, i = ((w[..., None] * corner).sum(-2) - p[:, None]).norm(dim=-1).min(-1)
            at = torch.arange(len(rows), device=p.device)
            face[rows], bary[rows], distance[rows] = ids[at, i], w[at, i], d
            if k < t:
                settled = d <= low[:, -1]
            open_.append(rows[~settled])
        left = torch.cat(open_) if open_ else left[:0]
        if not len(left):
            break
    return Closest(interpolate(vertices, faces, face, bary), face, bary, distance)
