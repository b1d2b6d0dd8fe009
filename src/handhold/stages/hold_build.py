"""A run folder written as the `build/` folder that HOLD trains on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from ..datasets.hold import BuildTracks, CameraHand, write_build
from ..errors import UnusableInput
from ..hand import HandModel
from ..runs import Run
from ..scene import Rigid, Scene, Sequence, Skinned
from .track import Tracks, load_tracked

MIN_POINTS = 20  # on the object, for HOLD to know where it is


def write_hold_build(run: Run, folder: Path, mano: Path | None = None) -> tuple[str, ...]:
    """Write `folder` from a run's prepared clip with the poses of its fit, or without one those of tracking.

    mano: the user's MANO_RIGHT.pkl or MANO_LEFT.pkl (the other is looked for beside it); hands are then those of MANO,
    fitted to the joints of ours. Frames without an object pose get one between their neighbours.
    Returns notes. Raises `UnusableInput` when the run is not that far, or HOLD could not use the clip.
    """
    sequence, tracks = load_tracked(run)
    scene = Scene.load(run.scene_path) if run.scene_path.is_file() else None
    if scene is not None and "object" in scene.bodies:
        made, notes = _of_scene(scene), []
    else:
        made, notes = _of_tracks(sequence, tracks), ["The run has no fitted scene; poses and points are tracking's."]
    known = np.isfinite(made.cam_from_object[:, 0, 0])
    if not known.any():
        raise UnusableInput(f"{run.root} has no object pose in any frame, so there is nothing for HOLD to start from.")
    if not known.all():
        notes.append(f"{int((~known).sum())} frames without an object pose got one between their neighbours.")
        made = replace(made, cam_from_object=filled(made.cam_from_object, np.median(made.points, axis=0)))
    if mano is not None:
        hands = {}
        for side, hand in made.hands.items():
            hands[side], error = _as_mano(side, hand, mano)
            notes.append(f"MANO's joints of the {side} hand are {1000 * error:.1f} mm from ours on average.")
        made = replace(made, hands=hands)
    return write_build(folder, sequence, made, notes=tuple(notes))


def filled(poses: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """(F,4,4) with every unknown pose between its neighbours (`bridge_gaps`), and the nearest at the ends."""
    from ..tracking.fiducial import bridge_gaps

    poses = poses.copy()
    bridge_gaps(poses, centre, longest=len(poses), turn=np.inf)
    known = np.flatnonzero(np.isfinite(poses[:, 0, 0]))
    return poses[np.clip(np.arange(len(poses)), known[0], known[-1])]


def _of_scene(scene: Scene) -> BuildTracks:
    cam_from_world = np.linalg.inv(np.asarray(scene.world_from_cam, np.float64))
    body = scene.bodies["object"]
    assert isinstance(body.motion, Rigid)
    poses = np.where(body.valid[:, None, None], cam_from_world @ body.motion.world_from_body, np.nan)
    hands = {}
    for side, hand in scene.bodies.items():
        if isinstance(hand.motion, Skinned):
            m = hand.motion
            hands[side] = _open_hand(side, m.pose, m.betas, m.transl, m.model).moved(cam_from_world)
    return BuildTracks(poses, body.shape.vertices, hands)


def _of_tracks(sequence: Sequence, tracks: Tracks) -> BuildTracks:
    if len(tracks.points) < MIN_POINTS:
        raise UnusableInput("Tracking found no points on the object, which HOLD needs; run `handhold fit` first.")
    hands = {s: _open_hand(s, h.pose, h.betas, h.transl) for s, h in tracks.hands.items()}
    return BuildTracks(tracks.cam_from_object, tracks.points, hands)


def _open_hand(side: str, pose, betas, transl, name: str | None = None) -> CameraHand:
    """A hand of the open model; frames without a pose take the nearest one's."""
    model = HandModel.open(side, dtype=torch.float64)
    if name not in (None, model.name):
        raise UnusableInput(f"The {side} hand is posed by {name}, whose rest joints are not known here.")
    known = np.flatnonzero(np.isfinite(np.concatenate([pose.reshape(len(pose), -1), transl], 1)).all(1))
    if not len(known):
        raise UnusableInput(f"The {side} hand has no pose in any frame, so there is nothing for HOLD to start from.")
    near = known[np.abs(np.arange(len(pose))[:, None] - known).argmin(1)]
    wrist = model.with_shape(torch.as_tensor(np.asarray(betas, np.float64))).rest_joints[0].numpy()
    return CameraHand(model.name, pose[near], betas, transl[near], wrist)


def _as_mano(side: str, hand: CameraHand, path: Path) -> tuple[CameraHand, float]:
    """The hand posed by the user's MANO, and the mean distance of its joints from ours, metres."""
    from ..hand import load_mano
    from ..hand.retarget import retarget

    other = "LEFT" if "left" in path.name.lower() else "RIGHT"
    file = path.with_name(path.name.replace(other, side.upper()).replace(other.lower(), side))
    model = load_mano(file, side, flat_hand_mean=False, dtype=torch.float64)
    f64 = lambda x: torch.as_tensor(np.asarray(x, np.float64))  # noqa: E731
    ours = HandModel.open(side, dtype=torch.float64).with_shape(f64(hand.betas))
    theta, betas, transl, error = retarget(ours.joints(f64(hand.pose), f64(hand.transl)), model)
    wrist = model.with_shape(betas).rest_joints[0]
    return CameraHand(model.name, *(x.numpy() for x in (theta, betas, transl, wrist))), float(error.mean())
