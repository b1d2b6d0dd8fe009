"""Volume rendering: a ball and a box that interpenetrate, as one medium, with each body's share of every pixel.

python examples/04_volume.py [OUT.png]
"""

import sys

import torch
from torch import Tensor

from handhold.datasets.masks import write_png
from handhold.geometry.cameras import pixel_centres
from handhold.render.medium import LaplaceDensity
from handhold.render.samplers import camera_rays, error_bounded, sphere_bounds
from handhold.render.volume import Body, Points, render_rays, sdf_body

BETA = 0.004  # width of the surface, in the scene's unit


def body(sdf, color: tuple[float, float, float]) -> Body:
    """A body with this signed distance: shaded by its normal, sampled where the opacity needs it."""

    def field(p: Points) -> tuple[Tensor, Tensor, Tensor]:
        with torch.enable_grad():
            x = p.x.detach().requires_grad_()
            distance = sdf(x)
            (normal,) = torch.autograd.grad(distance.sum(), x)
        light = 0.3 + 0.7 * (normal @ torch.tensor([-0.4, -0.6, -0.7])).clamp(0, 1)
        return distance.detach(), torch.tensor(color) * light[:, None], normal

    def sample(rays):
        return error_bounded(lambda x, ray: sdf(x), rays, sphere_bounds(rays, 1.0), BETA, n=32, extra=16)

    return sdf_body(field, LaplaceDensity(BETA), sample)


def ball(x: Tensor) -> Tensor:
    return (x - torch.tensor([0.15, 0.0, 0.0])).norm(dim=-1) - 0.4


def box(x: Tensor) -> Tensor:
    q = (x - torch.tensor([-0.2, 0.1, 0.0])).abs() - torch.tensor([0.35, 0.25, 0.3])
    return q.clamp(min=0).norm(dim=-1) + q.amax(-1).clamp(max=0)


def main(out: str | None = None, size: int = 96) -> tuple[float, float]:
    world_from_cam = torch.eye(4)
    world_from_cam[2, 3] = -2.5
    K = torch.tensor([[1.6 * size, 0, size / 2], [0, 1.6 * size, size / 2], [0, 0, 1]])
    xy = torch.from_numpy(pixel_centres(size, size)).float().reshape(-1, 2)
    with torch.no_grad():
        bodies = [body(ball, (0.9, 0.5, 0.2)), body(box, (0.2, 0.5, 0.9))]
        r = render_rays(camera_rays(K, world_from_cam, xy), bodies, background=torch.ones(3), chunk=2048)
    ball_share, box_share = r.shares.mean(0).tolist()
    print(f"{size}x{size}: the ball fills {100 * ball_share:.1f} % of the picture, the box {100 * box_share:.1f} %")
    if out:
        shares = torch.cat([r.shares, torch.zeros(len(xy), 1)], 1)
        picture = torch.cat([r.rgb.view(size, size, 3), shares.view(size, size, 3)], 1)
        write_png(out, picture.clamp(0, 1).mul(255).round().byte().numpy())
        print("wrote", out)
    return ball_share, box_share


if __name__ == "__main__":
    main(*sys.argv[1:2])
