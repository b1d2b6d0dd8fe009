"""Everything that knows what a finger is: the skinned hand model, its joints, its files."""

from .assets import load_mano
from .joints import joint_limit_loss
from .model import HandModel, PosedHand, ShapedHand, Unposed, mirror_points, mirror_pose

__all__ = [
    "HandModel",
    "PosedHand",
    "ShapedHand",
    "Unposed",
    "joint_limit_loss",
    "load_mano",
    "mirror_points",
    "mirror_pose",
]
