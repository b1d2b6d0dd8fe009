"""A hand's silhouette as least squares on its parameters, for `tracking.hand_solver`.

Two robust terms per frame. Model to mask: a projected vertex must not lie outside the hand's mask, unless something
that may hide it (the object, the other hand) is there. Mask to model: every mask pixel must have a projected vertex
nearby.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from torch import Tensor

from ..hand import HandModel
from ..hand import joints as jt
from .hand_solver import F64, N_ROT, HandState, geman_mcclure


@dataclass(frozen=True, eq=False)
class Silhouettes:
    """Masks of N frames, prepared: distances outside what the hand may cover, and sampled pixels it must cover."""

    K: Tensor  # (3,3)
    rot: Tensor  # (N,3,3) camera from carrier
    t: Tensor  # (N,3) in the carrier's units
    frames: np.ndarray  # (N,) which frames of the clip
    outside: Tensor  # (N,h,w) float32 pixels to the nearest place where a vertex may appear, on a grid of `step` pixels
    step: int
    pixels: Tensor  # (N,M,2) pixels of the hand's mask
    weight: Tensor  # (N,) per frame
    size: float  # pixels per 0.1 m of hand


def prepare(
    K: Tensor,
    rot: Tensor,
    t: Tensor,
    hand_masks: np.ndarray,
    occluders: np.ndarray | None,
    usable: np.ndarray,
    size: float,
    samples: int = 80,
    max_frames: int = 100,
    weight: float = 40.0,
    effective: float = 12.0,
    seed: int = 0,
) -> Silhouettes | None:
    """Distance transforms and samples of the usable frames (F,) bool; None when fewer than two have a mask.

    rot (F,3,3), t (F,3); masks (F,H,W) bool. `weight` is what a frame's silhouette may cost at most, per direction, in
    landmarks; all frames together count as at most `effective`.
    """
    area = hand_masks.reshape(len(hand_masks), -1).sum(1)
    enough = usable & (area > 0.15 * np.median(area[area > 0])) if (area > 0).any() else np.zeros(len(area), bool)
    frames = np.where(enough)[0]
    if len(frames) < 2:
        return None
    frames = frames[np.unique(np.linspace(0, len(frames) - 1, min(max_frames, len(frames))).round().astype(int))]
    rng, step = np.random.default_rng(seed), 2
    far, px = [], []
    for i in frames:
        allowed = hand_masks[i] if occluders is None else hand_masks[i] | occluders[i]
        d = cv2.distanceTransform((~allowed).astype(np.uint8), cv2.DIST_L2, 3)
        far.append(np.ascontiguousarray(d[::step, ::step]))
        y, x = np.nonzero(hand_masks[i])
        pick = rng.integers(0, len(x), samples)
        px.append(np.stack([x[pick], y[pick]], 1) + 0.5)
    share = min(1.0, effective / len(frames)) * weight * (1.0 if occluders is not None else 0.5)
    index = torch.as_tensor(frames)
    return Silhouettes(
        K, rot[index], t[index], frames, torch.as_tensor(np.stack(far)), step,
        torch.as_tensor(np.stack(px)), torch.full((len(frames),), share, dtype=F64), size,
    )  # fmt: skip


_BELOW = torch.zeros(16, 16, dtype=F64)  # 1 where joint m lies at or below joint k
for _m in range(16):
    _k = _m
    while _k >= 0:
        _BELOW[_m, _k] = 1
        _k = jt.MANO_PARENTS[_k]


def vertices_and_jacobian(model: HandModel, state: HandState, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Vertices `ids` (S,N,3) and their derivative (S,N,3,61); pose correctives are held constant in the derivative."""
    posed = model.with_shape(state.betas).with_pose(state.rot, state.transl)
    rest, T, w = posed._rest(ids), posed.bone_transforms, model.weights[ids]
    rest = rest.expand(len(T), -1, -1)
    x = torch.einsum("smab,svb->svma", T[..., :3, :3], rest) + T[:, None, :, :3, 3]  # by each bone alone
    wx = w[..., None] * x
    a, p = posed.global_rotations, posed.mano_joints
    arm = torch.einsum("svma,mk->svka", wx, _BELOW) - (w @ _BELOW)[..., None] * p[:, None]
    axes = torch.cat([a[:, :1], a[:, 1:] @ model.joint_frames], 1)
    s, n = len(x), len(ids)
    turn = torch.linalg.cross(
        axes.mT[:, None].expand(-1, n, -1, -1, -1), arm[:, :, :, None].expand(-1, -1, -1, 3, -1), dim=-1
    )
    jd, sd = model.joint_bases[1], model.shapedirs[ids]
    grow: list[Tensor] = []
    for j, up in enumerate(model.parents):
        grow.append(jd[j].expand(s, 3, -1) if up < 0 else grow[up] + a[:, up] @ (jd[j] - jd[up]))
    base = torch.stack(grow, 1) - a @ jd  # (S,16,3,10)
    shape = torch.einsum("vm,smab->svab", w, base) + torch.einsum("vm,smab,vbc->svac", w, a, sd)
    move = torch.eye(3, dtype=F64).expand(s, n, 3, 3)
    return wx.sum(2), torch.cat([turn.reshape(s, n, N_ROT, 3).mT, move, shape], -1)


def system(
    model: HandModel,
    state: HandState,
    sil: Silhouettes,
    share: Tensor,
    ids: Tensor,
    sigma: float = 0.04,
    slack: float = 0.03,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cost (S,), H (S,62,62), g (S,62) of the silhouettes; share (S,N) says which frames each hand answers for."""
    x, D = vertices_and_jacobian(model, state, ids)
    s, v = x.shape[:2]
    scale = state.log_scale.exp()
    unit = sigma * sil.size
    f = torch.stack([sil.K[0, 0], sil.K[1, 1]])
    cost = torch.zeros(s, dtype=F64)
    Hv, gv = torch.zeros(s, v, 4, 4, dtype=F64), torch.zeros(s, v, 4, dtype=F64)
    h, w = sil.outside.shape[1:]
    for i in range(s):
        rows = share[i].nonzero()[:, 0]
        if not len(rows):
            continue
        moved = scale[i] * sil.t[rows]
        cam = x[i] @ sil.rot[rows].mT + moved[:, None]
        z = cam[..., 2].clamp_min(0.02)
        pix = cam[..., :2] / z[..., None] * f + sil.K[:2, 2]
        P = torch.zeros(*z.shape, 2, 3, dtype=F64)
        P[..., 0, 0], P[..., 1, 1] = f[0] / z, f[1] / z
        P[..., :, 2] = -cam[..., :2] / z[..., None] ** 2 * f
        A = torch.cat([P @ sil.rot[rows][:, None], P @ moved[:, None, :, None]], -1)  # (n,V,2,4)
        weight = (share[i, rows] * sil.weight[rows])[:, None]

        # model to mask
        g = pix / sil.step - 0.5
        gx, gy = g[..., 0].clamp(0, w - 1.001), g[..., 1].clamp(0, h - 1.001)
        x0, y0 = gx.floor().long(), gy.floor().long()
        fx, fy, row = gx - x0, gy - y0, torch.arange(len(rows))[:, None]
        o = sil.outside[rows].double()
        d00, d01, d10, d11 = o[row, y0, x0], o[row, y0, x0 + 1], o[row, y0 + 1, x0], o[row, y0 + 1, x0 + 1]
        d = (d00 * (1 - fx) + d01 * fx) * (1 - fy) + (d10 * (1 - fx) + d11 * fx) * fy
        slope = (
            torch.stack([(d01 - d00) * (1 - fy) + (d11 - d10) * fy, (d10 - d00) * (1 - fx) + (d11 - d01) * fx], -1)
            / sil.step
        )
        inside = (g[..., 0] > 0) & (g[..., 1] > 0) & (g[..., 0] < w - 1) & (g[..., 1] < h - 1)
        rho, rw = geman_mcclure((d / unit) ** 2)
        wt = weight * inside / v
        cost[i] += (wt * rho).sum()
        a = (slope[..., None, :] @ A)[..., 0, :] / unit  # (n,V,4)
        Hv[i] += 2 * torch.einsum("nv,nva,nvb->vab", wt * rw, a, a)
        gv[i] += 2 * torch.einsum("nv,nva->va", wt * rw * d / unit, a)

        # mask to model
        px = sil.pixels[rows]
        dist, near = torch.cdist(px, pix).min(-1)  # (n,M)
        chosen = pix.gather(1, near[..., None].expand(-1, -1, 2))
        r = (chosen - px) * (1 - slack * sil.size / dist.clamp_min(1e-9)).clamp_min(0)[..., None] / unit
        rho, rw = geman_mcclure(r.square().sum(-1))
        wt = weight / px.shape[1]
        cost[i] += (wt * rho).sum()
        B = A[row, near] / unit  # (n,M,2,4)
        on = (dist > slack * sil.size) * wt * rw
        Hv[i].index_add_(0, near.flatten(), 2 * torch.einsum("nm,nmra,nmrb->nmab", on, B, B).reshape(-1, 4, 4))
        gv[i].index_add_(0, near.flatten(), 2 * torch.einsum("nm,nmra,nmr->nma", on, B, r).reshape(-1, 4))
    D4 = torch.zeros(s, v, 4, 62, dtype=F64)
    D4[:, :, :3, :61] = D
    D4[:, :, 3, 61] = 1
    flat = D4.reshape(s, 4 * v, 62)
    return cost, flat.mT @ (Hv @ D4).reshape(s, 4 * v, 62), (flat.mT @ gv.reshape(s, 4 * v, 1))[..., 0]
