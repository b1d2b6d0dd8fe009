"""The fine surface: the object's signed-distance grid, its mesh with observed colours, and what no frame tells apart.

The second step of `methods.rigid` and `methods.bigs`, after `methods.placing`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from scipy.spatial import cKDTree

from ..kernels.grid import SdfGrid
from ..scene import Mesh, Sequence
from ..shapes.sdf import nodes, open_thin, surface
from ..shapes.sdf_fit import SdfFitConfig, Stage
from ..shapes.texture import fair_hidden, observe
from ..tracking.object import ObjectField, beside, refine_object
from ..tracking.symmetry import Ambiguity, ambiguities, colour_noise
from .placing import Placing, prune

FINE = (Stage(80, 350, (1.2, 0.6), 1.0),)
THIN_FINE = 0.0035  # metres: half the thickness below which leftovers beside a hand are removed
THIN_UNSEEN = 0.008  # metres: likewise, where no frame saw the surface


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
) -> FineSurface:
    """Fit the fine grid from the coarse one and colour its surface. Deterministic for config.seed."""
    say = progress or (lambda share, what: None)
    inner = lambda share, what, **metrics: say(0.9 * share, what, **metrics)  # noqa: E731
    fitted = refine_object(
        start.obs, start.cam_from_object, start.weight, stages, config, start.coarse, solids=start.solids,
        progress=inner,
    )  # fmt: skip
    prune(fitted.grid, start.solids, THIN_FINE)
    mesh, notes = surface(fitted.grid)
    poses = fitted.cam_from_object
    confidence = frame_confidence(fitted, start.confidence)
    if not len(mesh.faces):
        return FineSurface(fitted, None, confidence, (), notes)
    say(0.9, "surface colours")
    clear = clear_pixels(sequence, start)
    colour = lambda m: observe(m, sequence.frames, clear, sequence.K, poses, start.weight, 2.5 * fitted.grid.h)  # noqa: E731
    mesh = colour(mesh)
    if prune_unseen(fitted.grid, mesh, THIN_UNSEEN):
        mesh = colour(surface(fitted.grid)[0])
    noise = colour_noise(mesh, sequence.frames, clear, sequence.K, poses)
    same = ambiguities(mesh, fitted.grid, noise, config.seed)
    notes += [a.sentence for a in same]
    return FineSurface(fitted, fair_hidden(mesh), confidence, same, notes)


def clear_pixels(sequence: Sequence, start: Placing) -> np.ndarray:
    """(F,H,W) bool: pixels that are surely the object's, away from what hides it."""
    front, hidden = start.obs.doubtful, start.obs.unknown
    return np.stack([i & ~beside(h) & ~f for i, h, f in zip(sequence.masks["object"], hidden, front, strict=True)])


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
