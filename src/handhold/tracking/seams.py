"""Parts of a clip that structure from motion joined by look-alike places alone, and the hand that holds on through it.

Where the object is hidden or frames are missing, no point is followed from one part of a clip to the next (a *seam*),
and descriptors that match over it may be of two faces with the same print: each part is then exact and their join is
not, with nothing in the pictures to tell. A hand that holds on is the witness: in its frame the object may not stand
otherwise after the seam than before. Where it does, the part is moved as the hand says, and trusted less.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from scipy.spatial.transform import Rotation

from ._sfm_bundle import is_registered
from .sfm import SfmResult

NEAR = 4  # frames on either side in which a point must be followed
FEW = 15  # points followed over a seam at most
LEAST = 3  # frames of a part that can be moved
TURNED, GROWN = 0.6, 0.4  # radians, of the logarithm of size, by which right parts never seem apart (to 0.4, 0.25)
MOVED = 0.3  # confidence of a part that stands as the hand says: exact in itself, as a whole not
_SURE = 0.1  # confidence of a hand that may tell
_PLACE = 0.03  # metres by which a lone hand is misplaced
_DEPTH = 0.15  # of the distance, between hand and object


@dataclass(frozen=True)
class Witness:
    """A hand that was found without the object."""

    cam_from_hand: np.ndarray  # (F,4,4) metres
    confidence: np.ndarray  # (F,)
    holds: np.ndarray  # (F,) bool, may hold the object


@dataclass(frozen=True)
class _Held:
    """How one hand holds one part."""

    turn: Rotation  # hand_from_object
    unit: float  # of the part's frame, per metre
    wrist: np.ndarray  # (3,) in the part's frame
    weight: float  # sum of the hand's confidence


def parts(sfm: SfmResult) -> list[np.ndarray]:
    """Frames between seams, most first."""
    frame, point = sfm.tracks.T
    known = np.flatnonzero(is_registered(sfm.cam_from_object))
    seam = []
    for a, b in zip(known[:-1], known[1:], strict=True):
        before, after = (frame <= a) & (frame >= b - NEAR), (frame >= b) & (frame <= a + NEAR)
        seam.append(len(np.intersect1d(point[before], point[after])) < FEW)
    return sorted(np.split(known, np.flatnonzero(seam) + 1), key=lambda p: -len(p))


def mend(sfm: SfmResult, hands: dict[str, Witness]) -> SfmResult:
    """`sfm` with each part that contradicts every hand that tells moved as the surest one says, its confidence lowered.

    Parts of fewer than `LEAST` frames that follow a moved one are taken out. Notes say what was done; where no hand
    contradicts, the same object is returned.
    """
    whole, *rest = parts(sfm)
    before = {s: _held(sfm, h, whole) for s, h in hands.items()}
    poses, points, confidence = sfm.cam_from_object.copy(), sfm.points.copy(), sfm.confidence.copy()
    reason, registered = sfm.reason.astype("<U64"), sfm.registered.copy()
    notes: list[str] = []
    for part in (p for p in rest if len(p) >= LEAST):
        told = {s: (before[s], _held(sfm, h, part)) for s, h in hands.items()}
        told = {s: (a, b) for s, (a, b) in told.items() if a is not None and b is not None}
        turned = {s: float((a.turn.inv() * b.turn).magnitude()) for s, (a, b) in told.items()}
        grown = {s: float(np.log(b.unit / a.unit)) for s, (a, b) in told.items()}
        if not told or any(turned[s] < TURNED and abs(grown[s]) < GROWN for s in told):
            continue
        side = max(told, key=lambda s: min(h.weight for h in told[s]))
        a, b = told[side]
        # the wrist and the hand's turn stay: x = b.wrist + turn (x' - a.wrist) b.unit / a.unit
        turn, s = (b.turn.inv() * a.turn).as_matrix(), a.unit / b.unit
        R, t = poses[part, :3, :3], poses[part, :3, 3]
        poses[part, :3, 3] = s * (R @ b.wrist + t) - R @ turn @ a.wrist
        poses[part, :3, :3] = R @ turn
        mine = _seen_in(sfm, part)
        points[mine] = s * (points[mine] - b.wrist) @ turn + a.wrist
        confidence[part] = MOVED * (confidence[part] > 0)
        reason[part] = "sfm: joined by the grasp"
        notes.append(
            f"frames {part[0]}-{part[-1]} share no followed point with the rest, and in the {side} hand the object is "
            f"turned by {np.degrees(turned[side]):.0f} degrees and {np.exp(grown[side]):.2f} times as large there: "
            "they are placed as the hand says"
        )
    if not notes:
        return sfm
    for part in (p for p in rest if len(p) < LEAST):
        poses[part], confidence[part], registered[part] = np.nan, 0, False
        reason[part] = "not registered"
    left = registered[sfm.tracks[:, 0]]
    return replace(
        sfm, cam_from_object=poses, points=points, confidence=confidence, reason=reason, registered=registered,
        tracks=sfm.tracks[left], track_xy=sfm.track_xy[left], notes=(*sfm.notes, *notes),
    )  # fmt: skip


def _held(sfm: SfmResult, hand: Witness, part: np.ndarray) -> _Held | None:
    """How the hand holds the part; None where it is seen in fewer than `LEAST` frames, or never before the camera.

    One wrist in the object's frame for all frames, and the object's unit, by linear least squares: R^T (unit h - t) =
    wrist; where the object hardly turns, that the hand is about as far away as the object tells the unit.
    """
    f = part[(hand.confidence[part] > _SURE) & hand.holds[part] & is_registered(hand.cam_from_hand)[part]]
    mine = _seen_in(sfm, part)
    if len(f) < LEAST or not mine.any():
        return None
    R, t = sfm.cam_from_object[f, :3, :3], sfm.cam_from_object[f, :3, 3]
    turn, h = hand.cam_from_hand[f, :3, :3], hand.cam_from_hand[f, :3, 3]
    weight = np.asarray(hand.confidence[f], np.float64)
    depth = R[:, 2] @ np.median(sfm.points[mine], axis=0) + t[:, 2]
    unit = float(np.median(depth / h[:, 2]))
    if not unit > 0:
        return None
    n = len(f)
    rows = np.zeros((3 * n + 1, 4))
    rows[:-1, 0] = np.einsum("fji,fj->fi", R, h).ravel()
    rows[:-1, 1:] = -np.tile(np.eye(3), (n, 1))
    right = np.append(np.einsum("fji,fj->fi", R, t).ravel(), unit)
    rows[-1, 0] = 1
    trust, x = weight, np.zeros(4)
    for _ in range(8):
        scale = np.append(np.repeat(np.sqrt(trust), 3) / (_PLACE * unit), 1 / (_DEPTH * unit))
        x = np.linalg.lstsq(rows * scale[:, None], right * scale, rcond=None)[0]
        off = np.linalg.norm((rows @ x - right)[:-1].reshape(-1, 3), axis=1)
        trust = weight / (1 + (off / (_PLACE * unit)) ** 2)
    if not x[0] > 0:
        return None
    return _Held(Rotation.from_matrix(turn.swapaxes(1, 2) @ R).mean(weight), float(x[0]), x[1:], float(weight.sum()))


def _seen_in(sfm: SfmResult, part: np.ndarray) -> np.ndarray:
    """(P,) bool: points that are seen more often in the part's frames than in others."""
    inside = np.isin(sfm.tracks[:, 0], part)
    seen = [np.bincount(sfm.tracks[w, 1], minlength=len(sfm.points)) for w in (inside, ~inside)]
    return seen[0] > seen[1]
