"""Gaussians that bones carry: they go where skin goes, stretch with it, and their file says no nonsense."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold.geometry.rigid import matrix_from_quat, rigid, so3_exp
from handhold.hand import HandModel
from handhold.shapes.gaussians import Gaussians, axes_of
from handhold.shapes.skinned import SkinnedGaussians, colors_at, from_arrays

pytestmark = pytest.mark.usefixtures("one_thread")


def some(n: int = 40, dtype: torch.dtype = torch.float32) -> Gaussians:
    r = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.rand(*shape, generator=r, dtype=dtype)  # noqa: E731
    means, scales = 0.1 * (draw(n, 3) - 0.5), 0.001 + 0.004 * draw(n, 3)
    return Gaussians(means, draw(n, 4) - 0.5, scales, draw(n), draw(n, 3), torch.full((n,), 2))


def test_gaussians_on_vertices_follow_them_through_any_pose():
    model = HandModel.open("left").sealed()
    shaped = model.with_shape(torch.tensor([1.0, -0.7, 0.3]))
    n = len(model.v_template)
    ones = torch.ones(n, 1)
    rest = Gaussians(shaped.vertices, ones * torch.tensor([1.0, 0, 0, 0]), 0.001 * ones.expand(n, 3), ones[:, 0],
                     ones.expand(n, 3), torch.zeros(n, dtype=torch.int64))  # fmt: skip
    theta = 0.5 * torch.randn(16, 3, generator=torch.Generator().manual_seed(1))
    posed = shaped.with_pose(theta, torch.tensor([0.1, 0.2, 0.5]))
    at = SkinnedGaussians(rest, model.weights).posed(posed.bone_transforms)
    assert (at.means - posed.vertices).abs().max() < 1e-6 and torch.equal(at.ids, rest.ids)


def test_covariance_takes_the_whole_blended_matrix():
    g = some()
    a, b = so3_exp(torch.tensor([0.3, 0.2, -0.5])), so3_exp(torch.tensor([-0.8, 0.1, 0.4]))
    bones = torch.stack([rigid(a, torch.tensor([0.0, 0.1, 0])), rigid(b, torch.tensor([0.2, 0, 0]))])
    w = torch.rand(len(g), generator=torch.Generator().manual_seed(2))[:, None]
    posed = SkinnedGaussians(g, torch.cat([w, 1 - w], 1)).posed(bones)
    blend = w[..., None] * a + (1 - w)[..., None] * b  # not a rotation: it shrinks
    assert torch.allclose(posed.covariance(), blend @ g.covariance() @ blend.mT, atol=1e-9)
    with pytest.raises(ValueError, match="bones are"):
        SkinnedGaussians(g, torch.cat([w, 1 - w], 1)).posed(bones[:1])


def test_gradients_reach_gaussians_weights_and_bones():
    g = some(5, torch.float64)
    parts = [g.means, g.quats, g.scales, torch.rand(5, 2, dtype=torch.float64), torch.zeros(2, 3, dtype=torch.float64)]
    aim = torch.randn(5, 3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)

    def loss(means, quats, scales, weights, turn):
        bones = rigid(so3_exp(turn), turn + 0.1)
        posed = SkinnedGaussians(g.with_values(means=means, quats=quats, scales=scales), weights).posed(bones)
        return (posed.means * aim[:, 0]).sum() + 1e4 * (posed.covariance() * aim).sum()

    assert torch.autograd.gradcheck(loss, [p.clone().requires_grad_() for p in parts], atol=1e-4)


def test_arrays_round_trip():
    g = SkinnedGaussians(some(), torch.full((40, 16), 1 / 16))
    again = from_arrays(g.arrays(), 2, 16)
    assert all(torch.equal(getattr(again.rest, k), getattr(g.rest, k)) for k in ("means", "quats", "colors", "ids"))
    assert torch.allclose(again.weights, g.weights) and isinstance(from_arrays(g.arrays()), Gaussians)
    assert len(from_arrays({k: v[:0] for k, v in g.arrays().items()}, 0, 16)) == 0


@pytest.mark.parametrize(
    ("name", "spoil", "why"),
    [
        ("means", lambda v: v * np.nan, "not finite"),
        ("quats", lambda v: v[:, :3], "not numbers"),
        ("quats", lambda v: v * 0, "zeros"),
        ("opacities", lambda v: v + 2, "opacities in"),
        ("scales", lambda v: -v, "negative"),
        ("weights", lambda v: v * 2, "sum to 1"),
        ("weights", lambda v: v.astype("U4"), "not numbers"),
        ("colors", None, "there are no colors"),
    ],
)
def test_a_broken_file_is_told(name, spoil, why):
    arrays = SkinnedGaussians(some(), torch.full((40, 16), 1 / 16)).arrays()
    value = arrays.pop(name)
    if spoil is not None:
        arrays[name] = spoil(value)
    with pytest.raises(ValueError, match=why):
        from_arrays(arrays, 0, 16)


def test_colours_of_points_are_those_nearby():
    g = some(400)
    g = g.with_values(colors=(g.means - g.means.amin(0)) / 0.1)
    points = g.means[::7].numpy()
    assert np.abs(colors_at(g, points) - g.colors[::7].numpy()).max() < 0.25
    assert np.abs(colors_at(g, points, 1) - g.colors[::7].numpy()).max() < 1e-6
    constant = g.with_values(colors=torch.zeros(400, 4, 3))
    assert np.allclose(colors_at(constant, points), 0.5)
    assert np.allclose(colors_at(g.chosen(torch.zeros(400, dtype=torch.bool)), points), 0.5)


def test_axes_of_any_covariance():
    """Generic, round, flat, needle and empty ones: axes that give the covariance back, scales descending."""
    n = 200
    turn = so3_exp(2 * torch.randn(n, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64))
    s = torch.rand(n, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    s[:20], s[20:40, 1], s[40:60, 2], s[60:80, 1:], s[80:82] = 0.5, s[20:40, 0], 1e-6, 0, 0
    s *= 1e-3
    cov = (turn * s[:, None].square()) @ turn.mT
    quats, scales = axes_of(cov)
    axes = matrix_from_quat(quats)
    assert torch.allclose((axes * scales[:, None].square()) @ axes.mT, cov, rtol=0, atol=1e-19)
    assert (scales.diff(dim=1) <= 1e-9).all()
    assert torch.allclose(scales, s.sort(1, descending=True).values, rtol=1e-6, atol=1e-9)
    again, sizes = axes_of(cov.requires_grad_())
    assert torch.allclose(again, quats, atol=1e-12) and torch.equal(sizes, scales)
