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
from torch import Tensor

from ..geometry.meshes import area
from ..geometry.rigid import quat_from_matrix, quat_multiply
from ..render import Splatted, splat
from ..scene import Mesh, Sequence
from ..shapes.gaussians import Gaussians, concatenate
from ..shapes.sdf_fit import shading
from .bound import HandGaussians, on_triangles
from .crops import View, crops, median_color
from .held_out import HeldOut
from .surfels import OBJECT, Free, ObjectBase, ObjectPoses, even_samples, image_loss

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
    held_out: dict[str, np.ndarray]  # `HeldOut.arrays`


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
    body = _ObjectSurfels(ObjectBase.on(mesh, count, generator))
    gloves = {s: _HandSurfels(v, f, hand_count, median_color(sequence, s), generator) for s, (v, f) in hands.items()}
    poses = ObjectPoses(cam_from_object, body.base.points, views)
    m = _Model(
        body,
        gloves,
        poses,
        torch.zeros(9, requires_grad=True),
        {v.frame: torch.zeros(3, requires_grad=True) for v in views},
    )
    discs = [body, *gloves.values()]
    groups = [
        {"params": [d.free.color for d in discs] + [d.free.opacity for d in discs], "lr": 0.05},
        {"params": [d.free.offset for d in discs], "lr": 0.02},
        {"params": [d.free.size for d in discs] + [d.free.spin for d in discs], "lr": 0.01},
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
        loss = view.weight * image_loss(view, _render(view, m, m.gains[view.frame], learn=not view.held_out, move=move))
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
        return _finish(sequence, views, m)


# --- what is optimised


class _Surfels:
    """Discs around base points."""

    def __init__(self, colors: Tensor, spacing: float):
        self.spacing = spacing
        self.free = Free(*(x.clone().requires_grad_(True) for x in Free.of(colors)))
        self.start = self.free.color.detach().clone()

    def local(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Offsets, quats (in the base frame), scales, opacities, colours."""
        return self.free.local(self.spacing)

    def prior(self) -> Tensor:
        return self.free.prior(self.start)


class _ObjectSurfels(_Surfels):
    def __init__(self, base: ObjectBase):
        super().__init__(base.colors, base.spacing)
        self.base = base

    def local(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        *rest, colors = super().local()
        return *rest, torch.where(self.base.observed, colors, self.start.sigmoid())


class _HandSurfels(_Surfels):
    """Discs on a hand, with where each frame's mesh puts their base points."""

    def __init__(self, vertices: np.ndarray, faces: np.ndarray, count: int, skin: Tensor, generator: torch.Generator):
        v, f = torch.from_numpy(np.asarray(vertices, np.float32)), torch.from_numpy(np.asarray(faces)).long()
        known = torch.isfinite(v).all(-1).all(-1).nonzero()[:, 0].tolist()
        rest = v[known[0]] if known else torch.randn(v.shape[1:], generator=generator)
        super().__init__(skin.expand(count, 3), float(area(rest, f) / count) ** 0.5)
        self.faces = np.asarray(faces)
        self.face, self.bary, _ = even_samples(rest, f, count, generator)
        self.base = {i: on_triangles(v[i], self.faces, self.face, self.bary) for i in known}


@dataclass(frozen=True)
class _Model:
    """All that is optimised."""

    body: _ObjectSurfels
    gloves: dict[str, _HandSurfels]
    poses: ObjectPoses
    light: Tensor  # (9,)
    gains: dict[int, Tensor]  # frame -> (3,) logarithms


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
        x, quats = m.body.base.placed(offset, spin)
        r, t = m.poses.at(view.frame)
        if not move:
            r, t = r.detach(), t.detach()
        normal = m.body.base.rot[..., 2] @ r.detach().T
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


def _finish(sequence: Sequence, views: list[View], m: _Model) -> Appearance:
    """Measure, fold the mean light into the colours, and hand the bodies over as plain Gaussians."""
    n, held = len(sequence), HeldOut(sequence, list(m.gloves))
    body, at = m.body, [v.frame for v in views if not v.held_out]
    log_gain = np.zeros((n, 3))
    if at:  # a held-out frame's gain is not fitted: it is between its neighbours'
        taught = np.stack([m.gains[i].numpy() for i in at])
        log_gain = np.stack([np.interp(np.arange(n), at, taught[:, c]) for c in range(3)], -1)
    error = {"all": [0.0, 0], "object": [0.0, 0]}
    inter = union = 0.0
    factor = []
    shown = {side: torch.zeros(2, len(g.free.color)) for side, g in m.gloves.items()}
    for v in views:
        out = _render(v, m, torch.from_numpy(log_gain[v.frame]).float(), learn=False, move=False)
        _count_shown(v, out, m, shown)
        if v.has_object:
            drawn, want, known = out.ids[0, ..., OBJECT] > 0.5, v.target > 0.5, v.known > 0
            inter += float((drawn & want & known).sum())
            union += float(((drawn | want) & known).sum())
            r, t = m.poses.at(v.frame)
            normal = body.base.rot[..., 2] @ r.T
            facing = ((normal * (body.base.points @ r.T + t)).sum(-1) < 0) & body.base.observed[:, 0]
            if facing.any():
                factor.append(float(shading(normal[facing], m.light).mean()) * np.exp(log_gain[v.frame]))
        if v.held_out:
            held.add(v, out.color[0], out.ids[0])
            e = (out.color[0].clamp(0, 1) - v.image).square().mean(-1)
            for name, where in (("all", v.label.sum(-1) > 0), ("object", v.label[..., OBJECT] > 0)):
                error[name][0] += float(e[where].sum())
                error[name][1] += int(where.sum())
    psnr = {k: float(-10 * np.log10(max(s / c, 1e-12))) if c else float("nan") for k, (s, c) in error.items()}
    mean = torch.from_numpy(np.mean(factor, axis=0)).float() if factor else torch.ones(3)

    def plain(offset: Tensor, spin: Tensor, scales: Tensor, opacities: Tensor, colors: Tensor) -> tuple[Tensor, ...]:
        return offset, spin, scales, opacities, (colors * mean).clamp(0, 1)

    offset, spin, scales, opacities, colors = plain(*body.local())
    colors = torch.where(body.base.observed, colors, body.start.sigmoid())
    found = Gaussians(*body.base.placed(offset, spin), scales, opacities, colors, torch.full((len(colors),), OBJECT))
    hands = {
        side: HandGaussians(g.faces, g.face, g.bary, *plain(*g.local()), OBJECT + 1 + k, _is_seen(*shown[side]))
        for k, (side, g) in enumerate(m.gloves.items())
    }
    gain = np.exp(log_gain) / mean.numpy()
    poses = m.poses.result()
    iou = inter / max(union, 1.0)
    return Appearance(
        found, hands, poses, m.light.detach(), gain, psnr["all"], psnr["object"], iou, held.arrays()
    )  # fmt: skip


def _count_shown(v: View, out: Splatted, m: _Model, shown: dict[str, Tensor]) -> None:
    """Add to (2,N) of each hand in how many pixels a Gaussian is what is seen: of its label, and of any."""
    first = len(m.body.free.color) if v.has_object else 0
    for k, (side, g) in enumerate(m.gloves.items()):
        if v.frame in g.base:
            which = out.median[0].long() - first
            on = (which >= 0) & (which < len(g.free.color))
            mine = on & (v.label[..., OBJECT + 1 + k] > 0)
            for row, pixels in zip(shown[side], (mine, on), strict=True):
                row += torch.bincount(which[pixels], minlength=len(row))
            first += len(g.free.color)


def _is_seen(mine: Tensor, anywhere: Tensor) -> Tensor:
    return (mine >= 4) & (mine > 0.7 * anywhere)
