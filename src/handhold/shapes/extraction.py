"""Triangle meshes out of signed-distance fields: sparse marching cubes, closed at the border, cleaned, coloured.

`extract_surface` asks a field for its values only near its zero set, `extract_grid` has them already; both end in one
call of scikit-image's marching cubes (Lewiner et al., 2003), so that vertices are shared across all of the grid, and
both say what they dropped. From depth images: `handhold.shapes.fusion`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import sparse
from scipy.sparse.csgraph import connected_components
from skimage import measure

from ..errors import StageFailed
from ..geometry.queries import winding_number
from ..scene import Mesh

MAX_CELLS = 640  # along a side: the grid of values is dense in memory, 1 GiB of them at this size
_CORNERS = np.stack(np.meshgrid([0, 1], [0, 1], [0, 1], indexing="ij"), -1).reshape(-1, 3)


@dataclass(frozen=True)
class Report:
    """What it took to extract a surface, and what was dropped from it."""

    nodes: int  # of the whole grid
    evaluations: int  # values asked of the field; 0 for a grid that was given
    pieces_dropped: int = 0
    dropped_share: float = 0.0  # of the volume of all pieces
    cavities_filled: int = 0
    filled_share: float = 0.0  # of the volume after filling
    capped: bool = False  # the solid reached the border of the grid and was closed there

    def notes(self) -> list[str]:
        """In sentences, for a report; what is below 0.1 % of the volume is not worth one."""
        out = []
        if self.dropped_share > 1e-3:
            k = self.pieces_dropped
            out.append(f"dropped {k} loose piece{'s' * (k > 1)}, {100 * self.dropped_share:.1f} % of the volume")
        if self.filled_share > 1e-3:
            k = self.cavities_filled
            out.append(f"filled {k} cavit{'ies' if k > 1 else 'y'}, {100 * self.filled_share:.1f} % of the volume")
        if self.capped:
            out.append("the surface reaches the border of its grid and was closed there")
        return out


def extract_surface(
    sdf: Callable[[torch.Tensor], Any],
    lo: Any,
    hi: Any,
    resolution: int = 128,
    *,
    color: Callable[[torch.Tensor], Any] | None = None,
    lipschitz: float = 1.5,
    keep: int | None = 1,
    fill_cavities: bool = True,
    batch: int = 1 << 18,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> tuple[Mesh, Report]:
    """Watertight mesh of sdf = 0 inside the box [lo, hi], outward faces, in the box's frame and units.

    sdf: points (N,3) of `dtype` on `device` -> (N,) tensor or array, negative inside; called without gradients on at
    most `batch` points. resolution: cells along the box's longest side; the others get as many cubes as cover them, so
    the box may grow by less than a cell. color: points (N,3) -> (N,3) in [0,1], asked at the vertices. keep: how many
    pieces, by volume (None: all); cavities are filled unless told otherwise.

    The box is halved from coarse blocks down to blocks of two cells, and a block is left out when |sdf| at its middle
    exceeds `lipschitz` times its half diagonal. Nothing is lost while |sdf| <= lipschitz * distance holds; the default
    leaves a margin for fields that are not quite distances. Where the bound fails, every surface that touches a found
    block is still followed to its end, and a part that lies apart from all found ones can be missed, as can what is
    thinner than a cell anywhere.

    Raises `StageFailed` when the field has one sign in all of the box, ValueError for a bad box or non-finite values.
    """

    def ask(x: np.ndarray, reach: float) -> np.ndarray:
        with torch.no_grad():
            return _numpy(sdf(torch.as_tensor(x, dtype=dtype, device=device)))

    def paint(x: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return _numpy(color(torch.as_tensor(x, dtype=dtype, device=device)))

    if not lipschitz > 0:
        raise ValueError(f"lipschitz is a positive bound on the field's slope, not {lipschitz}")
    values, lo, h, evaluations = sparse_values(ask, lo, hi, resolution, lipschitz, batch)
    return extract_grid(
        values, lo, h, color=color and paint, keep=keep, fill_cavities=fill_cavities, evaluations=evaluations
    )


def extract_grid(
    values: Any,
    lo: Any,
    h: float,
    *,
    color: Callable[[np.ndarray], np.ndarray] | None = None,
    keep: int | None = 1,
    fill_cavities: bool = True,
    evaluations: int = 0,
) -> tuple[Mesh, Report]:
    """As `extract_surface`, from values (X,Y,Z) at the nodes lo + h (i,j,k), negative inside. color takes arrays."""
    phi = np.array(_numpy(values), np.float32)
    if phi.ndim != 3 or min(phi.shape) < 2 or not h > 0:
        raise ValueError(f"a grid is (X,Y,Z), two nodes or more a side, with h > 0; not {phi.shape} with h = {h}")
    if not np.isfinite(phi).all():
        raise ValueError("the field has values that are not finite")
    if (phi >= 0).all():
        raise StageFailed(
            "The field is positive in all of its box: there is no surface to extract; widen the box or look at the fit."
        )
    if (phi < 0).all():
        raise StageFailed(
            "The field is negative in all of its box: it has no outside; widen the box or turn the field's sign."
        )
    tiny = np.float32(1e-5 * h)  # marching cubes leaves slivers at zeros
    near = np.abs(phi) < tiny
    phi[near] = np.where(phi[near] < 0, -tiny, tiny)
    first, last = _occupied(phi < 0)
    start = np.maximum(first - 1, 0)
    stop = np.minimum(last + 2, phi.shape)
    border = (first == 0).any() or (last == np.array(phi.shape) - 1).any()
    phi = phi[tuple(slice(a, b) for a, b in zip(start, stop, strict=True))]
    if border:  # beyond the border is outside, so steeply that the cap lies in the border itself
        phi = np.pad(phi, 1, constant_values=np.float32(1e6 * max(h, float(np.abs(phi).max()))))
        start = start - 1
    v, f, _, _ = measure.marching_cubes(phi, 0.0, gradient_direction="descent", allow_degenerate=True)
    lo = np.asarray(lo, np.float64).reshape(-1) + np.zeros(3)
    shape = np.asarray(values.shape)
    v = lo + h * np.clip(v.astype(np.float64) + start, 0, shape - 1)
    v, f, report = clean(v, f.astype(np.int64), keep, fill_cavities)
    colors = None
    if color is not None:
        colors = np.clip(np.asarray(color(v), np.float32), 0, 1)
        if colors.shape != v.shape:
            raise ValueError(f"color gives (N,3) values in [0,1], not {colors.shape}")
    mesh = Mesh(v.astype(np.float32), f.astype(np.int32), colors)
    return mesh, Report(nodes=int(shape.prod()), evaluations=evaluations, capped=bool(border), **report)


def sparse_values(
    ask: Callable[[np.ndarray, float], np.ndarray],
    lo: Any,
    hi: Any,
    resolution: int,
    lipschitz: float,
    batch: int = 1 << 18,
) -> tuple[np.ndarray, np.ndarray, float, int]:
    """Values (X,Y,Z) float32 of a field at a grid's nodes, true near its zero set and of the right sign elsewhere.

    ask(points (N,3) float64, reach) -> (N,): the field; `reach` > 0 tells that distances up to it matter (a block is
    being judged), 0 that the value itself is wanted. Returns values, lo (3,), the spacing h, and how many were asked.
    """
    lo, hi = (np.asarray(_numpy(x), np.float64).reshape(-1) + np.zeros(3) for x in (lo, hi))
    if not (np.isfinite(lo).all() and np.isfinite(hi).all() and (hi > lo).all()):
        raise ValueError(f"the box from {lo} to {hi} is empty")
    if not 2 <= resolution <= MAX_CELLS:
        raise ValueError(f"resolution is 2 to {MAX_CELLS} cells along the longest side, not {resolution}")
    h = float((hi - lo).max() / resolution)
    n = np.maximum(1, np.ceil((hi - lo) / h - 1e-6)).astype(np.int64)
    asked = 0

    def field(cells: np.ndarray, reach: float) -> np.ndarray:
        nonlocal asked
        asked += len(cells)
        out = [
            np.asarray(ask(lo + h * cells[i : i + batch], reach), np.float32).reshape(-1)
            for i in range(0, len(cells), batch)
        ]
        out = np.concatenate(out) if out else np.zeros(0, np.float32)
        if len(out) != len(cells):
            raise ValueError(f"the field gave {len(out)} values for {len(cells)} points")
        if not np.isfinite(out).all():
            raise ValueError("the field has values that are not finite")
        return out

    side = 2 ** int(np.clip(np.floor(np.log2(max(n.max() / 16, 2))), 1, 5))
    blocks = np.stack(np.meshgrid(*(np.arange(-(-k // side)) for k in n), indexing="ij"), -1).reshape(-1, 3)
    inside = np.zeros(-(-n // side), bool)
    while True:
        first, last = blocks * side, np.minimum((blocks + 1) * side, n)
        reach = lipschitz * 0.5 * h * np.sqrt(((last - first) ** 2).sum(1))
        value = field(0.5 * (first + last), float(reach.max()))
        inside[tuple(blocks.T)] = value < 0
        blocks = blocks[np.abs(value) <= reach]
        if side == 2:
            break
        side //= 2
        parts = -(-n // side)
        for axis in range(3):
            inside = inside.repeat(2, axis)
        inside = inside[tuple(slice(k) for k in parts)].copy()
        blocks = (2 * blocks[:, None] + _CORNERS).reshape(-1, 3)
        blocks = blocks[(blocks < parts).all(1)]
    values = np.where(_of_nodes(inside, n), np.float32(-4 * h), np.float32(4 * h))
    known, judged = np.zeros(n + 1, bool), np.zeros(inside.shape, bool)
    while len(blocks):  # once, unless the bound failed: then blocks next to the surface that were left out
        judged[tuple(blocks.T)] = True
        wanted = np.zeros(n + 1, bool)
        for offset in np.stack(np.meshgrid(*3 * [[0, 1, 2]], indexing="ij"), -1).reshape(-1, 3):
            wanted[tuple(np.minimum(2 * blocks + offset, n).T)] = True
        nodes = np.argwhere(wanted & ~known)
        values[tuple(nodes.T)] = field(nodes, 0.0)
        known |= wanted
        negative = values[tuple(nodes.T)] < 0
        wrong = np.zeros(inside.shape, bool)
        for offset in _CORNERS:  # the up to eight blocks around a node
            near = tuple(np.clip((nodes - offset) // 2, 0, np.array(inside.shape) - 1).T)
            wrong[near] |= inside[near] != negative
        blocks = np.argwhere(wrong & ~judged)
    return values, lo, h, asked


def _of_nodes(inside: np.ndarray, n: np.ndarray) -> np.ndarray:
    """(nx+1,ny+1,nz+1) bool of nodes, from that of the blocks of two cells they begin in."""
    for axis in range(3):
        inside = np.take(inside, np.minimum(np.arange(n[axis] + 1) // 2, inside.shape[axis] - 1), axis)
    return inside


def clean(
    vertices: np.ndarray, faces: np.ndarray, keep: int | None = 1, fill_cavities: bool = True
) -> tuple[np.ndarray, np.ndarray, dict[str, Any]]:
    """The `keep` largest solids of a closed mesh (None: all), without their cavities, and what was dropped.

    vertices (V,3), faces (T,3), each connected piece watertight: those of positive volume are solids, those of negative
    volume cavities. Returns vertices, faces and the fields of `Report` that tell of it; unused vertices go.
    """
    if keep is not None and keep < 1:
        raise ValueError(f"keep is how many pieces, at least one, or None; not {keep}")
    of_face, volume = _pieces(vertices, faces)
    solids = np.flatnonzero(volume > 0)
    solids = solids[np.argsort(-volume[solids], kind="stable")]
    cavities = np.flatnonzero(volume <= 0)
    if not len(solids):
        raise StageFailed("The surface encloses no volume: there is nothing to extract.")
    within = _within(vertices, faces, of_face, solids) if len(solids) > 1 and len(cavities) else None
    if within is None:
        within = np.full(len(volume), -1)
        within[cavities] = solids[0]
    if fill_cavities:  # a solid in a filled cavity is part of the filling
        solids = solids[within[solids] < 0]
    kept, loose = solids[:keep], solids[keep:] if keep else solids[:0]
    owned = cavities[np.isin(within[cavities], kept) & (volume[cavities] < 0)]
    stay = np.isin(of_face, kept if fill_cavities else np.concatenate([kept, owned]))
    faces = faces[stay]
    used = np.zeros(len(vertices), bool)
    used[faces] = True
    faces = (np.cumsum(used) - 1)[faces]
    report = {
        "pieces_dropped": len(loose),
        "dropped_share": float(volume[loose].sum() / volume[solids].sum()),
        "cavities_filled": len(owned) if fill_cavities else 0,
        "filled_share": float(-volume[owned].sum() / volume[kept].sum() + 0.0) if fill_cavities else 0.0,
    }
    return vertices[used], faces, report


def _pieces(vertices: np.ndarray, faces: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The connected piece of each face (T,), and each piece's signed volume."""
    n = len(vertices)
    one, two = np.concatenate([faces[:, 0], faces[:, 1]]), np.concatenate([faces[:, 1], faces[:, 2]])
    graph = sparse.coo_matrix((np.ones(len(one), bool), (one, two)), shape=(n, n))
    count, of_vertex = connected_components(graph, directed=False)
    of_face = of_vertex[faces[:, 0]]
    used = np.bincount(of_face, minlength=count) > 0  # vertices without faces are pieces too
    of_face = (np.cumsum(used) - 1)[of_face]
    a, b, c = (vertices[faces[:, k]] - vertices.mean(0) for k in range(3))
    return of_face, np.bincount(of_face, (a * np.cross(b, c)).sum(1)) / 6


def _within(vertices: np.ndarray, faces: np.ndarray, of_face: np.ndarray, solids: np.ndarray) -> np.ndarray:
    """(P,) the smallest of `solids`, given from large to small, that encloses each piece; -1 where none does."""
    order = np.argsort(of_face, kind="stable")
    begin = np.searchsorted(of_face[order], np.arange(of_face.max() + 2))
    point = vertices[faces[order[begin[:-1]]]].mean(1)  # one on each piece
    out = np.full(len(point), -1)
    for k in solids:
        shell = faces[order[begin[k] : begin[k + 1]]]
        box = vertices[shell]
        inside = np.flatnonzero(((point > box.min((0, 1))) & (point < box.max((0, 1)))).all(1))
        inside = inside[inside != k]
        if len(inside):
            out[inside[winding_number(point[inside], vertices, shell) > 0.5]] = k
    return out


def _occupied(solid: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First and last index along each axis at which anything is solid."""
    lines = [np.flatnonzero(solid.any(tuple(j for j in range(3) if j != k))) for k in range(3)]
    return np.array([x[0] for x in lines]), np.array([x[-1] for x in lines])


def _numpy(x: Any) -> np.ndarray:
    return x.detach().cpu().numpy() if isinstance(x, torch.Tensor) else np.asarray(x)
