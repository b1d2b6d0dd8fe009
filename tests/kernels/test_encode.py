"""The compiled encodings against their torch twins, and what must never happen."""

import pytest
import torch

from handhold import kernels
from handhold.kernels import encode, encode_torch
from handhold.kernels.encode_torch import GridLevels

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
LO, HI = torch.tensor([0.0, -1.0, 0.1]), torch.tensor([1.0, 0.5, 1.0])


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def rng():
    return torch.Generator().manual_seed(0)


def points(n, rng, margin=0.0):
    return LO + (torch.rand(n, 3, generator=rng) * (1 + 2 * margin) - margin) * (HI - LO)


def against_twin(f, leaves, rng, want=1e-5, want_grad=1e-4):
    """f(*leaves, backend) -> value, jac: compiled float32 against the float64 twin, relative to each maximum."""
    got = []
    weights = None
    for dtype, backend in ((torch.float32, "cpu"), (torch.float64, "torch")):
        inputs = [t.detach().to(dtype).requires_grad_() for t in leaves]
        out = [t for t in f(*inputs, backend=backend) if t is not None]
        weights = weights or [torch.randn(t.shape, generator=rng) for t in out]
        grads = torch.autograd.grad(out, inputs, [w.to(dtype) for w in weights])
        got.append((out, grads))
    for tolerance, mine, exact in ((want, got[0][0], got[1][0]), (want_grad, got[0][1], got[1][1])):
        for a, b in zip(mine, exact, strict=True):
            assert a.shape == b.shape
            assert ((a - b).abs() <= tolerance * b.abs().amax() if b.numel() else b == a).all()


@compiled
@pytest.mark.parametrize("smoothstep", [False, True])
@pytest.mark.parametrize("sum", [False, True])
@pytest.mark.parametrize("features", encode.FEATURES)
def test_grid_equals_twin(features, sum, smoothstep, rng):
    levels = GridLevels((3, 7, 16, 33), (0, 0, 10, 11), smoothstep, sum)
    weights = torch.tensor([1.0, 0.5, 0.0, 0.7])
    table, x = torch.randn(levels.rows, features, generator=rng), points(203, rng, 0.1)
    for jacobian in (True, False):
        against_twin(
            lambda t, x, backend, j=jacobian: encode.encode(t, x, levels, LO, HI, weights, j, backend), [table, x], rng
        )


@compiled
@pytest.mark.parametrize("pi", [False, True])
@pytest.mark.parametrize("identity", [False, True])
def test_fourier_equals_twin(pi, identity, rng):
    x = 3 * torch.randn(203, 3, generator=rng)
    for weights in (torch.rand(7, generator=rng), torch.tensor([1.0, 0.5, 0.0]), torch.zeros(0)):
        for jacobian in (True, False):
            against_twin(
                lambda x, backend, w=weights, j=jacobian: encode.fourier(x, w, pi, identity, j, backend), [x], rng
            )


@compiled
def test_fourier_far_away(rng):
    x = torch.cat([torch.logspace(-30, 30, 300), -torch.logspace(-30, 30, 300)])[:, None].expand(-1, 3)
    for pi in (False, True):
        value, jac = encode.fourier(x, torch.ones(3), pi, False, True)
        twin, slopes = encode.fourier(x.double(), torch.ones(3), pi, False, True)
        near = x[:, 0].abs() < 1e9  # beyond, the double angle is no longer exact either
        assert torch.isfinite(value).all() and value.abs().max() <= 1 + 1e-6
        assert (value - twin)[near].abs().max() < 1e-6 and (jac - slopes)[near].abs().max() < 2e-5


@compiled
def test_gradient_of_the_jacobian_alone(rng):
    levels = GridLevels((4, 9), (0, 8))
    table, x = torch.randn(levels.rows, 2, generator=rng), points(50, rng)
    got = []
    for backend in ("cpu", "torch"):
        t, p = table.clone().requires_grad_(), x.clone().requires_grad_()
        _, jac = encode.encode(t, p, levels, LO, HI, torch.ones(2), True, backend)
        got.append(torch.autograd.grad(jac.square().sum(), [t, p]))
    for a, b in zip(*got, strict=True):
        assert (a - b).abs().max() <= 1e-4 * b.abs().max()


@compiled
@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("sum", [False, True])
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_triplane_equals_twin(channels, sum, align_corners, rng):
    planes, x = torch.randn(3, channels, 7, 7, generator=rng), points(203, rng, 0.1)
    for jacobian in (True, False):
        against_twin(
            lambda t, x, backend, j=jacobian: encode.triplane(t, x, LO, HI, sum, align_corners, j, backend),
            [planes, x],
            rng,
        )


@compiled
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_triplane_takes_any_memory_format(memory_format, rng):
    planes, x = torch.randn(3, 4, 6, 6, generator=rng), points(20, rng)
    a = planes.clone().contiguous(memory_format=memory_format).requires_grad_()
    b = planes.double().requires_grad_()
    encode.triplane(a, x, LO, HI)[0].square().sum().backward()
    encode.triplane(b, x.double(), LO, HI)[0].square().sum().backward()
    assert torch.allclose(a.grad.double(), b.grad, atol=1e-5)


@compiled
def test_same_bits_for_any_thread_count(rng):
    levels = GridLevels((5, 16, 40), (0, 0, 12))
    table, x = torch.randn(levels.rows, 2, generator=rng), points(5000, rng, 0.02)
    planes = torch.randn(3, 4, 17, 17, generator=rng)
    results = []
    before = torch.get_num_threads()
    try:
        for n in (1, 2, 3, 7):
            torch.set_num_threads(n)
            t, q, p = (a.clone().requires_grad_() for a in (table, planes, x))
            value, jac = encode.encode(t, p, levels, LO, HI, torch.ones(3))
            waves, _ = encode.fourier(p, torch.ones(4))
            features, slopes = encode.triplane(q, p, LO, HI, jacobian=True)
            loss = (
                waves.sum()
                + value.square().sum()
                + jac.square().sum()
                + features.square().sum()
                + slopes.square().sum()
            )
            results.append((value, jac, waves, features, slopes, *torch.autograd.grad(loss, [t, q, p])))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@compiled
def test_gradients_stay_inside_their_level(rng):
    """Positions on and beyond every face touch the level's own rows only."""
    levels = GridLevels((4, 6, 9), (0, 7, 0))
    table = torch.randn(levels.rows, 2, generator=rng).requires_grad_()
    edge = torch.tensor([-1e30, 0.0, 1e-7, 0.5, 1.0 - 1e-7, 1.0, 1.0 + 1e-6, 1e30])
    x = LO + torch.cartesian_prod(edge, edge, edge) * (HI - LO)
    for only in range(3):
        weights = torch.zeros(3)
        weights[only] = 1
        value, jac = encode.encode(table, x, levels, LO, HI, weights)
        (g,) = torch.autograd.grad([value, jac], table, [torch.ones_like(value), torch.ones_like(jac)])
        assert torch.isfinite(value).all() and torch.isfinite(jac).all()
        begin, end = levels.offsets[only], levels.offsets[only] + levels.sizes[only]
        assert (g[:begin] == 0).all() and (g[end:] == 0).all() and (g[begin:end] != 0).any()


def test_wrong_arguments_raise(rng):
    levels = GridLevels((4,), (0,))
    table, x, w = torch.zeros(125, 2), points(4, rng), torch.ones(1)
    for bad in (
        (table[:-1], x, levels, LO, HI, w),
        (torch.zeros(125, 3), x, levels, LO, HI, w),
        (table, x[:, :2], levels, LO, HI, w),
        (table, x * torch.nan, levels, LO, HI, w),
        (table, x, levels, HI, LO, w),
        (table, x, levels, LO, HI * torch.inf, w),
        (table, x, levels, LO, HI, torch.ones(2)),
    ):
        with pytest.raises(ValueError):
            encode.encode(*bad)
    with pytest.raises(TypeError):
        encode.encode(table, x.double(), levels, LO, HI, w)
    with pytest.raises(ValueError):
        encode.triplane(torch.zeros(2, 4, 5, 5), x, LO, HI)
    with pytest.raises(ValueError):
        GridLevels((600,), (0,))


@compiled
def test_the_compiled_backward_says_it_is_no_second_time(rng):
    levels = GridLevels((4,), (0,))
    table, x = torch.randn(125, 2, generator=rng), points(4, rng).requires_grad_()
    value, _ = encode.encode(table, x, levels, LO, HI, torch.ones(1))
    (g,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once"):
        g.sum().backward()


def test_twin_gradcheck(rng):
    levels = GridLevels((3, 6), (0, 5), True)
    table = torch.randn(levels.rows, 1, generator=rng, dtype=torch.float64, requires_grad=True)
    x = points(4, rng).double().requires_grad_()
    f = lambda t, x: encode_torch.encode(t, x, levels, LO, HI, torch.tensor([1.0, 0.5]))  # noqa: E731
    assert torch.autograd.gradcheck(f, (table, x), eps=1e-7, atol=1e-4)
    assert torch.autograd.gradgradcheck(f, (table, x), eps=1e-7, atol=1e-3, fast_mode=True)
