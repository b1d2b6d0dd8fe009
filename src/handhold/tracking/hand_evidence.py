"""A hand before it is fitted: landmarks as solver input, first guesses, starts, visibility, agreement."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..geometry import rigid
from ..hand import HandModel
from ..hand import joints as jt
from ..scene import HandEstimates, Landmarks
from . import hand_solver as hs
from .hand_solver import F64

PALM = (0, 1, 5, 9, 13, 17)  # joints that hardly move against each other


# The landmark that tells how well a finger joint's turn is known: the next one towards the tip.
_TOLD_BY = [jt.OPENPOSE_FROM_MANO.index(k) + 1 for k in range(1, 16)]


def evidence(
    K: np.ndarray,
    rot: np.ndarray,
    t: np.ndarray,
    landmarks: Landmarks,
    rows: np.ndarray,
    offset: Tensor,
    model: HandModel | None = None,
    regressed: HandEstimates | None = None,
) -> hs.Evidence:
    """Landmarks of the frames `rows` as solver input, and a regressor's estimates (of `model`) as a second source.

    rot (F,3,3), t (F,3) camera from carrier. offset (21,3) is the landmarks' own: a regressor means the model's joints.
    """
    P = torch.as_tensor(np.asarray(landmarks.points, np.float64)[rows])
    L = torch.as_tensor(np.asarray(landmarks.points3d, np.float64)[rows])
    conf = torch.nan_to_num(torch.as_tensor(np.asarray(landmarks.confidence, np.float64)[rows])).clamp(0, 1)
    k = torch.as_tensor(np.asarray(K, np.float64))
    w = conf[:, None] * torch.isfinite(P).all(-1)
    P = torch.nan_to_num(P)
    w3 = conf[:, None] * torch.isfinite(L).all(-1).all(-1, keepdim=True) * (w > 0)
    L = torch.nan_to_num(L)
    L = torch.einsum("nab,njb->nja", hs.ray_rotation(P, k), L - L.mean(1, keepdim=True))
    angles, wa = torch.zeros(len(P), 15, 3, dtype=F64), torch.zeros(len(P), 15, dtype=F64)
    size = apparent_size(P, L, w, w3)
    if regressed is not None:
        q, shape, v, angles, wa = estimated(model, regressed, rows)
        size = torch.where(w.amax(1) > 0, size, apparent_size(q, shape, v, v))
        offset = torch.cat([offset, torch.zeros_like(offset)])
        P, L, w, w3 = (torch.cat(x, 1) for x in ((P, q), (L, shape), (w, v), (w3, v)))
    R, t = (torch.as_tensor(np.asarray(x, np.float64)[rows]) for x in (rot, t))
    return hs.Evidence(k, offset, R, t, P, w, size, L, w3, angles, wa).map(lambda x: x[None])


def estimated(model: HandModel, regressed: HandEstimates, rows: np.ndarray) -> tuple[Tensor, ...]:
    """Points (N,21,2), joints (N,21,3) about their mean in the camera's axes, their weights (N,21), angles of the
    finger joints (N,15,3) and their weights (N,15)."""
    P, pose, joints, conf = (
        torch.as_tensor(np.asarray(getattr(regressed, k), np.float64)[rows])
        for k in ("points", "pose", "joints", "confidence")
    )
    w = torch.nan_to_num(conf).clamp(0, 1) * torch.isfinite(P).all(-1) * torch.isfinite(joints).all(-1)
    posed = torch.isfinite(pose).all(-1).all(-1)
    theta = model.rotations(torch.where(posed[:, None, None], pose, torch.zeros_like(pose)))
    angles = torch.einsum("kca,nkc->nka", model.joint_frames, rigid.so3_log(theta[:, 1:]))
    joints = torch.nan_to_num(joints - joints.mean(1, keepdim=True))
    return torch.nan_to_num(P), joints, w, angles, w[:, _TOLD_BY] * posed[:, None]


def found(landmarks: Landmarks, regressed: HandEstimates | None = None) -> np.ndarray:
    """(F,) bool: frames that landmarks or estimates tell of."""
    conf = np.nan_to_num(np.asarray(landmarks.confidence, np.float64))
    seen = (conf > 0) & (np.isfinite(landmarks.points).all(-1).sum(-1) >= 8)
    return seen if regressed is None else seen | (np.nan_to_num(regressed.confidence).mean(1) > 0.05)


def apparent_size(P: Tensor, L: Tensor, w: Tensor, w3: Tensor) -> Tensor:
    """(N,) pixels per 0.1 m of hand, whatever its foreshortening: from 3D landmarks when given, else from the
    spread."""
    flat = (P - P.mean(1, keepdim=True)).square().sum((1, 2)).sqrt()
    true = L[..., :2].square().sum((1, 2)).sqrt()
    size = torch.where(w3.amax(1) > 0, 0.1 * flat / true.clamp_min(1e-3), 1.3 * flat / np.sqrt(21))
    good = w.amax(1) > 0
    if not good.any():
        return torch.full_like(size, 100.0)
    mid = size[good].median()
    return torch.where(good, size.clamp(0.6 * mid, 1.6 * mid), mid)


def mean_grasp(model: HandModel) -> Tensor:
    """(16,3,3) local rotations of the prior's mean pose."""
    mean, _ = hs.pose_prior()
    local = torch.eye(3, dtype=F64).repeat(16, 1, 1)
    local[1:] = rigid.so3_exp(torch.einsum("kca,ka->kc", model.joint_frames, mean))
    return local


def typical_grasp(model: HandModel, ev: hs.Evidence) -> Tensor:
    """(16,3,3) local rotations: the median of a regressor's, or the prior's mean pose where it says nothing."""
    local, w = mean_grasp(model), ev.weight_angles[0]
    angles = ev.angles[0].movedim(0, -1).sort(-1)  # (15,3,N)
    below = w.T[:, None].expand_as(angles.indices).gather(-1, angles.indices).cumsum(-1)
    middle = (below < 0.5 * below[..., -1:]).sum(-1, keepdim=True).clamp_max(len(w) - 1)
    told = rigid.so3_exp(torch.einsum("kca,ka->kc", model.joint_frames, angles.values.gather(-1, middle)[..., 0]))
    local[1:] = torch.where((w.sum(0) > 0.5)[:, None, None], told, local[1:])
    return local


def per_frame_guess(model: HandModel, ev: hs.Evidence) -> tuple[Tensor, Tensor]:
    """Rotation (N,3,3) and wrist position (N,3) of the hand in the camera, each frame alone; of several sources, by the
    surest in each frame.

    From 3D landmarks, placed by their pixels; without them, from the affine map of the mean grasp to the pixels.
    """
    if ev.sources > 1:
        parts = [ev.source(k) for k in range(ev.sources)]
        best = torch.stack([p.weight[0].mean(1) for p in parts]).argmax(0)
        rot, wrist = (torch.stack(x) for x in zip(*(per_frame_guess(model, p) for p in parts), strict=True))
        each = torch.arange(len(best))
        return rot[best, each], wrist[best, each]
    mean = model.with_shape().joints(mean_grasp(model))
    palm, L, P = list(PALM), ev.points3d[0], ev.points[0]
    _, rot, _ = rigid.umeyama(mean[palm].expand(len(P), -1, -1), L[:, palm])
    flat = mean - mean.mean(0)
    q = P - P.mean(1, keepdim=True)
    affine = torch.linalg.solve(flat.mT @ flat + 1e-4 * torch.eye(3, dtype=F64), flat.mT @ q).mT  # (N,2,3)
    rows = affine.reshape(len(P), 6)
    by2d = rigid.matrix_from_6d(
        torch.where(rows.abs().amax(1, keepdim=True) > 0, rows, torch.eye(3, dtype=F64).flatten()[:6])
    ).mT
    have = ev.weight3d[0].amax(1) > 0
    rot = torch.where(have[:, None, None], rot, by2d)
    size = flat.norm()
    shape = L * (size / L.flatten(1).norm(dim=1).clamp_min(1e-6)).clamp(0.7, 1.6)[:, None, None]
    shape = torch.where(have[:, None, None], shape, flat @ by2d.mT)
    return rot, translate(shape, P, ev.weight[0], ev.K) + shape[:, 0]


def translate(shape: Tensor, points: Tensor, weight: Tensor, K: Tensor) -> Tensor:
    """Translation (N,3) that puts points (N,J,3), already in camera axes, on pixels (N,J,2): linear least squares,
    true K."""
    u = torch.stack([(points[..., 0] - K[0, 2]) / K[0, 0], (points[..., 1] - K[1, 2]) / K[1, 1]], -1)
    one, zero = torch.ones_like(u[..., 0]), torch.zeros_like(u[..., 0])
    rows = torch.stack([torch.stack([one, zero, -u[..., 0]], -1), torch.stack([zero, one, -u[..., 1]], -1)], -2)
    rhs = u * shape[..., 2:] - shape[..., :2]
    w = weight[..., None, None]
    A = (w * rows.mT @ rows).sum(1) + 1e-9 * torch.eye(3, dtype=shape.dtype)
    return torch.linalg.solve(A, (weight[..., None] * (rows.mT @ rhs[..., None])[..., 0]).sum(1))


def guess_scale(ev: hs.Evidence, wrist: Tensor, centre: Tensor | None) -> float:
    """log of metres per object unit: wrist_f = R_f c + s t_f for one c, robustly."""
    n = len(wrist)
    mid = centre if centre is not None else torch.zeros(3, dtype=F64)
    t = ev.t[0] + ev.rot[0] @ mid
    A = torch.cat([ev.rot[0], t[..., None]], -1)  # (N,3,4): offset of the wrist from the middle, scale
    w = torch.ones(n, dtype=F64)
    depth = wrist.norm(dim=-1).median()
    x = torch.zeros(4, dtype=F64)
    for _ in range(20):
        prior = torch.diag(torch.tensor([1, 1, 1, 0.0], dtype=F64)) * w.sum().clamp_max(3.0) * (0.3) ** 2
        H = (w[:, None, None] * (A.mT @ A)).sum(0) + prior
        x = torch.linalg.solve(
            H + 1e-12 * torch.eye(4, dtype=F64), (w[:, None] * (A.mT @ wrist[..., None])[..., 0]).sum(0)
        )
        e = (A @ x - wrist).norm(dim=-1) / (0.06 * depth / 0.5)
        w = 1 / (1 + e * e) ** 2
    s = float(x[3])
    fallback = float((wrist.norm(dim=-1) / t.norm(dim=-1).clamp_min(1e-9)).median())
    return float(np.log(s if 0.5 * fallback < s < 2 * fallback else fallback))


def starts(model: HandModel, ev: hs.Evidence, centre: Tensor | None, seed: int) -> hs.HandState:
    """Hypotheses: the orientations single frames vote for, and random ones for when all of them are wrong (fewer of
    these when two sources vote)."""
    n_random = 8 if ev.sources == 1 else 4
    _, wrist = per_frame_guess(model, ev)
    parts = [ev.source(k) for k in range(ev.sources)]
    in_carrier = torch.cat([ev.rot[0].mT @ per_frame_guess(model, p)[0] for p in parts])
    log_scale = guess_scale(ev, wrist, centre)
    q = rigid.quat_from_matrix(in_carrier)
    angle = 2 * torch.arccos((q @ q.T).abs().clamp_max(1))
    votes = torch.exp(-((angle / 0.5) ** 2)) @ torch.cat([p.weight[0].mean(1) for p in parts])
    chosen: list[int] = []
    for i in votes.argsort(descending=True).tolist():
        if all(angle[i, j] > 0.6 for j in chosen):
            chosen.append(i)
        if len(chosen) == 8:
            break
    gen = torch.Generator().manual_seed(seed)
    random = rigid.matrix_from_quat(torch.randn(n_random, 4, generator=gen, dtype=F64))
    R = torch.cat([in_carrier[chosen], random])
    n = len(R)
    local = typical_grasp(model, ev).repeat(n, 1, 1, 1)
    local[:, 0] = R
    scale = float(np.exp(log_scale))
    at = (ev.rot[0].mT @ (wrist - scale * ev.t[0])[..., None])[..., 0].median(0).values  # the wrist in the carrier
    transl = at.expand(n, 3) - model.joint_bases[0][0]
    return hs.HandState(local, transl.clone(), torch.zeros(n, 10, dtype=F64), torch.full((n,), log_scale, dtype=F64))


def balanced(ev: hs.Evidence, effective: float = 12.0, second: float = 3.0) -> hs.Evidence:
    """Weights that add up to at most `effective` frames' worth of evidence: a network's errors repeat from frame to
    frame. Beside landmarks a regressor counts for `second` frames, for it is the less exact of the two, and for more
    only where there are hardly any."""
    m = ev.sources
    total = ev.weight.unflatten(2, (m, 21)).sum((0, 1, 3)) / 21
    most = torch.full_like(total, effective)
    most[1:] = (effective - 3 * total[0]).clamp_min(second)
    share = (most / total.clamp_min(1e-9)).clamp_max(1.0)
    each = share.repeat_interleave(21)
    return replace(ev, weight=ev.weight * each, weight3d=ev.weight3d * each, weight_angles=ev.weight_angles * share[-1])


HIDDEN = 0.15  # weight of a landmark that cannot have been seen: the network guessed it


@torch.no_grad()
def visibility(
    model: HandModel,
    held: hs.HandState,
    ev: hs.Evidence,
    hand_masks: np.ndarray | None,
    object_points: Tensor | None,
    weight: float = HIDDEN,
) -> Tensor:
    """(F,1,J) weight of each landmark: 1 where the posed hand says its joint can be seen, `weight` where it cannot.

    A joint is hidden when the hand's own surface lies well in front of it, when object points do, or, with masks, when
    its pixel does not belong to the hand. held: F states; ev: (F,1); object_points (P,3) in the carrier's units.
    """
    posed = model.with_shape(held.betas).with_pose(held.rot, held.transl)
    f = torch.stack([ev.K[0, 0], ev.K[1, 1]])
    shift = held.log_scale.exp()[:, None] * ev.t[:, 0]

    def project(x: Tensor) -> tuple[Tensor, Tensor]:
        cam = x @ ev.rot[:, 0].mT + shift[:, None]
        z = cam[..., 2].clamp_min(0.02)
        return cam[..., :2] / z[..., None] * f + ev.K[:2, 2], z

    joint, jz = project(posed.joints)
    out = torch.ones_like(jz)
    per_mm = (f[0] / jz[:, 0] * 1e-3)[:, None, None]

    def behind(x: Tensor, radius: float, depth: float, count: int) -> Tensor:
        p, z = project(x)
        near = torch.cdist(joint, p) < radius * per_mm
        return ((z[:, None] < jz[..., None] - depth) & near).sum(-1) >= count

    hidden = behind(posed.skin(torch.arange(0, len(model.v_template), 2)), 6.0, 0.018, 1)
    if object_points is not None and len(object_points):
        pick = object_points[:: max(1, len(object_points) // 1500)]
        hidden |= behind(held.log_scale.exp()[:, None, None] * pick, 8.0, 0.008, 2)
    if hand_masks is not None:
        hidden |= ~on_mask(hand_masks, joint)
    out[hidden] = weight
    return out[:, None].repeat(1, 1, ev.sources)


def on_mask(masks: np.ndarray, pixels: Tensor) -> Tensor:
    """(F,N) bool: whether pixels (F,N,2) lie on the masks (F,H,W); True throughout frames whose mask is empty."""
    f, h, w = masks.shape
    x = pixels[..., 0].floor().long().clamp(0, w - 1)
    y = pixels[..., 1].floor().long().clamp(0, h - 1)
    m = torch.as_tensor(np.ascontiguousarray(masks))
    inside = m[torch.arange(f)[:, None], y, x]
    return inside | ~m.flatten(1).any(1)[:, None]


def agreement(model: HandModel, state: hs.HandState, ev: hs.Evidence, sigma: float = 0.15) -> np.ndarray:
    """(F,) share of each frame's landmarks, in [0,1], that the posed hand explains; states and evidence per frame
    (F,1)."""
    y = hs.landmark_points(model.with_shape(state.betas).with_pose(state.rot, state.transl), ev.offset)
    y = y[:, None] @ ev.rot.mT
    y = y + (state.log_scale.exp()[:, None, None] * ev.t)[:, :, None]
    pix = y[..., :2] / y[..., 2:].clamp_min(0.02) * torch.stack([ev.K[0, 0], ev.K[1, 1]]) + ev.K[:2, 2]
    r2 = ((pix - ev.points) / (sigma * ev.size)[..., None, None]).square().sum(-1)
    w = (ev.weight > 0).to(r2)
    return ((w / (1 + r2)).sum(-1) / w.sum(-1).clamp_min(1e-9))[:, 0].numpy()
