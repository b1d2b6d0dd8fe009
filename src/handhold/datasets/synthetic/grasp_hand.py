"""What the grasp sampler knows of a hand: some skin points per bone, pads, palm, and how each grasp moves it."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry import meshes, rigid
from ...hand import joints as jt
from ...hand.model import HandModel
from .poses import ROWS, angles_from

GRASPS = ("power", "pinch", "tripod", "lateral", "flat", "hook", "fingertip", "cradle", "palmar")
POWER, PINCH, TRIPOD, LATERAL, FLAT, HOOK, FINGERTIP, CRADLE, PALMAR = range(len(GRASPS))
PER_LINK = 18  # skin points per finger link, spread the wider the fewer of them are taken
FEW = 5  # of them while fingers are far from closed
AXIS, PALM_AXIS = 0.004, 0.006  # metres
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
    """Constants on the hand's device."""

    links: Tensor  # (15,L) vertices on each finger link, MANO order; a last link's begin with the pad and the tip
    palm: Tensor  # (P,) vertices of palm and back, the palm's inner face first
    inner: int  # how many of them are on the inner face
    ends: Tensor  # (5,) rows of `links`: the last link of each finger, thumb first
    opened: Tensor  # (G,15,3) radians
    shut: Tensor  # (G,15,3)
    precise: Tensor  # (G,) bool: held between the thumb and other pads
    grips: Tensor  # (G,5) bool: fingers that take part
    owner: Tensor  # (V,) MANO joint with the largest weight of each vertex
    rows: Tensor  # (5,3) joints of each finger, thumb first, as rows of angles (15,3)


@functools.lru_cache(maxsize=4)
def grasp_hand(hand: HandModel) -> GraspHand:
    """Picks the points once per model (on the CPU)."""
    device = hand.device
    h = hand.to(device="cpu", dtype=torch.float32)
    frames, joints = h.joint_frames, h.joint_bases[0]
    normal = meshes.vertex_normals(h.v_template, h.faces)
    weight, owner = h.weights.max(1)
    links = []
    for link in range(1, 16):
        of = torch.nonzero((owner == link) & (weight >= weight[owner == link].median().clamp_max(0.8)))[:, 0]
        links.append(of[_spread(h.v_template[of], PER_LINK)])
    for parent, tip in zip(jt.MANO_TIP_PARENTS, h.tip_ids.tolist(), strict=True):
        along = torch.nn.functional.normalize(h.v_template[tip] - joints[parent], dim=0)
        inward = torch.linalg.cross(frames[parent - 1][:, 0], along)
        x = h.v_template - (joints[parent] + 0.7 * (h.v_template[tip] - joints[parent]))
        score = x @ inward - 2 * (x - (x @ inward)[:, None] * inward).norm(dim=1)
        pad = int(torch.where(owner == parent, score, -9.0).argmax())
        links[parent - 1] = torch.cat([torch.tensor([pad, tip]), links[parent - 1][: PER_LINK - 2]])
    middle = torch.nonzero(owner == 2)[:, 0]  # the thumb's side of the index finger's middle link comes first
    x = h.v_template[middle] - (joints[2] + joints[3]) / 2
    aside = torch.nn.functional.normalize(joints[1] - joints[7], dim=0)
    side = middle[(x @ aside - 1.5 * (x - (x @ aside)[:, None] * aside).norm(dim=1)).argmax()]
    links[1] = torch.cat([side[None], links[1][: PER_LINK - 1]])
    facing = palm_axes(torch.cat([joints, h.v_template[h.tip_ids]])[None])[1][0]
    of = torch.nonzero(owner == 0)[:, 0]
    inner = of[(normal[of] @ facing > 0.3) & ((h.v_template[of] - joints[0]) @ (joints[4] - joints[0]) > 1e-3)]
    outer = of[normal[of] @ facing < 0.0]
    inner, outer = inner[_spread(h.v_template[inner], 40)], outer[_spread(h.v_template[outer], 20)]
    grips = torch.ones(len(GRASPS), 5, dtype=torch.bool)
    for name, fingers in _PRECISE.items():
        grips[GRASPS.index(name)] = torch.tensor([k in (0, *fingers) for k in range(5)])
    out = {
        "links": torch.stack(links),
        "palm": torch.cat([inner, outer]),
        "owner": owner,
        "ends": torch.tensor([p - 1 for p in jt.MANO_TIP_PARENTS]),
        "opened": torch.stack([angles_from(*_OPEN[g]) for g in GRASPS]),
        "shut": torch.stack([angles_from(*_SHUT[g]) for g in GRASPS]),
        "precise": torch.tensor([g in _PRECISE for g in GRASPS]),
        "grips": grips,
        "rows": torch.tensor([[ROWS[f] + k for k in range(3)] for f in jt.FINGERS]),
    }
    return GraspHand(inner=len(inner), **{k: v.to(device) for k, v in out.items()})


def _spread(x: Tensor, n: int) -> Tensor:
    """Indices of n points of x (N,3), each the farthest from those before; repeated if N < n."""
    chosen = [int((x - x.mean(0)).norm(dim=1).argmax())]
    d = (x - x[chosen[0]]).norm(dim=1)
    for _ in range(n - 1):
        chosen.append(int(d.argmax()))
        d = torch.minimum(d, (x - x[chosen[-1]]).norm(dim=1))
    return torch.tensor((chosen[: len(x)] * n)[:n])


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
    links: Tensor  # (N,15,L,3)
    palm: Tensor  # (N,P,3) on the wrist's bone, which does not move

    def rows(self, index: Tensor) -> Body:
        return Body(self.joints[index], self.links[index], self.palm[index])

    def times(self, n: int) -> Body:
        """The hands n times over, one after the other."""
        return Body(self.joints.repeat(n, 1, 1), self.links.repeat(n, 1, 1, 1), self.palm.repeat(n, 1, 1))


def body(hand: HandModel, known: GraspHand, betas: Tensor) -> Body:
    """Hands of the shapes betas (N,10)."""
    j0, jd = hand.joint_bases
    ids = torch.cat([known.links.reshape(-1), known.palm])
    points = hand.v_template[ids] + torch.einsum("pcb,nb->npc", hand.shapedirs[ids], betas)
    n = known.links.numel()
    return Body(
        j0 + torch.einsum("jcb,nb->njc", jd, betas), points[:, :n].unflatten(1, known.links.shape), points[:, n:]
    )


def axes(joints: Tensor, tips: Tensor) -> Tensor:
    """Points (N,15,2,3) inside the finger links, at least AXIS from their skin: joints (N,16,3), tips (N,5,3) thumb
    first. What passes through a thin wall without a skin point in it has one of these near the wall."""
    last = tips[:, [1, 2, 4, 3, 0]]  # as MANO orders the fingers
    ends = torch.cat([joints[:, 1:].unflatten(1, (5, 3))[:, :, 1:], last[:, :, None]], 2).flatten(1, 2)
    start = joints[:, 1:]
    return torch.stack([start + k * (ends - start) for k in (0.35, 0.7)], 2)


def palm_axes_points(joints: Tensor) -> Tensor:
    """Points (N,12,3) inside the palm, at least PALM_AXIS from its skin."""
    wrist, heads = joints[:, :1], joints[:, [1, 4, 7, 10]]
    return torch.cat([wrist + k * (heads - wrist) for k in (0.4, 0.65, 0.9)], 1)


def pose(of: Body, angles: Tensor, frames: Tensor, count: int = PER_LINK) -> tuple[Tensor, Tensor]:
    """Joints (N,16,3) and the first `count` points of each link (N,15,count,3), carried by its bone alone, of hands
    with angles (N,15,3) in frames (15,3,3); the wrist does not turn."""
    local = rigid.so3_exp(torch.einsum("kca,nka->nkc", frames, angles)).reshape(-1, 5, 3, 3, 3)  # finger, link
    rest = of.joints[:, 1:].reshape(-1, 5, 3, 3)
    turn, at = [local[:, :, 0]], [rest[:, :, 0]]
    for k in (1, 2):
        at.append(at[-1] + (turn[-1] @ (rest[:, :, k] - rest[:, :, k - 1])[..., None])[..., 0])
        turn.append(turn[-1] @ local[:, :, k])
    joints = torch.cat([of.joints[:, :1], torch.stack(at, 2).flatten(1, 2)], 1)
    turns = torch.stack(turn, 2).flatten(1, 2)
    links = (of.links[:, :, :count] - of.joints[:, 1:, None]) @ turns.mT + joints[:, 1:, None]
    return joints, links
