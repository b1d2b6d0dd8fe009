"""The bank of objects that the generator puts into hands: meshes, signed distances and hinges as padded tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ...geometry import queries, rigid
from ...geometry.meshes import vertex_normals
from .shapes_outlines import Thing
from .shapes_recipes import RECIPES
from .shapes_solids import split_creases

GRID = 36  # samples of a distance grid along each axis
MARGIN = 0.02  # metres of a distance grid around its object
MAX_VERTICES, MAX_FACES = 1250, 2300


@dataclass(frozen=True, eq=False)
class ObjectBank:
    """N objects, padded to V vertices and T faces, and M >= N distance grids: row n is object n with its hinge at angle
    0, and hinged objects have two more rows, one for each part alone."""

    vertices: Tensor  # (N,V,3) metres, centred on the bounding box; doubled at creases
    faces: Tensor  # (N,T,3) int64, outward; padding is 0,0,0
    n_vertices: Tensor  # (N,) int64
    n_faces: Tensor  # (N,) int64
    vertex_normals: Tensor  # (N,V,3) unit
    part: Tensor  # (N,V) int64: 0, or 1 for what the hinge moves
    hinged: Tensor  # (N,) bool
    hinge_axis: Tensor  # (N,3) unit
    hinge_pivot: Tensor  # (N,3) metres
    hinge_range: Tensor  # (N,2) radians, low and high; 0 is as stored
    soft: Tensor  # (N,) bool: may be deformed
    sdf: Tensor  # (M,G,G,G) metres, x first; negative inside
    sdf_centre: Tensor  # (M,3)
    sdf_half: Tensor  # (M,3) the grid spans centre - half to centre + half
    part_rows: Tensor  # (N,2) int64 rows of the parts' grids; the object's own row twice where there is no hinge
    size: Tensor  # (N,3) bounding box
    kind: tuple[str, ...]  # recipe's name, or "mesh"

    def __len__(self) -> int:
        return len(self.kind)

    @property
    def device(self) -> torch.device:
        return self.vertices.device

    def to(self, device: str | torch.device) -> ObjectBank:
        return ObjectBank(**{f.name: _to(getattr(self, f.name), device) for f in fields(self)})

    def distances(self, index: Tensor, angle: Tensor | None = None) -> Distances:
        """The distance to each of the objects `index` (B,), for many questions; with `angle` (B,) radians the hinges
        are open."""
        if angle is None:
            return Distances(self._fields(index), None, None, None)
        rows = self.part_rows[index]
        turn = rigid.so3_exp(self.hinge_axis[index] * angle[:, None])
        return Distances(self._fields(rows[:, 0]), self._fields(rows[:, 1]), turn, self.hinge_pivot[index][:, None])

    def _fields(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grid = self.sdf[rows].permute(0, 3, 2, 1)[:, None]  # the sampler's x is the last axis
        return grid, self.sdf_centre[rows][:, None], self.sdf_half[rows][:, None]

    def signed_distance(self, index: Tensor, points: Tensor, angle: Tensor | None = None) -> Tensor:
        """Distance (B,P) of points (B,P,3), in the frames of the objects `index` (B,), negative inside; trilinear in
        the grid, and outside it plus the distance to the grid. With `angle` (B,) radians the hinges are open."""
        return self.distances(index, angle)(points)

    def save(self, path: str | Path) -> None:
        """Writes an npz without pickled parts; distances as float16."""
        arrays = {f.name: getattr(self, f.name).cpu().numpy() for f in fields(self) if f.name != "kind"}
        arrays["sdf"] = arrays["sdf"].astype(np.float16)
        with Path(path).open("wb") as f:
            np.savez(f, kind=np.array(self.kind), **arrays)

    @staticmethod
    def load(path: str | Path, device: str | torch.device = "cpu") -> ObjectBank:
        """Reads what `save` wrote. Raises ValueError when the file is something else."""
        with np.load(path, allow_pickle=False) as z:
            missing = [f.name for f in fields(ObjectBank) if f.name not in z.files]
            if missing:
                raise ValueError(f"{path} is not an object bank: it has no {missing[0]!r}")
            got = {f.name: z[f.name] for f in fields(ObjectBank)}
        kind = tuple(str(k) for k in got.pop("kind"))
        got["sdf"] = got["sdf"].astype(np.float32)
        return ObjectBank(**{k: torch.from_numpy(v).to(device) for k, v in got.items()}, kind=kind)


@dataclass(frozen=True, eq=False)
class Distances:
    """Signed distance to one object per row: a base, and perhaps a second part that is turned about its hinge."""

    base: tuple[Tensor, Tensor, Tensor]  # (B,1,G,G,G) grid, z first, (B,1,3) its centre, (B,1,3) its half size
    second: tuple[Tensor, Tensor, Tensor] | None
    turn: Tensor | None  # (B,3,3)
    pivot: Tensor | None  # (B,1,3)

    def __call__(self, points: Tensor) -> Tensor:
        """points (B,P,3) metres in the objects' frames -> (B,P), negative inside."""
        d = _trilinear(points, *self.base)
        if self.second is None:
            return d
        return torch.minimum(d, _trilinear((points - self.pivot) @ self.turn + self.pivot, *self.second))

    def normals(self, points: Tensor, step: float = 1.5e-3) -> Tensor:
        """(B,P,3) unit gradient, by central differences of `step` metres."""
        b, p = points.shape[:2]
        shift = step * torch.eye(3, device=points.device, dtype=points.dtype)
        shift = torch.cat([shift, -shift])
        d = self((points[:, :, None] + shift).reshape(b, 6 * p, 3)).reshape(b, p, 6)
        return torch.nn.functional.normalize(d[..., :3] - d[..., 3:], dim=-1)


def _trilinear(points: Tensor, grid: Tensor, centre: Tensor, half: Tensor) -> Tensor:
    scale = 1 / half
    x = torch.addcmul(-centre * scale, points, scale)
    inside = x.clamp(-1, 1)
    at = inside[:, :, None, None]
    value = torch.nn.functional.grid_sample(grid, at, padding_mode="border", align_corners=True)
    over = ((x - inside) * half).square()
    return value[:, 0, :, 0, 0] + (over[..., 0] + over[..., 1] + over[..., 2]).sqrt()


def _to(x, device):
    return x.to(device) if isinstance(x, Tensor) else x


def make_object_bank(
    n: int,
    seed: int,
    device: str | torch.device = "cpu",
    meshes: Sequence[tuple[np.ndarray, np.ndarray]] = (),
    only: Sequence[str] | None = None,
) -> ObjectBank:
    """The user's closed `meshes`, pairs of vertices (V,3) in metres and faces (T,3), followed by `n` procedural objects
    drawn from `seed`. `only` names the recipes to draw from (see `RECIPES`); default all.

    Raises ValueError when there is nothing to make, a recipe is unknown, or a mesh is malformed, larger than a metre or
    smaller than 5 mm.
    """
    if n + len(meshes) < 1:
        raise ValueError("a bank has at least one object")
    rng = np.random.default_rng(seed)
    names = list(RECIPES if only is None else only)
    unknown = [k for k in names if k not in RECIPES]
    if unknown or not names:
        raise ValueError(f"there is no recipe {unknown[:1]}; recipes are {', '.join(RECIPES)}")
    share = np.array([RECIPES[k][0] for k in names])
    # each kind in proportion, so that small banks are varied too; the order is random
    at = (rng.random() + np.arange(n)) / max(n, 1)
    kinds = rng.permutation(np.searchsorted(np.cumsum(share) / share.sum(), at, side="right").clip(0, len(names) - 1))
    rows = [_row(RECIPES[names[k]][1](np.random.default_rng([seed, i])), names[k]) for i, k in enumerate(kinds)]
    return _pack([_mesh_row(*m) for m in meshes] + rows, device)


def _row(thing: Thing, kind: str) -> dict:
    parts = [thing.base] + ([thing.second] if thing.second else [])
    every = np.concatenate([s.vertices for s in parts])
    centre = ((every.max(0) + every.min(0)) / 2).astype(np.float32)
    parts = [s.moved(-centre) for s in parts]
    grids = [_grid(s.vertices, s.distance) for s in parts]
    if thing.second:
        whole = _grid(every - centre, lambda p: np.minimum(parts[0].distance(p), parts[1].distance(p)))
        grids = [whole, *grids]
    pieces = [split_creases(s.vertices, s.faces)[:2] for s in parts]
    return _entry(pieces, grids, kind) | {
        "hinged": thing.second is not None,
        "hinge_axis": np.asarray(thing.axis),
        "hinge_pivot": np.asarray(thing.pivot) - centre,
        "hinge_range": np.asarray(thing.bounds),
        "soft": thing.soft,
    }


def _entry(pieces: list[tuple[np.ndarray, np.ndarray]], grids: list, kind: str) -> dict:
    counts = [len(v) for v, _ in pieces]
    return {
        "vertices": np.concatenate([v for v, _ in pieces]).astype(np.float32),
        "faces": np.concatenate([f + o for (_, f), o in zip(pieces, np.cumsum([0] + counts), strict=False)]),
        "part": np.repeat(np.arange(len(pieces)), counts),
        "grids": grids,
        "kind": kind,
    }


def _grid(vertices: np.ndarray, distance) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    lo, hi = vertices.min(0) - MARGIN, vertices.max(0) + MARGIN
    axes = [np.linspace(a, b, GRID, dtype=np.float32) for a, b in zip(lo, hi, strict=True)]
    points = np.stack(np.meshgrid(*axes, indexing="ij"), -1).reshape(-1, 3)
    return np.asarray(distance(points), np.float32).reshape(GRID, GRID, GRID), (lo + hi) / 2, (hi - lo) / 2


def _mesh_row(vertices: np.ndarray, faces: np.ndarray) -> dict:
    v, f = queries.check_mesh(vertices, faces)
    v = v - (v.max(0) + v.min(0)) / 2
    extent = float(np.ptp(v, axis=0).max())
    if not 0.005 <= extent <= 1.0:
        raise ValueError(f"a mesh is {extent:.3g} m across; objects are given in metres, 5 mm to 1 m")
    v, f = _lighter(v, f)
    ask = queries.MeshQueries(v, f)
    return _entry([split_creases(v, f)[:2]], [_grid(v, ask.signed_distance)], "mesh") | {
        "hinged": False,
        "hinge_axis": np.array([1.0, 0, 0]),
        "hinge_pivot": np.zeros(3),
        "hinge_range": np.zeros(2),
        "soft": False,
    }


def _lighter(v: np.ndarray, f: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """At most MAX_FACES faces: vertices merged in ever larger cells (Rossignac and Borrel, 1993)."""
    cell = np.ptp(v, axis=0).max() / 64
    while len(f) > MAX_FACES or len(v) > MAX_VERTICES:
        _, back = np.unique(np.floor(v / cell).astype(np.int64), axis=0, return_inverse=True)
        back = back.reshape(-1)
        count = np.bincount(back)
        v = np.stack([np.bincount(back, v[:, k]) / count for k in range(3)], 1)
        f = back[f]
        f = f[(f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 2] != f[:, 0])]
        cell *= 1.2
    return v, f


def _pack(rows: list[dict], device: str | torch.device) -> ObjectBank:
    n = len(rows)
    nv, nf = (np.array([len(r[k]) for r in rows]) for k in ("vertices", "faces"))
    vertices, faces = np.zeros((n, nv.max(), 3), np.float32), np.zeros((n, nf.max(), 3), np.int64)
    part = np.zeros((n, nv.max()), np.int64)
    extra, part_rows = [], np.repeat(np.arange(n)[:, None], 2, 1)
    for i, r in enumerate(rows):
        vertices[i, : nv[i]], faces[i, : nf[i]], part[i, : nv[i]] = r["vertices"], r["faces"], r["part"]
        if len(r["grids"]) > 1:
            part_rows[i] = n + len(extra), n + len(extra) + 1
            extra += r["grids"][1:]
    grids = [r["grids"][0] for r in rows] + extra
    sdf, centre, half = (torch.from_numpy(np.stack([g[k] for g in grids]).astype(np.float32)) for k in range(3))
    v, f = torch.from_numpy(vertices), torch.from_numpy(faces)
    column = {k: torch.from_numpy(np.stack([r[k] for r in rows])) for k in ("hinge_axis", "hinge_pivot", "hinge_range")}
    return ObjectBank(
        vertices=v,
        faces=f,
        n_vertices=torch.from_numpy(nv),
        n_faces=torch.from_numpy(nf),
        vertex_normals=vertex_normals(v, f),
        part=torch.from_numpy(part),
        hinged=torch.tensor([bool(r["hinged"]) for r in rows]),
        **{k: x.float() for k, x in column.items()},
        soft=torch.tensor([bool(r["soft"]) for r in rows]),
        sdf=sdf,
        sdf_centre=centre,
        sdf_half=half,
        part_rows=torch.from_numpy(part_rows),
        size=torch.from_numpy(np.stack([np.ptp(r["vertices"], axis=0) for r in rows])),
        kind=tuple(r["kind"] for r in rows),
    ).to(device)


def articulate(bank: ObjectBank, index: Tensor, angle: Tensor) -> Tensor:
    """Vertices (B,V,3) of objects `index` (B,) with their second part turned about its hinge by `angle` (B,) radians.

    Objects without a hinge stay as they are.
    """
    v, part = bank.vertices[index], bank.part[index]
    pivot = bank.hinge_pivot[index][:, None]
    turned = (v - pivot) @ rigid.so3_exp(bank.hinge_axis[index] * angle[:, None]).mT + pivot
    return torch.where((part == 1)[..., None], turned, v)


def deform(vertices: Tensor, generator: torch.Generator | None = None, strength: float = 1.0) -> Tensor:
    """Smoothly bent, twisted, squeezed and pushed-in copies of objects (B,V,3), about their frames' origins.

    Each is bent along one axis (up to 60 degrees from end to end at strength 1), twisted about it (up to 40 degrees),
    squeezed across it at one place by up to 30 %, and dented by one Gaussian. Normals are to be computed anew.
    """
    b, device, dtype = len(vertices), vertices.device, vertices.dtype

    def rand(*shape):
        return torch.rand(*shape, generator=generator, device=device, dtype=dtype)

    sign = 2 * rand(b, 4, 1) - 1
    order = torch.tensor([[0, 1, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1], [1, 0, 2], [2, 1, 0]], device=device)
    length = vertices.abs().amax(1).clamp_min(1e-3)  # (B,3) half
    bias = torch.log(length / length.amax(1, keepdim=True))[:, [0, 1, 2, 0, 1, 2]]
    gumbel = -torch.log(-torch.log(rand(b, 6).clamp(1e-6, 1 - 1e-6)))
    order = order[(2 * bias + gumbel).argmax(1)]  # the long axis, mostly
    x = vertices.gather(2, order[:, None].expand_as(vertices))
    half = length.gather(1, order)
    s, y, z = x.unbind(-1)
    u = s / half[:, :1]
    # squeeze
    place, width = 1.2 * rand(b, 1) - 0.6, 0.3 + 0.4 * rand(b, 1)
    amount = 0.3 * strength * rand(b, 1) * torch.exp(-(((u - place) / width) ** 2))
    y, z = y * (1 - amount), z * (1 + 0.5 * amount)
    # twist
    a = sign[:, 0] * 0.35 * strength * u
    y, z = a.cos() * y - a.sin() * z, a.sin() * y + a.cos() * z
    # bend along a circle of curvature k
    total = sign[:, 1] * 0.52 * strength
    k = torch.where(total.abs() < 1e-3, torch.full_like(total, 1e-3), total) / half[:, :1]
    k = k.clamp(-0.6 / half[:, 1:2], 0.6 / half[:, 1:2])
    s, y = (1 / k - y) * (k * s).sin(), 1 / k - (1 / k - y) * (k * s).cos()
    x = torch.stack([s, y, z], -1)
    # dent
    row = (rand(b, 1) * vertices.shape[1]).long().clamp(0, vertices.shape[1] - 1)
    at = x.gather(1, row[..., None].expand(-1, -1, 3))
    near = torch.exp(-(x - at).square().sum(-1) / (2 * (0.35 * half.mean(1, keepdim=True)) ** 2))
    x = x - at * (0.25 * strength * sign[:, 2].clamp_min(0) * near)[..., None]
    return torch.empty_like(x).scatter(2, order[:, None].expand_as(x), x)
