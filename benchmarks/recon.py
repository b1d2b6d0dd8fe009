"""How exactly, and how fast, an object is reconstructed from 30 masked views, with cameras known and with all of them off.

    python benchmarks/recon.py [--seeds 3] [--cases NAME ...] [--out benchmarks/results/recon.json] [--picture DIR]

The scene (recon_scene.py) is analytic, the optimiser is the product's `tracking.object.refine_object`. Seconds are CPU
time of the process on one thread, from masks to surface. Distances are point to surface, millimetres: from 20k points
of the reconstruction to the true surface and from 20k true points to the reconstruction; `mean` is the mean of the two
means. Before comparison the global gauge is removed, which pictures alone cannot tell: a rigid motion of the object's
frame, and the scale (also given: `rigid`, with the scale left as it came out).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import recon_scene as scene
import torch
from scipy.spatial import cKDTree

from handhold import kernels
from handhold.geometry.meshes import closest_on_triangles, sample_surface
from handhold.geometry.rigid import nearest_rotation
from handhold.scene import Mesh
from handhold.shapes.sdf import surface
from handhold.shapes.sdf_fit import FitConfig, Stage
from handhold.tracking.object import Observations, refine_object

RESULTS = Path(__file__).parent / "results" / "recon.json"
KNOWN = (Stage(32, 80, (3.0, 1.5), 0.5), Stage(48, 120, (1.5, 0.7), 1.0))
JOINT = (Stage(32, 300, (3.0, 1.5), 0.5), Stage(32, 300, (1.5, 0.8), 0.5), Stage(48, 400, (1.2, 0.6), 1.0))


@dataclass(frozen=True)
class Gauge:
    """x_found = scale * rotation @ x_true + shift."""

    rotation: np.ndarray  # (3,3)
    shift: np.ndarray  # (3,)
    scale: float

    def to_truth(self, x: np.ndarray) -> np.ndarray:
        return (x - self.shift) @ self.rotation / self.scale


def gauge(found: np.ndarray, true: np.ndarray, with_scale: bool) -> Gauge:
    """The motion (and scale) of the object's frame that best explains the difference of two sets of poses (V,4,4)."""
    turn = np.swapaxes(found[:, :3, :3], 1, 2) @ true[:, :3, :3]
    for _ in range(3):  # median-like: a frame that is far off must not turn the others
        mean = nearest_rotation(torch.from_numpy(turn.sum(0))).numpy()
        angle = angles(turn, mean)
        turn = turn / (1e-3 + angle)[:, None, None]
    # scale * t_true - R_found shift = t_found
    a = np.concatenate([-found[:, :3, :3], true[:, :3, 3:]], 2).reshape(-1, 4)
    b = found[:, :3, 3].reshape(-1)
    if with_scale:
        *shift, scale = np.linalg.lstsq(a, b, rcond=None)[0]
    else:
        shift, scale = np.linalg.lstsq(a[:, :3], b - a[:, 3], rcond=None)[0], 1.0
    return Gauge(mean, np.array(shift), float(scale))


def angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Radians between rotations (V,3,3), also unnormalised, and (3,3)."""
    a = a / np.cbrt(np.linalg.det(a))[:, None, None]
    return 2 * np.arcsin(np.clip(np.linalg.norm(a - b, axis=(1, 2)) / np.sqrt(8), 0, 1))


def pose_errors(found: np.ndarray, true: np.ndarray, g: Gauge) -> tuple[np.ndarray, np.ndarray]:
    """Degrees and mm (of the object's centre, in the camera's frame), per view."""
    degrees = np.degrees(angles(np.swapaxes(found[:, :3, :3], 1, 2) @ true[:, :3, :3], g.rotation))
    centre = (found[:, :3, :3] @ g.shift + found[:, :3, 3]) / g.scale
    return degrees, 1e3 * np.linalg.norm(centre - true[:, :3, 3], axis=1)


def to_mesh(points: np.ndarray, mesh: Mesh, neighbours: int = 24) -> np.ndarray:
    """(P,) distance of points to the nearest of the triangles whose centres are nearest."""
    corner = torch.from_numpy(mesh.vertices.astype(np.float64))[torch.from_numpy(mesh.faces.astype(np.int64))]
    _, i = cKDTree(corner.mean(1).numpy()).query(points, k=neighbours)
    best = torch.full((len(points),), torch.inf, dtype=torch.float64)
    p = torch.from_numpy(points)
    for k in range(neighbours):
        tri = corner[i[:, k]]
        at = (closest_on_triangles(p, *tri.unbind(1))[..., None] * tri).sum(1)
        best = torch.minimum(best, (at - p).norm(dim=1))
    return best.numpy()


def shape_errors(mesh: Mesh, truth: scene.Pictures) -> dict:
    """Millimetres; of the whole surface, and of the part that at least two views show."""
    if not len(mesh.faces):
        return {"mean": float("nan")}
    v, f = torch.from_numpy(mesh.vertices.astype(np.float64)), torch.from_numpy(mesh.faces.astype(np.int64))
    points = sample_surface(v, f, len(truth.points), torch.Generator().manual_seed(1))[0]
    signed = 1e3 * scene.object_sdf(points).numpy()
    there, back = np.abs(signed), 1e3 * to_mesh(truth.points, mesh)
    _, nearest = cKDTree(truth.points).query(points.numpy())
    shown = truth.seen[nearest]
    both = np.r_[there, back]
    out = {
        "mean": (there.mean() + back.mean()) / 2,
        "recon_to_truth": there.mean(),
        "truth_to_recon": back.mean(),
        "p95": np.quantile(both, 0.95),
        "max": both.max(),
        "signed_mean": signed.mean(),
    }
    if not truth.seen.all():
        there, back = there[shown], back[truth.seen]
        both = np.r_[there, back]
        out |= {
            "seen_mean": (there.mean() + back.mean()) / 2,
            "seen_p95": np.quantile(both, 0.95),
            "seen_max": both.max(),
        }
    return {k: round(float(x), 4) for k, x in out.items()}
