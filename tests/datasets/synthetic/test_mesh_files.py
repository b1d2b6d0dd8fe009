"""Meshes come back from files as they were written, whatever the format; other files are refused with one sentence."""

from __future__ import annotations

import struct

import numpy as np
import pytest

from handhold.datasets.synthetic.meshes import read_mesh
from handhold.errors import UnusableInput

V = 0.1 * np.array([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)], np.float64)
QUADS = [[0, 1, 3, 2], [4, 6, 7, 5], [0, 4, 5, 1], [2, 3, 7, 6], [0, 2, 6, 4], [1, 5, 7, 3]]


def volume(v, f):
    a, b, c = (v[f[:, k]] for k in range(3))
    return np.einsum("ij,ij->i", a, np.cross(b, c)).sum() / 6


def obj(negative=False):
    lines = ["# a box", "o box"] + [f"v {x} {y} {z} 0.5 0.5 0.5" for x, y, z in V] + ["vt 0 0", "vn 0 0 1"]
    for q in QUADS:
        lines.append("f " + " ".join(f"{i - 8}" if negative else f"{i + 1}/1/1" for i in q))
    return "\n".join(lines).encode()


def ply(kind):
    head = (
        f"ply\nformat {kind} 1.0\ncomment x\nelement vertex 8\nproperty float x\nproperty float y\nproperty float z\n"
    )
    head += "property uchar red\nelement face 6\nproperty list uchar int vertex_indices\nend_header\n"
    if kind == "ascii":
        rows = [f"{x} {y} {z} 9" for x, y, z in V] + ["4 " + " ".join(map(str, q)) for q in QUADS]
        return head.encode() + "\n".join(rows).encode()
    o = "<" if "little" in kind else ">"
    rows = [struct.pack(o + "3fB", *v, 9) for v in V] + [struct.pack(o + "B4i", 4, *q) for q in QUADS]
    return head.encode() + b"".join(rows)


@pytest.mark.parametrize(
    "data",
    [obj(), obj(True), ply("ascii"), ply("binary_little_endian"), ply("binary_big_endian")],
    ids=["obj", "relative obj", "ascii", "little", "big"],
)
def test_a_box_is_a_box(tmp_path, data):
    path = tmp_path / ("box.ply" if data[:3] == b"ply" else "box.obj")
    path.write_bytes(data)
    v, f = read_mesh(path)
    assert v.shape == (8, 3) and f.shape == (12, 3)
    assert abs(abs(volume(v, f)) - 1e-3) < 1e-8
    path.write_bytes(data[:-7])
    with pytest.raises(UnusableInput, match="OBJ or PLY"):
        read_mesh(path) if data[:3] == b"ply" else read_mesh(tmp_path / "none.obj")


def test_vertices_at_one_place_are_joined(tmp_path):
    lines = [f"v {x} {y} {z}" for q in QUADS for x, y, z in V[q]]
    lines += [f"f {4 * i + 1} {4 * i + 2} {4 * i + 3} {4 * i + 4}" for i in range(6)] + ["v 9 9 9", "f 1 1 2"]
    (tmp_path / "split.obj").write_text("\n".join(lines))
    v, f = read_mesh(tmp_path / "split.obj")
    assert v.shape == (8, 3) and f.shape == (12, 3)


@pytest.mark.parametrize(
    "text",
    ["", "v 0 0 0\nf 1 2 3", "ply\nformat x 1.0\nend_header\n", "v a b c", "v nan 0 0\nv 0 0 1\nv 1 0 0\nf 1 2 3"],
)
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "x.obj").write_text(text)
    with pytest.raises(UnusableInput, match="OBJ or PLY"):
        read_mesh(tmp_path / "x.obj")


def test_the_generator_holds_it(tmp_path):
    from handhold.datasets.synthetic.objects import make_object_bank
    from handhold.datasets.synthetic.scenes import read_meshes

    (tmp_path / "box.obj").write_bytes(obj())
    bank = make_object_bank(0, 0, meshes=read_meshes(tmp_path))
    assert len(bank) == 1 and np.allclose(bank.size[0], 0.1, atol=1e-6)
