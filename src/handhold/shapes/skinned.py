"""Gaussians that a skeleton carries: kept at rest with skinning weights, posed by the blended matrix of their bones.

One layout for every method, `3_fit/<body>_gaussians.npz` (docs/formats.md): a hand's Gaussians are in the frame of its
model at rest with the clip's shape, the object's are in the object's frame and have no weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from scipy.spatial import cKDTree
from torch import Tensor

from ..kernels.splat_torch import sh_basis
from .gaussians import Gaussians

_WIDTH = {"means": (3,), "quats": (4,), "scales": (3,), "opacities": (), "colors": (3,)}
MAX_COUNT = 5_000_000


@dataclass(frozen=True)
class SkinnedGaussians:
    """Gaussians at rest, metres, and which bone moves each by how much."""

    rest: Gaussians
    weights: Tensor  # (N,J), rows sum to 1

    def __len__(self) -> int:
        return len(self.rest)

    def posed(self, bones: Tensor) -> Gaussians:
        """Where bones (J,4,4), posed_from_rest, carry them: `PosedHand.bone_transforms`, for instance.

        Linear blend skinning: M, t = sum_j w_j bones_j; means M x + t and covariances M C M^T with all of M, so that
        they stretch as the skin does. Gradients reach everything, the bones and the weights included.
        """
        if bones.shape != (self.weights.shape[1], 4, 4):
            raise ValueError(f"bones are {tuple(bones.shape)}, not ({self.weights.shape[1]},4,4)")
        return self.rest.transformed(*blended(self.weights, bones))

    def arrays(self) -> dict[str, np.ndarray]:
        """What the file holds."""
        return self.rest.arrays() | {"weights": self.weights.detach().cpu().numpy()}


def blended(weights: Tensor, bones: Tensor) -> tuple[Tensor, Tensor]:
    """M (N,3,3) and t (N,3) of sum_j w_j bones_j: weights (N,J), bones (J,4,4)."""
    mixed = (weights @ bones[:, :3].reshape(len(bones), 12)).reshape(-1, 3, 4)
    return mixed[..., :3], mixed[..., 3]


def from_arrays(arrays: Mapping[str, np.ndarray], body: int = 0, bones: int = 0) -> Gaussians | SkinnedGaussians:
    """Gaussians with body id `body` from the arrays of a file: skinned to `bones` bones, or rigid when that is 0.

    means (N,3) metres; quats (N,4) wxyz, any length; scales (N,3) metres; opacities (N,) and colors (N,3) in [0,1];
    weights (N,bones). Raises ValueError with one sentence when they cannot be used.
    """
    wanted = _WIDTH | ({"weights": (bones,)} if bones else {})
    count = len(arrays["means"]) if np.ndim(arrays.get("means", 0)) else 0
    if count > MAX_COUNT:
        raise ValueError(f"{count} Gaussians are more than {MAX_COUNT}")
    found = {}
    for name, width in wanted.items():
        if name not in arrays:
            raise ValueError(f"there are no {name}")
        value = np.asarray(arrays[name])
        if value.dtype.kind not in "fiu" or value.shape != (count, *width):
            raise ValueError(f"{name} are {value.dtype} {value.shape}, not numbers {(count, *width)}")
        if not np.isfinite(value).all():
            raise ValueError(f"{name} are not finite")
        found[name] = torch.from_numpy(value.astype(np.float32))
    if count and (found["scales"].min() < 0 or found["opacities"].min() < 0 or found["opacities"].max() > 1):
        raise ValueError("scales must not be negative, and opacities in [0,1]")
    if count and found["quats"].norm(dim=1).min() < 1e-6:
        raise ValueError("quats have a row of zeros")
    weights = found.pop("weights", None)
    rest = Gaussians(**found, ids=torch.full((count,), body))
    if weights is None:
        return rest
    total = weights.sum(1, keepdim=True)
    if count and (weights.min() < -1e-4 or (total - 1).abs().max() > 1e-2):
        raise ValueError("weights must not be negative, and sum to 1 in each row")
    return SkinnedGaussians(rest, weights / total)


def colors_at(g: Gaussians, points: np.ndarray, neighbours: int = 8) -> np.ndarray:
    """(P,3) float32 colours in [0,1] of points (P,3) in the Gaussians' frame: those of the nearest ones, averaged.

    Weights fall off with the distance over that of the farthest neighbour, times opacity. Of spherical harmonics only
    the constant counts. No Gaussians: grey.
    """
    points = np.asarray(points, np.float64)
    if not len(g):
        return np.full((len(points), 3), 0.5, np.float32)
    colors = g.colors.detach().cpu()
    if colors.ndim == 3:
        colors = 0.5 + float(sh_basis(0, torch.tensor([[0.0, 0.0, 1.0]]))) * colors[:, 0]
    many = min(neighbours, len(g))
    distance, near = cKDTree(g.means.detach().cpu().double().numpy()).query(points, many)
    distance, near = distance.reshape(len(points), many), near.reshape(len(points), many)
    weight = np.exp(-2 * np.square(distance / np.maximum(distance[:, -1:], 1e-9)))
    weight = weight * np.maximum(g.opacities.detach().cpu().numpy()[near], 1e-6)
    mean = (colors.double().numpy()[near] * weight[..., None]).sum(1) / weight.sum(1, keepdims=True)
    return np.clip(mean, 0, 1).astype(np.float32)
