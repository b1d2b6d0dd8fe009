"""What frames say about a surface: its colours, what was seen, and what becomes of the rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import trimesh

from handhold.scene import Mesh
from handhold.shapes.texture import fair_hidden, graph_laplacian, observe, spread, vertex_normals
from solids import K, around, colored, sphere_depth

RED, BLUE = np.array([0.8, 0.2, 0.1]), np.array([0.1, 0.3, 0.9])


def sphere(subdivisions: int = 3, radius: float = 0.05) -> Mesh:
    m = trimesh.creation.icosphere(subdivisions=subdivisions, radius=radius)
    return Mesh(np.asarray(m.vertices, np.float32), np.asarray(m.faces, np.int32))


def halves(x: np.ndarray) -> np.ndarray:
    return np.where(x[:, 2:] > 0, RED, BLUE)


def test_two_coloured_sphere_seen_from_one_side():
    mesh, poses = sphere(), around(12, 0.3, front=True)
    depths = [sphere_depth(p, 0.05) for p in poses]
    frames = np.stack([colored(p, d, halves) for p, d in zip(poses, depths, strict=True)])
    inside = np.isfinite(np.stack(depths))
    poses = np.concatenate([poses, np.full((1, 4, 4), np.nan)])  # a frame without a pose is not asked
    frames, inside = (np.concatenate([a, a[:1]]) for a in (frames, inside))
    mesh = observe(mesh, frames, inside, K, poses, np.ones(len(poses)), 0.005)
    v = mesh.vertices / 0.05
    assert mesh.observed[v[:, 0] > 0.2].all() and not mesh.observed[v[:, 0] < -0.95].any()
    clear = mesh.observed & (np.abs(v[:, 2]) > 0.15)
    assert np.abs(mesh.colors - halves(v))[clear].max() < 0.1
    assert np.isfinite(mesh.colors).all() and (mesh.colors >= 0).all() and (mesh.colors <= 1).all()
    assert np.abs(mesh.colors - 0.16).max(1)[~mesh.observed].min() > 0.1  # spread from what was seen, not background


def test_a_passing_colour_is_outvoted():
    """Something green over the object's pixels in one frame of eight changes little where the others see too."""
    mesh, poses = sphere(), around(8, 0.3, front=True)
    depths = [sphere_depth(p, 0.05) for p in poses]
    frames = np.stack([colored(p, d, lambda x: np.tile(RED, (len(x), 1))) for p, d in zip(poses, depths, strict=True)])
    frames[3] = (0, 255, 0)
    mesh = observe(mesh, frames, np.isfinite(np.stack(depths)), K, poses, np.ones(8), 0.005)
    middle = mesh.vertices[:, 0] > 0.8 * 0.05
    assert np.abs(mesh.colors - RED)[middle].max() < 0.05


def test_what_hides_and_what_is_masked_is_not_observed():
    mesh, poses = sphere(), around(12, 0.3)
    depths = [sphere_depth(p, 0.05) for p in poses]
    frames = np.stack([colored(p, d, halves) for p, d in zip(poses, depths, strict=True)])
    inside = np.isfinite(np.stack(depths))
    assert observe(mesh, frames, inside, K, poses, np.ones(12), 0.005).observed.all()
    nothing = observe(mesh, frames, np.zeros_like(inside), K, poses, np.ones(12), 0.005)
    assert not nothing.observed.any() and np.isfinite(nothing.colors).all()
    # a second sphere around the first hides it altogether
    shell = sphere(3, 0.07)
    faces = np.concatenate([mesh.faces, shell.faces + len(mesh.vertices)])
    both = Mesh(np.concatenate([mesh.vertices, shell.vertices]), faces.astype(np.int32))
    seen = observe(both, frames, np.ones_like(inside), K, poses, np.ones(12), 0.008).observed
    assert not seen[: len(mesh.vertices)].any() and seen[len(mesh.vertices) :].mean() > 0.9


def test_normals_of_a_sphere_point_outward():
    mesh = sphere()
    v = mesh.vertices.astype(np.float64)
    assert np.einsum("ij,ij->i", vertex_normals(v, mesh.faces), v / 0.05).min() > 0.99


def test_laplacian_kills_constants_and_is_row_stochastic():
    mesh = sphere(1)
    lap = graph_laplacian(mesh.faces, len(mesh.vertices))
    assert np.abs(lap @ np.ones(len(mesh.vertices))).max() < 1e-12 and np.allclose(lap.diagonal(), 1)
    assert ((lap.toarray() - np.eye(len(mesh.vertices))) <= 0).all()


def test_spread_is_harmonic():
    mesh = sphere()
    known = mesh.vertices[:, 0] > 0
    constant = spread(np.where(known[:, None], [0.3, 0.7], 99.0), known, mesh.faces)
    assert np.abs(constant - [0.3, 0.7]).max() < 1e-4
    values = np.random.default_rng(0).random((len(known), 2))
    filled = spread(values, known, mesh.faces)
    assert (filled[known] == values[known]).all()
    for k in range(2):  # maximum principle
        assert values[known, k].min() - 1e-6 <= filled[~known, k].min()
        assert filled[~known, k].max() <= values[known, k].max() + 1e-6
    lap = graph_laplacian(mesh.faces, len(known))
    assert np.abs((lap @ filled)[~known]).max() < 1e-6


def plane(n: int = 21, side: float = 0.1) -> Mesh:
    x = np.linspace(-side / 2, side / 2, n)
    xx, yy = np.meshgrid(x, x, indexing="ij")
    a = (np.arange(n - 1)[:, None] * n + np.arange(n - 1)).ravel()
    faces = np.concatenate([np.stack([a, a + n, a + 1], 1), np.stack([a + 1, a + n, a + n + 1], 1)])
    return Mesh(np.stack([xx, yy, 0 * xx], -1).reshape(-1, 3).astype(np.float32), faces.astype(np.int32))


def test_fairing_closes_a_dent_and_leaves_what_was_seen():
    flat = plane()
    out = np.linalg.norm(flat.vertices[:, :2], axis=1)
    dented = flat.vertices.copy()
    dented[out < 0.02, 2] -= 0.01
    for rings, moved in ((0, 0.02), (2, 0.035)):
        faired = fair_hidden(replace(flat, vertices=dented, observed=out >= 0.02), rings=rings).vertices
        assert (faired[out > moved] == dented[out > moved]).all()
        assert np.abs(faired[:, 2]).max() < 0.001 and np.abs(faired - flat.vertices)[out < 0.02].max() < 0.002

    ball = sphere()
    cap = ball.vertices[:, 0] < -0.04
    dented = ball.vertices.copy()
    dented[cap] *= 0.8
    faired = fair_hidden(replace(ball, vertices=dented, observed=~cap), rings=0).vertices
    r = np.linalg.norm(faired, axis=1)
    assert (faired[~cap] == dented[~cap]).all() and abs(r[cap].mean() - 0.05) < 0.2 * 0.01


def test_fairing_needs_both_kinds():
    mesh = plane(5)
    for observed in (None, np.ones(25, bool), np.zeros(25, bool)):
        assert fair_hidden(replace(mesh, observed=observed)).vertices is mesh.vertices
