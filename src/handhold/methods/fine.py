"""The fine surface: the object's signed-distance grid, its mesh with observed colours, and what no frame tells apart.

The second step of `methods.rigid` and `methods.bigs`, after `methods.placing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial import cKDTree

from ..kernels.grid import SdfGrid
from ..scene import Mesh, Sequence
from ..shapes.mirror import Mirror, complete, mirrors, vertex_areas
from ..shapes.sdf import nodes, open_thin, smooth, surface
from ..shapes.sdf_fit import SdfFitConfig, Stage
from ..shapes.texture import fair_hidden, observe
from ..tracking.bootstrap import silhouette_iou
from ..tracking.object import ObjectField, free_space, refine_object
from ..tracking.symmetry import Ambiguity, ambiguities, colour_noise
from .placing import Placing, prune

FINE = (Stage(80, 350, (1.2, 0.6), 1.0),)
THIN_FINE = 0.0035  # metres: half the thickness below which leftovers beside a hand are removed
THIN_UNSEEN = 0.008  # metres: likewise, where no frame saw the surface
WARTS = 0.8  # voxels: what is smaller is noise of single points and pixels
# IoU with the masks that the first plane of a completion may cost, and each further one. Masks are fat, and so is what
# was fitted to them alone: that goes with the first plane.
WORSE, NEXT_WORSE = 0.06, 0.01


@dataclass(frozen=True)
class FineSurface:
    """What `fine_surface` found."""

    field: ObjectField
    mesh: Mesh | None  # watertight, coloured; None where nothing is left
    confidence: np.ndarray  # (F,)
    ambiguous: tuple[Ambiguity, ...]
    notes: list[str]


def fine_surface(
    sequence: Sequence,
    start: Placing,
    config: SdfFitConfig,
    progress: Callable[[float, str], None] | None = None,
    stages: tuple[Stage, ...] = FINE,
    mirror: bool = True,
) -> FineSurface:
    """Fit the fine grid from the coarse one and finish its surface. Deterministic for config.seed.

    mirror: complete unseen surface from its mirror image.
    """
    say = progress or (lambda share, what: None)
    inner = lambda share, what, **metrics: say(0.9 * share, what, **metrics)  # noqa: E731
    fitted = refine_object(
        start.obs, start.cam_from_object, start.weight, stages, config, start.coarse, solids=start.solids,
        points=start.points, progress=inner,
    )  # fmt: skip
    poses = fitted.cam_from_object
    confidence = frame_confidence(fitted, start.confidence)
    say(0.9, "surface colours")
    done = finished(sequence, start, fitted.grid, poses, mirror, config.seed)
    if done.mesh is None:
        return FineSurface(fitted, None, confidence, (), done.notes)
    noise = colour_noise(done.mesh, sequence.frames, start.obs.clear(), sequence.K, poses)
    same = ambiguities(done.mesh, done.grid, noise, config.seed)
    notes = done.notes + [a.sentence for a in same]
    return FineSurface(replace(fitted, grid=done.grid), done.mesh, confidence, same, notes)


@dataclass(frozen=True)
class Finished:
    """A fitted surface, cleaned, coloured and completed."""

    grid: SdfGrid
    mesh: Mesh | None  # None where nothing is left
    notes: list[str]


def finished(
    sequence: Sequence, start: Placing, grid: SdfGrid, poses: np.ndarray, mirror: bool = True, seed: int = 0
) -> Finished:
    """What leaked between fingers and what is noise removed (in place), colours as the frames show them, and what none
    shows completed: from its mirror image where the seen surface has one (`shapes.mirror`), elsewhere smoothly."""
    prune(grid, start.solids, THIN_FINE)
    smooth(grid, WARTS)
    mesh, notes = surface(grid)
    if not len(mesh.faces):
        return Finished(grid, None, notes)
    clear = start.obs.clear()
    colour = lambda m: observe(m, sequence.frames, clear, sequence.K, poses, start.weight, 2.5 * grid.h)  # noqa: E731
    mesh = colour(mesh)
    if prune_unseen(grid, mesh, THIN_UNSEEN):
        mesh = colour(surface(grid)[0])
    known, partly = None, mesh.observed is not None and mesh.observed.any() and not mesh.observed.all()
    outside = free_space(start.obs, poses, start.weight) if mirror and partly else None
    if outside is not None and (planes := mirrors(mesh, grid, outside, seed)):
        agreed = completed(start, grid, mesh, poses, planes, outside)
        if agreed is None:
            notes.append("unseen surface was not completed from its mirror image: the outlines contradict that")
        else:
            grid, filled, planes = agreed
            mesh = colour(surface(grid)[0])
            at = ((mesh.vertices - grid.lo.numpy()) / grid.h).round().astype(int).clip(0, grid.R - 1)
            known = filled[at[:, 0], at[:, 1], at[:, 2]] > 0.5
            off = ", ".join(f"{1e3 * m.error:.1f}" for m in planes)
            share = (vertex_areas(mesh) * (known & ~mesh.observed)).sum() / vertex_areas(mesh).sum()
            notes.append(
                f"{100 * share:.0f} % of the object's surface was not seen and is completed from its mirror image in "
                f"{len(planes)} plane{'s' * (len(planes) > 1)}; where both sides are seen they agree within {off} mm"
            )
    return Finished(grid, fair_hidden(mesh, known=known), notes)


def completed(
    start: Placing, grid: SdfGrid, mesh: Mesh, poses: np.ndarray, planes: list[Mirror], outside
) -> tuple[SdfGrid, np.ndarray, list[Mirror]] | None:
    """The grid completed by as many planes as the outlines agree with, where it was filled, and these planes."""
    fit, best = outline_fit(start, poses), None
    least = fit(grid) - WORSE
    for count in range(1, len(planes) + 1):  # the surest first
        whole, filled = complete(grid, mesh, planes[:count], outside, start.solids)
        smooth(whole, WARTS)
        if (now := fit(whole)) < least:
            break
        best, least = (whole, filled, planes[:count]), now - NEXT_WORSE
    return best


def outline_fit(start: Placing, poses: np.ndarray, most: int = 10) -> Callable[[SdfGrid], float]:
    """What tells a grid's mean IoU, rendered, with the object's masks over up to `most` frames."""
    known = np.flatnonzero(np.isfinite(poses[:, 0, 0]) & (start.weight > 0.3) & start.obs.inside.any((1, 2)))
    if not len(known):
        return lambda grid: 0.0
    known, small = known[np.unique(np.linspace(0, len(known) - 1, most).astype(int))], start.obs.scaled(0.25)
    return lambda grid: float(np.mean([silhouette_iou(grid, small, int(i), poses[i]) for i in known]))


def prune_unseen(grid: SdfGrid, mesh: Mesh, radius: float) -> bool:
    """Remove what is thin (see `open_thin`) where no frame saw the surface; whether there was any."""
    if mesh.observed is None or mesh.observed.all() or not mesh.observed.any():
        return False
    at = nodes(grid)
    unseen = cKDTree(mesh.vertices[~mesh.observed]).query(at, workers=-1)[0]
    seen = cKDTree(mesh.vertices[mesh.observed]).query(at, workers=-1)[0]
    before = (grid.data[..., 0] < 0).sum()
    open_thin(grid, (unseen < seen).reshape(grid.R, grid.R, grid.R), radius)
    return bool((grid.data[..., 0] < 0).sum() < before)


def frame_confidence(fitted: ObjectField, prior: np.ndarray) -> np.ndarray:
    """(F,) tracking's confidence, lowered where the final rendering disagrees with the frame."""
    e = fitted.error
    typical = np.nanmedian(e)
    doubt = np.clip(1.75 - 0.75 * e / max(typical, 1e-6), 0.3, 1.0)
    return np.where(np.isfinite(e), prior * doubt, 0.0).astype(np.float32)
