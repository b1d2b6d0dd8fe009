"""The first whole method: skinned hands and one rigid unknown object.

The object's surface is a signed-distance grid (strong on geometry and pose), its appearance Gaussians on that surface
(strong on colour), rendered together with the hands' in true occlusion order. What hands hide is unknown, not
background; where the hands are, the object is not; what no frame has seen is filled in smoothly and marked as unseen.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from ..hand import HandModel
from ..scene import Sequence
from ..shapes.sdf_fit import SdfFitConfig
from ..shapes.skinned import colors_at
from .appearance import Appearance, fit_appearance
from .base import HAND_SPLATS, OBJECT_SPLATS, Fitted
from .bound import skinned_hand
from .fine import fine_surface
from .held_out import NAME as HELD_OUT
from .placing import enough, place

MIN_IOU = 0.5  # of the rendered object with its masks; below, the result is marked partial


def fit_rigid(
    sequence: Sequence,
    tracks,
    seed: int = 0,
    pose_lr: float = 1e-4,
    appearance: bool = True,
    progress: Callable[[float, str], None] | None = None,
    registration: bool = True,
    mirror: bool = True,
) -> Fitted:
    """Fit one clip from its masks and `stages.track.Tracks`. Deterministic for a seed.

    pose_lr: radians per step of the pose refinement with the surface (0: poses stay); appearance: fit Gaussians too;
    registration: place the frames that tracking could not; mirror: complete unseen surface from its mirror image.
    """
    say = progress or (lambda share, what: None)
    part = lambda a, b: lambda share, what, **metrics: say(a + (b - a) * share, what, **metrics)  # noqa: E731
    if not enough(sequence, tracks):
        return no_surface(tracks)
    # A weak wish for emptiness where a hand hides the object: a strong one eats what no frame sees.
    config = SdfFitConfig(pose_lr=pose_lr, hidden=0.05, seed=seed)

    # 1. Every frame placed, and a coarse surface.
    start = place(sequence, tracks, config, registration, part(0.0, 0.25))
    notes = list(start.notes)

    # 2. The fine surface, its colours, what was seen, and the rest.
    fine = fine_surface(sequence, start, config, part(0.25, 0.65), mirror=mirror)
    mesh, poses, confidence, same = fine.mesh, fine.field.cam_from_object, fine.confidence, fine.ambiguous
    notes += fine.notes
    if mesh is None:
        return Fitted(None, poses, confidence, start.reason, start.tracked, notes)

    # 3. Gaussians on it.
    if not appearance:
        return Fitted(mesh, poses, confidence, start.reason, start.tracked, notes, ambiguous=same)
    look = fit_appearance(sequence, mesh, poses, start.weight, start.hands, seed=seed, progress=part(0.65, 1.0))
    doubts = []
    if look.iou < MIN_IOU:
        doubts.append(
            f"The object does not explain its masks (IoU {look.iou:.2f}): it may not be one rigid object, or none."
        )
    notes.append(f"Gaussians: {look.psnr:.1f} dB on held-out frames' foreground, object mask IoU {look.iou:.2f}")
    hands, colors = hand_looks(look, start.tracked)
    return Fitted(
        mesh,
        look.cam_from_object,
        confidence,
        start.reason,
        start.tracked,
        notes,
        doubts,
        same,
        {OBJECT_SPLATS: look.object.arrays(), HELD_OUT: look.held_out, **hands},
        colors,
    )


def hand_looks(look: Appearance, tracked: dict) -> tuple[dict[str, dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """The hands' Gaussians at rest, as arrays by file name, and the colours of their meshes' vertices by side."""
    arrays, colors = {}, {}
    for side, g in look.hands.items():
        model = HandModel.open(side)
        rest = model.sealed().with_shape(torch.as_tensor(tracked[side].betas, dtype=model.dtype)).vertices
        skinned = skinned_hand(g, rest, model.sealed().weights)
        arrays[HAND_SPLATS[side]] = skinned.arrays()
        colors[side] = colors_at(skinned.rest, rest[: len(model.v_template)].numpy())
    return arrays, colors


def no_surface(tracks) -> Fitted:
    """The result where too few frames have a pose: tracks as they are."""
    why = ["no object surface: its pose is unknown"]
    return Fitted(None, tracks.cam_from_object, tracks.confidence, tracks.reason, dict(tracks.hands), why)
