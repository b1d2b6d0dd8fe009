"""The path-traced look: triangles are cut without loss, and light adds up to what the rasterised look means."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from handhold.datasets.synthetic import arms, look, pathtraced
from handhold.errors import MissingAsset

W, H = 40, 32
K = torch.tensor([[[130.0, 0, 20], [0, 130, 16], [0, 0, 1]]])

needs_mitsuba = pytest.mark.skipif(not pathtraced.available(), reason="Mitsuba is not installed")


def ball(level=2):
    v, f = arms.sphere(level)
    place = torch.tensor([0.0, 0.0, 0.5])
    label, material = torch.full((len(f),), 3, dtype=torch.uint8), torch.zeros(len(f), dtype=torch.int64)
    return look.Surfaces((0.05 * v + place)[None], f, v[None], label, material, 0.05 * v)


def matt(grey=0.5, kind="plain"):
    m = look.sample_materials(1, kind, torch.Generator().manual_seed(1))
    m = replace(m, rough=torch.ones(1), f0=torch.zeros(1), bump=torch.zeros(1), metal=torch.zeros(1))
    return look.Materials.table([replace(m, colors=torch.full_like(m.colors, grey))])


def lights(seed=3):
    light = look.sample_lights(1, torch.Generator().manual_seed(seed))
    return replace(light, ground=torch.zeros(1), softness=torch.full((1,), 0.5))


@pytest.fixture(scope="module")
def textures():
    torch.set_num_threads(1)
    return look.make_textures(2, 32)


def cut(surfaces, materials, textures):
    whole = replace(surfaces, material=surfaces.material[None], canon=surfaces.canon[None], faces=surfaces.faces[None])
    return pathtraced.pieces(whole, materials, textures, K[0], W, H)


def area(v, f):
    a, b, c = (v[f[:, k]] for k in range(3))
    return torch.linalg.cross(b - a, c - a).norm(dim=1).sum() / 2


def test_cutting_keeps_the_surface_and_is_fine_enough(textures):
    surfaces = ball(1)
    (piece,) = cut(surfaces, matt(), textures)
    torch.testing.assert_close(
        area(piece["vertices"], piece["faces"]), area(surfaces.vertices[0], surfaces.faces), rtol=1e-4, atol=0
    )
    x = piece["vertices"][piece["faces"]]
    pixel = x[..., :2] / x[..., 2:] * K[0, 0, 0]
    edge = (pixel[:, [0, 1, 2]] - pixel[:, [1, 2, 0]]).norm(dim=-1)
    assert edge.max() <= pathtraced.FINEST * 1.1
    a, b, c = x.unbind(1)
    outward = torch.linalg.cross(b - a, c - a)
    assert ((outward * (x.mean(1) - torch.tensor([0, 0, 0.5]))).sum(1) > 0).all()


def test_textures_are_those_of_the_rasterised_look(textures):
    materials = matt(kind="checker")
    colors = torch.zeros(1, 1, 4, 3)
    colors[..., 1, :] = 0.9
    materials = replace(materials, colors=colors, scale=torch.full((1, 1), 0.04))
    (piece,) = cut(ball(), materials, textures)
    assert piece["color"].min() < 0.1 and piece["color"].max() > 0.7
    n, c, v = (piece["normals"], piece["color"][:, 0], piece["vertices"])
    torch.testing.assert_close(n.norm(dim=1), torch.ones(len(n)))
    near = torch.cdist(v[::9], v[::9]) < 1e-6  # corners at one place: one colour, but for dither
    assert (torch.where(near, c[::9] - c[::9, None], 0.0)).abs().max() < 0.15


def test_relief_bends_normals_by_its_slope():
    x = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0, 1, 0], [1, 1, 0]])
    faces = torch.tensor([[0, 1, 2], [1, 3, 2]])
    up = torch.tensor([0.0, 0, 1.0]).expand(4, 3)
    slope = torch.tensor([0.02, -0.03])
    got = pathtraced._relief(x, up, x[:, :2] @ slope, faces)
    want = torch.nn.functional.normalize(torch.tensor([-0.02, 0.03, 1.0]), dim=0)
    torch.testing.assert_close(got, want.expand(4, 3), atol=2e-3, rtol=0)


def test_without_mitsuba_it_says_what_to_install(monkeypatch, textures):
    monkeypatch.setattr(pathtraced, "available", lambda: False)
    with pytest.raises(MissingAsset, match="pip install"):
        pathtraced.render(ball(), matt(), lights(), torch.zeros(1, 3, H, W), K, W, H, textures)


@needs_mitsuba
@pytest.mark.parametrize("lamps", [False, True])
def test_matt_surfaces_get_the_light_that_was_meant(lamps, textures):
    light = lights()
    dark = torch.zeros_like(light.color if not lamps else light.harmonics)
    light = replace(light, harmonics=dark) if lamps else replace(light, color=dark)
    background = torch.full((1, 3, H, W), 0.3)
    image, seen = pathtraced.render(ball(), matt(), light, background, K, W, H, textures, samples=48)
    assert image.shape == (1, 3, H, W)
    inside = torch.nn.functional.avg_pool2d((seen.face >= 0).float()[:, None], 5, 1, 2)[0, 0] > 0.99
    outside = torch.nn.functional.max_pool2d((seen.face >= 0).float()[:, None], 5, 1, 2)[0, 0] < 0.5
    ray = look.pixel_rays(K, W, H)[0]
    normal = torch.nn.functional.normalize((ray * seen.depth - torch.tensor([0, 0, 0.5])[:, None, None]), dim=0)
    normal = normal.flatten(1).T
    meant = pathtraced._ambient(light.harmonics[0], normal)
    for k in range(light.direction.shape[1]):
        meant = meant + light.color[0, k] * (normal @ light.direction[0, k]).clamp_min(0)[:, None]
    meant = 0.5 * meant.T.reshape(3, H, W)[:, inside]
    got = image[0][:, inside]
    assert abs(got.mean() / meant.mean() - 1) < 0.12
    assert np.corrcoef(got.mean(0), meant.mean(0))[0, 1] > (0.9 if lamps else 0.5)
    torch.testing.assert_close(image[0][:, outside], background[0][:, outside])


@needs_mitsuba
def test_things_throw_shadows_on_what_is_behind(textures):
    light = lights()
    down = torch.tensor([[[0.0, -1.0, 0.0]]]).expand_as(light.direction).clone()
    color = torch.zeros_like(light.color)
    color[:, 0] = 1.0
    floor = {"plane": torch.tensor([[0.0, -1.0, 0.0]]), "gap": torch.full((1,), 0.01), "ground": torch.ones(1)}
    light = replace(light, direction=down, color=color, harmonics=0 * light.harmonics, **floor)
    background = torch.full((1, 3, H, W), 0.3)
    a, _ = pathtraced.render(ball(), matt(), light, background, K, W, H, textures, samples=32, seed=4)
    b, _ = pathtraced.render(ball(), matt(), light, background, K, W, H, textures, samples=32, seed=4)
    assert torch.equal(a, b)
    under, beside = a[0, :, -2:, 18:22].mean(), a[0, :, -2:, :3].mean()
    assert under < 0.15 and beside > 0.22
