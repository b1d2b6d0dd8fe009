"""Another hand model brought to the same joints."""

from __future__ import annotations

from dataclasses import replace

import torch

from handhold.hand import HandModel
from handhold.hand.retarget import retarget


def test_joints_of_a_hand_of_another_size_and_mean_pose_come_to_the_same_places():
    g = torch.Generator().manual_seed(0)
    ours = HandModel.open("left", dtype=torch.float64)
    theta = torch.randn(2, 16, 3, generator=g, dtype=torch.float64) * 0.15
    theta[:, 0] *= 8
    transl = torch.randn(2, 3, generator=g, dtype=torch.float64)
    joints = ours.with_shape(torch.full((10,), 0.5).double()).joints(theta, transl)
    mean = torch.cat([torch.zeros(1, 3), torch.full((15, 3), 0.1)]).double()
    other = replace(ours, v_template=1.03 * ours.v_template, pose_mean=mean)
    found, betas, place, error = retarget(joints, other, steps=60)
    assert torch.allclose(other.with_shape(betas).joints(found, place) - joints, torch.zeros(()).double(), atol=8e-3)
    assert error.shape == (2, 21) and float(error.mean()) < 1.5e-3
