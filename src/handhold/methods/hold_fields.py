"""Signed-distance and colour fields of one body in its rest space: `paper` networks and `fast` grids.

Both answer forward(x (M,3) metres, frame (M,), jacobian (M,3,3)) -> sdf (M,) metres, gradient (M,3), rgb (M,3): the
rest space's own distance and gradient. Colour is albedo, a small code per frame, and a light that stays with the camera
while the body turns (HOLD has no light: highlights and shading then go into pose and albedo).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.grid import SdfGrid
from ..render.samplers import Rays
from ..render.volume import inverted_sphere
from ..scene import Mesh
from ..shapes.encodings import Fourier, FourierConfig
from ..shapes.extraction import Report, extract_grid, extract_surface
from ..shapes.nerf import Nerf
from ..shapes.neural_sdf import ColorMlp, SdfMlp
from ..shapes.sdf_fit import shading

CODE = 4  # numbers per frame: enough for exposure, too few to draw what a wrong pose misses
BANDS = 6


@dataclass(frozen=True)
class NetworkSize:
    """Size of the `paper` networks; the defaults are HOLD's."""

    width: int = 256
    depth: int = 8
    color_depth: int = 4
    feature: int = 256


class _Lit(nn.Module):
    """What both kinds share: codes per frame and a second-order light in the camera's frame."""

    def __init__(self, frames: int, light: Tensor | None = None):
        super().__init__()
        self.code = nn.Parameter(torch.zeros(frames, CODE))
        self.light = nn.Parameter(torch.zeros(9) if light is None else light.detach().clone())

    def _shade(self, rgb: Tensor, gradient: Tensor, jacobian: Tensor) -> Tensor:
        normal = F.normalize((jacobian.mT @ gradient[..., None])[..., 0], dim=-1, eps=1e-8)
        return rgb * shading(normal, self.light)[:, None]

    def prior(self) -> Tensor:
        """Codes and light stay small."""
        return 1e-3 * (self.code.square().mean() + self.light.square().sum())


class NetworkField(_Lit):
    """Coordinate networks of the paper: 8x256 softplus distance network that starts as a sphere, 4x256 colours.

    The rest space's ball (center, radius) becomes the unit ball; distances and their eikonal equation stay metric.
    """

    def __init__(
        self,
        frames: int,
        center,
        radius: float,
        size: NetworkSize = NetworkSize(),
        start: float = 0.6,  # noqa: B008
    ):
        super().__init__(frames)
        self.register_buffer("center", torch.as_tensor(np.asarray(center), dtype=torch.float32))
        self.radius, self.size = float(radius), size
        skip = size.depth // 2 if size.width >= 64 else None  # a narrow layer has no room for the input again
        encoding = Fourier(FourierConfig(BANDS, identity=False))
        self.shape = SdfMlp(BANDS, size.width, size.depth, skip, size.feature, start, encoding=encoding)
        self.color = ColorMlp(size.feature, size.width, size.color_depth, code=CODE)

    def set_alpha(self, alpha: float) -> None:
        """Open the Fourier bands up to alpha (BARF); `BANDS` opens all."""
        self.shape.encoding.set_alpha(alpha)

    def forward(self, x: Tensor, frame: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        u = (x - self.center) / self.radius
        sdf, feature, gradient = self.shape.with_gradient(u)
        rgb = self.color(u, gradient, feature, code=self.code[frame])
        return self.radius * sdf, gradient, self._shade(rgb, gradient, jacobian)

    def sdf(self, x: Tensor) -> Tensor:
        """(M,) metres."""
        return self.radius * self.shape.sdf((x - self.center) / self.radius)

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """sdf (M,) metres and its gradient (M,3), both trainable."""
        sdf, _, gradient = self.shape.with_gradient((x - self.center) / self.radius)
        return self.radius * sdf, gradient

    @torch.no_grad()
    def albedo(self, x: Tensor) -> Tensor:
        """(M,3) in [0,1], without the light, at the mean code."""
        u = (x - self.center) / self.radius
        _, feature, gradient = self.shape.with_gradient(u)
        return self.color(u, gradient, feature, code=self.code.mean(0).expand(len(x), -1))

    def box(self) -> tuple[Tensor, Tensor]:
        return self.center - self.radius, self.center + self.radius

    def step(self, *_) -> None:
        """Nothing that torch's optimiser does not do."""


class GridField(_Lit):
    """A dense grid of distances and raw colours with a small colour head (`fast`).

    The grid keeps its own Adam, eikonal and smoothness (`SdfGrid.update`, called by `step`); the head learns with the
    rest. Far outside the cube the distance to it is added.
    """

    def __init__(self, frames: int, grid: SdfGrid, light: Tensor | None = None, hidden: int = 16):
        super().__init__(frames, light)
        self.grid = grid
        self.head = nn.Sequential(nn.Linear(3 + CODE, hidden), nn.ReLU(), nn.Linear(hidden, 3))
        nn.init.zeros_(self.head[-1].weight)
        nn.init.zeros_(self.head[-1].bias)

    def _apply(self, fn, recurse=True):
        out = super()._apply(fn, recurse)
        if self.grid.data.device != self.light.device:
            self.grid = SdfGrid(self.grid.data.to(self.light.device), self.grid.lo.to(self.light.device), self.grid.h)
        return out

    def set_alpha(self, alpha: float) -> None:
        """Grids go coarse to fine by their resolution."""

    def forward(self, x: Tensor, frame: Tensor, jacobian: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        value, gradient = self.grid.sample(x)
        raw = value[:, 1:]
        rgb = torch.sigmoid(raw + self.head(torch.cat([raw, self.code[frame]], -1)))
        return value[:, 0], gradient, self._shade(rgb, gradient.detach(), jacobian)

    def sdf(self, x: Tensor) -> Tensor:
        """(M,) metres."""
        inside = torch.minimum(torch.maximum(x, self.grid.lo), self.grid.hi)
        return self.grid.sample(inside)[0][:, 0] + (x - inside).norm(dim=-1)

    def gradient(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """sdf (M,) metres and its gradient (M,3), both trainable."""
        value, gradient = self.grid.sample(x)
        return value[:, 0], gradient

    @torch.no_grad()
    def albedo(self, x: Tensor) -> Tensor:
        """(M,3) in [0,1], without the light, at the mean code."""
        raw = self.grid.sample(x)[0][:, 1:]
        return torch.sigmoid(raw + self.head(torch.cat([raw, self.code.mean(0).expand(len(x), -1)], -1)))

    def box(self) -> tuple[Tensor, Tensor]:
        return self.grid.lo, self.grid.hi

    @property
    def radius(self) -> float:
        return 0.5 * self.grid.h * (self.grid.R - 1)

    def step(self, eikonal: float, smooth: float, rate: float, color_rate: float) -> None:
        """One step of the grid on what backward has gathered; rate: of the distance, in voxels."""
        self.grid.update(eikonal, smooth, 8 * self.grid.h, rate * self.grid.h, color_rate)


Field = NetworkField | GridField


def field_mesh(field: Field, resolution: int = 96) -> tuple[Mesh, Report]:
    """Watertight mesh of the field's zero set with its albedo, rest space, metres (sparse marching cubes).

    Raises `StageFailed` when the field has one sign in all of its box.
    """
    device = field.light.device
    if isinstance(field, GridField):  # its values are there already
        grid = field.grid
        paint = lambda x: field.albedo(torch.as_tensor(x, dtype=torch.float32, device=device)).cpu().numpy()  # noqa: E731
        return extract_grid(grid.data[..., 0].cpu(), grid.lo.cpu().numpy(), grid.h, color=paint)
    lo, hi = (a.detach().cpu().numpy() for a in field.box())
    return extract_surface(field.sdf, lo, hi, resolution, color=field.albedo, lipschitz=2.5, device=device)


def field_tensors(field: Field) -> dict[str, Tensor]:
    """Everything of the field, to be kept as safetensors; `load_field` reads it."""
    out = {k: v.detach().cpu().contiguous() for k, v in field.state_dict().items()}
    if isinstance(field, GridField):
        out |= {"grid.data": field.grid.data.cpu(), "grid.lo": field.grid.lo.cpu()}
        out["grid.h"] = torch.tensor(field.grid.h, dtype=torch.float64)
    else:
        s = field.size
        out["size"] = torch.tensor([s.width, s.depth, s.color_depth, s.feature])
        out["radius"] = torch.tensor(field.radius, dtype=torch.float64)
    return out


def load_field(tensors: dict[str, Tensor]) -> Field:
    """The field of `field_tensors`. Raises ValueError when it is not one."""
    try:
        frames = len(tensors["code"])
        if "grid.data" in tensors:
            grid = SdfGrid(tensors["grid.data"], tensors["grid.lo"], float(tensors["grid.h"]))
            field: Field = GridField(frames, grid, hidden=len(tensors["head.0.bias"]))
        else:
            width, depth, color, feature = (int(k) for k in tensors["size"])
            if not (0 < width <= 4096 and 1 < depth <= 64 and 0 < color <= 64 and 0 <= feature <= 4096):
                raise ValueError("sizes out of range")
            size = NetworkSize(width, depth, color, feature)
            field = NetworkField(frames, tensors["center"], float(tensors["radius"]), size)
        field.load_state_dict({k: tensors[k] for k in field.state_dict()})
    except (KeyError, RuntimeError, TypeError, ValueError) as e:
        raise ValueError(f"these tensors are no field of HOLD: {e}") from e
    return field


class Background(nn.Module):
    """All that is outside a ball round the scene: NeRF++'s inverted sphere, with a code per frame."""

    def __init__(self, frames: int, center: Tensor, radius: float, samples: int = 32, code: int = CODE):
        super().__init__()
        self.register_buffer("center", torch.as_tensor(center, dtype=torch.float32))
        self.radius, self.samples = float(radius), samples
        self.code = nn.Parameter(torch.zeros(frames, code))
        self.nerf = Nerf(d_in=4, bands=10, code=code)

    def forward(self, rays: Rays) -> Tensor:
        """(N,3) colours behind everything."""
        field = lambda p: self.nerf(p.x, p.d, self.code[p.frame])  # noqa: E731
        at = Rays(rays.o - self.center, rays.d, rays.frame)
        return inverted_sphere(field, self.radius, self.samples)(at)
