"""Trilinear lookup in plain torch, by indexing: value, normal by autograd, and a double backward."""

from __future__ import annotations

import torch
from torch import Tensor

CORNERS = torch.tensor([[i, j, k] for i in (0, 1) for j in (0, 1) for k in (0, 1)])


def sample(data: Tensor, lo: float, h: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """data (R,R,R,4), x (N,3) that requires grad and lies inside -> value (N,4), gradient of channel 0 (N,3)."""
    R = data.shape[0]
    p = (x - lo) / h
    i = p.detach().floor().clamp(0, R - 2)
    corner = i.long()[:, None] + CORNERS
    index = (corner[..., 0] * R + corner[..., 1]) * R + corner[..., 2]
    f = (p - i)[:, None]
    wx, wy, wz = torch.where(CORNERS.bool(), f, 1 - f).unbind(-1)
    value = torch.einsum("nk,nkc->nc", wx * wy * wz, data.reshape(-1, 4)[index])
    (normal,) = torch.autograd.grad(value[:, 0].sum(), x, create_graph=True)
    return value, normal
