"""What surfaces are made of: materials drawn at random, and their colour, relief and gloss at given points.

Solid textures live in a surface's own coordinates (metres): they read a periodic volume of fractal noise, so that one
look-up gives many octaves. Printed ones read drawn panels (`prints.py`), laid on by the axis the surface faces or
wrapped around one. `evaluate` works on a flat list of visible points and touches each kind's points only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import torch
from torch import Tensor

from . import prints, skin

KINDS = ("skin", "plain", "print", "noise", "marble", "wood", "weave", "knit", "checker", "stripes", "metal")
SKIN, PLAIN, PRINT, NOISE, MARBLE, WOOD, WEAVE, KNIT, CHECKER, STRIPES, METAL = range(len(KINDS))
FAMILIES = ("skin", "object", "sleeve", "watch", "glove")
_VOLUME = 48


@dataclass(frozen=True, eq=False)
class Textures:
    """What all pictures share on one device; see `make_textures`."""

    volume: Tensor  # (1,4,n+1,n+1,n+1) periodic fractal noise, unit deviation, four independent channels
    panels: tuple[Tensor, ...]  # (P * PANELS * s * s, 3) linear, sizes s, s/2, s/4, s/8
    size: int

    def to(self, device: str | torch.device) -> Textures:
        return Textures(self.volume.to(device), tuple(p.to(device) for p in self.panels), self.size)

    @property
    def n_products(self) -> int:
        return len(self.panels[0]) // (prints.PANELS * self.size**2)


@lru_cache(maxsize=4)
def make_textures(n_products: int = 64, size: int = 192, seed: int = 0, device: str = "cpu") -> Textures:
    """Noise and printed panels, drawn from a seed (a few seconds; kept for the next call)."""
    if str(device) != "cpu":
        return make_textures(n_products, size, seed).to(device)
    g = torch.Generator().manual_seed(seed)
    x = linear_from_srgb(torch.from_numpy(prints.product_panels(n_products, size, seed)).float() / 255)
    levels = [x.permute(0, 3, 1, 2)]
    for _ in range(3):
        levels.append(torch.nn.functional.avg_pool2d(levels[-1], 2))
    panels = tuple(v.permute(0, 2, 3, 1).reshape(-1, 3).contiguous() for v in levels)
    return Textures(_noise_volume(g), panels, size)


def _noise_volume(g: torch.Generator) -> Tensor:
    """Fractal noise by its spectrum: power falls with the 3.2th power of frequency, longest wave half the period."""
    n = _VOLUME
    f = torch.fft.fftfreq(n) * n
    r = (f[:, None, None] ** 2 + f[None, :, None] ** 2 + f[None, None] ** 2).sqrt()
    amplitude = torch.where((r >= 2) & (r < n / 2), r.clamp_min(1) ** -1.6, 0.0)
    v = torch.fft.ifftn(torch.fft.fftn(torch.randn(4, n, n, n, generator=g), dim=(1, 2, 3)) * amplitude, dim=(1, 2, 3))
    v = v.real / v.real.std()
    v = torch.cat([v, v[:, :1]], 1)
    v = torch.cat([v, v[:, :, :1]], 2)
    return torch.cat([v, v[..., :1]], 3)[None].contiguous()


def noise(volume: Tensor, points: Tensor) -> Tensor:
    """(N,4) fractal noise at points (N,3), which repeats with period 1; waves from 1/2 to 2/48 of it."""
    at = (points - points.floor()) * 2 - 1
    return torch.nn.functional.grid_sample(volume, at[None, None, None], align_corners=True)[0, :, 0, 0].T


def linear_from_srgb(x: Tensor) -> Tensor:
    """sRGB in [0,1] -> linear, by the power 2.2 that is within 0.01 of the standard's curve."""
    return x.clamp_min(0).pow(2.2)


@dataclass(frozen=True, eq=False)
class Materials:
    """Any number of materials, leading shape (*n); `Materials.table` joins lists to a table (B,M) of pictures."""

    kind: Tensor  # (*n) int64 of KINDS
    colors: Tensor  # (*n,4,3) linear
    scale: Tensor  # (*n) metres: period of the pattern
    offset: Tensor  # (*n,3) where in the noise it begins, periods
    rough: Tensor  # (*n) 0 mirror to 1 matt
    f0: Tensor  # (*n) reflectance at normal incidence, 0.04 of most things
    metal: Tensor  # (*n) 1: no diffuse part, reflections have the colour
    bump: Tensor  # (*n) metres of relief
    tex: Tensor  # (*n) int64 product of the panels
    mapping: Tensor  # (*n) int64: 0-2 wrapped about axis x, y, z; 3 by the axis it faces, over the body; 4 tiled
    mix: Tensor  # (*n,3,3) colours of panels are multiplied by it
    extra: Tensor  # (*n,8) skin: see `skin.EXTRA`

    @property
    def shape(self) -> torch.Size:
        return self.kind.shape

    def to(self, device: str | torch.device) -> Materials:
        return replace(self, **{k.name: getattr(self, k.name).to(device) for k in fields(self)})

    def rows(self, index: Tensor | slice | tuple) -> Materials:
        return replace(self, **{k.name: getattr(self, k.name)[index] for k in fields(self)})

    def where(self, choose: Tensor, other: Materials) -> Materials:
        """These where `choose` (*n) bool, else the other's."""
        out = {}
        for k in fields(self):
            a = getattr(self, k.name)
            c = choose.reshape(*choose.shape, *(1,) * (a.ndim - choose.ndim))
            out[k.name] = torch.where(c, a, getattr(other, k.name))
        return replace(self, **out)

    @staticmethod
    def table(columns: list[Materials]) -> Materials:
        """Columns, each (B), to a table (B,M) that `Surfaces.material` indexes."""
        return Materials(**{k.name: torch.stack([getattr(c, k.name) for c in columns], 1) for k in fields(Materials)})


def sample_materials(
    n: int, family: str, generator: torch.Generator, device: str | torch.device = "cpu", n_products: int = 64
) -> Materials:
    """n materials of a family of FAMILIES or a kind of KINDS, drawn on the CPU from `generator` (a CPU generator)."""
    g = generator

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return torch.rand(n, *shape, generator=g) * (high - low) + low

    def log_uniform(low: float, high: float) -> Tensor:
        return uniform(math.log(low), math.log(high)).exp()

    weights = {
        "skin": {SKIN: 1.0},
        "glove": {PLAIN: 0.6, KNIT: 0.4},
        "sleeve": {PLAIN: 0.25, WEAVE: 0.3, KNIT: 0.2, CHECKER: 0.1, STRIPES: 0.1, NOISE: 0.05},
        "watch": {METAL: 0.4, PLAIN: 0.5, WEAVE: 0.1},
        "object": {
            PLAIN: 0.27, PRINT: 0.4, NOISE: 0.06, MARBLE: 0.04, WOOD: 0.07, WEAVE: 0.03, CHECKER: 0.03, STRIPES: 0.05,
            METAL: 0.05,
        },
    }.get(family) or {KINDS.index(family): 1.0}  # fmt: skip
    kinds = torch.tensor(list(weights))
    kind = kinds[torch.multinomial(torch.tensor(list(weights.values())), n, replacement=True, generator=g)]
    colors = sample_colors(4 * n, g).reshape(n, 4, 3)
    near = torch.rand(n, generator=g) < 0.5  # the second colour is a shade of the first
    shade = (colors[:, 0] * uniform(0.3, 1.6, 1)).clamp(0, 0.95)
    colors[:, 1] = torch.where(near[:, None], shade, colors[:, 1])
    shiny = torch.rand(n, generator=g) < 0.45
    rough = torch.where(shiny, uniform(0.12, 0.4), uniform(0.4, 0.95))
    f0 = uniform(0.03, 0.06)
    bump = torch.where(torch.rand(n, generator=g) < 0.4, log_uniform(2e-5, 4e-4), torch.zeros(n))
    scale = log_uniform(0.006, 0.12)
    cloth = (kind == WEAVE) | (kind == KNIT)
    scale = torch.where(
        kind == WEAVE, log_uniform(0.0012, 0.006), torch.where(kind == KNIT, log_uniform(0.003, 0.01), scale)
    )
    if family in ("sleeve", "glove"):
        cloth = torch.ones_like(cloth)
        scale = torch.where(kind == CHECKER, log_uniform(0.01, 0.06), scale)
    rough = torch.where(cloth, uniform(0.75, 1.0), rough)
    f0 = torch.where(cloth, uniform(0.005, 0.02), f0)
    bump = torch.where(cloth, log_uniform(1e-4, 6e-4), bump)
    metal = (kind == METAL).float()
    grey = uniform(0.35, 0.9, 1) * (1 + 0.06 * torch.randn(n, 3, generator=g))
    tinted = torch.tensor([0.85, 0.6, 0.28]) * uniform(0.7, 1.1, 1)
    steel = torch.where(torch.rand(n, 1, generator=g) < 0.8, grey, tinted).clamp(0, 1)
    colors[:, 0] = torch.where(metal[:, None] > 0, steel, colors[:, 0])
    rough = torch.where(metal > 0, uniform(0.15, 0.55), rough)
    tex = torch.randint(n_products, (n,), generator=g)
    mapping = torch.tensor([0, 1, 2, 3, 3, 3, 3, 4])[torch.randint(8, (n,), generator=g)]
    order = torch.rand(n, 3, generator=g).argsort(1)
    order = torch.where(torch.rand(n, 1, generator=g) < 0.4, torch.arange(3), order)
    mix = torch.nn.functional.one_hot(order, 3).float() * uniform(0.45, 1.0, 1, 1)
    out = Materials(
        kind=kind, colors=colors, scale=scale, offset=uniform(0, 1, 3), rough=rough, f0=f0, metal=metal, bump=bump,
        tex=tex, mapping=mapping, mix=mix, extra=torch.zeros(n, 8),
    )  # fmt: skip
    if family == "skin" or family == "object" or family == KINDS[SKIN]:
        tone, polish, extra, gloss = skin.sample(n, g)
        if family == "object":  # some objects have the colour of skin
            alike = (torch.rand(n, generator=g) < 0.08) & (kind != METAL)
            colors[:, 0] = torch.where(alike[:, None], tone, colors[:, 0])
        else:
            colors[:, 0], colors[:, 1] = tone, polish
            out = replace(out, extra=extra, rough=gloss, f0=torch.full((n,), 0.035), metal=torch.zeros(n))
    return out.to(device)


def sample_colors(n: int, generator: torch.Generator) -> Tensor:
    """(n,3) linear colours: a fifth greys, white and black among them, the rest of any hue."""
    g = generator
    hue, s, v = torch.rand(n, generator=g), torch.rand(n, generator=g), torch.rand(n, generator=g)
    grey = torch.rand(n, generator=g)
    s = torch.where(grey < 0.25, s * 0.1, 1 - (1 - s) ** 1.3)
    v = torch.where(grey < 0.06, 0.92 + 0.08 * v, torch.where(grey > 0.94, 0.02 + 0.12 * v, 0.12 + 0.88 * v.sqrt()))
    k = (torch.tensor([5.0, 3.0, 1.0]) + hue[:, None] * 6) % 6
    rgb = v[:, None] * (1 - s[:, None] * torch.minimum(k, 4 - k).clamp(0, 1))
    return linear_from_srgb(rgb) * 0.92 + 0.008


@dataclass(frozen=True, eq=False)
class Points:
    """N visible surface points, all pictures together."""

    row: Tensor  # (N,) int64 row of the flattened material table
    canon: Tensor  # (N,3) canonical coordinates, metres
    axis: Tensor  # (N,) int64 canonical axis that the surface faces most: 0, 1, 2
    box: Tensor  # (B*M,2,3) least and greatest canonical coordinates of each material
    attrs: Tensor | None  # (N,A) of `skin.ATTRIBUTES`, or None
    footprint: Tensor  # (N,) metres that a pixel spans there


@dataclass(frozen=True, eq=False)
class Shaded:
    """Properties of N points."""

    albedo: Tensor  # (N,3) linear
    height: Tensor  # (N,) metres of relief
    rough: Tensor  # (N,)
    f0: Tensor  # (N,)
    metal: Tensor  # (N,)
    skin: Tensor  # (N,) float: 1 where light goes under the surface


def evaluate(materials: Materials, textures: Textures, points: Points) -> Shaded:
    """Colours, relief and gloss at points, for materials (B,M). One host synchronisation per kind."""
    flat = materials.rows(slice(None))
    flat = replace(flat, **{k.name: getattr(flat, k.name).flatten(0, 1) for k in fields(flat)})
    row = points.row
    n = len(row)
    kind = flat.kind[row]
    albedo = flat.colors[:, 0][row]
    height = albedo.new_zeros(n)
    rough, f0 = flat.rough[row], flat.f0[row]
    under = (kind == SKIN).to(albedo)
    q = points.canon / flat.scale[row, None] + flat.offset[row]
    for k in range(len(KINDS)):
        at = torch.nonzero(kind == k)[:, 0]
        if len(at) == 0:
            continue
        r = row[at]
        amplitude = flat.bump[r]
        if k == SKIN:
            attrs = None if points.attrs is None else points.attrs[at]
            a, h, g, f = skin.evaluate(
                flat.colors[r], flat.extra[r], flat.offset[r], flat.rough[r], points.canon[at], attrs,
                points.footprint[at], lambda p: noise(textures.volume, p),
            )  # fmt: skip
            albedo[at], height[at], rough[at], f0[at] = a, h, g, f
            continue
        if k == PRINT:
            albedo[at] = _printed(flat, textures, points, at, r)
            continue
        c0, c1 = flat.colors[r, 0], flat.colors[r, 1]
        p = q[at]
        waves = noise(textures.volume, p * 0.25)
        fine = (1 - points.footprint[at] * 2.5 / flat.scale[r]).clamp(0, 1)  # finer than pixels: fades
        t, h = _pattern(k, p, waves, fine)
        tone = (c0 + (c1 - c0) * t[:, None]) if t is not None else c0
        albedo[at] = (tone * (1 + 0.05 * waves[:, 1:2])).clamp(0.002, 0.98)
        if k in (WEAVE, KNIT, STRIPES, CHECKER):  # folds, long along the sleeve
            folds = noise(textures.volume, points.canon[at] * points.canon.new_tensor([6.0, 9.0, 9.0]) + flat.offset[r])
            h = amplitude * h * fine + folds[:, 0] * torch.where(f0[at] < 0.025, 2.5e-3, 0.0)
            height[at] = h
        else:
            height[at] = amplitude * h
            rough[at] = (rough[at] + 0.05 * waves[:, 2]).clamp(0.08, 1)
    return Shaded(albedo, height, rough, f0, flat.metal[row], under)


def _pattern(kind: int, p: Tensor, waves: Tensor, fine: Tensor) -> tuple[Tensor | None, Tensor]:
    """Share of the second colour (or None) and relief in [-1,1] at p (N,3) periods."""
    u = waves[:, 0]
    if kind in (PLAIN, METAL):
        return None, u
    if kind == NOISE:
        return torch.sigmoid(3 * u), u
    if kind == MARBLE:
        return (1 - torch.sin(2 * p.sum(1) + 4 * u).abs()) ** 3, u
    if kind == WOOD:
        r = (p[:, :2] * p.new_tensor([1.0, 0.8])).square().sum(1).sqrt() * 2 + 0.8 * u
        t = r - r.floor()
        return t * t * (0.6 + 0.4 * torch.sin(40 * p[:, 0])), t - 0.5
    s = torch.sin(2 * math.pi * p)
    if kind == WEAVE:
        over = torch.sigmoid(8 * s[:, 0] * s[:, 1] * s[:, 2].abs().clamp_min(0.3))
        return 0.5 + (over - 0.5) * fine, s[:, 0] * s[:, 1]
    if kind == KNIT:
        rows = 2 * math.pi * (p[:, 0] + 0.3 * s[:, 1].abs())
        h = torch.sin(rows) * 0.6 + s[:, 1].abs() - 0.5
        return (0.25 - 0.25 * h.clamp(-1, 1)) * fine, h
    if kind == CHECKER:
        d = torch.tanh(6 * s)
        return 0.5 + 0.5 * d[:, 0] * d[:, 1] * d[:, 2], u * 0.2
    return torch.sigmoid(12 * (s[:, 0] + 0.3 * torch.sin(10.3 * p[:, 0]))), u * 0.2  # stripes


def _printed(flat: Materials, textures: Textures, points: Points, at: Tensor, r: Tensor) -> Tensor:
    """(n,3) colours of drawn panels, bilinear, from the level whose texels are about as large as pixels."""
    c, box = points.canon[at], points.box[r]
    axis, mapping = points.axis[at], flat.mapping[r]
    size = (box[:, 1] - box[:, 0]).clamp_min(1e-4)
    rel = (c - box[:, 0]) / size
    wrapped = (mapping < 3) & (axis != mapping)
    about = torch.where(mapping < 3, mapping, axis)
    a, b = (about + 1) % 3, (about + 2) % 3

    def pick(x: Tensor, i: Tensor) -> Tensor:
        return x.gather(1, i[:, None])[:, 0]

    ra, rb = pick(rel, a), pick(rel, b)
    angle = torch.atan2((rb - 0.5) * pick(size, b), (ra - 0.5) * pick(size, a)) / (2 * math.pi)
    tiled = mapping == 4
    period = flat.scale[r].clamp_min(0.03)
    u = torch.where(wrapped, angle * 2 + flat.offset[r, 0], torch.where(tiled, pick(c, a) / period, ra))
    v = torch.where(wrapped, 1 - pick(rel, about), torch.where(tiled, pick(c, b) / period, rb))
    flip = flat.offset[r, 1] > 0.5
    u, v = torch.where(flip & ~wrapped, 1 - v, u), torch.where(flip & ~wrapped, u, v)
    u, v = u - u.floor(), v.clamp(0, 1) * (~tiled) + (v - v.floor()) * tiled
    span = torch.where(tiled, period, torch.where(wrapped, pick(size, about), pick(size, a)))
    texels = (textures.size * points.footprint[at] / span).clamp_min(1e-6)  # of the finest level, per pixel
    level = (texels.log2() + 0.3).round().clamp(0, len(textures.panels) - 1).long()
    panel = flat.tex[r] % textures.n_products * prints.PANELS + torch.where(wrapped, 0, axis)
    out = c.new_zeros(len(at), 3)
    for k, data in enumerate(textures.panels):
        some = torch.nonzero(level == k)[:, 0]
        if len(some) == 0:
            continue
        s = textures.size >> k
        x, y = (u[some] * s - 0.5).clamp(0, s - 1.001), (v[some] * s - 0.5).clamp(0, s - 1.001)
        x0, y0 = x.long(), y.long()
        fx, fy = (x - x0)[:, None], (y - y0)[:, None]
        i = (panel[some] * s + y0) * s + x0
        top = data[i] * (1 - fx) + data[i + 1] * fx
        low = data[i + s] * (1 - fx) + data[i + s + 1] * fx
        out[some] = top * (1 - fy) + low * fy
    return (out[:, None] @ flat.mix[r])[:, 0].clamp(0.003, 0.95)
