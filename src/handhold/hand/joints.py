"""Names, orders and limits of the hand's joints.

Inside `handhold.hand` the 16 rotating joints come in MANO order (wrist, then index, middle, pinky, ring, thumb, palm to
tip); at every public edge the 21 joints come in OpenPose order (wrist, then thumb, index, middle, ring, pinky).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

FINGERS = ("thumb", "index", "middle", "ring", "pinky")
MANO_NAMES = ("wrist",) + tuple(f"{f}{k}" for f in ("index", "middle", "pinky", "ring", "thumb") for k in (1, 2, 3))
OPENPOSE_NAMES = ("wrist",) + tuple(f"{f}{k}" for f in FINGERS for k in (1, 2, 3, "_tip"))
MANO_PARENTS = (-1, 0, 1, 2, 0, 4, 5, 0, 7, 8, 0, 10, 11, 0, 13, 14)
OPENPOSE_PARENTS = (-1, 0, 1, 2, 3, 0, 5, 6, 7, 0, 9, 10, 11, 0, 13, 14, 15, 0, 17, 18, 19)
MANO_TIP_PARENTS = (15, 3, 6, 12, 9)  # distal joint of thumb, index, middle, ring, pinky, in MANO order
OPENPOSE_TIPS = (4, 8, 12, 16, 20)
# 21 joints = 16 in MANO order followed by the tips of thumb, index, middle, ring, pinky
OPENPOSE_FROM_MANO = (0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20)
MANO_FROM_OPENPOSE = (0, 5, 6, 7, 9, 10, 11, 17, 18, 19, 13, 14, 15, 1, 2, 3, 4, 8, 12, 16, 20)

# Limits of each joint's rotation vector away from the open hand's rest pose, degrees, in the joint's own frame
# (`joint_frames`): flexion (towards the palm), abduction, twist about the bone. The rest pose is relaxed: each finger
# joint already bends 5-15 degrees. Ranges after textbook goniometry with a margin for soft tissue and model error.
_LIMITS_DEG = {
    "index1": ((-35, 95), (-22, 22), (-12, 12)),
    "middle1": ((-35, 95), (-18, 18), (-12, 12)),
    "ring1": ((-35, 95), (-20, 20), (-12, 12)),
    "pinky1": ((-35, 95), (-28, 28), (-15, 15)),
    "finger2": ((-20, 105), (-5, 5), (-5, 5)),
    "finger3": ((-20, 80), (-4, 4), (-4, 4)),
    "thumb1": ((-40, 45), (-45, 45), (-35, 35)),
    "thumb2": ((-30, 60), (-15, 15), (-12, 12)),
    "thumb3": ((-30, 85), (-5, 5), (-5, 5)),
}


def _limit_table() -> tuple[tuple[tuple[float, float], ...], ...]:
    rows = []
    for name in MANO_NAMES[1:]:
        key = name if name in _LIMITS_DEG else f"finger{name[-1]}"
        rows.append(tuple((math.radians(lo), math.radians(hi)) for lo, hi in _LIMITS_DEG[key]))
    return tuple(rows)


LIMITS = (
    _limit_table()
)  # 15 x 3 x (low, high) radians: joint in MANO order without the wrist; flexion, abduction, twist


def joint_frames(joints: Tensor, side: str = "right") -> Tensor:
    """Frames of the 15 finger joints, measured from rest joints (21,3) in OpenPose order -> (15,3,3), MANO order.

    Columns are the axes of flexion, abduction and twist, right-handed; a positive turn about the first bends towards
    the palm. The flexion axis is the normal of the finger's own plane (its joints are bent a little at rest; where they
    are nearly straight it leans on the line across the knuckles), the twist axis runs along the bone.
    """
    j = joints
    across = torch.nn.functional.normalize(j[5] - j[17], dim=0)  # little finger to index
    if side == "left":
        across = -across
    frames = []
    for k in range(1, 16):
        finger, link = FINGERS.index(MANO_NAMES[k][:-1]), int(MANO_NAMES[k][-1]) - 1
        p = j[1 + 4 * finger : 5 + 4 * finger]
        b = p[1:] - p[:-1]
        plane = torch.linalg.cross(b[0], b[1]) + torch.linalg.cross(b[1], b[2]) + torch.linalg.cross(b[0], b[2])
        lean = (
            0.15 * b.norm(dim=-1).sum() ** 2 / 3 if finger else 0.0
        )  # a thumb's plane has nothing to do with the knuckles
        twist = torch.nn.functional.normalize(b[link], dim=0)
        axis = plane + lean * across
        axis = torch.nn.functional.normalize(axis - (axis @ twist) * twist, dim=0)
        frames.append(torch.stack([axis, torch.linalg.cross(twist, axis), twist], -1))
    return torch.stack(frames)


def joint_angles(theta: Tensor, frames: Tensor) -> Tensor:
    """Rotation vectors (*B,16,3) or (*B,15,3) -> (flexion, abduction, twist) in the joints' frames, (*B,15,3)
    radians."""
    return torch.einsum("kca,...kc->...ka", frames.to(theta), theta[..., -15:, :])


def joint_limit_loss(theta: Tensor, frames: Tensor) -> Tensor:
    """Soft anatomical limits: squared radians beyond the range, summed over joints.

    theta (*B,16,3) are rotations away from the *open hand's* rest pose (the wrist is ignored); frames (15,3,3) is
    `HandModel.joint_frames`. Returns (*B). Zero inside the range, differentiable everywhere.
    """
    angle = joint_angles(theta, frames)
    limits = torch.tensor(LIMITS, dtype=angle.dtype, device=angle.device)
    over = (angle - limits[..., 1]).clamp_min(0) + (limits[..., 0] - angle).clamp_min(0)
    return over.square().sum((-1, -2))
