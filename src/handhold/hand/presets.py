"""Hand poses by name, said in degrees of flexion and abduction in each joint's own frame, within its limits."""

from __future__ import annotations

import torch
from torch import Tensor

from .joints import MANO_NAMES
from .model import HandModel, mirror_pose

# Degrees away from the relaxed rest pose: flexion (towards the palm) of the three joints of a finger, abduction of the
# first (positive towards the thumb), as of a right hand.
_CURLED = (80.0, 95.0, 55.0)
_STRAIGHT = (-12.0, -12.0, -8.0)
_POSES: dict[str, dict[str, tuple[tuple[float, float, float], float]]] = {
    "rest": {},
    "open": {
        "index": (_STRAIGHT, 10.0),
        "middle": (_STRAIGHT, 2.0),
        "ring": (_STRAIGHT, -7.0),
        "pinky": (_STRAIGHT, -16.0),
        "thumb": ((-8.0, -10.0, -10.0), 15.0),
    },
    "fist": {f: (_CURLED, 0.0) for f in ("index", "middle", "ring", "pinky")} | {"thumb": ((20.0, 35.0, 50.0), -15.0)},
    "point": {
        "index": (_STRAIGHT, 0.0),
        **{f: (_CURLED, 0.0) for f in ("middle", "ring", "pinky")},
        "thumb": ((20.0, 35.0, 50.0), -15.0),
    },
}
PRESETS = tuple(_POSES)


def preset(model: HandModel, name: str) -> Tensor:
    """(16,3) axis-angle pose of `model` for a name of `PRESETS`; the wrist's own turn is zero.

    The relaxed rest pose is the open hand's; a MANO file's differs by a few degrees a joint.
    """
    if model.side == "left":
        return mirror_pose(preset(model.mirrored(), name))
    degrees = torch.zeros(15, 3, dtype=model.dtype)
    for finger, (flexion, abduction) in _POSES[name].items():
        for k, bend in enumerate(flexion):
            degrees[MANO_NAMES.index(f"{finger}{k + 1}") - 1, 0] = bend
        degrees[MANO_NAMES.index(f"{finger}1") - 1, 1] = abduction
    angles = torch.deg2rad(degrees).to(model.device)
    fingers = torch.einsum("kca,ka->kc", model.joint_frames, angles)
    return torch.cat([fingers.new_zeros(1, 3), fingers]) - model.pose_mean
