"""The rasterised look: laws of light, materials and seeds. Pictures are small."""

from dataclasses import replace

import pytest
import torch

from handhold.datasets.synthetic import light as lighting
from handhold.datasets.synthetic import look, skin, textures
from handhold.hand.model import HandModel

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 72


def seeded(k):
    return torch.Generator().manual_seed(k)


@pytest.fixture(scope="module")
def shared():
    return look.make_textures(n_products=2, size=32)


@pytest.fixture(scope="module")
def hand():
    return HandModel.open()


def plate(z, half=0.1, x=0.0):
    v = torch.tensor([[-half, -half, 0.0], [half, -half, 0], [half, half, 0], [-half, half, 0]])
    return v + torch.tensor([x, 0.0, z]), torch.tensor([[0, 2, 1], [0, 3, 2]])  # faces the camera


def surfaces(vertices, faces, n=1, attrs=None, canon=None):
    t = len(faces)
    return look.Surfaces(
        vertices.expand(n, -1, 3), faces, None, torch.full((t,), 3, dtype=torch.uint8),
        torch.zeros(t, dtype=torch.int64), vertices if canon is None else canon, attrs,
    )  # fmt: skip


def lamp(n=1, direction=(0.0, 0.0, -1.0), color=1.0, env=0.0):
    """One lamp and an even environment; no shadows on the ground, no hollows."""
    s = look.sample_lights(n, seeded(0))
    d = torch.nn.functional.normalize(torch.tensor(direction), dim=0)
    h = torch.zeros_like(s.harmonics)
    h[:, 0] = env
    zero = torch.zeros(n)
    return replace(
        s, direction=d.expand(n, lighting.LAMPS, 3).clone(), harmonics=h, hollow=zero, ground=zero, softness=zero,
        color=torch.tensor([color] + [0.0] * (lighting.LAMPS - 1))[:, None].expand(n, -1, 3).clone(),
        shadow=torch.ones(n),
    )  # fmt: skip


def matt(n=1, value=0.5):
    m = look.sample_materials(n, "plain", seeded(0))
    black = torch.zeros(n)
    return look.Materials.table(
        [replace(m, colors=torch.full((n, 4, 3), value), rough=torch.ones(n), f0=black, bump=black)]
    )


def camera(n=1, f=60.0):
    return torch.tensor([[f, 0, SIZE / 2], [0, f, SIZE / 2], [0, 0, 1]]).expand(n, 3, 3).contiguous()


def draw(s, materials, light, shared, n=1, **kw):
    return look.render(s, materials, light, torch.zeros(n, 3, SIZE, SIZE), camera(n), SIZE, SIZE, shared, **kw)


def middle(image):
    return image[:, :, SIZE // 2 - 4 : SIZE // 2 + 4, SIZE // 2 - 4 : SIZE // 2 + 4].mean((2, 3))


def test_matt_plate_follows_the_cosine(shared):
    v, f = plate(0.4)
    for tilt in (0.0, 0.8):
        d = (float(torch.tensor(tilt).sin()), 0.0, -float(torch.tensor(tilt).cos()))
        image, g = draw(surfaces(v, f), matt(), lamp(direction=d), shared)
        expected = 0.5 * float(torch.tensor(tilt).cos())
        torch.testing.assert_close(middle(image), torch.full((1, 3), expected), rtol=0.06, atol=0.0)
        assert (image[:, :, g.face[0] < 0].amax()) <= 0.3  # only outlines are blended into the background
    image, _ = draw(surfaces(v, f), matt(), lamp(color=0.0, env=0.7), shared)
    torch.testing.assert_close(middle(image), torch.full((1, 3), 0.35), rtol=0.06, atol=0.0)


def test_a_body_in_front_of_the_lamp_casts_a_shadow(shared):
    v, f = plate(0.4, 0.2)
    w, _ = plate(0.2, 0.04, x=0.08)
    both, faces = torch.cat([v, w]), torch.cat([f, f + 4])
    d = (0.08, 0.0, -0.2)  # from the middle of the plate past the small one
    free, _ = draw(surfaces(v, f), matt(), lamp(direction=d), shared)
    hidden, _ = draw(surfaces(both, faces), matt(), lamp(direction=d), shared)
    assert (middle(hidden) < 0.35 * middle(free)).all()
    corner = (slice(None), slice(None), slice(4, 12), slice(4, 12))
    torch.testing.assert_close(hidden[corner], free[corner], rtol=0.1, atol=0.0)


def test_pictures_do_not_depend_on_their_neighbours_or_the_chunk(shared, hand, monkeypatch):
    n = 3
    v = hand.v_template + torch.tensor([0.1, 0.0, 0.35])
    s = surfaces(v, hand.faces, n, look.skin_attributes(hand), hand.v_template)
    skins = look.sample_materials(n, "skin", seeded(2))
    others = look.sample_materials(n, "object", seeded(3))
    m = look.Materials.table([skins.where(torch.tensor([True, False, True]), others)])
    lights = look.sample_lights(n, seeded(1))
    alone, g = draw(s, m, lights, shared, n)
    monkeypatch.setattr(look, "PIXELS_CPU", 1 << 24)
    together, h = draw(s, m, lights, shared, n)
    assert torch.equal(g.face, h.face) and torch.isfinite(alone).all() and alone.min() >= 0
    assert (alone - together).abs().flatten(1).mean(1).max() < 0.02  # noise is shaken by the place in the list
    again, _ = draw(s, m, lights, shared, n)
    assert torch.equal(again, together)


@pytest.mark.parametrize("kind", sorted({*textures.KINDS, *textures.FAMILIES}))
def test_every_material_is_finite_and_seeded(shared, hand, kind):
    n = 2
    m = look.sample_materials(n, kind, seeded(5))
    same = look.sample_materials(n, kind, seeded(5))
    assert all(torch.equal(getattr(m, k), getattr(same, k)) for k in m.__dataclass_fields__)
    v = hand.v_template + torch.tensor([0.1, 0.0, 0.3])
    s = surfaces(v, hand.faces, n, None, hand.v_template)
    image, g = draw(s, look.Materials.table([m]), look.sample_lights(n, seeded(6)), shared, n)
    assert torch.isfinite(image).all() and image.min() >= 0 and g.seen.any()
    assert image.amax((1, 2, 3)).min() > 0.003


def test_supersampling_agrees_on_average(shared):
    v, f = plate(0.4)
    one, g = draw(surfaces(v, f), matt(), lamp(), shared)
    two, h = draw(surfaces(v, f), matt(), lamp(), shared, supersample=2)
    assert torch.equal(g.face, h.face) and two.shape == one.shape
    torch.testing.assert_close(two.mean(), one.mean(), rtol=0.03, atol=0.0)


def test_nothing_in_sight_leaves_the_background(shared):
    v, f = plate(-0.4)
    back = torch.rand(1, 3, SIZE, SIZE, generator=seeded(0))
    image, g = look.render(surfaces(v, f), matt(), lamp(), back, camera(), SIZE, SIZE, shared)
    assert not g.seen.any()
    torch.testing.assert_close(image, back)


def test_skin_gets_darker_with_melanin_and_redder_with_blood():
    m = torch.linspace(0, 1, 20)
    t = skin.tone(m, torch.full((20,), 0.4))
    assert (torch.diff(t, dim=0) < 0).all() and t.min() > 0 and t.max() < 1
    assert (t[:, 0] > t[:, 1]).all() and (t[:, 1] > t[:, 2]).all()
    pale, flushed = skin.tone(m, torch.zeros(20)), skin.tone(m, torch.ones(20))
    assert (flushed[:, 0] / flushed[:, 1] > pale[:, 0] / pale[:, 1]).all()


@pytest.mark.parametrize("side", ["right", "left"])
def test_skin_attributes_know_the_hand(hand, side):
    model = HandModel.open(side)
    a = look.skin_attributes(model)
    assert a.shape == (len(model.v_template), len(look.ATTRIBUTES)) and torch.isfinite(a).all()
    torch.testing.assert_close(a, look.skin_attributes(hand))
    normal = look.vertex_normals(model.v_template[None], model.faces)[0]
    palm = a[:, 0]
    assert normal[palm > 0.8, 1].mean() < -0.5 and normal[palm < 0.2, 1].mean() > 0.5
    nail = (a[:, 2].abs() < 1) & (a[:, 3].abs() < 1) & (a[:, 4] > 0.4)
    tips = model.v_template[model.tip_ids]
    near = (model.v_template[nail][:, None] - tips).norm(dim=2)
    assert near.amin(1).max() < 0.025 and set(near.argmin(1).tolist()) == {0, 1, 2, 3, 4}
