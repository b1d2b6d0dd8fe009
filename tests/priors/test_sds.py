"""Score distillation: its gradient, its guidance, its noise levels, and what it must never touch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold.priors.sds import Annealing, Guidance, guided, surrogate


class Off:
    """Predicts the noise plus a constant; its latents are the image."""

    alphas_cumprod = torch.linspace(0.99, 0.01, 100)

    def __init__(self, off: float = 0.0):
        self.off, self.noise = off, None

    def encode(self, image):
        return image

    def predict(self, noisy, step, condition):
        kept = self.alphas_cumprod[step]
        return (noisy - kept.sqrt() * self.latent) / (1 - kept).sqrt() + self.off


def guidance(denoiser, **kw):
    return Guidance(denoiser, "a box", total=100, scale=1.0, weight=1.0, **kw)


@pytest.mark.parametrize("off", [0.0, 0.3])
def test_the_gradient_is_the_weighted_error_of_the_predicted_noise(off):
    d = Off(off)
    d.latent = torch.rand(1, 3, 4, 4)
    noise = torch.randn(1, 3, 4, 4)
    g = guidance(d).gradient(d.latent, noise, 60)
    assert torch.allclose(g, torch.full_like(g, float(1 - d.alphas_cumprod[60]) * off), atol=1e-5)


def test_the_surrogate_has_that_gradient():
    z, g = torch.randn(2, 5, dtype=torch.float64, requires_grad=True), torch.randn(2, 5, dtype=torch.float64)
    surrogate(z, g).backward()
    assert torch.allclose(z.grad, g, atol=1e-12)


def test_guidance_goes_from_unconditional_to_conditional():
    predict = {None: torch.tensor(1.0), "x": torch.tensor(3.0)}.__getitem__
    assert [float(guided(predict, "x", s)) for s in (0, 1, 2)] == [1.0, 3.0, 5.0]


@pytest.mark.parametrize("progress", [0.0, 0.45, 0.99])
def test_noise_levels_stay_in_their_range(progress):
    plan, generator = Annealing(), torch.Generator().manual_seed(0)
    low, high = plan.range(progress)
    drawn = np.array([plan.draw(progress, 1000, generator) for _ in range(10_000)]) / 1000
    assert drawn.min() >= low - 1e-3 and drawn.max() <= high
    assert np.histogram(drawn, 4, (low, high))[0].min() > 2000


def test_training_goes_on_to_lower_noise():
    g = guidance(Off())
    first = g.annealing.range(g.done / g.total)
    for _ in range(g.total - 1):
        g.advance()
    assert g.annealing.range(g.done / g.total)[1] < first[0]


def test_nothing_reaches_what_was_seen():
    image = torch.rand(6, 6, 3, requires_grad=True)
    unseen = torch.zeros(6, 6)
    unseen[:3] = 1
    d = Off(1.0)
    d.encode = lambda x: torch.nn.functional.avg_pool2d(x, 3, 1, 1)  # mixes neighbours
    d.latent = d.encode(image.detach().permute(2, 0, 1)[None])
    guidance(d).loss(image, unseen, torch.Generator().manual_seed(0)).backward()
    assert (image.grad[3:] == 0).all() and image.grad[:3].abs().min() > 0
