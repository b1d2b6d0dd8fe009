"""The encodings' golden values, their Jacobians, and what they refuse."""

import math

import pytest
import torch

from handhold.shapes.encodings import (
    DenseGridConfig,
    Fourier,
    FourierConfig,
    Grid,
    HashGridConfig,
    Triplane,
    TriplaneConfig,
    barf_weights,
    make_encoding,
)

LO, HI = (-0.1, 0.0, 0.2), (0.1, 0.3, 0.4)
CONFIGS = [
    FourierConfig(4),
    FourierConfig(3, pi=True, identity=False),
    HashGridConfig(4, 2, 9, 4, 1.7),
    HashGridConfig(3, 1, 8, 4, 2.0, smoothstep=True),
    DenseGridConfig((3, 6), 4),
    DenseGridConfig((3, 6), 2, sum=True, smoothstep=True),
    TriplaneConfig(9, 5),
    TriplaneConfig(9, 4, sum=True, align_corners=False),
]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def points(n, rng, margin=0.0, dtype=torch.float32):
    lo, hi = torch.tensor(LO, dtype=dtype), torch.tensor(HI, dtype=dtype)
    u = torch.rand(n, 3, generator=rng, dtype=dtype) * (1 + 2 * margin) - margin
    return lo + u * (hi - lo)


def make(config, rng):
    encoding = make_encoding(config, LO, HI, generator=rng)
    with torch.no_grad():
        for p in encoding.parameters():
            p.copy_(torch.randn(p.shape, generator=rng))
    return encoding


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_shapes_jacobian_and_leading_axes(config, rng):
    encoding = make(config, rng)
    x = points(6, rng).reshape(2, 3, 3)
    value, jac = encoding(x, jacobian=True)
    assert value.shape == (2, 3, encoding.output_dim) and jac.shape == (2, 3, encoding.output_dim, 3)
    assert torch.allclose(encoding(x), value)
    value, jac = encoding(x[:0], jacobian=True)
    assert value.shape == (0, 3, encoding.output_dim) and jac.shape == (0, 3, encoding.output_dim, 3)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_jacobian_against_finite_differences(config, rng):
    encoding = make(config, rng).double()
    x, step = points(40, rng, 0.2, torch.float64), 1e-6
    _, jac = encoding(x, jacobian=True)
    for k in range(3):
        d = torch.zeros(3, dtype=torch.float64)
        d[k] = step
        assert torch.allclose(jac[..., k], (encoding(x + d) - encoding(x - d)) / (2 * step), atol=1e-5, rtol=1e-6)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_gradients_of_value_and_jacobian(config, rng):
    """First and second order, to positions and parameters."""
    encoding = make(config, rng).double()
    x = points(3, rng, 0.1, torch.float64).requires_grad_()
    leaves = list(encoding.parameters())

    def f(x, *leaves):
        names = [n for n, _ in encoding.named_parameters()]
        return torch.func.functional_call(encoding, dict(zip(names, leaves, strict=True)), (x,), {"jacobian": True})

    assert torch.autograd.gradcheck(f, (x, *leaves), eps=1e-7, atol=1e-4, rtol=1e-4, fast_mode=True)
    assert torch.autograd.gradgradcheck(f, (x, *leaves), eps=1e-7, atol=1e-3, rtol=1e-3, fast_mode=True)


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_bad_positions_raise(config, rng):
    encoding = make(config, rng)
    for bad in (math.nan, math.inf, -math.inf):
        x = points(5, rng)
        x[3, 1] = bad
        with pytest.raises(ValueError, match="finite"):
            encoding(x)
    with pytest.raises(ValueError, match=r"\(\.\.\.,3\)"):
        encoding(torch.zeros(5, 2))
    with pytest.raises(TypeError):
        encoding(torch.zeros(5, 3, dtype=torch.long))


@pytest.mark.parametrize("config", CONFIGS[2:], ids=str)
def test_far_outside_is_the_border(config, rng):
    encoding = make(config, rng)
    x = torch.tensor([[1e30, 0.15, 0.3], [-1e30, 0.15, 0.3], [3.4e38, -3.4e38, 3.4e38]])
    at = torch.tensor([[0.1, 0.15, 0.3], [-0.1, 0.15, 0.3], [0.1, 0.0, 0.4]])
    value, jac = encoding(x, jacobian=True)
    assert torch.allclose(value, encoding(at), atol=1e-6)
    assert (jac[:, :, 0] == 0).all() and (jac[2] == 0).all() and (jac[:2, :, 1:] != 0).any()


def test_barf_weights():
    assert (barf_weights(0.0, 5) == 0).all() and (barf_weights(5.0, 5) == 1).all()
    for k in range(5):
        assert barf_weights(k + 0.5, 5)[k].item() == pytest.approx(0.5)
        assert (barf_weights(k + 0.5, 5)[:k] == 1).all() and (barf_weights(k + 0.5, 5)[k + 1 :] == 0).all()
    with pytest.raises(ValueError):
        barf_weights(math.nan, 5)


def test_fourier_golden_values(rng):
    plain, annealed = Fourier(FourierConfig(5)), Fourier(FourierConfig(5))
    x = torch.randn(7, 3, generator=rng)
    annealed.set_alpha(0)
    value, jac = annealed(x, jacobian=True)
    assert torch.equal(value[:, :3], x) and (value[:, 3:] == 0).all()
    assert torch.equal(jac[:, :3], torch.eye(3).expand(7, 3, 3)) and (jac[:, 3:] == 0).all()
    annealed.set_alpha(5)
    assert (annealed(x) - plain(x)).abs().max() <= 1e-7
    annealed.set_alpha(2.5)
    assert torch.allclose(annealed(x)[:, 15:21], 0.5 * plain(x)[:, 15:21], atol=1e-7)
    want = torch.cat([x, *(torch.cat([(2**k * x.double()).sin(), (2**k * x.double()).cos()], 1) for k in range(5))], 1)
    assert (plain(x) - want).abs().max() < 1e-6


def test_triplane_at_texel_centres(rng):
    R = 5
    for align in (True, False):
        t = make(TriplaneConfig(R, 3, align_corners=align), rng)
        i = torch.stack(torch.meshgrid(*[torch.arange(R)] * 3, indexing="ij"), -1).reshape(-1, 3)
        u = i / (R - 1) if align else (i + 0.5) / R
        x = torch.tensor(LO) + u * (torch.tensor(HI) - torch.tensor(LO))
        value, p = t(x), t.planes.detach()
        want = [p[0][:, i[:, 1], i[:, 0]].T, p[1][:, i[:, 2], i[:, 0]].T, p[2][:, i[:, 2], i[:, 1]].T]
        assert torch.allclose(value, torch.cat(want, 1), atol=1e-5)


def test_triplane_is_grid_sample(rng):
    for align in (True, False):
        t = make(TriplaneConfig(6, 3, sum=True, align_corners=align), rng)
        x = points(50, rng, 0.3)
        u = 2 * (x - torch.tensor(LO)) / (torch.tensor(HI) - torch.tensor(LO)) - 1
        at = torch.stack([u[:, [0, 1]], u[:, [0, 2]], u[:, [1, 2]]])[:, None]
        want = torch.nn.functional.grid_sample(t.planes, at, padding_mode="border", align_corners=align)
        assert torch.allclose(t(x), want.sum(0)[:, 0].T, atol=1e-5)


def test_dense_grid_is_exact_at_corners_and_sums_levels(rng):
    g = make(DenseGridConfig((4, 8), 2, sum=True), rng)
    i = torch.stack(torch.meshgrid(*[torch.arange(5)] * 3, indexing="ij"), -1).reshape(-1, 3)
    x = torch.tensor(LO) + i / 4 * (torch.tensor(HI) - torch.tensor(LO))
    coarse, fine = g.level(0), g.level(1)
    want = coarse[i[:, 0], i[:, 1], i[:, 2]] + fine[2 * i[:, 0], 2 * i[:, 1], 2 * i[:, 2]]
    assert torch.allclose(g(x), want, atol=1e-5)
    g.set_alpha(1)
    assert torch.allclose(g(x), coarse[i[:, 0], i[:, 1], i[:, 2]], atol=1e-5)
    g.set_alpha(0)
    value, jac = g(x, jacobian=True)
    assert (value == 0).all() and (jac == 0).all()


def test_hash_levels_follow_the_paper():
    g = HashGridConfig(levels=3, base=16, scale=2.0, log2_table=14).grid
    assert g.resolution == (16, 32, 64) and g.hash_bits == (0, 14, 14)
    assert g.sizes == (17**3, 1 << 14, 1 << 14) and g.offsets == (0, 17**3, 17**3 + (1 << 14))
    e = Grid(HashGridConfig(levels=1, base=40, log2_table=14), (0, 0, 0), (1, 1, 1))
    with torch.no_grad():
        e.table.copy_(torch.arange(1 << 14)[:, None].expand(-1, 2))
    i = [3, 30, 17]
    row = (i[0] ^ (i[1] * 2654435761 % (1 << 32)) ^ (i[2] * 805459861 % (1 << 32))) % (1 << 14)
    assert e(torch.tensor([i]) / 40)[0, 0].item() == pytest.approx(row, rel=1e-4)


def test_levels_of_weight_zero_get_no_gradient(rng):
    g = make(HashGridConfig(3, 2, 9, 4, 1.7), rng)
    g.set_alpha(1)
    value, jac = g(points(50, rng), jacobian=True)
    (value.square().sum() + jac.square().sum()).backward()
    assert (value[:, 2:] == 0).all()
    first = g.grid.sizes[0]
    assert (g.table.grad[:first] != 0).any() and (g.table.grad[first:] == 0).all()


def test_sizes_are_capped():
    for make_it in (
        lambda: FourierConfig(99),
        lambda: HashGridConfig(levels=33),
        lambda: HashGridConfig(log2_table=30),
        lambda: HashGridConfig(levels=32, scale=4.0).grid,
        lambda: DenseGridConfig((2000,)).grid,
        lambda: Grid(HashGridConfig(features=3), LO, HI),
        lambda: Triplane(TriplaneConfig(1, 4), LO, HI),
        lambda: Triplane(TriplaneConfig(16384, 64), LO, HI),
        lambda: Grid(HashGridConfig(), HI, LO),
    ):
        with pytest.raises(ValueError):
            make_it()
    with pytest.raises(TypeError, match="no encoding"):
        make_encoding(3, LO, HI)


def test_a_hash_grid_learns_an_image_of_space(rng):
    encoding = make_encoding(HashGridConfig(4, 2, 12, 8, 1.5), LO, HI, generator=rng)
    head = torch.nn.Linear(encoding.output_dim, 1)
    opt = torch.optim.Adam([*encoding.parameters(), *head.parameters()], 1e-2)
    x = points(500, rng)
    target = torch.sin(30 * x[:, :1]) * torch.cos(20 * x[:, 1:2])
    for _ in range(60):
        loss = (head(encoding(x)) - target).square().mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert loss.item() < 0.02 * target.square().mean()
