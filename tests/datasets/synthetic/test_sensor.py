"""The sensor: units, seeds, and what each fault does to a picture."""

from dataclasses import replace

import pytest
import torch

from handhold.datasets.synthetic import sensor
from handhold.datasets.synthetic.textures import linear_from_srgb

pytestmark = pytest.mark.usefixtures("one_thread")


def picture(n=3, size=64):
    g = torch.Generator().manual_seed(1)
    x = torch.nn.functional.interpolate(torch.rand(n, 3, 8, 8, generator=g), (size, size), mode="bilinear")
    return 0.5 * x


def plain(n):
    return sensor.sample_sensors(n, torch.Generator().manual_seed(0), strength=0.0)


def test_gives_eight_bit_srgb_and_depends_on_the_seed_only():
    a = sensor.expose(picture(), torch.Generator().manual_seed(3))
    assert a.shape == (3, 3, 64, 64) and a.min() >= 0 and a.max() <= 1
    torch.testing.assert_close(a * 255, (a * 255).round(), atol=1e-4, rtol=0)
    assert torch.equal(a, sensor.expose(picture(), torch.Generator().manual_seed(3)))
    assert not torch.equal(a, sensor.expose(picture(), torch.Generator().manual_seed(4)))


def test_a_picture_is_the_same_alone_and_in_a_batch():
    s = sensor.sample_sensors(5, torch.Generator().manual_seed(5))
    x = picture(5)
    together = sensor._develop(x.clone(), s)
    alone = sensor.develop(x, s)
    for k in range(5):
        one = replace(s, **{f: getattr(s, f)[k : k + 1] for f in s.__dataclass_fields__})
        both = sensor.develop(x[k : k + 1], one)
        assert (both - alone[k]).abs().max() <= 1 / 255 + 1e-6
        assert (both - together[k]).abs().mean() < 0.2 / 255


def test_exposure_does_not_depend_on_the_light():
    x = picture()
    torch.testing.assert_close(sensor.develop(x, plain(3)), sensor.develop(7 * x, plain(3)), atol=1.1 / 255, rtol=0)


def test_curves_are_inverse_below_the_shoulder():
    x = torch.linspace(0.002, 0.8, 200)
    torch.testing.assert_close(linear_from_srgb(sensor.srgb_from_linear(x)), x, atol=0.01, rtol=0.02)
    bright = sensor.srgb_from_linear(torch.linspace(0.0, 30.0, 500))
    assert (torch.diff(bright) > -1e-6).all() and bright[-1] < 1.01


def test_blur_keeps_flat_pictures_and_the_kernel_sums_to_one():
    s = sensor.sample_sensors(64, torch.Generator().manual_seed(2))
    torch.testing.assert_close(s.kernel.sum((1, 2)), torch.ones(64))
    flat = torch.full((64, 3, 24, 24), 0.3)
    torch.testing.assert_close(sensor._convolve(flat, s.kernel), flat)


@pytest.mark.parametrize("size", [(64, 64), (50, 37)])
def test_jpeg_error_falls_with_quality(size):
    g = torch.Generator().manual_seed(1)
    x = (picture(1) + 0.1 * torch.rand(1, 3, 64, 64, generator=g)).clamp(0, 1)[..., : size[0], : size[1]]
    errors = [(sensor.jpeg(x, torch.tensor([q])) - x).square().mean().sqrt() for q in (10.0, 50.0, 95.0)]
    assert errors[0] > errors[1] > errors[2] and errors[0] < 0.15
    flat = torch.full((1, 3, 32, 32), 0.5)
    torch.testing.assert_close(sensor.jpeg(flat, torch.tensor([100.0])), flat, atol=1 / 255, rtol=0)


def test_noise_has_the_strength_that_was_asked_for():
    n, level = 2, 0.2
    s = replace(plain(n), shot=torch.tensor([0.0, 1e-3]), read=torch.tensor([0.01, 0.0]))
    x = torch.full((n, 3, 96, 96), level)
    deviation = sensor._noise(x, s).std((1, 2, 3))
    torch.testing.assert_close(deviation, torch.tensor([0.01, (1e-3 * level) ** 0.5]), rtol=0.05, atol=0)
