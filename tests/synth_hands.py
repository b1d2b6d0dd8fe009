"""Pictures of hands with exact truth that need no renderer: a soft spot of its own colour at every joint."""

from __future__ import annotations

from dataclasses import fields

import torch
from torch import Tensor

from handhold.datasets.synthetic.sample import HandTruth, ObjectTruth, SynthBatch
from handhold.geometry import rigid
from handhold.hand.model import HandModel


def random_rotations(n: int, g: torch.Generator, bend: float = 0.4) -> Tensor:
    """(n,16,3,3): any root, fingers bent by about `bend` radians."""
    w = torch.randn(n, 16, 3, generator=g) * bend
    w[:, 0] = torch.nn.functional.normalize(w[:, 0], dim=-1) * (torch.rand(n, 1, generator=g) * 3)
    return rigid.so3_exp(w)


def make_K(n: int, width: int, height: int, focal: float) -> Tensor:
    K = torch.eye(3).repeat(n, 1, 1)
    K[:, 0, 0] = K[:, 1, 1] = focal
    K[:, 0, 2], K[:, 1, 2] = width / 2, height / 2
    return K


def hand_truth(side: str, rotations: Tensor, betas: Tensor, wrist: Tensor, K: Tensor, width: int, height: int):
    """Truth of hands whose wrists are at `wrist` (n,3), camera frame."""
    model = HandModel.open(side)
    shaped = model.with_shape(betas)
    transl = wrist - shaped.rest_joints[:, 0]
    posed = shaped.with_pose(rotations, transl)
    joints, vertices = posed.joints, posed.vertices
    points = project(joints, K)
    inside = ((points > 0) & (points < points.new_tensor([width, height]))).all(-1)
    n = len(rotations)
    return HandTruth(
        torch.ones(n, dtype=torch.bool), rotations, betas, transl, vertices, joints, points, inside,
        torch.zeros(n), torch.ones(n), torch.zeros(n, vertices.shape[1], dtype=torch.bool),
    )  # fmt: skip


def project(points: Tensor, K: Tensor) -> Tensor:
    homogeneous = points @ K.mT
    return homogeneous[..., :2] / homogeneous[..., 2:]


def spots(points: Tensor, width: int, height: int, sigma: float) -> Tensor:
    """Points (n,P,2) -> pictures (n,3,height,width): Gaussian spots, brighter and redder with their number."""
    y, x = torch.meshgrid(torch.arange(height) + 0.5, torch.arange(width) + 0.5, indexing="ij")
    d = (x - points[..., 0, None, None]) ** 2 + (y - points[..., 1, None, None]) ** 2
    heat = torch.exp(-d / (2 * sigma**2))
    n = points.shape[1]
    colour = torch.stack([torch.linspace(0.2, 1, n), torch.linspace(1, 0.2, n), torch.full((n,), 0.5)])
    return torch.einsum("cp,nphw->nchw", colour, heat).clamp(0, 1)


def hand_batch(n: int, seed: int = 0, width: int = 320, height: int = 240, focal: float = 300.0) -> SynthBatch:
    """n pictures, each with a right hand on the one side and a left hand on the other."""
    g = torch.Generator().manual_seed(seed)
    K = make_K(n, width, height, focal)
    hands = {}
    for side, x in (("right", 0.1), ("left", -0.1)):
        wrist = torch.randn(n, 3, generator=g) * 0.04 + torch.tensor([x, 0.0, 0.5])
        hands[side] = hand_truth(
            side, random_rotations(n, g), torch.randn(n, 10, generator=g), wrist, K, width, height
        )  # fmt: skip
    image = spots(torch.cat([hands["right"].points, hands["left"].points], 1), width, height, 3.0)
    none = torch.zeros(n, dtype=torch.bool)
    blank = {k.name: none for k in fields(ObjectTruth)}
    blank |= {"index": torch.zeros(n, dtype=torch.int64), "cam_from_object": torch.eye(4).repeat(n, 1, 1)}
    thing = ObjectTruth(**blank | {"vertices": torch.zeros(n, 1, 3), "angle": torch.zeros(n)})
    return SynthBatch(
        image, K, torch.zeros(n, height, width, dtype=torch.uint8), torch.zeros(n, 4, height, width, dtype=torch.bool),
        torch.zeros(n, height, width), hands["right"], hands["left"], thing,
    )  # fmt: skip
