"""Gaussians bound to the triangles of a hand's mesh, and the same with a skeleton."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry.rigid import quat_from_matrix, quat_multiply
from ..shapes.gaussians import Gaussians
from ..shapes.skinned import SkinnedGaussians, colors_at


@dataclass(frozen=True)
class HandGaussians:
    """Gaussians bound to a mesh's triangles: they follow wherever the mesh is posed. Lengths in metres."""

    faces: np.ndarray  # (T,3) of the mesh they are bound to
    face: Tensor  # (N,) int64 triangle of each
    bary: Tensor  # (N,3) barycentric weights of the foot point
    offsets: Tensor  # (N,3) from the foot point, in the triangle's frame (x along its first edge, z its normal)
    quats: Tensor  # (N,4) wxyz, in the triangle's frame
    scales: Tensor  # (N,3) standard deviations
    opacities: Tensor  # (N,)
    colors: Tensor  # (N,3) in [0,1]
    id: int
    seen: Tensor  # (N,) bool: whether pixels of this hand show it


def pose_hand(g: HandGaussians, vertices: Tensor | np.ndarray) -> Gaussians:
    """The hand's Gaussians where the mesh's `vertices` (V,3) are, in their frame."""
    v = torch.as_tensor(np.asarray(vertices), dtype=torch.float32)
    foot, rot, quat = on_triangles(v, g.faces, g.face, g.bary)
    means = foot + (rot @ g.offsets[..., None])[..., 0]
    ids = torch.full((len(foot),), g.id, dtype=torch.int64)
    return Gaussians(means, quat_multiply(quat, g.quats), g.scales, g.opacities, g.colors, ids)


def skinned_hand(g: HandGaussians, rest: Tensor, weights: Tensor) -> SkinnedGaussians:
    """The hand's Gaussians with a skeleton: on the mesh at rest (V,3), weights (V,J) those of their foot points.

    `rest` is without pose correctives, so what those move by is lost. Those that no
    frame shows take the colour of the nearest that were seen: at the edge of what hides them they learn its colours.
    """
    corner = torch.from_numpy(g.faces).long()[g.face]
    at = pose_hand(g, rest)
    if g.seen.any() and not g.seen.all():
        colors = g.colors.clone()
        colors[~g.seen] = torch.from_numpy(colors_at(at.chosen(g.seen), at.means[~g.seen].numpy(), 32))
        at = at.with_values(colors=colors)
    return SkinnedGaussians(at, (weights[corner] * g.bary[..., None]).sum(1))


def on_triangles(v: Tensor, faces: np.ndarray, face: Tensor, bary: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Foot points (N,3), frames (N,3,3) and their quaternions (N,4): x along the first edge, z the normal."""
    corner = v[torch.from_numpy(faces).long()[face]]
    x = F.normalize(corner[:, 1] - corner[:, 0], dim=-1)
    z = F.normalize(torch.linalg.cross(x, corner[:, 2] - corner[:, 0]), dim=-1)
    rot = torch.stack([x, torch.linalg.cross(z, x), z], -1)
    return (corner * bary[..., None]).sum(1), rot, quat_from_matrix(rot)
