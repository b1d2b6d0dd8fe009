"""Score distillation: a diffusion model's opinion of pictures from views that no frame shows (Poole et al., ICLR 2023).

The hook that BIGS (On et al., CVPR 2025, section 3.2) uses for the object's unobserved side. The diffusion model is the
user's: anything with `Denoiser`'s three members. Without one nothing happens, and the result says so.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

SKIPPED = "no generative prior was given: what no frame has seen keeps the colours of its surroundings"


class Denoiser(Protocol):
    """A noise-predicting diffusion model."""

    alphas_cumprod: Tensor  # (T,) of the noise schedule, falling

    def encode(self, image: Tensor) -> Tensor:
        """(1,3,H,W) in [0,1] -> latent, differentiable; the image itself for a model without latents."""

    def predict(self, noisy: Tensor, step: int, condition: Any) -> Tensor:
        """The noise in a noisy latent; condition None: unconditional."""


@dataclass(frozen=True)
class Annealing:
    """Which noise levels are drawn, as shares of the schedule: (until this share of training, low, high)."""

    phases: tuple[tuple[float, float, float], ...] = ((0.3, 0.5, 0.98), (0.6, 0.3, 0.7), (1.0, 0.02, 0.3))

    def range(self, progress: float) -> tuple[float, float]:
        """Range at `progress` in [0,1] of training."""
        for until, low, high in self.phases:
            if progress < until:
                return low, high
        return self.phases[-1][1:]

    def draw(self, progress: float, steps: int, generator: torch.Generator) -> int:
        """A step of the schedule, 0 .. steps - 1."""
        low, high = self.range(progress)
        share = low + (high - low) * torch.rand((), generator=generator).item()
        return min(int(share * steps), steps - 1)


@dataclass
class Guidance:
    """A denoiser with what it is asked, and how far training is: `advance` is called once per step."""

    denoiser: Denoiser
    condition: Any
    total: int  # steps of training
    scale: float = 50.0  # of classifier-free guidance
    weight: float = 1e-3  # of the loss beside the pictures'
    annealing: Annealing = Annealing()
    done: int = 0

    def advance(self) -> None:
        self.done += 1

    def loss(self, image: Tensor, unseen: Tensor, generator: torch.Generator) -> Tensor:
        """Surrogate whose gradient in the image (H,W,3) is the prior's, where `unseen` (H,W) is 1 and nowhere else."""
        # Outside, the image is a constant: whatever the encoder mixes, no gradient reaches what frames have seen.
        free = unseen[..., None].to(image)
        masked = free * image + (1 - free) * image.detach()
        latent = self.denoiser.encode(masked.permute(2, 0, 1)[None])
        step = self.annealing.draw(self.done / max(self.total, 1), len(self.denoiser.alphas_cumprod), generator)
        noise = torch.randn(latent.shape, generator=generator).to(latent)
        return self.weight * surrogate(latent, self.gradient(latent, noise, step))

    @torch.no_grad()
    def gradient(self, latent: Tensor, noise: Tensor, step: int) -> Tensor:
        """w(t) (eps_hat - eps), w(t) = 1 - alphabar_t; nothing is propagated through the denoiser."""
        kept = self.denoiser.alphas_cumprod[step].to(latent)
        noisy = kept.sqrt() * latent + (1 - kept).sqrt() * noise
        predicted = guided(lambda c: self.denoiser.predict(noisy, step, c), self.condition, self.scale)
        return (1 - kept) * (predicted - noise)


def guided(predict: Callable[[Any], Tensor], condition: Any, scale: float) -> Tensor:
    """Classifier-free guidance (Ho and Salimans, 2022): eps_u + scale (eps_c - eps_u)."""
    if scale == 1:
        return predict(condition)
    unconditional = predict(None)
    return unconditional if scale == 0 else unconditional + scale * (predict(condition) - unconditional)


def surrogate(latent: Tensor, gradient: Tensor) -> Tensor:
    """0.5 |z - sg(z - g)|^2: its derivative in z is g."""
    return 0.5 * (latent - (latent - gradient).detach()).square().sum()
