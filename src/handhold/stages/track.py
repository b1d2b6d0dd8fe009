"""track: prepared clip -> hand and object poses in the camera's frame, metres, in `2_track/`.

tracks.npz: object.cam_from_object (F,4,4), NaN where unknown; object.confidence, object.reason; object.scale_known;
hand.<side>.{pose,betas,transl,confidence,reason,windows}; world_from_cam (F,4,4), camera.{static,confidence,reason}.
points.ply: the sparse points, object frame, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..config import Config
from ..errors import StageFailed, UnusableInput
from ..hand import HandModel
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, Mesh, Sequence, load_npz, save_npz
from .prepare import _part, load_prepared

MISREAD = 0.3  # of the other hand's frames: a hand seen in fewer, and never beside it, is not there

if TYPE_CHECKING:
    from ..tracking.camera import CameraTrack
    from ..tracking.grasp import GraspFit
    from ..tracking.sfm import SfmResult


@dataclass(frozen=True)
class HandTrack:
    """One hand over the clip, camera frame, metres."""

    pose: np.ndarray  # (F,16,3)
    betas: np.ndarray  # (10,)
    transl: np.ndarray  # (F,3)
    confidence: np.ndarray  # (F,)
    reason: np.ndarray  # (F,) str
    windows: np.ndarray  # (W,2) stable grasps, frames [start, end)


@dataclass(frozen=True)
class Tracks:
    """What tracking hands to the fit."""

    cam_from_object: np.ndarray  # (F,4,4), NaN where unknown
    confidence: np.ndarray  # (F,)
    reason: np.ndarray  # (F,) str
    points: np.ndarray  # (P,3) metres, object frame
    point_colors: np.ndarray  # (P,3) uint8
    hands: dict[str, HandTrack]
    world_from_cam: np.ndarray  # (F,4,4), metres; identity where the camera is static
    camera_static: bool
    camera_confidence: np.ndarray  # (F,)
    camera_reason: np.ndarray  # (F,) str


def track(run: Run, config: Config, report: Progress) -> None:
    """Object poses by structure from motion, hands and metric scale from the grasp; see the module's head."""
    from ..export.meshes import write_ply
    from ..tracking.camera import estimate_camera
    from ..tracking.sfm import structure_from_motion

    without = config.track.without
    sequence = evidence_without(load_prepared(run), without)
    camera = estimate_camera(
        sequence.frames, sequence.K, np.any(list(sequence.masks.values()), axis=0), run.track_dir / "camera",
        config.seed, partial(_part, report, 0.0, 0.1),
    )  # fmt: skip
    report.note(camera.evidence)
    hand_masks = {s: sequence.masks[s] for s in SIDES if s in sequence.masks}
    all_hands = np.any(list(hand_masks.values()), axis=0) if hand_masks and "hand-pixels" not in without else None
    sfm = structure_from_motion(
        sequence.frames, sequence.masks["object"], sequence.K, run.track_dir / "sfm", config.seed,
        partial(_part, report, 0.1, 0.5), all_hands, loops="loops" not in without, merging="merging" not in without,
    )  # fmt: skip
    for note in sfm.notes:
        report.note(note)
    hands, scale = fit_hands(sequence, sfm, config, report)
    poses = sfm.cam_from_object.copy()
    poses[:, :3, 3] *= scale
    arrays = {
        "object.cam_from_object": poses,
        "object.confidence": sfm.confidence,
        "object.reason": np.asarray(sfm.reason, dtype=np.str_),
        "points": sfm.points * scale,
        "point_colors": sfm.point_colors,
    } | _camera_arrays(camera, sfm, scale, hands, report)
    for s, h in hands.items():
        arrays |= {
            f"hand.{s}.pose": h.pose, f"hand.{s}.betas": h.betas, f"hand.{s}.transl": h.transl,
            f"hand.{s}.confidence": h.confidence, f"hand.{s}.reason": np.asarray(h.reason, dtype=np.str_),
            f"hand.{s}.windows": np.asarray(h.windows, np.int64).reshape(-1, 2),
        }  # fmt: skip
    save_npz(run.track_dir / "tracks.npz", arrays)
    if len(sfm.points):
        write_ply(
            run.track_dir / "points.ply",
            Mesh(
                np.asarray(sfm.points * scale, np.float32),
                np.zeros((0, 3), np.int32),
                sfm.point_colors / np.float32(255),
            ),
        )
    report(1.0, registered=int(sfm.registered.sum()))


def evidence_without(sequence: Sequence, without: tuple[str, ...]) -> Sequence:
    """The sequence less the evidence that `track.without` names."""
    if "regressor" in without:
        sequence = replace(sequence, regressed={})
    if "landmarks-3d" in without:
        flat = {s: replace(m, points3d=np.full_like(m.points3d, np.nan)) for s, m in sequence.landmarks.items()}
        sequence = replace(sequence, landmarks=flat)
    return sequence


def _camera_arrays(
    camera: CameraTrack, sfm: SfmResult, object_scale: float, hands: dict[str, GraspFit], report: Progress
) -> dict[str, np.ndarray]:
    """The camera, its path scaled to metres by what moves before it."""
    from ..tracking.camera import metric_scale, scale_note, scaled

    if camera.translates:
        points, trust = [h.joints[:, 0] for h in hands.values()], [h.confidence for h in hands.values()]
        if len(sfm.points):
            middle = np.append(np.median(sfm.points, axis=0), 1)
            points.append(object_scale * (sfm.cam_from_object @ middle)[:, :3])
            trust.append(sfm.confidence)
        scale = metric_scale(camera, points, trust)
        report.note(scale_note(scale))
        camera = scaled(camera, scale)
    return {
        "world_from_cam": camera.world_from_cam, "camera.static": np.bool_(camera.static),
        "camera.confidence": camera.confidence, "camera.reason": np.asarray(camera.reason, dtype=np.str_),
    }  # fmt: skip


def fit_hands(
    sequence: Sequence, sfm: SfmResult, config: Config, report: Progress
) -> tuple[dict[str, GraspFit], float]:
    """The hands in the object's frame, or each alone where the object has no poses, and metres per unit of `sfm`."""
    from ..tracking.grasp import HIDDEN, fit_grasp, fit_hand

    hand_masks = {s: sequence.masks[s] for s in SIDES if s in sequence.masks}
    without = config.track.without
    models = {s: HandModel.open(s, dtype=torch.float64) for s in sides_of(sequence, report)}
    mediapipe = {s: marks.source == "mediapipe" for s, marks in sequence.landmarks.items()}
    lost = int(sfm.registered.sum()) < 3
    if lost:
        report.partial(
            "The object's pose could not be found in any frame: too little texture for structure from motion."
        )
    if lost or "grasp" in without:
        hands = {
            s: fit_hand(m, sequence.K, sequence.landmarks[s], mediapipe[s], sequence.regressed.get(s))
            for s, m in models.items()
        }
        return hands, 1.0 if lost else _common_scale(hands, sfm.cam_from_object, report)
    hands, scale = {}, 1.0
    for again in range(2):
        for k, (s, model) in enumerate(models.items()):
            report(0.55 + 0.2 * again + 0.2 * k / len(models), f"{s} hand in the object's frame")
            others = [m for side, m in hand_masks.items() if side != s]
            hands[s] = fit_grasp(
                model, sequence.K, sfm.cam_from_object, sfm.registered, sfm.confidence, sequence.landmarks[s],
                hand_masks=hand_masks.get(s), object_points=sfm.points, seed=config.seed,
                object_masks=np.any([sequence.masks["object"], *others], axis=0), mediapipe=mediapipe[s],
                scale_prior=(scale, 0.01) if again else None, regressed=sequence.regressed.get(s),
                silhouettes="silhouette" not in without, regrasps="windows" not in without,
                slow_motion="slow-motion" not in without, hidden=1.0 if "visibility" in without else HIDDEN,
            )  # fmt: skip
        scale = _common_scale(hands, sfm.cam_from_object, report)
        if len(hands) == 1:
            break  # two hands must agree on the object's size; one hand alone does
    return hands, scale


def sides_of(sequence: Sequence, report: Progress) -> list[str]:
    """The hands that something tells of. One seen in few frames, and never beside the other, is the other misread."""
    from ..tracking.grasp import found

    seen = {s: found(m, sequence.regressed.get(s)) for s, m in sequence.landmarks.items()}
    sides = sorted((s for s in seen if seen[s].any()), key=lambda s: -seen[s].sum())
    if len(sides) == 2:
        more, less = (seen[s] for s in sides)
        if less.sum() < MISREAD * more.sum() and not (more & less).any():
            report.note(f"The {sides[1]} hand of {less.sum()} frames was taken for the {sides[0]} one, misread.")
            return sides[:1]
    return [s for s in sequence.landmarks if s in sides]


def _common_scale(hands, cam_from_object: np.ndarray, report: Progress) -> float:
    """Metres per unit of the object's frame: the hands' own estimates, weighted by how sure each is.

    When no hand tells (none was seen in enough frames where the object's pose is known) the object is put as far away
    as the hands are, and the result is marked partial.
    """
    logs = np.array([np.log(h.scale) for h in hands.values()])
    weights = np.array([1.0 / max(h.scale_std, 0.01) ** 2 for h in hands.values()])
    if not weights.sum() > 0:
        report.partial("The object's size is a guess: no hand was seen well enough while the object's pose was known.")
        wrists = [h.joints[h.confidence > 0, 0, 2] for h in hands.values()]
        distance = float(np.nanmedian(np.concatenate([*wrists, np.zeros(0)]))) if any(map(len, wrists)) else 0.5
        return distance / float(np.nanmedian(cam_from_object[:, 2, 3]))
    if len(logs) == 2 and (weights > 0).all() and abs(logs[0] - logs[1]) > 0.25:
        report.note(
            f"the two hands disagree on the object's scale by {100 * (np.exp(abs(logs[0] - logs[1])) - 1):.0f} %"
        )
    return float(np.exp((logs * weights).sum() / weights.sum()))


def load_tracks(run: Run, sequence: Sequence) -> Tracks:
    """Read `2_track/tracks.npz`; raises `UnusableInput` when it is not there."""
    path = run.track_dir / "tracks.npz"
    if not path.is_file():
        raise UnusableInput(f"{run.track_dir} is not complete; run `handhold track {run.root}` again.")
    z = load_npz(path)
    try:
        keys = ("pose", "betas", "transl", "confidence", "reason", "windows")
        hands = {s: HandTrack(*(z[f"hand.{s}.{k}"] for k in keys)) for s in SIDES if f"hand.{s}.pose" in z}
        object_keys = ("object.cam_from_object", "object.confidence", "object.reason", "points", "point_colors")
        camera_keys = ("world_from_cam", "camera.static", "camera.confidence", "camera.reason")
        if "world_from_cam" not in z:  # written before there was a camera
            n = len(z["object.confidence"])
            z |= dict(zip(camera_keys, (np.tile(np.eye(4), (n, 1, 1)), True, np.zeros(n), np.full(n, "")), strict=True))
        tracks = Tracks(*(z[k] for k in object_keys), hands, *(z[k] for k in camera_keys))
    except KeyError as e:
        raise UnusableInput(f"{path} has no {e.args[0]!r}; run `handhold track {run.root}` again.") from e
    if len(tracks.confidence) != len(sequence):
        raise StageFailed("The tracks are of another clip; run the `track` stage again.")
    return tracks
