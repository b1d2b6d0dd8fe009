"""fit: tracks -> shape, appearance and refined poses: `scene.npz` and `3_fit/<body>_gaussians.npz`."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from ..config import Config
from ..errors import StageFailed, UnusableInput
from ..export.meshes import write_ply
from ..files import write_atomically
from ..hand import HandModel
from ..methods.base import Fitted
from ..progress import Progress
from ..runs import Run
from ..scene import Body, Mesh, Rigid, Scene, Sequence, Skinned, load_npz, save_npz
from ..tracking.rungs import NOT_FOUND, SFM
from .prepare import _part
from .track import HandTrack, Tracks, load_tracked

MIN_CONFIDENCE = 0.08  # an object frame below this is not shown as found


def fit(run: Run, config: Config, report: Progress) -> None:
    """Fit the object's surface (SDF grid), both bodies' Gaussians, and the poses; write the scene."""
    from ..tracking.camera import in_world

    if config.device != "cpu" and config.method == "rigid":
        report.note(f"device {config.device} was asked for, but this method's kernels run on the CPU.")
    sequence, tracks = load_tracked(run)
    if not tracks.hands and not np.isfinite(tracks.cam_from_object[:, 0, 0]).any():
        raise StageFailed("Neither a hand nor the object could be tracked; there is nothing to fit.")
    if config.fit.poses is not None:
        tracks = with_poses(tracks, config.fit.poses)
        config = replace(config, fit=replace(config.fit, pose_lr=0.0))
    result = METHODS[config.method](sequence, tracks, config, partial(_part, report, 0.0, 0.95))
    for note in result.notes:
        report.note(note)
    for doubt in result.doubts:
        report.partial(doubt)
    for name, arrays in result.arrays.items():
        save_npz(run.fit_dir / f"{name}.npz", arrays)
    for name, tensors in result.tensors.items():
        write_atomically(run.fit_dir / f"{name}.safetensors", safetensors.torch.save(tensors))
    for name, mesh in result.meshes.items():
        write_ply(run.fit_dir / f"{name}.ply", mesh)
    scene = in_world(build_scene(sequence, tracks, result), tracks.world_from_cam)
    scene.save(run.scene_path)
    report(1.0)


def _for_all(config: Config, progress) -> dict[str, Any]:
    """The settings that every method takes."""
    registration = "registration" not in config.track.without and config.fit.poses is None
    return {
        "seed": config.seed,
        "pose_lr": config.fit.pose_lr,
        "mirror": config.fit.mirror,
        "registration": registration,
        "progress": progress,
    }


def _rigid(sequence: Sequence, tracks: Tracks, config: Config, progress) -> Fitted:
    from ..methods.rigid import fit_rigid

    return fit_rigid(
        sequence,
        tracks,
        appearance=config.fit.appearance,
        **_for_all(config, progress),
    )


def _bigs(sequence: Sequence, tracks: Tracks, config: Config, progress) -> Fitted:
    from ..methods.bigs import fit_bigs

    return fit_bigs(
        sequence,
        tracks,
        config.bigs,
        device=config.device,
        **_for_all(config, progress),
    )


def _hold(sequence: Sequence, tracks: Tracks, config: Config, progress) -> Fitted:
    from ..methods.hold import fit_hold

    return fit_hold(
        sequence,
        tracks,
        config.hold,
        **_for_all(config, progress),
        device=config.device,
    )


METHODS = {"rigid": _rigid, "bigs": _bigs, "hold": _hold}


def with_poses(tracks: Tracks, path: Path) -> Tracks:
    """Tracks with the object poses of a .npz that holds cam_from_object (F,4,4), metres. Raises `UnusableInput`.

    Tracked hands have the size and distance that tracking gave them; they take those that fit the given poses.
    """
    poses = load_npz(path).get("cam_from_object")
    shape = tracks.cam_from_object.shape
    if poses is None or poses.dtype.kind not in "fiu" or poses.shape != shape:
        raise UnusableInput(f"{path} must hold cam_from_object {shape}, one pose per frame of this clip.")
    poses = np.asarray(poses, np.float64)
    known = np.isfinite(poses).all((1, 2))
    r = poses[known, :3, :3]
    if not known.any() or np.abs(r @ r.transpose(0, 2, 1) - np.eye(3)).max() > 1e-3 or (np.linalg.det(r) < 0).any():
        raise UnusableInput(f"{path} holds no rigid poses: a turn and a shift each, without scale.")
    poses[~known] = np.nan
    k = size_in(tracks.cam_from_object, poses)
    return replace(
        tracks,
        hands={s: resized(s, h, 1 / k) for s, h in tracks.hands.items()},
        cam_from_object=poses,
        confidence=known.astype(np.float32),
        reason=np.where(known, SFM, NOT_FOUND),
        scale_known=True,
        carried_by="",
    )


def size_in(tracked: np.ndarray, given: np.ndarray) -> float:
    """How large the world of the `tracked` poses (F,4,4) is beside that of the `given` ones; 1 where that is not told.

    tracked = k (given translation + given rotation c), c: the tracked frame's origin in the given frame.
    """
    both = np.isfinite(tracked[:, 0, 0]) & np.isfinite(given[:, 0, 0])
    if both.sum() < 3:
        return 1.0
    a = np.concatenate([given[both, :3, 3, None], given[both, :3, :3]], 2).reshape(-1, 4)
    k = np.linalg.lstsq(a, tracked[both, :3, 3].reshape(-1), rcond=None)[0][0]
    return float(k) if 0.5 < k < 2 else 1.0


def resized(side: str, h: HandTrack, scale: float) -> HandTrack:
    """The hand `scale` times as large and as far away, so that its picture stays: the shape nearest to that."""
    model = HandModel.open(side, dtype=torch.float64)
    before = model.with_shape(torch.as_tensor(np.asarray(h.betas, np.float64)))
    target = scale * before.vertices - model.v_template
    basis = torch.cat([model.shapedirs, torch.eye(3, dtype=torch.float64).expand(len(target), 3, 3)], 2).reshape(-1, 13)
    ridge = 1e-4 * torch.eye(13, dtype=torch.float64)
    betas = torch.linalg.solve(basis.T @ basis + ridge, basis.T @ target.reshape(-1))[:10]
    wrist = before.rest_joints[0].numpy() + h.transl
    transl = scale * wrist - model.with_shape(betas).rest_joints[0].numpy()
    return replace(h, betas=betas.numpy().astype(h.betas.dtype), transl=transl)


def build_scene(sequence: Sequence, tracks: Tracks, result) -> Scene:
    """Tracks and fitted shape as a `Scene` whose world is each frame's camera; `in_world` moves it."""
    n = len(sequence)
    bodies: dict[str, Body] = {}
    for side, h in result.hands.items():
        bodies[side] = hand_body(side, h, result.hand_colors.get(side))
    if result.mesh is not None:
        poses = result.cam_from_object
        found = np.isfinite(poses[:, 0, 0])
        valid = found & (result.object_confidence >= MIN_CONFIDENCE)
        reason = np.where(found, result.object_reason, NOT_FOUND)
        same = np.array([[*a.axis, a.order] for a in result.ambiguous]).reshape(-1, 4)
        sure = result.object_confidence * found
        bodies["object"] = Body(result.mesh, Rigid(_held(poses, found)), valid, sure, reason, same)
    return Scene(sequence.K, sequence.size, sequence.fps, sequence.indices, np.tile(np.eye(4), (n, 1, 1)), bodies)


def hand_body(side: str, h: HandTrack, colors: np.ndarray | None = None) -> Body:
    """A tracked hand as a skinned body of the open hand model; `colors` (V,3) of its vertices."""
    f64 = lambda x: torch.as_tensor(np.asarray(x, np.float64))  # noqa: E731
    model = HandModel.open(side, dtype=torch.float64)
    posed = model.with_shape(f64(h.betas)).with_pose(f64(h.pose), f64(h.transl))
    vertices, joints = posed.vertices.numpy(), posed.joints.numpy()
    valid = np.isfinite(vertices).all((1, 2)) & (h.confidence > 0)
    shape = Mesh(
        posed.rest_vertices.numpy()[0] if posed.rest_vertices.ndim == 3 else posed.rest_vertices.numpy(),
        np.asarray(model.faces),
        colors,
    )
    return Body(
        shape, Skinned(f"open_hand_{side}", h.pose, h.betas, h.transl, vertices, joints), valid, h.confidence, h.reason
    )


def _held(poses: np.ndarray, found: np.ndarray) -> np.ndarray:
    """Poses with every unknown frame holding the nearest known one (they are marked invalid)."""
    known = np.flatnonzero(found)
    nearest = known[np.abs(np.arange(len(poses))[:, None] - known[None]).argmin(1)]
    return poses[nearest]
