"""Points of the object's surface: corners followed through the frames and triangulated by the frames' poses.

A surface that is fitted to outlines and colours alone stays outside the true one: where hands hide the object in all
frames that look along a face, no outline carves it, and colours on a face that stands a centimetre too far out find
their optimum there. A corner that is followed over some frames says where the face is within about a millimetre, and
that the ray to it is empty (`shapes.sdf_fit.off_points`).
"""

from __future__ import annotations

import cv2
import numpy as np
import torch

from ..shapes.sdf_fit import SurfacePoints
from . import _sfm_bundle as bundle
from ._sfm_flow import flow_tracks
from .object import Observations

FITS = 1.0, 0.002  # pixels, and share of the picture's width: an observation this close to its point fits
LEAST = 5  # frames that a point must fit
SHARE = 0.8  # of a point's frames that must fit it
ANGLE = np.radians(15.0)  # between the rays to a point, at least
FEW = 30  # points, below which they are not used


def follow(obs: Observations) -> bundle.Tracks:
    """Corners of the object's own pixels, away from what hides it, followed through the frames."""
    grey = np.stack([cv2.cvtColor(f, cv2.COLOR_RGB2GRAY) for f in obs.frames])
    rows, xy = flow_tracks(grey, obs.clear())
    focal = obs.K[[0, 1], [0, 1]]
    none = np.zeros(0, np.int64)
    return bundle.Tracks(
        rows[:, 0], rows[:, 1], (xy - obs.K[:2, 2]) / focal, float(focal[0]), len(grey), none,
        np.zeros((0, 128), np.float32), ANGLE,
    )  # fmt: skip


def surface_points(t: bundle.Tracks, cam_from_object: np.ndarray, width: int) -> SurfacePoints | None:
    """Followed corners as points in the object's frame, with the rays that saw them; None where there are too few.

    cam_from_object (F,4,4), NaN where unknown; width of the frames in pixels.
    """
    if not len(t.track):
        return None
    x, error = bundle.triangulate(cam_from_object, t)
    fits = error < max(FITS[0], FITS[1] * width)
    posed = bundle.is_registered(cam_from_object)[t.frame]
    good, seen = (np.bincount(t.track[k], minlength=t.count) for k in (fits, posed))
    found = np.isfinite(x[:, 0]) & (good >= LEAST) & (good > SHARE * seen)
    if found.sum() < FEW:
        return None
    kept = fits & found[t.track]
    pose, at = cam_from_object[t.frame[kept]], x[t.track[kept]]
    towards = -np.einsum("nji,nj->ni", pose[:, :3, :3], pose[:, :3, 3]) - at
    towards /= np.linalg.norm(towards, axis=1, keepdims=True)
    return SurfacePoints(torch.from_numpy(at).float(), torch.from_numpy(towards).float())
