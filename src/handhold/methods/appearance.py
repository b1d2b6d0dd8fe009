"""Appearance: flat Gaussians on the object's and the hands' surfaces, rendered together and fitted to the frames.

The surface is known from the signed-distance grid, so each Gaussian is a disc on it (2DGS, Huang et al., SIGGRAPH
2024): its normal is the surface's; it moves a little, grows, and turns in its plane. All bodies go through one
depth-sorted pass with body ids, so that who hides whom comes from geometry. A pixel of a hand says nothing about the
object; pixels of other things (a sleeve) say nothing at all. Loss: L1 + SSIM (Kerbl et al., SIGGRAPH 2023, eq. 7) on
labelled pixels, each body's own alpha against its mask, and priors that keep the discs on the surface, of similar size,
and opaque. The object turns under a fixed light: a shared second-order shading of the turned normal and a gain per
frame explain what changes, so that the colours stay those of the surface.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from ..geometry.meshes import area, interpolate, sample_surface, vertex_normals
from ..geometry.rigid import quat_from_matrix, quat_multiply, so3_exp
from ..losses import l1, ssim
from ..render import Splatted, splat
from ..scene import Mesh, Sequence
from ..shapes.gaussians import Gaussians, concatenate
from ..shapes.sdf_fit import shading
from .bound import HandGaussians, on_triangles
from .crops import View, crops, median_color

OBJECT = 0  # body id; hands follow in the order of `hands`
_THIN = 0.1  # thickness of a disc over the spacing of discs
_OPACITY = 0.95  # at the start, as a logit:
_LOGIT = float(np.log(_OPACITY / (1 - _OPACITY)))
_SIZE = float(np.log(0.6))  # log of a disc's standard deviation over the spacing, at the start
_WARM = 0.35  # share of the iterations before poses move: they are better than the first colours


@dataclass(frozen=True)
class Appearance:
    """What `fit_appearance` finds."""

    object: Gaussians  # object frame, metres; colours as seen on average over the clip
    hands: dict[str, HandGaussians]
    cam_from_object: np.ndarray  # (F,4,4); NaN where it was
    light: Tensor  # (9,) shading in the camera's frame, see `shapes.sdf_fit.shading`
    gain: np.ndarray  # (F,3) brightness of each frame
    psnr: float  # dB, pixels labelled object or hand, frames held out of the colours
    psnr_object: float  # dB, the object's pixels alone
    iou: float  # object's visible mask against its label, all frames


def lit(g: Gaussians, light: Tensor, gain: Tensor | np.ndarray) -> Gaussians:
    """Gaussians in the camera's frame with the frame's light on them: `light` (9,), `gain` (3,)."""
    normal = _normals(g.quats)
    return g.with_values(colors=g.colors * shading(normal, light)[:, None] * torch.as_tensor(gain, dtype=torch.float32))


def fit_appearance(
    sequence: Sequence,
    mesh: Mesh,
    cam_from_object: np.ndarray,
    object_weight: np.ndarray,
    hands: dict[str, tuple[np.ndarray, np.ndarray]],
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    iterations: int | None = None,
    refine_poses: bool = True,
    count: int = 8000,
    hand_count: int = 3000,
    pose_lr: float = 1e-3,
) -> Appearance:
    """Fit the Gaussians of the object and the hands to the clip, and each frame's object pose along.

    mesh: object frame, metres, with `colors` and `observed`; cam_from_object (F,4,4), NaN where unknown; object_weight
    (F,) in [0,1]; hands: side -> vertices (F,V,3) in the camera's frame, NaN where unknown, and faces (T,3).
    iterations: renderings, one frame each; by default 14 per frame, at most 900. Deterministic for a seed.
    Raises ValueError when no frame has both a pose and a mask.
    """
    say = progress or (lambda share, what: None)
    views = crops(sequence, np.nan_to_num(object_weight), cam_from_object, {s: v for s, (v, _) in hands.items()})
    if not any(v.has_object for v in views):
        raise ValueError("no frame has both an object pose and an object mask")
    generator = torch.Generator().manual_seed(seed)
    body = _object_surfels(mesh, count, generator)
    gloves = {s: _HandSurfels(v, f, hand_count, median_color(sequence, s), generator) for s, (v, f) in hands.items()}
    poses = _Poses(cam_from_object, body, views)
    m = _Model(
        body,
        gloves,
        poses,
        torch.zeros(9, requires_grad=True),
        {v.frame: torch.zeros(3, requires_grad=True) for v in views},
    )
    discs = [body, *gloves.values()]
    groups = [
        {"params": [d.color for d in discs] + [d.opacity for d in discs], "lr": 0.05},
        {"params": [d.offset for d in discs], "lr": 0.02},
        {"params": [d.size for d in discs] + [d.spin for d in discs], "lr": 0.01},
        {"params": [m.light, *m.gains.values()], "lr": 5e-3},
        {"params": [*poses.rotation.values(), *poses.shift.values()], "lr": pose_lr},
    ]
    opt = torch.optim.Adam(groups, betas=(0.9, 0.99), fused=True)  # what has no gradient is left alone
    full_lr = [g["lr"] for g in groups]
    total = min(14 * len(views), 900) if iterations is None else iterations
    order: list[View] = []
    for k in range(total):
        if not order:
            order = [views[i] for i in torch.randperm(len(views), generator=generator)]
            poses.recentre()
        view = order.pop()
        for g, lr in zip(opt.param_groups, full_lr, strict=True):
            g["lr"] = lr * 0.1 ** (k / total)
        move = refine_poses and view.has_object and k >= _WARM * total
        if view.held_out and not move:
            continue
        loss = view.weight * _image_loss(
            view, _render(view, m, m.gains[view.frame], learn=not view.held_out, move=move)
        )
        if not view.held_out:
            loss = loss + sum(d.prior() for d in discs) + 1e-3 * m.light.square().sum()
            loss = loss + 0.02 * m.gains[view.frame].square().sum()
        if move:
            loss = loss + poses.prior(view.frame)
        opt.zero_grad()
        loss.backward()
        opt.step()
        if k % 25 == 24:
            say((k + 1) / total, f"appearance, loss {loss.item():.3f}")
    poses.recentre()
    with torch.no_grad():
        return _finish(views, m, len(sequence))


# --- what is optimised


class _Surfels:
    """Discs around base points: the free values of each, without units (lengths over `spacing`)."""

    def __init__(self, colors: Tensor, spacing: float):
        n = len(colors)
        self.spacing = spacing
        self.offset = torch.zeros(n, 3, requires_grad=True)
        self.size = torch.full((n, 2), _SIZE, requires_grad=True)
        self.spin = torch.zeros(n, requires_grad=True)
        self.opacity = torch.full((n,), _LOGIT, requires_grad=True)
        self.start = colors.clamp(0.01, 0.99).logit()
        self.color = self.start.clone().requires_grad_(True)

    def local(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Offsets, quats (in the base frame), scales, opacities, colours."""
        half = 0.5 * self.spin
        zero = torch.zeros_like(half)
        quats = torch.stack([half.cos(), zero, zero, half.sin()], -1)
        scales = torch.cat([self.size.exp(), torch.full_like(self.size[:, :1], _THIN)], 1) * self.spacing
        return self.offset * self.spacing, quats, scales, self.opacity.sigmoid(), self.color.sigmoid()

    def prior(self) -> Tensor:
        """Stay on the surface, of one size, opaque, and of the first colour where no picture says another."""
        place = 0.05 * self.offset.square().mean() + 0.02 * (self.size - _SIZE).square().mean()
        return place + 1e-3 * ((self.opacity - _LOGIT).square().mean() + (self.color - self.start).square().mean())


class _ObjectSurfels(_Surfels):
    def __init__(self, points: Tensor, normals: Tensor, colors: Tensor, observed: Tensor, spacing: float):
        super().__init__(colors, spacing)
        self.points, self.rot, self.observed = points, _frames(normals), observed[:, None]
        self.quat = quat_from_matrix(self.rot)

    def local(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *rest, colors = super().local()
        return *rest, torch.where(self.observed, colors, self.start.sigmoid())

    def placed(self, offset: Tensor, spin: Tensor) -> tuple[Tensor, Tensor]:
        """Means and quats in the object's frame."""
        return self.points + (self.rot @ offset[..., None])[..., 0], quat_multiply(self.quat, spin)


class _HandSurfels(_Surfels):
    """Discs on a hand, with where each frame's mesh puts their base points."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, count: int, skin: Tensor, generator: torch.Generator):
        v, f = torch.from_numpy(np.asarray(vertices, np.float32)), torch.from_numpy(np.asarray(faces)).long()
        known = torch.isfinite(v).all(-1).all(-1).nonzero()[:, 0].tolist()
        rest = v[known[0]] if known else torch.randn(v.shape[1:], generator=generator)
        super().__init__(skin.expand(count, 3), float(area(rest, f) / count) ** 0.5)
        self.faces = np.asarray(faces)
        self.face, self.bary, _ = _even_samples(rest, f, count, generator)
        self.base = {i: on_triangles(v[i], self.faces, self.face, self.bary) for i in known}


class _Poses:
    """Small motions of each frame's object about its centre: base @ (rotation, then shift times radius)."""

    def __init__(self, cam_from_object: np.ndarray, body: _ObjectSurfels, views: list[View]):
        self.start = cam_from_object
        self.frames = [v.frame for v in views if v.has_object]
        self.base = {i: torch.from_numpy(cam_from_object[i]).float() for i in self.frames}
        self.weight = torch.tensor([v.weight for v in views if v.has_object])
        self.center = 0.5 * (body.points.amin(0) + body.points.amax(0))
        self.radius = float((body.points - self.center).norm(dim=1).max())
        self.rotation = {i: torch.zeros(3, requires_grad=True) for i in self.frames}
        self.shift = {i: torch.zeros(3, requires_grad=True) for i in self.frames}

    def at(self, i: int) -> tuple[Tensor, Tensor]:
        """Rotation and translation of frame `i`."""
        r0, t0 = self.base[i][:3, :3], self.base[i][:3, 3]
        r = so3_exp(self.rotation[i])
        return r0 @ r, r0 @ (self.center + self.radius * self.shift[i] - r @ self.center) + t0

    def prior(self, i: int) -> Tensor:
        """Poses are good already."""
        return self.rotation[i].square().sum() + self.shift[i].square().sum()

    @torch.no_grad()
    def recentre(self) -> None:
        """Take out what all frames have in common: it is the object frame's choice, not motion."""
        w = (self.weight / self.weight.sum())[:, None]
        for parts in (self.rotation, self.shift):
            mean = (w * torch.stack([parts[i] for i in self.frames])).sum(0)
            for i in self.frames:
                parts[i] -= mean

    def result(self, n: int) -> np.ndarray:
        out = np.array(self.start, np.float64, copy=True)
        r0 = torch.from_numpy(out[self.frames])
        r = so3_exp(torch.stack([self.rotation[i] for i in self.frames]).double())
        c = self.center.double()
        shift = c + self.radius * torch.stack([self.shift[i] for i in self.frames]).double() - r @ c
        out[self.frames, :3, :3] = (r0[:, :3, :3] @ r).numpy()
        out[self.frames, :3, 3] = ((r0[:, :3, :3] @ shift[..., None])[..., 0] + r0[:, :3, 3]).numpy()
        return out


@dataclass(frozen=True)
class _Model:
    """All that is optimised."""

    body: _ObjectSurfels
    gloves: dict[str, _HandSurfels]
    poses: _Poses
    light: Tensor  # (9,)
    gains: dict[int, Tensor]  # frame -> (3,) logarithms


def _object_surfels(mesh: Mesh, count: int, generator: torch.Generator) -> _ObjectSurfels:
    """Even discs on the mesh, with its colours, and which of them lie on surface that was seen."""
    v, f = torch.from_numpy(np.asarray(mesh.vertices, np.float32)), torch.from_numpy(np.asarray(mesh.faces)).long()
    face, bary, points = _even_samples(v, f, count, generator)
    colors = torch.full_like(v, 0.5) if mesh.colors is None else torch.from_numpy(np.asarray(mesh.colors, np.float32))
    seen = torch.ones(len(v)) if mesh.observed is None else torch.from_numpy(np.asarray(mesh.observed, np.float32))
    normals = F.normalize(interpolate(vertex_normals(v, f), f, face, bary), dim=-1)
    observed = interpolate(seen[:, None], f, face, bary)[:, 0] > 0.5
    return _ObjectSurfels(
        points, normals, interpolate(colors, f, face, bary), observed, float(area(v, f) / count) ** 0.5
    )


def _even_samples(v: Tensor, f: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Triangle, weights and point of `count` surface samples, spread by a few steps of Lloyd's algorithm."""
    points, face, bary = sample_surface(v, f, 6 * count, generator)
    x = points.double().numpy()
    chosen = np.arange(count)
    tree = cKDTree(x)
    for _ in range(3):
        owner = cKDTree(x[chosen]).query(x)[1]
        size = np.maximum(np.bincount(owner, minlength=count), 1)[:, None]
        mean = np.stack([np.bincount(owner, x[:, a], count) for a in range(3)], -1) / size
        chosen = tree.query(mean)[1]
    chosen = torch.from_numpy(chosen)
    return face[chosen], bary[chosen], points[chosen]


def _frames(normals: Tensor) -> Tensor:
    """(N,3,3) rotations whose third column is the unit normal (Duff et al., JCGT 2017)."""
    x, y, z = normals.unbind(-1)
    sign = torch.where(z >= 0, 1.0, -1.0)
    a = -1 / (sign + z)
    b = x * y * a
    first = torch.stack([1 + sign * x * x * a, sign * b, -sign * x], -1)
    second = torch.stack([b, sign + y * y * a, -y], -1)
    return torch.stack([first, second, normals], -1)


def _normals(quats: Tensor) -> Tensor:
    """(N,3) third column of the rotation of unit quaternions (N,4)."""
    w, x, y, z = quats.unbind(-1)
    return torch.stack([2 * (x * z + w * y), 2 * (y * z - w * x), 1 - 2 * (x * x + y * y)], -1)


# --- rendering


def _render(view: View, m: _Model, gain: Tensor, learn: bool, move: bool) -> Splatted:
    """All bodies of a frame, lit, in one pass. Gradients: of the pose with `move`, of all else with `learn`."""
    free = (lambda x: x) if learn else (lambda x: x.detach())
    parts = []
    if view.has_object:
        offset, spin, scales, opacities, colors = map(free, m.body.local())
        x, quats = m.body.placed(offset, spin)
        r, t = m.poses.at(view.frame)
        if not move:
            r, t = r.detach(), t.detach()
        normal = m.body.rot[..., 2] @ r.detach().T
        parts.append(
            (x @ r.T + t, quat_multiply(quat_from_matrix(r), quats), scales, opacities, colors, normal, OBJECT)
        )
    for k, glove in enumerate(m.gloves.values()):
        if view.frame in glove.base:
            foot, rot, quat = glove.base[view.frame]
            offset, spin, scales, opacities, colors = map(free, glove.local())
            x = foot + (rot @ offset[..., None])[..., 0]
            parts.append((x, quat_multiply(quat, spin), scales, opacities, colors, rot[..., 2], OBJECT + 1 + k))
    factor, light = free(gain).exp(), free(m.light)
    g = concatenate([
        Gaussians(*geometry, colors * shading(normal, light)[:, None] * factor, torch.full((len(normal),), name))
        for *geometry, colors, normal, name in parts
    ])  # fmt: skip
    h, w = view.image.shape[:2]
    camera = torch.eye(4)[None], view.K[None], w, h
    return splat(g.means, g.quats, g.scales, g.opacities, g.colors, *camera, ids=g.ids, n_ids=1 + len(m.gloves))


def _image_loss(view: View, out: Splatted) -> Tensor:
    """Colour where the picture and the rendering agree on whose pixel it is, alpha where the masks know it."""
    color, shares = out.color[0], out.ids[0]
    mine = (view.label * shares.detach()).sum(-1, keepdim=True)
    weight = mine * (mine > 0.5)
    count = weight.mean()
    loss = 0.0 * color.sum()
    if count > 1e-3:
        sure = (weight > 0).float()
        loss = 0.8 * l1(color, view.image, weight) + 0.2 * (1 - ssim(color * sure, view.image * sure)) / sure.mean()
    if view.has_object:
        wrong = view.known * (shares[..., OBJECT] - view.target).square()
        loss = loss + 0.5 * wrong.sum() / view.target.sum().clamp(min=50)
    if shares.shape[-1] > 1:
        on = view.label[..., 1:]
        over = view.empty[..., None] * shares[..., 1:]
        loss = loss + 0.1 * ((on * (1 - shares[..., 1:]).square()).sum() + over.square().sum()) / on.sum().clamp(min=50)
    return loss


def _finish(views: list[View], m: _Model, n: int) -> Appearance:
    """Measure, fold the mean light into the colours, and hand the bodies over as plain Gaussians."""
    body, at = m.body, [v.frame for v in views if not v.held_out]
    log_gain = np.zeros((n, 3))
    if at:  # a held-out frame's gain is not fitted: it is between its neighbours'
        taught = np.stack([m.gains[i].numpy() for i in at])
        log_gain = np.stack([np.interp(np.arange(n), at, taught[:, c]) for c in range(3)], -1)
    error = {"all": [0.0, 0], "object": [0.0, 0]}
    inter = union = 0.0
    factor = []
    shown = {side: torch.zeros(2, len(g.color)) for side, g in m.gloves.items()}
    for v in views:
        out = _render(v, m, torch.from_numpy(log_gain[v.frame]).float(), learn=False, move=False)
        _count_shown(v, out, m, shown)
        if v.has_object:
            drawn, want, known = out.ids[0, ..., OBJECT] > 0.5, v.target > 0.5, v.known > 0
            inter += float((drawn & want & known).sum())
            union += float(((drawn | want) & known).sum())
            r, t = m.poses.at(v.frame)
            normal = body.rot[..., 2] @ r.T
            facing = ((normal * (body.points @ r.T + t)).sum(-1) < 0) & body.observed[:, 0]
            if facing.any():
                factor.append(float(shading(normal[facing], m.light).mean()) * np.exp(log_gain[v.frame]))
        if v.held_out:
            e = (out.color[0].clamp(0, 1) - v.image).square().mean(-1)
            for name, where in (("all", v.label.sum(-1) > 0), ("object", v.label[..., OBJECT] > 0)):
                error[name][0] += float(e[where].sum())
                error[name][1] += int(where.sum())
    psnr = {k: float(-10 * np.log10(max(s / c, 1e-12))) if c else float("nan") for k, (s, c) in error.items()}
    mean = torch.from_numpy(np.mean(factor, axis=0)).float() if factor else torch.ones(3)

    def plain(offset: Tensor, spin: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor) -> tuple[Tensor, ...]:
        return offset, spin, scales, opacities, (colors * mean).clamp(0, 1)

    offset, spin, scales, opacities, colors = plain(*body.local())
    colors = torch.where(body.observed, colors, body.start.sigmoid())
    found = Gaussians(*body.placed(offset, spin), scales, opacities, colors, torch.full((len(colors),), OBJECT))
    hands = {
        side: HandGaussians(g.faces, g.face, g.bary, *plain(*g.local()), OBJECT + 1 + k, _is_seen(*shown[side]))
        for k, (side, g) in enumerate(m.gloves.items())
    }
    gain = np.exp(log_gain) / mean.numpy()
    poses = m.poses.result(n)
    return Appearance(found, hands, poses, m.light.detach(), gain, psnr["all"], psnr["object"], inter / max(union, 1.0))


def _count_shown(v: View, out: Splatted, m: _Model, shown: dict[str, Tensor]) -> None:
    """Add to (2,N) of each hand in how many pixels a Gaussian is what is seen: of its label, and of any."""
    first = len(m.body.color) if v.has_object else 0
    for k, (side, g) in enumerate(m.gloves.items()):
        if v.frame in g.base:
            which = out.median[0].long() - first
            on = (which >= 0) & (which < len(g.color))
            mine = on & (v.label[..., OBJECT + 1 + k] > 0)
            for row, pixels in zip(shown[side], (mine, on), strict=True):
                row += torch.bincount(which[pixels], minlength=len(row))
            first += len(g.color)


def _is_seen(mine: Tensor, anywhere: Tensor) -> Tensor:
    return (mine >= 4) & (mine > 0.7 * anywhere)
