"""What happens in a generated clip: who holds what and how, and where everything is in every frame.

`stage_clip` gives the F rows of a `Spec` that `clips.make_clip` draws. Frames: OpenCV camera, metres.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...errors import UnusableInput
from ...geometry.rigid import apply, geodesic, invert, rigid, slerp, so3_exp, so3_log
from ...hand.model import HandModel
from ...scene import SIDES
from . import arms, motion
from .grasps import sample_grasps
from .poses import sample_betas, sample_free_poses
from .scenes import Spec, Synth, reflect

DEEPEST = 0.004  # metres a hand may be inside an object
AWAY = 0.16  # metres from which a hand comes
OPEN = 0.25  # share of a grasp's finger angles that an open hand has


@dataclass(frozen=True)
class ClipConfig:
    """What happens in a clip."""

    kind: str = "hold"
    """One of hold, grasp, regrasp, hinge, squeeze, empty; see `motion.schedule`."""
    hands: str = "right"
    """right, left or both."""
    camera: str = "static"
    """static or moving."""
    turn: float = 300.0
    """Degrees by which the object is rolled in all; 90 at most with both hands."""
    orbit: float = 14.0
    """Degrees by which a moving camera goes to either side."""
    object: int | None = None
    """Row of the bank; drawn where not given."""
    split: str = "test"
    """Objects to draw from."""


@dataclass(frozen=True, eq=False)
class Staged:
    """A clip before it is drawn. Mirroring (`spec.mirror`) is still to be done."""

    spec: Spec  # F rows
    shape: Tensor | None  # (F,V,3) object frame, where the object is pressed in
    cam_from_world: Tensor  # (F,4,4) identity where the camera is static
    held: Tensor  # (F,) bool


@dataclass(frozen=True, eq=False)
class Grip:
    """A hand on an object. The hand's frame is that of its wrist; a left hand's is the mirrored right one's."""

    rotations: Tensor  # (16,3,3) the right model's convention, identity at the wrist
    object_from_hand: Tensor  # (4,4)
    contact: Tensor  # (V,) bool
    away: Tensor  # (3,) unit, hand frame: where the hand comes from


# ---------------------------------------------------------------- staging


def stage_clip(synth: Synth, config: ClipConfig, seed: int, frames: int, size: tuple[int, int] = (480, 360)) -> Staged:
    """What happens in a clip: poses of everything in every frame, on the CPU.

    size: (width, height) of the video. Raises `UnusableInput` when no object of the bank suits, ValueError for settings
    that do not exist.
    """
    _check(config)
    synth = _on_cpu(synth)
    g = torch.Generator().manual_seed(seed * 7919 + 17)
    course = motion.schedule(config.kind, frames)
    betas = sample_betas(1, g)[0]
    if config.kind == "empty":
        index, grips, other = 0, [_free_grip(synth, g)], None
        span = 0.22
    else:
        index, grips, other = _cast(synth, config, betas, g)
        span = 0.10 + 0.9 * min(max(float(synth.bank.size[index].amax()), 0.10), 0.24)
    if config.hands == "both":
        span = max(span, 0.26) if other is not None else span + 0.16
    focal = max(size) * (0.9 + 0.7 * float(torch.rand((), generator=g)))
    depth = span * focal / (0.68 * min(size))  # what matters takes about two thirds of the picture's height
    K = torch.tensor([[focal, 0, size[0] / 2], [0, focal, size[1] / 2], [0, 0, 1]])
    center = torch.tensor([0.0, 0.0, depth])
    if config.hands == "both" and other is None:
        center[0] = 0.09
    world = torch.eye(4).expand(frames, 4, 4)
    if config.camera == "moving":
        world = motion.camera_path(frames, center, config.orbit, g)
    object_pose = _object_path(synth, betas, grips, other, course, config, center, g)
    hand_pose, fingers = _hand_path(synth, betas, grips, course, object_pose)
    if config.kind == "empty":
        fingers = _fidget(synth, frames, g)
    angle, shape = torch.zeros(frames), None
    if config.kind == "hinge":
        angle = _swing(synth, index, betas, grips[0], course)
    if config.kind == "squeeze":
        fingers, shape = _press(synth, index, betas, grips[0], course)
    left_pose, left_fingers = _left_path(synth, grips, other, object_pose, hand_pose, center, g)
    contact = torch.where(course.second[:, None] < 0.5, grips[0].contact, grips[-1].contact) & course.held[:, None]
    left_contact = torch.zeros_like(contact) if other is None else other.contact.expand_as(contact)
    poses = world[:, None] @ torch.stack([hand_pose, left_pose], 1)
    rotations, transl = _parameters(synth, poses, torch.stack([fingers, left_fingers], 1), betas)
    return Staged(
        Spec(
            K=K.expand(frames, 3, 3),
            rotations=rotations,
            transl=transl,
            betas=betas.expand(frames, 2, -1).contiguous(),
            hands=torch.tensor([True, config.hands == "both"]).expand(frames, 2),
            contact=torch.stack([contact, left_contact], 1),
            has_object=torch.full((frames,), config.kind != "empty"),
            index=torch.full((frames,), index),
            cam_from_object=world @ object_pose,
            angle=angle,
            bend=torch.zeros(frames, dtype=torch.bool),
            **_surroundings(synth, config, center, depth, K, world, g),
            arms=tuple(_still_arm(arms.sample_arms(1, g), frames) for _ in range(2)),
            mirror=torch.full((frames,), config.hands == "left"),
        ),
        shape,
        world,
        course.held & (config.kind != "empty"),
    )


def _check(config: ClipConfig) -> None:
    for name, known in (("kind", motion.KINDS), ("hands", (*SIDES, "both")), ("camera", ("static", "moving"))):
        if getattr(config, name) not in known:
            raise ValueError(f"{name} is {getattr(config, name)!r}; it must be one of {', '.join(known)}")


def _on_cpu(synth: Synth) -> Synth:
    if synth.device.type == "cpu":
        return synth
    return Synth(synth.config, "cpu", synth.bank.to("cpu"), synth.hand.to(device="cpu"))


def _cast(synth: Synth, config: ClipConfig, betas: Tensor, g: torch.Generator) -> tuple[int, list[Grip], Grip | None]:
    """An object that suits, one or two grips of it, and the left hand's, if wanted."""
    bank = synth.bank
    first, last = (0, len(bank)) if config.object is not None else synth.objects_of(config.split)
    rows = torch.arange(first, last)[torch.randperm(last - first, generator=g)]
    long = bank.size[rows].amax(-1)
    suits = (long > 0.06) & (long < 0.22)
    if config.hands == "both":  # room for two hands
        suits &= (long > 0.11) & (bank.size[rows].median(-1).values > 0.035)
    if config.kind == "hinge":
        suits = bank.hinged[rows]
    if config.kind == "squeeze":
        suits = bank.soft[rows]
    rows = rows[suits] if config.object is None else torch.tensor([config.object])
    for index in rows[:12].tolist():
        grips = _grips(synth, index, betas, 24, g, config.kind == "hinge")
        if not grips:
            continue
        if config.kind == "regrasp":
            others = [b for b in grips[1:] if _apart(grips[0], b) > math.radians(35)]
            if not others:
                continue
            return index, [grips[0], others[0]], None
        if config.hands != "both":
            return index, grips[:1], None
        for right, left in _pairs(synth, index, betas, grips, g):
            return index, [right], left
    what = {"hinge": " with a hinge", "squeeze": " that is soft"}.get(config.kind, "")
    raise UnusableInput(f"No object{what} of {last - first} can be held so; use another seed or more objects.")


def _grips(synth: Synth, index: int, betas: Tensor, n: int, g: torch.Generator, base_only: bool) -> list[Grip]:
    """Grasps of an object by a hand of this shape, best first: the most contact among those that do not go in."""
    rows = torch.full((n,), index)
    found = sample_grasps(_shaped(synth, betas), synth.bank, rows, g)
    points = apply(found.object_from_hand, synth.posed(found.rotations, betas))
    distance = synth.bank.signed_distance(rows, points)
    touching = distance < 0.003
    score = touching.float().mean(1)
    if synth.bank.soft[index]:  # what fingers can press
        score = (touching & (_moving_skin(synth) > 0.5)).float().mean(1)
    score = torch.where(distance.amin(1) < -DEEPEST, -1.0, score)
    if base_only:  # what the hinge moves is to be free
        free = synth.bank.vertices[index, : synth.bank.n_vertices[index]]
        free = free[synth.bank.part[index, : len(free)] == 1]
        near = torch.cdist(points, free.expand(n, -1, -1)).amin((1, 2))
        score = torch.where(near < 0.004, -1.0, score)
    order = torch.argsort(score, descending=True)
    return [
        Grip(found.rotations[i], found.object_from_hand[i], touching[i], _way_out(synth, index, betas, found, i))
        for i in order[:8].tolist()
        if score[i] > 0.004
    ]


def _shaped(synth: Synth, betas: Tensor) -> HandModel:
    """A hand model that has this shape, whatever its betas."""
    hand = synth.hand
    return replace(hand, v_template=hand.with_shape(betas).vertices, shapedirs=torch.zeros_like(hand.shapedirs))


def _pairs(synth: Synth, index: int, betas: Tensor, rights: list[Grip], g: torch.Generator):
    """(right, left) grips of one object whose hands keep apart."""
    rows = torch.full((24,), index)
    found = sample_grasps(_shaped(synth, betas), synth.mirrored_bank, rows, g)
    from_left = reflect(found.object_from_hand)
    lefts = apply(from_left, synth.posed(found.rotations, betas) * _FLIP)
    distance = synth.bank.signed_distance(rows, lefts)
    ok = (distance.amin(1) > -DEEPEST) & ((distance < 0.003).float().mean(1) > 0.004)
    for right in rights:
        points = apply(right.object_from_hand, synth.posed(right.rotations[None], betas)[0])
        for i in torch.nonzero(ok)[:, 0].tolist():
            if torch.cdist(points[::5], lefts[i, ::5]).min() > 0.012:
                yield right, Grip(found.rotations[i], from_left[i], distance[i] < 0.003, torch.zeros(3))


def _way_out(synth: Synth, index: int, betas: Tensor, found, i: int) -> Tensor:
    """Direction (hand frame) into which the opened hand leaves the object with the least contact."""
    sway = torch.linspace(-1, 1, 5)
    ways = torch.stack([torch.tensor([0.6 + 0.5 * a, 1.0, 0.8 * b]) for a in sway for b in sway])
    ways = torch.nn.functional.normalize(torch.cat([ways, torch.tensor([[1.0, 0.0, 0.0]])]), dim=-1)
    fingers = _opened(found.rotations[i], torch.zeros(1))
    hand = synth.posed(fingers, betas)[0, ::4]
    shift = ways[:, None] * torch.tensor([0.01, 0.03, 0.06])[:, None]
    points = (hand + shift[:, :, None]).reshape(1, -1, 3)
    distance = synth.bank.signed_distance(torch.tensor([index]), apply(found.object_from_hand[i][None], points))
    depth = (-distance.reshape(len(ways), -1)).clamp_min(0).mean(1)
    return ways[depth.argmin()]


def _apart(a: Grip, b: Grip) -> float:
    return float(geodesic(a.object_from_hand[:3, :3], b.object_from_hand[:3, :3]))


def _free_grip(synth: Synth, g: torch.Generator) -> Grip:
    """No object: its frame is the hand's, moved to the middle of the hand."""
    shift = torch.eye(4)
    shift[:3, 3] = -synth.hand.v_template.mean(0)
    rotations = sample_free_poses(synth.hand, 1, g)[0]
    return Grip(rotations, shift, torch.zeros(len(synth.hand.v_template), dtype=torch.bool), torch.zeros(3))


# ---------------------------------------------------------------- paths


def _object_path(synth, betas, grips, other, course, config, center, g) -> Tensor:
    """cam_from_object (F,4,4), as the hand carries it."""
    frames = course.progress.shape[1]
    steps = max(8, frames // 3)
    degrees = min(config.turn, 90.0) if other is not None else config.turn
    if config.kind == "regrasp":
        degrees /= 2
    pose, place, path = None, None, []
    for k, grip in enumerate(grips):
        elbow = grip.object_from_hand[:3, 0]
        middle = 0.5 * apply(grip.object_from_hand[None], synth.posed(grip.rotations[None], betas)).mean((0, 1))
        if other is not None:
            elbow = torch.nn.functional.normalize(elbow - other.object_from_hand[:3, 0], dim=0)
            middle = torch.zeros(3)
        if pose is None:
            down = math.radians(200) * (float(torch.rand((), generator=g)) - 0.5)
            forearm = torch.tensor([math.sin(down), math.cos(down), 0.15])
            forearm = forearm / forearm.norm()
            first = motion.carry(elbow, forearm[None])[0]
            turns = 2 * math.pi * torch.rand(1, generator=g)
            first = so3_exp(turns * forearm) @ first
            if other is not None:  # both forearms beside each other rather than one behind the other
                first = _flattest(first, forearm, grip.object_from_hand[:3, 0], -other.object_from_hand[:3, 0])
            place = center
        else:
            first = pose[:3, :3]
            place = (pose[:3, :3] @ middle) + pose[:3, 3]
        sign = 1.0 if torch.rand((), generator=g) < 0.5 else -1.0
        rotations = motion.turning(first, first @ elbow, sign * math.radians(degrees), steps, g, settle=k > 0)
        spread = center[2] * torch.tensor([0.05, 0.04, 0.05])
        drift = motion.wandering(torch.zeros(3), spread, steps, g)
        u = motion.ease(torch.linspace(0, 2, steps))[:, None]
        at = torch.lerp(place.expand(steps, 3), center.expand(steps, 3), u) + drift - drift[:1]
        keys = rigid(rotations, at - (rotations @ middle))
        path.append(motion.spline(keys, course.progress[k]))
        pose = keys[-1]
    if len(path) == 1:
        return path[0]
    return torch.where((course.second < 0.5)[:, None, None], path[0], path[1])


def _flattest(first: Tensor, axis: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`first` turned about `axis` so that directions a and b (object frame) point into the picture least."""
    angles = torch.linspace(0, 2 * math.pi, 37)[:-1]
    turned = so3_exp(angles[:, None] * axis) @ first
    worst = torch.stack([(turned @ a)[:, 2].abs(), (turned @ b)[:, 2].abs()]).amax(0)
    return turned[worst.argmin()]


def _hand_path(synth, betas, grips, course, object_pose) -> tuple[Tensor, Tensor]:
    """cam_from_hand (F,4,4) of the right hand's wrist, and fingers (F,16,3,3)."""
    poses, fingers = [], []
    for k, grip in enumerate(grips):
        offset = rigid(torch.eye(3), AWAY * course.away[k][:, None] * grip.away)
        poses.append(object_pose @ grip.object_from_hand @ offset)
        fingers.append(_opened(grip.rotations, course.closed[k]))
    if len(grips) == 1:
        return poses[0], fingers[0]
    middle = synth.posed(fingers[0][:1], betas)[0].mean(0)
    shift = rigid(torch.eye(3), middle)
    joined = motion.around(object_pose[:, :3, 3], poses[0] @ shift, poses[1] @ shift, course.second)
    share = course.second[:, None].expand(-1, 16)
    return joined @ invert(shift), slerp(fingers[0], fingers[1], share)


def _opened(rotations: Tensor, closed: Tensor) -> Tensor:
    """(F,16,3,3) fingers between open (0) and a grasp (1), and beyond."""
    share = OPEN + (1 - OPEN) * closed
    return so3_exp(share[:, None, None] * so3_log(rotations))


def _fidget(synth: Synth, frames: int, g: torch.Generator) -> Tensor:
    """(F,16,3,3) fingers of an empty hand that goes from one pose to the next."""
    n = max(2, frames // 10 + 1)
    keys = sample_free_poses(synth.hand, n, g)
    at = torch.linspace(0, n - 1 - 1e-4, frames)
    k = at.long()
    share = motion.ease(at - k)[:, None].expand(-1, 16)
    return slerp(keys[k], keys[k + 1], share)


def _swing(synth, index, betas, grip, course) -> Tensor:
    """(F,) angle of the hinge, as far open as the hand leaves room."""
    low, high = synth.bank.hinge_range[index].tolist()
    full = high if abs(high) >= abs(low) else low
    points = apply(grip.object_from_hand[None], synth.posed(grip.rotations[None], betas))
    room = 0.0
    for share in torch.linspace(0.1, 1, 10).tolist():
        angle = torch.tensor([share * full])
        if synth.bank.signed_distance(torch.tensor([index]), points, angle).min() < -DEEPEST - 0.001:
            break
        room = share
    return course.swing * full * room


def _press(synth, index, betas, grip, course, deepest: float = 0.008) -> tuple[Tensor, Tensor]:
    """Fingers (F,16,3,3) that press in, and the object's vertices (F,V,3) that give way: where the hand touches, the
    surface goes with it, and less the farther away it is (a Gaussian of 18 mm). At most `deepest` metres."""

    def posed(s: Tensor) -> Tensor:
        return apply(grip.object_from_hand[None], synth.posed(_beyond(grip.rotations, s), betas))

    rest = posed(torch.zeros(1))[0]
    touch = grip.contact & (_moving_skin(synth) > 0.5)
    touch = touch if touch.any() else grip.contact
    v = synth.bank.vertices[index]
    near = torch.exp(-torch.cdist(v, rest[touch]).square() / (2 * 0.018**2))  # (V,C)
    weight = near.square() / near.sum(1, keepdim=True).clamp_min(1e-6)  # weighted mean times nearness

    def dented(s: Tensor) -> Tensor:
        return v + torch.einsum("vc,fcx->fvx", weight, (posed(s) - rest)[:, touch])

    tries = torch.linspace(0.05, 0.6, 12)
    shallow = (dented(tries) - v).norm(dim=-1).amax(1) <= deepest
    most = tries[shallow].amax() if shallow.any() else tries[0]
    s = most * course.swing
    return _beyond(grip.rotations, s), dented(s)


def _beyond(rotations: Tensor, s: Tensor) -> Tensor:
    """(F,16,3,3) fingers closed further than a grasp, by shares s (F,)."""
    return so3_exp((1 + s)[:, None, None] * so3_log(rotations))


def _moving_skin(synth: Synth) -> Tensor:
    """(V,) share of each vertex that finger joints move."""
    return 1 - synth.hand.weights[:, 0]


def _left_path(synth, grips, other, object_pose, hand_pose, center, g) -> tuple[Tensor, Tensor]:
    """cam_from_hand (F,4,4) of the left hand, and its fingers (F,16,3,3) in the right model's convention: on the
    object, or else empty, beside the right hand."""
    frames = len(object_pose)
    if other is not None:
        return object_pose @ other.object_from_hand, other.rotations.expand(frames, 16, 3, 3)
    steps = max(8, frames // 4)
    forearm = torch.nn.functional.normalize(torch.tensor([-0.5, 1.0, 0.2]), dim=0)
    first = motion.carry(torch.tensor([-1.0, 0.0, 0.0]), forearm[None])[0]
    turns = motion.turning(first, forearm, math.radians(120), steps, g)
    place = center + torch.tensor([-0.20, 0.04, 0.03])
    at = motion.wandering(place, torch.tensor([0.015, 0.02, 0.02]), steps, g)
    middle = synth.hand.v_template.mean(0) * _FLIP
    pose = motion.spline(rigid(turns, at - turns @ middle), motion.ease_ends(torch.linspace(0, 1, frames)))
    return pose, _fidget(synth, frames, g)


_FLIP = torch.tensor([-1.0, 1.0, 1.0])


def _parameters(synth: Synth, poses: Tensor, fingers: Tensor, betas: Tensor) -> tuple[Tensor, Tensor]:
    """Rotations (F,2,16,3,3) and translations (F,2,3) of the two models, from cam_from_hand (F,2,4,4)."""
    wrist = synth.hand.with_shape(betas).rest_joints[0]
    wrist = torch.stack([wrist, wrist * _FLIP])
    fingers = torch.stack([fingers[:, 0], fingers[:, 1] * _FLIP[:, None] * _FLIP], 1)
    turn = poses[..., :3, :3]
    transl = poses[..., :3, 3] + (turn @ wrist[..., None])[..., 0] - wrist
    return torch.cat([turn[:, :, None], fingers[:, :, 1:]], 2), transl


def _surroundings(synth, config, center, depth, K, world, g) -> dict:
    """Objects nobody touches and people behind, at rest in the world and clear of what moves."""
    first, last = synth.objects_of(config.split)
    # the settings' size is that of squares; spots are drawn over the video's shorter side
    around = synth._surroundings(1, center[None], torch.tensor([depth]), K[None], first, last, g)
    extra = around["cam_from_extra"].clone()
    behind = depth + 0.22 + synth.bank.size[around["extras"]].amax(-1)
    scale = (behind / extra[..., 2, 3]).clamp_min(1)
    extra[..., :3, 3] *= scale[..., None]
    blobs = around["blobs"].clone()
    blobs[..., 2] += 0.1
    n = len(world)
    spots = apply(world, blobs[..., :3].expand(n, -1, -1))
    return {
        "extras": around["extras"].expand(n, -1),
        "cam_from_extra": world[:, None] @ extra,
        "has_extra": around["has_extra"].expand(n, -1),
        "blobs": torch.cat([spots, blobs[..., 3:].expand(n, -1, -1)], -1),
        "has_blob": around["has_blob"].expand(n, -1),
    }


def _still_arm(spec: arms.ArmSpec, frames: int) -> arms.ArmSpec:
    spec = replace(spec, bend=0.4 * spec.bend, length=spec.length.clamp(min=0.34))  # its end is seen less often
    parts = {f.name: getattr(spec, f.name) for f in dataclasses.fields(spec)}
    return arms.ArmSpec(**{k: v.expand(frames, *v.shape[1:]) for k, v in parts.items()})
