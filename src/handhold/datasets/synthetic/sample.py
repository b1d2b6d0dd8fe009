"""What the generator gives: pictures with exact truth, as plain tensors on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

BACKGROUND, RIGHT, LEFT, OBJECT, FOREARM = range(5)
LABELS = ("background", "right", "left", "object", "forearm")
"""Names of the values of `SynthBatch.labels`. `forearm` is arm, sleeve and watch; what nobody touches is background."""


@dataclass(frozen=True, eq=False)
class HandTruth:
    """One side's hands of a batch, camera frame, metres, in the convention of that side's own model (the left model is
    the mirrored right). Rows that are not `present` are finite and mean nothing."""

    present: Tensor  # (B,) bool
    rotations: Tensor  # (B,16,3,3) joint rotations, MANO order, the first is the global one
    betas: Tensor  # (B,10)
    transl: Tensor  # (B,3)
    vertices: Tensor  # (B,V,3)
    joints: Tensor  # (B,21,3) OpenPose order
    points: Tensor  # (B,21,2) pixels
    visible: Tensor  # (B,21) bool: inside the picture and not hidden by another body (its own hand does not count)
    hidden: Tensor  # (B,) share of the hand's amodal mask, inside the picture, that other bodies hide
    inside: Tensor  # (B,) share of the hand's vertices that project into the picture
    contact: Tensor  # (B,V) bool: vertices that touch the object


@dataclass(frozen=True, eq=False)
class ObjectTruth:
    """The handled object of each picture: rows of the generator's bank, and where they are."""

    present: Tensor  # (B,) bool
    index: Tensor  # (B,) int64 row of the bank
    cam_from_object: Tensor  # (B,4,4) rigid, of the base part
    vertices: Tensor  # (B,N,3) camera frame, padded
    angle: Tensor  # (B,) radians of the hinge, 0 where there is none
    deformed: Tensor  # (B,) bool: bent, squeezed or twisted away from the bank's shape
    mirrored: Tensor  # (B,) bool: its shape is the bank's reflected in x


@dataclass(frozen=True, eq=False)
class SynthBatch:
    """B pictures and everything that is true of them."""

    image: Tensor  # (B,3,H,W) sRGB in [0,1]
    K: Tensor  # (B,3,3) pixels
    labels: Tensor  # (B,H,W) uint8, see LABELS
    amodal: Tensor  # (B,4,H,W) bool: right, left, object, forearm, each as if it were alone; (B,0,H,W): not drawn
    depth: Tensor  # (B,H,W) metres, 0 where there is only background
    right: HandTruth
    left: HandTruth
    object: ObjectTruth

    def __len__(self) -> int:
        return len(self.image)

    def hand(self, side: str) -> HandTruth:
        return self.right if side == "right" else self.left

    def to(self, device: str | torch.device) -> SynthBatch:
        return map_tensors(self, lambda x: x.to(device, non_blocking=True))

    def rows(self, index: Tensor | slice) -> SynthBatch:
        """Some of the pictures."""
        return map_tensors(self, lambda x: x[index])

    @staticmethod
    def cat(parts: list[SynthBatch]) -> SynthBatch:
        return _zip(parts)


def map_tensors(x: Any, f: Callable[[Tensor], Tensor]) -> Any:
    """`f` of every tensor in a nest of dataclasses and tuples; everything else stays."""
    if isinstance(x, Tensor):
        return f(x)
    if isinstance(x, tuple):
        return tuple(map_tensors(v, f) for v in x)
    if is_dataclass(x):
        return replace(x, **{k.name: map_tensors(getattr(x, k.name), f) for k in fields(x)})
    return x


def _zip(parts):
    first = parts[0]
    if isinstance(first, Tensor):
        return torch.cat(parts)
    return replace(first, **{k.name: _zip([getattr(p, k.name) for p in parts]) for k in fields(first)})
