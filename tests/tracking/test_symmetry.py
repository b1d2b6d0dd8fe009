"""Which turns of an object no picture could tell."""

from __future__ import annotations

import numpy as np
import trimesh

from handhold.scene import Mesh
from handhold.shapes.sdf import bake_sdf
from handhold.tracking.symmetry import CONTINUOUS, ambiguities, slippage, without_shading

AXIS = np.array([2.0, -1.0, 2.0]) / 3


def body(shape: trimesh.Trimesh, paint=lambda x: np.full((len(x), 3), 0.6)) -> tuple[Mesh, object]:
    """A coloured mesh turned so that its z is AXIS and moved away from the origin, and its field."""
    for _ in range(2):
        shape = shape.subdivide()
    colours = paint(shape.vertices.copy())
    turn = trimesh.geometry.align_vectors([0, 0, 1], AXIS)
    turn[:3, 3] = 0.05, 0.02, -0.03
    shape.apply_transform(turn)
    mesh = Mesh(shape.vertices.astype(np.float32), np.asarray(shape.faces, np.int32), colours.astype(np.float32))
    return mesh, bake_sdf(mesh, 32)


def tin() -> trimesh.Trimesh:
    return trimesh.creation.cylinder(radius=0.033, height=0.1, sections=24).subdivide_to_size(0.02)


def carton() -> trimesh.Trimesh:
    return trimesh.creation.box((0.05, 0.07, 0.15)).subdivide_to_size(0.03)


def test_a_plain_tin_turns_unseen_and_a_label_stops_it():
    (found,) = ambiguities(*body(tin()), noise=0.02)
    assert found.order == CONTINUOUS and abs(found.axis @ AXIS) > 0.999 and "any angle" in found.sentence
    red, blue = [0.7, 0.2, 0.2], [0.2, 0.3, 0.7]

    def label(x):
        return np.where(((np.arctan2(x[:, 1], x[:, 0]) > 0.5) & (x[:, 2] > -0.02))[:, None], red, blue)

    assert ambiguities(*body(tin(), label), noise=0.02) == ()
    rings = lambda x: np.where((x[:, 2] > 0.0)[:, None], [0.7, 0.2, 0.2], [0.2, 0.3, 0.7])  # noqa: E731
    assert [a.order for a in ambiguities(*body(tin(), rings), noise=0.02)] == [CONTINUOUS]  # rings do not stop it


def test_a_plain_carton_has_half_turns_only():
    found = ambiguities(*body(carton()), noise=0.02)
    assert [a.order for a in found] == [2, 2, 2] and "180 degrees" in found[0].sentence
    print_ = lambda x: np.where((x[:, 0] > 0.02)[:, None], [0.8, 0.3, 0.3], [0.4, 0.5, 0.6])  # noqa: E731
    assert [abs(a.axis @ AXIS) > 0.99 for a in ambiguities(*body(carton(), print_), noise=0.02)] in ([], [False])


def test_a_handle_stops_it():
    handle = trimesh.creation.box((0.035, 0.014, 0.07))
    handle.apply_translation([0.045, 0, 0.0])
    mug = trimesh.boolean.union([trimesh.creation.cylinder(radius=0.033, height=0.1, sections=24), handle])
    assert CONTINUOUS not in [a.order for a in ambiguities(*body(mug.subdivide_to_size(0.02)), noise=0.02)]


def test_the_axis_of_a_surface_of_revolution_through_outliers():
    mesh, _ = body(tin())
    x = mesh.vertices.astype(float)
    flat = trimesh.Trimesh(x, mesh.faces, process=False)
    n = np.array(flat.vertex_normals)
    n[::10] = [1.0, 0, 0]
    axis, point, sine = slippage(x, n)
    away = (point - [0.05, 0.02, -0.03]) - ((point - [0.05, 0.02, -0.03]) @ AXIS) * AXIS
    assert abs(axis @ AXIS) > 0.9995 and np.linalg.norm(away) < 0.001 and sine < 0.1


def test_shading_is_no_texture():
    n = np.random.default_rng(0).normal(size=(4000, 3))
    n /= np.linalg.norm(n, axis=1, keepdims=True)
    shaded = np.array([0.5, 0.4, 0.3]) * (0.7 + 0.4 * n[:, :1])
    out = without_shading(shaded, n)
    assert out.std(0).max() < 0.15 * shaded.std(0).max()


def test_nothing_is_said_of_what_was_hardly_seen():
    mesh, grid = body(tin())
    unseen = Mesh(mesh.vertices, mesh.faces, mesh.colors, np.zeros(len(mesh.vertices), bool))
    assert ambiguities(unseen, grid, noise=0.02) == () == ambiguities(Mesh(mesh.vertices, mesh.faces), grid, 0.02)
