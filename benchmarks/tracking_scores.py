"""Figures of tracks against truth, before anything is fitted to them. The truth is read here and nowhere else."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch

from handhold.hand import HandModel
from handhold.metrics import mpjpe, pa_mpjpe, relative_rotation_error
from handhold.scene import SIDES, Sequence
from handhold.stages.fit import MIN_CONFIDENCE
from handhold.stages.track import HandTrack, Tracks

LABELS = {"right": (1,), "left": (2,), "object": (3,), "hand": (1, 2)}  # in gt.npz `masks`; hand: whichever it is


def score_tracks(sequence: Sequence, tracks: Tracks, gt: dict[str, np.ndarray]) -> dict[str, float]:
    """Every figure that the truth allows, from the tracks of the frames of `sequence`; see the functions below."""
    truth = {k: gt[k][sequence.indices] for k in gt if k in PER_FRAME}
    out = score_object(tracks.cam_from_object, tracks.confidence, truth["object_poses"].astype(float))
    sizes = []
    for side in SIDES:
        true = truth.get(f"{side}_joints", truth.get(f"{side}_peer_joints"))
        if true is None:
            out |= {f"frames_{side}_phantom": _share(tracks.hands[side].confidence > 0)} if side in tracks.hands else {}
            continue
        if side not in tracks.hands:
            out[f"frames_{side}"] = 0.0
            continue
        hand = tracks.hands[side]
        figures, size = score_hand(side, posed_joints(side, hand), hand.confidence > 0, true.astype(float))
        out |= figures
        sizes += [size] if np.isfinite(size) else []
    if "pose_scale" in out and sizes:
        out["scale_error"] = 100 * (out["pose_scale"] / float(np.mean(sizes)) - 1)
    if "masks" in truth:
        out |= score_masks(sequence.masks, truth["masks"])
    return out


PER_FRAME = ("object_poses", "masks", *(f"{s}_{k}joints" for s in SIDES for k in ("", "peer_")))


def score_object(poses: np.ndarray, confidence: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The object's poses (F,4,4), NaN where unknown, against true ones; camera from object, metres.

    poses: share of frames with one; poses_sure: with one that `fit` shows as found. rot_deg: median error of the
    rotation between two frames. place_mm: mean error of where the object is, once its frame's origin and the size of
    the whole are put as well as one choice for the clip can. pose_scale: that size over the true one.
    """
    known = np.isfinite(poses[:, 0, 0])
    out = {"poses": _share(known), "poses_sure": _share(known & (confidence >= MIN_CONFIDENCE))}
    if known.sum() < 3:
        return out
    p, q = poses[known], truth[known]
    out["rot_deg"] = float(np.median(relative_rotation_error(p[:, :3, :3], q[:, :3, :3])))
    scale, offset = origin_and_scale(p, q)
    at = scale * p[:, :3, 3] + p[:, :3, :3] @ offset
    out["place_mm"] = 1e3 * float(np.linalg.norm(at - q[:, :3, 3], axis=1).mean())
    out["pose_scale"] = 1 / scale if scale > 0 else float("nan")
    return out


def origin_and_scale(poses: np.ndarray, truth: np.ndarray) -> tuple[float, np.ndarray]:
    """s and b (3,) of the least squares s t_i + R_i b = true t_i: two object frames differ by a constant similarity."""
    a = np.concatenate([poses[:, :3, 3:], poses[:, :3, :3]], axis=2).reshape(-1, 4)
    x = np.linalg.lstsq(a, truth[:, :3, 3].reshape(-1), rcond=None)[0]
    return float(x[0]), x[1:]


def score_hand(side: str, joints: np.ndarray, valid: np.ndarray, truth: np.ndarray) -> tuple[dict[str, float], float]:
    """mpjpe and pa_mpjpe (mm) of joints (F,21,3) as in `handhold.metrics`, the share of frames with a hand, and the
    hand's size over the true one (bones, or wrist to fingertips where only these are known)."""
    known = np.isfinite(truth).all((0, 2))
    tag = side if known.all() else f"{side}_peer"
    out = {f"frames_{side}": _share(valid)}
    if not valid.any():
        return out, float("nan")
    a, b = joints[valid][:, known], truth[valid][:, known]
    out[f"mpjpe_{tag}"] = 1e3 * float(mpjpe(a, b).mean())
    out[f"pa_mpjpe_{tag}"] = 1e3 * float(pa_mpjpe(a, b).mean())
    return out, hand_size(joints[valid], known) / hand_size(truth[valid], known)


def hand_size(joints: np.ndarray, known: np.ndarray) -> float:
    """Metres of all bones (F,21,3) together, the median over frames; without inner joints, from wrist to fingertips."""
    ends = np.arange(1, 21)
    starts = np.where(ends % 4 == 1, 0, ends - 1)
    if not known.all():
        ends = np.array([k for k in (4, 8, 12, 16, 20) if known[k]])
        starts = np.zeros_like(ends)
    return float(np.median(np.linalg.norm(joints[:, ends] - joints[:, starts], axis=-1).sum(1)))


def posed_joints(side: str, hand: HandTrack) -> np.ndarray:
    """(F,21,3) of a tracked hand, camera frame, metres."""
    f64 = lambda x: torch.as_tensor(np.asarray(x, np.float64))  # noqa: E731
    model = HandModel.open(side, dtype=torch.float64)
    return model.with_shape(f64(hand.betas)).with_pose(f64(hand.pose), f64(hand.transl)).joints.numpy()


def score_masks(masks: dict[str, np.ndarray], labels: np.ndarray) -> dict[str, float]:
    """iou_<name>: mean over the frames in which the mask or the truth has a pixel; iou_<name>_pooled: of all pixels.

    masks (F,H,W) bool by name; labels (F,h,w) as in gt.npz. `hand` is both hands together, whichever is which.
    """
    some = next(iter(masks.values()))
    if labels.shape[1:] != some.shape[1:]:
        y, x = ((np.arange(n) + 0.5) * m / n for n, m in zip(some.shape[1:], labels.shape[1:], strict=True))
        labels = labels[:, y.astype(int)][:, :, x.astype(int)]
    out = {}
    for name, values in LABELS.items():
        true = np.isin(labels, values)
        ours = [masks[k] for k in (SIDES if name == "hand" else (name,)) if k in masks]
        ours = np.any(ours, axis=0) if ours else np.zeros_like(true)
        both, either = (x.reshape(len(true), -1).sum(1) for x in (true & ours, true | ours))
        if either.any():
            out[f"iou_{name}"] = float((both[either > 0] / either[either > 0]).mean())
            out[f"iou_{name}_pooled"] = float(both.sum() / either.sum())
    return out


def rungs(reasons: Iterable[str]) -> dict[str, int]:
    """Frames by the reason that they carry, the most frequent first."""
    names, counts = np.unique(np.asarray(list(reasons), dtype=np.str_), return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return {str(names[i]): int(counts[i]) for i in order}


def _share(ok: np.ndarray) -> float:
    return 100.0 * float(np.mean(ok))
