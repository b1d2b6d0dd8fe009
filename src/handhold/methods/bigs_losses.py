"""Losses of BIGS (On et al., CVPR 2025) beside those of pictures: motion, regularisers, and optional perception.

Pure functions of tensors. Contact is in `bigs_contact`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..geometry.rigid import so3_log

Features = Callable[[Tensor], list[Tensor]]  # image (1,3,H,W) in [0,1] -> feature maps (1,C,h,w)


def turning(before: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """(*) squared change of the turn from frame to frame, radians: rotations (*,3,3) on SO(3), not axis-angle.

    log(before' now) and log(now' after) are the body's angular velocities; their difference is zero for a constant
    one, and the same when all frames turn together.
    """
    return (so3_log(before.mT @ now) - so3_log(now.mT @ after)).square().sum(-1)


def swaying(before: Tensor, now: Tensor, after: Tensor) -> Tensor:
    """(*) squared second difference of positions (*,3), metres squared."""
    return (before - 2 * now + after).square().sum(-1)


def color_spread(colors: Tensor, neighbours: Tensor) -> Tensor:
    """Mean absolute difference of colours (N,3) from those of their neighbours (N,k) indices.

    The paper's `reg_shs` pulls every colour to the subject's mean, which greys prints; here only to the surroundings.
    """
    return (colors[:, None] - colors[neighbours]).abs().mean()


def skinning_drift(weights: Tensor, template: Tensor) -> Tensor:
    """Mean squared difference of skinning weights (N,J) from the template's (weight 1000 in the paper)."""
    return (weights - template).square().mean()


def perceptual(network: Features, image: Tensor, picture: Tensor, sure: Tensor) -> Tensor:
    """Distance of two images (H,W,3) in the features of a network that the user gives.

    network: (1,3,H,W) in [0,1] -> feature maps (1,C,h,w); sure (H,W,1): 1 where the picture is to be believed.
    Features are compared with unit length per pixel (LPIPS, Zhang et al., CVPR 2018, without learned weights).
    """
    a, b = ((x * sure).permute(2, 0, 1)[None] for x in (image, picture))
    unit = lambda f: f / f.norm(dim=1, keepdim=True).clamp(min=1e-8)  # noqa: E731
    with torch.no_grad():
        wanted = [unit(f) for f in network(b)]
    return sum((unit(f) - w).square().sum(1).mean() for f, w in zip(network(a), wanted, strict=True))
