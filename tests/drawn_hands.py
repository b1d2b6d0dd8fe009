"""Hands for tests of other people's files: one drawn on the picture, and one of bent joints in space."""

from __future__ import annotations

import numpy as np
import torch

from handhold.geometry import rigid
from handhold.hand import HandModel
from handhold.hand.joints import LIMITS


def hand(x: float, y: float = 100.0, size: float = 60.0) -> np.ndarray:
    """(21,2) pixels of an open hand whose wrist is at (x, y)."""
    p = np.zeros((21, 2))
    for f in range(5):
        for k in range(4):
            p[1 + 4 * f + k] = [(f - 2) * 0.25, -0.5 - 0.17 * k]
    return p * size + [x, y]


def posed(side: str, bend: float, seed: int = 0) -> np.ndarray:
    """(21,3) joints of the open hand, fingers bent by a share of their range, turned at random."""
    model = HandModel.open(side, dtype=torch.float64)
    local = torch.eye(3, dtype=torch.float64).repeat(16, 1, 1)
    angle = torch.tensor(LIMITS, dtype=torch.float64)[:, 0, 1] * bend
    local[1:] = rigid.so3_exp(model.joint_frames[:, :, 0] * angle[:, None])
    turn = torch.randn(4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    local[0] = rigid.matrix_from_quat(turn / turn.norm())
    return model.with_shape().joints(local).numpy()
