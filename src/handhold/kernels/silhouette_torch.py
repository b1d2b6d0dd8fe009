"""Torch twin of `silhouette`: the specification of `csrc/silhouette*`, and the path without a compiler."""

from __future__ import annotations

import torch
from torch import Tensor

TILE = 16
TIE = 1e-6  # pixels


def contour_edges(cam: Tensor, faces: Tensor, body: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Edges whose triangles all lie on one side of them as the camera sees it: vertices (E,2) with the lower index
    first, body (E,), and the side (E,), the sign of (v_a x v_b) . v for points v on it.

    Border edges are among them, and the edges where a surface turns away. Triangles seen edge-on are ignored.
    """
    if not len(faces):
        return faces.new_zeros(0, 2), body, cam.new_zeros(0)
    half = torch.cat([faces[:, [1, 2, 0]], faces[:, [2, 0, 1]], faces])  # a, b, opposite vertex
    half_body = body.repeat(3)
    a, b = torch.minimum(half[:, 0], half[:, 1]), torch.maximum(half[:, 0], half[:, 1])
    va, vb, opposite = cam[a], cam[b], cam[half[:, 2]]
    n = torch.linalg.cross(va, vb - va)
    volume = (n * opposite).sum(-1)
    size = va.abs().sum(-1) * (vb - va).abs().sum(-1) * (opposite - va).abs().sum(-1)
    side = torch.where(volume.abs() > 1e-14 * size, torch.sign(volume), torch.zeros_like(volume))
    key, group = torch.unique(torch.stack([half_body, a, b], -1), dim=0, return_inverse=True)
    least = torch.full((len(key),), 2.0, dtype=cam.dtype, device=cam.device)
    least = least.scatter_reduce(0, group, torch.where(side == 0, 2.0, side), "amin")
    most = torch.full((len(key),), -2.0, dtype=cam.dtype, device=cam.device)
    most = most.scatter_reduce(0, group, torch.where(side == 0, -2.0, side), "amax")
    keep = least == most
    return key[keep][:, 1:], key[keep][:, 0], least[keep]


def coverage(cam, faces, K, label, depth, body, n_ids, near):
    """See `handhold.kernels.silhouette.coverage`."""
    height, width = label.shape
    dtype, cam = cam.dtype, cam.double()
    K = K.to(cam.device).double()
    with torch.no_grad():
        ends, edge_body, side = contour_edges(cam, faces, body)
    change = [cam.new_zeros(height * width * n_ids) for _ in range(2)]
    for axis in range(2):  # 0: crossings between horizontal neighbours, 1: between vertical ones
        a, b, line, p, q = _crossings(cam, K, ends, edge_body, side, label, depth, near, axis)
        x = _where(cam, K, a, b, line, axis)
        alpha = _alpha(x, p, q, width, axis)
        mine, other = label.reshape(-1)[p], label.reshape(-1)[q]
        for at, amount in ((p, (0.5 - alpha).clamp(0, 0.5)), (q, (alpha - 0.5).clamp(0, 0.5))):
            change[axis] = change[axis].index_add(0, at * n_ids + mine, amount)
            known = other >= 0
            change[axis] = change[axis].index_add(0, (at * n_ids + other)[known], amount[known])
    keep = (1 - change[0]) * (1 - change[1])
    own = (label.reshape(-1, 1) == torch.arange(n_ids, device=label.device)).reshape(-1)
    return torch.where(own, keep, 1 - keep).reshape(height, width, n_ids).to(dtype)


def _where(cam: Tensor, K: Tensor, a: Tensor, b: Tensor, line: Tensor, axis: int) -> Tensor:
    """Pixel position along `axis` at which the edge a-b meets the centre line of a row (axis 0) or column (axis 1)."""
    n = torch.linalg.cross(cam[a], cam[b] - cam[a])
    across = 1 - axis
    r = (line.double() + 0.5 - K[across, 2]) / K[across, across]
    return -(n[:, across] * r + n[:, 2]) / n[:, axis] * K[axis, axis] + K[axis, 2]


def _alpha(x: Tensor, p: Tensor, q: Tensor, width: int, axis: int) -> Tensor:
    """How far x is from the centre of pixel p (0) to that of its neighbour q (1)."""
    centre = (p % width if axis == 0 else torch.div(p, width, rounding_mode="floor")).double() + 0.5
    return torch.where(p < q, x - centre, centre - x)


@torch.no_grad()
def _crossings(cam, K, ends, edge_body, side, label, depth, near, axis):
    """The contour crossing of each pair of neighbouring pixels that tells them apart, if any."""
    height, width = label.shape
    across, lines, length = 1 - axis, (height, width)[axis], (width, height)[axis]
    if length < 2:
        ends, edge_body, side = ends[:0], edge_body[:0], side[:0]
    va, vb = cam[ends[:, 0]], cam[ends[:, 1]]
    n = torch.linalg.cross(va, vb - va)
    slope = n[:, :2].abs() / torch.stack([K[0, 0], K[1, 1]])
    # An edge is measured along the axis it runs across: along both, it would count twice.
    steep = slope[:, 0] >= slope[:, 1] if axis == 0 else slope[:, 0] < slope[:, 1]
    r = (torch.arange(lines, device=cam.device).double() + 0.5 - K[across, 2]) / K[across, across]
    fa, fb = va[:, None, across] - r * va[:, 2:], vb[:, None, across] - r * vb[:, 2:]
    e, line = torch.nonzero(((fa >= 0) != (fb >= 0)) & steep[:, None], as_tuple=True)
    s = fa[e, line] / (fa[e, line] - fb[e, line])
    ahead = va[e, 2] + s * (vb[e, 2] - va[e, 2]) > near
    e, line = e[ahead], line[ahead]
    x = _where(cam, K, ends[e, 0], ends[e, 1], line, axis)
    first = torch.floor(x - 0.5)
    u = x - 0.5 - first
    # Within rounding of a pixel centre, that pixel may count as inside or outside: the other pair may be told apart.
    second = first + (u > 1 - TIE).double() - (u < TIE).double()
    inside_first = side[e] * n[e, axis] < 0
    ok = torch.zeros_like(e, dtype=torch.bool)
    p, q = torch.zeros_like(e), torch.zeros_like(e)
    for start in (first, second):
        at = start.clamp(0, length - 2).long()
        low = line * width + at if axis == 0 else at * width + line
        high = low + (1 if axis == 0 else width)
        i, o = torch.where(inside_first, low, high), torch.where(inside_first, high, low)
        mine, other, z = label.reshape(-1)[i], label.reshape(-1)[o], depth.reshape(-1)
        here = (mine == edge_body[e]) & (other != mine) & ((other < 0) | (z[i] < z[o])) & (start == at.double()) & ~ok
        p, q, ok = torch.where(here, i, p), torch.where(here, o, q), ok | here
    e, line, x, p, q = (t[ok] for t in (e, line, x, p, q))
    alpha, low = _alpha(x, p, q, width, axis), torch.minimum(p, q)
    # The outermost of several, which is the lowest edge among equals.
    order = torch.argsort(-alpha, stable=True)
    order = order[torch.argsort(low[order], stable=True)]
    new = torch.ones(len(order), dtype=torch.bool, device=cam.device)
    new[1:] = low[order][1:] != low[order][:-1]
    k = order[new]
    return ends[e[k], 0], ends[e[k], 1], line[k], p[k], q[k]


def occupancy(cam, faces, K, width, height, sigma, reach, near):
    """See `handhold.kernels.silhouette.occupancy`."""
    dtype, cam = cam.dtype, cam.double()
    K = K.to(cam.device).double()
    faces = faces[(cam.detach()[:, 2] >= near)[faces].all(1)]
    z = torch.where(cam[:, 2:] >= near, cam[:, 2:], torch.ones_like(cam[:, 2:]))
    a = (cam[:, :2] / z * torch.stack([K[0, 0], K[1, 1]]) + K[:2, 2])[faces]  # (T,3,2)
    e = a.roll(-1, 1) - a
    square = (e * e).sum(-1)
    with torch.no_grad():
        lo, hi = a.amin(1) - reach, a.amax(1) + reach
    rows = []
    for y in range(0, height, TILE):
        h, row = min(TILE, height - y), []
        for x in range(0, width, TILE):
            w = min(TILE, width - x)
            near_tile = (hi >= a.new_tensor([x, y])) & (lo <= a.new_tensor([x + w, y + h]))
            i = torch.nonzero(near_tile.all(-1))[:, 0]
            py, px = torch.meshgrid(torch.arange(h).to(a) + y + 0.5, torch.arange(w).to(a) + x + 0.5, indexing="ij")
            d = torch.stack([px, py], -1).reshape(-1, 1, 1, 2) - a[i]  # (pixels, triangles, edges, 2)
            t = (d * e[i]).sum(-1) / torch.where(square > 1e-20, square, torch.ones_like(square))[i]
            d2 = (d - t.clamp(0, 1)[..., None] * e[i]).square().sum(-1).amin(-1)
            side = e[i][..., 0] * d[..., 1] - e[i][..., 1] * d[..., 0]
            inside = (side > 0).all(-1) | (side < 0).all(-1)
            s = torch.where(inside, d2, -d2) / sigma**2
            log_miss = torch.where(inside | (d2 < reach**2), -torch.nn.functional.softplus(s), torch.zeros_like(s))
            row.append(-torch.expm1(log_miss.sum(1)).reshape(h, w))
        rows.append(torch.cat(row, 1))
    return torch.cat(rows, 0).to(dtype)
