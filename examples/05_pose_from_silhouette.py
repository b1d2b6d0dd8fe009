"""Mesh rasterisation: the pose of a hand from its mask alone, by gradients of the silhouette.

python examples/05_pose_from_silhouette.py [OUT.png]
"""

import sys

import torch

from handhold.datasets.masks import write_png
from handhold.geometry.rigid import geodesic, so3_exp
from handhold.hand import HandModel
from handhold.render import rasterize, soft_silhouette


def main(out: str | None = None, size: int = 128, steps: int = 120) -> tuple[float, float]:
    hand = HandModel.open("right")
    vertices, faces = hand.with_shape().vertices, hand.faces
    vertices = vertices - vertices.mean(0)
    camera = torch.eye(4)[None], torch.tensor([[[2.2 * size, 0, size / 2], [0, 2.2 * size, size / 2], [0, 0, 1]]])

    true_rotation, true_place = so3_exp(torch.tensor([1.3, 0.2, 0.4])), torch.tensor([0.0, 0.0, 0.5])
    mask = rasterize(vertices @ true_rotation.T + true_place, faces, *camera, size, size).mask

    start = so3_exp(torch.tensor([0.1, -0.1, 0.1])) @ true_rotation  # 10 degrees and 21 mm away
    turn, move = torch.zeros(3, requires_grad=True), torch.tensor([0.012, -0.01, 0.014], requires_grad=True)
    optimiser = torch.optim.Adam([{"params": [turn], "lr": 0.02}, {"params": [move], "lr": 0.002}], betas=(0.8, 0.95))

    def posed() -> tuple[torch.Tensor, torch.Tensor]:
        rotation = so3_exp(turn) @ start
        return rotation, vertices @ rotation.T + true_place + move

    pictures = [mask]
    for step in range(steps):
        for group, rate in zip(optimiser.param_groups, (0.02, 0.002), strict=True):
            group["lr"] = rate * 0.03 ** (step / steps)
        coverage = soft_silhouette(posed()[1], faces, *camera, size, size)
        loss = (coverage - mask).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if step in (0, steps - 1):
            pictures.append(coverage.detach())
    rotation, _ = posed()
    degrees = float(torch.rad2deg(geodesic(rotation.detach(), true_rotation)))
    millimetres = float(1e3 * move.detach().norm())
    print(f"from 10 degrees and 21 mm to {degrees:.2f} degrees and {millimetres:.2f} mm")
    if out:
        write_png(out, torch.cat(pictures, 2)[0].expand(-1, -1, 3).mul(255).round().byte().numpy())
        print("wrote", out)
    return degrees, millimetres


if __name__ == "__main__":
    main(*sys.argv[1:2])
