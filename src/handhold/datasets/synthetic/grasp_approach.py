"""Where and how a hand comes to an object: spots on the surface, the grasps that suit them, the hand's pose there."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry import rigid
from .grasp_hand import (
    AXIS,
    CRADLE,
    FINGERTIP,
    FLAT,
    GRASPS,
    HOOK,
    LATERAL,
    PALMAR,
    PINCH,
    POWER,
    TRIPOD,
    Body,
    GraspHand,
    axes,
    palm_axes,
    pose,
)
from .objects import Distances, ObjectBank, articulate
from .poses import clamped, pose_noise

SPOTS = 24  # tried per grasp
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


def take(x: Tensor, index: Tensor) -> Tensor:
    """x (B,K,...) at index (B,C) -> (B,C,...)."""
    return x.gather(1, index.reshape(*index.shape, *([1] * (x.ndim - 2))).expand(*index.shape, *x.shape[2:]))


def rand(generator, device, *shape):
    return torch.rand(*shape, generator=generator, device=device)


def gumbel(generator, device, *shape):
    return -torch.log(-torch.log(rand(generator, device, *shape).clamp(1e-6, 1 - 1e-6)))


@dataclass(frozen=True, eq=False)
class Spots:
    """K places on each object's surface."""

    point: Tensor  # (B,K,3)
    normal: Tensor  # (B,K,3) outward
    along: Tensor  # (B,K,3) unit tangent, mostly along the object
    thick: Tensor  # (B,K) metres through the object against the normal
    wide: Tensor  # (B,K) metres across it at half the thickness, at right angles to `along`
    long: Tensor  # (B,K) metres along it there
    size: Tensor  # (B,3) the object's bounding box


def find_spots(bank: ObjectBank, distances: Distances, index: Tensor, generator, angle: Tensor | None) -> Spots:
    device, b, k = index.device, len(index), SPOTS
    faces, v = bank.faces[index], bank.vertices[index]
    if angle is not None:
        v = articulate(bank, index, angle)
    corner = v.gather(1, faces.reshape(b, -1, 1).expand(-1, -1, 3)).reshape(b, -1, 3, 3)
    cross = torch.linalg.cross(corner[:, :, 1] - corner[:, :, 0], corner[:, :, 2] - corner[:, :, 0])
    total = cross.norm(dim=-1).cumsum(1)
    pick = torch.searchsorted(total, rand(generator, device, b, k) * total[:, -1:]).clamp_max(faces.shape[1] - 1)
    u = rand(generator, device, b, k, 2)
    r = u[..., :1].sqrt()
    bary = torch.cat([1 - r, r * (1 - u[..., 1:]), r * u[..., 1:]], -1)
    point = (take(corner, pick) * bary[..., None]).sum(-2)
    normal = torch.nn.functional.normalize(take(cross, pick), dim=-1)
    size = bank.size[index]
    # one of the object's axes, the long ones more often, projected to the tangent plane and turned a little
    weight = 2.5 * torch.log(size.clamp_min(1e-3))[:, None] + 3 * torch.log((1 - normal**2).clamp_min(1e-4))
    axis = (weight + gumbel(generator, device, b, k, 3)).argmax(-1)
    t = torch.nn.functional.one_hot(axis, 3).to(point) + 0.12 * torch.randn(b, k, 3, generator=generator, device=device)
    t = torch.nn.functional.normalize(t - (t * normal).sum(-1, keepdim=True) * normal, dim=-1)
    upward = torch.where(rand(generator, device, b, k) < 0.85, 1.0, -1.0)
    t = t * (torch.sign(t[..., 2:] + 1e-3) * upward[..., None])
    field = lambda x: distances(x.reshape(b, -1, 3))  # noqa: E731
    thick = _extent(field, point - 1.5e-3 * normal, -normal) + 1.5e-3
    middle = point - 0.5 * thick[..., None] * normal
    across = torch.linalg.cross(normal, t)
    ends = torch.cat([across, -across, t, -t], 1)
    reach = _extent(field, middle.repeat(1, 4, 1), ends).reshape(b, 4, k)
    return Spots(point, normal, t, thick, reach[:, 0] + reach[:, 1], reach[:, 2] + reach[:, 3], size)


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


def _fits(s: Spots) -> Tensor:
    """(B,K,G) bool: which grasps suit which spot."""
    big, small = s.size.amax(-1, keepdim=True), s.size.amin(-1, keepdim=True)
    middle = s.size.sum(-1, keepdim=True) - big - small
    fit = [None] * len(GRASPS)
    fit[POWER] = (
        ((s.thick > 0.02) | (big > 0.1))
        & (s.thick > 0.011)
        & (s.thick < 0.085)
        & (s.wide < 0.09)
        & (s.wide > 0.008)
        & (big > 0.05)
    )
    fit[PINCH] = (s.thick < 0.05) & (s.thick > 0.0015) & (small < 0.06)
    fit[TRIPOD] = (s.thick < 0.06) & (s.thick > 0.003) & (small < 0.075)
    fit[LATERAL] = (s.thick < 0.018) & (s.long > 0.015)
    fit[FLAT] = (s.wide > 0.02) & (s.long > 0.02) & (middle > 0.025)
    fit[HOOK] = (s.thick > 0.005) & (s.thick < 0.032) & (s.wide < 0.04) & (s.long > 0.03)
    fit[FINGERTIP] = (s.thick > 0.025) & (s.thick < 0.1) & (middle > 0.03)
    fit[CRADLE] = (s.wide > 0.025) & (s.wide < 0.13) & (s.thick > 0.02) & (s.thick < 0.12)
    fit[PALMAR] = (s.thick < 0.075) & (s.long > 0.045) & (middle > 0.045)
    return torch.stack(fit, -1)


def choose(s: Spots, generator) -> Tensor:
    """(B,) a grasp that some spot suits; more suitable spots make it likelier, by a square root."""
    share = _fits(s).to(s.thick).mean(1)
    prior = s.thick.new_tensor([_PRIOR[g] for g in range(len(GRASPS))]).log()
    logit = prior + 0.5 * torch.log(share.clamp_min(1e-9))
    return (logit + gumbel(generator, s.thick.device, *share.shape)).argmax(-1)


def hand_paths(known: GraspHand, kind: Tensor, generator) -> tuple[Tensor, Tensor]:
    """Angles (B,15,3) of the open and the shut hand, each hand's own."""
    noise = pose_noise(len(kind), generator, kind.device, 5.0)
    opened, shut = known.opened[kind] + noise, known.shut[kind] + noise
    # fingers that do not grip stay somewhere on their own way
    idle = ~known.grips[kind]
    stay = rand(generator, kind.device, len(kind), 5) * 0.5 + 0.9 * (rand(generator, kind.device, len(kind), 1) - 0.35)
    joint = _to_joints(known, torch.where(idle, stay.clamp(-0.2, 1.1), torch.ones_like(stay)))
    shut = opened + joint[..., None] * (shut - opened)
    return clamped(opened), clamped(shut)


def _to_joints(known: GraspHand, finger: Tensor) -> Tensor:
    """(N,5) one value a finger -> (N,15) one a joint."""
    out = torch.empty(*finger.shape[:-1], 15, device=finger.device, dtype=finger.dtype)
    out[..., known.rows.reshape(-1)] = finger.repeat_interleave(3, -1)
    return out


@dataclass(frozen=True, eq=False)
class Place:
    """The hand at K spots each."""

    rot: Tensor  # (B,K,3,3) object_from_hand
    at: Tensor  # (B,K,3)
    forward: Tensor  # (B,K,3) object frame: the way the hand comes in
    start: Tensor  # (B,K,15,3) angles before closing
    goal: Tensor  # (B,K,15,3) and after, if nothing is in the way
    points: Tensor  # (B,K,Q,3) coarse points of the hand before closing, its frame; the last 30 in its fingers
    bonus: Tensor  # (B,K) for spots that this hand likes


def _triad(a: Tensor, b: Tensor) -> Tensor:
    """(...,3,3) columns: a, b made orthogonal to it, their cross product."""
    a = torch.nn.functional.normalize(a, dim=-1)
    b = torch.nn.functional.normalize(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
    return torch.stack([a, b, torch.linalg.cross(a, b)], -1)


def approach(
    known: GraspHand, frames: Tensor, of: Body, opened: Tensor, shut: Tensor, kind: Tensor, spots: Spots, generator
) -> Place:
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
    further = torch.where(precise, 1.0 + 0.25 * rand(generator, device, b, k), torch.ones_like(t))
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
    turn_by = 2 * math.pi * rand(generator, device, b, k)
    n, along = spots.normal.flatten(0, 1), spots.along.flatten(0, 1)
    side = torch.linalg.cross(n, along)
    # at right angles to the long axis, or along it, or any way
    mode = rand(generator, device, b, k)
    quarter = torch.floor(turn_by / (math.pi / 2)) * (math.pi / 2)
    turn_by = torch.where(
        mode < 0.55,
        torch.where(quarter % math.pi < 1, quarter + math.pi / 2, quarter),
        torch.where(mode < 0.7, quarter, turn_by),
    )
    turn_by = (turn_by + 0.25 * torch.randn(b, k, generator=generator, device=device)).reshape(-1, 1)
    direction = turn_by.cos() * along + turn_by.sin() * side
    # a pen: along the way from the web of the thumb to the pads, held near one of its ends
    thin = (spots.thick < 0.02) & (spots.wide < 0.024) & (spots.size.amax(-1, keepdim=True) > 0.09)
    writing = thin & ((kind == TRIPOD) | (kind == PINCH))[:, None] & (rand(generator, device, b, k) < 0.75)
    ahead = (spots.point * spots.along).sum(-1, keepdim=True)
    end = 1 - 2 * (ahead.abs()[..., 0] / (0.5 * spots.size.amax(-1, keepdim=True)) - 0.65).abs()
    w = writing.reshape(-1, 1)
    jitter = 0.08 * torch.randn(b * k, 3, generator=generator, device=device)
    direction = torch.where(w, (spots.along * ahead.sign()).flatten(0, 1) + jitter, direction)
    hand_precise = torch.where(w[..., None], _triad(opposing, middle - joints[:, 1] - 0.017 * across), hand_precise)
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
        flat, grip + 0.25 * (joints[:, 4] - joints[:, 0]) * rand(generator, device, b * k, 1), anchor_hand
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
    inside = axes(joints, links[:, known.ends, 1]).flatten(1, 2)
    points = torch.cat([links.flatten(1, 2), of.palm[many][:, ::2], inside], 1)
    bonus = writing.to(end) * (1.0 + end)
    return Place(shape(rot), shape(at), shape(forward), start, goal, shape(points), bonus)


def _opposing(known: GraspHand, links: Tensor, kind: Tensor) -> tuple[Tensor, Tensor]:
    """The thumb's pad (N,3) and the middle of the pads (or the side of the index finger) that it works against."""
    pads = links[:, known.ends, 0]
    grips = known.grips[kind][:, 1:, None].to(pads)
    mean = (pads[:, 1:] * grips).sum(1) / grips.sum(1)
    return pads[:, 0], torch.where((kind == LATERAL)[:, None], links[:, 1, 0], mean)


def _outward(joints: Tensor) -> Tensor:
    """Unit vector from the wrist to the fingers (N,3)."""
    return torch.nn.functional.normalize(joints[:, 4] - joints[:, 0], dim=-1)


def try_out(distances: Distances, known: GraspHand, place: Place, spots: Spots, kind: Tensor, generator) -> Tensor:
    """(B,K) how good each spot looks before closing."""
    b, k, q, _ = place.points.shape
    palm = ~known.precise[kind][:, None]
    at = torch.where(palm[..., None], place.at + 0.012 * place.forward, place.at)
    x = place.points @ place.rot.mT + at[:, :, None]
    d = distances(x.reshape(b, -1, 3)).reshape(b, k, q)
    d = torch.cat([d[..., :-30], d[..., -30:] - AXIS], -1)
    deep = (-d - 0.001).clamp_min(0)
    bad = deep.sum(-1) * 40 + deep.amax(-1) * 60
    fits = _fits(spots).gather(2, kind[:, None, None].expand(b, k, 1))[..., 0]
    centre = spots.point.norm(dim=-1) / spots.size.norm(dim=-1)[:, None]
    down = spots.normal[..., 2]
    score = -bad - 6 * (~fits).to(d) - 0.8 * centre
    score = score + torch.where(palm, -8 * spots.wide, 0.0)
    support = (kind == FLAT) | (kind == CRADLE)
    score = score + torch.where(support[:, None], -1.5 * down, -0.8 * down.abs())
    return score + place.bonus + 0.35 * gumbel(generator, d.device, b, k)
