"""Neural signed distance fields: the coordinate networks of IDR, VolSDF and HOLD."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from .encodings import Fourier, FourierConfig
from .nerf import fourier, fourier_size

SHARPNESS = 100.0  # of the softplus


class SdfMlp(nn.Module):
    """Signed distance and a feature of a point, by a softplus network that starts as a sphere.

    Geometric initialisation: Atzmon & Lipman, CVPR 2020, theorem 1, with IDR's treatment (Yariv et al., NeurIPS 2020)
    of an encoded input: what is not the point itself starts with zero weight. At 256 units and softplus that sphere is
    18 % off, so the last layer's distance is then fitted to it in closed form. The defaults are HOLD's.
    Points belong in a ball of about 1.5; beyond, the field is no distance.

    The network sees the point and its encoding: Fourier with `bands`, or any module of `shapes.encodings` (with
    `output_dim` and forward(x, jacobian); without the identity, which is there already).
    """

    def __init__(
        self,
        bands: int = 6,
        width: int = 256,
        depth: int = 8,
        skip: int | None = 4,
        feature: int = 256,
        radius: float = 0.6,
        norm: bool = True,
        encoding: nn.Module | None = None,
    ):
        super().__init__()
        if skip is not None and not 1 <= skip < depth:
            raise ValueError(f"the skip joins before layer 1 to {depth - 1}, not {skip}")
        self.encoding = Fourier(FourierConfig(bands, identity=False)) if encoding is None else encoding
        self.skip = skip
        e = 3 + self.encoding.output_dim
        if skip is not None and e >= width:
            raise ValueError(
                f"layers of {width} are too narrow to join a point and encoding of {e}; widen, or skip=None"
            )
        layers = []
        for k in range(depth + 1):
            d_in = e if k == 0 else width
            d_out = 1 + feature if k == depth else width - e if k + 1 == skip else width
            layer = nn.Linear(d_in, d_out)
            nn.init.normal_(layer.weight, 0, math.sqrt(2 / d_out))
            nn.init.zeros_(layer.bias)
            with torch.no_grad():
                if k == 0:
                    layer.weight[:, 3:] = 0
                if k == skip:
                    layer.weight[:, width - e + 3 :] = 0
            layers.append(layer)
        nn.init.normal_(layers[-1].weight, math.sqrt(math.pi / width), 1e-4)
        nn.init.constant_(layers[-1].bias, -radius)
        self.layers = nn.ModuleList(layers)
        self._fit_sphere(radius)
        if norm:
            self.layers = nn.ModuleList(weight_norm(layer) for layer in layers)

    @torch.no_grad()
    def _fit_sphere(self, radius: float, points: int = 2048, ridge: float = 1e-4) -> None:
        """Least change of the last layer's first row that makes the field |x| - radius in the ball of 1.5."""
        r = 1.5 * torch.rand(points, 1) ** (1 / 3)
        x = r * nn.functional.normalize(torch.randn(points, 3), dim=-1)
        h = self._hidden(self._input(x)).double()
        h = torch.cat([h, torch.ones_like(h[:, :1])], -1)
        last = self.layers[-1]
        row = torch.cat([last.weight[0], last.bias[:1]]).double()
        gram = h.T @ h / points
        gram.diagonal().add_(ridge * gram.diagonal().mean())
        row += torch.linalg.solve(gram, h.T @ ((r[:, 0] - radius) - h @ row) / points)
        last.weight[0], last.bias[0] = row[:-1], row[-1]

    def _input(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.encoding(x)], -1)

    def _hidden(self, e: Tensor) -> Tensor:
        """Points with their encoding -> input of the last layer."""
        h = e
        for k, layer in enumerate(self.layers[:-1]):
            h = torch.cat([h, e], -1) / math.sqrt(2) if k == self.skip else h
            h = nn.functional.softplus(layer(h), SHARPNESS)
        return h

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (M,3) -> sdf (M,), feature (M,feature)."""
        h = self.layers[-1](self._hidden(self._input(x)))
        return h[:, 0], h[:, 1:]

    def sdf(self, x: Tensor) -> Tensor:
        """x (M,3) -> (M,): the distance alone, for samplers and extraction."""
        last = self.layers[-1]
        return nn.functional.linear(self._hidden(self._input(x)), last.weight[:1], last.bias[:1])[:, 0]

    def with_gradient(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (M,3) -> sdf (M,), feature (M,feature), gradient of the sdf (M,3).

        The gradient is the chain rule written out, an ordinary part of the graph: losses on it need one backward only,
        encodings no second derivative of their kernel, inference no graph. `autograd_gradient` is the specification.
        """
        linear = [(layer.weight, layer.bias) for layer in self.layers]  # weight norm is worked out once for both ways
        encoded, jacobian = self.encoding(x, jacobian=True)
        e = h = torch.cat([x, encoded], -1)
        slopes = []
        for k, (w, b) in enumerate(linear):
            if k:
                slopes.append(torch.sigmoid(SHARPNESS * h))
                h = nn.functional.softplus(h, SHARPNESS)
            if k == self.skip:
                h = torch.cat([h, e], -1) / math.sqrt(2)
            h = nn.functional.linear(h, w, b)
        g = linear[-1][0][:1].expand(len(x), -1)  # d sdf / d (input of the last layer)
        g_e = None
        for k in range(len(linear) - 1, -1, -1):
            if k == self.skip:
                g = g / math.sqrt(2)
                g, g_e = g.tensor_split([g.shape[1] - e.shape[1]], 1)
            if k:
                g = (g * slopes[k - 1]) @ linear[k - 1][0]
        g = g if g_e is None else g + g_e
        gradient = g[:, :3] + (g[:, 3:, None] * jacobian).sum(1)
        return h[:, 0], h[:, 1:], gradient


def autograd_gradient(sdf: Callable[[Tensor], Tensor], x: Tensor, create_graph: bool = True) -> tuple[Tensor, Tensor]:
    """x (M,3) -> sdf (M,) and its gradient (M,3) for any field; create_graph lets losses on the gradient train it."""
    with torch.enable_grad():
        at = x if x.requires_grad else x.detach().requires_grad_()
        value = sdf(at)
        (gradient,) = torch.autograd.grad(value.sum(), at, create_graph=create_graph)
    return value, gradient


class ColorMlp(nn.Module):
    """Colour of a point near a surface (IDR's renderer; HOLD's has no view direction), in [0,1].

    view_bands: encoded view direction too, None for none; code: width of a per-frame or per-pose vector.
    """

    def __init__(
        self,
        feature: int = 256,
        width: int = 256,
        depth: int = 4,
        view_bands: int | None = None,
        code: int = 0,
        norm: bool = True,
    ):
        super().__init__()
        self.view_bands = view_bands
        d_in = 6 + feature + code + (0 if view_bands is None else fourier_size(3, view_bands))
        sizes = [d_in] + [width] * depth + [3]
        layers = [nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False)]
        self.layers = nn.ModuleList(weight_norm(layer) if norm else layer for layer in layers)

    def forward(
        self, x: Tensor, gradient: Tensor, feature: Tensor, d: Tensor | None = None, code: Tensor | None = None
    ) -> Tensor:
        """x, gradient (M,3), feature (M,F), d (M,3) unit, code (M,C) -> rgb (M,3)."""
        parts = [x, gradient, feature]
        if self.view_bands is not None:
            parts.append(fourier(d, self.view_bands))
        if code is not None:
            parts.append(code)
        h = torch.cat(parts, -1)
        for k, layer in enumerate(self.layers):
            h = layer(torch.relu(h) if k else h)
        return torch.sigmoid(h)
