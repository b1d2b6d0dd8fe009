"""track: prepared clip -> hand and object poses in the camera's frame, metres, in `2_track/`.

tracks.npz: object.cam_from_object (F,4,4), NaN where unknown; object.confidence; object.reason, a rung of
`tracking.rungs`, and object.rung, its number; object.scale_known; object.carried_by, the hand whose frame is the
object's, or empty; hand.<side>.{pose,betas,transl,confidence,reason,rung,windows,contacts}. points.ply: the sparse
points, object frame, metres.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
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

if TYPE_CHECKING:
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
    scale_known: bool = True  # False: lengths are a guess
    carried_by: str = ""  # the hand whose frame is the object's, where the object has none of its own


def track(run: Run, config: Config, report: Progress) -> None:
    """Object poses by structure from motion, then by the hands; hands and metric scale from the grasp."""
    from ..export.meshes import write_ply
    from ..tracking import rungs
    from ..tracking.sfm import structure_from_motion

    sequence = load_prepared(run)
    hand_masks = {s: sequence.masks[s] for s in SIDES if s in sequence.masks}
    all_hands = np.any(list(hand_masks.values()), axis=0) if hand_masks else None
    sfm = structure_from_motion(
        sequence.frames, sequence.masks["object"], sequence.K, run.track_dir / "sfm", config.seed,
        partial(_part, report, 0.0, 0.55), all_hands,
    )  # fmt: skip
    for note in sfm.notes:
        report.note(note)
    sfm = believed(sequence, sfm, config, report)
    for note in rungs.doubts(sfm.reason):
        report.note(note)
    hands, scale = fit_hands(sequence, sfm, config, report)
    placed = place_object(sequence, sfm, scale, hands, report)
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
    }
    for s, h in hands.items():
        reason = np.asarray([rungs.hand_rung(str(r), c) for r, c in zip(h.reason, h.confidence, strict=True)])
        arrays |= {
            f"hand.{s}.pose": h.pose, f"hand.{s}.betas": h.betas, f"hand.{s}.transl": h.transl,
            f"hand.{s}.confidence": h.confidence, f"hand.{s}.reason": reason,
            f"hand.{s}.rung": rungs.codes(reason, rungs.HAND_RUNGS),
            f"hand.{s}.windows": np.asarray(h.windows, np.int64).reshape(-1, 2),
            f"hand.{s}.contacts": placed.contacts[s],
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
    report(1.0, registered=int(np.isfinite(placed.cam_from_object[:, 0, 0]).sum()))


def believed(sequence: Sequence, sfm: SfmResult, config: Config, report: Progress) -> SfmResult:
    """`sfm`, or nothing where the hand that holds the object turns otherwise: features that stand on noise or shading
    give models that agree with themselves and are wrong."""
    from ..tracking.contact import beside_in_picture
    from ..tracking.fiducial import CONTRADICTS, cam_from_hand, contradiction
    from ..tracking.grasp import fit_hand
    from ..tracking.hand_evidence import found
    from ..tracking.sfm import nothing

    for s, landmarks in sequence.landmarks.items():
        regressed = sequence.regressed.get(s)
        if s not in sequence.masks or not sfm.registered.any() or not found(landmarks, regressed).any():
            continue
        model = HandModel.open(s, dtype=torch.float64)
        hand = fit_hand(model, sequence.K, landmarks, config.prepare.joints is None, regressed)
        beside = beside_in_picture(sequence.masks[s], sequence.masks["object"])
        apart = contradiction(
            sfm.cam_from_object, cam_from_hand(model, hand.pose, hand.joints), hand.confidence, beside
        )
        if apart is not None and apart > CONTRADICTS:
            turn = f"{np.degrees(apart):.0f} degrees"
            why = f"structure from motion is not believed: the {s} hand turns otherwise by {turn}"
            report.note(why)
            return nothing(len(sequence), why, sfm.fragments)
    return sfm


def fit_hands(
    sequence: Sequence, sfm: SfmResult, config: Config, report: Progress
) -> tuple[dict[str, GraspFit], float]:
    """The hands in the object's frame, or each alone where the object has no poses, and metres per unit of `sfm`."""
    from ..tracking.contact import beside_in_picture
    from ..tracking.fiducial import stiff_hand
    from ..tracking.grasp import fit_grasp, fit_hand

    hand_masks = {s: sequence.masks[s] for s in SIDES if s in sequence.masks}
    models = {s: HandModel.open(s, dtype=torch.float64) for s in sequence.landmarks}
    mediapipe = config.prepare.joints is None
    hands, scale = {}, 1.0
    if int(sfm.registered.sum()) < 3:
        for s, m in models.items():
            seen = sequence.landmarks[s], sequence.regressed.get(s)
            hands[s] = fit_hand(m, sequence.K, seen[0], mediapipe, seen[1])
            if s in hand_masks and beside_in_picture(hand_masks[s], sequence.masks["object"]).mean() > 0.5:
                hands[s] = stiff_hand(m, sequence.K, seen[0], hands[s], mediapipe, seen[1])
        return hands, 1.0
    for again in range(2):
        for k, (s, model) in enumerate(models.items()):
            report(0.55 + 0.2 * again + 0.2 * k / len(models), f"{s} hand in the object's frame")
            others = [m for side, m in hand_masks.items() if side != s]
            hands[s] = fit_grasp(
                model, sequence.K, sfm.cam_from_object, sfm.registered, sfm.confidence, sequence.landmarks[s],
                hand_masks=hand_masks.get(s), object_points=sfm.points, seed=config.seed,
                object_masks=np.any([sequence.masks["object"], *others], axis=0), mediapipe=mediapipe,
                scale_prior=(scale, 0.01) if again else None, regressed=sequence.regressed.get(s),
            )  # fmt: skip
        scale = _common_scale(hands, sfm.cam_from_object, report)
        if len(hands) == 1:
            break  # two hands must agree on the object's size; one hand alone does
    return hands, scale


@dataclass(frozen=True)
class Placed:
    """The object over the clip, metres, by the first rungs of the ladder."""

    cam_from_object: np.ndarray  # (F,4,4), NaN where unknown
    confidence: np.ndarray  # (F,)
    reason: np.ndarray  # (F,) str, of `tracking.rungs.OBJECT_RUNGS`
    carried_by: str  # the hand whose frame is the object's, or empty
    contacts: dict[str, np.ndarray]  # side -> (C,2) frames [start, end)


def place_object(
    sequence: Sequence, sfm: SfmResult, scale: float, hands: dict[str, GraspFit], report: Progress
) -> Placed:
    """Poses of structure from motion in metres; where it has none, by the hands that hold the object."""
    from ..tracking import rungs
    from ..tracking.contact import beside_in_picture, contact_windows, gaps
    from ..tracking.fiducial import cam_from_hand, carry_clip, carry_missing

    poses = sfm.cam_from_object.copy()
    poses[:, :3, 3] *= scale
    whole = any("the object and the hand" in n for n in sfm.notes)
    reason = np.array([rungs.object_rung(str(r), whole) for r in sfm.reason], dtype="<U24")
    reason[~np.isfinite(poses[:, 0, 0])] = rungs.NOT_FOUND
    confidence = np.asarray(sfm.confidence, np.float32).copy()
    alone = int(sfm.registered.sum()) < 3
    carriers, contacts = {}, {}
    for s, h in hands.items():
        mask = sequence.masks.get(s)
        beside = np.zeros(len(sequence), bool) if mask is None else beside_in_picture(mask, sequence.masks["object"])
        gap = np.where(beside, 0.0, 1.0) if alone else gaps(h.vertices, poses, sfm.points * scale)
        contacts[s] = contact_windows(gap)
        holds = np.zeros(len(sequence), bool)
        for a, b in contacts[s]:
            holds[a:b] = True
        model = HandModel.open(s, dtype=torch.float64)
        carriers[s] = cam_from_hand(model, h.pose, h.joints), h.confidence, beside & (holds | ~np.isfinite(gap))
    if alone:
        carried = carry_clip(carriers)
        if carried is None:
            report.partial(
                "The object's pose could not be found in any frame: "
                "too little texture for structure from motion, and no hand that holds it is seen well enough."
            )
            poses[:] = np.nan
            return Placed(poses, np.zeros_like(confidence), np.full_like(reason, rungs.NOT_FOUND), "", contacts)
        report.partial(
            "The object's pose rests on the hand that holds it: too little texture for structure from motion. "
            f"The {carried.side} hand's frame is the object's."
        )
        poses, confidence = carried.cam_from_object, carried.confidence
        reason = np.where(np.isfinite(poses[:, 0, 0]), rungs.FIDUCIAL, rungs.NOT_FOUND)
        return Placed(poses, confidence, reason, carried.side, contacts)
    carried = carry_missing(poses, confidence, carriers, {s: np.asarray(h.windows) for s, h in hands.items()})
    new = np.isfinite(carried.cam_from_object[:, 0, 0]) & ~np.isfinite(poses[:, 0, 0])
    reason[new] = rungs.FIDUCIAL
    return Placed(carried.cam_from_object, np.where(new, carried.confidence, confidence), reason, "", contacts)


SURE_OF_SIZE = 0.10  # standard deviation of the logarithm of the scale above which the size is not known


def scale_is_known(hands: dict[str, GraspFit], placed: Placed, report: Progress) -> bool:
    """Whether a hand tells how large the object is; says so when not, and when each hand touches it."""
    touching = {s: c for s, c in placed.contacts.items() if len(c)}
    for s, spans in touching.items():
        report.note(f"the {s} hand touches the object in frames {', '.join(f'{a}-{b - 1}' for a, b in spans)}")
    if not np.isfinite(placed.cam_from_object[:, 0, 0]).any():
        return False
    if not touching:
        report.partial(
            "The object's size is not observable: no hand touches it for long enough, and one camera cannot tell a "
            "small near thing from a large far one."
        )
        return False
    if placed.carried_by:
        return True
    if not any(np.isfinite(hands[s].scale_std) for s in touching):
        return False  # `_common_scale` has said so
    std = float(1 / np.sqrt(max(sum(max(hands[s].scale_std, 0.01) ** -2 for s in touching), 1e-12)))
    if std > SURE_OF_SIZE:
        report.partial(f"The object's size is hardly observable: the hand tells it to {100 * min(std, 9.99):.0f} %.")
        return False
    return True


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
    if len(logs) == 2 and abs(logs[0] - logs[1]) > 0.25:
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
        none = np.zeros((0, 2), np.int64)
        hands = {s: replace(h, contacts=z.get(f"hand.{s}.contacts", none)) for s, h in hands.items()}
        object_keys = ("object.cam_from_object", "object.confidence", "object.reason", "points", "point_colors")
        rest = bool(z.get("object.scale_known", True)), str(z.get("object.carried_by", ""))
        tracks = Tracks(*(z[k] for k in object_keys), hands, *rest)
    except KeyError as e:
        raise UnusableInput(f"{path} has no {e.args[0]!r}; run `handhold track {run.root}` again.") from e
    if len(tracks.confidence) != len(sequence):
        raise StageFailed("The tracks are of another clip; run the `track` stage again.")
    return tracks
