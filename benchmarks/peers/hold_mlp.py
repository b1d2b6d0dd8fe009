"""One training iteration of HOLD's object networks (Fan et al., CVPR 2024) in plain torch: the field it would take.

SDF network 8 x 256 on 6 Fourier bands with a skip at the fourth layer and Softplus(100); colour network 4 x 256 on
point, normal, features and codes; weight norm; VolSDF density (Yariv et al., NeurIPS 2021), normals and eikonal by
double backward, Adam. Its error-bounded sampler, which asks the field more than once a ray, is left out.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

WIDTH, BANDS, CODES = 256, 6, 8 + 32  # pose embedding and frame code


def fourier(x: Tensor) -> Tensor:
    """(N,3) -> (N,39)."""
    bands = [f(x * 2.0**k) for k in range(BANDS) for f in (torch.sin, torch.cos)]
    return torch.cat([x, *bands], -1)


class Sdf(nn.Module):
    """(N,3) -> distance (N,), features (N,256); starts as a sphere of radius 0.6 (geometric initialisation)."""

    def __init__(self):
        super().__init__()
        e = 3 + 6 * BANDS
        sizes = [(e, WIDTH), *[(WIDTH, WIDTH)] * 2, (WIDTH, WIDTH - e), *[(WIDTH, WIDTH)] * 4, (WIDTH, 1 + WIDTH)]
        layers = [nn.Linear(*s) for s in sizes]
        for k, layer in enumerate(layers[:-1]):
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / layer.out_features))
            nn.init.zeros_(layer.bias)
            if k == 0:
                nn.init.zeros_(layer.weight[:, 3:])
            if k == 4:
                nn.init.zeros_(layer.weight[:, 3 - e :])
        nn.init.normal_(layers[-1].weight, math.sqrt(math.pi / WIDTH), 1e-4)
        nn.init.constant_(layers[-1].bias, -0.6)
        self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        e = fourier(x)
        y = e
        for k, layer in enumerate(self.layers):
            y = layer(torch.cat([y, e], -1) / math.sqrt(2) if k == 4 else y)
            if k < len(self.layers) - 1:
                y = nn.functional.softplus(y, beta=100)
        return y[:, 0], y[:, 1:]


def color_net() -> nn.Sequential:
    sizes = [6 + CODES + WIDTH, WIDTH, WIDTH, WIDTH, WIDTH]
    hidden = [m for a, b in zip(sizes[:-1], sizes[1:], strict=True) for m in (weight_norm(nn.Linear(a, b)), nn.ReLU())]
    return nn.Sequential(*hidden, weight_norm(nn.Linear(WIDTH, 3)), nn.Sigmoid())


def make(rays: int, samples: int) -> Callable[[], Tensor]:
    """A call that makes one iteration and returns its loss."""
    torch.manual_seed(0)
    sdf, color = Sdf(), color_net()
    beta = nn.Parameter(torch.tensor(0.1))
    adam = torch.optim.Adam([*sdf.parameters(), *color.parameters(), beta], 5e-4, fused=True)
    o = nn.functional.normalize(torch.randn(rays, 3), dim=-1) * 2
    d = nn.functional.normalize(torch.randn(rays, 3) * 0.2 - o, dim=-1)
    target, mask = torch.rand(rays, 3), (torch.rand(rays) > 0.5).float()
    codes = torch.randn(CODES)

    def iteration() -> Tensor:
        t = 1 + 2 * (torch.arange(samples) + torch.rand(rays, samples)) / samples
        x = (o[:, None] + t[..., None] * d[:, None]).reshape(-1, 3).requires_grad_()
        distance, features = sdf(x)
        (normal,) = torch.autograd.grad(distance.sum(), x, create_graph=True)
        rgb = color(torch.cat([x, normal, codes.expand(len(x), -1), features], -1)).reshape(rays, samples, 3)
        s = distance.reshape(rays, samples)
        b = beta.abs() + 1e-4
        density = (0.5 + 0.5 * s.sign() * torch.expm1(-s.abs() / b)) / b  # Laplace CDF of -s, over beta
        step = torch.diff(t, append=t[:, -1:] + 2 / samples)
        free = density * step
        T = torch.exp(-(torch.cumsum(free, 1) - free))
        weight = T * -torch.expm1(-free)
        out, acc = (weight[..., None] * rgb).sum(1), weight.sum(1).clamp(1e-4, 1 - 1e-4)
        loss = (out - target).abs().mean() + 0.1 * ((normal.norm(dim=-1) - 1) ** 2).mean()
        loss = loss + 0.1 * nn.functional.binary_cross_entropy(acc, mask)
        adam.zero_grad()
        loss.backward()
        adam.step()
        return loss.detach()

    return iteration
