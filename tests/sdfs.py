"""Exact signed distances of a few solids, in torch, and rays that look at them."""

from __future__ import annotations

import torch
from torch import Tensor

from handhold.render.samplers import Rays


def sphere(x: Tensor, centre=(0.0, 0.0, 0.0), radius: float = 0.5) -> Tensor:
    return (x - x.new_tensor(centre)).norm(dim=-1) - radius


def box(x: Tensor, centre=(0.5, 0.1, 0.0), half=(0.3, 0.25, 0.4)) -> Tensor:
    q = (x - x.new_tensor(centre)).abs() - x.new_tensor(half)
    # Not norm(): it has no gradient at 0.
    return (q.clamp(min=0).square().sum(-1) + 1e-24).sqrt() + q.amax(-1).clamp(max=0)


def rays(n: int, distance: float = 2.5, spread: float = 0.45, dtype=torch.float32, seed: int = 0):
    """n rays from a sphere towards points scattered round its centre."""
    g = torch.Generator().manual_seed(seed)
    o = distance * torch.nn.functional.normalize(torch.randn(n, 3, generator=g, dtype=torch.float64), dim=-1)
    aim = spread * torch.randn(n, 3, generator=g, dtype=torch.float64)
    return Rays(o.to(dtype), torch.nn.functional.normalize(aim - o, dim=-1).to(dtype))


def coloured(sdf, color):
    """A field of one colour: points -> sdf, rgb, gradient."""

    def field(p):
        x = p.x
        with torch.enable_grad():
            at = x if x.requires_grad else x.detach().requires_grad_()
            s = sdf(at)
            (g,) = torch.autograd.grad(s.sum(), at, create_graph=True)
        return s, x.new_tensor(color).expand_as(x), g

    return field
