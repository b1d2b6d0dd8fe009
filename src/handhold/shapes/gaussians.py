"""3D Gaussians as plain tensors."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Gaussians:
    """N anisotropic Gaussians in one frame, metres, with the values a renderer takes (no logits, no logarithms)."""

    means: Tensor  # (N,3) metres
    quats: Tensor  # (N,4) wxyz, any length
    scales: Tensor  # (N,3) standard deviations, metres
    opacities: Tensor  # (N,) in [0,1]
    colors: Tensor  # (N,3) in [0,1]
    ids: Tensor  # (N,) int64 body id

    def __len__(self) -> int:
        return len(self.means)

    def with_values(self, **kw) -> Gaussians:
        return replace(self, **kw)

    def to(self, *args, **kw) -> Gaussians:
        """All float tensors moved or cast as by `Tensor.to`; ids follow the device and keep their type."""
        floats = {k: getattr(self, k).to(*args, **kw) for k in ("means", "quats", "scales", "opacities", "colors")}
        return Gaussians(**floats, ids=self.ids.to(floats["means"].device))


def concatenate(parts: list[Gaussians]) -> Gaussians:
    """One set out of several, in order; all must be in the same frame."""
    names = ("means", "quats", "scales", "opacities", "colors", "ids")
    return Gaussians(**{k: torch.cat([getattr(p, k) for p in parts]) for k in names})
