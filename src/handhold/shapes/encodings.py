"""Encodings of position for neural fields: Fourier features, multiresolution grids (dense, hashed) and triplanes.

Every encoding is a module with `output_dim` and `forward(x, jacobian=False)`: x (...,3) gives features (...,D), with
`jacobian` also d features / d x (...,D,3). The Jacobian is analytic and differentiable, so normals and eikonal losses
need no second pass of autograd. `set_alpha` opens the bands or levels one after the other, coarse to fine.

Positions are in the frame of the field, in the units of its box; the grids and the triplane clamp them to the box.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels import encode as kernel
from ..kernels.encode_torch import MAX_LEVELS, GridLevels

MAX_BANDS = 24


@dataclass(frozen=True)
class FourierConfig:
    """Positional encoding (Mildenhall et al., ECCV 2020, eq. 4), annealed as BARF (Lin et al., ICCV 2021, eq. 14)."""

    bands: int = 6
    """Number of frequencies 2^0 ... 2^(bands-1)."""
    pi: bool = False
    """Multiply the frequencies by pi, as NeRF's paper does and most code does not."""
    identity: bool = True
    """Pass the position through as well."""

    def __post_init__(self) -> None:
        if not 0 <= self.bands <= MAX_BANDS:
            raise ValueError(f"bands must be 0 to {MAX_BANDS}, not {self.bands}")


@dataclass(frozen=True)
class HashGridConfig:
    """Multiresolution hash grid (Mueller et al., SIGGRAPH 2022, section 3)."""

    levels: int = 8
    features: int = 2
    """Per level: 1, 2, 4 or 8."""
    log2_table: int = 15
    """A level has at most 2^log2_table rows; levels that fit are dense."""
    base: int = 16
    """Cells per axis of the coarsest level."""
    scale: float = 1.5
    """Ratio of one level's resolution to the one before."""
    smoothstep: bool = False
    """Interpolate by 3f^2 - 2f^3: continuous gradients, zero at the corners."""

    def __post_init__(self) -> None:
        if not 1 <= self.levels <= MAX_LEVELS or self.base < 1 or not 1 <= self.scale <= 4:
            raise ValueError(f"a hash grid has 1 to {MAX_LEVELS} levels, base >= 1 and a scale from 1 to 4")
        if not 1 <= self.log2_table <= 24:
            raise ValueError(f"log2_table must be 1 to 24, not {self.log2_table}")

    @property
    def grid(self) -> GridLevels:
        cells = [self.base * self.scale**level for level in range(self.levels)]
        if cells[-1] > 1 << 20:
            raise ValueError(
                f"the finest level has {cells[-1]:.3g} cells per axis, more than 2^20; lower scale or levels"
            )
        resolution = tuple(math.floor(c * (1 + 1e-12)) for c in cells)  # eq. 2
        bits = tuple(0 if (r + 1) ** 3 <= 1 << self.log2_table else self.log2_table for r in resolution)
        return GridLevels(resolution, bits, self.smoothstep)


@dataclass(frozen=True)
class DenseGridConfig:
    """Dense grids of several resolutions, concatenated or summed."""

    resolutions: tuple[int, ...] = (16, 32, 64)
    """Cells per axis, coarse to fine; a level has (cells + 1)^3 corners."""
    features: int = 2
    """Per level: 1, 2, 4 or 8."""
    sum: bool = False
    """Add the levels up, each refining the ones before, instead of concatenating them."""
    smoothstep: bool = False
    """As in `HashGridConfig`."""

    @property
    def grid(self) -> GridLevels:
        return GridLevels(tuple(self.resolutions), (0,) * len(self.resolutions), self.smoothstep, self.sum)


@dataclass(frozen=True)
class TriplaneConfig:
    """Three axis-aligned feature planes (Chan et al., CVPR 2022, section 3.1)."""

    resolution: int = 64
    """Texels per axis."""
    features: int = 8
    """Per plane."""
    sum: bool = False
    """Add the planes' features up (EG3D) instead of concatenating them."""
    align_corners: bool = True
    """The box's faces go through the centres of the outer texels; if not, through their outer edges."""


def barf_weights(alpha: float, bands: int) -> Tensor:
    """(bands,) float64: (1 - cos(pi clip(alpha - k, 0, 1))) / 2 for band k (Lin et al., ICCV 2021, eq. 14)."""
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, not {alpha}")
    t = (alpha - torch.arange(bands, dtype=torch.float64)).clamp(0, 1)
    return (1 - torch.cos(torch.pi * t)) / 2


class _Encoding(nn.Module):
    """What the encodings share: level weights, the box, and inputs of any leading shape."""

    weights: Tensor
    output_dim: int

    def __init__(self, levels: int, lo, hi):
        super().__init__()
        self.register_buffer("weights", torch.ones(levels))
        self.register_buffer("lo", torch.as_tensor(lo, dtype=torch.float32).clone())
        self.register_buffer("hi", torch.as_tensor(hi, dtype=torch.float32).clone())
        if self.lo.shape != (3,) or self.hi.shape != (3,) or not bool((self.hi > self.lo).all()):
            raise ValueError(f"the box needs 3 numbers lo < hi, not {lo} and {hi}")

    @torch.no_grad()
    def set_weights(self, weights) -> None:
        """(levels,) finite factors of the levels or bands; 0 switches one off."""
        weights = torch.as_tensor(weights, dtype=self.weights.dtype)
        if weights.shape != self.weights.shape or not bool(torch.isfinite(weights).all()):
            raise ValueError(f"this encoding takes {len(self.weights)} finite weights, not {weights.tolist()}")
        self.weights.copy_(weights)

    def set_alpha(self, alpha: float) -> None:
        """Open the bands or levels one after the other as alpha goes from 0 (none) to their number (all)."""
        self.set_weights(barf_weights(alpha, len(self.weights)))

    def forward(self, x: Tensor, jacobian: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """x (...,3) -> features (...,D); with `jacobian` also d features / d x (...,D,3)."""
        if x.ndim < 1 or x.shape[-1] != 3:
            raise ValueError(f"positions have shape (...,3), not {tuple(x.shape)}")
        if x.dtype != self.lo.dtype or x.device != self.lo.device:
            raise TypeError(f"positions are {x.dtype} on {x.device}, the encoding {self.lo.dtype} on {self.lo.device}")
        value, jac = self._encode(x.reshape(-1, 3), jacobian)
        value = value.reshape(*x.shape[:-1], self.output_dim)
        return (value, jac.reshape(*x.shape[:-1], self.output_dim, 3)) if jacobian else value

    def _encode(self, x: Tensor, jacobian: bool) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError


class Fourier(_Encoding):
    """x, then per band sin over the axes, then cos over the axes. D = 3 (identity + 2 bands).

    The box is mapped to [-1,1]; the default box leaves x as it is. Nothing is clamped. At alpha = 0 only x passes.
    """

    def __init__(self, config: FourierConfig = FourierConfig(), lo=(-1, -1, -1), hi=(1, 1, 1), backend=None):  # noqa: B008
        super().__init__(config.bands, lo, hi)
        self.config, self.backend = config, backend
        self.output_dim = 3 * (config.identity + 2 * config.bands)

    def _encode(self, x, jacobian):
        c = self.config
        half = (self.hi - self.lo) / 2
        u = (x - (self.lo + half)) / half
        value, jac = kernel.fourier(u, self.weights, c.pi, c.identity, jacobian, self.backend)
        return value, None if jac is None else jac / half


class Grid(_Encoding):
    """Multiresolution grid, hashed or dense, on the box. D = features x levels, or features if the levels are summed.

    `table` (rows, features) starts uniform in +-1e-4, as the paper's section 4 has it.
    """

    def __init__(self, config: HashGridConfig | DenseGridConfig, lo, hi, backend=None, generator=None):
        super().__init__(len(config.grid.resolution), lo, hi)
        self.config, self.grid, self.backend = config, config.grid, backend
        if config.features not in kernel.FEATURES:
            raise ValueError(f"features must be one of {kernel.FEATURES}, not {config.features}")
        self.output_dim = self.grid.output_dim(config.features)
        start = torch.rand(self.grid.rows, config.features, generator=generator)
        self.table = nn.Parameter((2 * start - 1) * 1e-4)

    def level(self, index: int) -> Tensor:
        """View of one level's rows; a dense level as (N+1,N+1,N+1,F), x slowest."""
        g = self.grid
        rows = self.table[g.offsets[index] : g.offsets[index] + g.sizes[index]]
        return rows if g.hash_bits[index] else rows.view(*(g.resolution[index] + 1,) * 3, -1)

    def _encode(self, x, jacobian):
        return kernel.encode(self.table, x, self.grid, self.lo, self.hi, self.weights, jacobian, self.backend)


class Triplane(_Encoding):
    """Three feature planes on the box, over (x,y), (x,z) and (y,z). D = 3 features, or features if summed.

    `planes` (3,C,R,R) is kept in channels_last memory format and starts normal with deviation 0.1.
    """

    def __init__(self, config: TriplaneConfig, lo, hi, backend=None, generator=None):
        super().__init__(3, lo, hi)
        self.config, self.backend = config, backend
        self.output_dim = config.features * (1 if config.sum else 3)
        kernel.check_planes((3, config.features, config.resolution, config.resolution))
        start = 0.1 * torch.randn(3, config.features, config.resolution, config.resolution, generator=generator)
        self.planes = nn.Parameter(start.contiguous(memory_format=torch.channels_last))

    def set_alpha(self, alpha: float) -> None:
        raise TypeError("a triplane has one resolution: there is no coarse to fine")

    def set_weights(self, weights) -> None:
        raise TypeError("a triplane has one resolution: there are no levels to weight")

    def _encode(self, x, jacobian):
        c = self.config
        return kernel.triplane(self.planes, x, self.lo, self.hi, c.sum, c.align_corners, jacobian, self.backend)


def make_encoding(config, lo, hi, backend: str | None = None, generator: torch.Generator | None = None) -> _Encoding:
    """The encoding a config describes, on the box lo, hi (3 numbers each)."""
    if isinstance(config, FourierConfig):
        return Fourier(config, lo, hi, backend)
    if isinstance(config, HashGridConfig | DenseGridConfig):
        return Grid(config, lo, hi, backend, generator)
    if isinstance(config, TriplaneConfig):
        return Triplane(config, lo, hi, backend, generator)
    raise TypeError(f"{type(config).__name__} is no encoding; use Fourier-, HashGrid-, DenseGrid- or TriplaneConfig")
