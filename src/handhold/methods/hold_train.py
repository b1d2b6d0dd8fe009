"""Training of HOLD's fields and poses on drawn pixels: one loop for both presets and both trainings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ..kernels.grid import SdfGrid
from ..losses import eikonal
from ..render.volume import composite
from ..shapes.sdf import redistance
from ..shapes.sdf_fit import EMPTY_RAY, SurfacePoints, off_points
from . import hold_losses as losses
from .hold_canonical import RigidPoses, SkinnedPoses
from .hold_fields import BANDS, GridField, NetworkField
from .hold_rays import NOTHING, PixelTable
from .hold_scene import HoldBody, HoldScene


@dataclass(frozen=True)
class Training:
    """How the joint training is done. Rates of grids are in voxels, of poses in radians and metres over 0.1."""

    iterations: int = 200
    rays: int = 1536
    frames: int = 8  # per iteration: canonicalisation poses each once
    widths: tuple[float, float] | None = (0.8, 0.5)  # of the density in voxels, start and end; None: learned
    network_rate: float = 5e-4
    grid_rate: float = 0.03
    color_rate: float = 0.05
    object_rate: float = 1e-4  # of object poses; 0: they stay
    hand_rate: float = 0.0  # of hand poses; 0: they stay
    scale_rate: float = 0.0  # of the object's scale; 0: it stays
    fields: bool = True  # off: poses alone move, the fields stay as they are
    compositing: bool = True  # off: each body is rendered as if it were alone
    eikonal: bool = True
    contact: bool = True
    encoding: bool = True  # off: all bands from the start
    bands: tuple[int, int] = (1000, 10000)  # steps over which the bands of the object open (BARF)
    seed: int = 0


WEIGHTS = {
    "semantic": 0.2, "sparsity": 0.1, "template": 5.0, "penetration": 0.5, "contact": 0.2, "smooth": 0.2,
    "eikonal": 0.1, "empty": 2.0, "hidden": 0.05, "points": 0.03,
}  # fmt: skip
GRID_EIKONAL, GRID_SMOOTH = 0.02, 1e-3  # as `shapes.sdf_fit` measured
AWAY = {"object": 0.05}  # metres from the last surface beyond which a ray should meet nothing; hands:
AWAY_HAND = 0.01
EMPTY_DEPTH = 0.01  # metres of the object in a hand that cost 1


@dataclass
class Templates:
    """What fields are held to: last known surfaces, in rest space."""

    hands: dict[str, SdfGrid] = field(default_factory=dict)
    object: SdfGrid | None = None
    empty: Tensor | None = None  # (E,3) where hands rest in the object's frame: it is not there
    points: SurfacePoints | None = None  # of the object's surface


def train(
    scene: HoldScene,
    table: PixelTable,
    templates: Templates,
    settings: Training,
    progress: Callable[[float, str], None] | None = None,
) -> list[dict[str, float]]:
    """Train fields and poses in place; the course of the losses, a row each 25 iterations.

    Deterministic for `settings.seed`. Raises FloatingPointError when a loss is not finite, naming it.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    device = scene.bodies[0].poses.known.device
    optimizer, start_rates = _optimizer(scene, settings)
    course = []
    for k in range(settings.iterations):
        share = k / settings.iterations
        _anneal(scene, settings, k, share)
        for group, rate in zip(optimizer.param_groups, start_rates, strict=True):
            group["lr"] = rate * 0.1**share
        rows = table.draw(settings.frames, settings.rays, generator)
        terms = data_terms(scene, table, templates, rows, device, settings, generator)
        terms |= prior_terms(scene, templates, rows, table, settings, generator)
        loss = sum(terms.values())
        if not bool(torch.isfinite(loss)):
            bad = [name for name, value in terms.items() if not bool(torch.isfinite(value))]
            raise FloatingPointError(f"HOLD's training diverged at step {k}: {', '.join(bad)} is not finite")
        loss.backward()
        for b in scene.bodies:
            if settings.fields:
                b.field.step(
                    GRID_EIKONAL * settings.eikonal, GRID_SMOOTH, settings.grid_rate * 0.2**share,
                    settings.color_rate * 0.3**share,
                )  # fmt: skip
            elif isinstance(b.field, GridField):
                b.field.grid.zero_grad()
        torch.nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 0.5)
        optimizer.step()
        optimizer.zero_grad()
        for b in scene.bodies:
            if isinstance(b.poses, SkinnedPoses):
                if settings.hand_rate and k % 50 == 49:
                    b.poses.refresh()
            elif settings.object_rate:
                b.poses.settle(table.weight.to(device))
        if k % 25 == 24 or k + 1 == settings.iterations:
            course.append({name: float(value.detach()) for name, value in terms.items()})
            if progress:
                progress((k + 1) / settings.iterations, f"fields, loss {float(loss.detach()):.3f}")
    if settings.fields and settings.eikonal and settings.iterations:
        for b in scene.bodies:
            if isinstance(b.field, GridField):  # what no ray asks keeps no slope by the eikonal term alone
                redistance(b.field.grid)
    return course


def data_terms(
    scene: HoldScene,
    table: PixelTable,
    templates: Templates,
    rows: Tensor,
    device: torch.device,
    settings: Training,
    generator: torch.Generator | None = None,
) -> dict[str, Tensor]:
    """Weighted losses of the pixels `rows`: colour, semantics, opacity away from every known surface."""
    rays = table.rays(rows, device)
    color, clear, sure, label = (a[rows].to(device) for a in (table.color, table.clear, table.sure, table.label))
    along = scene.along(rays, True, generator if device.type == "cpu" else None)
    behind = None if scene.background is None else scene.background(rays)
    out: dict[str, Tensor] = {}
    if settings.compositing:
        seen = composite(along, behind)
        opacity = seen.opacity if behind is None else torch.ones_like(seen.opacity)
        body = (label >= 0).float() if behind is None else torch.ones_like(clear)
        weight = clear * body if behind is None else torch.where(label == NOTHING, sure, clear)
        out["color"] = losses.color(seen.rgb, opacity, color, weight)
        out["semantic"] = WEIGHTS["semantic"] * losses.semantic(seen.shares, seen.alone, label, sure)
        alone = seen.alone
    else:
        parts = [composite(along.only(b)) for b in range(len(scene.bodies))]
        own = [losses.color(p.rgb, p.opacity, color, clear * (label == b)) for b, p in enumerate(parts)]
        out["color"] = torch.stack(own).sum()
        alone = torch.cat([p.alone for p in parts], 1)
        each = []
        for b in range(len(scene.bodies)):  # pixels of other bodies tell nothing of this one
            tells = sure * ((label == b) | (label == NOTHING))
            mine = torch.where(label == b, 0, NOTHING)
            each.append(losses.semantic(alone[:, b : b + 1], alone[:, b : b + 1], mine, tells))
        out["semantic"] = WEIGHTS["semantic"] * torch.stack(each).sum()
    if "object" in scene.names:  # what no view needs, behind a hand, should not be there
        k = scene.names.index("object")
        behind_hand = ((label >= 0) & (label != k)).float()
        out["hidden"] = WEIGHTS["semantic"] * WEIGHTS["hidden"] * (alone[:, k] * behind_hand).mean()
    if not all(b.sampling.cached for b in scene.bodies):  # a cached band is empty there already
        away = torch.stack([_away(b, rays, templates) for b in scene.bodies], 1)
        out["sparsity"] = WEIGHTS["sparsity"] * losses.sparsity(alone, away)
    return out


def prior_terms(
    scene: HoldScene,
    templates: Templates,
    rows: Tensor,
    table: PixelTable,
    settings: Training,
    generator: torch.Generator,
) -> dict[str, Tensor]:
    """Weighted losses that no pixel tells: template, eikonal, contact, penetration, smoothness, small codes."""
    out = {"codes": sum(b.field.prior() for b in scene.bodies)}
    by_name = {b.name: b for b in scene.bodies}
    for b in scene.bodies:
        if b.name in templates.hands:
            x = near_template(b, templates.hands[b.name], generator)
            sdf, gradient = b.field.gradient(x.to(b.field.light.device))
            known = templates.hands[b.name].sample(x)[0][:, 0].detach()
            out[f"template {b.name}"] = WEIGHTS["template"] * losses.template(sdf, known.to(sdf))
        elif isinstance(b.field, NetworkField):
            lo, hi = b.field.box()
            x = lo + (hi - lo) * torch.rand(512, 3, generator=generator).to(lo.device)
            gradient = b.field.gradient(x)[1]
        if settings.eikonal and isinstance(b.field, NetworkField):
            out[f"eikonal {b.name}"] = WEIGHTS["eikonal"] * eikonal(gradient)
        if isinstance(b.poses, SkinnedPoses) and settings.hand_rate:
            p = b.poses
            bend = losses.acceleration(p.rotations(), p.known)
            move = losses.translation_acceleration((p.transl + p.shift) / 0.1, p.known)
            keep = p.turn.square().mean() + p.bend.square().mean() + (p.shift / 0.01).square().mean()
            out[f"smooth {b.name}"] = WEIGHTS["smooth"] * (bend + move) + 0.02 * keep
    if templates.empty is not None and len(templates.empty) and "object" in by_name:
        at = templates.empty[torch.randint(len(templates.empty), (512,), generator=generator)]
        field = by_name["object"].field
        inside = field.sdf(at.to(field.light)) / EMPTY_DEPTH
        out["empty"] = WEIGHTS["empty"] * inside.clamp(max=0).square().mean()
    if templates.points is not None and "object" in by_name:
        body = by_name["object"]
        x = SurfacePoints(*(p.to(body.field.light) for p in (templates.points.position, templates.points.towards)))
        far = body.poses.radius
        out["points"] = WEIGHTS["points"] * off_points(body.field.sdf, x, far / 35, EMPTY_RAY * far, generator)
    if settings.contact and "object" in by_name:
        frames = torch.unique(table.frame[rows])
        for b in scene.bodies:
            if isinstance(b.poses, SkinnedPoses):
                out |= touch_terms(by_name["object"], b, frames.to(b.poses.known.device), generator)
    return out


def touch_terms(object_: HoldBody, hand: HoldBody, frames: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Contact and penetration of the hand's surface and the object's field in the frames, metres over 1 cm."""
    frames = frames[hand.poses.known[frames] & object_.poses.known[frames]]
    if not len(frames):
        return {}
    pick = torch.randint(len(hand.poses.model.v_template), (256,), generator=generator).to(frames.device)
    x = hand.poses.posed(frames).vertices[:, pick].reshape(-1, 3)
    sdf = object_.sdf(x, frames.repeat_interleave(256)) / 0.01
    touching = (sdf.detach() < 0.8).float()
    return {
        f"penetration {hand.name}": WEIGHTS["penetration"] * losses.penetration(sdf, losses.SOFT / 0.01),
        f"contact {hand.name}": WEIGHTS["contact"] * losses.contact(sdf, touching, 2.0),
    }


def near_template(body: HoldBody, grid: SdfGrid, generator: torch.Generator, n: int = 512) -> Tensor:
    """(n,3) rest points: most within 8 mm of the template's vertices, a fifth anywhere in its box."""
    v = torch.as_tensor(body.poses.rest()[0], dtype=torch.float32)
    x = v[torch.randint(len(v), (n,), generator=generator)] + 0.008 * torch.randn(n, 3, generator=generator)
    lo, hi = grid.lo.cpu(), grid.hi.cpu()
    x[: n // 5] = lo + (hi - lo) * torch.rand(n // 5, 3, generator=generator)
    return x.to(grid.data.device)


@torch.no_grad()
def field_eikonal(scene: HoldScene, points: int = 4096, seed: int = 0) -> dict[str, float]:
    """Name -> mean (|gradient| - 1)^2 of each field within 1 cm of its surface, where a method's distances count."""
    generator = torch.Generator().manual_seed(seed)
    out = {}
    for b in scene.bodies:
        lo, hi = b.field.box()
        x = lo + (hi - lo) * torch.rand(40 * points, 3, generator=generator).to(lo.device)
        x = x[b.field.sdf(x).abs() < 0.01][:points]
        out[b.name] = float(eikonal(b.field.gradient(x)[1])) if len(x) else float("nan")
    return out


def _optimizer(scene: HoldScene, s: Training) -> tuple[torch.optim.Optimizer, list[float]]:
    groups = []
    for b in scene.bodies:
        b.field.requires_grad_(False)
        learned = [p for p in b.density.parameters() if p.requires_grad]
        if s.fields:
            groups.append({"params": [*b.field.parameters(), *learned], "lr": s.network_rate})
        if isinstance(b.poses, RigidPoses) and s.object_rate:
            groups.append({"params": [b.poses.xi], "lr": s.object_rate})
        if isinstance(b.poses, RigidPoses) and s.scale_rate:
            groups.append({"params": [b.poses.log_scale], "lr": s.scale_rate})
        if isinstance(b.poses, SkinnedPoses) and s.hand_rate:
            groups.append({"params": [b.poses.turn, b.poses.bend], "lr": s.hand_rate})
            groups.append({"params": [b.poses.shift], "lr": 0.1 * s.hand_rate})
    if scene.background is not None and s.fields:
        groups.append({"params": list(scene.background.parameters()), "lr": s.network_rate})
    for b in scene.bodies:
        b.poses.requires_grad_(False)
    for group in groups:
        for p in group["params"]:
            p.requires_grad_(True)
    return torch.optim.Adam(groups, betas=(0.9, 0.99)), [g["lr"] for g in groups]


def _anneal(scene: HoldScene, s: Training, k: int, share: float) -> None:
    """Widths go from wide to narrow; the object's bands open one after the other, hands' are all open (HOLD)."""
    for b in scene.bodies:
        if s.widths is not None and isinstance(b.field, GridField):
            b.density.set(s.widths[0] * (s.widths[1] / s.widths[0]) ** share * b.field.grid.h)
        if b.name == "object":
            first, last = s.bands
            opened = BANDS if not s.encoding else BANDS * float(np.clip((k - first) / max(last - first, 1), 0, 1))
            b.field.set_alpha(opened)


@torch.no_grad()
def _away(b: HoldBody, rays, templates: Templates) -> Tensor:
    """(N,) bool: rays that stay clear of the body's last known surface."""
    if isinstance(b.poses, SkinnedPoses):
        return ~b.poses.trace(rays, AWAY_HAND)[1] & b.poses.known[rays.frame]
    if templates.object is None:
        return torch.zeros(len(rays.d), dtype=torch.bool, device=rays.d.device)
    local, grid = b.poses.rays(rays), templates.object
    least = grid.march(local.o.to(grid.data), local.d.to(grid.data), 0.5 * grid.h, 1e-3 + grid.h)[2]
    return (least.to(rays.d.device) > AWAY["object"]) & b.poses.known[rays.frame]
