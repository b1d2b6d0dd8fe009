"""The hand solved in the object's frame over stable-grasp windows.

While a hand holds an object it hardly moves in the object's frame, so all frames' weak landmarks look at one hand from
many sides; fingers hidden in one frame are seen in another, frames without landmarks cost nothing, and the hand's known
size gives the object's scale. One robust least-squares fit (Geman-McClure, Levenberg-Marquardt, many starts side by
side), then windows between regrasps, then slow motion around each window's grasp.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..errors import StageFailed
from ..geometry import rigid
from ..hand import HandModel
from ..hand import joints as jt
from ..scene import HandEstimates, Landmarks
from . import hand_motion, silhouette
from . import hand_solver as hs
from .hand_evidence import (
    HIDDEN,
    agreement,
    balanced,
    evidence,
    found,
    on_mask,
    per_frame_guess,
    starts,
    typical_grasp,
    visibility,
)
from .hand_solver import F64


@dataclass(frozen=True)
class GraspFit:
    """A hand over a clip of F frames, camera frame, metres."""

    scale: float  # metres per unit of the object's frame: multiply object translations and points by it
    scale_std: float  # of log(scale), from the fit's curvature, for a hand of this size; large: not determined
    betas: np.ndarray  # (10,)
    pose: np.ndarray  # (F,16,3) axis-angle, the model's own convention
    transl: np.ndarray  # (F,3)
    joints: np.ndarray  # (F,21,3), OpenPose order
    vertices: np.ndarray  # (F,V,3)
    confidence: np.ndarray  # (F,) in [0,1]
    reason: np.ndarray  # (F,) str
    windows: list[tuple[int, int]]  # stable grasps, frames [start, end)


def whole_clip(
    model: HandModel, ev: hs.Evidence, centre: Tensor | None, terms: hs.Terms, seed: int
) -> tuple[hs.HandState, Tensor]:
    """Best single grasp over all frames: all starts with wide kernels, the best few with narrow ones."""
    state = starts(model, ev, centre, seed)
    if np.isfinite(terms.log_scale_std):
        state = replace(state, log_scale=torch.full_like(state.log_scale, terms.log_scale))
    ev = balanced(ev)
    share = lambda k: torch.ones(k, ev.points.shape[1], dtype=F64)  # noqa: E731
    rigid_only = torch.zeros(62, dtype=torch.bool)
    rigid_only[[0, 1, 2, 48, 49, 50, 61]] = True
    wide = replace(terms, sigma=0.5, sigma3d=0.05, near=0.15)
    state, _ = hs.minimise(model, state, ev, wide, share(len(state.rot)), centre, 12, rigid_only)
    state, cost = hs.minimise(model, state, ev, wide, share(len(state.rot)), centre, 15)
    keep = cost.argsort()[:5]
    state = state[keep]
    for sigma in (0.25, 0.12):
        state, cost = hs.minimise(
            model, state, ev, replace(terms, sigma=sigma, sigma3d=0.03), share(len(state.rot)), centre, 15
        )
    state, cost = hs.minimise(model, state, ev, terms, share(len(state.rot)), centre, 40)
    best = cost.argsort()
    return hs.orthonormal(state[best]), cost[best]


def split_windows(
    model: HandModel,
    whole: hs.HandState,
    ev: hs.Evidence,
    terms: hs.Terms,
    centre: Tensor | None,
    min_frames: int = 5,
    depth: int = 3,
) -> list[tuple[int, int, hs.HandState]]:
    """Cut the N frames of `ev` where two grasps explain them much better than one (a regrasp).

    Binary segmentation: all cut places of a range are tried side by side, each with a grasp before and one after (shape
    and scale held), and the best is kept when it lowers the robust cost by more than `gain`. Returns [start, end) rows
    of `ev` and their grasps (S = 1).
    """
    ev = balanced(ev)
    n = ev.points.shape[1]
    free = torch.ones(62, dtype=torch.bool)
    free[51:] = False

    def fit(state: hs.HandState, ranges: list[tuple[int, int]]) -> tuple[hs.HandState, Tensor]:
        share = torch.zeros(len(ranges), n, dtype=F64)
        for row, (a, b) in zip(share, ranges, strict=True):
            row[a:b] = 1
        many = hs.HandState(
            *(
                getattr(state, k).expand(len(ranges), *getattr(state, k).shape[1:])
                for k in ("rot", "transl", "betas", "log_scale")
            )
        )
        many, _ = hs.minimise(model, many, ev, replace(terms, sigma=3 * terms.sigma), share, centre, 10, free)
        return hs.minimise(model, many, ev, terms, share, centre, 12, free)

    def recurse(a: int, b: int, state: hs.HandState, depth: int) -> list[tuple[int, int, hs.HandState]]:
        if depth == 0 or b - a < 2 * min_frames:
            return [(a, b, state)]
        cuts = np.unique(
            np.linspace(a + min_frames, b - min_frames, min(12, b - a - 2 * min_frames + 1)).round().astype(int)
        )
        best = a
        for refine in (False, True):
            if refine:
                step = int(np.diff(cuts).max()) if len(cuts) > 1 else 1
                if step <= 1:
                    break
                cuts = np.unique(np.clip(best + np.arange(-step + 1, step), a + min_frames, b - min_frames))
                cuts = cuts[:: max(1, len(cuts) // 12)]
            pairs, cost = fit(state, [r for c in cuts for r in ((a, int(c)), (int(c), b))])
            total = cost.reshape(-1, 2).sum(1)
            i = int(total.argmin())
            best, left, right, value = (
                int(cuts[i]),
                pairs[2 * i : 2 * i + 1],
                pairs[2 * i + 1 : 2 * i + 2],
                float(total[i]),
            )
        one, single = fit(state, [(a, b)])
        data = float(ev.weight[0, a:b].sum())
        if float(single[0]) - value < SPLIT_GAIN * data + 2.0:
            return [(a, b, one)]
        return recurse(a, best, left, depth - 1) + recurse(best, b, right, depth - 1)

    return recurse(0, n, whole, depth)


SPLIT_GAIN = 0.15  # of the evidence (every landmark at full cost) that a second grasp must explain to be believed

# How fast a hand moves, standard deviations per frame at video rates (15-30 Hz)
_HELD = {"wrist": 0.010, "1": (0.020, 0.005, 0.002), "2": (0.020, 0.002, 0.002), "3": (0.015, 0.002, 0.002)}
_FREE = {"wrist": 0.150, "1": (0.100, 0.030, 0.010), "2": (0.100, 0.005, 0.005), "3": (0.080, 0.005, 0.005)}


def motion_rates(table: dict) -> Tensor:
    """(48,) radians per frame in the order of the solver's rotation increments."""
    rows = [(table["wrist"],) * 3] + [
        table[n[-1]] if n != "thumb1" else (table["1"][0],) * 3 for n in jt.MANO_NAMES[1:]
    ]
    return torch.tensor(rows, dtype=F64).flatten()


def stack(states: list[hs.HandState], index: np.ndarray) -> hs.HandState:
    """One state per frame: states[index[f]] (each with S = 1)."""
    i = torch.as_tensor(index)
    return hs.HandState(
        *(torch.cat([getattr(s, k) for s in states])[i] for k in ("rot", "transl", "betas", "log_scale"))
    )


def in_camera(model: HandModel, state: hs.HandState, rot: Tensor, t: Tensor) -> hs.HandState:
    """States (F) in the object's frame -> camera frame, with camera-from-object rot (F,3,3), t (F,3) in object
    units."""
    rest = model.with_shape(state.betas).rest_joints[:, 0]
    wrist = (rot @ (rest + state.transl)[..., None])[..., 0] + state.log_scale.exp()[:, None] * t
    local = state.rot.clone()
    local[:, 0] = rot @ state.rot[:, 0]
    return hs.HandState(local, wrist - rest, state.betas, torch.zeros_like(state.log_scale))


def fit_grasp(
    model: HandModel,
    K: np.ndarray,
    cam_from_object: np.ndarray,
    object_valid: np.ndarray,
    object_confidence: np.ndarray | None,
    landmarks: Landmarks,
    hand_masks: np.ndarray | None = None,
    object_points: np.ndarray | None = None,
    seed: int = 0,
    object_masks: np.ndarray | None = None,
    mediapipe: bool = True,
    scale_prior: tuple[float, float] | None = None,
    regressed: HandEstimates | None = None,
    silhouettes: bool = True,
    regrasps: bool = True,
    slow_motion: bool = True,
    hidden: float = HIDDEN,
) -> GraspFit:
    """A hand that holds an object, over a whole clip, and with it the object's metric scale.

    Args:
        model: the hand, of the side that `landmarks` belong to.
        K: (3,3) intrinsics, pixels.
        cam_from_object: (F,4,4) rigid, translation in arbitrary units (one scale for the clip); rows may be NaN.
        object_valid: (F,) bool. object_confidence: (F,) in [0,1] or None.
        landmarks: 21 points per frame with confidence; 3D points are used when finite.
        hand_masks, object_masks: (F,H,W) bool or None: silhouette of this hand, and of what may hide it.
        object_points: (P,3) in object units or None; keeps the hand near the object when evidence is thin.
        seed: of the random starts.
        mediapipe: the landmarks are MediaPipe's, which mean slightly other points than the model's joints; False for
            joints from elsewhere.
        scale_prior: metres per object unit and the standard deviation of its logarithm, when something is known of it:
            the other hand's fit, or the object's size.
        regressed: a regressor's estimates of this hand, which then count beside the landmarks.
        silhouettes: use the outline of `hand_masks`. regrasps: look for changes of the grasp; False is one grasp for
            the clip. slow_motion: let the hand move slowly about its grasp.
        hidden: weight of a landmark that cannot have been seen; 1 makes no difference.

    Raises `StageFailed` when no frame has hand landmarks or estimates. Falls back on `fit_hand` (scale 1, scale_std
    inf) when fewer than three frames have both those and an object pose.
    """
    model = model.to(dtype=F64, device="cpu")
    offset = hs.landmark_offsets(model) * mediapipe
    pose = np.asarray(cam_from_object, np.float64)
    valid = np.asarray(object_valid, bool) & np.isfinite(pose).all((1, 2))
    f = len(pose)
    object_confidence = (
        valid.astype(float) if object_confidence is None else np.nan_to_num(np.asarray(object_confidence, float))
    )
    seen = found(landmarks, regressed)
    rows = np.where(seen & valid)[0]
    if len(rows) < 3:
        return fit_hand(model, K, landmarks, mediapipe, regressed)
    pose = np.where(valid[:, None, None], pose, np.eye(4))
    R, t = pose[:, :3, :3], pose[:, :3, 3]
    unit = float(np.median(np.linalg.norm(t[rows], axis=1))) or 1.0  # solve in units of the object's distance
    t = t / unit
    centre = None
    if object_points is not None and len(object_points):
        centre = torch.as_tensor(np.median(np.asarray(object_points, np.float64), 0) / unit)

    terms = hs.Terms()
    if scale_prior is not None:
        known = {"log_scale": float(np.log(scale_prior[0] * unit)), "log_scale_std": max(scale_prior[1], 1e-4)}
        terms = replace(terms, **known, size=0.0)  # the hand is as large as that makes it
    points = None if object_points is None else torch.as_tensor(np.asarray(object_points, np.float64) / unit)
    every = evidence(K, R, t, landmarks, np.arange(f), offset, model, regressed)
    if hand_masks is not None:  # what the network put beside the hand it guessed
        seeable = hidden + (1 - hidden) * on_mask(hand_masks, every.points[0])
        every = replace(every, weight=every.weight * seeable)
    vague = torch.ones(21 * every.sources, dtype=F64)
    vague[0] = 0.4  # where a landmark network puts the wrist
    every = replace(every, weight=every.weight * vague)
    ev = every.frames(torch.as_tensor(rows))
    whole, _ = whole_clip(model, ev, centre, terms, seed)
    whole = whole[:1]
    for _ in range(2):
        held = stack([whole], np.zeros(f, int))
        seeable = visibility(model, held, every.apart(), hand_masks, points, hidden).transpose(0, 1)[:, rows]
        clear = replace(ev, weight=ev.weight * seeable, weight3d=ev.weight3d * seeable)
        whole, _ = hs.minimise(model, whole, balanced(clear), terms, torch.ones(1, len(rows), dtype=F64), centre, 25)
    parts = split_windows(model, whole, clear, terms, centre) if regrasps else [(0, len(rows), whole)]
    share = torch.zeros(len(parts), len(rows), dtype=F64)
    for row, (a, b, _) in zip(share, parts, strict=True):
        row[a:b] = 1
    grasps = stack([p[2] for p in parts], np.arange(len(parts)))
    cuts = [0] + [int(rows[a] + rows[a - 1] + 1) // 2 for a, _, _ in parts[1:]] + [f]
    # every frame belongs to a window: cuts lie midway between the last landmarks of one and the first of the next
    window = np.searchsorted(cuts[1:-1], np.arange(f), side="right")
    outline = None
    if hand_masks is not None and silhouettes:
        Rt, tt, size = torch.as_tensor(R), torch.as_tensor(t), float(every.size.median())
        shapes = silhouette.prepare(every.K, Rt, tt, hand_masks, object_masks, valid, size, seed=seed)
        if shapes is not None:
            owns = torch.as_tensor(window[shapes.frames] == np.arange(len(parts))[:, None]).double()
            ids = torch.arange(0, len(model.v_template), 2)
            outline = lambda x: silhouette.system(model, x, shapes, owns, ids)  # noqa: E731
    for _ in range(2):
        grasps, _, scale_std = hs.minimise_shared(model, grasps, balanced(clear), terms, share, centre, extra=outline)
        held = stack([grasps[i : i + 1] for i in range(len(parts))], window)
        seeable = visibility(model, held, every.apart(), hand_masks, points, hidden)
        clear = replace(
            ev,
            weight=ev.weight * seeable.transpose(0, 1)[:, rows],
            weight3d=ev.weight3d * seeable.transpose(0, 1)[:, rows],
        )
    usable = torch.as_tensor(valid & seen)[:, None, None] * seeable
    every = every.apart()
    inside = replace(every, weight=every.weight * usable, weight3d=every.weight3d * usable)
    link = torch.as_tensor(window[1:] == window[:-1])
    rates = motion_rates(_HELD)
    pull = torch.cat([4 * rates, torch.full((3,), 0.006, dtype=F64)]).expand(f, -1)
    smooth = hand_motion.Smoothness(rates, 0.0015, link, held, pull)
    slow = replace(terms, prior=0.0, weight2d=0.3, weight3d=0.1)
    if slow_motion:
        held = hand_motion.minimise_track(model, held, inside, slow, smooth)

    Rt, tt = torch.as_tensor(R), torch.as_tensor(t)
    cam = in_camera(model, held, Rt, tt)
    fits = agreement(model, held, inside)
    sure = certainty(landmarks, regressed)
    quality = float(np.average(fits[rows], weights=sure[rows] + 1e-6))
    confidence = object_confidence * np.where(seen, 0.5 * fits + 0.5 * quality, 0.8 * quality)
    reason = np.where(seen, sources(landmarks, regressed), "carried by the grasp").astype(object)
    if not valid.all():
        still = np.broadcast_to(np.eye(3), (f, 3, 3)), np.zeros((f, 3))
        free = evidence(K, *still, landmarks, np.arange(f), offset, model, regressed).apart()
        cam = bridge(model, cam, valid, seen, free, terms)
        own = agreement(model, cam, free)
        confidence = np.where(valid, confidence, np.where(seen, 0.7 * own * sure, 0.0))
        alone = np.char.add(sources(landmarks, regressed), " only, object pose unknown")
        reason[~valid] = np.where(seen, alone, "not found")[~valid]
    windows = [(int(a), int(b)) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    scale = float(held.log_scale[0].exp()) / unit
    return result(model, cam, scale, scale_std, confidence, reason, windows)


def bridge(
    model: HandModel, cam: hs.HandState, valid: np.ndarray, seen: np.ndarray, ev: hs.Evidence, terms: hs.Terms
) -> hs.HandState:
    """Frames without an object pose: hand from its landmarks and its neighbours; camera frame, F states, (F,1)
    evidence."""
    f, ok = len(valid), np.where(valid)[0]
    near = np.interp(np.arange(f), ok, np.arange(len(ok)))
    lo, hi, share = ok[np.floor(near).astype(int)], ok[np.ceil(near).astype(int)], torch.as_tensor(near % 1)
    start = hs.HandState(
        rigid.slerp(cam.rot[lo], cam.rot[hi], share[:, None].expand(-1, 16)),
        torch.lerp(cam.transl[lo], cam.transl[hi], share[:, None]),
        cam.betas,
        cam.log_scale,
    )
    missing = np.where(~valid & seen)[0]
    if len(missing):
        rot, wrist = per_frame_guess(model, ev.map(lambda x: x.transpose(0, 1)))
        first = start.rot[missing].clone()
        first[:, 0] = rot[missing]
        start.rot[missing] = first
        start.transl[missing] = wrist[missing] - model.joint_bases[0][0]
    hold = torch.as_tensor(valid)[:, None]
    tight = torch.full((hs.N_HAND,), 1e-3, dtype=F64)
    loose = torch.cat([torch.full((3,), 10.0), torch.full((45,), 0.4), torch.full((3,), 10.0)]).double()
    pull = torch.where(hold, tight, loose)
    smooth = hand_motion.Smoothness(motion_rates(_FREE), 0.02, torch.ones(f - 1, dtype=torch.bool), start, pull)
    open_ = torch.as_tensor(~valid)[:, None, None]
    ev = replace(ev, weight=ev.weight * open_, weight3d=ev.weight3d * open_)
    for sigma in (0.3, 0.1):
        start = hand_motion.minimise_track(model, start, ev, replace(terms, sigma=sigma, prior=0.1), smooth, 12)
    return start


def certainty(landmarks: Landmarks, regressed: HandEstimates | None) -> np.ndarray:
    """(F,) how sure the landmarks, or the estimates where these are surer, are of themselves."""
    own = np.nan_to_num(np.asarray(landmarks.confidence, float))
    return own if regressed is None else np.maximum(own, np.nan_to_num(regressed.confidence).mean(1))


def sources(landmarks: Landmarks, regressed: HandEstimates | None) -> np.ndarray:
    """(F,) str: what tells of the hand in each frame that tells of it."""
    return np.where(found(landmarks), "landmarks" if regressed is None else "landmarks and regressor", "regressor")


def fit_hand(
    model: HandModel,
    K: np.ndarray,
    landmarks: Landmarks,
    mediapipe: bool = True,
    regressed: HandEstimates | None = None,
) -> GraspFit:
    """A hand over a whole clip from its landmarks and estimates alone: shared shape, joint limits, smooth on SO(3).

    For clips, or frames, where no object pose is known. Depth comes from the hand's size. Frames without landmarks are
    bridged by smoothness, with confidence falling off and the reason "not found". `scale` is 1 and `scale_std`
    infinite. Raises `StageFailed` when no frame has landmarks.
    """
    model = model.to(dtype=F64, device="cpu")
    offset = hs.landmark_offsets(model) * mediapipe
    f, seen = len(landmarks.points), found(landmarks, regressed)
    rows = np.where(seen)[0]
    if not len(rows):
        raise StageFailed(
            "no hand landmarks were found in this clip; give them with --joints FILE, or film the hand larger."
        )
    still = np.broadcast_to(np.eye(3), (f, 3, 3)), np.zeros((f, 3))
    ev = evidence(K, *still, landmarks, np.arange(f), offset, model, regressed).apart()
    rot, wrist = per_frame_guess(model, ev.map(lambda x: x.transpose(0, 1)))
    rot, wrist = rot[rows], wrist[rows]
    depth = wrist[:, 2].median()
    sane = (wrist[:, 2] > 0.4 * depth) & (wrist[:, 2] < 2.5 * depth)
    rows, rot, wrist = rows[sane.numpy()], rot[sane], wrist[sane]
    near = np.interp(np.arange(f), rows, np.arange(len(rows)))
    lo, hi, share = np.floor(near).astype(int), np.ceil(near).astype(int), torch.as_tensor(near % 1)
    local = typical_grasp(model, ev.map(lambda x: x.transpose(0, 1))).repeat(f, 1, 1, 1)
    local[:, 0] = rigid.slerp(rot[lo], rot[hi], share)
    transl = torch.lerp(wrist[lo], wrist[hi], share[:, None]) - model.joint_bases[0][0]
    state = hs.HandState(local, transl, torch.zeros(f, model.n_betas, dtype=F64), torch.zeros(f, dtype=F64))
    smooth = hand_motion.Smoothness(motion_rates(_FREE), 0.02, torch.ones(f - 1, dtype=torch.bool))
    for sigma, sigma3d in ((0.4, 0.05), (0.15, 0.03), (0.07, 0.02)):
        terms = hs.Terms(sigma=sigma, sigma3d=sigma3d, prior=0.1, betas=5.0 / f, weight3d=1.0)
        state = hand_motion.minimise_track(model, state, ev, terms, smooth, 12, free_betas=True)
    gap = np.abs(np.arange(f)[:, None] - rows).min(1)
    fits = agreement(model, state, ev)
    confidence = np.where(
        seen, 0.8 * fits * certainty(landmarks, regressed), 0.5 * np.exp(-gap / 3.0) * fits[rows].mean()
    )
    alone = np.char.add(sources(landmarks, regressed), " only, object pose unknown")
    reason = np.where(seen, alone, "not found").astype(object)
    return result(model, state, 1.0, float("inf"), confidence, reason, [])


def result(model, state: hs.HandState, scale: float, scale_std: float, confidence, reason, windows) -> GraspFit:
    posed = model.with_shape(state.betas[0]).with_pose(state.rot, state.transl)
    real = lambda x: x.numpy().astype(np.float32)  # noqa: E731
    return GraspFit(
        scale=scale,
        scale_std=scale_std,
        betas=real(state.betas[0]),
        pose=real(model.theta(state.rot)),
        transl=real(state.transl),
        joints=real(posed.joints),
        vertices=real(posed.vertices),
        confidence=np.clip(confidence, 0, 1).astype(np.float32),
        reason=np.asarray(reason, dtype=np.str_),
        windows=windows,
    )
