"""The generator: seeded scenes of hands, held objects and their surroundings, and pictures of them with exact truth.

`Synth(config).batch(step, n)` is stateless: the same settings, step and n give the same batch on one device, so that a
training run can go on anywhere. Random numbers are drawn on the CPU, whatever the device.

A scene is set up with a right hand that holds, pinches, supports or lacks an object, and sometimes a left one; half of
all scenes are then mirrored, so both sides are alike. Frames: OpenCV camera, metres.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from ...errors import UnusableInput
from ...geometry.rigid import apply, matrix_from_quat, rigid
from ...hand.model import HandModel
from . import arms, look, sensor
from .assemble import EXTRAS, FAMILIES, PART, SKIN, SLEEVE, SLEEVE_2, THING, TORSO, Assembled, Assembler, mirror_bank
from .backgrounds import Backgrounds
from .gbuffer import amodal_masks
from .grasps import sample_grasps
from .objects import ObjectBank, make_object_bank
from .poses import sample_free_poses
from .sample import LEFT, RIGHT, HandTruth, ObjectTruth, SynthBatch, map_tensors

SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class SynthConfig:
    """What is drawn, and how often."""

    size: int = 256
    """Width and height of the pictures, pixels."""
    objects: int = 600
    """Procedural objects in the bank; one in ten of all is kept for validation and one in ten for tests, none of them
    a given mesh."""
    seed: int = 0
    """Seed of the bank and of every scene."""
    bank: Path | None = None
    """File of a bank that `ObjectBank.save` wrote, instead of making one of `objects`."""
    images: Path | None = None
    """Folder of pictures for backgrounds, used beside the procedural ones."""
    meshes: Path | None = None
    """Folder of meshes (.obj, .ply) to be held, used beside the procedural ones."""
    empty: float = 0.22
    """Share of scenes whose hands hold nothing."""
    both: float = 0.35
    """Share of scenes with two hands."""
    shared: float = 0.5
    """Share of scenes with two hands and an object in which both hold it."""
    bystanders: float = 0.35
    """Share of scenes in which a torso or a face is behind the hands."""
    clutter: float = 0.35
    """Chance of each object that nobody touches."""
    hand_share: tuple[float, float] = (0.2, 0.95)
    """Least and greatest size of the hand over the picture's."""
    gloves: float = 0.03
    """Share of people with gloves."""
    amodal: bool = False
    """Draw the amodal masks, at four times the rasterisation."""


@dataclass(frozen=True, eq=False)
class Spec:
    """B scenes before they are drawn; plain tensors, so that a clip is one row repeated with other poses."""

    K: Tensor  # (B,3,3)
    rotations: Tensor  # (B,2,16,3,3) right and left hand, each in its own model's convention, camera frame
    transl: Tensor  # (B,2,3)
    betas: Tensor  # (B,2,10)
    hands: Tensor  # (B,2) bool: which are there
    contact: Tensor  # (B,2,V) bool
    has_object: Tensor  # (B,) bool
    index: Tensor  # (B,) row of the bank
    cam_from_object: Tensor  # (B,4,4)
    angle: Tensor  # (B,) hinge, radians
    bend: Tensor  # (B,) bool: the object is deformed
    extras: Tensor  # (B,E) rows of the bank
    cam_from_extra: Tensor  # (B,E,4,4)
    has_extra: Tensor  # (B,E) bool
    blobs: Tensor  # (B,2,6) torso and head: centre in the camera frame, half axes
    has_blob: Tensor  # (B,2) bool
    arms: tuple[arms.ArmSpec, arms.ArmSpec]
    mirror: Tensor  # (B,) bool: the picture is reflected in x after all

    def __len__(self) -> int:
        return len(self.K)

    def rows(self, index) -> Spec:
        return map_tensors(self, lambda x: x[index])

    def to(self, device) -> Spec:
        return map_tensors(self, lambda x: x.to(device))


@dataclass(frozen=True, eq=False)
class Cast:
    """What B pictures look like, apart from their geometry."""

    materials: look.Materials  # (B,M), see `assemble.FAMILIES`
    light: look.Light
    background: Tensor  # (B,3,H,W) linear

    def rows(self, index: Tensor | slice) -> Cast:
        return map_tensors(self, lambda x: x[index])


class Synth:
    """The generator: a bank of objects, a hand, backgrounds; `batch` draws."""

    def __init__(
        self,
        config: SynthConfig | None = None,
        device: str | torch.device = "cpu",
        bank: ObjectBank | None = None,
        hand: HandModel | None = None,
    ):
        self.config = config or SynthConfig()
        self.device = torch.device(device)
        given = () if self.config.meshes is None else read_meshes(self.config.meshes)
        if bank is None and self.config.bank is not None:
            bank = ObjectBank.load(self.config.bank)
        self.bank = bank or make_object_bank(self.config.objects, self.config.seed, meshes=given)
        self.bank = self.bank.to(self.device)
        self.hand = (hand or HandModel.open("right")).to(device=self.device)
        self.images = None if self.config.images is None else read_images(self.config.images, self.config.size)
        self.assemble = Assembler(self.hand, self.bank)
        self.skin = look.skin_attributes(self.hand)

    # -- what is drawn -------------------------------------------------------------------------------------------------

    def batch(self, step: int, n: int, split: str = "train") -> SynthBatch:
        """n pictures with their truth; the same for the same arguments. Splits share no object and no seed."""
        g = self.generator(step, split)
        spec = self.sample(n, g, split)
        return self.draw(spec, g, split)

    def generator(self, step: int, split: str = "train") -> torch.Generator:
        g = torch.Generator()
        return g.manual_seed((self.config.seed * 1_000_003 + step * 3 + SPLITS.index(split)) % (2**62))

    def objects_of(self, split: str) -> tuple[int, int]:
        """Rows [first, last) of the bank that a split uses. Banks of fewer than 30 objects are not split."""
        n = len(self.bank)
        if n < 30:
            return 0, n
        held = n // 10
        return {"train": (0, n - 2 * held), "val": (n - 2 * held, n - held), "test": (n - held, n)}[split]

    @cached_property
    def mirrored_bank(self) -> ObjectBank:
        return mirror_bank(self.bank)

    def sample(self, n: int, g: torch.Generator, split: str = "train") -> Spec:
        """Scenes, not drawn yet."""
        c, device = self.config, self.device

        def chance(p: float, *shape: int) -> Tensor:
            return (torch.rand(n, *shape, generator=g) < p).to(device)

        first, last = self.objects_of(split)
        has_object, both = ~chance(c.empty), chance(c.both)
        shared = both & has_object & chance(c.shared)
        m = n + n // 4 + 2
        index = torch.randint(first, last, (m,), generator=g).to(device)
        local = self._local(g)
        grasp = sample_grasps(self.hand, self.bank, index, local)
        good = torch.argsort((grasp.penetration > 0.004).to(torch.int8), stable=True)[:n]
        index, grasp = index[good], map_tensors(grasp, lambda x: x[good])
        free = sample_free_poses(self.hand, 2 * n, local).reshape(n, 2, 16, 3, 3)
        right = torch.where(has_object[:, None, None, None], grasp.rotations, free[:, 0])
        betas = grasp.betas
        # The other hand: on the same object, or somewhere near.
        other = sample_grasps(self.hand, self.mirrored_bank, index, local)
        object_from_left = reflect(other.object_from_hand)
        cam_from_right, center, depth, K = self._camera(right, betas, n, g)
        cam_from_object = cam_from_right @ torch.linalg.inv(grasp.object_from_hand)
        cam_from_left = cam_from_object @ object_from_left
        rights = self.posed(right, betas)
        lefts = self.posed(other.rotations, betas) * self._flip
        gap = torch.cdist(apply(cam_from_right, rights[:, ::11]), apply(cam_from_left, lefts[:, ::11])).amin((1, 2))
        shared = shared & (gap > 0.006) & (other.penetration < 0.004)
        apart = torch.randn(n, 3, generator=g).to(device) * torch.tensor([1.0, 1.0, 0.6], device=device)
        reach = 0.11 + 0.2 * torch.rand(n, generator=g).to(device) + 0.5 * has_object * self.bank.size[index].amax(-1)
        place = center + torch.nn.functional.normalize(apart, dim=-1) * reach[:, None]
        place[:, 2] = place[:, 2].clamp(min=0.2)
        turn = random_rotations(n, g).to(device)
        lone = self.posed(free[:, 1], betas) * self._flip
        away = rigid(turn, place - (turn @ lone.mean(1)[..., None])[..., 0])
        cam_from_left = torch.where(shared[:, None, None], cam_from_left, away)
        left = torch.where(shared[:, None, None, None], other.rotations, free[:, 1])
        left = left * self._flip[:, None] * self._flip
        rotations = torch.stack([right, left], 1)
        wrist = torch.stack([self._wrist(betas), self._wrist(betas) * self._flip], 1)
        frames = torch.stack([cam_from_right, cam_from_left], 1)
        turns = frames[..., :3, :3]
        transl = frames[..., :3, 3] + (turns @ wrist[..., None])[..., 0] - wrist
        rotations = torch.cat([turns[:, :, None], rotations[:, :, 1:]], 2)
        angle, bend = self._articulation(index, n, g)
        no_contact = torch.zeros_like(grasp.contact)
        contact = torch.stack(
            [
                torch.where(has_object[:, None], grasp.contact, no_contact),
                torch.where(shared[:, None], other.contact, no_contact),
            ],
            1,
        )
        return Spec(
            K=K, rotations=rotations, transl=transl, betas=betas[:, None].expand(-1, 2, -1).contiguous(),
            hands=torch.stack([torch.ones_like(both), both], 1), contact=contact,
            has_object=has_object, index=index, cam_from_object=cam_from_object, angle=angle, bend=bend,
            **self._surroundings(n, center, depth, K, first, last, g),
            arms=map_tensors((arms.sample_arms(n, g), arms.sample_arms(n, g)), lambda x: x.to(device)),
            mirror=chance(0.5),
        )  # fmt: skip

    def draw(
        self, spec: Spec, g: torch.Generator, split: str = "train", cast: Cast | None = None,
        size: tuple[int, int] | None = None,
    ) -> SynthBatch:  # fmt: skip
        """Pictures of scenes, and what is true in them. cast: what things are made of, the light and what is behind
        (drawn when not given); size: width and height of the pictures, else the settings' square."""
        width, height = size or (self.config.size, self.config.size)
        n, device = len(spec), self.device
        cast = cast or self.cast(n, g, split, (width, height))
        mesh = self.assemble(spec, self._local(g))
        K = _reflected_K(spec, width)
        attrs = torch.nn.functional.pad(self.skin, (0, 0, 0, mesh.vertices.shape[1] - len(self.skin)))
        first = self.assemble.sizes[0] + self.assemble.sizes[1]
        attrs[first : first + len(self.skin)] = self.skin  # of the left hand
        surfaces = look.Surfaces(mesh.vertices, mesh.faces, mesh.normals, mesh.label, mesh.material, mesh.canon, attrs)
        image, seen = self.render(
            surfaces, cast.materials, cast.light, cast.background, K, width, height, self.textures(split)
        )
        label = mesh.label.gather(1, seen.face.flatten(1).clamp(min=0)).reshape(seen.face.shape)
        labels = torch.where(seen.face >= 0, label, torch.zeros_like(label))
        if self.config.amodal:
            amodal = amodal_masks(mesh.vertices, mesh.faces, mesh.label, K, width, height)
        else:
            amodal = torch.zeros(n, 0, height, width, dtype=torch.bool, device=device)
        right, left = self._truth(spec, mesh, K, labels, seen.depth)
        pose = torch.where(spec.mirror[:, None, None], reflect(spec.cam_from_object), spec.cam_from_object)
        return SynthBatch(
            image=self.expose(image, g), K=K, labels=labels, amodal=amodal, depth=seen.depth, right=right, left=left,
            object=ObjectTruth(
                spec.has_object, spec.index, pose, mesh.object, spec.angle, spec.bend & spec.has_object, spec.mirror
            ),
        )  # fmt: skip

    def cast(self, n: int, g: torch.Generator, split: str = "train", size: tuple[int, int] | None = None) -> Cast:
        """Materials, light and backgrounds of n pictures."""
        width, height = size or (self.config.size, self.config.size)
        table = [look.sample_materials(n, family, g) for family in FAMILIES]
        same = torch.rand(n, generator=g) < 0.8  # both sleeves of one shirt
        table[SLEEVE_2] = table[SLEEVE].where(same, table[SLEEVE_2])
        same = torch.rand(n, generator=g) < 0.6  # and the body in it
        table[TORSO] = table[SLEEVE].where(same, table[TORSO])
        gloves = torch.rand(n, generator=g) < self.config.gloves
        table[SKIN] = look.sample_materials(n, "glove", g).where(gloves, table[SKIN])
        one = torch.rand(n, generator=g) < 0.6  # both parts of a hinged object
        table[PART] = table[THING].where(one, table[PART])
        light = look.sample_lights(n, g, self.device)
        background = self.backgrounds(split).sample(n, height, width, g, self.device)
        return Cast(look.Materials.table(table).to(self.device), light, background)

    render = staticmethod(look.render)  # what makes pictures of surfaces; `pathtraced.render` takes its place
    expose = staticmethod(sensor.expose)  # and photographs of pictures

    def textures(self, split: str) -> look.Textures:
        """Prints that no other split has."""
        return look.make_textures(seed=3 * self.config.seed + SPLITS.index(split), device=str(self.device))

    def backgrounds(self, split: str) -> Backgrounds:
        images = self.images
        if images is not None and len(images) >= 10:
            held = len(images) // 10
            images = {"train": images[: -2 * held], "val": images[-2 * held : -held], "test": images[-held:]}[split]
        return Backgrounds(images, seed=3 * self.config.seed + SPLITS.index(split))

    def _local(self, g: torch.Generator) -> torch.Generator:
        """A generator on the device, seeded from `g`."""
        return torch.Generator(self.device).manual_seed(int(torch.randint(2**62, (1,), generator=g)))

    def _truth(
        self, spec: Spec, mesh: Assembled, K: Tensor, labels: Tensor, depth: Tensor
    ) -> tuple[HandTruth, HandTruth]:
        """Both sides' hands, after mirroring."""
        flip = self._flip
        m = spec.mirror[:, None]
        rotations = spec.rotations.flip(1) * flip[:, None] * flip
        rotations = torch.where(m[..., None, None, None], rotations, spec.rotations)
        transl = torch.where(m[..., None], spec.transl.flip(1) * flip, spec.transl)
        betas = torch.where(m[..., None], spec.betas.flip(1), spec.betas)
        present, contact = (
            torch.where(m if x.ndim == 2 else m[..., None], x.flip(1), x) for x in (spec.hands, spec.contact)
        )
        out = []
        for k, label in enumerate((RIGHT, LEFT)):
            points, inside, free = self._seen(mesh.joints[:, k], K, labels, depth, label, 0.015)
            v_points, v_inside, v_free = self._seen(mesh.hands[:, k, ::3], K, labels, depth, label, 0.003)
            count = v_inside.sum(1).clamp(min=1)
            hidden = (v_inside & ~v_free).sum(1) / count
            out.append(
                HandTruth(
                    present=present[:, k],
                    rotations=rotations[:, k],
                    betas=betas[:, k],
                    transl=transl[:, k],
                    vertices=mesh.hands[:, k],
                    joints=mesh.joints[:, k],
                    points=points,
                    visible=inside & free & present[:, k, None],
                    hidden=hidden,
                    inside=v_inside.float().mean(1),
                    contact=contact[:, k] & present[:, k, None],
                )  # fmt: skip
            )
        return out[0], out[1]

    @staticmethod
    def _seen(x: Tensor, K: Tensor, labels: Tensor, depth: Tensor, label: int, slack: float):
        """Pixels (B,N,2) of points (B,N,3), whether they are in the picture, and whether nothing but body `label` is in
        front of them."""
        h, w = labels.shape[1:]
        z = x[..., 2].clamp(min=1e-3)
        pixel = x[..., :2] / z[..., None] * K[:, None, [0, 1], [0, 1]] + K[:, None, :2, 2]
        pixel = pixel.clamp(-1e4, 1e4)
        inside = ((pixel >= 0) & (pixel < pixel.new_tensor([w, h]))).all(-1) & (x[..., 2] > 0.01)
        column, row = pixel.floor().long().unbind(-1)
        at = row.clamp(0, h - 1) * w + column.clamp(0, w - 1)
        seen = labels.flatten(1).gather(1, at).long()
        near = depth.flatten(1).gather(1, at)
        free = (seen == label) | (near == 0) | (near > x[..., 2] - slack)
        return pixel, inside, free

    def posed(self, rotations: Tensor, betas: Tensor) -> Tensor:
        """(B,V,3) vertices of right hands in their own frames: the wrist does not turn."""
        eye = torch.eye(3, device=self.device).expand(len(rotations), 1, 3, 3)
        return self.hand.with_shape(betas).skin(torch.cat([eye, rotations[:, 1:]], 1))

    def _wrist(self, betas: Tensor) -> Tensor:
        return self.hand.with_shape(betas).rest_joints[:, 0]

    @cached_property
    def _flip(self) -> Tensor:
        return torch.tensor([-1.0, 1.0, 1.0], device=self.device)

    def _camera(self, right: Tensor, betas: Tensor, n: int, g: torch.Generator):
        """Where the camera is: cam_from_hand (B,4,4), the hand's centre (B,3), its depth (B,) and K (B,3,3)."""
        c, device = self.config, self.device
        turns = random_rotations(2 * n, g).reshape(2, n, 3, 3)
        # Half of the time prefer a forearm that does not point at the camera, as most pictures have it.
        better = (turns[1, :, 2, 0].abs() < turns[0, :, 2, 0].abs()) & (torch.rand(n, generator=g) < 0.5)
        turn = torch.where(better[:, None, None], turns[1], turns[0]).to(device)
        focal = c.size * torch.exp(math.log(0.85) + torch.rand(n, generator=g) * math.log(2.7 / 0.85))
        lo, hi = c.hand_share
        share = torch.exp(math.log(lo) + torch.rand(n, generator=g) * math.log(hi / lo))
        depth = (0.19 * focal / (share * c.size)).clamp(min=0.2)
        focal = depth * share * c.size / 0.19
        off = torch.where(torch.rand(n, 1, generator=g) < 0.4, 0.6, 0.04) * (torch.rand(n, 2, generator=g) - 0.5)
        principal = (0.5 + off) * c.size
        K = torch.zeros(n, 3, 3)
        K[:, 0, 0], K[:, 1, 1], K[:, 2, 2], K[:, :2, 2] = focal, focal, 1, principal
        spread = (0.5 - 0.3 * share).clamp(min=0.12)[:, None]
        pixel = (0.5 + spread * (2 * torch.rand(n, 2, generator=g) - 1)) * c.size
        center = torch.cat([(pixel - principal) / focal[:, None], torch.ones(n, 1)], 1) * depth[:, None]
        center, K = center.to(device), K.to(device)
        middle = self.posed(right, betas).mean(1)
        return rigid(turn, center - (turn @ middle[..., None])[..., 0]), center, depth.to(device), K

    def _articulation(self, index: Tensor, n: int, g: torch.Generator) -> tuple[Tensor, Tensor]:
        share = torch.rand(n, generator=g).to(self.device)
        moved = (torch.rand(n, generator=g) < 0.5).to(self.device)
        lo, hi = self.bank.hinge_range[index].unbind(-1)
        angle = torch.where(self.bank.hinged[index] & moved, lo + share * (hi - lo), torch.zeros_like(share))
        bend = self.bank.soft[index] & (torch.rand(n, generator=g) < 0.5).to(self.device)
        return angle, bend

    def _surroundings(self, n: int, center: Tensor, depth: Tensor, K: Tensor, first: int, last: int, g) -> dict:
        """Objects that nobody touches and people behind, all kept clear of the hands."""
        c, device = self.config, self.device
        extras = torch.randint(first, last, (n, EXTRAS), generator=g).to(device)
        size = self.bank.size[extras].amax(-1)
        behind = (torch.rand(n, EXTRAS, generator=g) < 0.95).to(device)
        z = depth[:, None] + size + 0.16 + 0.5 * torch.rand(n, EXTRAS, generator=g).to(device)
        front = depth[:, None] - size - 0.16
        z = torch.where(behind | (front < 0.12), z, front)
        pixel = (torch.rand(n, EXTRAS, 2, generator=g) * 1.1 - 0.05).to(device) * c.size
        ray = (pixel - K[:, None, :2, 2]) / K[:, None, :1, 0]
        at = torch.cat([ray, torch.ones_like(z)[..., None]], -1) * z[..., None]
        turn = random_rotations(n * EXTRAS, g).reshape(n, EXTRAS, 3, 3).to(device)
        body = torch.randn(n, 2, 3, generator=g).to(device)
        lateral = torch.tensor([[0.25, 0.25], [0.2, 0.2]], device=device)
        z = depth[:, None] + torch.tensor([0.3, 0.22], device=device) + 0.4 * torch.rand(n, 2, generator=g).to(device)
        middle = torch.cat([center[:, None, :2] + body[..., :2] * lateral, z[..., None]], -1)
        half = torch.tensor([[0.2, 0.3, 0.12], [0.075, 0.105, 0.09]], device=device)
        half = half * (0.8 + 0.4 * torch.rand(n, 2, 3, generator=g).to(device))
        return {
            "extras": extras,
            "cam_from_extra": rigid(turn, at),
            "has_extra": (torch.rand(n, EXTRAS, generator=g) < c.clutter).to(device),
            "blobs": torch.cat([middle, half], -1),
            "has_blob": (torch.rand(n, 2, generator=g) < c.bystanders * torch.tensor([1.0, 0.6])).to(device),
        }


def _reflected_K(spec: Spec, width: int) -> Tensor:
    """(B,3,3) intrinsics of the pictures, after mirroring."""
    K = spec.K.clone()
    K[:, 0, 2] = torch.where(spec.mirror, width - K[:, 0, 2], K[:, 0, 2])
    return K


def reflect(a_from_b: Tensor) -> Tensor:
    """(*,4,4) the same motion seen in a mirror: S M S with S = diag(-1, 1, 1, 1)."""
    s = torch.tensor([-1.0, 1.0, 1.0, 1.0], device=a_from_b.device)
    return a_from_b * s[:, None] * s


def random_rotations(n: int, generator: torch.Generator) -> Tensor:
    """(n,3,3) uniform on SO(3) (Shoemake, Graphics Gems III, 1992)."""
    return matrix_from_quat(torch.nn.functional.normalize(torch.randn(n, 4, generator=generator), dim=-1))


def read_images(folder: str | Path, size: int) -> Tensor:
    """(M,3,S,S) uint8 sRGB centre squares of the pictures in a folder, S a quarter more than `size`, at most 2000.
    Raises UnusableInput when there are none."""
    import cv2

    files = sorted(p for p in Path(folder).glob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png", ".webp"))[:2000]
    side, out = size * 5 // 4, []
    for path in files:
        image = cv2.imread(str(path), cv2.IMREAD_COLOR)
        if image is None:
            continue
        h, w = image.shape[:2]
        s = min(h, w)
        image = image[(h - s) // 2 : (h + s) // 2, (w - s) // 2 : (w + s) // 2]
        image = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA if s > side else cv2.INTER_LINEAR)
        out.append(torch.from_numpy(image[..., ::-1].copy()).permute(2, 0, 1))
    if not out:
        raise UnusableInput(f"{folder} holds no picture that can be read; give a folder of jpg, png or webp files.")
    return torch.stack(out)


def read_meshes(folder: str | Path) -> list[tuple]:
    """(vertices, faces) of the .obj and .ply files in a folder. Raises UnusableInput when there are none."""
    from .meshes import read_mesh

    out = [read_mesh(p) for p in sorted(Path(folder).glob("*")) if p.suffix.lower() in (".obj", ".ply")]
    if not out:
        raise UnusableInput(f"{folder} holds no .obj or .ply mesh; give a folder with meshes in metres.")
    return out
