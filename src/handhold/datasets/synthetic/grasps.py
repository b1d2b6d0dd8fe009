"""Hands that hold the bank's objects: a grasp is chosen, the hand is brought to the object, and its fingers close.

Per grasp: spots on the surface with their thickness decide which of nine grasps fit (after the taxonomy of Feix et al.,
"The GRASP taxonomy of human grasp types", 2016); the hand is laid to many spots and the few best are kept; the palm
moves in until it touches; the fingers close link by link until each touches (Miller and Allen, "GraspIt!", 2004), with
halved steps at the end; the best of the few is kept and drawn back where it is too deep. Everything is batched and
without synchronisation, so that it runs on a GPU as it does on a CPU.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry import rigid
from ...hand.model import HandModel, ShapedHand
from .grasp_approach import approach, choose, find_spots, hand_paths, take, try_out
from .grasp_hand import (
    AXIS,
    FEW,
    FLAT,
    GRASPS,
    HOOK,
    PALM_AXIS,
    PER_LINK,
    Body,
    GraspHand,
    axes,
    body,
    grasp_hand,
    palm_axes_points,
    pose,
)
from .objects import Distances, ObjectBank
from .poses import clamped, rotations_from_angles, sample_betas

KEPT = 4  # of them closed
FINISHED = 2  # of these worked out
TOUCH = 2e-3  # metres: a vertex this close is in contact
SLACK = 6e-4  # metres that a closing link may sink in
DEPTH = 1.5e-3  # metres of penetration that the final step aims for
MOST = 2.5e-3  # metres of penetration that a grasp is chosen for


@dataclass(frozen=True, eq=False)
class Grasps:
    """B right hands on objects. Hand frame: the model's own, with the wrist unrotated and no translation."""

    rotations: Tensor  # (B,16,3,3), the first is the identity
    betas: Tensor  # (B,10)
    object_from_hand: Tensor  # (B,4,4) rigid
    contact: Tensor  # (B,V) bool
    penetration: Tensor  # (B,) metres, the deepest vertex
    kind: Tensor  # (B,) int64, row of GRASPS


@torch.no_grad()
def sample_grasps(
    hand: HandModel,
    bank: ObjectBank,
    index: Tensor,
    generator: torch.Generator | None = None,
    angle: Tensor | None = None,
) -> Grasps:
    """One grasp for each of the objects `index` (B,) of the bank, on the model's device, where bank, index and
    generator are too. `angle` (B,) opens hinged objects; the hand then holds what is there at that angle.

    Not every grasp succeeds (an object may offer no spot that fits): look at `penetration` and `contact`.
    Raises ValueError for a left hand: sample a right one and mirror the scene.
    """
    if hand.side != "right":
        raise ValueError("grasps are sampled for the right hand; mirror hand and object for the left")
    known, frames = grasp_hand(hand), hand.joint_frames
    b, device = len(index), hand.device
    betas = sample_betas(b, generator, device).to(hand.dtype)
    at_rest = body(hand, known, betas)
    distances = bank.distances(index, angle)
    spots = find_spots(bank, distances, index, generator, angle)
    kind = choose(spots, generator)
    opened, shut = hand_paths(known, kind, generator)
    place = approach(known, frames, at_rest, opened, shut, kind, spots, generator)
    score = try_out(distances, known, place, spots, kind, generator)
    best = score.topk(KEPT, dim=1).indices  # (B,C)
    many = torch.arange(b, device=device).repeat_interleave(KEPT)
    start, goal = (take(x, best).flatten(0, 1) for x in (place.start, place.goal))
    fingers = _Fingers(known, frames, at_rest.rows(many), start, goal)
    rot, at, forward = (take(x, best).flatten(0, 1) for x in (place.rot, place.at, place.forward))
    field, kinds = _Field(distances), kind[many]
    at = _move_in(field, fingers, rot, at, forward, ~known.precise[kinds])
    share = torch.zeros(len(many), 5, 3, device=device, dtype=hand.dtype)
    share, gap = _close(field, fingers, share, rot, at, [0.125] * 8, [0.06, 0.03, 0.015], FEW)
    share = _follow(known, share, gap, kinds)
    score = _quality(field, fingers, share, rot, at, kinds) + 0.3 * take(score, best).flatten()
    best = score.reshape(b, KEPT).topk(FINISHED, dim=1).indices
    rows = (torch.arange(b, device=device)[:, None] * KEPT + best).flatten()
    fingers, shape = fingers.rows(rows), hand.with_shape(betas[many[rows]])
    share, rot = share[rows], rot[rows]
    fingers, share, at = _finish(shape, field, fingers, share, rot, at[rows])
    rotations, contact, deepest = _measure(shape, field, fingers, share, rot, at)
    quality = score[rows] - 800 * (deepest - MOST).clamp_min(0) + 4e-3 * contact.sum(1).clamp_max(200)
    won = torch.arange(b, device=device) * FINISHED + quality.reshape(b, FINISHED).argmax(1)
    return Grasps(rotations[won], betas, rigid.rigid(rot[won], at[won]), contact[won], deepest[won], kind)


def _finish(shape: ShapedHand, field: _Field, fingers: _Fingers, share, rot, at) -> tuple[_Fingers, Tensor, Tensor]:
    """Closed hands looked at with more points: out of the object with the palm, then finger by finger, then as a whole.
    Returns the fingers' new way, the share of it and where the hand is."""
    of, known = fingers.of, fingers.known
    deep = palm_axes_points(of.joints)
    at = _push_out(field, torch.cat([of.palm, deep], 1), 12, rot, at, 1e-3, 3)
    fingers, share = fingers.bending(share), torch.zeros_like(share)
    share = _reopen(field, fingers, share, rot, at, 3)
    joints, links = fingers.pose(share, PER_LINK)
    inside = torch.cat([axes(joints, links[:, known.ends, 1]).flatten(1, 2), deep], 1)
    at = _push_out(field, torch.cat([links.flatten(1, 2), of.palm, inside], 1), 42, rot, at, 1e-3, 2)
    share = _reopen(field, fingers, share, rot, at, 3)
    share, _ = _close(field, fingers, share, rot, at, [], [0.04, 0.02, 0.01, 0.005], PER_LINK)
    points, inside, _ = _skin(shape, fingers, share)
    at = _push_out(field, torch.cat([points[:, ::3], inside], 1), inside.shape[1], rot, at, DEPTH, 2)
    # links whose skin, which bulges where they bend, is still too deep
    skin = field(points, rot, at)
    low = torch.ones(len(skin), 16, device=skin.device, dtype=skin.dtype)
    low = low.scatter_reduce(1, known.owner.expand_as(skin), skin, "amin")[:, known.rows + 1]
    step = ((-low - DEPTH) / 0.025).clamp(0, 0.25).flip(-1).cummax(-1).values.flip(-1)
    return fingers, share - step, at


def _skin(shape: ShapedHand, fingers: _Fingers, share: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """All vertices, points inside fingers and palm (the palm's 12 last), and rotations of posed hands."""
    posed = shape.with_pose(rotations_from_angles(fingers.angles(share), fingers.frames))
    vertices, joints = posed.vertices, posed.mano_joints
    tips = vertices[:, shape.model.tip_ids]
    inside = torch.cat([axes(joints, tips).flatten(1, 2), palm_axes_points(joints)], 1)
    return vertices, inside, posed.local_rotations


def _measure(shape: ShapedHand, field: _Field, fingers, share, rot, at) -> tuple[Tensor, Tensor, Tensor]:
    """Rotations (N,16,3,3), which vertices touch (N,V), and the deepest penetration (N,)."""
    points, inside, rotations = _skin(shape, fingers, share)
    d = field(torch.cat([points, inside], 1), rot, at)
    skin, inside = d[:, : points.shape[1]], d[:, points.shape[1] :]
    deepest = torch.maximum(-skin.amin(1), _depth_of(inside).amax(1)).clamp_min(0)
    return rotations, skin < TOUCH, deepest


@dataclass(frozen=True, eq=False)
class _Field:
    """The distance to B objects, seen from C hands each."""

    distances: Distances

    def __call__(self, points: Tensor, rot: Tensor, at: Tensor) -> Tensor:
        """points (B*C,P,3) in hand frames, rot (B*C,3,3), at (B*C,3) -> (B*C,P)"""
        x = points @ rot.mT + at[:, None]
        b = len(self.distances.base[0])
        return self.distances(x.reshape(b, -1, 3)).reshape(x.shape[:2])

    def slope(self, points: Tensor, rot: Tensor, at: Tensor) -> Tensor:
        """(B*C,3) unit gradient, in the objects' frames, at points (B*C,1,3) of hand frames."""
        x = points @ rot.mT + at[:, None]
        return self.distances.normals(x.reshape(len(self.distances.base[0]), -1, 3)).reshape(-1, 3)


@dataclass(frozen=True, eq=False)
class _Fingers:
    """N hands whose fingers go from one pose towards another."""

    known: GraspHand
    frames: Tensor
    of: Body
    start: Tensor  # (N,15,3) radians
    goal: Tensor

    def rows(self, index: Tensor) -> _Fingers:
        return _Fingers(self.known, self.frames, self.of.rows(index), self.start[index], self.goal[index])

    def angles(self, share: Tensor) -> Tensor:
        """share (N,5,3) of the way, thumb first -> angles (N,15,3)."""
        per_joint = torch.empty(len(share), 15, device=share.device, dtype=share.dtype)
        per_joint[:, self.known.rows.reshape(-1)] = share.reshape(-1, 15)
        return clamped(self.start + per_joint[..., None] * (self.goal - self.start), 1.0)

    def bending(self, share: Tensor) -> _Fingers:
        """The same hands on another way: from where `share` has them, each joint by a radian of flexion."""
        start = self.angles(share)
        return _Fingers(self.known, self.frames, self.of, start, start + start.new_tensor([1.0, 0.0, 0.0]))

    def pose(self, share: Tensor, count: int) -> tuple[Tensor, Tensor]:
        return pose(self.of, self.angles(share), self.frames, count)

    def gaps(self, field: _Field, joints: Tensor, links: Tensor, rot: Tensor, at: Tensor) -> Tensor:
        """(N,5,3) least distance of each link's points (N,15,count,3) and insides, thumb first."""
        inside = axes(joints, links[:, self.known.ends, 1])
        points = torch.cat([links, inside], 2)
        d = field(points.flatten(1, 2), rot, at).reshape(points.shape[:3])
        d = torch.minimum(d[..., : links.shape[2]].amin(-1), d[..., links.shape[2] :].amin(-1) - AXIS)
        return d[:, self.known.rows]


def _move_in(field: _Field, fingers: _Fingers, rot, at, forward, palmar) -> Tensor:
    """Moves palm grasps along their way until the hand touches: steps of the least distance (sphere tracing)."""
    _, links = fingers.pose(torch.zeros_like(fingers.start).reshape(-1, 5, 3, 3)[..., 0], FEW)
    points = torch.cat(
        [links.flatten(1, 2), fingers.of.palm[:, ::2], fingers.of.palm[:, 1 : fingers.known.inner : 4]], 1
    )
    for _ in range(5):
        step = field(points, rot, at).amin(1).clamp(-0.015, 0.02)
        at = at + torch.where(palmar, step, torch.zeros_like(step))[:, None] * forward
    return at


def _close(field: _Field, fingers: _Fingers, share, rot, at, strides, halvings, count) -> tuple[Tensor, Tensor]:
    """Closes the fingers from `share` (N,5,3): the new one, and the distance of each link (N,5,3) to the object.

    All links of a finger bend together; a link that touches stops its own and the joints before it, for good among the
    `strides`, and for one step among the `halvings`.
    """
    blocked = torch.zeros_like(share, dtype=torch.bool)
    gap = torch.ones_like(share)
    for i, step in enumerate([*strides, *halvings]):
        trial = (share + step).clamp_max(1.0)
        if i < len(strides):
            trial = torch.where(blocked, share, trial)
        joints, links = fingers.pose(trial, count)
        d = fingers.gaps(field, joints, links, rot, at)
        hit = _inwards((d < -SLACK) | _thumb_meets_fingers(fingers.known, joints, links))
        share = torch.where(hit, share, trial)
        gap = torch.where(hit, gap, d)
        blocked = blocked | hit
    return share, gap


def _inwards(hit: Tensor) -> Tensor:
    """Links (N,5,3) that hit -> the joints that move them: each link's own and those before it."""
    return hit.flip(-1).to(torch.uint8).cummax(-1).values.flip(-1).bool()


def _reopen(field: _Field, fingers: _Fingers, share, rot, at, times: int) -> Tensor:
    """Backs links out of the object, looking at all their points."""
    for _ in range(times):
        gap = fingers.gaps(field, *fingers.pose(share, PER_LINK), rot, at)
        step = (-gap.amin(-1, keepdim=True) / 0.03).clamp(0.05, 0.2)
        share = torch.where(_inwards(gap < -SLACK), share - step, share)
    return share


def _depth_of(inside: Tensor) -> Tensor:
    """Distances (B,N) of points inside the hand, of which the last 12 are the palm's -> how deep the skin must be."""
    return torch.cat([AXIS - inside[:, :-12], PALM_AXIS - inside[:, -12:]], 1)


def _push_out(field: _Field, points: Tensor, inner: int, rot: Tensor, at: Tensor, depth: float, times: int) -> Tensor:
    """Moves hands (N,P,3), whose last `inner` points are inside them, until no skin is deeper than `depth`, along the
    field's slope at the deepest one."""
    for _ in range(times):
        d = field(points, rot, at)
        low, where = torch.cat([d[:, :-inner], -_depth_of(d[:, -inner:])], 1).min(1)
        slope = field.slope(points.gather(1, where[:, None, None].expand(-1, 1, 3)), rot, at)
        at = at + (-low - depth).clamp(0, 0.01)[:, None] * slope
    return at


def _thumb_meets_fingers(known: GraspHand, joints: Tensor, links: Tensor) -> Tensor:
    """(N,5,3) bool: links of the thumb that come too close to another finger's bones."""
    tips = links[:, known.ends, 1]
    thumb = torch.stack([0.5 * (joints[:, 14] + joints[:, 15]), 0.4 * joints[:, 15] + 0.6 * tips[:, 0], tips[:, 0]], 1)
    mcp, pip, dip = joints[:, [1, 4, 10]], joints[:, [2, 5, 11]], joints[:, [3, 6, 12]]
    others = torch.cat([0.5 * (mcp + pip), pip, 0.5 * (pip + dip), dip, 0.5 * (dip + tips[:, 1:4]), tips[:, 1:4]], 1)
    near = (torch.cdist(thumb, others) < 0.0135).any(-1)  # (N,3)
    hit = torch.zeros(len(joints), 5, 3, dtype=torch.bool, device=joints.device)
    hit[:, 0, 1] = near[:, 0]
    hit[:, 0, 2] = near[:, 1] | near[:, 2]
    return hit


def _follow(known: GraspHand, share: Tensor, gap: Tensor, kind: Tensor) -> Tensor:
    """Gripping fingers that met nothing go no further than their neighbours, as fingers do that share tendons."""
    touches = (gap.amin(-1) < 0.004) & known.grips[kind]
    four, felt = share[:, 1:], touches[:, 1:, None].to(share)
    mean = (four * felt).sum(1, keepdim=True) / felt.sum(1, keepdim=True).clamp_min(1)
    cap = torch.where(felt.sum(1, keepdim=True) > 0, mean + 0.12, torch.ones_like(mean))
    grips = known.grips[kind][:, 1:, None]
    four = torch.where((felt > 0) | ~grips, four, torch.minimum(four, cap))
    return torch.cat([share[:, :1], four], 1)


def _quality(field: _Field, fingers: _Fingers, share, rot: Tensor, at: Tensor, kind: Tensor) -> Tensor:
    """(N,) of closed hands: fingers and palm that touch, less what is too deep."""
    known = fingers.known
    links = fingers.gaps(field, *fingers.pose(share, 2 * FEW), rot, at)
    palm_gap = field(fingers.of.palm, rot, at)
    touch = torch.exp(-(links.amin(-1).clamp_min(0) / 0.003))
    ends = torch.exp(-(links[..., 2].clamp_min(0) / 0.003))
    grips = known.grips[kind].to(links)
    thumb, fingers = touch[:, 0], (touch * grips)[:, 1:].sum(1) / grips[:, 1:].sum(1)
    palm = torch.exp(-(palm_gap[:, : known.inner].amin(1).clamp_min(0) / 0.004))
    precise = known.precise[kind]
    tips = (ends * grips)[:, 1:].sum(1) / grips[:, 1:].sum(1)
    relaxed = kind == FLAT
    score = torch.where(
        precise,
        3 * torch.minimum(thumb, tips) + tips,
        1.5 * palm + 2 * fingers + torch.where(relaxed | (kind == HOOK), 0.3, 1.5) * thumb,
    )
    deepest = -torch.minimum(links.flatten(1).amin(1), palm_gap.amin(1))
    return score - 250 * (deepest - DEPTH).clamp_min(0)


__all__ = ["GRASPS", "Grasps", "sample_grasps"]
