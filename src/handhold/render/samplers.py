"""Where to look along a ray: bounds, and samplers that put samples where they matter.

t is the distance along a ray, in the scene's unit. Samples are the edges of intervals; no sampler gives a gradient to
t. What is ragged is padded with zero-length intervals that are not live.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..kernels.grid import SdfGrid
from .medium import laplace_density, transmittance, weights

TINY = 1e-12


class Rays(NamedTuple):
    """N rays, and what tells them apart."""

    o: Tensor  # (N,3) origins
    d: Tensor  # (N,3) directions of unit length
    frame: Tensor | None = None  # (N,) long: handed to bodies and fields as it is, for poses and codes by frame


class Samples(NamedTuple):
    """Edges of intervals along N rays."""

    t: Tensor  # (N,S) never decreasing, finite
    live: Tensor  # (N,S-1) bool: may the interval hold matter? False in gaps, in padding and on rays that miss

    @property
    def counts(self) -> Tensor:
        """(N,) live intervals of each ray."""
        return self.live.sum(-1)


class Bounds(NamedTuple):
    """Where rays are inside something convex: near = far on a ray that misses it."""

    near: Tensor  # (N,) >= 0
    far: Tensor  # (N,) >= near

    @property
    def hit(self) -> Tensor:
        return self.far > self.near


def check_rays(rays: Rays) -> None:
    """ValueError unless o and d are finite (N,3), d is unit and frame, if given, is (N,)."""
    o, d, frame = rays
    if o.ndim != 2 or o.shape[1] != 3 or o.shape != d.shape:
        raise ValueError(f"rays are origins (N,3) and directions (N,3), not {tuple(o.shape)} and {tuple(d.shape)}")
    if not bool(torch.isfinite(o).all() & torch.isfinite(d).all()):
        raise ValueError("rays hold NaN or infinity")
    if len(d) and bool(((d.detach() * d.detach()).sum(-1) - 1).abs().max() > 1e-3):
        raise ValueError("ray directions must have unit length, so that t is a distance; normalise them")
    if frame is not None and frame.shape != (len(o),):
        raise ValueError(f"frame tells the frame of each of {len(o)} rays; its shape is {tuple(frame.shape)}")


def camera_rays(K: Tensor, world_from_cam: Tensor, xy: Tensor, frame: Tensor | None = None) -> Rays:
    """Rays through pixels, in the world.

    K (3,3); world_from_cam (4,4) or (N,4,4), OpenCV axes; xy (N,2) pixel positions, centres at +0.5. Differentiable.
    The camera's z of a point at distance t is t / |K^-1 (x,y,1)|.
    """
    z = torch.ones_like(xy[:, :1])
    local = torch.cat([xy, z], -1) @ torch.linalg.inv(K).mT
    local = local / local.norm(dim=-1, keepdim=True)
    d = (world_from_cam[..., :3, :3] @ local[..., None])[..., 0]
    return Rays(world_from_cam[..., :3, 3].expand_as(d), d, frame)


def sphere_bounds(rays: Rays, radius: float, centre: Tensor | float = 0.0, near: float = 0.0) -> Bounds:
    """Part of each ray inside a sphere round `centre` ((3,) or (N,3)), at least `near` from the ray's origin."""
    p, d = (rays.o - centre).detach(), rays.d.detach()
    b = (p * d).sum(-1)
    # The squared distance of the line from the centre, not b^2 - p.p + r^2: that cancels for a far camera.
    square = radius**2 - (p - b[:, None] * d).square().sum(-1)
    half = square.clamp(min=0).sqrt()
    start, end = (-b - half).clamp(min=near), (-b + half).clamp(min=near)
    return Bounds(start, torch.where(square > 0, end, start))


def box_bounds(rays: Rays, lo: Tensor, hi: Tensor, near: float = 0.0) -> Bounds:
    """Part of each ray inside the axis-aligned box from lo (3,) to hi (3,), at least `near` from the ray's origin."""
    o, d = rays.o.detach(), rays.d.detach()
    # A direction of 0 becomes a tiny one: the slab test then needs no special case and meets no 0/0.
    safe = torch.where(d.abs() < TINY, torch.full_like(d, TINY), d)
    a, b = (lo - o) / safe, (hi - o) / safe
    start = torch.minimum(a, b).amax(-1).clamp(min=near)
    end = torch.maximum(a, b).amin(-1)
    hit = end > start
    start = torch.where(hit, start, torch.full_like(start, near))
    return Bounds(start, torch.where(hit, end, start))


def merge(samples: Sequence[Samples]) -> tuple[Tensor, Tensor]:
    """The common edges of several bodies: t (N,S) sorted, S the sum of theirs, and live (N,S-1,B).

    Every edge of every body is kept, so a common interval lies in one interval of each body and inherits its `live`.
    """
    t = torch.cat([s.t for s in samples], -1).sort(-1).values
    return t, torch.stack([s.live.gather(1, k) & inside for s in samples for k, inside in [locate(s, t)]], -1)


def locate(samples: Samples, t: Tensor) -> tuple[Tensor, Tensor]:
    """Which interval of `samples` holds each interval of the common edges t (N,S): index (N,S-1), and does any?"""
    mid = 0.5 * (t[:, 1:] + t[:, :-1])
    k = torch.searchsorted(samples.t.contiguous(), mid.contiguous(), right=True) - 1
    last = samples.live.shape[1] - 1
    return k.clamp(0, last), (t[:, 1:] > t[:, :-1]) & (k >= 0) & (k <= last)


@torch.no_grad()
def stratified(bounds: Bounds, n: int, jitter: bool = False, generator: torch.Generator | None = None) -> Samples:
    """n >= 2 edges from near to far: evenly spaced, or, with jitter, each inner one uniform in its own stratum."""
    if n < 2:
        raise ValueError(f"an interval has two edges: n is {n}")
    near, far = bounds.near.detach(), bounds.far.detach()
    u = torch.linspace(0, 1, n, dtype=near.dtype, device=near.device).expand(len(near), n)
    if jitter:
        r = torch.rand(len(near), n - 2, dtype=near.dtype, device=near.device, generator=generator)
        u = torch.cat([u[:, :1], u[:, 1:-1] + (r - 0.5) / (n - 1), u[:, -1:]], -1)
    t = torch.lerp(near[:, None], far[:, None], u)
    return Samples(t, (far > near)[:, None].expand(-1, n - 1))


@torch.no_grad()
def inverse_cdf(
    t: Tensor,
    mass: Tensor,
    n: int,
    jitter: bool = False,
    floor: float = 1e-5,
    generator: torch.Generator | None = None,
) -> Tensor:
    """n positions (N,n), sorted, with a constant density in each interval of t (N,S) that holds a mass (N,S-1).

    `floor` is the share of the mass that is spread by length, so that nothing is ruled out and a ray without weight is
    sampled evenly. Without jitter the positions are the centres of n equal shares of the mass.
    """
    t, w = t.detach(), mass.detach().clamp(min=0)
    length = t[:, 1:] - t[:, :-1]
    w = w / w.sum(-1, keepdim=True).clamp(min=TINY) + floor * length / length.sum(-1, keepdim=True).clamp(min=TINY)
    cdf = torch.nn.functional.pad(w.cumsum(-1), (1, 0))
    total = cdf[:, -1:]
    u = (torch.arange(n, dtype=t.dtype, device=t.device) + 0.5).expand(len(t), n)
    if jitter:
        u = u + torch.rand(len(t), n, dtype=t.dtype, device=t.device, generator=generator) - 0.5
    u = (u / n * total).contiguous()
    k = (torch.searchsorted(cdf.contiguous(), u, right=True) - 1).clamp(0, w.shape[1] - 1)
    share = (u - cdf.gather(1, k)) / w.gather(1, k).clamp(min=TINY)
    x = t.gather(1, k) + share.clamp(0, 1) * length.gather(1, k)
    return x.sort(-1).values  # rounding at a bin's edge may swap two


def importance(
    samples: Samples, mass: Tensor, n: int, jitter: bool = False, generator: torch.Generator | None = None
) -> Samples:
    """The same edges and n more where the mass (N,S-1), its weights, is; a dead interval gets none.

    NeRF's fine pass: Mildenhall et al., ECCV 2020, section 5.2.
    """
    more = inverse_cdf(samples.t, mass * samples.live, n, jitter, 0.0, generator)
    t, live = merge([samples, Samples(more, torch.zeros_like(more[:, 1:], dtype=torch.bool))])
    return Samples(t, live[..., 0])


# ------------------------------------------------------------------------------------- VolSDF's error-bounded sampler


class Bounded(NamedTuple):
    """A set of samples on which the opacity of a Laplace density is known to `eps` (see `refine`)."""

    t: Tensor  # (N,S), padded by repeating the last
    sdf: Tensor  # (N,S) at t
    beta: Tensor  # (N,) the least width, not below the wanted one, for which the bound holds
    bound: Tensor  # (N,) the bound at the wanted width; <= eps where the sampler converged
    rounds: Tensor  # (N,) refinements made
    counts: Tensor  # (N,) samples before the padding


def free_distance(sdf: Tensor, length: Tensor) -> Tensor:
    """Lower bound (N,S-1) of the distance to the surface on each interval (VolSDF, section 3.3, d*).

    sdf (N,S) at the edges, length (N,S-1). The surface is outside both balls of radius |sdf| around the edges; d* is
    the interval's distance from the outside of their union: the triangle's height, an edge's own radius, or 0 where
    the balls do not meet or the sign changes.
    """
    a, b = sdf[:, :-1].abs(), sdf[:, 1:].abs()
    half = 0.5 * (a + b + length)
    square = (half * (half - a) * (half - b) * (half - length)).clamp(min=0)  # Heron
    height = 2 * square.sqrt() / length.clamp(min=TINY)
    out = torch.where(a + b > length, height, torch.zeros_like(a))
    out = torch.where(length**2 + b**2 <= a**2, b, out)
    out = torch.where(length**2 + a**2 <= b**2, a, out)
    return out * (sdf[:, :-1] * sdf[:, 1:] > 0)


def opacity_error_bound(length: Tensor, sdf: Tensor, free: Tensor, beta: Tensor) -> tuple[Tensor, Tensor]:
    """Bound (N,S-1) on the error of the opacity anywhere in each interval, and each interval's own part of it.

    For sigma = Laplace density of width beta (N,) the left rectangle rule has per interval an error of at most
    e_i = length_i^2 exp(-d*_i / beta) / (4 beta^2), so (VolSDF, Yariv et al., NeurIPS 2021, theorem 1)
    |O - O^| <= exp(-sum_{j<i} sigma_j length_j) (exp(sum_{j<=i} e_j) - 1). The midpoint rule, which `volume` uses, has
    half that e_i.
    """
    b = beta[:, None]
    e = length**2 * torch.exp(-free / b) / (4 * b * b)
    passed = transmittance(laplace_density(sdf[:, :-1], b) * length)[:, :-1]
    return passed * torch.expm1(e.cumsum(-1).clamp(max=60)), passed * e


@torch.no_grad()
def refine(
    sdf: Callable[[Tensor, Tensor], Tensor],
    rays: Rays,
    bounds: Bounds,
    beta: Tensor | float,
    eps: float = 0.1,
    n: int = 128,
    more: int = 64,
    rounds: int = 5,
    bisections: int = 10,
) -> Bounded:
    """Adds samples to each ray until the opacity's error is bounded by eps there (VolSDF, Alg. 1).

    sdf: points (M,3) and the index (M,) of each one's ray -> (M,), a true distance; beta: width of the Laplace density,
    scalar or (N,). Starts from n even samples and adds `more` in each round, where the bound's parts are large, to the
    rays whose bound is above eps *and to no other*: a ray's samples do not depend on its neighbours. While the bound
    fails at beta, the width is raised to the least for which it holds (bisection, from the closed form
    sqrt(sum length^2 / (4 ln(1 + eps)))), and samples are placed for that.
    """
    o = rays.o.detach()
    N = len(o)
    beta = torch.as_tensor(beta, dtype=o.dtype, device=o.device).detach().expand(N).contiguous()
    out_t = stratified(bounds, n).t
    out_sdf = torch.zeros_like(out_t)
    out_beta, out_bound = beta.clone(), torch.zeros_like(beta)
    out_rounds = torch.zeros(N, dtype=torch.long, device=o.device)
    ray = torch.nonzero(bounds.hit)[:, 0]
    t = out_t[ray]
    f = _query(sdf, rays, ray, t) if len(ray) else t
    for k in range(rounds + 1 if len(ray) else 0):
        length = t[:, 1:] - t[:, :-1]
        free = free_distance(f, length)
        worst, part = opacity_error_bound(length, f, free, beta[ray])
        bound = worst.amax(-1)
        wide = torch.maximum(beta[ray], (length.square().sum(-1) / (4 * math.log1p(eps))).sqrt())
        todo = bound > eps
        wide = torch.where(todo, wide, beta[ray])
        at = torch.nonzero(todo)[:, 0]
        hi, lo = wide[at], beta[ray][at]
        for _ in range(bisections if len(at) else 0):
            mid = (hi * lo).sqrt()
            ok = opacity_error_bound(length[at], f[at], free[at], mid)[0].amax(-1) <= eps
            hi, lo = torch.where(ok, mid, hi), torch.where(ok, lo, mid)
        wide[at] = hi
        if out_t.shape[1] < t.shape[1]:  # room for the longer rows, the rest padded
            room = t.shape[1] - out_t.shape[1]
            out_t = torch.cat([out_t, out_t[:, -1:].expand(-1, room)], -1)
            out_sdf = torch.cat([out_sdf, out_sdf[:, -1:].expand(-1, room)], -1)
        out_t[ray], out_sdf[ray] = t, f
        out_beta[ray], out_bound[ray], out_rounds[ray] = wide, bound, k
        if k == rounds or not len(at):
            break
        ray, t, f = ray[at], t[at], f[at]
        part = opacity_error_bound(length[at], f, free[at], hi)[1]
        # By each interval's own part; the paper's running sum takes 1.2 rounds where this takes 0.7.
        new = inverse_cdf(t, part, more)
        new_f = _query(sdf, rays, ray, new)
        t, order = torch.cat([t, new], -1).sort(-1)
        f = torch.cat([f, new_f], -1).gather(1, order)
    return Bounded(out_t, out_sdf, out_beta, out_bound, out_rounds, n + more * out_rounds)


@torch.no_grad()
def error_bounded(
    sdf: Callable[[Tensor, Tensor], Tensor],
    rays: Rays,
    bounds: Bounds,
    beta: Tensor | float,
    n: int = 64,
    extra: int = 34,
    jitter: bool = False,
    generator: torch.Generator | None = None,
    **settings,
) -> Samples:
    """n + extra edges per ray for a Laplace density (VolSDF, section 3.4); `settings` go to `refine`.

    n by inverse CDF of the bounded opacity, and an even choice of the refined set, near and far included.
    For NeuS give beta = 1 / inv_s: the logistic's tails are as wide.
    """
    r = refine(sdf, rays, bounds, beta, **settings)
    tau = laplace_density(r.sdf[:, :-1], r.beta[:, None]) * (r.t[:, 1:] - r.t[:, :-1])
    t = inverse_cdf(r.t, weights(tau), n, jitter, generator=generator)
    u = torch.linspace(0, 1, extra, dtype=t.dtype, device=t.device)
    pick = (u * (r.counts - 1)[:, None]).round().long()
    t = torch.cat([t, r.t.gather(1, pick)], -1).sort(-1).values
    return Samples(t, t[:, 1:] > t[:, :-1])


def _query(sdf: Callable[[Tensor, Tensor], Tensor], rays: Rays, ray: Tensor, t: Tensor) -> Tensor:
    """sdf (A,S) at t (A,S) along the rays of index ray (A,)."""
    x = rays.o[ray, None] + t[..., None] * rays.d[ray, None]
    out = sdf(x.reshape(-1, 3), ray[:, None].expand_as(t).reshape(-1)).reshape(t.shape)
    if not bool(torch.isfinite(out).all()):
        raise ValueError("the SDF gave NaN or infinity at some sample; has its training diverged?")
    return out


# ------------------------------------------------------------------------------------------------- skipping empty space


@dataclass(frozen=True)
class OccupancyGrid:
    """Where matter may be: cell (i,j,k) covers lo + h [i, i+1) x [j, j+1) x [k, k+1)."""

    cells: Tensor  # (R,R,R) bool
    lo: Tensor  # (3,)
    h: float

    @property
    def hi(self) -> Tensor:
        return self.lo + self.h * torch.tensor(self.cells.shape, dtype=self.lo.dtype, device=self.lo.device)


@torch.no_grad()
def occupancy(
    density: Callable[[Tensor], Tensor], lo: Tensor, hi: Tensor, resolution: int, threshold: float, chunk: int = 1 << 18
) -> OccupancyGrid:
    """Cells of the cube lo..hi (3,) whose centre has density (M,3) -> (M,) above the threshold, and their neighbours.

    The 26 neighbours make `skip_empty` safe for what the centres tell; matter thinner than a cell can still be missed.
    For an SDF pass -sdf and the threshold -(band + h sqrt(3) / 2): no cell with |sdf| < band is then missed.
    """
    h = float(((hi - lo) / resolution).max())
    axis = (torch.arange(resolution, dtype=lo.dtype, device=lo.device) + 0.5) * h
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3) + lo
    full = torch.cat([density(p) > threshold for p in x.split(chunk)]).reshape(1, 1, *(resolution,) * 3)
    grown = torch.nn.functional.max_pool3d(full.to(lo.dtype), 3, 1, 1)
    return OccupancyGrid(grown[0, 0] > 0, lo, h)


@torch.no_grad()
def skip_empty(grid: OccupancyGrid, rays: Rays, bounds: Bounds | None = None, step: float = 0.0) -> Samples:
    """Even steps (the grid's cell where 0, and never longer) through the occupied cells only; S is the fullest ray's.

    A step is live when its centre is in an occupied cell: with the neighbours that `occupancy` adds nothing is lost.
    """
    box = box_bounds(rays, grid.lo, grid.hi)
    if bounds is not None:
        near = torch.maximum(box.near, bounds.near)
        box = Bounds(near, torch.maximum(near, torch.minimum(box.far, bounds.far)))
    step = min(step, grid.h) if step > 0 else grid.h
    n = int(((box.far - box.near) / step).amax().ceil()) + 1 if len(rays.o) else 1
    t = box.near[:, None] + step * torch.arange(n + 1, dtype=box.near.dtype, device=box.near.device)
    t = torch.minimum(t, box.far[:, None])
    mid = 0.5 * (t[:, 1:] + t[:, :-1])
    x = rays.o[:, None] + mid[..., None] * rays.d[:, None]
    i, j, k = ((x - grid.lo) / grid.h).floor().long().clamp(0, len(grid.cells) - 1).unbind(-1)
    live = grid.cells[i, j, k] & (t[:, 1:] > t[:, :-1])
    return compact(Samples(t, live))


def compact(samples: Samples) -> Samples:
    """Drops edges that no live interval has; a gap stays one dead interval, the end is padded."""
    t, live = samples
    before = torch.nn.functional.pad(live, (1, 0))
    after = torch.nn.functional.pad(live, (0, 1))
    keep = before | after
    size = max(int(keep.sum(-1).amax()) if len(t) else 0, 2)
    order = torch.argsort(~keep, dim=-1, stable=True)[:, :size]
    kept = keep.gather(1, order)
    # The first `kept` edges stay sorted; what follows repeats the last of them.
    last = torch.where(kept, t.gather(1, order), torch.full_like(t[:, :1], -torch.inf)).amax(-1, keepdim=True)
    last = torch.where(kept.any(-1, keepdim=True), last, t[:, :1])
    return Samples(torch.where(kept, t.gather(1, order), last), (after.gather(1, order) & kept)[:, :-1] & kept[:, 1:])


@torch.no_grad()
def march_band(
    grid: SdfGrid,
    rays: Rays,
    n: int,
    band: float,
    step: float | None = None,
    jitter: bool = False,
    generator: torch.Generator | None = None,
) -> Samples:
    """n edges where each ray first passes |sdf| < band of a cached grid (compiled march, `SdfGrid.march`).

    Matter further than `band` from the surface is left out, so band should be several widths of the density, and more
    by the cache's own error; a ray that leaves the band again has its second passage left out too.
    step: of the march inside the band; half a voxel by default.
    """
    t0, t1, least = grid.march(rays.o, rays.d, 0.5 * grid.h if step is None else step, band)
    hit = (least < band) & (t1 > t0)
    t0 = torch.where(hit, t0, torch.zeros_like(t0)).clamp(min=0).to(rays.o.dtype)
    t1 = torch.where(hit, torch.maximum(t1, t0), t0).to(rays.o.dtype)
    return stratified(Bounds(t0, t1), n, jitter, generator)
