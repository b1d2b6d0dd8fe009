"""HOLD's losses (Fan et al., CVPR 2024, section 3.3), each a pure function; distances in metres."""

from __future__ import annotations

import torch
from torch import Tensor

from ..losses import l1

CLAMP = 0.01  # metres of the template's surface in which the hand's field is held to it
SOFT = 0.002  # metres two bodies may overlap at no cost: skin gives


def color(rgb: Tensor, opacity: Tensor, target: Tensor, clear: Tensor) -> Tensor:
    """Mean L1 of the mean colour that the light meets, rgb (N,3) over opacity (N,), on pixels of one body.

    Colour times opacity would ask every pixel inside a mask for more opacity, and none outside for less: bodies grow.
    """
    return l1(rgb / opacity.clamp(min=0.05)[:, None], target, clear[:, None])


def semantic(shares: Tensor, alone: Tensor, label: Tensor, sure: Tensor, least: float = 1e-3) -> Tensor:
    """Mean cross entropy of each body's share of the light (N,B) with the labels (N,), those below 0 being nothing.

    A pixel of one body tells another that lies behind nothing, and one in front to go away; it does so only as far as
    the labelled body is there to hide it (`alone` (N,B)): a mistracked hand must not carve the object beneath its mask.
    """
    n, bodies = shares.shape
    target = torch.nn.functional.one_hot(label.clamp(min=0), bodies).to(shares) * (label >= 0)[:, None]
    s = shares.clamp(least, 1 - least)
    entropy = -(target * s.log() + (1 - target) * (1 - s).log())
    own = torch.where(label >= 0, alone.gather(1, label.clamp(min=0)[:, None])[:, 0].detach(), 1.0)
    weight = torch.where(target > 0, 1.0, own[:, None]) * sure[:, None]
    return (weight * entropy).sum(-1).mean()


def sparsity(alone: Tensor, away: Tensor) -> Tensor:
    """Mean opacity of bodies (N,B) on rays that stay `away` (N,B) bool from their last known surface (eq. 11)."""
    return (alone * away).sum() / away.sum().clamp(min=1)


def template(sdf: Tensor, of_template: Tensor, clamp: float = CLAMP) -> Tensor:
    """Mean L1 of two signed distances (M,), both held to +-clamp: near the template the field is the template's."""
    return (sdf.clamp(-clamp, clamp) - of_template.clamp(-clamp, clamp)).abs().mean()


def penetration(sdf: Tensor, soft: float = SOFT) -> Tensor:
    """Mean depth beyond `soft` of surface points of one body in another, from the other's distances (M,) at them."""
    return (-sdf - soft).clamp(min=0).mean()


def contact(sdf: Tensor, touching: Tensor, reach: float = 0.02) -> Tensor:
    """Mean distance, up to `reach`, of the points (M,) that are `touching` (M,) from the other's surface.

    0 where nothing touches; what is inside pays nothing here.
    """
    d = sdf.clamp(0, reach) * touching
    return d.sum() / touching.sum().clamp(min=1)


def acceleration(rotations: Tensor, known: Tensor) -> Tensor:
    """Mean squared change of angular velocity, radians per frame squared, of rotations (F,*J,3,3); known (F,).

    On SO(3): the relative rotations of neighbouring frames are compared, so that a constant turn costs nothing, however
    fast, and a rotation of all frames changes nothing.
    """
    step = rotations[:-1].mT @ rotations[1:]
    change = step[:-1].mT @ step[1:]
    ok = (known[:-2] & known[1:-1] & known[2:]).to(rotations)
    # |log R|^2 to second order, without its singularity: 3 - trace = 2 (1 - cos angle)
    square = 3 - change.diagonal(dim1=-2, dim2=-1).sum(-1)
    square = square.reshape(len(square), -1).mean(1)
    return (square * ok).sum() / ok.sum().clamp(min=1)


def translation_acceleration(x: Tensor, known: Tensor) -> Tensor:
    """Mean squared second difference, metres squared, of positions (F,3); known (F,)."""
    ok = (known[:-2] & known[1:-1] & known[2:]).to(x)
    square = (x[2:] - 2 * x[1:-1] + x[:-2]).square().sum(-1)
    return (square * ok).sum() / ok.sum().clamp(min=1)
