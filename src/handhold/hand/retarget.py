"""Poses of one hand model as poses of another: angles that bring its joints to where the first model's are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import rigid
from .model import HandModel

REST = 2e-4  # metres of joint error that a turn of one radian away from the model's rest pose is worth
SHAPE = 5e-4  # and a shape coefficient of one standard deviation
_PALM = (0, 1, 5, 9, 13, 17)  # wrist and first joints, OpenPose order: nearly rigid


def retarget(joints: Tensor, model: HandModel, steps: int = 400) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit `model` to 21 joints of each frame by least squares, one shape for all.

    joints: (F,21,3) metres, OpenPose order. Two models' joints are not the same points of a hand, so an error of some
    millimetres stays; twists about a bone, which joints do not show, stay near rest. Adam, deterministic.
    Returns theta (F,16,3), betas (B,), transl (F,3), and the distance of the joints (F,21), metres.
    """
    joints = joints.to(model.dtype)
    rest = model.with_shape().joints(torch.zeros_like(model.pose_mean))
    _, rotation, _ = rigid.umeyama(rest[list(_PALM)].expand(len(joints), -1, -1), joints[:, _PALM], scale=False)
    wrist, turn = model.joint_bases[0][0], rotation.detach()
    move = torch.zeros_like(joints[:, 0])
    root, fingers = torch.zeros_like(move), torch.zeros(len(joints), 15, 3, dtype=model.dtype)
    betas = torch.zeros(model.n_betas, dtype=model.dtype)
    for x in (move, root, fingers, betas):
        x.requires_grad_(True)
    optimizer = torch.optim.Adam([{"params": [root, fingers, betas], "lr": 0.05}, {"params": [move], "lr": 0.005}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    def posed() -> tuple[Tensor, Tensor, Tensor]:
        first = rigid.so3_log(turn @ rigid.so3_exp(root))[:, None]
        theta, transl = torch.cat([first, fingers], 1), joints[:, 0] - wrist + move
        return theta, transl, model.with_shape(betas).joints(theta, transl)

    for _ in range(steps):
        optimizer.zero_grad()
        theta, transl, found = posed()
        data = ((found - joints) ** 2).sum()
        (data + REST**2 * (fingers**2).sum() + SHAPE**2 * len(joints) * (betas**2).sum()).backward()
        optimizer.step()
        schedule.step()
    with torch.no_grad():
        theta, transl, found = posed()
        return theta, betas.detach(), transl, (found - joints).norm(dim=-1)
