"""Volume rendering of one or several bodies as one medium, by optical depth.

Every body tells its optical depth tau on an interval of a ray: sigma * length for a density (NeRF; VolSDF's Laplace
density of an SDF), -log(1 - alpha) for NeuS. Optical depths of bodies that share space add, and so do those of
intervals in a row; a body's share of the light is its share of tau. Compositing knows nothing else, so bodies of all
kinds mix.

    hand = sdf_body(field, LaplaceDensity(), lambda rays: error_bounded(sdf, rays, sphere_bounds(rays, 1.0), beta))
    ball = neus_body(other_field, LogisticDepth(), lambda rays: march_band(cache, rays, 32, 0.01))
    picture = render_rays(camera_rays(K, pose, pixels), [hand, ball], background=torch.ones(3), chunk=4096)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from ..shapes.nerf import inverted_sphere_points
from .medium import weights
from .samplers import Rays, Samples, check_rays, importance, locate, merge


class Points(NamedTuple):
    """M intervals of rays, where a field is asked."""

    x: Tensor  # (M,3) centres, in the world
    d: Tensor  # (M,3) unit directions of view
    length: Tensor  # (M,)
    frame: Tensor | None = None  # (M,) of their rays


class Matter(NamedTuple):
    """What a body is on M intervals."""

    tau: Tensor  # (M,) optical depth >= 0
    rgb: Tensor  # (M,3)
    normal: Tensor | None = None  # (M,3) outward, any length (an SDF's gradient)


@dataclass(frozen=True)
class Body:
    """One body of a joint medium. It is empty outside the live intervals of its own samples."""

    matter: Callable[[Points], Matter]
    sample: Callable[[Rays], Samples]  # where it may be; see `samplers`


def density_body(field: Callable[[Points], tuple[Tensor, Tensor]], sample: Callable[[Rays], Samples]) -> Body:
    """A body from a field -> density (M,), rgb (M,3): for a `shapes.nerf.Nerf`, `lambda p: nerf(p.x, p.d)`."""

    def matter(p: Points) -> Matter:
        sigma, rgb = field(p)
        return Matter(sigma * p.length, rgb)

    return Body(matter, sample)


def sdf_body(
    field: Callable[[Points], tuple], density: Callable[[Tensor], Tensor], sample: Callable[[Rays], Samples]
) -> Body:
    """A body from a field -> sdf (M,), rgb (M,3), gradient (M,3) or None, and a density of the sdf (VolSDF)."""

    def matter(p: Points) -> Matter:
        sdf, rgb, gradient = field(p)
        return Matter(density(sdf) * p.length, rgb, gradient)

    return Body(matter, sample)


def neus_body(
    field: Callable[[Points], tuple], depth: Callable[[Tensor, Tensor], Tensor], sample: Callable[[Rays], Samples]
) -> Body:
    """A body from a field -> sdf (M,), rgb (M,3), gradient (M,3), and NeuS's optical depth between two SDF values.

    The SDF at both ends of an interval is that at the centre -+ half the slope along the ray, as in the paper's code.
    """

    def matter(p: Points) -> Matter:
        sdf, rgb, gradient = field(p)
        half = 0.5 * p.length * (gradient * p.d).sum(-1)
        return Matter(depth(sdf - half, sdf + half), rgb, gradient)

    return Body(matter, sample)


def resampled(body: Body, n: int, jitter: bool = False, generator: torch.Generator | None = None) -> Body:
    """The body with n more samples where its own weights are large (NeRF's second pass).

    Its matter is asked once more, without gradient. The paper trains a first network for this: then the body given here
    is that network's, and the field to render is put in with `dataclasses.replace(..., matter=...)`.
    """

    def sample(rays: Rays) -> Samples:
        first = body.sample(rays)
        with torch.no_grad():
            return importance(first, weights(_ask(body, rays, *first).tau), n, jitter, generator)

    return Body(body.matter, sample)


# ----------------------------------------------------------------------------------------------------- compositing


class Along(NamedTuple):
    """What N rays meet: S - 1 common intervals, B bodies. Zero where a body is empty."""

    t: Tensor  # (N,S) edges
    tau: Tensor  # (N,S-1,B)
    rgb: Tensor  # (N,S-1,B,3)
    normal: Tensor | None = None  # (N,S-1,B,3)

    def only(self, body: int) -> Along:
        """Body number `body` without the others: what `composite` shows of it is not hidden by them."""
        k = slice(body, body + 1)
        return Along(
            self.t, self.tau[..., k], self.rgb[..., k, :], None if self.normal is None else self.normal[..., k, :]
        )


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


def composite(along: Along, background: Tensor | None = None) -> Rendered:
    """The picture of what the rays meet, over a background colour (3,) or (N,3)."""
    t, tau = along.t, along.tau
    if tau.ndim != 3 or along.rgb.shape != (*tau.shape, 3) or t.shape != (len(tau), tau.shape[1] + 1):
        shapes = ", ".join(str(tuple(x.shape)) for x in (t, tau, along.rgb))
        raise ValueError(f"t (N,S+1), tau (N,S,B) and rgb (N,S,B,3) do not agree: {shapes}")
    w = weights(tau)
    shares = w.sum(1)
    each = tau.sum(-1)
    total = each.sum(-1)
    rgb = (w[..., None] * along.rgb).sum((1, 2))
    if background is not None:
        rgb = rgb + torch.exp(-total)[:, None] * background
    normal = None
    if along.normal is not None:
        normal = normalize((w[..., None] * along.normal).sum((1, 2)), dim=-1, eps=1e-8)
    mid = 0.5 * (t[:, 1:] + t[:, :-1])
    depth = (w.sum(-1) * mid).sum(-1) / shares.sum(-1).clamp(min=1e-10)
    return Rendered(rgb, -torch.expm1(-total), depth, _median(t, each), normal, shares, -torch.expm1(-tau.sum(1)))


def _median(t: Tensor, tau: Tensor) -> Tensor:
    """(N,) where the optical depth reaches ln 2, linear inside the interval; 0 where it never does."""
    if not tau.shape[1]:
        return torch.zeros_like(t[:, 0])
    half, reached = math.log(2), tau.cumsum(-1)
    k = (reached.detach() < half).sum(-1, keepdim=True)
    found = k[:, 0] < tau.shape[1]
    k = k.clamp(max=tau.shape[1] - 1)
    a, b = t.gather(1, k)[:, 0], t.gather(1, k + 1)[:, 0]
    there = tau.gather(1, k)[:, 0]
    share = 1 - (reached.gather(1, k)[:, 0] - half) / torch.where(found, there, torch.ones_like(there))
    return torch.where(found, a + (b - a) * share, torch.zeros_like(a))


def evaluate(rays: Rays, bodies: Sequence[Body], shared: bool = True) -> Along:
    """Every body on the common intervals: those that the edges of all bodies' samples cut.

    shared: each body is asked at every common interval that it is not known to be empty in. Otherwise it is asked at
    its own only, and its density is constant across each: all of its optical depth is there still, for a cost that
    does not grow with the other bodies' samples. (What must not be done is to give own samples the common list's
    lengths: that loses depth, and two unit media on [0,1] would pass 0.37 instead of exp(-2).)
    Gradients flow to the rays and to what the fields own, not to the samples.
    """
    o = rays.o
    if not bodies:
        return Along(o.new_zeros(len(o), 1), o.new_zeros(len(o), 0, 0), o.new_zeros(len(o), 0, 0, 3))
    with torch.no_grad():
        own = [b.sample(rays) for b in bodies]
        t, live = merge(own)
    columns = []
    for k, body in enumerate(bodies):
        if shared or len(bodies) == 1:
            columns.append(_ask(body, rays, t, live[..., k]))
            continue
        m = _ask(body, rays, *own[k])
        at, inside = locate(own[k], t)
        length, whole = t[:, 1:] - t[:, :-1], (own[k].t[:, 1:] - own[k].t[:, :-1]).gather(1, at)
        share = torch.where(inside, length / torch.where(inside, whole, torch.ones_like(whole)), 0)
        at3 = at[..., None].expand(-1, -1, 3)
        columns.append(Matter(m.tau.gather(1, at) * share, m.rgb.gather(1, at3), m.normal.gather(1, at3)))
    tau, rgb, normal = (torch.stack(c, 2) for c in zip(*columns, strict=True))
    return Along(t, tau, rgb, normal)


def _ask(body: Body, rays: Rays, t: Tensor, live: Tensor) -> Matter:
    """The body's matter on the intervals between t (N,S), each (N,S-1...): asked for where live, else 0."""
    mid, length = 0.5 * (t[:, 1:] + t[:, :-1]), t[:, 1:] - t[:, :-1]
    tau, rgb, normal = mid.new_zeros(mid.shape), mid.new_zeros(*mid.shape, 3), mid.new_zeros(*mid.shape, 3)
    ray, k = torch.nonzero(live, as_tuple=True)
    if not len(ray):
        return Matter(tau, rgb, normal)
    d = rays.d[ray]
    frame = None if rays.frame is None else rays.frame[ray]
    m = body.matter(Points(rays.o[ray] + mid[ray, k, None] * d, d, length[ray, k], frame))
    if m.tau.shape != ray.shape or m.rgb.shape != (len(ray), 3):
        raise ValueError(f"a body gives tau (M,) and rgb (M,3), not {tuple(m.tau.shape)} and {tuple(m.rgb.shape)}")
    at = (ray, k)
    m = Matter(*(None if x is None else x.to(tau.dtype) for x in m))  # a network may run in half precision
    tau, rgb = tau.index_put(at, m.tau), rgb.index_put(at, m.rgb)
    return Matter(tau, rgb, normal if m.normal is None else normal.index_put(at, m.normal))


def render_rays(
    rays: Rays,
    bodies: Sequence[Body],
    background: Tensor | Callable[[Rays], Tensor] | None = None,
    chunk: int | None = None,
    shared: bool = True,
) -> Rendered:
    """Render rays through the joint medium of the bodies.

    background: a colour (3,) or (N,3), or a function of the rays, such as `inverted_sphere(...)`. chunk: rays at a
    time; under `torch.no_grad()` that bounds the memory. shared: see `evaluate`.
    Raises ValueError on rays that are not finite or not unit.
    """
    check_rays(rays)
    N = len(rays.o)
    if chunk is None or chunk >= N:
        behind = background(rays) if callable(background) else background
        return composite(evaluate(rays, bodies, shared), behind)
    parts = []
    for k in range(0, N, chunk):
        some = Rays(*(None if x is None else x[k : k + chunk] for x in rays))
        fixed = isinstance(background, Tensor) and background.ndim == 2
        parts.append(render_rays(some, bodies, background[k : k + chunk] if fixed else background, None, shared))
    joined = {f.name: [getattr(p, f.name) for p in parts] for f in fields(Rendered)}
    return Rendered(**{k: None if v[0] is None else torch.cat(v) for k, v in joined.items()})


def inverted_sphere(
    field: Callable[[Points], tuple[Tensor, Tensor]],
    radius: float,
    n: int = 32,
    jitter: bool = False,
    generator: torch.Generator | None = None,
) -> Callable[[Rays], Tensor]:
    """A background rays -> rgb (N,3) of all that is outside a sphere round the origin (NeRF++, Zhang et al. 2020).

    field -> density (M,), rgb (M,3), asked at points whose x is (M,4) = (x/r, radius/r), on n shells even in 1/r;
    densities and lengths are per unit of radius/r. The outermost shell takes whatever light is left, so that the
    background is always opaque.
    """

    def background(rays: Rays) -> Tensor:
        o, d, frame = rays
        N = len(o)
        with torch.no_grad():
            nearest = o + (-(o * d).sum(-1)).clamp(min=0)[:, None] * d
            start = radius / nearest.norm(dim=-1).clamp(min=radius)  # 1, or less on a ray that misses the sphere
            u = (torch.arange(n, dtype=o.dtype, device=o.device) + 0.5).expand(N, n)
            if jitter:
                u = u + torch.rand(N, n, dtype=o.dtype, device=o.device, generator=generator) - 0.5
            s = start[:, None] * (1 - u / n)
            length = (start / n)[:, None].expand(N, n)
        q = inverted_sphere_points(o[:, None], d[:, None], s, radius).reshape(-1, 4)
        frames = None if frame is None else frame.repeat_interleave(n)
        sigma, rgb = field(Points(q, d.repeat_interleave(n, 0), length.reshape(-1), frames))
        tau = sigma.reshape(N, n) * length
        tau = torch.cat([tau[:, :-1], torch.full_like(tau[:, -1:], 100.0)], -1)
        return (weights(tau)[..., None] * rgb.reshape(N, n, 3)).sum(1)

    return background
