"""Novel views of a finished scene: any camera, hands in other poses, bodies left out; colour, depth, masks, normals.

Bodies are drawn as their Gaussians where every one of them has some, else as their meshes. A hand's Gaussians and its
mesh are carried by the same bones (`HandModel`), so both follow a new pose; the object keeps its own motion. Nothing
here reads or writes files: see `view.novel_files`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UnusableInput
from ..export.glb import HAND_COLORS
from ..export.meshes import colors_u8
from ..geometry.cameras import scale_K
from ..hand import HandModel, ShapedHand
from ..hand.presets import preset
from ..render import splat
from ..render.raster import rasterize
from ..scene import SIDES, Body, Scene, Skinned
from ..shapes.gaussians import Gaussians, concatenate
from ..shapes.skinned import SkinnedGaussians
from .preview import focus, orbit_camera

OUTPUTS = ("color", "depth", "masks", "normals")
BACKDROP = (24, 27, 33)  # sRGB
_AMBIENT = 0.55  # of a mesh's colour; the rest comes with the light at the camera


@dataclass(frozen=True)
class Camera:
    """A pinhole camera of the world. OpenCV axes, pixel centres at +0.5."""

    K: np.ndarray  # (3,3) pixels
    world_from_cam: np.ndarray  # (4,4)
    size: tuple[int, int]  # width, height


@dataclass(frozen=True)
class HandPose:
    """How a hand is to be posed, in its model's convention: one pose for all frames, or one for each."""

    pose: np.ndarray  # (15,3) or (F,15,3) fingers, the wrist stays the scene's; (16,3) or (F,16,3) with the wrist
    transl: np.ndarray | None = None  # (3,) or (F,3) metres, world; None: the scene's


@dataclass(frozen=True)
class Picture:
    """What a camera sees of one frame. Without a surface: depth and normals 0, masks False."""

    color: np.ndarray  # (H,W,3) uint8 sRGB
    alpha: np.ndarray  # (H,W) float32 in [0,1]
    depth: np.ndarray | None = None  # (H,W) float32 camera z, metres, of the nearest surface
    masks: dict[str, np.ndarray] = field(default_factory=dict)  # body -> (H,W) bool where it is what is seen
    normals: np.ndarray | None = None  # (H,W,3) float32 unit, camera frame, towards the camera
    depth_alone: dict[str, np.ndarray] = field(default_factory=dict)  # body -> as if nothing else were there
    masks_alone: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class Actor:
    """One body of the scene, ready to be put where it is in any frame."""

    name: str
    body: Body
    valid: np.ndarray  # (F,) bool
    splats: Gaussians | SkinnedGaussians | None
    shaped: ShapedHand | None = None  # of a hand whose model is at hand
    pose: np.ndarray | None = None  # (F,16,3) world, of a hand
    transl: np.ndarray | None = None  # (F,3)
    reposed: bool = False

    def bones(self, frame: int) -> Tensor:
        """(J,4,4) world_from_rest float32: a hand's 16 bones, or the one motion of a rigid body."""
        if self.shaped is None:
            return _f32(self.body.motion.world_from_body[frame])[None]
        return self.shaped.with_pose(_f32(self.pose[frame]), _f32(self.transl[frame])).bone_transforms

    def vertices(self, frame: int) -> np.ndarray:
        """(V,3) float32 world vertices of `body.shape`."""
        if not self.reposed:
            return np.asarray(self.body.posed(frame), np.float32)
        v = self.shaped.with_pose(_f32(self.pose[frame]), _f32(self.transl[frame])).vertices
        return v[: len(self.body.shape.vertices)].numpy()

    def gaussians(self, frame: int) -> Gaussians:
        """World frame. Raises ValueError when the body has none."""
        if self.splats is None:
            raise ValueError(f"the {self.name} has no Gaussians")
        bones = self.bones(frame)
        if isinstance(self.splats, SkinnedGaussians):
            return self.splats.posed(bones)
        return self.splats.similar(bones[0, :3, :3], bones[0, :3, 3])


def actors(
    scene: Scene,
    splats: Mapping[str, Gaussians | SkinnedGaussians] | None = None,
    without: Sequence[str] = (),
    poses: Mapping[str, HandPose] | str | None = None,
) -> list[Actor]:
    """The bodies to draw: all but those in `without`.

    splats: body -> its Gaussians (`shapes.skinned.from_arrays`), where there are some; poses: side -> `HandPose`, or a
    name of `hand.presets.PRESETS` for the fingers of all hands. Raises `UnusableInput` for a body the scene lacks, a
    pose of another length, and a hand to be posed whose model is not the built-in one.
    """
    missing = [n for n in {*without, *(() if isinstance(poses, str) else poses or ())} if n not in scene.bodies]
    if missing:
        have = " and ".join(scene.bodies) or "no bodies"
        raise UnusableInput(f"The scene has no {missing[0]!r}; it has {have}.")
    out = []
    for name, body in scene.bodies.items():
        if name not in without:
            own = (splats or {}).get(name)
            if isinstance(body.motion, Skinned):
                given = poses if isinstance(poses, str) else (poses or {}).get(name)
                out.append(_hand(name, body, own, given))
            else:
                out.append(Actor(name, body, body.valid, own))
    return out


def _hand(side: str, body: Body, splats: SkinnedGaussians | None, given: HandPose | str | None) -> Actor:
    m = body.motion
    if side not in SIDES or not m.model.startswith("open"):
        if given is not None:
            raise UnusableInput(f"The {side} hand's model is {m.model!r}; only the built-in one can be posed anew.")
        return Actor(side, body, body.valid, None)  # nothing carries its Gaussians
    model = HandModel.open(side, dtype=torch.float32)
    shaped = model.with_shape(_f32(m.betas))
    pose, transl, valid = np.array(m.pose, np.float32), np.array(m.transl, np.float32), body.valid
    if isinstance(given, str):
        given = HandPose(preset(model, given)[1:].numpy())
    if given is not None:
        count = len(pose)
        fingers = np.asarray(given.pose, np.float32)
        if fingers.ndim not in (2, 3) or fingers.shape[-2:] not in ((15, 3), (16, 3)) or not _lasts(fingers, 2, count):
            raise UnusableInput(f"A pose is (15,3), (16,3) or {count} of these, one a frame, not {fingers.shape}.")
        pose[:, -fingers.shape[-2] :] = fingers
        if given.transl is not None:
            place = np.asarray(given.transl, np.float32)
            if place.shape[-1:] != (3,) or not _lasts(place, 1, count):
                raise UnusableInput(f"The place of a hand is (3,) or ({count},3), not {place.shape}.")
            transl[:] = place
        if given.transl is not None and fingers.shape[-2] == 16:
            valid = np.ones(count, bool)  # nothing of the scene's own pose is left
        valid = valid & np.isfinite(pose).all((1, 2)) & np.isfinite(transl).all(1)
    return Actor(side, body, valid, splats, shaped, pose, transl, given is not None)


def has_splats(bodies: Sequence[Actor]) -> bool:
    """Whether all can be drawn as Gaussians."""
    return bool(bodies) and all(b.splats is not None for b in bodies)


def draw(
    bodies: Sequence[Actor],
    frame: int,
    camera: Camera,
    outputs: Sequence[str] = ("color",),
    splats: bool | None = None,
    background: Sequence[int] = BACKDROP,
) -> Picture:
    """One picture. outputs: of `OUTPUTS`, colour is always there; with "depth" and "masks" also of each body alone.

    splats: draw Gaussians (True), meshes (False), or what there is (None). Bodies that are not valid are not drawn.
    In a picture of Gaussians the surface is where half of the light is stopped: depth and masks are those of the
    Gaussian at which that happens.
    """
    use = has_splats(bodies) if splats is None else splats
    see, part = (_splats, _gaussians) if use else (_meshes, _triangles)
    with torch.inference_mode():
        parts = {b.name: part(b, frame) for b in bodies if b.valid[frame]}
        picture = see(parts, camera, outputs, background)
        each = parts if {"depth", "masks"} & set(outputs) else {}
        alone = {n: see({n: p}, camera, ("depth", "masks"), background) for n, p in each.items()}
    nothing = np.zeros(picture.alpha.shape, np.float32)
    if "masks" in outputs:
        masks = {b.name: picture.masks.get(b.name, nothing > 0) for b in bodies}
        masks_alone = {b.name: alone[b.name].masks[b.name] if b.name in alone else nothing > 0 for b in bodies}
        picture = replace(picture, masks=masks, masks_alone=masks_alone)
    if "depth" in outputs:
        depths = {b.name: alone[b.name].depth if b.name in alone else nothing for b in bodies}
        picture = replace(picture, depth_alone=depths)
    return picture


def _gaussians(actor: Actor, frame: int) -> Gaussians:
    return actor.gaussians(frame)


def _triangles(actor: Actor, frame: int) -> tuple[Tensor, Tensor, Tensor]:
    """World vertices (V,3), faces (T,3) and colours (V,3) in [0,1]."""
    shape = actor.body.shape
    color = colors_u8(shape)
    if shape.colors is None and actor.name in HAND_COLORS:
        color[:] = HAND_COLORS[actor.name]
    return _f32(actor.vertices(frame)), torch.as_tensor(np.asarray(shape.faces)).long(), _f32(color) / 255


def _splats(
    parts: Mapping[str, Gaussians], camera: Camera, outputs: Sequence[str], background: Sequence[int]
) -> Picture:
    w, h = camera.size
    if not sum(len(p) for p in parts.values()):
        return _nothing(w, h, background)
    g = concatenate([p.with_values(ids=torch.full((len(p),), k)) for k, p in enumerate(parts.values())])
    degree = None if g.colors.ndim == 2 else round(g.colors.shape[1] ** 0.5) - 1
    view, K = _cam_from_world(camera), _f32(camera.K)
    r = splat(
        *(g.means, g.quats, g.scales, g.opacities, g.colors, view[None], K[None], w, h),
        sh_degree=degree,
        backgrounds=torch.tensor([background], dtype=torch.float32) / 255,
        normals="normals" in outputs,
    )
    solid = r.median[0] >= 0
    masks, depth, normals = {}, None, None
    if "masks" in outputs:
        body = torch.where(solid, g.ids[r.median[0].clamp(min=0).long()], -1)
        masks = {n: (body == k).numpy() for k, n in enumerate(parts)}
    if "depth" in outputs:
        depth = r.median_depth[0, ..., 0].numpy()
    if "normals" in outputs:
        normals = (F.normalize(r.normals[0] @ view[:3, :3].T, dim=-1) * solid[..., None]).numpy()
    return Picture(_u8(r.color[0]), r.alpha[0, ..., 0].numpy(), depth, masks, normals)


def _meshes(
    parts: Mapping[str, tuple[Tensor, Tensor, Tensor]],
    camera: Camera,
    outputs: Sequence[str],
    background: Sequence[int],
) -> Picture:
    w, h = camera.size
    if not parts:
        return _nothing(w, h, background)
    vertices, faces, colors = zip(*parts.values(), strict=True)
    first = np.cumsum([0, *map(len, vertices)])
    ids = torch.cat([torch.full((len(f),), k) for k, f in enumerate(faces)])
    faces = torch.cat([f + int(at) for f, at in zip(faces, first, strict=False)])
    vertices, view, K = torch.cat(vertices), _cam_from_world(camera), _f32(camera.K)

    fine = _f32(scale_K(camera.K, 2.0))  # a colour is the mean of four samples
    r = rasterize(vertices, faces, view[None], fine[None], 2 * w, 2 * h, torch.cat(colors))
    facing = ((r.normals[0] @ view[:3, :3].T) * _rays(fine, 2 * w, 2 * h)).sum(-1, keepdim=True).abs()
    alpha = _halved(r.mask[0])
    color = _halved(r.attributes[0] * (_AMBIENT + (1 - _AMBIENT) * facing))
    color = color + (1 - alpha) * torch.tensor(background, dtype=torch.float32) / 255
    picture = Picture(_u8(color), alpha[..., 0].numpy())
    if not {"depth", "masks", "normals"} & set(outputs):
        return picture
    r = rasterize(vertices, faces, view[None], K[None], w, h, None, ids)
    normals = r.normals[0] @ view[:3, :3].T
    away = (normals * _rays(K, w, h)).sum(-1, keepdim=True) > 0
    return replace(
        picture,
        depth=r.depth[0, ..., 0].numpy(),
        masks={n: (r.ids[0] == k).numpy() for k, n in enumerate(parts)},
        normals=torch.where(away, -normals, normals).numpy(),
    )


def input_cameras(scene: Scene, size: tuple[int, int] | None = None) -> list[Camera]:
    """The video's own camera in each frame, for pictures of `size` (width, height)."""
    size = size or scene.size
    K = scale_K(scene.K, size[0] / scene.size[0], size[1] / scene.size[1])
    return [Camera(K, np.asarray(t, np.float64), size) for t in scene.world_from_cam]


def orbit_cameras(
    scene: Scene, count: int, size: tuple[int, int] | None = None, without: Sequence[str] = ()
) -> list[Camera]:
    """`count` cameras once around the bodies, starting on the side of the video's."""
    size = size or scene.size
    seen = replace(scene, bodies={n: b for n, b in scene.bodies.items() if n not in without})
    around = focus(seen)
    turns = (orbit_camera(*around, 2 * np.pi * i / max(count, 1), size) for i in range(count))
    return [Camera(K, np.linalg.inv(t), size) for K, t in turns]


def _lasts(values: np.ndarray, own: int, count: int) -> bool:
    return values.ndim == own or (values.ndim == own + 1 and len(values) == count)


def _nothing(width: int, height: int, background: Sequence[int]) -> Picture:
    none = np.zeros((height, width), np.float32)
    color = np.full((height, width, 3), background, np.uint8)
    return Picture(color, none, none, {}, np.zeros((height, width, 3), np.float32))


def _rays(K: Tensor, width: int, height: int) -> Tensor:
    """(H,W,3) unit directions through the pixel centres, camera frame."""
    x = (torch.arange(width) + 0.5 - K[0, 2]) / K[0, 0]
    y = (torch.arange(height) + 0.5 - K[1, 2]) / K[1, 1]
    rays = torch.stack([x.expand(height, width), y[:, None].expand(height, width), torch.ones(height, width)], -1)
    return F.normalize(rays, dim=-1)


def _halved(image: Tensor) -> Tensor:
    """(2H,2W,C) -> (H,W,C), the mean of each four."""
    h, w, c = image.shape
    return image.reshape(h // 2, 2, w // 2, 2, c).mean((1, 3))


def _cam_from_world(camera: Camera) -> Tensor:
    return _f32(np.linalg.inv(np.asarray(camera.world_from_cam, np.float64)))


def _u8(color: Tensor) -> np.ndarray:
    return color.clamp(0, 1).mul(255).add(0.5).to(torch.uint8).numpy()


def _f32(x: np.ndarray) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(x, np.float32))
