"""The object of a clip, for `track`: the first rungs of the ladder of poses, and whether its size is known."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from ..hand import HandModel
from ..parallel import each
from ..progress import Progress
from ..scene import Sequence

if TYPE_CHECKING:
    from ..tracking.grasp import GraspFit
    from ..tracking.sfm import SfmResult


def hand_alone(sequence: Sequence, side: str) -> GraspFit:
    """One hand, fitted without the object."""
    from ..tracking.grasp import fit_hand

    marks, model = sequence.landmarks[side], HandModel.open(side, dtype=torch.float64)
    return fit_hand(model, sequence.K, marks, marks.source == "mediapipe", sequence.regressed.get(side))


def hands_alone(sequence: Sequence) -> dict[str, GraspFit]:
    """Each hand that has a mask, fitted without the object."""
    from ..tracking.hand_evidence import found

    there = [s for s, m in sequence.landmarks.items() if found(m, sequence.regressed.get(s)).any()]
    there = [s for s in there if s in sequence.masks]
    return dict(zip(there, each(partial(hand_alone, sequence), there), strict=True))


def believed(sequence: Sequence, sfm: SfmResult, alone: dict[str, GraspFit], report: Progress) -> SfmResult:
    """`sfm` where the hand that holds the object bears it out; else mended, or nothing.

    Features that stand on noise or shading give models that agree with themselves and are wrong; parts between which
    nothing can be followed are joined wrongly (`tracking.seams`). alone: `hands_alone`.
    """
    from ..tracking.contact import beside_in_picture
    from ..tracking.fiducial import CONTRADICTS, cam_from_hand, contradiction
    from ..tracking.seams import Witness, mend
    from ..tracking.sfm import nothing

    if not sfm.registered.any():
        return sfm
    witnesses = {}
    for s, hand in alone.items():
        wrist = cam_from_hand(HandModel.open(s, dtype=torch.float64), hand.pose, hand.joints)
        beside = beside_in_picture(sequence.masks[s], sequence.masks["object"])
        witnesses[s] = Witness(wrist, hand.confidence, beside)
        apart = contradiction(sfm.cam_from_object, wrist, hand.confidence, beside)
        if apart is not None and apart > CONTRADICTS:
            turn = f"{np.degrees(apart):.0f} degrees"
            why = f"structure from motion is not believed: the {s} hand turns otherwise by {turn}"
            report.note(why)
            return nothing(len(sequence), why, sfm.fragments)
    return mend(sfm, witnesses)


@dataclass(frozen=True)
class Placed:
    """The object over the clip, metres, by the first rungs of the ladder."""

    cam_from_object: np.ndarray  # (F,4,4), NaN where unknown
    confidence: np.ndarray  # (F,)
    reason: np.ndarray  # (F,) str, of `tracking.rungs.OBJECT_RUNGS`
    carried_by: str  # the hand whose frame is the object's, or empty
    contacts: dict[str, np.ndarray]  # side -> (C,2) frames [start, end)


def place_object(
    sequence: Sequence,
    sfm: SfmResult,
    scale: float,
    hands: dict[str, GraspFit],
    report: Progress,
    fiducial: bool = True,
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
        carried = carry_clip(carriers) if fiducial else None
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
    if not fiducial:
        return Placed(poses, confidence, reason, "", contacts)
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
