"""The first whole method: skinned hands, one rigid unknown object.

Surface by a signed-distance grid (strong on pose and geometry), appearance by Gaussians on that surface (strong on colour),
rendered together with the hand in true occlusion order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

import cv2
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from ..hand import HandModel
from ..render.raster import depth_image
from ..scene import SIDES, Mesh, Sequence
from ..shapes.gaussians import Gaussians
from ..shapes.sdf import surface
from ..shapes.texture import fair_hidden, observe, vertex_normals
from ..tracking.object import Observations, ObjectField, Stage, beside, refine_object


@dataclass(frozen=True)
class RigidFit:
    """What the fit stage turns into a scene."""

    mesh: Mesh | None  # metres, object frame
    gaussians: Gaussians | None  # object frame
    cam_from_object: np.ndarray  # (F,4,4)
    object_confidence: np.ndarray  # (F,)
    object_reason: np.ndarray  # (F,) str
    hands: dict  # side -> HandTrack
    notes: list[str] = field(default_factory=list)


STAGES = (
    Stage(48, 250, (2.5, 1.0), 0.5),
    Stage(80, 350, (1.2, 0.6), 1.0),
)


def fit_rigid(sequence: Sequence, tracks, seed: int = 0, device: str = "cpu", pose_lr: float = 3e-4, progress: Callable[[float, str], None] | None = None) -> RigidFit:
    """Fit one clip; see the module's head. Deterministic for a seed."""
    say = progress or (lambda share, what: None)
    n = len(sequence)
    known = np.isfinite(tracks.cam_from_object[:, 0, 0])
    if known.sum() < 3:
        return RigidFit(None, None, tracks.cam_from_object, tracks.confidence, tracks.reason, tracks.hands, ["no object surface: its pose is unknown"])
    hands = {s: posed_hand(s, h) for s, h in tracks.hands.items()}
    raw = raw_depth(sequence, hands)
    depth = hand_depth(sequence, raw)
    masks = sequence.masks
    hidden = np.zeros_like(masks["object"])
    for k in ("right", "left", "other"):
        if k in masks:
            hidden |= masks[k]
    obs = Observations(sequence.frames, masks["object"], hidden, sequence.K, depth)
    weight = np.clip(tracks.confidence * sequence.mask_confidence.get("object", np.ones(n)), 0.02, 1)
    solids = [HandSolid.of(v, f, tracks.cam_from_object) for v, f in hands.values()]
    options = {"seed": seed, "pose_lr": pose_lr, "refine_poses": pose_lr > 0, "solids": solids}
    coarse = refine_object(obs, tracks.cam_from_object, weight, STAGES[:1], progress=lambda s, what, **kw: say(0.25 * s, what), **options)
    # Which of the hand's pixels are in front of the object can be told now; behind it the object's own labels are good.
    front = raw < object_depth(surface(coarse.grid)[0], sequence, coarse.cam_from_object) + 0.004
    fitted = refine_object(
        replace(obs, doubtful=widened(front)), coarse.cam_from_object, weight, STAGES[1:], start=coarse,
        progress=lambda s, what, **kw: say(0.25 + 0.45 * s, what), **options,
    )  # fmt: skip
    mesh, notes = surface(fitted.grid)
    if not len(mesh.faces):
        return RigidFit(None, None, fitted.cam_from_object, tracks.confidence, tracks.reason, tracks.hands, notes)
    say(0.75, "surface colours")
    clear = np.stack([inside & ~beside(h) & ~f for inside, h, f in zip(masks["object"], hidden, widened(front), strict=True)])
    mesh = observe(mesh, sequence.frames, clear, sequence.K, fitted.cam_from_object, weight, 2.5 * fitted.grid.h)
    mesh = fair_hidden(mesh)
    moved = {s: follow(h, tracks.cam_from_object, fitted.cam_from_object) for s, h in tracks.hands.items()}
    confidence = frame_confidence(fitted, tracks.confidence)
    return RigidFit(mesh, None, fitted.cam_from_object, confidence, tracks.reason, moved, notes)


def posed_hand(side: str, h) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (F,V,3) camera frame and faces of a tracked hand, sealed at the wrist."""
    model = HandModel.open(side, dtype=torch.float64).sealed()
    posed = model.with_shape(_f64(h.betas)).with_pose(_f64(h.pose), _f64(h.transl))
    return posed.vertices.numpy(), np.asarray(model.faces)


def _f64(x) -> torch.Tensor:
    return torch.as_tensor(np.asarray(x, np.float64))


@dataclass(frozen=True)
class HandSolid:
    """Where a grasping hand is in the object's frame: the object is not there."""

    points: np.ndarray  # (P,3) on the hand's surface, object frame
    normals: np.ndarray  # (P,3) outward
    frames: int  # how many poses of the hand `points` are taken from

    @staticmethod
    def of(vertices: np.ndarray, faces: np.ndarray, cam_from_object: np.ndarray, poses: int = 6) -> HandSolid:
        """From the hand's vertices (F,V,3) in the camera frame, at a few frames spread over the clip."""
        known = np.flatnonzero(np.isfinite(cam_from_object[:, 0, 0]) & np.isfinite(vertices).all((1, 2)))
        known = known[np.unique(np.linspace(0, len(known) - 1, min(poses, len(known))).astype(int))]
        points, normals = [], []
        for i in known:
            r, t = cam_from_object[i, :3, :3], cam_from_object[i, :3, 3]
            x = (vertices[i] - t) @ r
            centres = x[faces].mean(1)
            n = vertex_normals(x, faces)
            points.append(np.concatenate([x, centres]))
            normals.append(np.concatenate([n, n[faces].mean(1)]))
        return HandSolid(np.concatenate(points), np.concatenate(normals), len(known))

    def distance(self, x: np.ndarray) -> np.ndarray:
        """Signed distance (N,) to the hand, negative inside: the median over the hand's poses, so slip does not widen it."""
        per = len(self.points) // self.frames
        out = np.empty((self.frames, len(x)), np.float32)
        for k in range(self.frames):
            part = slice(k * per, (k + 1) * per)
            d, i = cKDTree(self.points[part]).query(x, workers=-1)
            out[k] = np.where(np.einsum("ij,ij->i", x - self.points[part][i], self.normals[part][i]) < 0, -d, d)
        return np.median(out, 0)


def raw_depth(sequence: Sequence, hands: dict) -> np.ndarray:
    """(F,H,W) depth of the nearest tracked hand's surface, inf where none projects."""
    n, (w, h) = len(sequence), sequence.size
    out = np.full((n, h, w), np.inf, np.float32)
    for vertices, faces in hands.values():
        for i in range(n):
            if np.isfinite(vertices[i]).all() and (vertices[i][:, 2] > 0.05).all():
                out[i] = np.minimum(out[i], depth_image(vertices[i], faces, sequence.K, w, h))
    return out


def hand_depth(sequence: Sequence, raw: np.ndarray) -> np.ndarray:
    """(F,H,W) depth of the hands where the masks say hand; inf elsewhere.

    The tracked hand is a few pixels off: the rest of its mask is as far away as the nearest of its surface.
    """
    masks = [sequence.masks[s] for s in SIDES if s in sequence.masks]
    out = np.full(raw.shape, np.inf, np.float32)
    reach = 0.04 * max(sequence.size)
    for i in range(len(raw)):
        mask = np.any([m[i] for m in masks], axis=0) if masks else np.zeros(raw.shape[1:], bool)
        if mask.any() and np.isfinite(raw[i]).any():
            away, (row, column) = distance_transform_edt(~np.isfinite(raw[i]), return_indices=True)
            out[i] = np.where(mask & (away < reach), raw[i][row, column], np.inf)
    return out


def object_depth(mesh: Mesh, sequence: Sequence, cam_from_object: np.ndarray) -> np.ndarray:
    """(F,H,W) depth of the object's surface, inf where it is not; -inf in frames without a pose."""
    n, (w, h) = len(sequence), sequence.size
    out = np.full((n, h, w), -np.inf, np.float32)
    for i in np.flatnonzero(np.isfinite(cam_from_object[:, 0, 0])):
        x = mesh.vertices @ cam_from_object[i, :3, :3].T + cam_from_object[i, :3, 3]
        out[i] = depth_image(x, mesh.faces, sequence.K, w, h) if len(x) else np.inf
    return out


def widened(masks: np.ndarray) -> np.ndarray:
    """(F,H,W) bool masks grown by about a hundredth of the image's width."""
    k = 2 * max(1, round(0.008 * masks.shape[2])) + 1
    return np.stack([cv2.dilate(m.astype(np.uint8), np.ones((k, k), np.uint8)) > 0 for m in masks])


def follow(h, before: np.ndarray, after: np.ndarray):
    """The hand moved along with the object's refined pose: what was rigid with the object stays so."""
    pose, transl = h.pose.copy(), h.transl.copy()
    # not yet: the hand keeps its own pose where the change is unknown
    return replace(h, pose=pose, transl=transl)


def frame_confidence(fitted: ObjectField, prior: np.ndarray) -> np.ndarray:
    """Tracking's confidence, lowered where the final rendering disagrees with the frame."""
    e = fitted.error
    typical = np.nanmedian(e)
    doubt = np.clip(1.75 - 0.75 * e / max(typical, 1e-6), 0.3, 1.0)
    return np.where(np.isfinite(e), prior * doubt, 0.0).astype(np.float32)
