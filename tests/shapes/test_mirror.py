"""Unseen surface completed from its mirror image, on solids whose planes are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from handhold.kernels.grid import SdfGrid
from handhold.shapes.mirror import Mirror, complete, mirrors, trust
from handhold.shapes.sdf import nodes, redistance, surface

R, SIDE = 40, 0.12
HALF = np.array([0.03, 0.045, 0.02])
TILT = np.linalg.qr(np.random.default_rng(3).normal(size=(3, 3)))[0]  # the solids' axes, as columns


def everywhere(x: np.ndarray) -> np.ndarray:
    return np.zeros(len(x))


def box(x: np.ndarray, half: np.ndarray = HALF, at=(0.0, 0.0, 0.0)) -> np.ndarray:
    q = np.abs(x @ TILT - at) - half
    return np.linalg.norm(np.maximum(q, 0), axis=1) + np.minimum(q.max(1), 0)


def grid_of(values: np.ndarray) -> SdfGrid:
    return SdfGrid(torch.from_numpy(values.reshape(R, R, R)).float(), np.full(3, -SIDE / 2), SIDE / (R - 1))


def at_nodes() -> np.ndarray:
    return nodes(grid_of(np.zeros(R**3)))


def dented(depth: float = 0.008):
    """A box whose side +x was not seen in the middle, and dented there."""
    x = at_nodes()
    local = x @ TILT
    hole = 0.02 - np.linalg.norm((local - [HALF[0] + 0.02 - depth, 0, 0]), axis=1)
    grid = grid_of(np.maximum(box(x), hole))
    mesh, _ = surface(grid)
    v = mesh.vertices @ TILT
    seen = ~((v[:, 0] > 0.015) & (np.abs(v[:, 1]) < 0.022))
    return grid, replace(mesh, observed=seen)


def off(mesh) -> float:
    return float(np.abs(box(mesh.vertices.astype(float))).max())


def test_the_planes_of_a_box_are_found_and_fill_its_dent():
    grid, mesh = dented()
    planes = mirrors(mesh, grid, everywhere)
    best = max(planes, key=lambda m: abs(m.normal @ TILT[:, 0]))
    assert abs(best.normal @ TILT[:, 0]) > 0.998 and abs(best.offset) < 0.001 and best.error < 0.001
    whole, filled = complete(grid, mesh, planes, everywhere)
    assert off(mesh) > 0.006 and off(surface(whole)[0]) < 0.0025
    assert 0.02 < filled.mean() < 0.5


def test_what_was_seen_stays():
    grid, mesh = dented()
    whole, filled = complete(grid, mesh, mirrors(mesh, grid, everywhere), everywhere)
    redistance(grid)
    far = np.abs(nodes(grid) @ TILT - [HALF[0], 0, 0]).max(1) > 0.035
    far &= np.abs(box(nodes(grid))) < grid.h
    before, after = (g.data[..., 0].numpy().ravel()[far] for g in (grid, whole))
    assert np.abs(after - before).max() < 1e-6 and filled.ravel()[far].max() < 0.05


def test_a_handle_forbids_the_plane_it_breaks():
    x = at_nodes()
    values = np.minimum(box(x, np.array([0.02, 0.04, 0.02])), box(x, np.array([0.015, 0.012, 0.006]), (0.035, 0, 0)))
    grid = grid_of(values)
    mesh, _ = surface(grid)
    planes = mirrors(replace(mesh, observed=(mesh.vertices @ TILT)[:, 2] > -0.015), grid, everywhere)
    assert planes and all(abs(m.normal @ TILT[:, 0]) < 0.9 for m in planes)


def test_the_middle_of_what_is_seen_is_no_plane():
    grid, mesh = dented()
    half = replace(mesh, observed=(mesh.vertices @ TILT)[:, 1] < 0.0)
    planes = mirrors(half, grid, everywhere)
    assert planes and all(abs(m.normal @ TILT[:, 1]) < 0.5 or abs(m.offset) < 0.001 for m in planes)


def test_a_reflection_into_empty_space_is_refused():
    grid, mesh = dented()
    mesh = replace(mesh, observed=(mesh.vertices @ TILT)[:, 0] < 0.016)
    along = lambda planes: [m for m in planes if abs(m.normal @ TILT[:, 0]) > 0.9]  # noqa: E731
    empty = lambda x: 0.02 * ((x @ TILT)[:, 0] > 0.02)  # noqa: E731
    assert along(mirrors(mesh, grid, everywhere)) and not along(mirrors(mesh, grid, empty))


def test_nothing_is_completed_into_a_hand():
    class Hand:
        def distance(self, x):
            return 0.02 - x @ TILT[:, 0]  # all beyond the plane x = 0.02

    grid, mesh = dented()
    whole, _ = complete(grid, mesh, [Mirror(TILT[:, 0], 0.0, 0.0, 0.5)], everywhere, [Hand()])
    v = surface(whole)[0].vertices @ TILT
    inner = (np.abs(v[:, 1]) < 0.01) & (np.abs(v[:, 2]) < 0.01) & (v[:, 0] > 0)
    assert v[inner, 0].max() < 0.0225


def test_a_reflection_twice_is_the_point_itself_and_trust_rises_from_the_unseen():
    x = np.random.default_rng(0).normal(size=(20, 3))
    m = Mirror(TILT[:, 1], 0.3, 0.0, 1.0)
    assert np.allclose(m(m(x)), x) and np.allclose(np.linalg.norm(m(x) - m(-x), axis=1), np.linalg.norm(2 * x, axis=1))
    _, mesh = dented()
    t = trust(mesh)
    assert (t[~mesh.observed] == 0).all() and t.max() == 1 and trust(replace(mesh, observed=t > -1)).min() == 1
