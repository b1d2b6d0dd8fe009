"""How hands and objects move in a generated clip: splines of poses, and the schedule of a grasp.

Frames: OpenCV camera, metres, radians. Poses are `a_from_b` (4,4). All of it is smooth: positions and rotations have
continuous second derivatives in time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...geometry.rigid import geodesic, invert, rigid, se3_exp, se3_log, slerp, so3_exp

KINDS = ("hold", "grasp", "regrasp", "hinge", "squeeze", "empty")
CONE = (-0.25, 0.65)  # least and greatest z of the forearm's direction: it must not point at the camera


def spline(keys: Tensor, at: Tensor) -> Tensor:
    """Cumulative cubic B-spline through SE(3) (Kim, Kim and Shin, "A general construction scheme for unit quaternion
    curves", SIGGRAPH 1995; Sommer et al., CVPR 2020, eq. 4).

    keys (N,4,4), at (F,) in [0,1] -> (F,4,4). The curve begins at the first key and ends at the last, where it rests;
    between, it passes near the keys. Neighbouring keys must be less than half a turn apart.
    """
    n = len(keys)
    padded = torch.cat([keys[:1], keys[:1], keys, keys[-1:], keys[-1:]])
    spans = n + 1
    x = (at.clamp(0, 1) * spans).clamp(max=spans - 1e-6)
    i, u = x.long(), (x - x.long())[:, None]
    steps = se3_log(invert(padded[:-1]) @ padded[1:])  # (N+3,6)
    weights = ((5 + 3 * u - 3 * u**2 + u**3) / 6, (1 + 3 * u + 3 * u**2 - 2 * u**3) / 6, u**3 / 6)
    out = padded[i]
    for k, w in enumerate(weights):
        out = out @ se3_exp(w * steps[i + k])
    return out


def ease(x: Tensor) -> Tensor:
    """From 0 to 1 while x does, with two derivatives of zero at both ends."""
    x = x.clamp(0, 1)
    return x**3 * (10 - 15 * x + 6 * x * x)


@dataclass(frozen=True, eq=False)
class Schedule:
    """What happens when; F frames, up to two grasps one after the other."""

    progress: Tensor  # (2,F) in [0,1]: along the path of the object in either grasp
    closed: Tensor  # (2,F) in [0,1]: fingers, from open to the grasp
    away: Tensor  # (2,F) in [0,1]: the hand, from the object to where it comes from
    second: Tensor  # (F,) in [0,1]: from the first grasp to the second
    swing: Tensor  # (F,) in [0,1]: how far a hinge is open, or a soft object pressed in

    @property
    def held(self) -> Tensor:
        """(F,) bool: the hand carries the object."""
        on = (self.closed > 0.999) & (self.away < 1e-3)
        return torch.where(self.second < 0.5, on[0], on[1])


def schedule(kind: str, frames: int) -> Schedule:
    """The course of a clip of one of `KINDS`.

    hold: in the hand all the time. grasp: reach for, hold, put back, go. regrasp: hold, let go, hold otherwise. hinge
    and squeeze: as hold, and open and close it twice, or press it twice. empty: no object.
    """
    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
    t = torch.linspace(0, 1, frames)
    zero, one = torch.zeros(frames), torch.ones(frames)

    def window(a: float, b: float) -> Tensor:
        return ease((t - a) / (b - a))

    progress, closed, away, second = [ease_ends(t), zero], [one, one], [zero, zero], zero
    if kind == "grasp":
        progress[0] = ease_ends((t - 0.24) / 0.56)
        closed[0] = window(0.14, 0.24) - window(0.80, 0.88)
        away[0] = 1 - window(0.0, 0.2) + window(0.83, 1.0)
    elif kind == "regrasp":
        progress = [ease_ends(t / 0.36), ease_ends((t - 0.64) / 0.36)]
        closed = [1 - window(0.37, 0.43), window(0.57, 0.63)]
        away = [window(0.40, 0.48), 1 - window(0.52, 0.60)]
        second = window(0.42, 0.58)
    swing = (1 - torch.cos(4 * math.pi * ease_ends(t))) / 2 if kind in ("hinge", "squeeze") else zero
    return Schedule(torch.stack(progress), torch.stack(closed), torch.stack(away), second, swing)


def ease_ends(x: Tensor, share: float = 0.15) -> Tensor:
    """From 0 to 1 while x does, at an even speed but for `share` of the way at each end."""
    x = x.clamp(0, 1)
    s = share

    def ramp(y: Tensor) -> Tensor:  # integral of ease from 0 to y, y in [0,1]
        return y**4 * (2.5 - 3 * y + y * y)

    begin = s * ramp((x / s).clamp(0, 1))
    end = s * ramp(((1 - x) / s).clamp(0, 1))
    middle = (x.clamp(s, 1 - s) - s) + s / 2
    out = torch.where(x < s, begin, torch.where(x > 1 - s, (1 - s) - end, middle))
    return out / (1 - s)


def turning(
    start: Tensor, forearm: Tensor, turn: float, steps: int, generator: torch.Generator, settle: bool = False
) -> Tensor:
    """Rotations (steps,3,3) of an object that a hand turns so that all its sides are seen.

    The hand rolls about its forearm by `turn` radians in all, while the forearm sways, never pointing at the camera.
    start (3,3): the first rotation, cam_from_object. forearm (3,): unit, elbow-wards, camera frame at the start.
    settle: the forearm need not point well at the start; it first goes to where it does.
    """
    u = torch.linspace(0, 1, steps)
    home = forearm
    if settle:
        side = torch.nn.functional.normalize(forearm[:2] + 1e-3, dim=0)
        home = torch.nn.functional.normalize(torch.cat([side, torch.tensor([0.2])]), dim=0)
    phase = torch.rand(2, generator=generator) * 2 * math.pi
    wave = 1 + torch.rand(2, generator=generator)
    across = torch.stack([-home[1], home[0], torch.zeros(())])
    across = torch.nn.functional.normalize(across + 1e-6, dim=0)
    grown = ease(u / 0.2)  # the sway starts from nothing
    lean = 0.7 * torch.sin(2 * math.pi * wave[0] * u + phase[0]) * grown
    lift = grown * (0.2 + 0.5 * torch.sin(2 * math.pi * wave[1] * u + phase[1]))
    base = torch.lerp(forearm.expand(steps, 3), home.expand(steps, 3), ease(u / 0.3)[:, None])
    way = base + lean[:, None] * across + lift[:, None] * torch.tensor([0.0, 0.0, 1.0])
    way = torch.nn.functional.normalize(way, dim=-1)
    low = torch.where(u < 0.3, min(CONE[0], float(forearm[2])), CONE[0]) if settle else torch.full_like(u, CONE[0])
    z = way[:, 2].clamp(max=CONE[1]).maximum(low)
    flat = torch.nn.functional.normalize(way[:, :2], dim=-1) * (1 - z * z).sqrt()[:, None]
    way = torch.cat([flat, z[:, None]], -1)
    way[0] = forearm
    roll = so3_exp(turn * u[:, None] * forearm)
    return carry(forearm, way) @ roll @ start


def carry(a: Tensor, b: Tensor) -> Tensor:
    """(N,3,3) rotations that take unit a (3,) to unit b (N,3), step by step along b, with no twist of their own."""
    out, last = [], torch.eye(3, dtype=a.dtype)
    before = a
    for v in b:
        axis = torch.linalg.cross(before, v)
        s, c = axis.norm(), before @ v
        if s > 1e-9:
            last = so3_exp(axis / s * torch.atan2(s, c)) @ last
        out.append(last)
        before = v
    return torch.stack(out)


def wandering(center: Tensor, spread: Tensor, steps: int, generator: torch.Generator) -> Tensor:
    """Points (steps,3) near center (3,), within spread (3,) of it, that go to and fro a few times."""
    u = torch.linspace(0, 1, steps)[:, None]
    phase, wave = torch.rand(2, 1, 3, generator=generator) * torch.tensor([2 * math.pi, 1.5])[:, None, None]
    return center + spread * torch.sin(2 * math.pi * (0.7 + wave) * u + phase)


def camera_path(frames: int, pivot: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """cam_from_world (F,4,4) of a camera that goes round a pivot (3,) to and fro, by `degrees` to either side, and
    shakes a little as a hand-held one does. The first frame's is the identity."""
    steps = max(6, frames // 6)
    u = torch.linspace(0, 1, steps)[:, None]
    phase = torch.rand(1, 3, generator=generator) * 2 * math.pi
    size = math.radians(degrees) * torch.tensor([0.5, 1.0, 0.15])
    turn = so3_exp(size * torch.sin(2 * math.pi * u + phase) + 0.006 * torch.randn(steps, 3, generator=generator))
    shift = 0.004 * torch.randn(steps, 3, generator=generator)
    keys = rigid(turn, pivot - (turn @ pivot) + shift)
    path = spline(keys, torch.linspace(0, 1, frames))
    return path @ invert(path[:1])


def sides_seen(rotations: Tensor, within: float = math.radians(60)) -> float:
    """Share of the directions of the object from which the camera looked to within an angle; rotations (F,3,3)."""
    n = 400
    k = torch.arange(n, dtype=rotations.dtype) + 0.5  # points of a Fibonacci sphere
    z, a = 1 - 2 * k / n, math.pi * (1 + 5**0.5) * k
    r = (1 - z * z).sqrt()
    directions = torch.stack([r * a.cos(), r * a.sin(), z], -1)
    towards = -rotations[:, 2]  # of the camera, in the object's frame
    return float(((directions @ towards.T).amax(1) > math.cos(within)).float().mean())


def around(center: Tensor, a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Poses (F,4,4) between poses a and b (F,4,4) at share (F,) that keep clear of center (F,3): directions seen from
    it turn from one to the other, distances change evenly."""
    pa, pb = a[:, :3, 3] - center, b[:, :3, 3] - center
    ra, rb = pa.norm(dim=-1), pb.norm(dim=-1)
    ua, ub = pa / ra.clamp_min(1e-6)[:, None], pb / rb.clamp_min(1e-6)[:, None]
    angle = torch.acos((ua * ub).sum(-1).clamp(-1 + 1e-6, 1 - 1e-6))
    wa, wb = torch.sin((1 - share) * angle) / angle.sin(), torch.sin(share * angle) / angle.sin()
    direction = torch.nn.functional.normalize(wa[:, None] * ua + wb[:, None] * ub, dim=-1)
    place = center + direction * torch.lerp(ra, rb, share)[:, None]
    return rigid(slerp(a[:, :3, :3], b[:, :3, :3], share), place)


def largest_step(poses: Tensor) -> tuple[float, float]:
    """Largest rotation (radians) and translation (metres) between neighbouring poses (F,4,4)."""
    r, t = poses[:, :3, :3], poses[:, :3, 3]
    return float(geodesic(r[:-1], r[1:]).max()), float((t[1:] - t[:-1]).norm(dim=-1).max())
