"""Losses of hand regressors, and their errors in millimetres.

`hamer_loss` has the published terms and weights (HaMeR, CVPR 2024, section 3.3 and its released settings). `exact_loss`
is for training from scratch on exact truth: errors of the surface in centimetres, of rotations, of places in the
picture, and every joint that is seen states its own uncertainty.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..geometry import rigid
from .crops import CropTruth, HandCrops
from .parametric import HandOutput


@dataclass(frozen=True)
class HamerWeights:
    """Published weights. The adversarial term (0.0005) is not available: it needs a collection of MANO poses."""

    joints: float = 0.05
    points: float = 0.01
    root: float = 0.001
    pose: float = 0.001
    betas: float = 0.0005


@dataclass(frozen=True)
class ExactWeights:
    """Weights of `exact_loss`; each term's unit is in its comment. They are chosen so that the terms' gradients are of
    one size, and their norm of order one."""

    vertices: float = 0.1  # cm, L1, relative to the wrist
    joints: float = 0.1  # cm, L1, relative to the wrist
    root: float = 0.2  # chordal: 3 mean |R - R*| of the root
    pose: float = 0.2  # the same of the fifteen finger joints
    betas: float = 0.005  # standard deviations, L1
    projected: float = 0.02  # joints' projections, L1, per cent of the crop's width
    depth: float = 0.04  # 10 |log depth - log true depth| of the wrist
    points: float = 0.04  # Laplacian negative log likelihood of the seen joints
    coarse: float = 0.5  # of the estimate before each refinement


def hamer_loss(
    out: HandOutput,
    crops: HandCrops,
    weights: HamerWeights = HamerWeights(),  # noqa: B008
) -> tuple[Tensor, dict[str, Tensor]]:
    """L1 of wrist-relative joints (metres) and of projections (crop widths), squared errors of rotation matrices and
    betas; each summed over a hand and averaged over the batch (the released code sums over the batch). Returns the
    loss and its terms."""
    t = _truth(crops)
    width = crops.image.shape[-1]
    terms = {
        "joints": _mean(((out.joints - out.joints[:, :1]) - (t.joints - t.joints[:, :1])).abs().sum((1, 2)), t),
        "points": _mean(((out.projected - t.points) / width).abs().sum((1, 2)), t),
    }
    if out.rotations is not None and out.betas is not None:
        squared = (out.rotations - t.rotations).square().sum((2, 3))
        terms["root"], terms["pose"] = _mean(squared[:, 0], t), _mean(squared[:, 1:].sum(1), t)
        terms["betas"] = _mean((out.betas - t.betas[:, : out.betas.shape[1]]).square().sum(1), t)
    return sum(getattr(weights, k) * v for k, v in terms.items()), _detached(terms)


def exact_loss(
    out: HandOutput,
    crops: HandCrops,
    weights: ExactWeights = ExactWeights(),  # noqa: B008
) -> tuple[Tensor, dict[str, Tensor]]:
    """Our loss for exact truth; see `ExactWeights`. Works for both families. Returns the loss and its terms (of the
    last estimate)."""
    t = _truth(crops)
    width = crops.image.shape[-1]
    wrist, wrist_t = out.joints[:, :1], t.joints[:, :1]
    far = (out.projected - t.points) / width
    miss = ((out.points - t.points) / width).abs().clamp_max(2.0).sum(-1)
    terms = {
        "vertices": _mean(100 * ((out.vertices - wrist) - (t.vertices - wrist_t)).abs().mean((1, 2)), t),
        "joints": _mean(100 * ((out.joints - wrist) - (t.joints - wrist_t)).abs().mean((1, 2)), t),
        "projected": _mean(100 * far.abs().clamp_max(1.0).mean((1, 2)), t),
        "depth": _mean(10 * (wrist[:, 0, 2].clamp_min(1e-3) / wrist_t[:, 0, 2]).log().abs(), t),
        # two Laplacians of one scale: |dx| + |dy| over the scale, plus twice its log; the constant keeps it near zero
        "points": _mean((miss * (-out.log_sigma).exp() + 2 * out.log_sigma).mean(1) + 8.0, t),
    }
    if out.rotations is not None and out.betas is not None:
        chord = (out.rotations - t.rotations).abs().mean((2, 3)) * 3
        terms["root"], terms["pose"] = _mean(chord[:, 0], t), _mean(chord[:, 1:].mean(1), t)
        terms["betas"] = _mean((out.betas - t.betas[:, : out.betas.shape[1]]).abs().mean(1), t)
    if out.token_joints is not None:  # counted with the joints of the surface, as in METRO
        extra = out.token_joints - out.token_joints[:, :1] - (t.joints - wrist_t)
        terms["joints"] = (terms["joints"] + _mean(100 * extra.abs().mean((1, 2)), t)) / 2
    loss = sum(getattr(weights, k) * v for k, v in terms.items())
    if out.coarse is not None:
        loss = loss + weights.coarse * exact_loss(out.coarse, crops, weights)[0]
    return loss, _detached(terms)


def hand_errors(out: HandOutput, crops: HandCrops) -> dict[str, Tensor]:
    """Errors of each crop, (N,) millimetres unless named otherwise: `mpjpe` and `mpvpe` relative to the wrist,
    `pa_mpjpe` and `pa_mpvpe` after a similarity (Umeyama), `pixels` of the seen joints over the crop's width in per
    cent, `projected` of the projections likewise, `root_deg` where the family knows it."""
    t = _truth(crops)
    with torch.no_grad(), torch.autocast(out.joints.device.type, enabled=False):
        j, v = out.joints - out.joints[:, :1], out.vertices - out.joints[:, :1]
        jt, vt = t.joints - t.joints[:, :1], t.vertices - t.joints[:, :1]
        width = crops.image.shape[-1]
        errors = {
            "mpjpe": 1000 * (j - jt).norm(dim=-1).mean(1),
            "mpvpe": 1000 * (v - vt).norm(dim=-1).mean(1),
            "pa_mpjpe": 1000 * _aligned(j, jt),
            "pa_mpvpe": 1000 * _aligned(v, vt),
            "pixels": 100 * (out.points - t.points).norm(dim=-1).mean(1) / width,
            "projected": 100 * (out.projected - t.points).norm(dim=-1).mean(1) / width,
        }
        if out.rotations is not None:
            errors["root_deg"] = torch.rad2deg(rigid.geodesic(out.rotations[:, 0], t.rotations[:, 0]))
    return errors


def _aligned(a: Tensor, b: Tensor) -> Tensor:
    s, rot, shift = rigid.umeyama(a, b)
    return (s[:, None, None] * (a @ rot.mT) + shift[:, None] - b).norm(dim=-1).mean(1)


def _truth(crops: HandCrops) -> CropTruth:
    if crops.truth is None:
        raise ValueError("these crops have no truth; losses need those of `hand_crops`")
    return crops.truth


def _mean(x: Tensor, t: CropTruth) -> Tensor:
    return (x * t.weight).sum() / t.weight.sum().clamp_min(1.0)


def _detached(terms: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v.detach() for k, v in terms.items()}
