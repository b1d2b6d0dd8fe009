"""Mesh queries against every triangle tried in turn, and against solids whose answers are known."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from handhold.geometry import meshes
from handhold.geometry import points as points_of
from handhold.geometry.queries import (
    MeshQueries,
    intersection,
    intersection_by_sampling,
    nearest_points,
    penetration_depth,
    signed_distance,
    winding_number,
)
from handhold.kernels import _lib
from handhold.scene import Mesh
from handhold.shapes.extraction import extract_surface
from handhold.shapes.sdf import bake_sdf

BACKENDS = ["torch", *(["cpu"] if _lib.available() else [])]
BOX_F = np.array(
    [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4],
     [1, 5, 7], [1, 7, 3]]
)  # fmt: skip


def box(lo=(0.0, 0.0, 0.0), hi=(1.0, 1.0, 1.0)) -> tuple[np.ndarray, np.ndarray]:
    ends = np.array([lo, hi], float)
    return np.array([[ends[x, 0], ends[y, 1], ends[z, 2]] for x in (0, 1) for y in (0, 1) for z in (0, 1)]), BOX_F


@functools.cache
def sphere(radius=1.0, centre=(0.0, 0.0, 0.0), cells=24) -> tuple[np.ndarray, np.ndarray]:
    c = torch.tensor(centre)
    mesh, _ = extract_surface(lambda x: (x - c).norm(dim=-1) - radius, c - 1.2 * radius, c + 1.2 * radius, cells)
    return mesh.vertices.astype(float), mesh.faces.astype(np.int64)


def triangles(seed=0, count=300) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    f = rng.integers(0, 200, (count, 3))
    f = f[(f[:, 0] != f[:, 1]) & (f[:, 1] != f[:, 2]) & (f[:, 0] != f[:, 2])]
    return rng.normal(size=(200, 3)), f


def jack(cells=40) -> tuple[np.ndarray, np.ndarray]:
    """Three arms of different lengths and widths, about 0.1 across: no symmetry."""
    arms = torch.tensor([[0.06, 0.01, 0.0], [-0.01, 0.04, 0.0], [0.0, -0.01, 0.03]])
    width = torch.tensor([0.008, 0.012, 0.016])

    def field(x):
        along = ((x @ arms.T) / arms.square().sum(-1)).clamp(0, 1)
        return ((x[:, None] - along[..., None] * arms).norm(dim=-1) - width).amin(-1)

    mesh, _ = extract_surface(field, -0.03, 0.08, cells)
    return mesh.vertices.astype(float), mesh.faces.astype(np.int64)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearest_equals_every_triangle_tried(backend):
    v, f = triangles()
    rng = np.random.default_rng(1)
    q = 1.5 * rng.normal(size=(260, 3))
    q[:20], q[20:40] = v[:20], (v[f[:20, 0]] + v[f[:20, 1]]) / 2  # on vertices, on edges
    q[40:60], q[60:70] = v[f[:20]].mean(1), 100 * q[60:70]  # on faces, far away
    got = MeshQueries(v, f, backend).nearest(q)
    t = [torch.from_numpy(v[f[:, k]])[None].expand(len(q), -1, -1) for k in range(3)]
    p = torch.from_numpy(q)[:, None].expand(-1, len(f), -1)
    w = meshes.closest_on_triangles(p, *t)
    brute = ((w[..., None] * torch.stack(t, -2)).sum(-2) - p).norm(dim=-1).min(-1).values.numpy()
    assert np.abs(got.distance - brute).max() < 1e-12 and got.distance[:60].max() < 1e-12
    assert np.abs((v[f[got.face]] * got.bary[:, :, None]).sum(1) - got.points).max() < 1e-12
    assert np.abs(np.linalg.norm(got.points - q, axis=1) - got.distance).max() < 1e-12
    assert (got.bary >= 0).all() and np.allclose(got.bary.sum(1), 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_winding_number_of_soup_and_of_an_open_box(backend):
    v, f = triangles(2)
    q = 1.5 * np.random.default_rng(3).normal(size=(200, 3))
    a, b, c = (v[f[:, k]][None] - q[:, None] for k in range(3))
    la, lb, lc = (np.linalg.norm(x, axis=-1) for x in (a, b, c))
    top = (a * np.cross(b, c)).sum(-1)
    bottom = la * lb * lc + (a * b).sum(-1) * lc + (b * c).sum(-1) * la + (c * a).sum(-1) * lb
    brute = np.arctan2(top, bottom).sum(1) / (2 * np.pi)
    m = MeshQueries(v, f, backend)
    assert np.abs(m.winding_number(q, exact=True) - brute).max() < 1e-10
    assert np.abs(m.winding_number(q) - brute).max() < 0.05
    v, f = box()
    w = winding_number(
        np.array([[0.5, 0.5, 0.5], [3, 3, 3]]), v, f[2:], exact=True, backend=backend
    )  # a side is missing
    assert np.allclose(w[0], 5 / 6) and 0 < abs(w[1]) < 0.02
    assert list(MeshQueries(v, f[2:], backend).contains(np.array([[0.5, 0.5, 0.5], [-0.5, 0.5, 0.5]]))) == [True, False]
    assert list(MeshQueries(v, f[:, ::-1], backend).contains(np.array([[0.5, 0.5, 0.5], [2, 2, 2]]))) == [True, False]


@pytest.mark.parametrize("backend", BACKENDS)
def test_signed_distance_of_a_box_and_a_sphere(backend):
    q = np.random.default_rng(0).uniform(-1, 2, (500, 3))
    outside = np.abs(q - 0.5) - 0.5
    want = np.linalg.norm(np.maximum(outside, 0), axis=1) + np.minimum(outside.max(1), 0)
    assert np.abs(signed_distance(q, *box(), backend=backend) - want).max() < 1e-12
    got = signed_distance(q[:100], *sphere(0.8), backend=backend)
    assert np.abs(got - (np.linalg.norm(q[:100], axis=1) - 0.8)).max() < 8e-3


@pytest.mark.parametrize("backend", BACKENDS)
def test_first_hits(backend):
    m = MeshQueries(*box(), backend)
    o = np.array([[0.4, 0.3, -2], [0.4, 0.3, 0.5], [5, 5, 5], [0.4, 0.3, -2], [-1, 0.25, 0.5]])
    d = np.array([[0, 0, 2.0], [0, 0, -1], [1, 0, 0], [0, 0, -1], [1, 0, 0]])
    hits = m.first_hits(o, d)
    assert np.allclose(hits.t, [1, 0.5, np.inf, np.inf, 1])
    assert (hits.face >= 0).tolist() == [True, True, False, False, True]
    on = np.isfinite(hits.t)
    at = (m.vertices[m.faces[hits.face[on]]] * hits.bary[on][:, :, None]).sum(1)
    assert np.allclose(at, o[on] + hits.t[on, None] * d[on])
    v, f = triangles(4)
    rng = np.random.default_rng(5)
    o, d = 2 * rng.normal(size=(300, 3)), rng.normal(size=(300, 3))
    got, brute = MeshQueries(v, f, backend).first_hits(o, d), MeshQueries(v, f, "torch").first_hits(o, d)
    assert np.array_equal(got.face, brute.face) and np.allclose(got.t, brute.t) and np.isfinite(got.t).mean() > 0.2


def test_answers_have_the_kind_shape_and_type_of_the_points():
    v, f = box()
    m = MeshQueries(v, f)
    x = torch.rand(2, 5, 3, generator=torch.Generator().manual_seed(0))
    got = m.nearest(x)
    assert got.points.shape == (2, 5, 3) and got.bary.shape == (2, 5, 3) and got.distance.shape == (2, 5)
    assert got.distance.dtype == torch.float32 and got.face.dtype == torch.int64
    assert m.signed_distance(x.double()).dtype == torch.float64 and m.contains(x).dtype == torch.bool
    assert m.signed_distance(x.numpy()).dtype == np.float32 and m.nearest([0.5, 0.5, 2]).distance == 1
    assert m.nearest(np.zeros((0, 3))).distance.shape == (0,) and m.signed_distance(x[:0]).shape == (0, 5)


def test_gradients_reach_points_and_vertices():
    v, f = triangles(6, 40)
    v = torch.from_numpy(v).requires_grad_()
    q = torch.from_numpy(np.random.default_rng(7).normal(size=(12, 3))).requires_grad_()
    assert torch.autograd.gradcheck(lambda q, v: nearest_points(q, v, f).distance, (q, v))
    b, bf = box((0, 0, 0), (1, 1, 1.1))
    b = torch.from_numpy(b).requires_grad_()
    q = torch.tensor([[0.2, 0.3, 0.1], [2.0, 0.4, 0.5], [0.5, 0.6, 3.0]], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda q, b: signed_distance(q, b, bf), (q, b))
    touching = torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64, requires_grad=True)
    (g,) = torch.autograd.grad(signed_distance(touching, b, bf).sum(), touching)
    assert torch.isfinite(g).all()


def test_intersection_of_boxes_and_spheres():
    """Golden 60: a corner of one box in another; two spheres in a lens."""
    a, b = MeshQueries(*box()), MeshQueries(*box((0.9, 0.8, 0.7), (2, 2, 2)))
    got = intersection(a, b)
    assert got.volume == pytest.approx(0.1 * 0.2 * 0.3, rel=1e-9) and got.depth == pytest.approx(0.1)
    rough = intersection_by_sampling(a, b, 0.01)
    assert rough.volume == pytest.approx(got.volume, rel=0.02) and rough.depth == got.depth
    apart = MeshQueries(*box((5, 5, 5), (6, 6, 6)))
    assert intersection(a, apart) == (0, 0) == intersection_by_sampling(a, apart, 0.1)
    r, d = 1.0, 1.2
    one, two = MeshQueries(*sphere(r)), MeshQueries(*sphere(r, (d, 0.0, 0.0)))
    got = intersection(one, two)
    assert got.volume == pytest.approx(np.pi * (4 * r + d) * (2 * r - d) ** 2 / 12, rel=0.02)
    assert penetration_depth(one, two) == got.depth == pytest.approx(2 * r - d, abs=0.02)
    with pytest.raises(ValueError, match="second mesh is not closed"):
        intersection(a, MeshQueries(box()[0], BOX_F[2:]))
    with pytest.raises(ValueError, match="wider spacing"):
        intersection_by_sampling(a, b, 1e-5)


def test_wrong_input_is_named():
    v, f = box()
    for bad_v, bad_f, words in (
        (v, f[:0], "no faces"),
        (v, f + 1, "there are 8"),
        (v, f - 1, "-1 to 6"),
        (v * np.nan, f, "not finite"),
        (v[:, :2], f, "vertices \\(V,3\\)"),
        (v, f[:, :2], "faces \\(T,3\\)"),
        (v[:0], f, "there are 0"),
    ):
        with pytest.raises(ValueError, match=words):
            MeshQueries(bad_v, bad_f)
    with pytest.raises(TypeError, match="integers"):
        MeshQueries(v, f.astype(float))
    m = MeshQueries(v, f)
    with pytest.raises(ValueError, match="points are not finite"):
        m.nearest([[0, 0, np.inf]])
    with pytest.raises(ValueError, match="points are \\(...,3\\)"):
        m.signed_distance(np.zeros((4, 2)))
    with pytest.raises(ValueError, match="differ"):
        m.first_hits(np.zeros((2, 3)), np.zeros((3, 3)))


def test_degenerate_meshes_and_one_triangle():
    v = np.array([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [0, 0, 0]])
    for backend in BACKENDS:
        got = nearest_points([[1.5, 1, 0], [-1, 0, 0]], v, np.array([[0, 1, 2], [0, 3, 3]]), backend)
        assert np.allclose(got.distance, 1) and np.isfinite(got.bary).all()
        point = nearest_points([[3.0, 4, 0]], v, np.array([[0, 0, 0]]), backend)
        assert np.allclose(point.distance, 5)
    tiny, huge = (signed_distance(s * np.array([[0.5, 0.5, 0.25]]), s * box()[0], BOX_F) for s in (1e-9, 1e9))
    assert np.allclose(tiny, -0.25e-9, rtol=1e-9) and np.allclose(huge, -0.25e9, rtol=1e-9)


@pytest.mark.skipif("cpu" not in BACKENDS, reason="needs the compiled kernels")
def test_the_number_of_threads_changes_nothing():
    v, f = sphere(cells=24)
    q = np.random.default_rng(0).uniform(-1.5, 1.5, (3000, 3))
    m, before = MeshQueries(v, f), torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = m.nearest(q), m.winding_number(q)
        torch.set_num_threads(2)
        two = m.nearest(q), m.winding_number(q)
    finally:
        torch.set_num_threads(before)
    assert all(np.array_equal(a, b) for a, b in zip(one[0], two[0], strict=True)) and np.array_equal(one[1], two[1])


def test_baked_distance_of_a_box():
    v, f = box((0, 0, 0), (0.1, 0.06, 0.04))
    grid = bake_sdf(Mesh(v.astype(np.float32), f.astype(np.int32), v.astype(np.float32) * 8 + 0.1), 40, margin=0.5)
    q = torch.rand(500, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([0.12, 0.08, 0.06]) - 0.01
    with torch.no_grad():
        value, _ = grid.sample(q)
    assert (value[:, 0] - torch.from_numpy(signed_distance(q.numpy(), v, f))).abs().max() < 0.5 * grid.h
    on = torch.tensor([[0.05, 0.03, 0.04]])
    with torch.no_grad():
        assert torch.allclose(torch.sigmoid(grid.sample(on)[0][0, 1:]), 8 * on[0] + 0.1, atol=0.03)
    with pytest.raises(ValueError, match="resolution"):
        bake_sdf(Mesh(v, f), 1)


def test_samples_are_uniform_and_seeded():
    v, f = box((0, 0, 0), (4, 1, 1))
    got = points_of.sample_surface(v, f, 20000, seed=3)
    assert signed_distance(got.points[:300], v, f) == pytest.approx(0, abs=1e-12)
    assert np.allclose((v[f[got.face]] * got.bary[:, :, None]).sum(1), got.points)
    ends = (got.points[:, 0] < 1e-9) | (got.points[:, 0] > 4 - 1e-9)
    assert ends.mean() == pytest.approx(2 / 18, abs=0.01)
    assert np.array_equal(got.points, points_of.sample_surface(v, f, 20000, seed=3).points)
    assert not np.array_equal(got.points, points_of.sample_surface(v, f, 20000, seed=4).points)


@pytest.mark.parametrize("to_plane", [False, True])
def test_icp_recovers_a_similarity(to_plane):
    """Golden 56: 20 degrees, 3 cm and a scale of 1.1, to 0.5 mm, from samples that share no point."""
    v, f = jack()
    b = points_of.sample_surface(v, f, 5000, seed=0)
    a = points_of.sample_surface(v, f, 2000, seed=1).points
    r, t = Rotation.from_rotvec(np.radians(20) * np.array([0.6, -0.64, 0.48])).as_matrix(), np.array([0.03, 0, 0])
    source = (a - t) @ r / 1.1
    n = meshes.face_normals(torch.from_numpy(v), torch.from_numpy(f)).numpy()[b.face] if to_plane else None
    got, again = (points_of.align(source, b.points, 5, points=(300, 2500), normals=n) for _ in range(2))
    error = np.linalg.norm(points_of.transform(got.similarity, source) - a, axis=1)
    assert error.max() < 5e-4 and got.similarity[0] == pytest.approx(1.1, abs=5e-3)
    assert got.error == again.error
    from_identity = points_of.icp(source, b.points, scale=False)
    assert from_identity.similarity[0] == 1 and from_identity.error > got.error


def test_icp_point_to_plane_takes_fewer_steps():
    v, f = jack(32)
    b = points_of.sample_surface(v, f, 4000, seed=0)
    n = meshes.face_normals(torch.from_numpy(v), torch.from_numpy(f)).numpy()[b.face]
    turn = Rotation.from_rotvec([0.05, -0.08, 0.06]).as_matrix()
    source = points_of.sample_surface(v, f, 1500, seed=1).points @ turn + 0.002
    kw = {"scale": False, "iterations": 60, "tolerance": 1e-5}
    point = points_of.icp(source, b.points, **kw)
    plane = points_of.icp(source, b.points, normals=n, **kw)
    assert plane.iterations < point.iterations and plane.error < 1.05 * point.error
    with pytest.raises(ValueError, match="normals"):
        points_of.icp(source, b.points, normals=n[:5])
    with pytest.raises(ValueError, match="not finite"):
        points_of.icp(source * np.nan, b.points)
    with pytest.raises(ValueError, match="three points"):
        points_of.icp(source[:2], b.points)


def test_icp_keeps_the_middle_when_its_scale_is_limited():
    source = np.stack(np.meshgrid(*[np.arange(3.0)] * 3, indexing="ij"), -1).reshape(-1, 3) + [30, 0, 0]
    start = (1.1, np.eye(3), np.zeros(3))
    found = points_of.icp(source, 1.1 * source, start, scale_limits=(0.2, 1.05), trim=1.0)
    assert found.similarity[0] == 1.05
    moved = points_of.transform(found.similarity, source)
    np.testing.assert_allclose(moved.mean(0), 1.1 * source.mean(0), atol=1e-9)


def test_intersection_takes_meshes_that_wind_inward():
    v, f = box()
    there = MeshQueries(v + 0.5, f)
    for faces in (f, f[:, ::-1]):
        assert intersection(MeshQueries(v, faces), there).volume == pytest.approx(0.125)
