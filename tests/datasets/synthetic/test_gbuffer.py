"""The batched G-buffer against the rasteriser of single pictures, and against geometry."""

import pytest
import torch

from handhold.datasets.synthetic.gbuffer import amodal_masks, rasterize_batch
from handhold.hand.model import HandModel
from handhold.kernels import raster

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64


@pytest.fixture(scope="module")
def scene():
    """Three hands with their own faces: one whole, one near, one across the camera's plane; padded."""
    hand = HandModel.open()
    away = torch.tensor([[0.1, 0.0, 0.45], [0.1, 0.0, 0.25], [0.1, 0.0, 0.0]])
    vertices = hand.v_template + away[:, None]
    faces = torch.cat([hand.faces, torch.zeros(50, 3, dtype=torch.int64)])
    faces = torch.stack([faces, faces.flip(0), faces.roll(7, 0)])
    K = torch.tensor([[80.0, 0, 30], [0, 75, 34], [0, 0, 1]]).repeat(3, 1, 1)
    K[1, 0, 2] = 20
    return vertices, faces, K


@pytest.mark.parametrize("backend", [None, "torch"])
def test_agrees_with_single_pictures(scene, backend):
    vertices, faces, K = scene
    got = rasterize_batch(vertices, faces, K, SIZE, SIZE, backend=backend)
    for k in range(3):
        face, bary, depth = raster.visible(vertices[k], faces[k], K[k], SIZE, SIZE)
        same = got.face[k] == face
        assert (~same).float().mean() < 2e-3
        torch.testing.assert_close(got.depth[k][same], depth[same], atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(got.bary[k][same], bary[same], atol=2e-3, rtol=0)
    assert got.seen.flatten(1).any(1).all()


def test_weights_put_points_on_their_rays(scene):
    vertices, faces, K = scene
    g = rasterize_batch(vertices, faces, K, SIZE, SIZE, backend="torch")
    b, y, x = torch.nonzero(g.seen, as_tuple=True)
    corner = vertices[b[:, None], faces[b, g.face[b, y, x]]]
    point = (corner * g.bary[b, y, x][..., None]).sum(1)
    p = torch.einsum("nij,nj->ni", K[b], point)
    p = p[:, :2] / p[:, 2:]
    at = torch.stack([x, y], 1) + 0.5
    assert (p - at).abs().max() < 0.02
    torch.testing.assert_close(point[:, 2], g.depth[b, y, x], atol=1e-5, rtol=1e-4)


def test_shared_faces_and_nothing_to_see(scene):
    vertices, faces, K = scene
    alike = rasterize_batch(vertices[:2], faces[0], K[:2], SIZE, SIZE, backend="torch")
    own = rasterize_batch(vertices[:2], faces[:1].expand(2, -1, -1), K[:2], SIZE, SIZE, backend="torch")
    assert torch.equal(alike.face, own.face)
    none = rasterize_batch(vertices[:1] - 5, faces[:1], K[:1], SIZE, SIZE, backend="torch")
    assert (none.face == -1).all() and (none.depth == 0).all() and (none.bary == 0).all()


def test_amodal_masks_ignore_other_bodies(scene):
    vertices, faces, K = scene
    two = torch.cat([vertices[:1], vertices[:1] + torch.tensor([0.01, 0.0, 0.1])], 1)
    n, t = vertices.shape[1], faces.shape[1]
    both = torch.cat([faces[:1], faces[:1] + n], 1)
    label = torch.cat([torch.full((t,), 1), torch.full((t,), 3)])
    masks = amodal_masks(two, both, label, K[:1], SIZE, SIZE)
    whole = rasterize_batch(two, both, K[:1], SIZE, SIZE)
    assert masks.shape == (1, 4, SIZE, SIZE) and not masks[:, [1, 3]].any()
    assert torch.equal(masks[0, 0] | masks[0, 2], whole.seen[0])
    behind = rasterize_batch(two, faces[:1] + n, K[:1], SIZE, SIZE)
    assert torch.equal(masks[0, 2], behind.seen[0])
