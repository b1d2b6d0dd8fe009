"""HOLD: compositional neural signed-distance fields of hands and a rigid object (Fan et al., CVPR 2024).

Top to bottom as in the paper: poses to start from, pre-training of the fields, pose refinement under the constraints of
interaction, joint training with the refined poses. Networks and grids are kept from stage to stage (the authors' code
starts them anew). What follows the paper, what departs from it, and why: docs/methods/hold.md.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch

from ..errors import StageFailed
from ..kernels.grid import SdfGrid
from ..losses import eikonal
from ..scene import Mesh, Sequence
from ..shapes.sdf import bake_sdf, redistance
from ..shapes.sdf_fit import SdfFitConfig, Stage
from ..tracking.object import REACH, ObjectField, inside_solids, refine_object
from .base import Fitted
from .crops import median_color
from .fine import THIN_FINE, finished, frame_confidence
from .hold_canonical import RigidPoses, SkinnedPoses
from .hold_fields import Background, GridField, NetworkField, NetworkSize, field_mesh
from .hold_files import grown, scene_tensors
from .hold_losses import template
from .hold_rays import pixel_table
from .hold_scene import Density, HoldBody, HoldScene, Sampling
from .hold_train import Templates, Training, field_eikonal, near_template, train
from .placing import Placing, enough, place, prune
from .rigid import no_surface
from .settings import HoldConfig

PRETRAIN = (Stage(80, 350, (1.2, 0.6), 1.0),)  # of the object's grid, alone
HAND_RESOLUTION = 96
NETWORK_RESOLUTION = 112  # of the grid that a network's surface is finished on
REFINE = 150  # steps of the pose refinement
HAND_RATE, SCALE_RATE = 1e-4, 2e-4
PAPER = NetworkSize()
BALL = 1.3  # of the object's radius: what the unit ball of its network is
TEMPLATE_STEPS = 1000


@dataclass(frozen=True)
class Held:
    """What `hold_scene_of` finds: the trained scene and what it was made of."""

    scene: HoldScene
    start: Placing
    templates: Templates
    pretrained: ObjectField | None


def fit_hold(
    sequence: Sequence,
    tracks,
    config: HoldConfig,
    seed: int = 0,
    pose_lr: float = 1e-4,
    progress: Callable[[float, str], None] | None = None,
    registration: bool = True,
    device: str = "cpu",
    mirror: bool = True,
) -> Fitted:
    """Fit one clip from its masks and `stages.track.Tracks`. Deterministic for a seed on one device.

    mirror: complete unseen surface from its mirror image. pose_lr: radians per step of object poses; 0: they stay (they
    are given). device: where fields are trained.
    """
    say = progress or (lambda share, what: None)
    part = lambda a, b: lambda share, what, **metrics: say(a + (b - a) * share, what, **metrics)  # noqa: E731
    if not enough(sequence, tracks):
        return no_surface(tracks)
    # A weak wish for emptiness where a hand hides the object: a strong one eats what no frame sees.
    sdf_config = SdfFitConfig(pose_lr=pose_lr, hidden=0.05, seed=seed)
    start = place(sequence, tracks, sdf_config, registration, part(0.0, 0.25))
    held, notes = train_clip(sequence, start, config, sdf_config, device, part(0.25, 0.9))
    say(0.9, "surfaces")
    return finish(sequence, held, notes, mirror, seed)


def train_clip(
    sequence: Sequence, start: Placing, config: HoldConfig, sdf_config: SdfFitConfig, device: str, progress: Callable
) -> tuple[Held, list[str]]:
    """The three trainings; the scene they end with, and notes for the report."""
    part = lambda a, b: lambda share, what, **metrics: progress(a + (b - a) * share, what, **metrics)  # noqa: E731
    notes, seed, pose_lr = list(start.notes), sdf_config.seed, sdf_config.pose_lr
    torch.manual_seed(seed)
    if config.preset == "fast":
        held = pretrain_grids(sequence, start, config, sdf_config, part(0.0, 0.4), device)
    else:
        held = pretrain_networks(sequence, start, config, seed, part(0.0, 0.4), device)
    whole = held.scene.background is not None
    table = pixel_table(sequence, start.obs, held.scene.names, start.weight, whole=whole, seed=seed)
    settings = _joint(config, pose_lr, seed)
    if config.refinement and (pose_lr or start.tracked):
        train(held.scene, table, held.templates, refinement(settings), part(0.4, 0.5))
    course = train(held.scene, table, held.templates, settings, part(0.5, 1.0))
    if course:
        notes.append(
            "fields: " + ", ".join(f"{k} {v:.4f}" for k, v in course[-1].items() if k in ("color", "semantic"))
        )
    errors = field_eikonal(held.scene)
    notes.append("eikonal error " + ", ".join(f"{k} {v:.3f}" for k, v in errors.items()))
    return held, notes


def _joint(config: HoldConfig, pose_lr: float, seed: int) -> Training:
    fast = config.preset == "fast"
    return Training(
        iterations=config.iterations if config.iterations is not None else (200 if fast else 80_000),
        rays=1536 if fast else 1280,
        frames=8 if fast else 10,
        widths=(0.8, 0.5) if fast else None,
        network_rate=5e-3 if fast else 5e-4,
        object_rate=pose_lr,
        compositing=config.compositing,
        eikonal=config.eikonal,
        contact=config.contact,
        encoding=config.encoding,
        seed=seed,
    )


def refinement(joint: Training) -> Training:
    """The second stage: poses of hands and object move, and its scale, by outlines, colours and contact; fields stay.

    The outlines are the medium's own (the paper's are of a soft rasteriser), so that bodies hide each other here too.
    """
    scale_rate = SCALE_RATE if joint.object_rate else 0.0  # given poses are metric
    return replace(
        joint, iterations=REFINE, rays=1024, fields=False, hand_rate=HAND_RATE, scale_rate=scale_rate, widths=(1.2, 0.8)
    )


def pretrain_grids(
    sequence: Sequence, start: Placing, config: HoldConfig, sdf_config: SdfFitConfig, progress, device: str
) -> Held:
    """Grids: the object's from its own pixels (NeuS in a band), the hands' from their template."""
    fitted = refine_object(
        start.obs, start.cam_from_object, start.weight, PRETRAIN, sdf_config, start.coarse, solids=start.solids,
        points=start.points, progress=progress,
    )  # fmt: skip
    prune(fitted.grid, start.solids, THIN_FINE)
    redistance(fitted.grid)
    density = config.density_kind
    n = len(sequence)
    poses = RigidPoses(fitted.cam_from_object, fitted.center, fitted.radius)
    unit = fitted.radius
    bodies = [
        HoldBody(
            "object", poses, GridField(n, fitted.grid, fitted.light), Density(density, fitted.grid.h, unit, False),
            Sampling(True),
        )
    ]  # fmt: skip
    templates = Templates(object=fitted.grid, empty=empty_of(start), points=start.points)
    for side, track in start.tracked.items():
        hand = SkinnedPoses(side, track)
        grid = hand_template(hand, median_color(sequence, side))
        templates.hands[side] = SdfGrid(grid.data, grid.lo, grid.h)
        bodies.append(
            HoldBody(side, hand, GridField(n, grid), Density(density, grid.h, 0.1, False), Sampling(True, edges=8))
        )
    scene = HoldScene(bodies)
    scene.modules().to(device)
    return Held(scene, start, templates, fitted)


def pretrain_networks(
    sequence: Sequence, start: Placing, config: HoldConfig, seed: int, progress, device: str, size: NetworkSize = PAPER
) -> Held:
    """Networks: hands' fitted to their template, the object's a sphere; then trained together with the first poses."""
    coarse, n = start.coarse, len(sequence)
    poses = RigidPoses(start.cam_from_object, coarse.center, coarse.radius)
    unit = BALL * coarse.radius
    laws = lambda unit: Density(config.density_kind, 0.05 * unit, unit, True)  # noqa: E731
    bodies = [HoldBody("object", poses, NetworkField(n, coarse.center, unit, size), laws(unit), Sampling(False))]
    templates = Templates(object=coarse.grid, empty=empty_of(start), points=start.points)
    for side, track in start.tracked.items():
        hand = SkinnedPoses(side, track)
        v = hand.rest()[0]
        middle = 0.5 * (v.min(0) + v.max(0))
        unit = float(np.linalg.norm(v - middle, axis=1).max()) + 0.01
        templates.hands[side] = hand_template(hand)
        bodies.append(HoldBody(side, hand, NetworkField(n, middle, unit, size), laws(unit), Sampling(False)))
    behind = None
    if config.background:
        centre = np.nanmedian(start.cam_from_object[:, :3, :3] @ coarse.center + start.cam_from_object[:, :3, 3], 0)
        behind = Background(n, torch.as_tensor(centre), 4 * coarse.radius + 0.2)
    scene = HoldScene(bodies, behind, shared=True)
    scene.modules().to(device)
    for b in bodies:
        if b.name in templates.hands:
            fit_template(b, templates.hands[b.name], TEMPLATE_STEPS, seed)
    joint = _joint(config, 0.0, seed)
    table = pixel_table(sequence, start.obs, scene.names, start.weight, whole=config.background, seed=seed)
    train(scene, table, templates, replace(joint, iterations=joint.iterations // 2), progress)
    return Held(scene, start, templates, None)


def empty_of(start: Placing) -> torch.Tensor:
    """(E,3) points of the object's rest space where the hands are."""
    return inside_solids(start.coarse.center, REACH * start.coarse.radius, start.solids)[0]


def fit_template(body: HoldBody, grid: SdfGrid, steps: int, seed: int, rate: float = 1e-3) -> float:
    """Fit a network to the hand's template before any pixel is seen (HOLD loads networks trained so); the last loss,
    metres."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(body.field.shape.parameters(), lr=rate)
    loss = torch.zeros(())
    for k in range(steps):
        x = near_template(body, grid, generator)
        sdf, gradient = body.field.gradient(x.to(body.field.center))
        known = grid.sample(x)[0][:, 0].detach().to(sdf)
        loss = template(sdf, known, clamp=0.05)
        optimizer.param_groups[0]["lr"] = rate * 0.1 ** (k / steps)
        optimizer.zero_grad()
        (loss / body.field.radius + 0.1 * eikonal(gradient)).backward()
        optimizer.step()
    return float(loss.detach())


def hand_template(hand: SkinnedPoses, color: torch.Tensor | None = None, resolution: int = HAND_RESOLUTION) -> SdfGrid:
    """The hand's template at rest as a grid, of one colour (3,)."""
    v, f = hand.rest()
    mesh = Mesh(v.astype(np.float32), f, None if color is None else np.tile(np.asarray(color, np.float32), (len(v), 1)))
    return bake_sdf(mesh, resolution, margin=0.15)


def finish(sequence: Sequence, held: Held, notes: list[str], mirror: bool = True, seed: int = 0) -> Fitted:
    """Meshes, colours, tracks and files out of the trained scene."""
    start = held.start
    held.scene.modules().to("cpu")
    scene = replace(held.scene, bodies=[grown(b) for b in held.scene.bodies])
    by_name = {b.name: b for b in scene.bodies}
    object_ = by_name["object"]
    poses = object_.poses.result()
    tracked = {s: by_name[s].poses.result() if s in by_name else t for s, t in start.tracked.items()}
    confidence = start.confidence
    if held.pretrained is not None:
        confidence = frame_confidence(held.pretrained, start.confidence)
    try:
        if isinstance(object_.field, GridField):
            grid = object_.field.grid
        else:
            grid = bake_sdf(field_mesh(object_.field)[0], NETWORK_RESOLUTION)
        done = finished(sequence, start, grid, poses, mirror, seed)
    except StageFailed as e:
        return Fitted(None, poses, confidence, start.reason, tracked, [*notes, str(e)])
    notes += done.notes
    if done.mesh is None:
        return Fitted(None, poses, confidence, start.reason, tracked, notes)
    mesh = done.mesh
    if isinstance(object_.field, GridField):
        object_.field.grid.data[..., 0] = done.grid.data[..., 0]
    tensors = scene_tensors(scene)
    hands, colors = {}, {}
    for side in tracked:
        if side not in by_name:
            continue
        body = by_name[side]
        v = torch.as_tensor(body.poses.rest()[0][:-1], dtype=torch.float32, device=body.field.light.device)
        colors[side] = body.field.albedo(v).cpu().numpy()  # the last vertex seals the wrist
        try:
            hands[f"{side}_field"] = field_mesh(body.field)[0]
        except StageFailed as e:
            notes.append(f"the {side} hand's field: {e}")
    return Fitted(
        mesh, poses, confidence, start.reason, tracked, notes, tensors=tensors, meshes=hands, hand_colors=colors
    )
