"""Laws of volume rendering; the numbers are those of Laplace media worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from handhold.render import medium, samplers, volume
from handhold.render.samplers import Bounds, Rays, Samples
from handhold.render.volume import Along, Body, Matter, composite, evaluate, render_rays
from sdfs import box, coloured, rays, sphere

RED, BLUE = (0.9, 0.1, 0.1), (0.1, 0.2, 0.9)


def logistic(inv_s):
    return lambda a, b: medium.neus_optical_depth(a, b, inv_s)


def along_z(n: int, dtype=torch.float64):
    o = torch.zeros(n, 3, dtype=dtype)
    return Rays(o, torch.tensor([0.0, 0.0, 1.0], dtype=dtype).expand(n, 3).clone())


def even(lo: float, hi: float, n: int):
    return lambda r: samplers.stratified(Bounds(torch.full_like(r.o[:, 0], lo), torch.full_like(r.o[:, 0], hi)), n)


def fog(sigma: float, color, sample) -> Body:
    return volume.density_body(
        lambda p: (torch.full_like(p.length, sigma), p.x.new_tensor(color).expand_as(p.x)), sample
    )


def wall(x, at: float = 1.0):
    return at - x[:, 2]


# ----------------------------------------------------------------------------------------------------- quadrature


def test_a_laplace_wall_is_seen_where_it_should_be():
    beta = 0.01
    r = along_z(1)
    body = volume.sdf_body(
        coloured(wall, RED), lambda s: medium.laplace_density(s, beta), even(1 - 40 * beta, 1 + 40 * beta, 20001)
    )
    seen = evaluate(r, [body])

    def passed_at_wall(seen):
        at = int((seen.t[0] - 1).abs().argmin())
        return medium.transmittance(seen.tau.sum(-1))[0, at].item()

    assert passed_at_wall(seen) == pytest.approx(math.exp(-0.5), abs=0.002)
    picture = composite(seen)
    assert picture.depth.item() - 1 == pytest.approx(0.343 * beta, rel=0.05)
    assert picture.median_depth.item() - 1 == pytest.approx(0.336 * beta, rel=0.05)
    mid, w = 0.5 * (seen.t[:, 1:] + seen.t[:, :-1]), medium.weights(seen.tau)[..., 0]
    assert ((w * (mid - picture.depth) ** 2).sum().sqrt() / beta).item() == pytest.approx(1.61, abs=0.02)
    torch.testing.assert_close(picture.normal, torch.tensor([[0.0, 0.0, -1.0]], dtype=torch.float64))

    both = evaluate(r, [body, body])
    assert passed_at_wall(both) == pytest.approx(math.exp(-1), abs=0.002)
    picture = composite(both)
    assert picture.depth.item() - 1 == pytest.approx(-0.532 * beta, rel=0.05)
    torch.testing.assert_close(picture.shares, picture.opacity[:, None].expand(-1, 2) / 2)


def test_a_neus_wall_is_seen_without_offset():
    r = along_z(1)
    body = volume.neus_body(coloured(wall, RED), logistic(200.0), even(0.5, 1.5, 201))
    picture = render_rays(r, [body])
    assert picture.median_depth.item() == pytest.approx(1.0, abs=1e-6)
    assert picture.depth.item() == pytest.approx(1.0, abs=1e-4)
    # 20 samples across a hundred widths: still opaque, and the half is where it was.
    coarse = render_rays(r, [volume.neus_body(coloured(wall, RED), logistic(200.0), even(0.5, 1.5, 21))])
    torch.testing.assert_close(coarse.opacity, picture.opacity)


def test_colour_converges_with_the_spacing():
    r = along_z(1)

    def render(n):
        def field(p):
            x = p.x
            return 3 + 2 * torch.sin(5 * x[:, 2]), (0.5 + 0.4 * torch.cos(7 * x[:, 2:])).expand_as(x)

        return render_rays(r, [volume.density_body(field, even(0.0, 2.0, n + 1))]).rgb[0, 0].item()

    truth = render(8192)
    errors = [abs(render(n) - truth) for n in (32, 64, 128)]
    assert errors[0] < 2e-3
    assert errors[1] < 0.6 * errors[0] and errors[2] < 0.6 * errors[1]


def test_98_samples_see_what_20000_see():
    beta = 0.02
    r = along_z(40)
    r.o[:, 0] = torch.linspace(-0.3, 0.3, 40, dtype=torch.float64)
    r.o[:, 2] = -2
    density = medium.LaplaceDensity(beta)
    few = volume.sdf_body(
        coloured(sphere, RED),
        density,
        lambda r: samplers.error_bounded(lambda x, ray: sphere(x), r, samplers.sphere_bounds(r, 2.0), beta),
    )
    many = volume.sdf_body(coloured(sphere, RED), density, even(1.0, 3.0, 20001))
    with torch.no_grad():
        a, b = render_rays(r, [few]), render_rays(r, [many], chunk=10)
    assert (a.depth - b.depth).abs().max() < 0.3 * beta
    assert (a.median_depth - b.median_depth).abs().max() < 0.3 * beta


def test_median_depth_is_exact_in_a_constant_medium_and_has_a_gradient():
    r = along_z(1)
    sigma = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    body = Body(lambda p: Matter(sigma * p.length, torch.zeros_like(p.x)), even(0.0, 1.0, 4))
    out = render_rays(r, [body]).median_depth
    assert out.item() == pytest.approx(math.log(2) / 2)
    assert torch.autograd.grad(out, sigma)[0].item() == pytest.approx(-math.log(2) / 4)
    assert render_rays(r, [fog(0.1, RED, even(0.0, 1.0, 4))]).median_depth.item() == 0


# --------------------------------------------------------------------------------------------------- joint medium


@pytest.mark.parametrize("shared", [True, False])
def test_two_unit_media_pass_exp_minus_two(shared):
    r = along_z(1)
    g = torch.Generator().manual_seed(3)
    bounds = Bounds(torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))

    def body(color):
        own = samplers.stratified(bounds, 64, jitter=True, generator=g)
        return fog(1.0, color, lambda r: own), own.t

    (a, ta), (b, tb) = body(RED), body(BLUE)
    picture = render_rays(r, [a, b], shared=shared)
    assert 1 - picture.opacity.item() == pytest.approx(math.exp(-2), rel=1e-6)
    # Merged samples that keep their own density but take the merged list's intervals lose half of the matter.
    t = torch.cat([ta, tb], -1).sort(-1).values
    wrong = torch.exp(-(t[:, 1:] - t[:, :-1]).sum())
    assert wrong.item() == pytest.approx(0.370, abs=0.004)


@pytest.mark.parametrize("shared", [True, False])
def test_gaps_hold_no_matter(shared):
    g = torch.Generator().manual_seed(5)
    own = []
    for n in (12, 30, 7):
        t = torch.rand(40, n, generator=g, dtype=torch.float64).sort(-1).values
        own.append(Samples(t, torch.rand(40, n - 1, generator=g) < 0.6))
    bodies = [fog(1.0 + k, RED, lambda r, s=s: s) for k, s in enumerate(own)]
    picture = render_rays(along_z(40), bodies, shared=shared)
    depth = torch.stack([(1.0 + k) * ((s.t[:, 1:] - s.t[:, :-1]) * s.live).sum(-1) for k, s in enumerate(own)], -1)
    torch.testing.assert_close(picture.alone, 1 - torch.exp(-depth))
    torch.testing.assert_close(picture.opacity, 1 - torch.exp(-depth.sum(-1)))


def test_composite_is_the_joint_medium():
    g = torch.Generator().manual_seed(0)
    t = torch.rand(20, 41, generator=g).sort(-1).values
    sigma = 5 * torch.rand(20, 40, 2, generator=g)
    rgb = torch.rand(20, 40, 2, 3, generator=g)
    length = t[:, 1:] - t[:, :-1]
    joint = composite(Along(t, sigma * length[..., None], rgb), torch.ones(3))
    total = sigma.sum(-1)
    mixed = (sigma[..., None] * rgb).sum(2) / total[..., None]
    alpha = 1 - torch.exp(-total * length)
    passed = torch.cumprod(torch.cat([torch.ones(20, 1), 1 - alpha], -1), -1)
    want = ((passed[:, :-1] * alpha)[..., None] * mixed).sum(1) + passed[:, -1:]
    torch.testing.assert_close(joint.rgb, want, rtol=0, atol=1e-6)
    torch.testing.assert_close(joint.shares.sum(-1), joint.opacity, rtol=0, atol=1e-6)
    alone = composite(Along(t, sigma * length[..., None], rgb).only(1))
    torch.testing.assert_close(joint.alone[:, 1], alone.opacity, rtol=0, atol=1e-6)
    assert alone.shares.shape == (20, 1)


def two_bodies(beta: float = 0.01):
    def shell(sdf, radius, centre):
        return lambda r: samplers.error_bounded(
            lambda x, ray: sdf(x), r, samplers.sphere_bounds(r, radius, torch.tensor(centre, dtype=r.o.dtype)), beta
        )

    density = lambda s: medium.laplace_density(s, beta)  # noqa: E731
    return [
        volume.sdf_body(coloured(sphere, RED), density, shell(sphere, 0.6, (0.0, 0.0, 0.0))),
        volume.neus_body(coloured(box, BLUE), logistic(1 / beta), shell(box, 0.7, (0.5, 0.1, 0.0))),
    ]


def test_order_of_bodies_and_empty_bodies_change_nothing():
    r = rays(300)
    a, b = two_bodies()
    background = torch.tensor([0.2, 0.7, 0.3])
    empty = fog(0.0, (5.0, 5.0, 5.0), even(0.5, 4.0, 33))
    missed = fog(1.0, RED, lambda r: samplers.stratified(samplers.sphere_bounds(r, 1.0, 50.0), 9))
    with torch.no_grad():
        ab, ba = render_rays(r, [a, b], background), render_rays(r, [b, a], background)
        torch.testing.assert_close(ab.rgb, ba.rgb, rtol=0, atol=1e-6)
        torch.testing.assert_close(ab.shares, ba.shares.flip(-1), rtol=0, atol=1e-6)
        more = render_rays(r, [a, missed, b], background)
        torch.testing.assert_close(more.rgb, ab.rgb, rtol=0, atol=1e-6)
        assert (more.shares[:, 1] == 0).all()
        # The empty body's samples cut intervals, so what is compared is the same cut with and without it.
        cut = Body(lambda p: Matter(0 * p.length, p.x), empty.sample)
        torch.testing.assert_close(
            render_rays(r, [a, b, empty], background).rgb,
            render_rays(r, [a, b, cut], background).rgb,
            rtol=0,
            atol=1e-6,
        )
    assert 0.2 < (ab.opacity > 0.5).float().mean() < 0.95


def test_own_samples_give_the_joint_medium_too():
    r = rays(100)
    bodies = two_bodies()
    dense = [Body(b.matter, even(1.0, 4.0, 3001)) for b in bodies]
    asked = []

    def counted(b):
        def matter(p):
            asked.append(len(p.x))
            return b.matter(p)

        return Body(matter, b.sample)

    with torch.no_grad():
        truth = render_rays(r, dense, chunk=20)
        own = render_rays(r, [counted(b) for b in bodies], shared=False)
        own_cost, asked = sum(asked), []
        common = render_rays(r, [counted(b) for b in bodies])
        empty = fog(0.0, RED, even(0.5, 4.0, 33))
        more = render_rays(r, [empty, *bodies], shared=False)
    assert own_cost < 0.7 * sum(asked)  # the bodies' bounds overlap in part
    for x in (own, common):
        assert (x.rgb - truth.rgb).abs().mean() < 3e-3
        assert (x.shares - truth.shares).abs().mean() < 3e-3
    torch.testing.assert_close(more.rgb, own.rgb, rtol=0, atol=1e-6)
    torch.testing.assert_close(own.shares.sum(-1), own.opacity, rtol=0, atol=1e-6)


def test_frames_reach_samplers_and_fields():
    r = rays(30)._replace(frame=torch.arange(30) % 3)
    shift = torch.tensor([[0.0, 0, 0], [0.2, 0, 0], [0, 0.3, 0]])

    def sample(r):
        inside = samplers.sphere_bounds(r, 1.2)
        return samplers.error_bounded(lambda x, ray: sphere(x - shift[r.frame[ray]]), r, inside, 0.02)

    def field(p):
        return coloured(sphere, RED)(p._replace(x=p.x - shift[p.frame]))

    body = volume.sdf_body(field, lambda s: medium.laplace_density(s, 0.02), sample)
    with torch.no_grad():
        moving = render_rays(r, [body], chunk=11)
        for k in range(3):
            one = Rays(r.o[k::3], r.d[k::3], r.frame[k::3])
            torch.testing.assert_close(render_rays(one, [body]).depth, moving.depth[k::3], rtol=1e-4, atol=1e-4)


def test_a_body_is_not_asked_outside_its_own_samples():
    r = rays(50)
    far = []

    def field(p):
        far.append(p.x.norm(dim=-1).max().item())
        return torch.ones_like(p.length), torch.ones_like(p.x)

    ball = volume.density_body(field, lambda r: samplers.stratified(samplers.sphere_bounds(r, 0.5), 17))
    seen = evaluate(r, [ball, fog(1.0, RED, even(0.0, 6.0, 40))])
    assert max(far) <= 0.5
    mid = 0.5 * (seen.t[:, 1:] + seen.t[:, :-1])
    outside = (r.o[:, None] + mid[..., None] * r.d[:, None]).norm(dim=-1) > 0.5
    assert (seen.tau[..., 0][outside] == 0).all()


@pytest.mark.parametrize("shared", [True, False])
def test_bodies_of_both_densities_have_gradients(shared):
    r = rays(2, dtype=torch.float64, spread=0.2)
    o = r.o.requires_grad_()
    beta = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    s = torch.tensor(8.0, dtype=torch.float64, requires_grad=True)

    def render(o, beta, s):
        fixed = [even(1.5, 3.5, 7), even(1.7, 3.4, 6)]
        a = volume.sdf_body(coloured(sphere, RED), lambda f: medium.laplace_density(f, beta), fixed[0])
        b = volume.neus_body(coloured(box, BLUE), logistic(s), fixed[1])
        out = render_rays(Rays(o, r.d), [a, b], torch.ones(3, dtype=torch.float64), shared=shared)
        return out.rgb, out.depth, out.shares, out.alone

    assert gradcheck(render, (o, beta, s))


def test_float32_is_within_the_bars_of_float64():
    g = torch.Generator().manual_seed(0)
    t = 3 * torch.rand(40, 98, generator=g).sort(-1).values
    tau = torch.rand(40, 97, 3, generator=g) ** 6 * 3
    rgb, normal = torch.rand(40, 97, 3, 3, generator=g), torch.randn(40, 97, 3, 3, generator=g)

    def run(dtype):
        a = [x.to(dtype).requires_grad_() for x in (tau, rgb, normal)]
        r = composite(Along(t.to(dtype), *a), torch.ones(3, dtype=dtype))
        out = [r.rgb, r.opacity, r.depth, r.median_depth, r.normal, r.shares, r.alone]
        mix = [torch.linspace(0.5, 1.5, x.numel(), dtype=dtype).reshape(x.shape) for x in out]
        return out, torch.autograd.grad(sum((x * m).sum() for x, m in zip(out, mix, strict=True)), a)

    for part, bar in ((0, 1e-4), (1, 1e-3)):
        for x, y in zip(run(torch.float32)[part], run(torch.float64)[part], strict=True):
            assert (x - y).abs().max() <= bar * y.abs().max()


def test_composite_gradcheck():
    torch.manual_seed(0)
    t = torch.linspace(0, 1, 6, dtype=torch.float64).expand(2, 6)
    tau = torch.rand(2, 5, 2, dtype=torch.float64)
    tau[0, 2] = 0
    rgb = torch.rand(2, 5, 2, 3, dtype=torch.float64)
    normal = torch.randn(2, 5, 2, 3, dtype=torch.float64)

    def f(tau, rgb, normal, background):
        r = composite(Along(t, tau, rgb, normal), background)
        return r.rgb, r.opacity, r.depth, r.median_depth, r.normal, r.shares, r.alone

    background = torch.rand(3, dtype=torch.float64)
    assert gradcheck(f, tuple(x.requires_grad_() for x in (tau, rgb, normal, background)))


# ----------------------------------------------------------------------------------------------------- background


def test_background_is_exact_behind_nothing_and_hidden_behind_matter():
    r = along_z(2, torch.float32)
    color = torch.tensor([0.3, 0.123, 0.9])
    assert (render_rays(r, [fog(0.0, RED, even(0.0, 1.0, 9))], color).rgb == color).all()
    assert (render_rays(r, [], color).rgb == color).all()
    solid = fog(1e4, RED, even(0.0, 1.0, 9))
    assert (render_rays(r, [solid], color).rgb == render_rays(r, [solid], 1 - color).rgb).all()


def test_inverted_sphere_closes_the_scene():
    r = rays(64, distance=0.5, dtype=torch.float64)
    radii = []

    def field(p):
        q = p.x
        radii.append(q)
        torch.testing.assert_close(q[:, :3].norm(dim=-1), torch.ones_like(q[:, 3]))
        return 3 * torch.ones_like(q[:, 3]), (0.5 + 0.5 * q[:, :3])

    background = volume.inverted_sphere(field, 3.0, 64)
    assert (radii == []) and background(r).isfinite().all()
    s = radii[0][:, 3].reshape(64, 64)
    assert (s[:, 1:] < s[:, :-1]).all() and s.max() < 1 and s.min() > 0
    white = volume.inverted_sphere(lambda p: (p.x[:, 3], torch.ones_like(p.x[:, :3])), 3.0)
    torch.testing.assert_close(white(r), torch.ones(64, 3, dtype=torch.float64))
    haze = fog(0.3, (0.0, 0.0, 0.0), even(0.0, 2.0, 9))
    picture = render_rays(r, [haze], white, chunk=20)
    torch.testing.assert_close(picture.rgb, torch.full_like(r.o, math.exp(-0.6)))


# ---------------------------------------------------------------------------------------------------------- usage


def test_chunks_change_nothing():
    r = rays(50)
    with torch.no_grad():
        a = render_rays(r, two_bodies(), r.o)
        b = render_rays(r, two_bodies(), r.o, chunk=7)
    for x, y in zip(vars(a).values(), vars(b).values(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-5)


def test_bad_rays_and_bodies_are_refused():
    r = rays(4)
    o, d, _ = r
    for wrong in ((o[:, :2], d), (o, 2 * d), (o * torch.nan, d), (o, d[:2]), (o, d, torch.zeros(3))):
        with pytest.raises(ValueError, match="ray"):
            render_rays(Rays(*wrong), two_bodies())
    flat = Body(lambda p: Matter(p.length[:, None], p.x), even(0.0, 1.0, 4))
    with pytest.raises(ValueError, match="tau"):
        render_rays(r, [flat])
    with pytest.raises(ValueError, match="agree"):
        composite(Along(torch.zeros(1, 3), torch.zeros(1, 3, 1), torch.zeros(1, 3, 1, 3)))


def test_no_rays_and_rays_that_miss():
    r = rays(5)
    bodies = two_bodies()
    assert render_rays(Rays(r.o[:0], r.d[:0]), bodies).rgb.shape == (0, 3)
    away = render_rays(Rays(r.o, -r.d), bodies, torch.ones(3))
    for x in vars(away).values():
        assert x.isfinite().all()
    assert (away.rgb == 1).all() and (away.depth == 0).all()


def test_a_second_pass_looks_where_the_first_saw_something():
    r = rays(50, spread=0.1)
    density = lambda s: medium.laplace_density(s, 0.01)  # noqa: E731
    first = volume.sdf_body(coloured(sphere, RED), density, even(1.0, 4.0, 65))
    dense = volume.sdf_body(coloured(sphere, RED), density, even(1.0, 4.0, 4001))
    with torch.no_grad():
        truth, once = render_rays(r, [dense]), render_rays(r, [first])
        twice = render_rays(r, [volume.resampled(first, 32)])
    assert (twice.depth - truth.depth).abs().mean() < 0.3 * (once.depth - truth.depth).abs().mean()


def test_networks_may_run_in_half_precision():
    r = rays(5)
    half = Body(lambda p: Matter(p.length.half(), p.x.half()), even(0.0, 1.0, 5))
    assert render_rays(r, [half]).rgb.dtype == torch.float32


def test_samples_may_be_padded():
    r = along_z(1)
    plain = render_rays(r, [fog(1.0, RED, even(0.0, 1.0, 5))])
    t = torch.tensor([[0.0, 0.25, 0.5, 0.75, 1.0, 1.0, 1.0]], dtype=torch.float64)
    padded = Samples(t, t[:, 1:] > t[:, :-1])
    torch.testing.assert_close(render_rays(r, [fog(1.0, RED, lambda r: padded)]).rgb, plain.rgb)
