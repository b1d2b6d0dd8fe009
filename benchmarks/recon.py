"""How exactly and how fast an object is reconstructed from 30 masked views, its poses known or all of them off.

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
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
import recon_scene as scene
import torch
from scipy.spatial import cKDTree

import handhold
from handhold import kernels
from handhold.geometry.cameras import pixel_centres, unproject
from handhold.geometry.meshes import closest_on_triangles, sample_surface
from handhold.geometry.rigid import nearest_rotation
from handhold.kernels.raster import depth_image
from handhold.scene import Mesh
from handhold.shapes.sdf import surface
from handhold.shapes.sdf_fit import SdfFitConfig, Stage
from handhold.tracking.object import Observations, refine_object

RESULTS = Path(__file__).parent / "results" / "recon.json"
SHOWN = (
    "cpu_s",
    "mean",
    "seen_mean",
    "p95",
    "max",
    "signed_mean",
    "rotation_deg_median",
    "translation_mm_median",
    "scale",
)
STAGES = {
    "known": (Stage(32, 80, (1.5, 0.8), 0.5), Stage(48, 150, (0.8, 0.4), 1.0)),
    "occluded": (Stage(32, 200, (1.5, 0.8), 0.5), Stage(48, 200, (0.8, 0.4), 1.0)),
    "joint": (Stage(32, 300, (2.5, 1.2), 0.5), Stage(32, 200, (1.2, 0.8), 0.5), Stage(48, 500, (0.8, 0.4), 1.0)),
}


@dataclass(frozen=True)
class Case:
    """What is given, and what is done with it."""

    stages: str
    degrees: float = 0.0  # by which every pose is off
    mm: float = 0.0
    occluded: bool = False  # hand-like occluders, marked as unknown
    noise: bool = False  # mask borders off by 1.5 px rms, a bite and a false piece in every mask
    turning_light: bool = False  # light fixed to the camera
    hull_quantile: float = 0.85  # over views; 1 only where masks and cameras are exact


CASES = {
    "known": Case("known", hull_quantile=1.0),
    "joint_5deg_5mm": Case("joint", 5, 5, hull_quantile=0.8),
    "joint_10deg_5mm": Case("joint", 10, 5, hull_quantile=0.8),
    "joint_15deg_5mm": Case("joint", 15, 5, hull_quantile=0.8),
    "joint_10deg_5mm_turning_light": Case("joint", 10, 5, hull_quantile=0.8, turning_light=True),
    "known_occluded": Case("occluded", occluded=True),
    "known_occluded_noise": Case("occluded", occluded=True, noise=True),
    "joint_10deg_5mm_occluded": Case("joint", 10, 5, occluded=True, hull_quantile=0.8),
    "joint_10deg_5mm_occluded_noise": Case("joint", 10, 5, occluded=True, noise=True, hull_quantile=0.8),
}
BARS = {
    "known": {"mean": 0.20, "cpu_s": 10},
    "joint_10deg_5mm": {"rotation_deg_median": 0.3, "translation_mm_median": 0.3, "cpu_s": 60},
}


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


def run(case: Case, truth: scene.Pictures, seed: int) -> tuple[dict, Mesh]:
    """Reconstruct once: the row of the results, and the mesh in the true frame."""
    labels = scene.noisy_labels(truth.labels, seed) if case.noise else truth.labels
    obs = Observations(truth.frames, labels == 1, labels == 2, truth.K)
    true = truth.cam_from_object
    joint = case.degrees > 0 or case.mm > 0
    given = scene.perturbed(true, case.degrees, case.mm, seed) if joint else true
    config = SdfFitConfig(samples=16 if joint else 32, pose_lr=5e-3 if joint else 0.0, seed=seed)
    start = time.process_time()
    fitted = refine_object(
        obs, given, np.ones(len(true)), STAGES[case.stages], config, hull_quantile=case.hull_quantile
    )
    mesh, _ = surface(fitted.grid)
    row = {"cpu_s": round(time.process_time() - start, 2)}
    found = fitted.cam_from_object
    g = gauge(found, true, with_scale=joint) if joint else Gauge(np.eye(3), np.zeros(3), 1.0)
    mesh = Mesh(g.to_truth(mesh.vertices.astype(np.float64)).astype(np.float32), mesh.faces, mesh.colors)
    row |= shape_errors(mesh, truth)
    if joint:
        degrees, mm = pose_errors(found, true, g)
        rigid = pose_errors(found, true, gauge(found, true, with_scale=False))[1]
        row |= {
            "rotation_deg_median": np.median(degrees),
            "rotation_deg_p90": np.quantile(degrees, 0.9),
            "rotation_deg_max": degrees.max(),
            "translation_mm_median": np.median(mm),
            "translation_mm_p90": np.quantile(mm, 0.9),
            "translation_mm_max": mm.max(),
            "translation_rigid_mm_median": np.median(rigid),
            "scale": g.scale,
        }
    if case.occluded:
        row |= {"hidden_share": truth.hidden, "seen_share": truth.seen.mean()}
    return {k: round(float(v), 4) for k, v in row.items()}, mesh


def main() -> None:
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("--seeds", type=int, default=3)
    ap.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE")
    ap.add_argument("--out", type=Path, default=RESULTS)
    ap.add_argument("--picture", type=Path, help="a folder for PNGs of true and found surface, seed 0")
    args = ap.parse_args()
    torch.set_num_threads(1)
    try:
        cases = json.loads(args.out.read_text())["cases"]
    except (OSError, ValueError, KeyError):
        cases = {}
    rows: dict[str, list[dict]] = {name: [] for name in args.cases}
    for seed in range(args.seeds):
        made: dict[tuple, scene.Pictures] = {}
        for name in args.cases:
            case = CASES[name]
            which = (case.occluded, case.turning_light)
            if which not in made:
                made[which] = scene.pictures(seed, *which)
            row, mesh = run(case, made[which], seed)
            rows[name].append(row)
            told = "  ".join(f"{k} {row[k]:g}" for k in SHOWN if k in row)
            print(f"seed {seed}  {name:32s} {told}", flush=True)
            if args.picture and seed == 0:
                args.picture.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(args.picture / f"{name}.png"), picture(mesh, made[which])[..., ::-1])
    for name, found in rows.items():
        keys = found[0].keys()
        cases[name] = {
            "setting": asdict(CASES[name]),
            "stages": [asdict(s) for s in STAGES[CASES[name].stages]],
            "median": {k: round(statistics.median(r[k] for r in found), 4) for k in keys},
            "worst": {k: worst(k, [r[k] for r in found]) for k in keys},
            "seeds": found,
        }
        if name in BARS:
            cases[name]["bars"] = {k: {"bar": v, "worst": cases[name]["worst"][k]} for k, v in BARS[name].items()}
    result = {
        "what": __doc__.split("\n\n")[-1].replace("\n", " ").strip(),
        "handhold": handhold.__version__,
        "isa": kernels.info()["isa"],
        "torch": torch.__version__,
        "machine": f"{os.cpu_count()} cores, {platform.machine()}",
        "cases": {k: cases[k] for k in CASES if k in cases},
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    part = args.out.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(args.out)


def worst(key: str, values: list[float]) -> float:
    """The worst over seeds: a scale farthest from 1, an error farthest from 0, the least seen."""
    if key == "seen_share":
        return min(values)
    return max(values, key=lambda v: abs(v - 1) if key == "scale" else abs(v))


def picture(mesh: Mesh, truth: scene.Pictures, views: tuple[int, ...] = (0, 1, 3, 4)) -> np.ndarray:
    """(H,W,3) uint8: the pictures above the found surface, shaded by its own normals."""
    above, below = [], []
    for i in views:
        pose = truth.cam_from_object[i]
        x = mesh.vertices.astype(np.float64) @ pose[:3, :3].T + pose[:3, 3]
        z = depth_image(x, mesh.faces, truth.K, scene.SIZE, scene.SIZE)
        p = unproject(pixel_centres(scene.SIZE, scene.SIZE).astype(np.float64), np.where(np.isfinite(z), z, 0), truth.K)
        n = np.cross(np.gradient(p, axis=0), np.gradient(p, axis=1))
        n /= np.linalg.norm(n, axis=-1, keepdims=True) + 1e-12
        shade = 0.25 + 0.75 * np.clip(n @ [-0.4, -0.5, -0.77], 0, 1)
        above.append(truth.frames[i])
        below.append(np.where(np.isfinite(z), 255 * shade, 30).astype(np.uint8)[..., None].repeat(3, -1))
    return np.vstack([np.hstack(above), np.hstack(below)])


if __name__ == "__main__":
    main()
