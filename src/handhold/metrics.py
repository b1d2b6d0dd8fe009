"""Reconstruction error against truth: pure functions on arrays, and `evaluate`, the protocol of the field.

Hands follow the usual hand-pose protocol (root-relative MPJPE and Procrustes-aligned PA-MPJPE); the object follows HOLD
(Fan et al., CVPR 2024): Chamfer distance and F-scores of the surface after one similarity, and the Chamfer distance of
the object seen from each hand's wrist, CD_h, without any alignment. numpy and scipy only; points are (N,3) in metres.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .geometry import points as points_of
from .geometry.points import Similarity, chamfer, nearest, transform, umeyama

if TYPE_CHECKING:
    from .scene import Scene

# key (without its `_right`/`_left` ending) -> unit, which way is better, meaning; the report prints these
MEANING: dict[str, tuple[str, str, str]] = {
    "mpjpe": ("mm", "lower", "mean error of the 21 joints relative to the wrist, no alignment"),
    "mpvpe": ("mm", "lower", "mean error of the hand's vertices relative to the wrist, no alignment"),
    "pa_mpjpe": (
        "mm",
        "lower",
        "joint error after a similarity alignment of each frame: the pose of the fingers alone",
    ),
    "cd": ("cm²", "lower", "object surface: mean squared nearest distance, both ways summed, after one similarity"),
    "f5": (
        "%",
        "higher",
        "object surface within 5 mm: harmonic mean of precision and recall, after the same similarity",
    ),
    "f10": ("%", "higher", "object surface within 10 mm, likewise"),
    "cd_hand": ("cm²", "lower", "object relative to this hand's wrist, no alignment: pose, scale and shape together"),
    "rot_deg": ("°", "lower", "median error of the object's rotation between two frames"),
    "scale_ratio": ("×", "one", "reconstructed size of the object over its true size"),
    "cd_frames": ("cm²", "lower", "deforming object: surface error per frame under one similarity for the clip"),
    "f5_frames": ("%", "higher", "deforming object: surface within 5 mm per frame"),
    "f10_frames": ("%", "higher", "deforming object: surface within 10 mm per frame"),
    "psnr": ("dB", "higher", "frames that taught no colour, drawn: all truly visible pixels of the bodies"),
    "psnr_object": ("dB", "higher", "likewise, the object's pixels alone"),
    "psnr_hands": ("dB", "higher", "likewise, the hands' pixels alone"),
    "ssim": ("", "higher", "structural similarity of the same pixels"),
    "mask_iou": ("", "higher", "the object's visible mask in these frames, intersection over union"),
    "frames": ("%", "higher", "frames of the clip that carry a valid hand and a valid object"),
}


def describe(key: str) -> tuple[str, str, str] | None:
    """(unit, "lower" | "higher" | "one", meaning) of a key of `evaluate`, or None for a key it never makes."""
    name, _, peer = key.partition("_peer")
    for side in ("right", "left"):
        if name == f"cd_{side}":
            name = "cd_hand"
        name = name.removesuffix(f"_{side}")
    if name not in MEANING:
        return None
    unit, better, meaning = MEANING[name]
    return (
        unit,
        better,
        meaning + ("; against another method's wrist and fingertips" if peer or key.endswith("_peer") else ""),
    )


def mpjpe(joints: np.ndarray, truth: np.ndarray, root: int = 0) -> np.ndarray:
    """Root-relative mean joint error of each frame.

    joints, truth: (..., J, 3) in the same axes. Returns (...), in their unit. Subtracts joint `root` from both, aligns
    nothing.
    """
    a, b = joints - joints[..., root : root + 1, :], truth - truth[..., root : root + 1, :]
    return np.linalg.norm(a - b, axis=-1).mean(-1)


def mpvpe(vertices: np.ndarray, roots: np.ndarray, truth: np.ndarray, truth_roots: np.ndarray) -> np.ndarray:
    """Root-relative mean vertex error of each frame; vertices (..., V, 3), roots (..., 3) the wrists. Returns (...)."""
    return np.linalg.norm((vertices - roots[..., None, :]) - (truth - truth_roots[..., None, :]), axis=-1).mean(-1)


def pa_mpjpe(joints: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Mean joint error of each frame after its own similarity alignment; joints, truth (F,J,3). Returns (F,)."""
    pairs = zip(np.asarray(joints, float), np.asarray(truth, float), strict=True)
    return np.array([np.linalg.norm(transform(umeyama(p, q), p) - q, axis=1).mean() for p, q in pairs])


def sample_surface(vertices: np.ndarray, faces: np.ndarray, count: int, seed: int = 0) -> np.ndarray:
    """(count,3) points drawn uniformly by area from triangles (T,3). Same seed, same points."""
    return points_of.sample_surface(vertices, faces, count, seed).points


def f_score(points: np.ndarray, others: np.ndarray, threshold: float) -> float:
    """Harmonic mean, in [0,1], of the shares of each set within `threshold` of the other."""
    return _f_score(*nearest(points, others), threshold)


def _f_score(there: np.ndarray, back: np.ndarray, threshold: float) -> float:
    precision, recall = float((there < threshold).mean()), float((back < threshold).mean())
    return 2 * precision * recall / max(precision + recall, 1e-9)


def surface_error(points: np.ndarray, truth: np.ndarray) -> tuple[float, float, float]:
    """(Chamfer in cm^2, F at 5 mm in %, F at 10 mm in %) of two point sets in metres."""
    there, back = nearest(points, truth)
    cd = float((there**2).mean() + (back**2).mean())
    return 1e4 * cd, 100 * _f_score(there, back, 0.005), 100 * _f_score(there, back, 0.010)


def align_surfaces(
    source: np.ndarray, target: np.ndarray, starts: int = 96, scale: bool = True, points: tuple[int, int] = (1500, 8000)
) -> Similarity:
    """The similarity (s, R, t) that takes one surface sample onto another: `geometry.points.align`, seed 0."""
    return points_of.align(source, target, starts, scale, points).similarity


def relative_rotation_error(rotations: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """Errors, in degrees, of the rotation between frames i < j, every third j.

    rotations, truth (F,3,3): camera from object.
    The rotation between two frames does not depend on how the canonical frames were chosen, so nothing is aligned.
    """
    i, j = np.triu_indices(len(rotations), 1)
    keep = (j - i - 1) % 3 == 0
    i, j = i[keep], j[keep]
    moved, true = rotations[i] @ rotations[j].transpose(0, 2, 1), truth[i] @ truth[j].transpose(0, 2, 1)
    cos = (np.einsum("nij,nij->n", moved, true) - 1) / 2
    return np.degrees(np.arccos(np.clip(cos, -1, 1)))


def evaluate(scene: Scene, gt: dict[str, np.ndarray]) -> dict[str, float]:
    """Every figure of `MEANING` that the truth allows.

    gt: arrays in the camera frame, metres, for every frame of the source video: `object_vertices`, `object_faces`,
    `object_poses` (F,4,4) camera from object, `<side>_joints` (F,21,3) and `<side>_vertices` where known,
    `<side>_peer_joints` where only a peer's estimate is (NaN for joints it lacks; keys end in `_peer`),
    `object_vertices_per_frame` where the object deforms. Frames marked invalid count in `frames`, not in the means; a
    figure with nothing to average is NaN.
    """
    index = np.asarray(scene.frames, int)
    if len(index) and (index.min() < 0 or index.max() >= len(gt["object_poses"])):
        raise ValueError(f"the truth has {len(gt['object_poses'])} frames, the scene asks for frame {index.max()}")
    cam_from_world = np.linalg.inv(np.asarray(scene.world_from_cam, float))
    out: dict[str, float] = {}
    ok = np.ones(len(index), bool)
    wrists: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    for side in ("right", "left"):
        truth = gt.get(f"{side}_joints", gt.get(f"{side}_peer_joints"))
        if truth is None:
            continue
        if side not in scene.bodies:
            known = np.isfinite(truth[0]).all(1)
            out[f"mpjpe_{side}" if known.all() else f"mpjpe_{side}_peer"] = float("nan")
            ok[:] = False
            continue
        body = scene.bodies[side]
        figures, wrists[side] = _hand_error(side, body, truth[index].astype(float), gt, index, cam_from_world)
        out |= figures
        ok &= np.asarray(body.valid, bool)
    if "object" not in scene.bodies:
        return out | {"frames": 0.0}
    ok &= np.asarray(scene.bodies["object"].valid, bool)
    out["frames"] = 100.0 * float(ok.sum()) / len(gt["object_poses"])
    return out | _object_error(scene, gt, index, cam_from_world, ok, wrists)


def _hand_error(side, body, truth, gt, index, cam_from_world):
    known = np.isfinite(truth[0]).all(1)
    tag = side if known.all() else f"{side}_peer"
    valid = np.asarray(body.valid, bool)
    joints = _to_camera(np.asarray(body.motion.joints, float), cam_from_world)
    figures = {f"mpjpe_{tag}": float("nan"), f"pa_mpjpe_{tag}": float("nan")}
    if valid.any():
        a, b = joints[valid][:, known], truth[valid][:, known]
        figures = {
            f"mpjpe_{tag}": 1e3 * float(mpjpe(a, b).mean()),
            f"pa_mpjpe_{tag}": 1e3 * float(pa_mpjpe(a, b).mean()),
        }
        vertices = gt.get(f"{side}_vertices")
        if vertices is not None and vertices.shape[1:] == body.motion.vertices.shape[1:]:
            ours = _to_camera(np.asarray(body.motion.vertices, float), cam_from_world)[valid]
            error = mpvpe(ours, joints[valid, 0], vertices[index[valid]].astype(float), truth[valid, 0])
            figures[f"mpvpe_{tag}"] = 1e3 * float(error.mean())
    return figures, (joints[:, 0], truth[:, 0])


def _object_error(scene, gt, index, cam_from_world, ok, wrists):
    shape, motion = scene.bodies["object"].shape, scene.bodies["object"].motion
    faces, true_faces = np.asarray(shape.faces), np.asarray(gt["object_faces"])
    per_frame = gt.get("object_vertices_per_frame")
    cam_from_object, truth = (
        cam_from_world @ np.asarray(motion.world_from_body, float),
        gt["object_poses"].astype(float),
    )
    frames = np.flatnonzero(ok)

    def ours(count: int) -> np.ndarray:
        return sample_surface(shape.vertices, faces, count)

    def true(i: int, count: int, seed: int) -> np.ndarray:
        return sample_surface(
            gt["object_vertices"] if per_frame is None else per_frame[index[i]], true_faces, count, seed
        )

    out: dict[str, float] = {}
    if per_frame is None:
        a, b = ours(30000), true(0, 30000, seed=1)
        similarity = align_surfaces(a, b)
        out["cd"], out["f5"], out["f10"] = surface_error(transform(similarity, a), b)
    elif len(frames):
        similarity = align_surfaces(ours(20000), true(frames[0], 20000, seed=1))
        a = transform(similarity, ours(10000))
        errors = np.mean([surface_error(a, true(i, 10000, seed=1)) for i in frames], 0)
        out["cd_frames"], out["f5_frames"], out["f10_frames"] = (float(e) for e in errors)
    else:
        return out | {"cd_frames": float("nan"), "rot_deg": float("nan")} | {f"cd_{s}": float("nan") for s in wrists}
    out["scale_ratio"] = 1.0 / similarity[0]
    rotation = cam_from_object[:, :3, :3]
    rotation = rotation / np.cbrt(np.linalg.det(rotation))[:, None, None]
    errors = relative_rotation_error(rotation[frames], truth[index[frames], :3, :3])
    out["rot_deg"] = float(np.median(errors)) if len(errors) else float("nan")
    rest = ours(3000)
    for side, (wrist, true_wrist) in wrists.items():
        errors = []
        for i in frames:
            a = rest @ cam_from_object[i, :3, :3].T + cam_from_object[i, :3, 3] - wrist[i]
            pose = truth[index[i]]
            b = true(i, 3000, seed=0) @ pose[:3, :3].T + pose[:3, 3] - true_wrist[i]
            errors.append(1e4 * chamfer(a, b))
        out[f"cd_{side}"] = float(np.mean(errors)) if errors else float("nan")
    return out


def _to_camera(points: np.ndarray, cam_from_world: np.ndarray) -> np.ndarray:
    """(F,N,3) world points in each frame's camera."""
    return np.einsum("fij,fnj->fni", cam_from_world[:, :3, :3], points) + cam_from_world[:, None, :3, 3]
