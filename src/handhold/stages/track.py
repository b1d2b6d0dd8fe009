"""track: prepared clip -> hand and object poses in the camera's frame, metres, in `2_track/`.

tracks.npz: object.cam_from_object (F,4,4), NaN where unknown; object.confidence; object.reason, a rung of
`tracking.rungs`, and object.rung, its number; object.scale_known; object.carried_by, the hand whose frame is the
object's, or empty; hand.<side>.{pose,betas,transl,confidence,reason,rung,windows,contacts}; world_from_cam (F,4,4),
camera.{static,confidence,reason}; mask_confidence.<name> of masks/, those of `prepare` made anew with what tracking
knows. points.ply: the sparse points, object frame, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..config import Config
from ..datasets.masks import write_masks
from ..errors import StageFailed, UnusableInput
from ..progress import Progress
from ..runs import Run
from ..scene import SIDES, Mesh, Sequence, load_npz, save_npz
from .prepare import _part, load_prepared, load_probabilities, read_mask_folder
from .track_hands import fit_hands
from .track_object import believed, hands_alone, place_object, scale_is_known

if TYPE_CHECKING:
    from ..tracking._sfm_learned import Features
    from ..tracking.camera import CameraTrack
    from ..tracking.grasp import GraspFit
    from ..tracking.masks import Look
    from ..tracking.sfm import SfmResult


SPOILT = 0.82  # IoU of the object's first masks with the second, below which motion is found anew (clean: 0.89 to 0.97)
DOUBTED = 0.3  # of the confidence that is left of poses that no hand bears out
FEWER = 0.8  # of the frames that the first masks or matches placed: better ones may place as few


@dataclass(frozen=True)
class HandTrack:
    """One hand over the clip, camera frame, metres."""

    pose: np.ndarray  # (F,16,3)
    betas: np.ndarray  # (10,)
    transl: np.ndarray  # (F,3)
    confidence: np.ndarray  # (F,)
    reason: np.ndarray  # (F,) str
    windows: np.ndarray  # (W,2) stable grasps, frames [start, end)
    contacts: np.ndarray = field(default_factory=lambda: np.zeros((0, 2), np.int64))  # (C,2) touches the object


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
    scale_known: bool = True  # False: lengths are a guess
    carried_by: str = ""  # the hand whose frame is the object's, where the object has none of its own


def track(run: Run, config: Config, report: Progress) -> None:
    """Object poses by structure from motion, then by the hands; hands and metric scale from the grasp; masks anew with
    all that, and the hands once more with these."""
    from ..export.meshes import write_ply
    from ..tracking import rungs
    from ..tracking.camera import estimate_camera
    from ..tracking.contact import may_hold
    from ..tracking.masks import look_at

    without = config.track.without
    features = _learned(config) if config.track.features == "xfeat" else None
    sequence = evidence_without(load_prepared(run), without)
    camera = estimate_camera(
        sequence.frames, sequence.K, np.any(list(sequence.masks.values()), axis=0), run.track_dir / "camera",
        config.seed, partial(_part, report, 0.0, 0.1),
    )  # fmt: skip
    report.note(camera.evidence)
    again = not settled(sequence) and "second-masks" not in without

    alone: dict[str, GraspFit] = {}
    looks: list[Look] = []

    def meanwhile() -> None:
        if "fiducial" not in without:
            alone.update(hands_alone(sequence))
        if again:
            looks.append(look_at(sequence, False))

    motion = partial(object_motion, run=run, config=config, features=features)
    sfm = motion(sequence, say=partial(_part, report, 0.1, 0.5), meanwhile=meanwhile)
    sfm = believed(sequence, sfm, alone, report)
    fitted = partial(fit_hands, config=config, alone=alone)
    hands, scale = fitted(sequence, sfm, report=report, say=partial(_part, report, 0.5, 0.65))
    if int(sfm.registered.sum()) >= 3 and again:
        anew = partial(masks_anew, probabilities=load_probabilities(run), seed=config.seed, look=looks[0])
        first, sequence = sequence, anew(sequence, sfm, scale, hands, say=partial(_part, report, 0.65, 0.85))
        if (agree := agreement(first.masks["object"], sequence.masks["object"])) < SPOILT:
            report.note(
                f"the object's masks were made anew (IoU with the first {agree:.2f}), and its motion after them"
            )
            second = motion(sequence, say=partial(_part, report, 0.85, 0.9))
            second = believed(sequence, second, alone, report)
            if second.registered.sum() >= FEWER * sfm.registered.sum():
                sfm = second
                hands, scale = fitted(sequence, sfm, report=None, say=partial(_part, report, 0.9, 0.92))
                sequence = anew(sequence, sfm, scale, hands, say=partial(_part, report, 0.92, 0.95))
        write_masks(run.track_dir / "masks", sequence.masks, sequence.indices)
        told = any(np.isfinite(h.scale_std) for h in hands.values())
        last = partial(_part, report, 0.95, 1.0)
        hands, scale = fitted(sequence, sfm, report=None, say=last, scale=scale if told else None)
    if not any(may_hold(sequence, s) for s in hands):
        report.partial("No hand is beside the object for long: what was taken for it may be held by nobody.")
    loose = [s for s, h in hands.items() if h is alone.get(s)] if sfm.registered.any() else []
    for s in loose:
        report.note(f"The {s} hand does not go along with the object: it was fitted alone.")
    if loose and len(loose) == len(hands):
        report.partial("No hand goes along with the object as it was found to move, so that its motion is in doubt.")
        sfm = replace(sfm, confidence=DOUBTED * sfm.confidence)
    for note in sfm.notes:
        report.note(note)
    for note in rungs.doubts(sfm.reason):
        report.note(note)
    placed = place_object(sequence, sfm, scale, hands, report, "fiducial" not in without)
    if int(sfm.registered.sum()) < 3:  # the few points there are lie in a frame that is not used
        sfm = replace(sfm, points=sfm.points[:0], point_colors=sfm.point_colors[:0])
    arrays = {
        "object.cam_from_object": placed.cam_from_object,
        "object.confidence": placed.confidence,
        "object.reason": np.asarray(placed.reason, dtype=np.str_),
        "object.rung": rungs.codes(placed.reason, rungs.OBJECT_RUNGS),
        "object.scale_known": np.bool_(scale_is_known(hands, placed, report)),
        "object.carried_by": np.asarray(placed.carried_by, dtype=np.str_),
        "points": sfm.points * scale,
        "point_colors": sfm.point_colors,
    } | _camera_arrays(camera, sfm, scale, hands, report)
    for s, h in hands.items():
        reason = np.asarray([rungs.hand_rung(str(r), c) for r, c in zip(h.reason, h.confidence, strict=True)])
        arrays |= {
            f"hand.{s}.pose": h.pose, f"hand.{s}.betas": h.betas, f"hand.{s}.transl": h.transl,
            f"hand.{s}.confidence": h.confidence, f"hand.{s}.reason": reason,
            f"hand.{s}.rung": rungs.codes(reason, rungs.HAND_RUNGS),
            f"hand.{s}.windows": np.asarray(h.windows, np.int64).reshape(-1, 2),
            f"hand.{s}.contacts": placed.contacts[s],
        }  # fmt: skip
    if (run.track_dir / "masks").is_dir():
        arrays |= {f"mask_confidence.{k}": np.asarray(c, np.float32) for k, c in sequence.mask_confidence.items()}
    save_npz(run.track_dir / "tracks.npz", arrays)
    if len(sfm.points):
        colors = sfm.point_colors / np.float32(255)
        points = Mesh(np.asarray(sfm.points * scale, np.float32), np.zeros((0, 3), np.int32), colors)
        write_ply(run.track_dir / "points.ply", points)
    report(1.0, registered=int(np.isfinite(placed.cam_from_object[:, 0, 0]).sum()))


def object_motion(
    sequence: Sequence, run: Run, config: Config, say, meanwhile=lambda: None, features: Features | None = None
) -> SfmResult:
    """Structure from motion on the object, with the pixels of the hands that may hold it; features: learned ones."""
    from ..tracking._sfm_learned import missing_packages
    from ..tracking.contact import may_hold
    from ..tracking.sfm import structure_from_motion

    without = config.track.without
    hand_masks = [sequence.masks[s] for s in SIDES if may_hold(sequence, s)]
    all_hands = np.any(hand_masks, axis=0) if hand_masks and "hand-pixels" not in without else None
    solve = partial(
        structure_from_motion, sequence.frames, sequence.masks["object"], sequence.K, run.track_dir / "sfm",
        config.seed, say, all_hands, loops="loops" not in without, merging="merging" not in without,
        times=sequence.indices,
    )  # fmt: skip
    first = solve(meanwhile=meanwhile, features=features)
    if config.track.features != "auto" or not first.halts:
        return first
    if missing_packages():
        hint = "learned features (pip install 'handhold[xfeat]') may tell how it turned over the missing frames"
        return replace(first, notes=(*first.notes, hint))
    second = solve(features=_learned(config))
    better = len(second.halts) < len(first.halts) and second.registered.sum() >= FEWER * first.registered.sum()
    return second if better else first


def _learned(config: Config) -> Features:
    """The networks of learned features. Raises `MissingAsset` where they cannot be loaded."""
    from ..tracking._sfm_learned import XFeatures

    return XFeatures(config.device)


def agreement(a: np.ndarray, b: np.ndarray) -> float:
    """Mean over frames of the IoU of two masks (F,H,W) bool."""
    return float(((a & b).sum((1, 2)) / np.maximum((a | b).sum((1, 2)), 1)).mean())


def evidence_without(sequence: Sequence, without: tuple[str, ...]) -> Sequence:
    """The sequence less the evidence that `track.without` names."""
    if "regressor" in without:
        sequence = replace(sequence, regressed={})
    if "landmarks-3d" in without:
        flat = {s: replace(m, points3d=np.full_like(m.points3d, np.nan)) for s, m in sequence.landmarks.items()}
        sequence = replace(sequence, landmarks=flat)
    return sequence


def settled(sequence: Sequence) -> bool:
    """Whether all masks are the user's (or of a network that knows better), so that nothing is left to improve."""
    return {"object", *sequence.landmarks} <= set(sequence.settled)


def masks_anew(
    sequence: Sequence, sfm: SfmResult, scale: float, hands: dict[str, GraspFit], probabilities: np.ndarray | None,
    seed: int, look: Look | None, say,
) -> Sequence:  # fmt: skip
    """`tracking.relabel` with a first surface of the object; settled masks stay."""
    from ..hand import HandModel
    from ..tracking.object import first_surface
    from ..tracking.relabel import relabel

    poses = sfm.cam_from_object.copy()
    poses[:, :3, 3] *= scale
    mesh = first_surface(
        sequence, poses, sfm.confidence, seed, lambda part, *_, **__: say(0.3 * part, "a first surface")
    )
    posed = {}
    for s, h in hands.items():
        known = (h.confidence > 0)[:, None, None]
        posed[s] = np.where(known, h.vertices, np.nan), np.asarray(HandModel.open(s).faces)
    telling = lambda part, what: say(0.3 + 0.7 * part, what)  # noqa: E731
    anew = relabel(sequence, posed, mesh, poses, probabilities, seed, telling, look)
    if not anew.masks["object"].any():
        return sequence
    keep = set(sequence.settled)
    return replace(
        sequence,
        masks=anew.masks | {k: m for k, m in sequence.masks.items() if k in keep},
        mask_confidence=dict(anew.mask_confidence) | {k: c for k, c in sequence.mask_confidence.items() if k in keep},
    )


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


def load_tracked(run: Run) -> tuple[Sequence, Tracks]:
    """The prepared clip, with the masks that tracking made anew, and the tracks. Raises as `load_prepared` and
    `load_tracks` do."""
    sequence = load_prepared(run)
    return with_masks_anew(run, sequence), load_tracks(run, sequence)


def with_masks_anew(run: Run, sequence: Sequence) -> Sequence:
    """`sequence` with the masks in `2_track/masks/`, where there are any."""
    path = run.track_dir / "tracks.npz"
    z = load_npz(path) if path.is_file() else {}
    confidence = {k.removeprefix("mask_confidence."): c for k, c in z.items() if k.startswith("mask_confidence.")}
    if not confidence:
        return sequence
    again = f"{run.track_dir} is not complete; run `handhold track {run.root}` again."
    masks = {k: read_mask_folder(run.track_dir / "masks" / k, sequence.indices, again) for k in confidence}
    return replace(sequence, masks=masks, mask_confidence=confidence)


def load_tracks(run: Run, sequence: Sequence) -> Tracks:
    """Read `2_track/tracks.npz`; raises `UnusableInput` when it is not there."""
    path = run.track_dir / "tracks.npz"
    if not path.is_file():
        raise UnusableInput(f"{run.track_dir} is not complete; run `handhold track {run.root}` again.")
    z = load_npz(path)
    try:
        keys = ("pose", "betas", "transl", "confidence", "reason", "windows")
        hands = {s: HandTrack(*(z[f"hand.{s}.{k}"] for k in keys)) for s in SIDES if f"hand.{s}.pose" in z}
        none = np.zeros((0, 2), np.int64)
        hands = {s: replace(h, contacts=z.get(f"hand.{s}.contacts", none)) for s, h in hands.items()}
        object_keys = ("object.cam_from_object", "object.confidence", "object.reason", "points", "point_colors")
        camera_keys = ("world_from_cam", "camera.static", "camera.confidence", "camera.reason")
        if "world_from_cam" not in z:  # written before there was a camera
            n = len(z["object.confidence"])
            z |= dict(zip(camera_keys, (np.tile(np.eye(4), (n, 1, 1)), True, np.zeros(n), np.full(n, "")), strict=True))
        rest = bool(z.get("object.scale_known", True)), str(z.get("object.carried_by", ""))
        tracks = Tracks(*(z[k] for k in object_keys), hands, *(z[k] for k in camera_keys), *rest)
    except KeyError as e:
        raise UnusableInput(f"{path} has no {e.args[0]!r}; run `handhold track {run.root}` again.") from e
    if len(tracks.confidence) != len(sequence):
        raise StageFailed("The tracks are of another clip; run the `track` stage again.")
    return tracks
