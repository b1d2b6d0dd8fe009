"""Where the free values of a subject's Gaussians come from: tables of their own, or a triplane with three decoders.

BIGS (On et al., CVPR 2025) decodes everything from a triplane of 3 x 32 x 256 x 256: appearance, geometry and
deformation, each a small network. Both kinds here give the same `Values`, so that either can be used for hands and
object alike. The decoders' last layers start at zero and their outputs are added to where the Gaussians start: the
paper instead spends 7,500 steps on teaching the networks that start.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..shapes.encodings import Triplane, TriplaneConfig
from .surfels import Free


class Values(NamedTuple):
    """What decides N Gaussians of a subject."""

    free: Free
    bones: Tensor | None  # (N,J) added to the logarithms of the template's skinning weights; None: rigid


class Explicit(nn.Module):
    """Every Gaussian's values stand in tables (`--bigs.variant plain`)."""

    def __init__(self, colors: Tensor, bones: int = 0):
        super().__init__()
        start = Free.of(colors)
        for name, value in start._asdict().items():
            self.register_parameter(name, nn.Parameter(value.clone()))
        self.register_parameter("bones", nn.Parameter(colors.new_zeros(len(colors), bones)) if bones else None)

    def forward(self) -> Values:
        return Values(Free(*(getattr(self, k) for k in Free._fields)), self.bones)

    def groups(self) -> list[dict]:
        """For Adam; steps are without units, see `Free`."""
        looks = [self.color, self.opacity]
        still = 1 if self.bones is None else 1 / 3  # hands' poses are found along: discs should not explain them
        groups = [(looks, 0.05), ([self.offset], 0.06 * still), ([self.size, self.spin], 0.03 * still)]
        if self.bones is not None:
            groups.append(([self.bones], 0.02))
        return [{"params": p, "lr": lr} for p, lr in groups]


class Decoded(nn.Module):
    """Values decoded from a triplane at fixed base points (`--bigs.variant triplane`).

    points (N,3): where the features are read, lo and hi (3,): the box, colors (N,3): where colours start; bones: number
    of skinning weights, 0 for none. Widths and depths are the paper's.
    """

    def __init__(
        self,
        points: Tensor,
        lo: Tensor,
        hi: Tensor,
        colors: Tensor,
        bones: int = 0,
        resolution: int = 256,
        features: int = 32,
        seed: int = 0,
    ):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        config = TriplaneConfig(resolution=resolution, features=features)
        self.planes = Triplane(config, lo.tolist(), hi.tolist(), generator=generator)
        width = self.planes.output_dim
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.appearance = decoder(width, 64, 3 + 1)
            self.geometry = decoder(width, 128, 3 + 2 + 1)
            self.deformation = decoder(width, 128, bones) if bones else None
        self.register_buffer("points", points.clone())
        for name, value in Free.of(colors)._asdict().items():
            self.register_buffer(f"start_{name}", value)
        self.to(points.device)

    def forward(self) -> Values:
        f = self.planes(self.points)
        color, opacity = self.appearance(f).split([3, 1], -1)
        offset, size, spin = self.geometry(f).split([3, 2, 1], -1)
        free = Free(
            self.start_offset + offset,
            self.start_size + size,
            self.start_spin + spin[:, 0],
            self.start_opacity + opacity[:, 0],
            self.start_color + color,
        )
        return Values(free, None if self.deformation is None else self.deformation(f))

    def groups(self) -> list[dict]:
        nets = [n for n in (self.appearance, self.geometry, self.deformation) if n is not None]
        return [
            {"params": [self.planes.planes], "lr": 0.02},
            {"params": [p for n in nets for p in n.parameters()], "lr": 2e-3},
        ]


def decoder(inputs: int, width: int, outputs: int) -> nn.Sequential:
    """Two hidden layers with GELU; the last layer gives zeros at first."""
    last = nn.Linear(width, outputs)
    nn.init.zeros_(last.weight)
    nn.init.zeros_(last.bias)
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width), nn.GELU(), last)
