"""Densify and prune: moments stay with their Gaussians, opacity is kept, the cap holds."""

from __future__ import annotations

import pytest
import torch

from handhold.methods.bigs_decoders import Explicit
from handhold.methods.bigs_density import Movement, densify
from handhold.methods.surfels import ObjectBase

pytestmark = pytest.mark.usefixtures("one_thread")


def setting(n: int = 10):
    eye = torch.eye(3).expand(n, 3, 3)
    points = torch.arange(n).float()[:, None].expand(n, 3).clone()
    quat = torch.tensor([1.0, 0, 0, 0]).expand(n, 4)
    base = ObjectBase(points, eye, quat, torch.rand(n, 3), torch.ones(n, 1, dtype=torch.bool), 1.0)
    source = Explicit(base.colors)
    opt = torch.optim.Adam(source.groups())
    sum(
        (p.square() * torch.arange(n).float().reshape(-1, *[1] * (p.ndim - 1))).sum() for p in source.parameters()
    ).backward()
    opt.step()
    return base, source, opt, torch.zeros(n, 3)


def test_moments_follow_their_rows():
    base, source, opt, start = setting()
    with torch.no_grad():
        source.opacity[4] = -8.0  # faint: goes
    before = opt.state[source.color]["exp_avg"].clone()
    movement = Movement.of(10, base.points.device)
    movement.total[:], movement.count[:] = torch.arange(10.0), 1
    base, start = densify(opt, source, base, start, movement, 11, torch.Generator().manual_seed(0), share=0.2)
    assert len(base.points) == len(start) == 11  # one less, two more
    kept = base.points[:, 0].long()
    assert kept.tolist() == [0, 1, 2, 3, 5, 6, 7, 8, 9, 9, 8]
    for p in source.parameters():
        assert len(p) == 11 and opt.state[p]["exp_avg"].shape == p.shape == opt.state[p]["exp_avg_sq"].shape
        assert any(p is q for g in opt.param_groups for q in g["params"])
    moved = opt.state[source.color]["exp_avg"]
    assert torch.equal(moved[:9], before[kept[:9]]) and (moved[9:] == 0).all()
    source.color.sum().backward()
    opt.step()


def test_twins_let_through_what_the_one_did_and_the_cap_holds():
    base, source, opt, start = setting()
    opacity = source.opacity.detach()[9].sigmoid()
    movement = Movement.of(10, base.points.device)
    movement.total[9], movement.count[:] = 1.0, 1
    base, start = densify(opt, source, base, start, movement, 11, torch.Generator().manual_seed(0), share=1.0)
    twins = source.opacity.detach()[[9, 10]].sigmoid()
    assert torch.isclose((1 - twins).prod(), 1 - opacity, atol=1e-4)
    again = Movement.of(11, base.points.device)
    again.total[:], again.count[:] = 1.0, 1
    base, start = densify(opt, source, base, start, again, 11, torch.Generator().manual_seed(0), share=1.0)
    assert len(base.points) == 11


def test_movement_is_per_pixel():
    m = Movement.of(1, torch.device("cpu"))
    m.add(torch.tensor([[0.0, 0, 2.0]]), torch.tensor([[3.0, 4.0, 9.0]]), 100.0)
    assert m.mean().item() == pytest.approx(5 * 2 / 100)
