"""BIGS: two hands and an unknown object as Gaussians (after On et al., CVPR 2025; docs/methods/bigs.md).

Every frame is placed and a fine surface fitted first, as all methods do. Then the Gaussians: stage 1 teaches each
subject by itself, stage 2 draws all together in true occlusion order and moves hands and object until pictures,
contact and steadiness agree.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..geometry.meshes import vertex_normals
from ..geometry.queries import MeshQueries
from ..hand import HandModel
from ..priors.sds import SKIPPED, Guidance
from ..scene import Mesh, Sequence
from ..shapes.sdf_fit import SdfFitConfig
from ..shapes.skinned import SkinnedGaussians
from .base import HAND_SPLATS, OBJECT_SPLATS, Fitted, posed_hand
from .bigs_contact import (
    Figures,
    Pairs,
    attraction,
    distances,
    entering,
    figures,
    find_pairs,
    fingers,
    overlap,
    untouched,
)
from .bigs_decoders import Decoded, Explicit
from .bigs_density import CAP, Movement, densify
from .bigs_hands import HandPoses, Template
from .bigs_losses import Features, color_spread, perceptual, skinning_drift
from .bigs_model import Score, Subjects, detached, draw, draw_unseen, mean_light, score
from .crops import View, crops, median_color
from .fine import FineSurface, fine_surface
from .held_out import NAME as HELD_OUT
from .held_out import HeldOut
from .placing import Placing, enough, place
from .rigid import MIN_IOU, no_surface
from .settings import BigsConfig
from .surfels import OBJECT, ObjectBase, ObjectPoses, image_loss

POSE_LR = 1e-3  # object: radians, and object radii, per step
TURN_LR, SHIFT_LR = 6e-3, 1e-3  # hands: radians and metres per step
SURE_SHIFT, SURE_TURN = 0.02, 0.12  # metres and radians off the tracked hand that cost as much as WEIGHTS["tracked"]
EVERY, GROWTH = 100, 0.7  # steps between changes of the Gaussians' number, and the share of a stage with any
PRIOR_SIZE = 128  # pixels of the pictures shown to a prior
WEIGHTS = {
    "tracked": 0.02,  # hands stay near the tracked pose
    "limits": 0.1,  # joints stay within a hand's
    "steady": 0.02,  # of velocity changes, radians and centimetres squared
    "contact": 0.1,  # per metre; more draws whole hands into the object
    "overlap": 1.5,  # per metre
    "skinning": 100.0,  # weights stay the template's
    "perceptual": 0.1,  # with a network of the user's alone
    "smooth": 0.02,  # a hand's colours are like their surroundings'
}


def fit_bigs(
    sequence: Sequence,
    tracks,
    config: BigsConfig = BigsConfig(),  # noqa: B008
    seed: int = 0,
    pose_lr: float = 1e-4,
    device: str = "cpu",
    registration: bool = True,
    mirror: bool = True,
    prior: Guidance | None = None,
    features: Features | None = None,
    progress: Callable[[float, str], None] | None = None,
) -> Fitted:
    """Fit one clip from its masks and `stages.track.Tracks`. Deterministic for a seed on one device.

    pose_lr: radians per step of the pose refinement with the surface; device: of the Gaussians (the surface's grid
    stays on the CPU); mirror: complete unseen surface from its mirror image; prior: colours what no frame has seen;
    None leaves it as it is; features: a network for the perceptual loss (`bigs_losses.perceptual`), none by default.
    """
    say = progress or (lambda share, what: None)
    part = lambda a, b: lambda share, what, **metrics: say(a + (b - a) * share, what, **metrics)  # noqa: E731
    if not enough(sequence, tracks):
        return no_surface(tracks)
    sdf = SdfFitConfig(pose_lr=pose_lr, hidden=0.05, seed=seed)

    # 1. Every frame placed, and the fine surface.
    start = place(sequence, tracks, sdf, registration, part(0.0, 0.1))
    fine = fine_surface(sequence, start, sdf, part(0.1, 0.25), mirror=mirror)
    notes = [*start.notes, *fine.notes]
    poses = fine.field.cam_from_object
    if fine.mesh is None:
        return Fitted(None, poses, fine.confidence, start.reason, start.tracked, notes)

    # 2. The subjects: Gaussians on the surface and on the hands.
    weight = np.nan_to_num(start.weight)
    views = [
        v.to(device) for v in crops(sequence, weight, poses, {s: v for s, (v, _) in start.hands.items()})
    ]  # fmt: skip
    generator = torch.Generator().manual_seed(seed)
    s = subjects(sequence, start, fine.mesh, poses, views, config, generator, device, seed)
    s.complete = prior is not None
    if prior is None and not fine.mesh.observed.all():
        notes.append(SKIPPED)

    # 3. Stage 1: each subject alone.
    alone = min(config.alone * len(views), config.steps)
    optimiser = optimiser_of(s)
    learn = partial(train, views, s, optimiser, config, generator=generator, features=features)
    learn(alone, interaction=None, prior=prior, say=part(0.25, 0.45))
    before = score(views, s)

    # 4. Stage 2: together, with the poses.
    touch = meetings(start, s, poses, fine.mesh)
    met = {side: t.figures() for side, t in touch.items()}
    if config.stage2:
        both = min(config.together * len(views), max(config.steps - alone, 0))
        learn(both, interaction=Interaction(fine.field.grid, touch), prior=None, say=part(0.45, 1.0))
    return finish(sequence, start, fine, views, s, config, before, met, touch, notes)


def subjects(
    sequence: Sequence,
    start: Placing,
    mesh: Mesh,
    poses: np.ndarray,
    views: list[View],
    config: BigsConfig,
    generator: torch.Generator,
    device: str,
    seed: int,
) -> Subjects:
    """Gaussians where they start."""
    base = ObjectBase.on(mesh, config.count, generator).to(device)
    frames = [v.frame for v in views]
    tracks = start.tracked
    hands = {side: HandPoses(side, t, frames, device) for side, t in tracks.items()}
    template = Template.of({side: t.betas for side, t in tracks.items()}, config.levels, device) if tracks else None
    skins = {side: median_color(sequence, side).to(device) for side in tracks}

    def source(points: Tensor, colors: Tensor, bones: int, k: int) -> torch.nn.Module:
        if config.variant == "plain":
            return Explicit(colors, bones)
        room = 0.05 * (points.amax(0) - points.amin(0)) + 1e-4
        box = points.amin(0) - room, points.amax(0) + room
        return Decoded(points, *box, colors, bones, config.resolution, config.features, seed + k)

    sources: dict[str, torch.nn.Module] = {}
    shared = torch.stack(list(skins.values())).mean(0) if skins else None
    for k, side in enumerate(tracks):
        if config.shared_hands and sources:
            sources[side] = next(iter(sources.values()))
            continue
        skin = shared if config.shared_hands else skins[side]
        sources[side] = source(template.canonical, skin.expand(len(template), 3), 16, 1 + k)
    return Subjects(
        base,
        source(base.points, base.colors, 0, 0),
        template,
        sources,
        hands,
        ObjectPoses(poses, base.points, views),
        torch.zeros(9, device=device, requires_grad=True),
        {v.frame: torch.zeros(3, device=device, requires_grad=True) for v in views if not v.held_out},
        base.colors.clamp(0.01, 0.99).logit(),
    )


def optimiser_of(s: Subjects) -> torch.optim.Adam:
    """Adam over all there is; what has no gradient in a step is left alone."""
    modules = [s.object, *{id(m): m for m in s.sources.values()}.values()]
    groups = [g for m in modules for g in m.groups()]
    groups.append({"params": [s.light, *s.gains.values()], "lr": 5e-3})
    groups.append({"params": [*s.poses.rotation.values(), *s.poses.shift.values()], "lr": POSE_LR})
    for h in s.hands.values():
        groups.append({"params": list(h.turn.values()), "lr": TURN_LR})
        groups.append({"params": list(h.shift.values()), "lr": SHIFT_LR})
    for g in groups:
        g["full"] = g["lr"]
    return torch.optim.Adam(groups, betas=(0.9, 0.99), eps=1e-12)


@dataclass(frozen=True)
class Meeting:
    """How one hand holds the object."""

    pairs: Pairs
    hand: np.ndarray  # (F,V,3) sealed hand, object frame
    faces: np.ndarray
    queries: MeshQueries

    def figures(self) -> Figures:
        return figures(self.hand, self.faces, self.queries, np.flatnonzero(self.pairs.active.any(1)))


@dataclass(frozen=True)
class Interaction:
    """What stage 2 knows beside the pictures."""

    grid: object  # SdfGrid of the object
    touch: dict[str, Meeting]


def meetings(
    start: Placing, s: Subjects, poses: np.ndarray, mesh: Mesh, kept: dict | None = None
) -> dict[str, Meeting]:
    """side -> contact of its hand as it is posed now."""
    queries = MeshQueries(np.asarray(mesh.vertices, np.float64), mesh.faces)
    out = {}
    for side, h in s.hands.items():
        vertices, faces = posed_hand(side, h.result())
        hand = np.einsum("fvj,fjk->fvk", vertices - poses[:, None, :3, 3], poses[:, :3, :3])
        pairs = find_pairs(hand, queries) if kept is None else kept[side].pairs
        out[side] = Meeting(pairs, hand, faces, queries)
    return out


def train(
    views: list[View],
    s: Subjects,
    opt: torch.optim.Adam,
    config: BigsConfig,
    steps: int,
    generator: torch.Generator,
    interaction: Interaction | None,
    prior: Guidance | None,
    say: Callable[[float, str], None],
    features: Features | None = None,
) -> None:
    """One stage, a frame per step: without `interaction` each subject alone and poses fixed, with it all together."""
    together = interaction is not None
    neighbours = near(s.template.canonical) if s.template is not None else None
    grows = config.densify and config.variant == "plain"
    movement = Movement.of(len(s.base.points), s.base.points.device)
    sides = torch.Generator().manual_seed(config.steps)  # of its own: without a prior all else is drawn alike
    order: list[View] = []
    for k in range(steps):
        if not order:
            order = [views[i] for i in torch.randperm(len(views), generator=generator)]
            if together and s.poses.frames:
                s.poses.recentre()
        view = order.pop()
        fade = 0.1 ** (k / steps) if together else 1.0
        for g in opt.param_groups:
            g["lr"] = g["full"] * fade
        if view.held_out and not together:
            continue
        learn = not view.held_out
        with torch.set_grad_enabled(learn):
            values = s.object_values() if view.has_object else None
            rest = s.rest_hands(held := s.hand_values()) if s.hands else {}
        if not learn:
            values, rest = detached(values, rest)
        wholes = [None] if together else [{OBJECT}, set(s.ids().values())]
        drawn = [d for b in wholes if (d := draw(view, s, values, rest, learn, together, b)) is not None]
        if not drawn:
            continue
        loss = sum(view.weight * image_loss(view, d.out, d.bodies) for d in drawn)
        if features is not None and learn:
            for d in drawn:
                sure = view.label[..., list(d.bodies)].sum(-1, keepdim=True)
                loss = loss + WEIGHTS["perceptual"] * perceptual(features, d.out.color[0], view.image, sure)
        if learn:
            loss = loss + regularisers(s, values, rest, held if s.hands else {}, neighbours, view)
        if together:
            loss = loss + motion(s, view, interaction, config)
        if prior is not None:
            loss = loss + prior.loss(*draw_unseen(s, PRIOR_SIZE, sides), sides)
            prior.advance()
        means = drawn[0].means if grows and learn else None
        if means is not None:
            means.retain_grad()
        opt.zero_grad()
        loss.backward()
        if means is not None:
            movement.add(means.detach(), means.grad, float(view.K[0, 0]))
        opt.step()
        if grows and k % EVERY == EVERY - 1 and k < GROWTH * steps:
            cap = int(CAP * config.count)
            s.base, s.start = densify(opt, s.object, s.base, s.start, movement, cap, generator)
            movement = Movement.of(len(s.base.points), s.base.points.device)
        if k % 25 == 24:
            stage = "together" if together else "each alone"
            say((k + 1) / steps, f"Gaussians {stage}, loss {loss.item():.3f}")
    if together and s.poses.frames:
        s.poses.recentre()


def regularisers(s: Subjects, values, rest: dict, held: dict, neighbours: Tensor | None, view: View) -> Tensor:
    """Gaussians stay on their surface, hands' colours smooth, skinning the template's, light and gain small."""
    loss = 1e-3 * s.light.square().sum() + 0.02 * s.gains[view.frame].square().sum()
    if values is not None:
        loss = loss + values.free.prior(s.start)
    for v in held.values():
        loss = loss + v.free.prior(v.free.color.detach())
        loss = loss + WEIGHTS["smooth"] * color_spread(v.free.color.sigmoid(), neighbours)
    for h in rest.values():
        loss = loss + WEIGHTS["skinning"] * skinning_drift(h.weights, s.template.weights)
    return loss


def motion(s: Subjects, view: View, interaction: Interaction, config: BigsConfig) -> Tensor:
    """What poses answer for beside the picture: tracking, limits, steadiness, contact and overlap."""
    i = view.frame
    loss = s.light.sum() * 0
    if view.has_object:
        loss = loss + s.poses.prior(i)
    object_pose = {k: s.poses.at(k) for k in (i - 1, i, i + 1) if k in s.poses.rotation}
    for side, h in s.hands.items():
        if i not in h.turn:
            continue
        pairs = interaction.touch[side].pairs
        on = pairs.active[i]
        holds = on.any() and i in object_pose
        loss = loss + WEIGHTS["tracked"] * h.prior(i, SURE_SHIFT, SURE_TURN) + WEIGHTS["limits"] * h.limits(i)
        loss = loss + WEIGHTS["steady"] * h.unsteady(i, object_pose if holds else None)
        if holds and config.contact:
            r, t = object_pose[i]
            vertices = (h.posed(i).vertices - t) @ r
            anchors = torch.as_tensor(pairs.anchors[on], dtype=vertices.dtype, device=vertices.device)
            inside, out = (x.to(vertices.device) for x in distances(interaction.grid, vertices.cpu()))
            apart = untouched(inside.detach(), fingers(h.model.weights))[pairs.ids[on]]
            loss = loss + WEIGHTS["contact"] * attraction(vertices[pairs.ids[on]][apart], anchors[apart])
            skin = vertex_normals(vertices.detach(), h.model.faces)
            loss = loss + WEIGHTS["overlap"] * overlap(entering(inside, skin, out.detach()))
    return loss


def near(points: Tensor, k: int = 6) -> Tensor:
    """(N,k) indices of the nearest other points."""
    x = points.detach().cpu().double().numpy()
    return torch.from_numpy(cKDTree(x).query(x, k + 1)[1][:, 1:]).to(points.device)


@torch.no_grad()
def drop_what_does_not_help(views: list[View], s: Subjects) -> list[str]:
    """Put back the poses of each body with which frames that taught no colour agree less than with those before."""
    judges = [v for v in views if v.held_out] or views
    values, rest = s.object_values(), s.rest_hands() if s.hands else {}

    def cost() -> float:
        drawn = [(v, d) for v in judges if (d := draw(v, s, values, rest)) is not None]
        return float(sum(v.weight * image_loss(v, d.out, d.bodies) for v, d in drawn))

    notes = []
    moves = {"object": (s.poses.rotation, s.poses.shift)}
    moves |= {f"{side} hand": (h.turn, h.shift) for side, h in s.hands.items()}
    for name, parts in moves.items():
        refined, kept = cost(), [{i: x.clone() for i, x in p.items()} for p in parts]
        for x in (x for p in parts for x in p.values()):
            x.zero_()
        if cost() > refined:
            for p, k in zip(parts, kept, strict=True):
                for i, x in p.items():
                    x.copy_(k[i])
        else:
            notes.append(f"the {name}'s refined poses explained held-out frames worse and were dropped")
    return notes


@torch.no_grad()
def held_out(sequence: Sequence, views: list[View], s: Subjects) -> dict[str, np.ndarray]:
    """Frames that taught no colour as they are drawn, for `3_fit/held_out.npz`."""
    found = HeldOut(sequence, list(s.hands))
    values, rest = s.object_values(), s.rest_hands() if s.hands else {}
    for v in views:
        if v.held_out and (drawn := draw(v, s, values, rest)) is not None:
            found.add(v, drawn.out.color[0], drawn.out.ids[0])
    return found.arrays()


def finish(
    sequence: Sequence,
    start: Placing,
    fine: FineSurface,
    views: list[View],
    s: Subjects,
    config: BigsConfig,
    before: Score,
    met: dict[str, Figures],
    touch: dict[str, Meeting],
    notes: list[str],
) -> Fitted:
    """Measure, keep what held-out frames agree with, fold the light into the colours."""
    if config.stage2:
        notes += drop_what_does_not_help(views, s)
    after = score(views, s)
    poses, tracked = s.poses.result(), {side: h.result() for side, h in s.hands.items()}
    factor = mean_light(views, s)
    arrays, colors = {HELD_OUT: held_out(sequence, views, s)}, {}
    with torch.no_grad():
        offset, quats, scales, opacities, color = s.object_values().free.local(s.base.spacing)
        x, quats = s.base.placed(offset, quats)
        color = torch.where(s.base.observed, (color * factor).clamp(0, 1), color)
        found = {"means": x, "quats": quats, "scales": scales, "opacities": opacities, "colors": color}
        arrays[OBJECT_SPLATS] = {k: v.cpu().numpy() for k, v in found.items()}
        for side, hand in (s.rest_hands() if s.hands else {}).items():
            g = hand.gaussians.with_values(colors=(hand.gaussians.colors * factor).clamp(0, 1))
            arrays[HAND_SPLATS[side]] = SkinnedGaussians(g, hand.weights).arrays()
            colors[side] = g.colors[: len(HandModel.open(side).v_template)].cpu().numpy()
    now = meetings(start, s, poses, fine.mesh, touch)
    figures_now = {side: m.figures() for side, m in now.items()}
    told = {f"{k}_{name}": np.float64(getattr(x, k)) for name, x in (("alone", before), ("together", after))
            for k in ("psnr", "psnr_object", "psnr_hands", "ssim", "iou")}  # fmt: skip
    for name, side_figures in (("alone", met), ("together", figures_now)):
        for side, f in side_figures.items():
            told |= {
                f"{k}_{side}_{name}": np.float64(getattr(f, k)) for k in ("penetration_cm3", "depth_mm", "contact")
            }
    arrays["bigs_metrics"] = told
    notes.append(
        f"Gaussians: {after.psnr:.1f} dB and SSIM {after.ssim:.3f} on held-out frames' foreground "
        f"(object {after.psnr_object:.1f} dB, hands {after.psnr_hands:.1f} dB; "
        f"each subject alone: {before.psnr:.1f} dB), object mask IoU {after.iou:.2f}"
    )
    for side, f in figures_now.items():
        if f.frames:
            b = met[side]
            notes.append(
                f"{side} hand and object: overlap {b.penetration_cm3:.2f} to {f.penetration_cm3:.2f} cm3, "
                f"touching in {100 * b.contact:.0f} to {100 * f.contact:.0f} % of the frames that hold"
            )
    doubts = []
    if after.iou < MIN_IOU:
        doubts.append(
            f"The object does not explain its masks (IoU {after.iou:.2f}): it may not be one rigid object, or none."
        )
    return Fitted(
        fine.mesh, poses, fine.confidence, start.reason, tracked, notes, doubts, fine.ambiguous, arrays, colors
    )
