"""The hand as a fiducial: object poses where nothing can be matched on the object itself.

While a grasp is stable the object is rigid with the hand, so where the hand is known the object is too:
cam_from_object = cam_from_hand @ hand_from_object. Frames between others that structure from motion placed take
hand_from_object from these. A clip in which it placed none takes the hand's own frame as the object's (hand_from_object
is the identity); the object's place in it then comes from its silhouettes (`tracking.bootstrap`). Such poses are as
good as the hand's turn is known, five to twenty degrees, and carry a low confidence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch

from ..geometry import rigid
from ..hand import HandModel
from ..scene import HandEstimates, Landmarks
from . import hand_motion
from . import hand_solver as hs
from .grasp import _HELD, GraspFit, certainty, motion_rates, result
from .hand_evidence import agreement, evidence, found
from .hand_solver import F64

CONFIDENCE = 0.35  # of a frame placed by a hand that is itself certain
ENOUGH = 0.02  # confidence of a hand below which it is no fiducial
REACH = 12  # frames to those that hand_from_object may be taken from
CONTRADICTS = 0.6  # radians by which a hand that holds the object may turn otherwise than it, median
_SURE = 0.3  # confidence of a hand that may contradict
_TURN = 0.08  # radians a frame: how fast a hand that carries something turns
_FINGERS = (0.15, 0.05, 0.05)  # radians about the clip's one grasp: flexion, abduction, twist


@dataclass(frozen=True)
class Carried:
    """Object poses that hands give."""

    cam_from_object: np.ndarray  # (F,4,4), NaN where no hand tells
    confidence: np.ndarray  # (F,), 0 where unknown
    side: str  # the hand whose frame is the object's; empty when the object has a frame of its own


def stiff_hand(
    model: HandModel,
    K: np.ndarray,
    landmarks: Landmarks,
    free: GraspFit,
    mediapipe: bool = True,
    regressed: HandEstimates | None = None,
    rounds: int = 2,
) -> GraspFit:
    """`grasp.fit_hand`'s answer `free` again, for a hand that keeps its grasp: fingers stay near one pose of the clip.

    Fingers that may not move leave the turn of the whole hand as the only way to explain the landmarks, and a hand that
    carries something turns slowly: it is a better fiducial than one whose frames are independent.
    """
    model = model.to(dtype=F64, device="cpu")
    f = len(free.pose)
    offset = hs.landmark_offsets(model) * mediapipe
    still = np.broadcast_to(np.eye(3), (f, 3, 3)), np.zeros((f, 3))
    ev = evidence(K, *still, landmarks, np.arange(f), offset, model, regressed).apart()
    rot = model.rotations(torch.as_tensor(free.pose, dtype=F64))
    betas = torch.as_tensor(free.betas, dtype=F64).expand(f, -1).clone()
    state = hs.HandState(rot, torch.as_tensor(free.transl, dtype=F64), betas, torch.zeros(f, dtype=F64))
    sure = torch.as_tensor(np.asarray(free.confidence, np.float64)) + 1e-3
    rates = motion_rates(_HELD)
    rates[:3] = _TURN
    pull = torch.cat([torch.full((3,), 10.0), torch.tensor(_FINGERS).repeat(15), torch.full((3,), 10.0)]).to(F64)
    link = torch.ones(f - 1, dtype=torch.bool)
    for k in range(rounds):
        local = torch.stack([rigid.mean_rotation(state.rot[:, j], sure) for j in range(16)]).repeat(f, 1, 1, 1)
        local[:, 0] = state.rot[:, 0]
        reference = replace(state, rot=local)
        smooth = hand_motion.Smoothness(rates, 0.02, link, reference, pull.expand(f, -1))
        terms = hs.Terms(sigma=0.08 if k else 0.15, sigma3d=0.02, prior=0.0, betas=5.0 / f, weight3d=1.0)
        state = hand_motion.minimise_track(model, reference, ev, terms, smooth, 12, free_betas=True)
    seen = found(landmarks, regressed)
    own = 0.8 * agreement(model, state, ev) * certainty(landmarks, regressed)
    return result(model, state, 1.0, float("inf"), np.where(seen, own, free.confidence), free.reason, free.windows)


def cam_from_hand(model: HandModel, pose: np.ndarray, joints: np.ndarray) -> np.ndarray:
    """(F,4,4): the wrist's frame, from pose (F,16,3) and joints (F,21,3), OpenPose order, camera frame."""
    out = np.tile(np.eye(4), (len(pose), 1, 1))
    out[:, :3, :3] = model.rotations(torch.as_tensor(np.asarray(pose, np.float64))).numpy()[:, 0]
    out[:, :3, 3] = joints[:, 0]
    return out


def contradiction(
    cam_from_object: np.ndarray, wrist: np.ndarray, sure: np.ndarray, holds: np.ndarray, least: int = 10
) -> float | None:
    """Median angle, radians, between an object's turns and those of the hand that holds it, over pairs of frames 4 to
    15 apart in which both are known; None when fewer than `least` pairs tell, or the hand hardly turns.

    Structure from motion that hangs on noise, shading or a fixed reflection can look flawless to itself; a hand cannot
    be that wrong (11 to 19 degrees on all bench clips, 86 on a plain object that SfM got wrong).
    """
    known = np.isfinite(cam_from_object[:, 0, 0]) & np.isfinite(wrist[:, 0, 0]) & (sure > _SURE) & holds
    i, j = np.triu_indices(len(known), 4)
    keep = known[i] & known[j] & (j - i <= 15)
    if keep.sum() < least:
        return None
    a, b = (torch.as_tensor(p[j[keep], :3, :3] @ p[i[keep], :3, :3].swapaxes(1, 2)) for p in (cam_from_object, wrist))
    if (
        float(rigid.geodesic(b, torch.eye(3, dtype=b.dtype)).median()) < 0.2
        and float(rigid.geodesic(a, torch.eye(3, dtype=a.dtype)).median()) < 0.2
    ):
        return None
    return float(rigid.geodesic(a, b).median())


def carry_clip(hands: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Carried | None:
    """The object in a hand's frame over a whole clip: of the hand that holds it in most certain frames.

    hands: side -> (cam_from_hand (F,4,4), confidence (F,), holds (F,) bool). None when none holds it in three frames.
    """
    usable = {s: holds & (c > ENOUGH) & np.isfinite(p[:, 0, 0]) for s, (p, c, holds) in hands.items()}
    usable = {s: u for s, u in usable.items() if u.sum() >= 3}
    if not usable:
        return None
    side = max(usable, key=lambda s: float(hands[s][1][usable[s]].sum()))
    poses, confidence, _ = hands[side]
    ok = usable[side]
    poses = np.where(ok[:, None, None], poses, np.nan)
    return Carried(poses, np.where(ok, CONFIDENCE * confidence, 0.0).astype(np.float32), side)


def carry_missing(
    cam_from_object: np.ndarray,
    confidence: np.ndarray,
    hands: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]],
    windows: dict[str, np.ndarray],
) -> Carried:
    """Poses of frames that are NaN in `cam_from_object` (F,4,4), metres, by the surest hand that holds the object.

    hand_from_object is the mean over up to five frames placed before, near in time and of the same grasp: windows
    side -> (W,2) frames [start, end). `hands` as for `carry_clip`. Frames given are left as they are.
    """
    poses = cam_from_object.copy()
    sure = np.zeros(len(poses), np.float32)
    placed = np.flatnonzero(np.isfinite(poses[:, 0, 0]))
    for side, (wrist, own, holds) in hands.items():
        spans = windows.get(side)
        spans = np.array([[0, len(poses)]]) if spans is None or not len(spans) else np.asarray(spans)
        for i in np.flatnonzero(~np.isfinite(cam_from_object[:, 0, 0]) & holds & (own > ENOUGH)):
            a, b = next(((a, b) for a, b in spans if a <= i < b), (i, i))
            near = placed[(placed >= a) & (placed < b) & (np.abs(placed - i) <= REACH) & (own[placed] > ENOUGH)]
            near = near[np.argsort(np.abs(near - i), kind="stable")[:5]]
            if not len(near):
                continue
            trust = CONFIDENCE * own[i] * np.exp(-np.abs(near - i).min() / REACH)
            if trust > sure[i]:
                relative = np.linalg.inv(wrist[near]) @ cam_from_object[near]
                poses[i] = wrist[i] @ mean_pose(relative, own[near] * np.clip(confidence[near], 0.05, 1))
                sure[i] = trust
    return Carried(poses, sure, "")


def mean_pose(poses: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """(4,4) geodesic mean of the turns and weighted mean of the places of poses (N,4,4)."""
    w = torch.as_tensor(np.asarray(weight, np.float64))
    out = np.eye(4)
    out[:3, :3] = rigid.mean_rotation(torch.as_tensor(poses[:, :3, :3]), w).numpy()
    out[:3, 3] = (w[:, None] * torch.as_tensor(poses[:, :3, 3])).sum(0).numpy() / float(w.sum())
    return out


def bridge_gaps(cam_from_object: np.ndarray, centre: np.ndarray, longest: int = 3, turn: float = 0.6) -> np.ndarray:
    """(F,) bool, and in place: gaps of up to `longest` frames between known poses closed at constant speed.

    The turn goes along the geodesic, `centre` (3,), object frame, along a line. A gap over which the object turns by
    more than `turn` radians stays open.
    """
    filled = np.zeros(len(cam_from_object), bool)
    known = np.flatnonzero(np.isfinite(cam_from_object[:, 0, 0]))
    for a, b in zip(known[:-1], known[1:], strict=True):
        if not 1 < b - a <= longest + 1:
            continue
        ra, rb = (torch.as_tensor(cam_from_object[k, :3, :3]) for k in (a, b))
        if float(rigid.geodesic(ra, rb)) > turn:
            continue
        xa, xb = (cam_from_object[k, :3, :3] @ centre + cam_from_object[k, :3, 3] for k in (a, b))
        for i in range(a + 1, b):
            s = (i - a) / (b - a)
            r = rigid.slerp(ra, rb, s).numpy()
            cam_from_object[i] = np.eye(4)
            cam_from_object[i, :3, :3], cam_from_object[i, :3, 3] = r, (1 - s) * xa + s * xb - r @ centre
            filled[i] = True
    return filled
