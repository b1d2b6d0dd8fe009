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
from .filters import pick

KINDS = ("skin", "plain", "print", "noise", "marble", "wood", "weave", "knit", "checker", "stripes", "metal")
SKIN, PLAIN, PRINT, NOISE, MARBLE, WOOD, WEAVE, KNIT, CHECKER, STRIPES, METAL = range(len(KINDS))
FAMILIES = ("skin", "object", "sleeve", "watch", "glove")
LEVELS = 4  # sizes of a panel, each half of the one before
_VOLUME = 64  # a power of two


@dataclass(frozen=True, eq=False)
class Textures:
    """What all pictures share on one device; see `make_textures`."""

    volume: Tensor  # (1,4,n+1,n+1,n+1) periodic fractal noise, unit deviation, four independent channels
    table: Tensor  # (4,n^3) the same
    shake: Tensor  # (3,S) uniform numbers in [0,1)
    panels: Tensor  # (R,3) uint8 sRGB: all pixels of all panels, then of all at half the size and so on
    starts: Tensor  # (LEVELS,) int64 where each size begins
    n_products: int
    size: int

    def to(self, device: str | torch.device) -> Textures:
        move = [x.to(device) for x in (self.volume, self.table, self.shake)]
        return Textures(*move, self.panels.to(device), self.starts.to(device), self.n_products, self.size)


@lru_cache(maxsize=12)
def make_textures(n_products: int = 64, size: int = 192, seed: int = 0, device: str = "cpu") -> Textures:
    """Noise and printed panels, drawn from a seed (a few seconds; kept for the next call)."""
    if str(device) != "cpu":
        return make_textures(n_products, size, seed).to(device)
    g = torch.Generator().manual_seed(seed)
    x = torch.from_numpy(prints.product_panels(n_products, size, seed)).permute(0, 3, 1, 2)
    levels = [x]
    for _ in range(LEVELS - 1):
        levels.append(torch.nn.functional.avg_pool2d(levels[-1].float(), 2).round().to(torch.uint8))
    levels = [v.permute(0, 2, 3, 1).reshape(-1, 3) for v in levels]
    starts = torch.tensor([0, *(len(v) for v in levels)]).cumsum(0)[:-1]
    volume = _noise_volume(g)
    table = volume[0, :, :-1, :-1, :-1].reshape(4, -1).contiguous()
    return Textures(volume, table, torch.rand(3, 1 << 16, generator=g), torch.cat(levels), starts, n_products, size)


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


def noise(textures: Textures, x: Tensor) -> Tensor:
    """(4,N) fractal noise at points (3,N), which repeats with period 1; waves from 1/2 to 2/64 of it.

    One table row per point: the points are first shaken by up to a cell, which on average is trilinear interpolation.
    """
    n = x.shape[1]
    shake = textures.shake[:, :n]
    if shake.shape[1] < n:
        shake = textures.shake.repeat(1, -(-n // textures.shake.shape[1]))[:, :n]
    i = (x * _VOLUME + shake).floor().int() & (_VOLUME - 1)
    return pick(textures.table, (i[0] * _VOLUME + i[1]) * _VOLUME + i[2], 1)


def smooth_noise(textures: Textures, x: Tensor) -> Tensor:
    """The same with trilinear interpolation, for patterns larger than pixels."""
    at = ((x - x.floor()) * 2 - 1).T
    return torch.nn.functional.grid_sample(textures.volume, at[None, None, None], align_corners=True)[0, :, 0, 0]


def linear_from_srgb(x: Tensor) -> Tensor:
    """sRGB in [0,1] -> linear, a cubic within 0.002 of the standard's curve."""
    return x * (x * (x * 0.305306011 + 0.682171111) + 0.012522878)


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
    bump = torch.where(torch.rand(n, generator=g) < 0.4, log_uniform(0.001, 0.012), torch.zeros(n))
    scale = log_uniform(0.006, 0.12)
    bump = bump * scale
    cloth = (kind == WEAVE) | (kind == KNIT)
    scale = torch.where(
        kind == WEAVE, log_uniform(0.0012, 0.006), torch.where(kind == KNIT, log_uniform(0.003, 0.01), scale)
    )
    if family in ("sleeve", "glove"):
        cloth = torch.ones_like(cloth)
        scale = torch.where(kind == CHECKER, log_uniform(0.01, 0.06), scale)
    rough = torch.where(cloth, uniform(0.75, 1.0), rough)
    f0 = torch.where(cloth, uniform(0.005, 0.02), f0)
    bump = torch.where(cloth, scale.clamp(max=0.03) * log_uniform(0.008, 0.05), bump)
    metal = (kind == METAL).float()
    grey = uniform(0.35, 0.9, 1) * (1 + 0.06 * torch.randn(n, 3, generator=g))
    tinted = torch.tensor([0.85, 0.6, 0.28]) * uniform(0.7, 1.1, 1)
    steel = torch.where(torch.rand(n, 1, generator=g) < 0.8, grey, tinted).clamp(0, 1)
    colors[:, 0] = torch.where(metal[:, None] > 0, steel, colors[:, 0])
    rough = torch.where(metal > 0, uniform(0.15, 0.55), rough)
    bump = torch.where(metal > 0, 0.2 * bump, bump)
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
    corners: Tensor  # (N,3) int64 rows of `canon_of`: the corners of the point's face
    canon_of: Tensor  # (R,3) canonical coordinates of all vertices
    box: Tensor  # (B*M,2,3) least and greatest canonical coordinates of each material
    attrs: Tensor | None  # (N,A) of `skin.ATTRIBUTES`, or None
    footprint: Tensor  # (N,) metres that a pixel spans there


@dataclass(frozen=True, eq=False)
class Shaded:
    """Properties of N points."""

    albedo: Tensor  # (3,N) linear
    height: Tensor  # (N,) metres of relief
    rough: Tensor  # (N,)
    f0: Tensor  # (N,)
    metal: Tensor  # (N,)
    skin: Tensor  # (N,) float: 1 where light goes under the surface


def evaluate(materials: Materials, textures: Textures, points: Points) -> Shaded:
    """Colours, relief and gloss at points, for materials (B,M). One host synchronisation per kind."""
    flat = replace(materials, **{k.name: getattr(materials, k.name).flatten(0, 1) for k in fields(materials)})
    row = points.row
    n = len(row)
    kind = pick(flat.kind, row)
    albedo = flat.colors.new_empty(3, n)
    height = albedo.new_zeros(n)
    rough, f0 = pick(flat.rough, row), pick(flat.f0, row)
    for k in range(len(KINDS)):
        at = torch.nonzero(kind == k)[:, 0]
        if len(at) == 0:
            continue
        r = pick(row, at)
        if k == PRINT:
            albedo[:, at] = _printed(flat, textures, points, at, r)
            continue
        c, span = pick(points.canon, at).T.contiguous(), pick(points.footprint, at)
        offset = pick(flat.offset, r).T
        if k == SKIN:
            a, h, g, f = skin.evaluate(
                pick(flat.colors, r), pick(flat.extra, r).T.contiguous(), offset, rough[at], c,
                None if points.attrs is None else pick(points.attrs, at).T.contiguous(), span,
                lambda p: noise(textures, p),
            )  # fmt: skip
            albedo[:, at], height[at], rough[at], f0[at] = a, h, g, f
            continue
        scale, amplitude = pick(flat.scale, r), pick(flat.bump, r)
        p = c / scale + offset
        waves = (smooth_noise if k in (NOISE, MARBLE) else noise)(textures, p * 0.25)
        fine = (1 - span * 2.5 / scale).clamp(0, 1)  # finer than pixels: fades
        t, h = _pattern(k, p, waves, fine)
        first, second = pick(flat.colors, r)[:, :2].unbind(1)
        first = first.T
        tone = first if t is None else first + (second.T - first) * t
        albedo[:, at] = (tone * (1 + 0.05 * waves[1])).clamp(0.002, 0.98)
        if k in (WEAVE, KNIT, STRIPES, CHECKER):  # folds, long along the sleeve
            folds = smooth_noise(textures, c * c.new_tensor([[2.2], [4.0], [4.0]]) + offset)
            height[at] = amplitude * h * fine + folds[0] * torch.where(f0[at] < 0.025, 2.2e-3, 0.0)
        else:
            height[at] = amplitude * h * (1 - span / (2 * scale)).clamp(0, 1)
            rough[at] = (rough[at] + 0.05 * waves[2]).clamp(0.08, 1)
    return Shaded(albedo, height, rough, f0, pick(flat.metal, row), (kind == SKIN).to(albedo))


def _pattern(kind: int, p: Tensor, waves: Tensor, fine: Tensor) -> tuple[Tensor | None, Tensor]:
    """Share of the second colour (or None) and relief in [-1,1] at p (3,N) periods."""
    u = waves[0]
    if kind in (PLAIN, METAL):
        return None, u
    if kind == NOISE:
        return torch.sigmoid(3 * u), u
    if kind == MARBLE:
        return (1 - torch.sin(2 * p.sum(0) + 4 * u).abs()) ** 3, u
    if kind == WOOD:
        r = (p[0].square() + 0.64 * p[1].square()).sqrt() * 2 + 0.8 * u
        t = r - r.floor()
        return t * t * (0.6 + 0.4 * torch.sin(40 * p[0])), t - 0.5
    s = torch.sin(2 * math.pi * p)
    if kind == WEAVE:
        over = torch.sigmoid(8 * s[0] * s[1] * s[2].abs().clamp_min(0.3))
        return 0.5 + (over - 0.5) * fine, s[0] * s[1]
    if kind == KNIT:
        h = torch.sin(2 * math.pi * (p[0] + 0.3 * s[1].abs())) * 0.6 + s[1].abs() - 0.5
        return (0.25 - 0.25 * h.clamp(-1, 1)) * fine, h
    if kind == CHECKER:
        d = torch.tanh(6 * s)
        return 0.5 + 0.5 * d[0] * d[1] * d[2], u * 0.2
    return torch.sigmoid(12 * (s[0] + 0.3 * torch.sin(10.3 * p[0]))), u * 0.2  # stripes


def _printed(flat: Materials, textures: Textures, points: Points, at: Tensor, r: Tensor) -> Tensor:
    """(3,n) colours of drawn panels, bilinear, from the level whose texels are about as large as pixels."""
    c, box = pick(points.canon, at), pick(points.box, r)
    k = pick(points.canon_of, pick(points.corners, at).reshape(-1)).reshape(-1, 3, 3)
    axis = torch.linalg.cross(k[:, 1] - k[:, 0], k[:, 2] - k[:, 0]).abs().argmax(1)
    mapping, offset = pick(flat.mapping, r), pick(flat.offset, r)
    size = (box[:, 1] - box[:, 0]).clamp_min(1e-4)
    rel = (c - box[:, 0]) / size
    wrapped = (mapping < 3) & (axis != mapping)
    about = torch.where(mapping < 3, mapping, axis)
    a, b = (about + 1) % 3, (about + 2) % 3

    def along(x: Tensor, i: Tensor) -> Tensor:
        return x.gather(1, i[:, None])[:, 0]

    ra, rb = along(rel, a), along(rel, b)
    angle = torch.atan2((rb - 0.5) * along(size, b), (ra - 0.5) * along(size, a)) / (2 * math.pi)
    tiled = mapping == 4
    period = pick(flat.scale, r).clamp_min(0.03)
    u = torch.where(wrapped, angle * 2 + offset[:, 0], torch.where(tiled, along(c, a) / period, ra))
    v = torch.where(wrapped, 1 - along(rel, about), torch.where(tiled, along(c, b) / period, rb))
    flip = offset[:, 1] > 0.5
    u, v = torch.where(flip & ~wrapped, 1 - v, u), torch.where(flip & ~wrapped, u, v)
    u, v = u - u.floor(), v.clamp(0, 1) * (~tiled) + (v - v.floor()) * tiled
    span = torch.where(tiled, period, torch.where(wrapped, along(size, about), along(size, a)))
    texels = (textures.size * pick(points.footprint, at) / span).clamp_min(1e-6)  # of the finest level, per pixel
    level = (texels.log2() + 0.3).round().clamp(0, LEVELS - 1).long()
    first, s = textures.starts[level], textures.size >> level
    panel = pick(flat.tex, r) % textures.n_products * prints.PANELS + torch.where(wrapped, 0, axis)
    x, y = (u * s - 0.5).clamp_min(0).minimum(s - 1.001), (v * s - 0.5).clamp_min(0).minimum(s - 1.001)
    x0, y0 = x.long(), y.long()
    fx, fy = x - x0, y - y0
    i = first + (panel * s + y0) * s + x0
    data, out = textures.panels, 0.0
    for step, w in ((0, (1 - fx) * (1 - fy)), (1, fx * (1 - fy)), (s, (1 - fx) * fy), (s + 1, fx * fy)):
        out = out + pick(data, i + step).float() * w[:, None]
    out = linear_from_srgb(out.T / 255)
    mix = pick(flat.mix, r)
    return torch.stack([(out * mix[:, :, j].T).sum(0) for j in range(3)]).clamp(0.003, 0.95)
