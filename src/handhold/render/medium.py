"""Optical depth: of a signed distance field, and what passes through it."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn


def laplace_density(sdf: Tensor, beta: Tensor | float) -> Tensor:
    """Density 1/beta * (CDF of the Laplace distribution of width beta at -sdf) (VolSDF, Yariv et al. 2021, eq. 2-3).

    1/(2 beta) on the surface, 1/beta inside; differentiable in both, at sdf = 0 too; float32 is safe for any sdf/beta.
    """
    # Each branch sees its own side only: exp cannot overflow, and clamp (unlike abs) has the right slope at 0.
    outside = 0.5 * torch.exp(-sdf.clamp(min=0) / beta)
    inside = 1 - 0.5 * torch.exp(sdf.clamp(max=0) / beta)
    return torch.where(sdf >= 0, outside, inside) / beta


class LaplaceDensity(nn.Module):
    """`laplace_density` with a learned width |b| + least."""

    def __init__(self, beta: float = 0.1, least: float = 1e-4):
        super().__init__()
        if not beta > least > 0:
            raise ValueError(f"the width starts above its least value {least}, not at {beta}")
        self.raw = nn.Parameter(torch.tensor(float(beta) - least))
        self.least = least

    @property
    def beta(self) -> Tensor:
        return self.raw.abs() + self.least

    def forward(self, sdf: Tensor) -> Tensor:
        return laplace_density(sdf, self.beta)


def neus_optical_depth(start: Tensor, end: Tensor, inv_s: Tensor | float) -> Tensor:
    """Optical depth between two samples with these SDF values (NeuS, Wang et al. 2021, eq. 13: -log(1 - alpha)).

    inv_s: the logistic's sharpness, 1/width. max(log sigmoid(s start) - log sigmoid(s end), 0): the logarithm of the
    paper's quotient, which needs no epsilon and telescopes, so that a monotone passage has the same opacity however it
    is cut. Zero where the ray leaves the body.
    """
    log = nn.functional.logsigmoid
    return (log(start * inv_s) - log(end * inv_s)).clamp(min=0)


class LogisticDepth(nn.Module):
    """`neus_optical_depth` with a learned sharpness exp(10 raw) (NeuS, the authors' parameter)."""

    def __init__(self, inv_s: float = 20.0):
        super().__init__()
        self.raw = nn.Parameter(torch.tensor(math.log(inv_s) / 10))

    @property
    def inv_s(self) -> Tensor:
        return torch.exp(10 * self.raw)

    def forward(self, start: Tensor, end: Tensor) -> Tensor:
        return neus_optical_depth(start, end, self.inv_s)


def neus_alpha(start: Tensor, end: Tensor, inv_s: Tensor | float) -> Tensor:
    """Section opacity in [0,1] of the interval (NeuS, eq. 13)."""
    return -torch.expm1(-neus_optical_depth(start, end, inv_s))


def _mean_passed(tau: Tensor) -> Tensor:
    """(1 - exp(-tau)) / tau, 1 at 0."""
    small = tau < 1e-3
    safe = torch.where(small, torch.ones_like(tau), tau)
    return torch.where(small, 1 - tau / 2 * (1 - tau / 3 * (1 - tau / 4)), -torch.expm1(-safe) / safe)


def transmittance(tau: Tensor) -> Tensor:
    """(N,S) optical depths in a row -> (N,S+1) what passes: 1 before the first, then after each."""
    return torch.exp(-nn.functional.pad(tau.cumsum(-1), (1, 0)))


def weights(tau: Tensor) -> Tensor:
    """Quadrature weights (Mildenhall et al., ECCV 2020, eq. 3; joint form) of tau (N,S) or (N,S,B); the same shape.

    w_b = T tau_b (1 - exp(-tau)) / tau, with tau the sum over bodies and T what passes before: with the T that is left,
    they sum to 1. Written without the quotient tau_b / tau, which is 0/0 in empty space.
    """
    total = tau if tau.ndim == 2 else tau.sum(-1)
    w = transmittance(total)[:, :-1] * _mean_passed(total)
    return tau * (w if tau.ndim == 2 else w[..., None])
