"""Image losses: small truths, and the compiled SSIM against its twin."""

import pytest
import torch

from handhold import kernels
from handhold.kernels.ssim import twin
from handhold.losses import l1, l2, photometric, psnr, ssim, ssim_within

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def images():
    g = torch.Generator().manual_seed(0)
    x = torch.rand(37, 23, 3, generator=g)
    return x, (0.7 * x + 0.3 * torch.rand(37, 23, 3, generator=g))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ssim_of_equal_images_is_one(images, backend):
    x, y = images
    assert ssim(x, x, backend).item() == pytest.approx(1, abs=1e-6)
    assert ssim(x, y, backend).item() == pytest.approx(ssim(y, x, backend).item(), abs=1e-6)
    assert 0 < ssim(x, y, backend).item() < 0.99
    assert ssim(x, 1 - x, backend).item() < 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_ssim_of_flat_images_is_the_luminance_term(backend):
    """Away from the border, constants a and b give (2ab + C1) / (a^2 + b^2 + C1)."""
    a, b = torch.full((1, 64, 64), 0.4), torch.full((1, 64, 64), 0.6)
    want = (2 * 0.24 + 1e-4) / (0.16 + 0.36 + 1e-4)
    assert ssim(a, b, backend).item() == pytest.approx(want, abs=2e-2)


def test_ssim_agrees_with_scikit_image(images):
    skimage = pytest.importorskip("skimage.metrics")
    # scikit-image reflects at the border where we pad with zeros, so give it the zeros.
    a, b = (torch.nn.functional.pad(t, (0, 0, 12, 12, 12, 12)).double().numpy() for t in images)
    options = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    _, full = skimage.structural_similarity(a, b, channel_axis=2, data_range=1.0, **options)
    assert ssim(*images).item() == pytest.approx(full[12:-12, 12:-12].mean(), abs=1e-5)


@compiled
@pytest.mark.parametrize("shape", [(3, 37, 23), (1, 5, 9), (3, 64, 70)])
def test_compiled_ssim_equals_float64_twin(shape):
    g = torch.Generator().manual_seed(1)
    x = torch.rand(*shape, generator=g).requires_grad_()
    y = (x.detach() * 0.6 + 0.4 * torch.rand(*shape, generator=g)).requires_grad_()
    a, b = x.detach().double().requires_grad_(), y.detach().double().requires_grad_()
    mine, exact = ssim(x, y, "cpu"), twin(a, b)
    assert mine.item() == pytest.approx(exact.item(), abs=1e-5)
    (3 * mine).backward()
    (3 * exact).backward()
    for p, q in ((x, a), (y, b)):
        assert (p.grad - q.grad).abs().max() < 1e-4 * q.grad.abs().max()


def test_ssim_gradcheck():
    g = torch.Generator().manual_seed(2)
    x, y = (torch.rand(2, 6, 7, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2))
    assert torch.autograd.gradcheck(twin, (x, y), fast_mode=True)


@compiled
def test_ssim_same_bits_for_any_thread_count(images):
    x, y = images
    before, results = torch.get_num_threads(), []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            p = x.clone().requires_grad_()
            v = ssim(p, y, "cpu")
            v.backward()
            results.append((v.detach(), p.grad))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for r in results[1:] for a, b in zip(r, results[0], strict=True))


def test_ssim_within_is_that_of_the_pixels_in_question_alone():
    g = torch.Generator().manual_seed(3)
    x, y = torch.rand(2, 24, 20, 3, generator=g)
    where = torch.zeros(24, 20, dtype=torch.bool)
    assert ssim_within(x, y, ~where).item() == pytest.approx(ssim(x, y).item(), abs=1e-6)
    where[4:15, 6:18] = True
    same = torch.where(where[..., None], x, y)
    assert ssim_within(x, same, where).item() == pytest.approx(1, abs=1e-6)
    assert ssim_within(x, y, where) < ssim(*(p * where[..., None] for p in (x, y)))  # which counts the black as alike


def test_weighted_means():
    x, y = torch.zeros(4, 4, 3), torch.ones(4, 4, 3)
    y[:, 2:] = 3
    w = torch.zeros(4, 4, 1)
    w[:, :2] = 0.5
    assert l1(x, y).item() == 2 and l1(x, y, w).item() == 1
    assert l2(x, y).item() == 5 and l2(x, y, w).item() == 1
    assert l1(x, y, torch.zeros(4, 4, 1)).item() == 0


def test_photometric_is_zero_for_equal_images(images):
    x, y = images
    assert photometric(x, x).item() == pytest.approx(0, abs=1e-6)
    assert photometric(x, y, 0).item() == l1(x, y).item()
    assert psnr(torch.zeros(2), torch.full((2,), 0.1)).item() == pytest.approx(20, abs=1e-4)
