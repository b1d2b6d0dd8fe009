"""Laws of triangle meshes, on a cube and a sphere."""

import math

import numpy as np
import pytest
import torch

from handhold.geometry import meshes

CUBE_V = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], dtype=torch.float64)
CUBE_F = torch.tensor(
    [
        [0, 1, 3],
        [0, 3, 2],
        [4, 6, 7],
        [4, 7, 5],
        [0, 4, 5],
        [0, 5, 1],
        [2, 3, 7],
        [2, 7, 6],
        [0, 2, 6],
        [0, 6, 4],
        [1, 5, 7],
        [1, 7, 3],
    ]
)


def test_cube():
    assert meshes.is_watertight(CUBE_F) and meshes.euler_characteristic(CUBE_F) == 2
    assert float(meshes.area(CUBE_V, CUBE_F)) == pytest.approx(6)
    assert float(meshes.volume(CUBE_V, CUBE_F)) == pytest.approx(1)
    out = (meshes.face_normals(CUBE_V, CUBE_F) * (meshes.corners(CUBE_V, CUBE_F)[0] - 0.5)).sum(-1)
    assert (out > 0).all()
    assert ((meshes.vertex_normals(CUBE_V, CUBE_F) * (CUBE_V - 0.5)).sum(-1) > 0).all()


def test_reversed_faces_turn_the_volume():
    assert float(meshes.volume(CUBE_V, CUBE_F.flip(-1))) == pytest.approx(-1)


def test_holes_are_found_and_filled():
    open_ = CUBE_F[2:].numpy()
    assert not meshes.is_watertight(open_)
    (ring,) = meshes.boundary_loops(open_)
    assert sorted(ring) == [0, 1, 2, 3]
    for strips in (1, 3):
        faces, rings = meshes.fill_holes(open_, 8, strips)
        v = torch.cat([CUBE_V, meshes.hole_vertices(CUBE_V, rings, strips)])
        assert len(v) == faces.max() + 1 == 9 + 4 * (strips - 1)
        assert meshes.is_watertight(faces) and meshes.euler_characteristic(faces) == 2
        assert float(meshes.volume(v, torch.as_tensor(faces))) == pytest.approx(1)


def test_one_flipped_face_is_not_watertight():
    bad = CUBE_F.clone()
    bad[0] = bad[0].flip(-1)
    assert not meshes.is_watertight(bad) and not meshes.is_watertight(np.zeros((0, 3), int))


def test_samples_lie_on_the_surface_in_proportion_to_area():
    v = CUBE_V * torch.tensor([4.0, 1, 1], dtype=torch.float64)
    p, face, bary = meshes.sample_surface(v, CUBE_F, 20000, torch.Generator().manual_seed(0))
    assert meshes.closest_point(p[:200], v, CUBE_F).distance.max() < 1e-12
    assert (bary >= 0).all() and torch.allclose(bary.sum(-1), torch.ones(20000, dtype=torch.float64))
    ends = float(((p[:, 0] < 1e-9) | (p[:, 0] > 4 - 1e-9)).double().mean())
    assert ends == pytest.approx(2 / 18, abs=0.01)


@pytest.mark.parametrize("backend", [None, "torch"])
def test_closest_point_equals_brute_force_inside_and_far_away(backend):
    gen = torch.Generator().manual_seed(1)
    v = torch.randn(300, 3, generator=gen, dtype=torch.float64)
    f = torch.randint(0, 300, (500, 3), generator=gen)
    f = f[(f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 0] != f[:, 2])]
    q = 3 * torch.randn(200, 3, generator=gen, dtype=torch.float64)
    got = meshes.closest_point(q, v, f, backend=backend)
    tri = torch.stack(meshes.corners(v, f), -2)
    u = torch.rand(4000, 3, generator=gen, dtype=torch.float64)
    sampled = (tri[:, None] * (u / u.sum(-1, keepdim=True))[None, :40, :, None]).sum(-2).reshape(-1, 3)
    assert (got.distance <= torch.cdist(q, sampled).min(-1).values + 1e-9).all()
    bary = meshes.closest_on_triangles(
        q[:, None].expand(-1, len(f), -1), *(tri[None, :, k].expand(len(q), -1, -1) for k in range(3))
    )
    brute = ((bary[..., None] * tri).sum(-2) - q[:, None]).norm(dim=-1).min(-1).values
    assert (got.distance - brute).abs().max() < 1e-12
    assert ((got.points - q).norm(dim=-1) - got.distance).abs().max() < 1e-12


def test_closest_point_regions_of_one_triangle():
    v, f = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0]]), torch.tensor([[0, 1, 2]])
    q = torch.tensor([[0.2, 0.2, 5], [-1, -1, 0], [2, -1, 0], [0.5, -3, 1], [1, 1, 0]])
    want = torch.tensor([[0.2, 0.2, 0], [0, 0, 0], [1, 0, 0], [0.5, 0, 0], [0.5, 0.5, 0]])
    assert torch.allclose(meshes.closest_point(q, v, f).points, want, atol=1e-6)
    assert len(meshes.closest_point(q[:0], v, f).points) == 0


def test_degenerate_triangle_gives_no_nan():
    v = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0]])
    c = meshes.closest_point(torch.tensor([[1.5, 1, 0]]), v, torch.tensor([[0, 1, 2], [0, 3, 3]]))
    assert math.isclose(float(c.distance[0]), 1.0, rel_tol=1e-6) and torch.isfinite(c.bary).all()
