"""Poses and shapes of empty hands, drawn from a broad natural prior, in the joints' own angles.

Angles (*B,15,3) are flexion, abduction and twist in radians of the finger joints in MANO order, as limited by
`hand.joints.LIMITS`. Couplings after textbook anatomy: the outer joint of a finger follows the middle one by about 0.6,
the little and the ring finger follow each other and the middle finger.
"""

from __future__ import annotations

import functools
import math

import torch
from torch import Tensor

from ...geometry import rigid
from ...hand import joints as jt
from ...hand.model import HandModel

ROWS = {"thumb": 12, "index": 0, "middle": 3, "ring": 9, "pinky": 6}  # first joint of each finger in angles (15,3)
ORDER = [ROWS[f] for f in jt.FINGERS]
_FREE = {
    # flexion of joints 1, 2, 3 from index to pinky; their abduction; thumb: flexion 1, abduction 1, flexion 2 and 3
    "relaxed": ([(8, 12, 6), (12, 16, 8), (16, 18, 9), (18, 18, 9)], (0, 0, 0, 0), (0, 4, 4, 4)),
    "flat": ([(-12, -8, -5)] * 4, (2, 0, 0, 2), (-12, -5, -8, -8)),
    "spread": ([(-10, -6, -4)] * 4, (-14, -3, 9, 20), (-28, -6, -8, -10)),
    "fist": ([(68, 92, 58), (72, 94, 60), (74, 92, 58), (74, 88, 55)], (0, 0, 0, 0), (16, 26, 32, 42)),
    "loose": ([(38, 52, 26), (42, 56, 28), (46, 56, 28), (46, 52, 26)], (0, 0, 0, 0), (8, 16, 12, 18)),
    "point": ([(-4, 0, 0), (66, 86, 50), (70, 88, 52), (70, 84, 50)], (0, 0, 0, 0), (18, 26, 26, 34)),
    "two": ([(-6, -4, -2), (-6, -4, -2), (66, 86, 50), (68, 84, 48)], (-12, 8, 0, 0), (20, 30, 24, 36)),
    "thumb_up": ([(66, 90, 56), (70, 92, 58), (72, 90, 56), (72, 86, 54)], (0, 0, 0, 0), (-32, -12, -14, -12)),
    "pinch": ([(30, 34, 17), (10, 12, 6), (10, 12, 6), (12, 12, 6)], (3, 0, 0, 0), (10, 18, 0, -14)),
    "closed_pinch": ([(36, 38, 18), (52, 58, 28), (56, 60, 30), (56, 58, 28)], (3, 0, 0, 0), (12, 20, 2, -10)),
    "tripod": ([(33, 38, 19), (34, 38, 20), (46, 52, 26), (50, 52, 26)], (4, 6, 0, 0), (12, 22, 2, -14)),
    "claw": ([(-8, 58, 34), (-8, 60, 35), (-6, 60, 34), (-4, 56, 32)], (-4, 0, 2, 6), (-8, 14, 6, 16)),
    "table": ([(60, 4, 2), (62, 4, 2), (62, 4, 2), (60, 4, 2)], (0, 0, 0, 0), (6, 18, 0, 4)),
    "horns": ([(-4, 0, 0), (66, 88, 54), (68, 86, 52), (-4, 0, 0)], (-4, 0, 0, 10), (14, 24, 26, 38)),
    "little_out": ([(60, 82, 48), (64, 84, 50), (62, 82, 48), (2, 4, 2)], (0, 0, 0, 10), (-20, -4, -6, -6)),
}
_WEIGHTS = (3, 1.5, 1.2, 1.6, 2.2, 1.2, 0.5, 0.5, 1.2, 1.0, 1.0, 0.8, 0.5, 0.2, 0.3)


def angles_from(fingers, spread, thumb) -> Tensor:
    """Degrees as in `_FREE` -> angles (15,3) radians."""
    a = torch.zeros(15, 3)
    for f, bends, side in zip(jt.FINGERS[1:], fingers, spread, strict=True):
        a[ROWS[f] : ROWS[f] + 3, 0] = torch.tensor(bends, dtype=torch.float32)
        a[ROWS[f], 1] = side
    k = ROWS["thumb"]
    a[k, 0], a[k, 1], a[k + 1, 0], a[k + 2, 0] = (float(x) for x in thumb)
    a[k, 2] = -0.5 * a[k, 1]  # the thumb turns its pad to the fingers as it comes under them
    return torch.deg2rad(a)


@functools.lru_cache(maxsize=8)
def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    poses = torch.stack([angles_from(*p) for p in _FREE.values()])
    cumulative = torch.tensor(_WEIGHTS).cumsum(0) / sum(_WEIGHTS)
    return poses.to(device), cumulative.to(device), torch.tensor(jt.LIMITS).to(device)


def limits(device: torch.device) -> Tensor:
    """(15,3,2) radians, `joints.LIMITS` on a device."""
    return _tables(torch.device(device))[2]


def rotations_from_angles(angles: Tensor, frames: Tensor) -> Tensor:
    """Angles (*B,15,3) in frames (15,3,3) -> rotations (*B,16,3,3) with the identity for the wrist."""
    finger = rigid.so3_exp(torch.einsum("kca,...ka->...kc", frames.to(angles), angles))
    eye = torch.eye(3, dtype=angles.dtype, device=angles.device).expand(*angles.shape[:-2], 1, 3, 3)
    return torch.cat([eye, finger], -3)


def clamped(angles: Tensor, share: float = 0.98) -> Tensor:
    """Angles (*B,15,3) within `share` of the limits."""
    lim = limits(angles.device).to(angles) * share
    return torch.minimum(torch.maximum(angles, lim[..., 0]), lim[..., 1])


def pose_noise(n: int, generator: torch.Generator | None, device: torch.device, degrees: float = 8.0) -> Tensor:
    """Angles (n,15,3) of a correlated disturbance: a whole-hand part, a part per finger and one per joint."""

    def randn(*shape):
        return torch.randn(*shape, generator=generator, device=device)

    hand, finger, joint = randn(n, 1, 1), randn(n, 5, 1), randn(n, 5, 3)
    f = 0.6 * hand + 0.7 * finger + 0.35 * joint
    f = torch.cat([f[..., :2], 0.6 * f[..., 1:2] + 0.3 * f[..., 2:]], -1)
    a = torch.zeros(n, 15, 3, device=device)
    rows = _rows(torch.device(device))
    a[:, rows] = torch.stack([f, 0.12 * randn(n, 5, 3), 0.12 * randn(n, 5, 3)], -1).reshape(n, 15, 3)
    first = rows[::3]
    a[:, first, 1] = 0.35 * randn(n, 5) + torch.linspace(0, 0.25, 5, device=device) * randn(n, 1)
    a[:, 12, 1] = 0.9 * randn(n)
    a[:, 12, 2] = 0.5 * randn(n) - 0.3 * a[:, 12, 1]
    return a * math.radians(degrees)


@functools.lru_cache(maxsize=8)
def _rows(device: torch.device) -> Tensor:
    return torch.tensor([r + k for r in ORDER for k in range(3)]).to(device)


def sample_free_poses(hand: HandModel, n: int, generator: torch.Generator | None = None) -> Tensor:
    """Rotations (n,16,3,3) of empty hands, identity wrist, within the joints' limits: named poses, blends of two of
    them, fingers taken from different ones, and disturbances; relaxed poses are the most common."""
    device = hand.device
    poses, cumulative, _ = _tables(device)

    def rand(*shape):
        return torch.rand(*shape, generator=generator, device=device)

    a, b, c = (poses[torch.searchsorted(cumulative, rand(n)).clamp_max(len(poses) - 1)] for _ in range(3))
    blend = torch.where(rand(n, 1, 1) < 0.45, torch.zeros(n, 1, 1, device=device), rand(n, 1, 1))
    angles = a + blend * (b - a)
    mixed = (rand(n, 1) < 0.2) & (rand(n, 5) < 0.5)  # single fingers from another pose
    take = torch.zeros(n, 15, dtype=torch.bool, device=device)
    take[:, _rows(device)] = mixed.repeat_interleave(3, 1)
    angles = torch.where(take[..., None], c, angles)
    amount = torch.where(rand(n, 1, 1) < 0.15, 18.0, 7.0)
    angles = clamped(angles + pose_noise(n, generator, device, 1.0) * amount)
    return rotations_from_angles(angles, hand.joint_frames).to(hand.dtype)


def sample_betas(n: int, generator: torch.Generator | None = None, device: str | torch.device = "cpu") -> Tensor:
    """Shape coefficients (n,10): standard normal, one hand in five half as wide again; nothing beyond 3."""
    wide = torch.where(torch.rand(n, 1, generator=generator, device=device) < 0.2, 1.5, 1.0)
    return (torch.randn(n, 10, generator=generator, device=device) * wide).clamp(-3, 3)
