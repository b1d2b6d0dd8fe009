"""Volume rendering of one or several bodies as one medium, by optical depth.

Every body tells its optical depth tau on an interval of a ray: sigma * length for a density (NeRF; VolSDF's Laplace
density of an SDF), -log(1 - alpha) for NeuS. Optical depths of bodies that share space add, and so do those of
intervals in a row; a body's share of the light is its share of tau. Compositing knows nothing else, so bodies of all
kinds mix.

    hand = sdf_body(field, LaplaceDensity(), lambda o, d: error_bounded(sdf, o, d, sphere_bounds(o, d, 1.0), beta))
    ball = neus_body(other_field, inv_s, lambda o, d: march_band(cache, o, d, 32, 0.01))
    picture = render_rays(o, d, [hand, ball], background=torch.ones(3), chunk=4096)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..shapes.nerf import inverted_sphere_points
from .samplers import Samples, check_rays, merge

# ----------------------------------------------------------------------------------------- from fields to optical depth


def laplace_density(sdf: Tensor, beta: Tensor | float) -> Tensor:
    """Density 1/beta * (CDF of the Laplace distribution of width beta at -sdf) (VolSDF, Yariv et al. 2021, eq. 2-3).

    1/(2 beta) on the surface, 1/beta inside; differentiable in both, at sdf = 0 too; float32 is safe for any sdf/beta.
    """
    # Each branch sees its own side only: exp cannot overflow, and clamp (unlike abs) has the right slope at 0.
    outside = 0.5 * torch.exp(-sdf.clamp(min=0) / beta)
    inside = 1 - 0.5 * torch.exp(sdf.clamp(max=0) / beta)
    return torch.where(sdf >= 0, outside, inside) / beta


class LaplaceDensity(nn.Module):
    """`laplace_density` with a learned width |b| + least."""

    def __init__(self, beta: float = 0.1, least: float = 1e-4):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(float(beta) - least))
        self.least = least

    @property
    def beta(self) -> Tensor:
        return self.raw.abs() + self.least

    def forward(self, sdf: Tensor) -> Tensor:
        return laplace_density(sdf, self.beta)


def neus_optical_depth(start: Tensor, end: Tensor, inv_s: Tensor | float) -> Tensor:
    """Optical depth between two samples with these SDF values (NeuS, Wang et al. 2021, eq. 13: -log(1 - alpha)).

    inv_s: the logistic's sharpness, 1/width. max(log sigmoid(s start) - log sigmoid(s end), 0): the logarithm of the
    paper's quotient, which needs no epsilon and telescopes, so that a monotone passage has the same opacity however it
    is cut. Zero where the ray leaves the body.
    """
    log = nn.functional.logsigmoid
    return (log(start * inv_s) - log(end * inv_s)).clamp(min=0)


def neus_alpha(start: Tensor, end: Tensor, inv_s: Tensor | float) -> Tensor:
    """Section opacity in [0,1] of the interval (NeuS, eq. 13)."""
    return -torch.expm1(-neus_optical_depth(start, end, inv_s))


class Matter(NamedTuple):
    """What a body is on M intervals."""

    tau: Tensor  # (M,) optical depth >= 0
    rgb: Tensor  # (M,3)
    normal: Tensor | None = None  # (M,3) outward, any length (an SDF's gradient)


@dataclass(frozen=True)
class Body:
    """One body of a joint medium. It is empty outside the live intervals of its own samples."""

    matter: Callable[[Tensor, Tensor, Tensor], Matter]  # interval centres (M,3), unit directions (M,3), lengths (M,)
    sample: Callable[[Tensor, Tensor], Samples]  # o, d (N,3) -> where it may be; see `samplers`


def density_body(field: Callable, sample: Callable) -> Body:
    """A body from a field (x (M,3), d (M,3)) -> density (M,) and rgb (M,3), such as `shapes.nerf.Nerf`."""

    def matter(x: Tensor, d: Tensor, length: Tensor) -> Matter:
        sigma, rgb = field(x, d)
        return Matter(sigma * length, rgb)

    return Body(matter, sample)


def sdf_body(field: Callable, density: Callable[[Tensor], Tensor], sample: Callable) -> Body:
    """A body from a field (x, d) -> sdf (M,), rgb (M,3), gradient (M,3) or None, and a density of the sdf (VolSDF)."""

    def matter(x: Tensor, d: Tensor, length: Tensor) -> Matter:
        sdf, rgb, gradient = field(x, d)
        return Matter(density(sdf) * length, rgb, gradient)

    return Body(matter, sample)


def neus_body(field: Callable, inv_s: Tensor | float, sample: Callable) -> Body:
    """A body from a field (x, d) -> sdf (M,), rgb (M,3), gradient (M,3), rendered as NeuS.

    The SDF at both ends of an interval is that at the centre -+ half the slope along the ray, as in the paper's code.
    """

    def matter(x: Tensor, d: Tensor, length: Tensor) -> Matter:
        sdf, rgb, gradient = field(x, d)
        half = 0.5 * length * (gradient * d).sum(-1)
        return Matter(neus_optical_depth(sdf - half, sdf + half, inv_s), rgb, gradient)

    return Body(matter, sample)


# ----------------------------------------------------------------------------------------------------- compositing


class Along(NamedTuple):
    """What N rays meet: S - 1 common intervals, B bodies. Zero where a body is empty."""

    t: Tensor  # (N,S) edges
    tau: Tensor  # (N,S-1,B)
    rgb: Tensor  # (N,S-1,B,3)
    normal: Tensor | None = None  # (N,S-1,B,3)


@dataclass(frozen=True)
class Rendered:
    """Pictures of N rays. Depths are distances along the ray; 0 where there is none."""

    rgb: Tensor  # (N,3) over the background (black when none is given)
    opacity: Tensor  # (N,)
    depth: Tensor  # (N,) expected, of what is opaque
    median_depth: Tensor  # (N,) where the transmittance falls to 1/2
    normal: Tensor | None  # (N,3) unit, or 0
    shares: Tensor  # (N,B) opacity by body; sums to `opacity`: the soft labels, what others hide excluded
    alone: Tensor  # (N,B) opacity that each body would have without the others


def _mean_passed(tau: Tensor) -> Tensor:
    """(1 - exp(-tau)) / tau, 1 at 0."""
    small = tau < 1e-3
    safe = torch.where(small, torch.ones_like(tau), tau)
    return torch.where(small, 1 - tau / 2 * (1 - tau / 3 * (1 - tau / 4)), -torch.expm1(-safe) / safe)


def transmittance(tau: Tensor) -> Tensor:
    """(N,S) optical depths in a row -> (N,S+1) what passes: 1 before the first, then after each."""
    return torch.exp(-nn.functional.pad(tau.cumsum(-1), (1, 0)))


def weights(tau: Tensor) -> Tensor:
    """Quadrature weights (Mildenhall et al., ECCV 2020, eq. 3; joint form) of tau (N,S) or (N,S,B); the same shape.

    w_b = T tau_b (1 - exp(-tau)) / tau, with tau the sum over bodies and T what passes before: with the T that is left,
    they sum to 1. Written without the quotient tau_b / tau, which is 0/0 in empty space.
    """
    total = tau if tau.ndim == 2 else tau.sum(-1)
    w = transmittance(total)[:, :-1] * _mean_passed(total)
    return tau * (w if tau.ndim == 2 else w[..., None])


def composite(along: Along, background: Tensor | None = None) -> Rendered:
    """The picture of what the rays meet, over a background colour (3,) or (N,3)."""
    t, tau = along.t, along.tau
    if tau.ndim != 3 or along.rgb.shape != (*tau.shape, 3) or t.shape != (len(tau), tau.shape[1] + 1):
        shapes = ", ".join(str(tuple(x.shape)) for x in (t, tau, along.rgb))
        raise ValueError(f"t (N,S+1), tau (N,S,B) and rgb (N,S,B,3) do not agree: {shapes}")
    w = weights(tau)
    shares = w.sum(1)
    reached = tau.sum(-1).cumsum(-1)
    left = torch.exp(-reached[:, -1]) if reached.shape[1] else torch.ones_like(t[:, 0])
    opacity = 1 - left
    rgb = (w[..., None] * along.rgb).sum((1, 2))
    if background is not None:
        rgb = rgb + left[:, None] * background
    normal = None
    if along.normal is not None:
        normal = nn.functional.normalize((w[..., None] * along.normal).sum((1, 2)), dim=-1, eps=1e-8)
    mid = 0.5 * (t[:, 1:] + t[:, :-1])
    each = w.sum(-1)
    depth = (each * mid).sum(-1) / each.sum(-1).clamp(min=1e-10)
    return Rendered(rgb, opacity, depth, _median(t, tau.sum(-1), reached), normal, shares, -torch.expm1(-tau.sum(1)))


def _median(t: Tensor, tau: Tensor, reached: Tensor) -> Tensor:
    """(N,) where the optical depth reaches ln 2, linear inside the interval; 0 where it never does."""
    if not tau.shape[1]:
        return torch.zeros_like(t[:, 0])
    half = math.log(2)
    k = (reached.detach() < half).sum(-1, keepdim=True)
    found = k[:, 0] < tau.shape[1]
    k = k.clamp(max=tau.shape[1] - 1)
    a, b = t.gather(1, k)[:, 0], t.gather(1, k + 1)[:, 0]
    there = tau.gather(1, k)[:, 0]
    share = 1 - (reached.gather(1, k)[:, 0] - half) / torch.where(found, there, torch.ones_like(there))
    return torch.where(found, a + (b - a) * share, torch.zeros_like(a))


def evaluate(o: Tensor, d: Tensor, bodies: Sequence[Body]) -> Along:
    """Every body on the union of all bodies' samples, wherever it is not known to be empty.

    (A body evaluated on its own samples only, with the merged list's intervals, loses optical depth: two unit media on
    [0,1] would pass 0.37 instead of exp(-2).) Gradients flow to o and d and to what the fields own.
    """
    if not bodies:
        return Along(o.new_zeros(len(o), 1), o.new_zeros(len(o), 0, 0), o.new_zeros(len(o), 0, 0, 3))
    with torch.no_grad():
        t, live = merge([b.sample(o, d) for b in bodies])
        mid, length = 0.5 * (t[:, 1:] + t[:, :-1]), t[:, 1:] - t[:, :-1]
    columns = [_on_live(b, o, d, mid, length, live[..., k]) for k, b in enumerate(bodies)]
    tau, rgb, normal = (torch.stack(c, 2) for c in zip(*columns, strict=True))
    return Along(t, tau, rgb, normal)


def _on_live(body: Body, o: Tensor, d: Tensor, mid: Tensor, length: Tensor, live: Tensor) -> Matter:
    """The body's matter on all intervals (N,S...): asked for where live, else 0."""
    ray, k = torch.nonzero(live, as_tuple=True)
    tau, rgb, normal = mid.new_zeros(mid.shape), mid.new_zeros(*mid.shape, 3), mid.new_zeros(*mid.shape, 3)
    if not len(ray):
        return Matter(tau, rgb, normal)
    di = d[ray]
    m = body.matter(o[ray] + mid[ray, k, None] * di, di, length[ray, k])
    if m.tau.shape != ray.shape or m.rgb.shape != (len(ray), 3):
        raise ValueError(f"a body gives tau (M,) and rgb (M,3), not {tuple(m.tau.shape)} and {tuple(m.rgb.shape)}")
    at = (ray, k)
    tau, rgb = tau.index_put(at, m.tau), rgb.index_put(at, m.rgb)
    return Matter(tau, rgb, normal if m.normal is None else normal.index_put(at, m.normal))


def render_rays(
    o: Tensor,
    d: Tensor,
    bodies: Sequence[Body],
    background: Tensor | Callable[[Tensor, Tensor], Tensor] | None = None,
    chunk: int | None = None,
) -> Rendered:
    """Render rays o (N,3), d (N,3) unit through the joint medium of the bodies.

    background: a colour (3,) or (N,3), or a function of (o, d), such as `inverted_sphere(...)`. chunk: rays at a time;
    under `torch.no_grad()` that bounds the memory. Raises ValueError on rays that are not finite or not unit.
    """
    check_rays(o, d)
    if chunk is not None and chunk < len(o):
        fixed = background if isinstance(background, Tensor) and background.ndim == 2 else None
        parts = [
            render_rays(a, b, bodies, background if fixed is None else c, None)
            for a, b, c in zip(
                o.split(chunk), d.split(chunk), (o if fixed is None else fixed).split(chunk), strict=True
            )
        ]
        joined = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Rendered)}
        return Rendered(**{k: None if v[0] is None else torch.cat(v) for k, v in joined.items()})
    behind = background(o, d) if callable(background) and not isinstance(background, Tensor) else background
    return composite(evaluate(o, d, bodies), behind)


def inverted_sphere(
    field: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    radius: float,
    n: int = 32,
    jitter: bool = False,
    generator: torch.Generator | None = None,
) -> Callable[[Tensor, Tensor], Tensor]:
    """A background (o, d) -> rgb (N,3) of all that is outside a sphere round the origin (NeRF++, Zhang et al. 2020).

    field: (q (M,4), d (M,3)) -> density (M,), rgb (M,3) with q = (x/r, radius/r) on n shells even in 1/r; densities are
    per unit of radius/r. The outermost shell takes whatever light is left, so that the background is always opaque.
    """

    def background(o: Tensor, d: Tensor) -> Tensor:
        with torch.no_grad():
            nearest = o + (-(o * d).sum(-1)).clamp(min=0)[:, None] * d
            start = radius / nearest.norm(dim=-1).clamp(min=radius)  # 1, or less on a ray that misses the sphere
            u = (torch.arange(n, dtype=o.dtype, device=o.device) + 0.5).expand(len(o), n)
            if jitter:
                u = u + torch.rand(len(o), n, dtype=o.dtype, device=o.device, generator=generator) - 0.5
            s = start[:, None] * (1 - u / n)
        q = inverted_sphere_points(o[:, None], d[:, None], s, radius)
        sigma, rgb = field(q.reshape(-1, 4), d[:, None].expand(-1, n, -1).reshape(-1, 3))
        tau = sigma.reshape(-1, n) * (start / n)[:, None]
        tau = torch.cat([tau[:, :-1], torch.full_like(tau[:, -1:], 100.0)], -1)
        return (weights(tau)[..., None] * rgb.reshape(-1, n, 3)).sum(1)

    return background
