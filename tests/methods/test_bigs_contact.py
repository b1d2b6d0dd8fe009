"""Contact in metres, on balls and boxes whose overlap is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold.geometry.queries import MeshQueries
from handhold.kernels.grid import SdfGrid
from handhold.methods.bigs_contact import (
    SOFT,
    attraction,
    distances,
    entering,
    figures,
    find_pairs,
    fingers,
    overlap,
    untouched,
)

pytestmark = pytest.mark.usefixtures("one_thread")
RADIUS = 0.04


def ball_grid() -> SdfGrid:
    axis = torch.linspace(-0.08, 0.08, 33)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return SdfGrid(x.norm(dim=-1) - RADIUS, [-0.08] * 3, float(axis[1] - axis[0]))


def box(lo, hi):
    lo, hi = np.asarray(lo, float), np.asarray(hi, float)
    v = np.array([[(lo, hi)[b][k] for k, b in enumerate((i >> 2 & 1, i >> 1 & 1, i & 1))] for i in range(8)])
    f = [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1],
         [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4], [1, 5, 7], [1, 7, 3]]  # fmt: skip
    return v, np.array(f)


def test_what_is_apart_is_not_pushed():
    x = torch.tensor([[0.05, 0, 0], [0.5, 0, 0], [0, RADIUS - 0.5 * SOFT, 0]], requires_grad=True)
    loss = overlap(distances(ball_grid(), x)[0])
    assert loss == 0
    loss.backward()
    assert (x.grad == 0).all()


def test_overlap_falls_along_the_way_out():
    costs = []
    for depth in (0.02, 0.012, 0.008, 0.004):
        x = torch.tensor([[RADIUS - depth, 0, 0]], requires_grad=True)
        loss = overlap(distances(ball_grid(), x)[0])
        loss.backward()
        assert x.grad[0, 0] < 0 and x.grad[0, 1:].abs().max() < 0.2 * -x.grad[0, 0]
        costs.append(loss.item())
    assert costs == sorted(costs, reverse=True) and costs[-1] > 0


def test_pairs_attract_in_metres():
    x = torch.tensor([[0.0, 0, 0.02]], requires_grad=True)
    loss = attraction(x, torch.zeros(1, 3))
    loss.backward()
    assert loss.item() == pytest.approx(0.018) and x.grad[0, 2] == pytest.approx(1.0)
    near = torch.tensor([[0.0, 0, 0.002]])
    assert attraction(near, torch.zeros(1, 3)) == pytest.approx(0.5 * 0.002**2 / 0.004)
    assert attraction(torch.zeros(0, 3), torch.zeros(0, 3)) == 0


def test_only_lasting_contacts_in_one_place_make_pairs():
    v, f = box([-0.05] * 3, [0.05] * 3)
    hand = np.full((10, 4, 3), 0.2)
    hand[:, 0] = [0.054, 0, 0]  # holds throughout
    hand[2:4, 1] = [0.054, 0.02, 0]  # touches for two frames
    hand[:, 2] = np.stack([np.full(10, 0.054), np.linspace(-0.05, 0.05, 10), np.zeros(10)], -1)  # slides
    hand[9] = np.nan
    pairs = find_pairs(hand, MeshQueries(v, f), near=0.01, lasting=5)
    assert pairs.ids.tolist() == [0] and np.allclose(pairs.anchors, [[0.05, 0, 0]], atol=1e-9)
    assert pairs.active[:9].all() and not pairs.active[9].any()
    nothing = find_pairs(np.full((3, 2, 3), 0.5), MeshQueries(v, f))
    assert len(nothing.ids) == 0 and nothing.active.shape == (3, 0)


def test_figures_of_two_boxes():
    v, f = box([0, 0, 0], [0.1] * 3)
    other, _ = box([0.08, 0.02, 0.02], [0.18, 0.08, 0.08])
    found = figures(np.stack([other, np.full_like(other, np.nan)]), f, MeshQueries(v, f), np.array([0, 1]))
    assert found.frames == 1 and found.penetration_cm3 == pytest.approx(72, rel=1e-3)
    assert np.isnan(figures(other[None] * np.nan, f, MeshQueries(v, f), np.array([0])).contact)


def test_only_parts_that_touch_nowhere_are_pulled():
    weights = torch.eye(16)[[0, 0, 1, 3, 4, 13, 15]]
    part = fingers(weights)
    assert part.tolist() == [0, 0, 1, 1, 2, 5, 5]
    distance = torch.tensor([0.01, 0.02, 0.01, -0.001, 0.004, 0.003, 0.002])
    assert untouched(distance, part).tolist() == [True, True, False, False, True, True, True]


def test_a_fingertip_past_the_middle_is_not_pushed_through():
    x = torch.tensor([[0.0, 0.0, 0.9], [0.0, 0.0, -0.4], [0.0, 0.0, 1.2]]) * RADIUS
    down = torch.tensor([[0.0, 0.0, -1.0]]).expand(3, -1)  # a finger from above; the second tip is past the middle
    distance, gradient = distances(ball_grid(), x)
    assert distance[0] < 0 and distance[1] < 0 and distance[2] > 0
    kept = entering(distance, down, gradient)
    assert kept[0] == distance[0] and kept[1] == 1 and kept[2] == distance[2]
