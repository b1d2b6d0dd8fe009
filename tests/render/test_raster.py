"""Triangle rasterisation: a brute-force ray caster as the truth, gap-free coverage, gradients, refusals."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from handhold import kernels
from handhold.render.raster import rasterize

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]
EYE = torch.eye(4)[None]


pytestmark = pytest.mark.usefixtures("one_thread")


def camera(f=60.0, cx=20.0, cy=14.0, fy=None):
    return torch.tensor([[f, 0, cx], [0, fy or f, cy], [0, 0, 1]])[None]


def turned(a=0.3, b=-0.2, t=(0.02, -0.03, 0.05)):
    ry = torch.tensor([[math.cos(a), 0, math.sin(a)], [0, 1, 0], [-math.sin(a), 0, math.cos(a)]])
    rx = torch.tensor([[1, 0, 0], [0, math.cos(b), -math.sin(b)], [0, math.sin(b), math.cos(b)]])
    view = torch.eye(4)
    view[:3, :3], view[:3, 3] = rx @ ry, torch.tensor(t)
    return view[None]


def soup(n=40, seed=0, size=0.3, depth=1.0, spread=0.5):
    """n triangles that share no vertices."""
    g = torch.Generator().manual_seed(seed)
    centre = (torch.rand(n, 1, 3, generator=g) - 0.5) * 2 * spread + torch.tensor([0, 0, depth])
    v = centre + torch.randn(n, 3, 3, generator=g) * size
    return v.reshape(-1, 3), torch.arange(3 * n).reshape(n, 3)


def sheet(n, side, z=1.0, slope=0.0):
    """A square of 2 n^2 triangles around the optical axis, on z + slope x."""
    at = torch.linspace(-side / 2, side / 2, n + 1)
    x, y = torch.meshgrid(at, at, indexing="ij")
    v = torch.stack([x, y, z + slope * x], -1).reshape(-1, 3)
    a = (torch.arange(n)[:, None] * (n + 1) + torch.arange(n)).reshape(-1)
    return v, torch.cat([torch.stack([a, a + n + 1, a + 1], 1), torch.stack([a + 1, a + n + 1, a + n + 2], 1)])


def cast(vertices, faces, view, K, width, height, near):
    """Moeller and Trumbore's ray-triangle test of every pixel and face in float64, and each pixel's margin: how far, in
    barycentric weight or relative depth, it is from a decision that goes the other way."""
    v = (vertices.double() @ view[:3, :3].double().T + view[:3, 3].double()).numpy()
    k = K.double().numpy()
    y, x = np.mgrid[:height, :width] + 0.5
    d = np.stack([(x - k[0, 2]) / k[0, 0], (y - k[1, 2]) / k[1, 1], np.ones_like(x)], -1).reshape(-1, 1, 3)
    a, b, c = (v[faces.numpy()[:, i]][None] for i in range(3))
    with np.errstate(all="ignore"):
        p = np.cross(d, c - a)
        inv = 1 / ((b - a) * p).sum(-1)
        q = np.cross(-a, b - a)
        w1, w2, t = -(a * p).sum(-1) * inv, (d * q).sum(-1) * inv, ((c - a) * q).sum(-1) * inv
    w = np.stack([1 - w1 - w2, w1, w2], -1)
    least = np.where(np.isfinite(w), w, -np.inf).min(-1)
    t = np.where((least >= 0) & (t >= near), t, np.inf)
    face = np.where(np.isfinite(t).any(1), t.argmin(1), -1) if len(faces) else np.full(height * width, -1)
    order = np.sort(np.concatenate([t, np.full((len(t), 2), np.inf)], 1), 1)
    with np.errstate(invalid="ignore"):
        gap = np.where(np.isfinite(order[:, 1]), order[:, 1] / order[:, 0] - 1, np.inf)
    margin = np.minimum(np.abs(least).min(1, initial=np.inf), gap)
    rows = np.arange(len(t))
    depth, bary = np.zeros(len(t)), np.zeros((len(t), 3))
    hit = face >= 0
    depth[hit], bary[hit] = t[rows[hit], face[hit]], w[rows[hit], face[hit]]
    return (
        face.reshape(height, width),
        depth.reshape(height, width),
        bary.reshape(height, width, 3),
        margin.reshape(height, width),
    )


SCENES = {
    "off-centre": (soup(), turned(), camera(), 40, 28),
    "far off-centre": (soup(seed=1), turned(), camera(80.0, -30.0, 55.0, fy=70.0), 33, 29),
    "crossing the near plane": (soup(seed=2, size=1.0, depth=0.3), turned(), camera(), 40, 28),
    "around the camera": (soup(seed=3, size=3.0, depth=0.0), turned(), camera(30.0), 40, 28),
    "small": (soup(400, seed=4, size=0.02), turned(), camera(), 40, 28),
    "one pixel": (soup(seed=5), turned(), camera(4.0, 0.6, 0.4), 1, 1),
    "7x5": (soup(seed=6), turned(), camera(9.0, 3.0, 2.0), 7, 5),
    "no faces": (soup(0), turned(), camera(), 7, 5),
    "behind": (soup(depth=-5.0), EYE, camera(), 7, 5),
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", SCENES)
def test_every_pixel_sees_what_its_ray_meets(name, backend):
    (v, f), view, K, w, h = SCENES[name]
    r = rasterize(v, f, view, K, w, h, near=0.05, backend=backend)
    face, depth, bary, margin = cast(v, f, view[0], K[0], w, h, 0.05)
    got, sure = r.face[0].numpy(), margin > 1e-5
    assert (got == face)[sure].all() and sure.mean() > 0.98
    same = (got == face) & (face >= 0)
    assert same.any() or name in ("no faces", "behind", "one pixel")
    assert np.abs(r.depth[0, ..., 0].numpy() / np.where(same, depth, 1) - 1)[same].max(initial=0) < 1e-5
    assert np.abs(r.bary[0].numpy() - bary)[same].max(initial=0) < 1e-4
    empty = r.face < 0
    for image in (r.bary, r.depth, r.normals, r.mask):
        assert (image[empty] == 0).all()
    assert (r.mask[~empty] == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_tilted_plane_in_closed_form(backend):
    v, f = sheet(7, 1.4, 1.0, 0.5)
    K = camera(50.0, 17.0, 12.0)
    r = rasterize(v, f, EYE, K, 32, 24, attributes=v, ids=torch.arange(len(f)) // 49, backend=backend, normals="face")
    x, y = torch.meshgrid((torch.arange(32) + 0.5 - 17) / 50, (torch.arange(24) + 0.5 - 12) / 50, indexing="xy")
    z = 1 / (1 - 0.5 * x)
    assert (r.face >= 0).all()
    assert torch.allclose(r.depth[0, ..., 0], z, rtol=2e-6)
    assert torch.allclose(r.attributes[0], torch.stack([x * z, y * z, z], -1), atol=2e-6)
    n = torch.tensor([-0.5, 0.0, 1.0]) / math.sqrt(1.25)
    assert torch.allclose(r.normals.abs(), n.abs().expand_as(r.normals), atol=1e-5)
    assert torch.equal(r.ids, (r.face >= 49).long())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("view", [EYE, turned()], ids=["vertices on pixel centres", "turned"])
def test_a_tessellation_covers_each_pixel_exactly_once(backend, view):
    """Each triangle drawn alone: the counts add up to one over a sheet wider than the image."""
    n = 8
    v, f = sheet(n, 4.0)
    K = camera(4.0, 8.5, 8.5) if view is EYE else camera(23.0, 7.3, 9.1)  # EYE: the sheet's vertices are pixel centres
    count = sum(rasterize(v, one[None], view, K, 17, 17, normals=None, backend=backend).mask for one in f)
    if view is EYE:  # the sheet spans [0.5, 16.5]: pixel centres on its left and top belong to it, right and bottom not
        assert (count[0, :16, :16] == 1).all() and (count[0, 16] == 0).all() and (count[0, :, 16] == 0).all()
    else:
        assert (count == 1).all()
    whole = rasterize(v, f, view, K, 17, 17, normals=None, backend=backend).mask
    assert torch.equal(whole, count)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_fan_around_a_pixel_centre_leaves_no_hole(backend):
    g = torch.Generator().manual_seed(0)
    for _ in range(20):
        angle = torch.sort(torch.rand(7, generator=g) * 2 * math.pi).values
        rim = torch.stack([torch.cos(angle), torch.sin(angle), 1 + 0.2 * torch.rand(7, generator=g)], -1)
        v = torch.cat([torch.tensor([[0.0, 0, 1.3]]), rim])
        k = torch.arange(7)
        f = torch.stack([torch.zeros(7, dtype=torch.long), 1 + k, 1 + (k + 1) % 7], 1)
        wide = (torch.roll(angle, -1) - angle) % (2 * math.pi)
        f = f[wide < math.pi]  # a gap of half a turn is no triangle of the fan
        mask = sum(rasterize(v, t[None], EYE, camera(8.0, 4.5, 4.5), 9, 9, backend=backend).mask for t in f)
        assert mask.max() == 1
        if len(f) == 7:
            assert mask[0, 4, 4] == 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_closed_surface_around_the_camera_fills_every_image(backend):
    """An octahedron, four times subdivided and dented: triangles lie before, beside and behind the camera."""
    v = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0, 1, 0], [0, -1, 0], [0, 0, 1], [0, 0, -1]])
    f = torch.tensor([[a, b, c] for a in (0, 1) for b in (2, 3) for c in (4, 5)])
    for _ in range(4):
        edge, which = torch.unique(f[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2).sort(-1).values, dim=0, return_inverse=True)
        m = (which + len(v)).reshape(-1, 3)
        v = torch.cat([v, v[edge].mean(1)])
        f = torch.cat([torch.stack([f[:, i], m[:, i], m[:, i - 1]], 1) for i in range(3)] + [m])
    v = torch.nn.functional.normalize(v, dim=-1) * (1 + 0.2 * torch.sin(5 * v[:, :1]) * torch.cos(4 * v[:, 1:2]))
    for angle in range(6):
        view = turned(angle, 0.7 * angle, (0.0, 0.0, 0.0))
        assert (rasterize(v, f, view, camera(9.0, 16.5, 10.5), 33, 21, backend=backend).mask == 1).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nearer_surface_hides_the_farther_whatever_the_order_and_winding(backend):
    near, f = sheet(2, 1.0, 0.7)
    far, _ = sheet(2, 1.0, 0.9)
    v = torch.cat([near, far])
    a = rasterize(v, torch.cat([f, f + 9]), EYE, camera(), 40, 28, backend=backend)
    b = rasterize(v, torch.cat([f + 9, f]).flip(1), EYE, camera(), 40, 28, backend=backend)
    assert torch.allclose(a.depth[a.mask > 0], torch.tensor(0.7)) and torch.equal(a.depth, b.depth)
    assert torch.allclose(a.normals, -b.normals, atol=1e-6)
    two = torch.cat([f, f])  # the same surface twice: the lower index wins
    assert rasterize(near, two, EYE, camera(), 40, 28, backend=backend).face.max() < len(f)


def graded(backend, dtype, scene="crossing the near plane"):
    (v, f), view, K, w, h = SCENES[scene]
    g = torch.Generator().manual_seed(1)
    leaves = [t.clone().to(dtype).requires_grad_() for t in (v, view, K, torch.randn(len(v), 2, generator=g))]
    r = rasterize(leaves[0], f, leaves[1], leaves[2], w, h, leaves[3], near=0.05, backend=backend)
    keep = (cast(v, f, view[0], K[0], w, h, 0.05)[3] > 1e-4)[None, ..., None]
    loss = 0
    for image in (r.bary, r.depth, r.normals, r.attributes):
        loss = loss + (image * torch.randn(image.shape, generator=g).to(image) * torch.from_numpy(keep)).sum()
    loss.backward()
    return r, [t.grad for t in leaves]


@compiled
@pytest.mark.parametrize("name", ["off-centre", "crossing the near plane", "small", "7x5"])
def test_compiled_equals_float64_twin(name):
    mine, got = graded("cpu", torch.float32, name)
    twin, want = graded("torch", torch.float64, name)
    same = (mine.face == twin.face)[..., None]
    assert same.float().mean() > 0.995
    for a, b in (
        (mine.bary, twin.bary),
        (mine.depth, twin.depth),
        (mine.normals, twin.normals),
        (mine.attributes, twin.attributes),
    ):
        assert ((a - b).abs() * same).max() < 1e-4
    for a, b in zip(got, want, strict=True):
        assert torch.isfinite(a).all() and (a - b).norm() < 1e-3 * b.norm()


def test_twin_gradcheck():
    v, f = soup(4, seed=7, spread=0.2)
    v, view, K = v.double().requires_grad_(), turned().double().requires_grad_(), camera(9.0, 4.0, 3.0).double()
    a = torch.randn(len(v), 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    r = rasterize(v, f, view, K, 8, 7, a, backend="torch")
    assert (r.face >= 0).sum() > 10

    def images(v, view, k, a):
        K = torch.eye(3, dtype=torch.float64).index_put((torch.tensor([0, 1, 0, 1]), torch.tensor([0, 1, 2, 2])), k)
        r = rasterize(v, f, view, K[None], 8, 7, a, backend="torch")
        return r.bary, r.depth, r.normals, r.attributes

    k = torch.tensor([9.0, 9.0, 4.0, 3.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(images, (v, view, k, a), eps=1e-7, atol=1e-5, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_cameras_are_independent_and_meshes_may_differ(backend):
    v, f = soup()
    views, K = torch.cat([EYE, turned()]), camera().expand(2, 3, 3)
    one = rasterize(v, f, views, K, 20, 14, backend=backend)
    two = rasterize(
        torch.stack([v, v @ turned()[0, :3, :3].T + turned()[0, :3, 3]]),
        f,
        EYE.expand(2, 4, 4),
        K,
        20,
        14,
        backend=backend,
    )
    assert one.depth.shape == (2, 14, 20, 1)
    for c in range(2):
        alone = rasterize(v, f, views[c : c + 1], K[:1], 20, 14, backend=backend)
        assert torch.equal(one.face[c], alone.face[0]) and torch.equal(one.depth[c], alone.depth[0])
    assert torch.allclose(one.depth, two.depth, atol=1e-5)
    world = torch.stack([two.normals[0], two.normals[1] @ turned()[0, :3, :3]])  # its world is the camera
    assert torch.allclose(one.normals, world, atol=1e-5)


@compiled
def test_same_bits_for_any_thread_count():
    results = []
    for n in (1, 2, 3, 1):
        torch.set_num_threads(n)
        r, grads = graded("cpu", torch.float32, "small")
        results.append([r.face, r.bary, r.depth, r.normals, r.attributes, *grads])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_degenerate_triangles_are_not_drawn(backend):
    v = torch.tensor([[0.0, 0, 1], [0.1, 0, 1], [0.2, 0, 1], [0, 0, 0.5], [0, 0, 2.0]])
    f = torch.tensor([[0, 1, 2], [0, 0, 1], [1, 1, 1], [0, 3, 4]])  # a line, repeated corners, seen edge-on
    v.requires_grad_()
    r = rasterize(v, f, EYE, camera(), 40, 28, backend=backend)
    assert (r.face == -1).all()
    (r.depth.sum() + r.normals.sum() + r.bary.sum()).backward()
    assert v.grad is None or (v.grad == 0).all()


@compiled
@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1e6, 1e30])
def test_any_finite_size_is_safe(scale):
    v, f = soup(30, seed=8, size=1.0, depth=0.5)
    v = (v * scale).requires_grad_()
    for K in (camera(), camera(1e-6), camera(1e6, -1e6, 1e7), camera(1e30, 1e30, -1e30)):
        for w, h in ((1, 1), (7, 5), (40, 28)):
            r = rasterize(v, f, EYE, K, w, h, near=1e-12, backend="cpu")
            assert r.face.max() < len(f) and r.face.min() >= -1
            assert torch.isfinite(r.bary).all() and torch.isfinite(r.depth).all()
            (r.depth.sum() + r.bary[..., 0].sum()).backward()


def test_unsafe_input_is_refused_before_a_kernel_runs(monkeypatch):
    from handhold.render import raster

    monkeypatch.setattr(raster.kernel, "visible", lambda *a: pytest.fail("a kernel ran"))
    v, f = soup(3)
    K = camera()
    nan, inf = v.clone(), v.clone()
    nan[1, 1], inf[2, 0] = math.nan, math.inf
    bad = [
        (nan, f, EYE, K, 8, 8),
        (inf, f, EYE, K, 8, 8),
        (v, f + 1, EYE, K, 8, 8),
        (v, f - 1, EYE, K, 8, 8),
        (v, f[:, :2], EYE, K, 8, 8),
        (v[:, :2], f, EYE, K, 8, 8),
        (v.expand(3, -1, -1), f, EYE, K, 8, 8),
        (v, f, EYE[0], K, 8, 8),
        (v, f, EYE, K.expand(2, 3, 3), 8, 8),
        (v, f, EYE * math.nan, K, 8, 8),
        (v, f, EYE, -K, 8, 8),
        (v, f, EYE, K * math.inf, 8, 8),
        (v, f, EYE, K, 0, 8),
        (v, f, EYE, K, 8, 1 << 20),
        (v, f.float(), EYE, K, 8, 8),
        (v.long(), f, EYE, K, 8, 8),
    ]
    for arguments in bad:
        with pytest.raises((ValueError, TypeError)):
            rasterize(*arguments)
    good = (v, f, EYE, K, 8, 8)
    for more in ({"ids": torch.zeros(2, dtype=torch.long)}, {"ids": torch.full((3,), -1)}, {"attributes": v[:2]},
                 {"normals": "flat"}, {"near": 0.0}, {"near": math.nan}):  # fmt: skip
        with pytest.raises(ValueError):
            rasterize(*good, **more)
