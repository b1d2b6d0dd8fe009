"""What the tracked hands hide of the object, and where the object therefore cannot be."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import distance_transform_edt
from scipy.spatial import cKDTree

from ..kernels.raster import depth_image
from ..scene import SIDES, Mesh, Sequence
from ..shapes.texture import vertex_normals


@dataclass(frozen=True)
class HandSolid:
    """Where a grasping hand is in the object's frame: the object is not there."""

    points: np.ndarray  # (P,3) on the hand's surface, object frame
    normals: np.ndarray  # (P,3) outward
    frames: int  # how many poses of the hand `points` are taken from
    margin: float = 0.0  # metres by which the tracked hand may be off: only what is deeper inside it counts

    @staticmethod
    def of(
        vertices: np.ndarray, faces: np.ndarray, cam_from_object: np.ndarray, poses: int = 6, margin: float = 0.0
    ) -> HandSolid | None:
        """From the hand's vertices (F,V,3) in the camera frame, at a few frames spread over the clip; None when no
        frame has both the hand and the object."""
        known = np.flatnonzero(np.isfinite(cam_from_object[:, 0, 0]) & np.isfinite(vertices).all((1, 2)))
        if not len(known):
            return None
        known = known[np.unique(np.linspace(0, len(known) - 1, min(poses, len(known))).astype(int))]
        points, normals = [], []
        for i in known:
            r, t = cam_from_object[i, :3, :3], cam_from_object[i, :3, 3]
            x = (vertices[i] - t) @ r
            centres = x[faces].mean(1)
            n = vertex_normals(x, faces)
            points.append(np.concatenate([x, centres]))
            normals.append(np.concatenate([n, n[faces].mean(1)]))
        return HandSolid(np.concatenate(points), np.concatenate(normals), len(known), margin)

    def distance(self, x: np.ndarray) -> np.ndarray:
        """Signed distance (N,) to the hand, negative inside: shrunk by `margin`; the median over its poses."""
        per = len(self.points) // self.frames
        out = np.empty((self.frames, len(x)), np.float32)
        for k in range(self.frames):
            part = slice(k * per, (k + 1) * per)
            d, i = cKDTree(self.points[part]).query(x, workers=-1)
            out[k] = np.where(np.einsum("ij,ij->i", x - self.points[part][i], self.normals[part][i]) < 0, -d, d)
        return np.median(out, 0) + self.margin


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
