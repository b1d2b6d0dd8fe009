"""Poses of one hand model as poses of another: angles that bring its joints to where the first model's are."""

from __future__ import annotations

import torch
from torch import Tensor

from ..geometry import rigid
from .model import HandModel

REST = 2e-4  # metres of joint error that a turn of one radian away from the model's rest pose is worth
SHAPE = 5e-4  # and a shape coefficient of one standard deviation
_PALM = (0, 1, 5, 9, 13, 17)  # wrist and first joints, OpenPose order: nearly rigid


def retarget(joints: Tensor, model: HandModel, steps: int = 120) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fit `model` to 21 joints of each frame by least squares, one shape for all (L-BFGS, deterministic).

    joints: (F,21,3) metres, OpenPose order. Two models' joints are not the same points of a hand, so an error of some
    millimetres stays; twists about a bone, which joints do not show, stay near rest.
    Returns theta (F,16,3), betas (B,), transl (F,3), and the distance of the joints (F,21), metres.
    """
    joints, palm = joints.to(model.dtype), list(_PALM)
    rest = model.with_shape().joints(torch.zeros_like(model.pose_mean))
    _, turn, _ = rigid.umeyama(rest[palm].expand(len(joints), -1, -1), joints[:, palm], scale=False)
    wrist = model.joint_bases[0][0]
    new = lambda *shape: torch.zeros(shape, dtype=model.dtype, requires_grad=True)  # noqa: E731
    move, root, fingers, betas = new(len(joints), 3), new(len(joints), 3), new(len(joints), 15, 3), new(model.n_betas)

    def posed() -> tuple[Tensor, Tensor, Tensor]:
        first = rigid.so3_log(turn @ rigid.so3_exp(root))[:, None]
        # decimetres, so that all unknowns move joints about as far
        theta, transl = torch.cat([first, fingers], 1), joints[:, 0] - wrist + 0.1 * move
        return theta, transl, model.with_shape(betas).joints(theta, transl)

    def loss() -> Tensor:
        optimizer.zero_grad()
        data = ((posed()[2] - joints) ** 2).sum()
        prior = REST**2 * (fingers**2).sum() + SHAPE**2 * len(joints) * (betas**2).sum()
        total = 1e4 * (data + prior)  # square centimetres
        total.backward()
        return total

    optimizer = torch.optim.LBFGS(
        [move, root, fingers, betas], max_iter=steps, history_size=30, line_search_fn="strong_wolfe",
        tolerance_grad=1e-9, tolerance_change=1e-12,
    )  # fmt: skip
    optimizer.step(loss)
    with torch.no_grad():
        theta, transl, found = posed()
        return theta, betas.detach(), transl, (found - joints).norm(dim=-1)
