"""Laws of the object bank: meshes and distances agree, hinges are rigid, everything is reproducible."""

import numpy as np
import pytest
import torch

from handhold.datasets.synthetic import shapes_solids as solids
from handhold.datasets.synthetic.objects import (
    MAX_FACES,
    MAX_VERTICES,
    ObjectBank,
    articulate,
    deform,
    make_object_bank,
    vertex_normals,
)
from handhold.datasets.synthetic.shapes_recipes import RECIPES

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def bank() -> ObjectBank:
    return make_object_bank(30, seed=3)


def _used(bank: ObjectBank) -> torch.Tensor:
    return torch.arange(bank.vertices.shape[1]) < bank.n_vertices[:, None]


def test_every_recipe_makes_closed_outward_parts_of_a_size_to_hold():
    for name, (_, recipe) in RECIPES.items():
        thing = recipe(np.random.default_rng(7))
        parts = [thing.base] + ([thing.second] if thing.second else [])
        every = np.concatenate([p.vertices for p in parts])
        assert 0.02 < np.ptp(every, axis=0).max() < 0.4, name
        for p in parts:
            v, f = p.vertices[p.faces].astype(np.float64), p.faces
            assert np.einsum("ij,ij->", v[:, 0], np.cross(v[:, 1], v[:, 2])) > 0, name
            edge = np.concatenate([f[:, [0, 1]], f[:, [1, 2]], f[:, [2, 0]]])
            net = np.zeros(len(p.vertices), int)
            np.add.at(net, edge[:, 0], 1)
            np.add.at(net, edge[:, 1], -1)
            assert (net == 0).all(), name
        assert sum(len(solids.split_creases(p.vertices, p.faces)[0]) for p in parts) <= MAX_VERTICES, name
        assert sum(len(p.faces) for p in parts) <= MAX_FACES, name


def test_padding_is_degenerate_and_normals_are_outward(bank):
    past = torch.arange(bank.faces.shape[1]) >= bank.n_faces[:, None]
    assert (bank.faces[past] == 0).all()
    used = _used(bank)
    outward = bank.vertices + 1.5e-3 * bank.vertex_normals
    inward = bank.vertices - 1.5e-3 * bank.vertex_normals
    index = torch.arange(len(bank))
    rises = bank.signed_distance(index, outward) > bank.signed_distance(index, inward)
    assert rises[used].float().mean() > 0.93
    assert torch.allclose(vertex_normals(bank.vertices, bank.faces), bank.vertex_normals, atol=1e-5)


def test_the_surface_is_where_the_distance_is_zero(bank):
    index = torch.arange(len(bank))
    d = bank.signed_distance(index, bank.vertices)[_used(bank)]
    assert d.abs().median() < 7e-4
    assert (d.abs() < 2.5e-3).float().mean() > 0.93  # the rest is inside another part of a union
    far = torch.tensor([0.0, 0.0, 2.0]).expand(len(bank), 1, 3)
    assert (bank.signed_distance(index, far) > 1.5).all()


def test_a_box_has_its_exact_distance():
    box = solids.box([0.04, 0.06, 0.1])
    p = np.array([[0, 0, 0], [0.03, 0, 0], [0.02 + 0.03, 0.03 + 0.04, 0]], np.float32)
    assert np.allclose(box.distance(p), [-0.02, 0.01, 0.05], atol=1e-6)


def test_polygon_distance_matches_a_circle():
    a = np.linspace(0, 2 * np.pi, 400, endpoint=False)
    p = np.random.default_rng(0).uniform(-2, 2, (50, 2))
    d = solids.polygon_distance(p, np.stack([np.cos(a), np.sin(a)], 1))
    assert np.allclose(d, np.linalg.norm(p, axis=1) - 1, atol=1e-3)


def test_hinges_turn_one_part_rigidly_and_the_distance_follows():
    bank = make_object_bank(8, seed=1, only=("hinged_box", "clamshell", "scissors", "flip_phone"))
    index = torch.nonzero(bank.hinged)[:, 0]
    assert len(index) == len(bank)
    low, high = bank.hinge_range[index].unbind(-1)
    angle = low + 0.7 * (high - low)
    v = articulate(bank, index, angle)
    used, part = _used(bank)[index], bank.part[index]
    assert torch.equal(v[part == 0], bank.vertices[index][part == 0])
    assert torch.allclose(articulate(bank, index, 0 * angle), bank.vertices[index], atol=1e-6)
    d = bank.signed_distance(index, v, angle)
    assert (d[used & (part == 1)].abs() < 3e-3).float().mean() > 0.8
    closed = bank.signed_distance(index, v)
    assert (closed[used & (part == 1)].abs() > 5e-3).float().mean() > 0.3  # closed, the lid is elsewhere


def test_deformation_is_smooth_bounded_and_reproducible(bank):
    x = bank.vertices[:8]
    out = deform(x, torch.Generator().manual_seed(0))
    assert torch.equal(out, deform(x, torch.Generator().manual_seed(0)))
    assert torch.isfinite(out).all() and not torch.allclose(out, x)
    size = bank.size[:8].norm(dim=-1)
    assert ((out - x).norm(dim=-1).amax(1) < 0.6 * size).all()
    assert torch.allclose(deform(x, torch.Generator().manual_seed(0), strength=0.0), x, atol=2e-3)


def test_same_seed_same_bank_and_files_keep_it(bank, tmp_path):
    again = make_object_bank(30, seed=3)
    assert again.kind == bank.kind and torch.equal(again.vertices, bank.vertices) and torch.equal(again.sdf, bank.sdf)
    bank.save(tmp_path / "bank.npz")
    back = ObjectBank.load(tmp_path / "bank.npz")
    assert back.kind == bank.kind and torch.equal(back.faces, bank.faces)
    assert (back.sdf - bank.sdf).abs().max() < 2e-4
    np.savez(tmp_path / "other.npz", a=np.zeros(1))
    with pytest.raises(ValueError, match="not an object bank"):
        ObjectBank.load(tmp_path / "other.npz")


def test_users_meshes_join_centred_and_thinned():
    d, f = solids.sphere_lattice(24)
    bank = make_object_bank(1, seed=0, meshes=[(d * 0.03 + 5.0, f)])
    assert bank.kind[0] == "mesh" and int(bank.n_faces[0]) <= MAX_FACES
    p = torch.tensor([[[0.01, 0, 0], [0.05, 0, 0]]])
    assert torch.allclose(bank.signed_distance(torch.tensor([0]), p), torch.tensor([[-0.02, 0.02]]), atol=2e-3)
    with pytest.raises(ValueError, match="metre"):
        make_object_bank(0, seed=0, meshes=[(d * 3.0, f)])
    with pytest.raises(ValueError, match="at least one"):
        make_object_bank(0, seed=0)
