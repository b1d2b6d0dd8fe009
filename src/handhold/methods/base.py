"""What every method gives the fit stage, and the hands that all of them pose."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from ..errors import UnusableInput
from ..hand import HandModel
from ..scene import SIDES, Mesh, load_npz
from ..shapes.gaussians import Gaussians
from ..shapes.skinned import SkinnedGaussians, from_arrays
from ..tracking.symmetry import Ambiguity

OBJECT_SPLATS = "object_gaussians"  # name of the arrays that become object_splat.ply
HAND_SPLATS = {side: f"{side}_gaussians" for side in SIDES}  # of those of a hand, `SkinnedGaussians.arrays`
BONES = 16  # of a hand


@dataclass(frozen=True)
class Fitted:
    """What the fit stage turns into a scene and the files of `3_fit/`."""

    mesh: Mesh | None  # metres, object frame
    cam_from_object: np.ndarray  # (F,4,4), NaN where unknown
    object_confidence: np.ndarray  # (F,)
    object_reason: np.ndarray  # (F,) str
    hands: dict  # side -> HandTrack
    notes: list[str] = field(default_factory=list)
    doubts: list[str] = field(default_factory=list)  # why the result is only partial
    ambiguous: tuple[Ambiguity, ...] = ()  # turns of the object that no picture tells apart
    arrays: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)  # name -> what 3_fit/NAME.npz holds
    hand_colors: dict[str, np.ndarray] = field(default_factory=dict)  # side -> (V,3) sRGB in [0,1], of the open hand
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)  # name -> what NAME.safetensors holds
    meshes: dict[str, Mesh] = field(default_factory=dict)  # name -> 3_fit/NAME.ply


def fitted_splats(folder: Path, bodies: Iterable[str]) -> dict[str, Gaussians | SkinnedGaussians]:
    """The Gaussians that `3_fit/` holds of these bodies, ids in this order: hands at rest, the object in its frame.

    Raises `UnusableInput` when a file is broken.
    """
    found = {}
    for k, name in enumerate(bodies):
        path = folder / f"{HAND_SPLATS.get(name, OBJECT_SPLATS)}.npz"
        if path.is_file():
            try:
                found[name] = from_arrays(load_npz(path, 1 << 30), k, BONES if name in SIDES else 0)
            except ValueError as e:
                raise UnusableInput(f"{path} cannot be used: {e}; run the `fit` stage again.") from e
    return found


def posed_hand(side: str, h) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (F,V,3) camera frame and faces of a tracked hand, sealed at the wrist."""
    model = HandModel.open(side, dtype=torch.float64).sealed()
    posed = model.with_shape(f64(h.betas)).with_pose(f64(h.pose), f64(h.transl))
    return posed.vertices.numpy(), np.asarray(model.faces)


def f64(x) -> torch.Tensor:
    """A float64 tensor of anything numpy reads."""
    return torch.as_tensor(np.asarray(x, np.float64))
