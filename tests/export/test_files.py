import numpy as np
import pytest

from handhold.export.meshes import simplify, vertex_normals, write_ply
from handhold.export.splats import FIELDS, SH_C0, write_splats
from handhold.scene import Mesh


def sphere(n=40):
    u, v = np.meshgrid(np.linspace(0, np.pi, n), np.linspace(0, 2 * np.pi, 2 * n, endpoint=False), indexing="ij")
    points = np.stack([np.sin(u) * np.cos(v), np.sin(u) * np.sin(v), np.cos(u)], -1).reshape(-1, 3)
    i, j = np.meshgrid(np.arange(n - 1), np.arange(2 * n), indexing="ij")
    a, b = (i * 2 * n + j).ravel(), (i * 2 * n + (j + 1) % (2 * n)).ravel()
    faces = np.concatenate([np.stack([a, a + 2 * n, b], 1), np.stack([b, a + 2 * n, b + 2 * n], 1)])
    return points, faces


def test_ply_round_trip(tmp_path):
    points, faces = sphere(8)
    rng = np.random.default_rng(0)
    mesh = Mesh(points, faces, rng.random(points.shape), rng.random(len(points)) > 0.5)
    write_ply(tmp_path / "o.ply", mesh)
    head, body = (tmp_path / "o.ply").read_bytes().split(b"end_header\n", 1)
    assert b"format binary_little_endian 1.0" in head and b"property uchar observed" in head
    record = np.dtype([("p", "<f4", 3), ("c", "u1", 3), ("o", "u1")])
    read = np.frombuffer(body, record, len(points))
    assert np.allclose(read["p"], points, atol=1e-6) and np.array_equal(read["o"], mesh.observed)
    assert np.abs(read["c"] / 255 - mesh.colors).max() < 0.5 / 255 + 1e-9
    trimesh = pytest.importorskip("trimesh")
    loaded = trimesh.load(tmp_path / "o.ply", process=False)
    assert np.array_equal(loaded.faces, faces) and np.array_equal(loaded.visual.vertex_colors[:, :3], read["c"])


def test_ply_refuses_a_broken_mesh(tmp_path):
    points, faces = sphere(8)
    for bad in (Mesh(points * np.nan, faces), Mesh(points[:-3], faces)):
        with pytest.raises(ValueError, match="the mesh has"):
            write_ply(tmp_path / "o.ply", bad)
    assert not list(tmp_path.iterdir())


def test_splats_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    n = 50
    means, quats, scales = rng.normal(size=(n, 3)), rng.normal(size=(n, 4)), rng.uniform(1e-3, 1e-2, (n, 3))
    opacities, colors = rng.random(n), rng.random((n, 3))
    means[7] = np.nan
    write_splats(tmp_path / "s.ply", means, quats, scales, opacities, colors)
    head, body = (tmp_path / "s.ply").read_bytes().split(b"end_header\n", 1)
    assert [line.split()[-1].decode() for line in head.splitlines() if line.startswith(b"property float")] == list(
        FIELDS
    )
    read = np.frombuffer(body, [(k, "<f4") for k in FIELDS])
    kept = np.arange(n) != 7
    assert len(read) == n - 1
    assert np.allclose(1 / (1 + np.exp(-read["opacity"])), opacities[kept], atol=1e-5)
    assert np.allclose(np.exp(read["scale_1"]), scales[kept, 1], rtol=1e-5)
    assert np.allclose(0.5 + SH_C0 * read["f_dc_2"], colors[kept, 2], atol=1e-6)
    assert np.allclose(read["rot_0"], (quats / np.linalg.norm(quats, axis=1, keepdims=True))[kept, 0], atol=1e-6)
    with pytest.raises(ValueError, match="opacities must be"):
        write_splats(tmp_path / "s.ply", means, quats, scales, opacities[:, None], colors)


def test_normals_point_out_and_simplify_keeps_the_shape():
    points, faces = sphere(80)
    normals = vertex_normals(points, faces)
    assert (normals * points).sum(1).min() > 0.99
    small = simplify(Mesh(points, faces, (points + 1) / 2, points[:, 2] > 0), 3000)
    assert 1000 < len(small.faces) <= 3000 and len(small.colors) == len(small.observed) == len(small.vertices)
    assert np.abs(np.linalg.norm(small.vertices, axis=1) - 1).max() < 0.03
    assert np.abs(small.colors * 2 - 1 - small.vertices).max() < 1e-5
    a, b, c = (small.vertices[small.faces[:, k]] for k in range(3))
    assert np.median(np.einsum("ij,ij->i", np.cross(b - a, c - a), a + b + c) > 0) == 1  # winding survives
