"""Hands that hold the bank's objects: a grasp is chosen, the hand is brought to the object, and its fingers close.

Per grasp: spots on the surface with their thickness decide which of nine grasps fit (after the taxonomy of Feix et al.,
"The GRASP taxonomy of human grasp types", 2016); the hand is laid to many spots and the few best are kept; the palm
moves in until it touches; the fingers close link by link until each touches (Miller and Allen, "GraspIt!", 2004), with
halved steps at the end; the best of the few is kept and drawn back where it is too deep. Everything is batched and
without synchronisation, so that it runs on a GPU as it does on a CPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry import rigid
from ...hand.model import HandModel
from .grasp_hand import (
    AXIS,
    CRADLE,
    FEW,
    FINGERTIP,
    FLAT,
    GRASPS,
    HOOK,
    LATERAL,
    PALM_AXIS,
    PALMAR,
    PER_LINK,
    PINCH,
    POWER,
    TRIPOD,
    Body,
    GraspHand,
    axes,
    body,
    grasp_hand,
    palm_axes,
    palm_axes_points,
    pose,
)
from .objects import Distances, ObjectBank, articulate
from .poses import clamped, pose_noise, rotations_from_angles, sample_betas

SPOTS = 24  # spots tried per grasp
KEPT = 4  # of them closed
TOUCH = 2e-3  # metres: a vertex this close is in contact
SLACK = 6e-4  # metres that a closing link may sink in
DEPTH = 2e-3  # metres of penetration that the final step aims for
_PRIOR = {
    POWER: 4.5,
    PINCH: 1.6,
    TRIPOD: 1.8,
    LATERAL: 0.8,
    FLAT: 0.7,
    HOOK: 0.7,
    FINGERTIP: 1.2,
    CRADLE: 1.3,
    PALMAR: 1.7,
}


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
    vertical: Tensor | None = None,
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
    spots = _spots(bank, distances, index, generator, angle)
    kind = _choose(spots, generator)
    opened, shut = _fingers(known, kind, generator)
    place = _precise_or_palm(known, frames, at_rest, opened, shut, kind, spots, generator)
    score = _try_out(distances, known, place, spots, kind, generator)
    best = score.topk(KEPT, dim=1).indices  # (B,C)
    many = torch.arange(b, device=device).repeat_interleave(KEPT)
    fingers = _Fingers(
        known, frames, at_rest.rows(many), *(_take(x, best).flatten(0, 1) for x in (place.start, place.goal))
    )
    rot, at, forward = (_take(x, best).flatten(0, 1) for x in (place.rot, place.at, place.forward))
    field, kinds = _Field(distances), kind[many]
    at = _move_in(field, fingers, rot, at, forward, ~known.precise[kinds])
    share = torch.zeros(len(many), 5, 3, device=device, dtype=hand.dtype)
    share, gap = _close(field, fingers, share, rot, at, [0.125] * 8, [0.06, 0.03, 0.015], FEW)
    share = _follow(known, share, gap, kinds)
    score = _quality(field, fingers, share, rot, at, kinds) + 0.3 * _take(score, best).flatten()
    won = torch.arange(b, device=device) * KEPT + score.reshape(b, KEPT).argmax(1)
    fingers, share, rot, at = fingers.rows(won), share[won], rot[won], at[won]
    at = _push_out(distances, torch.cat([at_rest.palm, palm_axes_points(at_rest.joints)], 1), 12, rot, at, 1e-3, 3)
    fingers, share = fingers.bending(share), torch.zeros_like(share)
    share = _reopen(field, fingers, share, rot, at)
    share, _ = _close(field, fingers, share, rot, at, [], [0.05, 0.025, 0.0125, 0.006], PER_LINK)
    posed = hand.with_shape(betas).with_pose(rotations_from_angles(fingers.angles(share), frames))
    joints = posed.mano_joints
    inside = torch.cat([axes(joints, posed.skin(hand.tip_ids)).flatten(1, 2), palm_axes_points(joints)], 1)
    at = _push_out(distances, torch.cat([posed.vertices[:, ::2], inside], 1), 42, rot, at, DEPTH, 2)
    d = distances(torch.cat([posed.vertices, inside], 1) @ rot.mT + at[:, None])
    skin = d[:, : -inside.shape[1]]
    deep = torch.maximum(-skin.amin(1), _depth_of(d[:, -inside.shape[1] :]).amax(1)).clamp_min(0)
    return Grasps(posed.local_rotations, betas, rigid.rigid(rot, at), skin < TOUCH, deep, kind)


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x (B,K,...) at index (B,C) -> (B,C,...)."""
    return x.gather(1, index.reshape(*index.shape, *([1] * (x.ndim - 2))).expand(*index.shape, *x.shape[2:]))


def _rand(generator, device, *shape):
    return torch.rand(*shape, generator=generator, device=device)


def _gumbel(generator, device, *shape):
    return -torch.log(-torch.log(_rand(generator, device, *shape).clamp(1e-6, 1 - 1e-6)))


@dataclass(frozen=True, eq=False)
class _Field:
    """The distance to B objects, seen from C hands each."""

    distances: Distances

    def __call__(self, points: Tensor, rot: Tensor, at: Tensor) -> Tensor:
        """points (B*C,P,3) in hand frames, rot (B*C,3,3), at (B*C,3) -> (B*C,P)"""
        x = points @ rot.mT + at[:, None]
        b = len(self.distances.base[0])
        return self.distances(x.reshape(b, -1, 3)).reshape(x.shape[:2])


@dataclass(frozen=True, eq=False)
class _Spots:
    """K places on each object's surface."""

    point: Tensor  # (B,K,3)
    normal: Tensor  # (B,K,3) outward
    along: Tensor  # (B,K,3) unit tangent, mostly along the object
    thick: Tensor  # (B,K) metres through the object against the normal
    wide: Tensor  # (B,K) metres across it at half the thickness, at right angles to `along`
    long: Tensor  # (B,K) metres along it there
    size: Tensor  # (B,3) the object's bounding box


def _spots(bank: ObjectBank, distances: Distances, index: Tensor, generator, angle: Tensor | None) -> _Spots:
    device, b, k = index.device, len(index), SPOTS
    faces, v = bank.faces[index], bank.vertices[index]
    if angle is not None:
        v = articulate(bank, index, angle)
    corner = v.gather(1, faces.reshape(b, -1, 1).expand(-1, -1, 3)).reshape(b, -1, 3, 3)
    cross = torch.linalg.cross(corner[:, :, 1] - corner[:, :, 0], corner[:, :, 2] - corner[:, :, 0])
    total = cross.norm(dim=-1).cumsum(1)
    pick = torch.searchsorted(total, _rand(generator, device, b, k) * total[:, -1:]).clamp_max(faces.shape[1] - 1)
    u = _rand(generator, device, b, k, 2)
    r = u[..., :1].sqrt()
    bary = torch.cat([1 - r, r * (1 - u[..., 1:]), r * u[..., 1:]], -1)
    point = (_take(corner, pick) * bary[..., None]).sum(-2)
    normal = torch.nn.functional.normalize(_take(cross, pick), dim=-1)
    size = bank.size[index]
    # one of the object's axes, the long ones more often, projected to the tangent plane and turned a little
    weight = 2.5 * torch.log(size.clamp_min(1e-3))[:, None] + 3 * torch.log((1 - normal**2).clamp_min(1e-4))
    axis = (weight + _gumbel(generator, device, b, k, 3)).argmax(-1)
    t = torch.nn.functional.one_hot(axis, 3).to(point) + 0.12 * torch.randn(b, k, 3, generator=generator, device=device)
    t = torch.nn.functional.normalize(t - (t * normal).sum(-1, keepdim=True) * normal, dim=-1)
    upward = torch.where(_rand(generator, device, b, k) < 0.85, 1.0, -1.0)
    t = t * (torch.sign(t[..., 2:] + 1e-3) * upward[..., None])
    field = lambda x: distances(x.reshape(b, -1, 3))  # noqa: E731
    thick = _extent(field, point - 1.5e-3 * normal, -normal) + 1.5e-3
    middle = point - 0.5 * thick[..., None] * normal
    across = torch.linalg.cross(normal, t)
    ends = torch.cat([across, -across, t, -t], 1)
    reach = _extent(field, middle.repeat(1, 4, 1), ends).reshape(b, 4, k)
    return _Spots(point, normal, t, thick, reach[:, 0] + reach[:, 1], reach[:, 2] + reach[:, 3], size)


def _extent(field, origin: Tensor, direction: Tensor, far: float = 0.13, steps: int = 15) -> Tensor:
    """How far the ray (B,K,3) stays inside, metres, at most `far`."""
    t = torch.linspace(0, 1, steps, device=origin.device) ** 1.3 * far
    x = origin[:, :, None] + direction[:, :, None] * t[:, None]
    d = field(x).reshape(*origin.shape[:2], steps)
    out = (d > 0).to(d).cummax(-1).values
    first = (1 - out).sum(-1).long().clamp(1, steps - 1)[..., None]
    d0, d1 = d.gather(-1, first - 1)[..., 0], d.gather(-1, first)[..., 0]
    t0, t1 = t[first[..., 0] - 1], t[first[..., 0]]
    share = (-d0 / (d1 - d0).clamp_min(1e-6)).clamp(0, 1)
    return torch.where(out[..., -1] > 0, t0 + share * (t1 - t0), far)


def _fits(s: _Spots) -> Tensor:
    """(B,K,G) bool: which grasps suit which spot."""
    big, small = s.size.amax(-1, keepdim=True), s.size.amin(-1, keepdim=True)
    middle = s.size.sum(-1, keepdim=True) - big - small
    fit = [None] * len(GRASPS)
    fit[POWER] = (s.thick > 0.011) & (s.thick < 0.085) & (s.wide < 0.09) & (s.wide > 0.008) & (big > 0.05)
    fit[PINCH] = (s.thick < 0.05) & (s.thick > 0.0015) & (small < 0.06)
    fit[TRIPOD] = (s.thick < 0.06) & (s.thick > 0.003) & (small < 0.075)
    fit[LATERAL] = (s.thick < 0.018) & (s.long > 0.015)
    fit[FLAT] = (s.wide > 0.02) & (s.long > 0.02) & (middle > 0.025)
    fit[HOOK] = (s.thick > 0.005) & (s.thick < 0.032) & (s.wide < 0.04) & (s.long > 0.03)
    fit[FINGERTIP] = (s.thick > 0.025) & (s.thick < 0.1) & (middle > 0.03)
    fit[CRADLE] = (s.wide > 0.025) & (s.wide < 0.13) & (s.thick > 0.02) & (s.thick < 0.12)
    fit[PALMAR] = (s.thick < 0.075) & (s.long > 0.045) & (middle > 0.045)
    return torch.stack(fit, -1)


def _choose(s: _Spots, generator) -> Tensor:
    """(B,) a grasp that some spot suits; more suitable spots make it likelier, by a square root."""
    share = _fits(s).to(s.thick).mean(1)
    prior = s.thick.new_tensor([_PRIOR[g] for g in range(len(GRASPS))]).log()
    logit = prior + 0.5 * torch.log(share.clamp_min(1e-9))
    return (logit + _gumbel(generator, s.thick.device, *share.shape)).argmax(-1)


def _fingers(known: GraspHand, kind: Tensor, generator) -> tuple[Tensor, Tensor]:
    """Angles (B,15,3) of the open and the shut hand, each hand's own."""
    noise = pose_noise(len(kind), generator, kind.device, 5.0)
    opened, shut = known.opened[kind] + noise, known.shut[kind] + noise
    # fingers that do not grip stay somewhere on their own way
    idle = ~known.grips[kind]
    stay = _rand(generator, kind.device, len(kind), 5) * 0.5 + 0.9 * (
        _rand(generator, kind.device, len(kind), 1) - 0.35
    )
    joint = _to_joints(known, torch.where(idle, stay.clamp(-0.2, 1.1), torch.ones_like(stay)))
    shut = opened + joint[..., None] * (shut - opened)
    return clamped(opened), clamped(shut)


def _to_joints(known: GraspHand, finger: Tensor) -> Tensor:
    """(N,5) one value a finger -> (N,15) one a joint."""
    out = torch.empty(*finger.shape[:-1], 15, device=finger.device, dtype=finger.dtype)
    out[..., known.rows.reshape(-1)] = finger.repeat_interleave(3, -1)
    return out


@dataclass(frozen=True, eq=False)
class _Place:
    """The hand at K spots each."""

    rot: Tensor  # (B,K,3,3) object_from_hand
    at: Tensor  # (B,K,3)
    forward: Tensor  # (B,K,3) object frame: the way the hand comes in
    start: Tensor  # (B,K,15,3) angles before closing
    goal: Tensor  # (B,K,15,3) and after, if nothing is in the way
    points: Tensor  # (B,K,Q,3) coarse points of the hand before closing, hand frame


def _triad(a: Tensor, b: Tensor) -> Tensor:
    """(...,3,3) columns: a, b made orthogonal to it, their cross product."""
    a = torch.nn.functional.normalize(a, dim=-1)
    b = torch.nn.functional.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def _precise_or_palm(
    known: GraspHand, frames: Tensor, of: Body, opened: Tensor, shut: Tensor, kind: Tensor, spots: _Spots, generator
) -> _Place:
    """Both ways of bringing the hand to a spot, and for each grasp its own."""
    device, (b, k) = kind.device, spots.thick.shape
    steps = 9
    s = torch.linspace(0, 1, steps, device=device)[:, None, None, None]
    way = (opened + s * (shut - opened)).reshape(-1, 15, 3)  # (S*B,15,3)
    _, links = pose(of.times(steps), way, frames, 1)
    lateral = kind == LATERAL
    thumb, partner = _opposing(known, links, kind.repeat(steps))
    gap = (partner - thumb).norm(dim=-1).reshape(steps, b)
    # the first step, from shut to open, at which the object fits between the pads, with some room
    room = torch.where(lateral, 0.012, 0.016)[:, None]
    need = spots.thick + room  # (B,K)
    closed_enough = (gap[:, :, None] > need).to(gap)  # (S,B,K)
    last = (closed_enough.flip(0).cummax(0).values.sum(0)).clamp(0, steps) - 1  # widest index that is still open enough
    low = last.long().clamp(0, steps - 2)
    g0, g1 = (gap.t().gather(1, low + i) for i in (0, 1))
    share = ((g0 - need) / (g0 - g1).abs().clamp_min(1e-4)).clamp(0, 1)
    t = (low + share) / (steps - 1)  # (B,K)
    precise = known.precise[kind][:, None]
    t = torch.where(precise, t, torch.zeros_like(t))
    start = opened[:, None] + t[..., None, None] * (shut - opened)[:, None]
    further = torch.where(precise, 1.0 + 0.25 * _rand(generator, device, b, k), torch.ones_like(t))
    goal = clamped(opened[:, None] + further[..., None, None] * (shut - opened)[:, None])
    # idle fingers go all their way
    many = torch.arange(b, device=device).repeat_interleave(k)
    joints, links = pose(of.rows(many), start.flatten(0, 1), frames, 3)
    thumb, partner = _opposing(known, links, kind[many])
    grip, facing, across = palm_axes(joints)
    # precise: thumb to partner runs against the normal
    opposing = torch.nn.functional.normalize(partner - thumb, dim=-1)
    sideways = torch.nn.functional.normalize(opposing - 1.5 * across, dim=-1)  # a plate lies along the fingers' sides
    opposing = torch.where((kind == LATERAL)[many][:, None], sideways, opposing)
    middle = (partner + thumb) / 2
    reach = middle - 0.5 * (joints[:, 0] + joints[:, 4])
    hand_precise = _triad(opposing, reach)
    turn_by = 2 * math.pi * _rand(generator, device, b, k)
    n, along = spots.normal.flatten(0, 1), spots.along.flatten(0, 1)
    side = torch.linalg.cross(n, along)
    # at right angles to the long axis, or along it, or any way
    mode = _rand(generator, device, b, k)
    quarter = torch.floor(turn_by / (math.pi / 2)) * (math.pi / 2)
    turn_by = torch.where(
        mode < 0.55,
        torch.where(quarter % math.pi < 1, quarter + math.pi / 2, quarter),
        torch.where(mode < 0.7, quarter, turn_by),
    )
    turn_by = (turn_by + 0.25 * torch.randn(b, k, generator=generator, device=device)).reshape(-1, 1)
    direction = turn_by.cos() * along + turn_by.sin() * side
    object_precise = _triad(-n, direction)
    anchor_precise = spots.point.flatten(0, 1) - 0.5 * spots.thick.flatten()[:, None] * n
    # palm: the palm's normal against the surface's, the axis across it along the object
    wrap = across + 0.18 * (1 + torch.randn(b * k, 1, generator=generator, device=device)) * _outward(joints)
    hand_palm = _triad(facing, wrap)
    object_palm = _triad(-n, along)
    kinds = kind[many][:, None]
    hook = kinds == HOOK
    anchor_hand = torch.where(hook, 0.55 * joints[:, [1, 4, 10]].mean(1) + 0.45 * joints[:, [2, 5, 11]].mean(1), grip)
    flat = (kinds == FLAT) | (kinds == CRADLE)
    anchor_hand = torch.where(
        flat, grip + 0.25 * (joints[:, 4] - joints[:, 0]) * _rand(generator, device, b * k, 1), anchor_hand
    )
    anchor_hand = anchor_hand + 0.006 * torch.randn(b * k, 3, generator=generator, device=device)
    anchor_palm = spots.point.flatten(0, 1) + 0.03 * n
    p = precise[many]
    wiggle = rigid.so3_exp(0.1 * torch.randn(b * k, 3, generator=generator, device=device))
    rot = torch.where(p[..., None], object_precise @ hand_precise.mT, object_palm @ hand_palm.mT) @ wiggle
    from_hand = torch.where(p, middle, anchor_hand)
    at = torch.where(p, anchor_precise, anchor_palm) - (rot @ from_hand[..., None])[..., 0]
    forward = torch.where(p, direction, -n)
    shape = lambda x: x.reshape(b, k, *x.shape[1:])  # noqa: E731
    return _Place(
        shape(rot),
        shape(at),
        shape(forward),
        start,
        goal,
        shape(torch.cat([links.flatten(1, 2), of.palm[many][:, ::2]], 1)),
    )


def _opposing(known: GraspHand, links: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """The thumb's pad (N,3) and the middle of the pads (or the side of the index finger) that it works against."""
    pads = links[:, known.ends, 0]
    grips = known.grips[kind][:, 1:, None].to(pads)
    mean = (pads[:, 1:] * grips).sum(1) / grips.sum(1)
    return pads[:, 0], torch.where((kind == LATERAL)[:, None], links[:, 1, 0], mean)


def _outward(joints: Tensor) -> Tensor:
    """Unit vector from the wrist to the fingers (N,3)."""
    return torch.nn.functional.normalize(joints[:, 4] - joints[:, 0], dim=-1)


def _try_out(distances: Distances, known: GraspHand, place: _Place, spots: _Spots, kind: Tensor, generator) -> Tensor:
    """(B,K) how good each spot looks before closing."""
    b, k, q, _ = place.points.shape
    palm = ~known.precise[kind][:, None]
    at = torch.where(palm[..., None], place.at + 0.012 * place.forward, place.at)
    x = place.points @ place.rot.mT + at[:, :, None]
    d = distances(x.reshape(b, -1, 3)).reshape(b, k, q)
    deep = (-d - 0.001).clamp_min(0)
    bad = deep.sum(-1) * 40 + deep.amax(-1) * 60
    fits = _fits(spots).gather(2, kind[:, None, None].expand(b, k, 1))[..., 0]
    centre = spots.point.norm(dim=-1) / spots.size.norm(dim=-1)[:, None]
    down = spots.normal[..., 2]
    score = -bad - 6 * (~fits).to(d) - 0.8 * centre
    score = score + torch.where(palm, -8 * spots.wide, 0.0)
    support = (kind == FLAT) | (kind == CRADLE)
    score = score + torch.where(support[:, None], -1.5 * down, -0.8 * down.abs())
    return score + 0.35 * _gumbel(generator, d.device, b, k)


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


def _reopen(field: _Field, fingers: _Fingers, share, rot, at) -> Tensor:
    """Backs links out of the object, looking at all their points."""
    for _ in range(8):
        hit = _inwards(fingers.gaps(field, *fingers.pose(share, PER_LINK), rot, at) < -SLACK)
        share = torch.where(hit, share - 0.06, share)
    return share


def _depth_of(inside: Tensor) -> Tensor:
    """Distances (B,N) of points inside the hand, of which the last 12 are the palm's -> how deep the skin must be."""
    return torch.cat([AXIS - inside[:, :-12], PALM_AXIS - inside[:, -12:]], 1)


def _push_out(
    distances: Distances, points: Tensor, inner: int, rot: Tensor, at: Tensor, depth: float, times: int
) -> Tensor:
    """Moves hands (B,P,3), whose last `inner` points are inside them, until no skin is deeper than `depth`, along the
    field's slope at the deepest one."""
    for _ in range(times):
        x = points @ rot.mT + at[:, None]
        d = distances(x)
        low, where = torch.cat([d[:, :-inner], -_depth_of(d[:, -inner:])], 1).min(1)
        slope = distances.normals(x.gather(1, where[:, None, None].expand(-1, 1, 3)))[:, 0]
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
