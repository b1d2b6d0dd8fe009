"""Bounds and samplers: order, coverage, and the promise of the error-bounded one."""

from __future__ import annotations

import pytest
import torch

from handhold.kernels.grid import SdfGrid
from handhold.render import samplers
from handhold.render.medium import laplace_density
from handhold.render.samplers import Bounds, Rays, Samples
from sdfs import box, rays, sphere

F64 = torch.float64


def both(x, ray=None):
    return torch.minimum(sphere(x), box(x))


def on_rays(f, r, t):
    return f((r.o[:, None] + t[..., None] * r.d[:, None]).reshape(-1, 3)).reshape(t.shape)


def check(s: Samples):
    assert s.t.isfinite().all() and (s.t[:, 1:] >= s.t[:, :-1]).all()
    assert s.live.shape == (s.t.shape[0], s.t.shape[1] - 1) and s.live.dtype == torch.bool
    assert not (s.live & (s.t[:, 1:] == s.t[:, :-1])).any()
    assert not s.t.requires_grad


# ---------------------------------------------------------------------------------------------------------- bounds


@pytest.mark.parametrize("distance", [0.0, 0.3, 2.5, 1000.0])
def test_sphere_bounds_from_inside_and_outside(distance):
    r = rays(200, distance, spread=0.3, dtype=F64)
    b = samplers.sphere_bounds(r, 0.6)
    assert (b.near >= 0).all() and (b.far >= b.near).all()
    ends = [(r.o + t[:, None] * r.d).norm(dim=-1)[b.hit] for t in b]
    torch.testing.assert_close(ends[1], torch.full_like(ends[1], 0.6), rtol=0, atol=1e-9)
    if distance < 0.6:
        assert b.hit.all() and (b.near == 0).all()
    else:
        torch.testing.assert_close(ends[0], torch.full_like(ends[0], 0.6), rtol=0, atol=1e-9)
        closest = (r.o - (r.o * r.d).sum(-1, keepdim=True) * r.d).norm(dim=-1)
        assert (b.hit == (closest < 0.6)).all() and 0 < b.hit.sum() < 200


def test_sphere_bounds_hold_in_float32_from_far():
    r = rays(500, 1000.0, spread=0.3)
    b = samplers.sphere_bounds(r, 0.6)
    exact = samplers.sphere_bounds(Rays(r.o.double(), r.d.double()), 0.6)
    assert ((b.far - b.near) - (exact.far - exact.near)).abs().max() < 0.02


def test_rays_that_miss_or_look_away_have_no_length():
    r = rays(50)
    back = Rays(r.o, -r.d)
    lo, hi = torch.full((3,), -0.4), torch.full((3,), 0.4)
    for b in (
        samplers.sphere_bounds(back, 1.0),
        samplers.sphere_bounds(r, 1.0, torch.tensor([0.0, 50.0, 0.0])),
        samplers.box_bounds(back, lo, hi),
        samplers.box_bounds(r, lo + 50, hi + 50),
    ):
        assert not b.hit.any() and b.near.isfinite().all() and b.far.isfinite().all()
        assert not samplers.stratified(b, 8).live.any()
        assert not samplers.error_bounded(both, r, b, 0.01).live.any()


@pytest.mark.parametrize("distance", [0.1, 2.5])
def test_box_bounds(distance):
    r = rays(300, distance, dtype=F64)
    r.o[:3], r.d[:3] = torch.tensor([[0, 0, -distance], [0, 0, 1]], dtype=F64)[:, None]  # along an axis
    half = torch.tensor([0.3, 0.2, 0.4], dtype=F64)
    b = samplers.box_bounds(r, -half, half)
    assert (b.near >= 0).all() and (b.far >= b.near).all() and b.hit[:3].all()
    t = torch.linspace(0, 6, 2001, dtype=F64)
    inside = (on_rays(lambda x: (x.abs() / half).amax(-1), r, t.expand(300, -1)) < 1).double().sum(-1) * 6 / 2000
    torch.testing.assert_close(b.far - b.near, inside, rtol=0, atol=0.007)


def test_camera_rays_hit_their_pixels():
    K = torch.tensor([[100.0, 0, 31.5], [0, 110, 20.25], [0, 0, 1]], dtype=F64)
    pose = torch.eye(4, dtype=F64)
    pose[:3, :3] = torch.linalg.qr(torch.randn(3, 3, dtype=F64, generator=torch.Generator().manual_seed(0)))[0]
    pose[:3, 3] = torch.tensor([0.1, 0.2, 0.3])
    xy = 64 * torch.rand(20, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
    r = samplers.camera_rays(K, pose, xy)
    samplers.check_rays(r)
    x = (r.o + 1.7 * r.d - pose[:3, 3]) @ pose[:3, :3]
    p = x @ K.T
    torch.testing.assert_close(p[:, :2] / p[:, 2:], xy)
    many = samplers.camera_rays(K, pose.expand(20, 4, 4), xy)
    torch.testing.assert_close(many.d, r.d)
    assert torch.autograd.gradcheck(
        lambda K, pose: samplers.camera_rays(K, pose, xy[:3])[:2], (K.requires_grad_(), pose.requires_grad_())
    )


# -------------------------------------------------------------------------------------------------- plain samplers


def test_stratified_samples_stay_in_their_strata():
    r = rays(100, spread=0.2)
    b = samplers.sphere_bounds(r, 1.0)
    s = samplers.stratified(b, 33, jitter=True, generator=torch.Generator().manual_seed(0))
    check(s)
    assert (s.t[:, 0] == b.near).all() and (s.t[:, -1] == b.far).all()
    u = (s.t - b.near[:, None]) / (b.far - b.near)[:, None] * 32
    assert ((u[:, 1:-1] - torch.arange(1, 32)).abs() <= 0.501).all()
    assert (u[:, 1:-1] - torch.arange(1, 32)).std() == pytest.approx(12**-0.5, rel=0.05)


def test_inverse_cdf_follows_the_weights_and_has_no_gradient():
    t = torch.tensor([[0.0, 1.0, 2.0, 4.0]]).expand(2, 4)
    w = torch.tensor([[1.0, 3.0, 0.0], [0.0, 0.0, 0.0]], requires_grad=True)
    x = samplers.inverse_cdf(t, w, 4000)
    assert not x.requires_grad
    share = [((x[0] >= a) & (x[0] < b)).float().mean().item() for a, b in ((0, 1), (1, 2), (2, 4))]
    assert share == pytest.approx([0.25, 0.75, 0.0], abs=1e-3)
    torch.testing.assert_close(x[1], (torch.arange(4000) + 0.5) / 1000, rtol=0, atol=1e-4)  # no weight: evenly
    jittered = samplers.inverse_cdf(t, w, 50, jitter=True)
    assert (jittered[:, 1:] >= jittered[:, :-1]).all() and jittered.max() <= 4


def test_importance_keeps_the_edges_and_leaves_gaps_alone():
    t = torch.linspace(0, 1, 11).expand(3, 11)
    live = torch.ones(3, 10, dtype=torch.bool)
    live[:, 4:6] = False
    s = samplers.importance(Samples(t, live), torch.ones(3, 10), 40)
    check(s)
    assert s.t.shape == (3, 51)
    inner = (s.t > 0.41) & (s.t < 0.59)
    assert inner.sum() == 3  # only the old edge 0.5
    assert not s.live[(s.t[:, :-1] >= 0.4 - 1e-6) & (s.t[:, 1:] <= 0.6 + 1e-6)].any()


def test_merge_keeps_every_bodys_intervals():
    a = Samples(torch.tensor([[0.0, 1.0, 2.0, 3.0]]), torch.tensor([[True, False, True]]))
    b = Samples(torch.tensor([[0.5, 2.5, 2.5]]), torch.tensor([[True, False]]))
    t, live = samplers.merge([a, b])
    assert t.tolist() == [[0.0, 0.5, 1.0, 2.0, 2.5, 2.5, 3.0]]
    assert live[..., 0].tolist() == [[True, True, False, True, False, True]]
    assert live[..., 1].tolist() == [[False, True, True, True, False, False]]


# --------------------------------------------------------------------------------------------------- error-bounded


@pytest.mark.parametrize("solid", [sphere, box])
def test_free_distance_is_a_lower_bound(solid):
    r = rays(200, dtype=F64)
    t = torch.linspace(1.0, 4.0, 25, dtype=F64).expand(200, -1)
    free = samplers.free_distance(on_rays(solid, r, t), t[:, 1:] - t[:, :-1])
    fine = torch.linspace(1.0, 4.0, 24 * 50 + 1, dtype=F64).expand(200, -1)
    f = on_rays(solid, r, fine).abs()
    least = torch.minimum(f[:, :-1].reshape(200, 24, 50).amin(-1), f[:, 50::50])
    assert (free <= least + 1e-9).all() and (free > 0.5 * least).float().mean() > 0.5


@pytest.mark.parametrize("beta", [0.1, 0.01, 0.002])
def test_the_opacity_is_known_to_eps(beta):
    """The true error is <= eps at every sample of >= 99 % of rays, at beta or, where that failed, the raised one."""
    eps = 0.1
    r = rays(200, dtype=F64)
    b = samplers.sphere_bounds(r, 3.0)
    out = samplers.refine(both, r, b, beta, eps)
    assert (out.bound <= eps).double().mean() >= 0.95
    assert ((out.beta == beta) == (out.bound <= eps)).all()
    fine = b.near[:, None] + (b.far - b.near)[:, None] * torch.linspace(0, 1, 8001, dtype=F64)
    where = torch.cat([fine, out.t], -1).sort(-1).values.contiguous()
    width = out.beta[:, None]

    def depths(t, f, rule):  # optical depth up to each t
        s = laplace_density(f, width)
        s = s[:, :-1] if rule == "left" else 0.5 * (s[:, 1:] + s[:, :-1])
        return torch.nn.functional.pad((s * (t[:, 1:] - t[:, :-1])).cumsum(-1), (1, 0))

    truth = depths(where, on_rays(both, r, where), "trapezoid").gather(1, torch.searchsorted(where, out.t))
    error = (torch.exp(-truth) - torch.exp(-depths(out.t, out.sdf, "left"))).abs().amax(-1)
    assert (error <= eps).double().mean() >= 0.99


def test_the_first_width_satisfies_the_bound():
    r = rays(50, dtype=F64)
    t = samplers.stratified(samplers.sphere_bounds(r, 3.0), 128).t
    length, f = t[:, 1:] - t[:, :-1], on_rays(both, r, t)
    wide = (length.square().sum(-1) / (4 * torch.log(torch.tensor(1.1, dtype=F64)))).sqrt()
    bound, _ = samplers.opacity_error_bound(length, f, samplers.free_distance(f, length), wide)
    assert (bound <= 0.1 + 1e-9).all()
    out = samplers.refine(both, r, samplers.sphere_bounds(r, 3.0), 1e-5, rounds=0)
    assert (out.beta <= wide + 1e-9).all() and (out.beta > 1e-5).any() and (out.rounds == 0).all()


def test_each_ray_ends_by_itself():
    r = rays(60, dtype=F64)
    asked = torch.zeros(60, dtype=torch.long)

    def counted(x, ray):
        asked.index_add_(0, ray, torch.ones_like(ray))
        return both(x)

    b = samplers.sphere_bounds(r, 3.0)
    out = samplers.refine(counted, r, b, 0.003)
    assert len(out.rounds.unique()) >= 3
    assert (asked == out.counts).all()  # no ray pays for another
    every = samplers.error_bounded(both, r, b, 0.003)
    check(every)
    for i in (0, 7, int(out.rounds.argmax())):
        only = slice(i, i + 1)
        one = samplers.error_bounded(both, Rays(r.o[only], r.d[only]), Bounds(b.near[only], b.far[only]), 0.003)
        torch.testing.assert_close(one.t[0], every.t[i], rtol=0, atol=1e-9)


def test_a_broken_sdf_is_told():
    r = rays(3)
    with pytest.raises(ValueError, match="SDF"):
        samplers.error_bounded(lambda x, ray: x[:, 0] * torch.nan, r, samplers.sphere_bounds(r, 3.0), 0.1)


# ------------------------------------------------------------------------------------------------- skipping space


def grid_of(sdf, R=49, reach=1.2, backend=None):
    axis = torch.linspace(-reach, reach, R)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return SdfGrid(sdf(x.reshape(-1, 3)).reshape(R, R, R), [-reach] * 3, 2 * reach / (R - 1), backend)


@pytest.mark.parametrize("backend", ["torch", None])
def test_the_band_is_found_by_marching(backend):
    r = rays(300)
    s = samplers.march_band(grid_of(both, backend=backend), r, 17, 0.05)
    check(s)
    t = torch.linspace(0, 5, 4001).expand(300, -1)
    f = on_rays(both, r, t)
    hits = (f < 0).any(-1)
    first = t.gather(1, (f < 0).float().argmax(-1, keepdim=True))[:, 0]
    assert s.live[hits].all() and not s.live[f.amin(-1) > 0.06].any()
    held = (s.t[:, 0] <= first + 1e-3) & (s.t[:, -1] >= first - 1e-3)
    assert held[hits].float().mean() > 0.99
    assert (s.t[:, -1] - s.t[:, 0])[hits].median() < 0.3  # of 5 m


def test_a_cached_sdf_serves_the_error_bounded_sampler():
    r = rays(100)
    cache = grid_of(both)
    b = samplers.box_bounds(r, cache.lo, cache.hi)
    s = samplers.error_bounded(lambda x, ray: cache.sample_sdf(x)[0], r, b, 0.02)
    check(s)
    t = torch.linspace(0, 5, 4001).expand(100, -1)
    f = on_rays(both, r, t)
    hits = f.amin(-1) < -0.05
    first = t.gather(1, (f < 0).float().argmax(-1, keepdim=True))
    assert ((s.t - first).abs() < 0.1).sum(-1)[hits].min() > 10


def test_occupancy_skips_only_what_is_empty():
    r = rays(200)
    lo, hi = torch.full((3,), -1.2), torch.full((3,), 1.2)
    h = 2.4 / 32
    band = 0.02
    grid = samplers.occupancy(lambda x: -both(x).abs(), lo, hi, 32, -(band + h * 3**0.5 / 2))
    s = samplers.skip_empty(grid, r, step=0.03)
    check(s)
    t = torch.linspace(0, 5, 2501).expand(200, -1)
    near = on_rays(both, r, t).abs() < band
    k = torch.searchsorted(s.t.contiguous(), t.contiguous(), right=True) - 1
    live = (k >= 0) & (k < s.live.shape[1]) & s.live.gather(1, k.clamp(0, s.live.shape[1] - 1))
    assert live[near].all()
    full = samplers.skip_empty(samplers.OccupancyGrid(torch.ones_like(grid.cells), lo, h), r, step=0.03)
    assert s.counts.sum() < 0.5 * full.counts.sum()
    b = samplers.sphere_bounds(r, 0.3)
    inner = samplers.skip_empty(grid, r, b, step=0.03)
    assert (inner.t >= b.near[:, None])[inner.counts > 0].all() and (inner.t <= b.far[:, None])[inner.counts > 0].all()
    nothing = samplers.skip_empty(samplers.OccupancyGrid(torch.zeros_like(grid.cells), lo, h), r)
    check(nothing)
    assert nothing.t.shape == (200, 2) and not nothing.live.any()


def test_compact_keeps_live_intervals_as_they_are():
    g = torch.Generator().manual_seed(0)
    t = torch.rand(50, 30, generator=g).sort(-1).values
    s = Samples(t, torch.rand(50, 29, generator=g) < 0.3)
    c = samplers.compact(s)
    check(c)
    for i in range(50):
        want = [(a.item(), b.item()) for a, b, k in zip(s.t[i], s.t[i, 1:], s.live[i], strict=False) if k]
        assert [(a.item(), b.item()) for a, b, k in zip(c.t[i], c.t[i, 1:], c.live[i], strict=False) if k] == want
    assert c.t.shape[1] < 30
