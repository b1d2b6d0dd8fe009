"""What the grasp sampler knows of a hand: a few skin points per bone, its pads and palm, and how each grasp moves it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry import meshes, rigid
from ...hand import joints as jt
from ...hand.model import HandModel
from .poses import ROWS, angles_from, rotations_from_angles

GRASPS = ("power", "pinch", "tripod", "lateral", "flat", "hook", "fingertip", "cradle", "palmar")
POWER, PINCH, TRIPOD, LATERAL, FLAT, HOOK, FINGERTIP, CRADLE, PALMAR = range(len(GRASPS))
PER_LINK = 8
# Poses in degrees (see `poses.angles_from`): where fingers start, where they meet (pads together for the precision
# grasps) and how far they may go on from there until they touch.
_OPEN = {
    "power": ([(-5, 8, 4)] * 4, (-5, -1, 3, 9), (-26, 24, -8, -8)),
    "pinch": ([(-14, -6, -4), (-6, 4, 2), (0, 6, 4), (4, 8, 4)], (0, 0, 0, 3), (-30, 24, -12, -16)),
    "tripod": ([(-14, -6, -4), (-14, -6, -4), (8, 12, 6), (16, 16, 8)], (-1, 2, 0, 2), (-30, 28, -12, -16)),
    "lateral": ([(44, 60, 30), (46, 62, 32), (48, 62, 32), (50, 60, 30)], (0, 0, 0, 0), (-14, -22, -6, -8)),
    "flat": ([(-22, -12, -8)] * 4, (-7, -2, 5, 12), (-30, -8, -10, -12)),
    "hook": ([(-12, 4, 4)] * 4, (-2, 0, 0, 2), (-24, -6, -8, -6)),
    "fingertip": ([(-18, -2, 0), (-18, -2, 0), (-18, -2, 0), (-16, -4, 0)], (-10, -3, 5, 14), (-34, 30, -12, -14)),
    "cradle": ([(-16, 0, 0)] * 4, (-10, -3, 6, 14), (-32, 16, -10, -10)),
    "palmar": ([(-8, -12, -6)] * 4, (-3, 0, 2, 4), (-32, 30, -12, -14)),
}
_SHUT = {
    "power": ([(76, 92, 56), (80, 94, 58), (80, 92, 56), (78, 88, 52)], (0, 0, 0, 0), (26, 36, 34, 42)),
    "pinch": ([(29, 32, 16), (18, 24, 12), (22, 26, 14), (24, 26, 14)], (6, 0, 0, 0), (9, 17, -2, -14)),
    "tripod": ([(32, 37, 19), (33, 37, 20), (44, 48, 24), (50, 50, 26)], (5, 6, 2, 0), (12, 22, 1, -14)),
    "lateral": ([(46, 62, 32), (50, 66, 34), (52, 66, 34), (54, 64, 32)], (0, 0, 0, 0), (20, -10, 14, 20)),
    "flat": ([(18, 22, 12)] * 4, (-4, -1, 3, 8), (-6, 4, 6, 8)),
    "hook": ([(52, 96, 60), (54, 98, 62), (54, 96, 60), (52, 92, 56)], (0, 0, 0, 0), (14, 20, 16, 20)),
    "fingertip": ([(38, 45, 24), (36, 46, 25), (33, 39, 20), (40, 24, 9)], (-2, 3, 6, 16), (19, 32, 10, -8)),
    "cradle": ([(60, 62, 36), (60, 64, 36), (60, 62, 36), (60, 60, 34)], (-5, -1, 4, 9), (18, 28, 20, 24)),
    "palmar": ([(62, 8, 4), (64, 8, 4), (64, 8, 4), (62, 8, 4)], (0, 1, 0, 0), (12, 26, 4, -4)),
}
_PRECISE = {"pinch": (1,), "tripod": (1, 2), "lateral": (1,), "fingertip": (1, 2, 3, 4), "palmar": (1, 2, 3)}


@dataclass(frozen=True, eq=False)
class GraspHand:
    """Constants on the hand's device. P points, 8 on each of the 15 finger links (MANO order) and then the palm's."""

    ids: Tensor  # (P,) vertices
    bone: Tensor  # (P,) MANO joint that carries the point
    pads: Tensor  # (5,) rows of `ids`: a point on the pad of each finger, thumb first
    side: Tensor  # () row of `ids`: the thumb side of the index finger's middle link
    palm: Tensor  # (N,) rows of `ids` on the palm's inner face
    coarse: Tensor  # (Q,) rows of `ids` that try out an approach
    opened: Tensor  # (G,15,3) radians
    shut: Tensor  # (G,15,3)
    precise: Tensor  # (G,) bool: held between the thumb and other pads
    grips: Tensor  # (G,5) bool: fingers that take part
    rows: Tensor  # (5,3) joints of each finger, thumb first, as rows of angles (15,3)


@functools.lru_cache(maxsize=4)
def grasp_hand(hand: HandModel) -> GraspHand:
    """Picks the points once per model (on the CPU)."""
    device = hand.device
    h = hand.to(device="cpu", dtype=torch.float32)
    frames, joints = h.joint_frames, h.joint_bases[0]
    normal = meshes.vertex_normals(h.v_template, h.faces)
    weight, owner = h.weights.max(1)
    ids, bone = [], []
    for link in range(1, 16):
        of = torch.nonzero((owner == link) & (weight > 0.75))[:, 0]
        ids.append(of[_spread(h.v_template[of], PER_LINK)])
        bone += [link] * PER_LINK
    pads = []
    for parent, tip in zip(jt.MANO_TIP_PARENTS, h.tip_ids.tolist(), strict=True):
        along = torch.nn.functional.normalize(h.v_template[tip] - joints[parent], dim=0)
        inward = torch.linalg.cross(frames[parent - 1][:, 0], along)
        x = h.v_template - (joints[parent] + 0.7 * (h.v_template[tip] - joints[parent]))
        score = x @ inward - 2 * (x - (x @ inward)[:, None] * inward).norm(dim=1)
        pads.append(int(torch.where(owner == parent, score, -9.0).argmax()))
        row = (parent - 1) * PER_LINK  # the first point of each last link is its pad, the second its tip
        ids[parent - 1] = torch.cat([torch.tensor([pads[-1], tip]), ids[parent - 1][: PER_LINK - 2]])
    side_axis = -frames[1][:, 0] if h.side == "right" else frames[1][:, 0]
    middle = torch.nonzero(owner == 2)[:, 0]
    x = h.v_template[middle] - (joints[2] + joints[3]) / 2
    side_axis = torch.nn.functional.normalize(joints[1] - joints[7], dim=0)  # to the thumb's side
    side = int(middle[(x @ side_axis - 1.5 * (x - (x @ side_axis)[:, None] * side_axis).norm(dim=1)).argmax()])
    ids[1] = torch.cat([torch.tensor([side]), ids[1][: PER_LINK - 1]])
    facing = palm_axes(torch.cat([joints, h.v_template[h.tip_ids]])[None])[1][0]
    of = torch.nonzero(owner == 0)[:, 0]
    inner = of[(normal[of] @ facing > 0.5) & ((h.v_template[of] - joints[0]) @ (joints[4] - joints[0]) > 1e-3)]
    outer = of[normal[of] @ facing < 0.2]
    inner, outer = inner[_spread(h.v_template[inner], 20)], outer[_spread(h.v_template[outer], 16)]
    palm = torch.arange(15 * PER_LINK, 15 * PER_LINK + len(inner))
    bone += [0] * (len(inner) + len(outer))
    ids = torch.cat([*ids, inner, outer])
    at = torch.arange(len(ids))
    coarse = torch.cat(
        [at[: 15 * PER_LINK].reshape(15, PER_LINK)[:, [0, 1, 4]].reshape(-1), palm[::2], at[palm[-1] + 1 :: 2]]
    )
    grips = torch.ones(len(GRASPS), 5, dtype=torch.bool)
    for name, fingers in _PRECISE.items():
        grips[GRASPS.index(name)] = torch.tensor([k in (0, *fingers) for k in range(5)])
    out = {
        "ids": ids,
        "bone": torch.tensor(bone),
        "pads": torch.tensor([(p - 1) * PER_LINK for p in jt.MANO_TIP_PARENTS]),
        "side": torch.tensor(PER_LINK),
        "palm": palm,
        "coarse": coarse,
        "opened": torch.stack([angles_from(*_OPEN[g]) for g in GRASPS]),
        "shut": torch.stack([angles_from(*_SHUT[g]) for g in GRASPS]),
        "precise": torch.tensor([g in _PRECISE for g in GRASPS]),
        "grips": grips,
        "rows": torch.tensor([[ROWS[f] + k for k in range(3)] for f in jt.FINGERS]),
    }
    return GraspHand(**{k: v.to(device) for k, v in out.items()})


def _spread(x: Tensor, n: int) -> Tensor:
    """Indices of n points of x (N,3), each the farthest from those before."""
    chosen = [int((x - x.mean(0)).norm(dim=1).argmax())]
    d = (x - x[chosen[0]]).norm(dim=1)
    for _ in range(n - 1):
        chosen.append(int(d.argmax()))
        d = torch.minimum(d, (x - x[chosen[-1]]).norm(dim=1))
    return torch.tensor(chosen)


def palm_axes(joints: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Posed joints (B,>=16,3) in MANO order of a right hand -> the middle of the grip (B,3), the palm's outward normal
    (B,3) and the axis across it towards the thumb's side (B,3)."""
    wrist, index, middle, pinky = (joints[:, k] for k in (0, 1, 4, 7))
    across = torch.nn.functional.normalize(index - pinky, dim=-1)
    facing = torch.nn.functional.normalize(torch.linalg.cross(index - wrist, pinky - wrist), dim=-1)
    return 0.3 * wrist + 0.7 * (0.4 * index + 0.3 * middle + 0.3 * pinky), facing, across


@dataclass(frozen=True, eq=False)
class Body:
    """N hands' bones and skin points at rest."""

    joints: Tensor  # (N,16,3)
    points: Tensor  # (N,P,3)

    def rows(self, index: Tensor) -> Body:
        return Body(self.joints[index], self.points[index])


def body(hand: HandModel, known: GraspHand, betas: Tensor) -> Body:
    j0, jd = hand.joint_bases
    points = hand.v_template[known.ids] + torch.einsum("pcb,nb->npc", hand.shapedirs[known.ids], betas)
    return Body(j0 + torch.einsum("jcb,nb->njc", jd, betas), points)


def pose(of: Body, angles: Tensor, frames: Tensor, bone: Tensor) -> tuple[Tensor, Tensor]:
    """Joints (N,16,3) and skin points (N,P,3), each carried by one bone, of hands with angles (N,15,3) in frames
    (15,3,3); the wrist does not turn."""
    local = rigid.so3_exp(torch.einsum("kca,nka->nkc", frames, angles)).reshape(-1, 5, 3, 3, 3)  # finger, link
    rest = of.joints[:, 1:].reshape(-1, 5, 3, 3)
    turn, at = [local[:, :, 0]], [rest[:, :, 0]]
    for k in (1, 2):
        at.append(at[-1] + (turn[-1] @ (rest[:, :, k] - rest[:, :, k - 1])[..., None])[..., 0])
        turn.append(turn[-1] @ local[:, :, k])
    joints = torch.cat([of.joints[:, :1], torch.stack(at, 2).flatten(1, 2)], 1)
    n = len(angles)
    eye = torch.eye(3, device=angles.device, dtype=angles.dtype).expand(n, 1, 3, 3)
    turns = torch.cat([eye, torch.stack(turn, 2).flatten(1, 2)], 1)
    links = of.points[:, : 15 * PER_LINK].reshape(n, 15, PER_LINK, 3) - of.joints[:, 1:, None]
    links = links @ turns[:, 1:].mT + joints[:, 1:, None]
    return joints, torch.cat([links.flatten(1, 2), of.points[:, 15 * PER_LINK :]], 1)


__all__ = ["GRASPS", "Body", "GraspHand", "body", "grasp_hand", "palm_axes", "pose", "rotations_from_angles"]
