"""From scenes as numbers to triangles: one mesh per picture with labels, materials and texture coordinates."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...geometry import meshes
from ...hand.model import HandModel
from . import arms
from .objects import ObjectBank, articulate, deform
from .sample import BACKGROUND, FOREARM, LEFT, OBJECT, RIGHT

if TYPE_CHECKING:
    from .scenes import Spec

# rows of a picture's material table
EXTRAS = 2  # objects that nobody touches
SKIN, SLEEVE, SLEEVE_2, BAND, THING, PART, EXTRA, TORSO, HEAD = 0, 1, 2, 3, 4, 5, 6, 6 + EXTRAS, 7 + EXTRAS
FAMILIES = ("skin", "sleeve", "sleeve", "watch", "object", "object", *("object",) * EXTRAS, "sleeve", "skin")


@dataclass(frozen=True, eq=False)
class Assembled:
    """B meshes with one vertex layout: right hand, its arm, left hand, its arm, object, extras, torso, head."""

    vertices: Tensor  # (B,V,3) camera frame; what is absent lies at one point behind the camera
    normals: Tensor  # (B,V,3)
    canon: Tensor  # (B,V,3) metres in each body's own frame, for textures
    faces: Tensor  # (B,T,3)
    label: Tensor  # (B,T) uint8
    material: Tensor  # (B,T) int64
    hands: Tensor  # (B,2,Vh,3)
    joints: Tensor  # (B,2,21,3)
    object: Tensor  # (B,Vo,3)


class Assembler:
    """Constant topology of a hand model and a bank of objects."""

    def __init__(self, hand: HandModel, bank: ObjectBank):
        self.models = (hand, hand.mirrored())
        self.bank = bank
        device = hand.device
        loop = meshes.boundary_loops(hand.faces.cpu())[0]
        self.ring = torch.as_tensor(loop, device=device)
        faces, part = (x.to(device) for x in arms.arm_faces(len(loop)))
        if not _outward(hand, self.ring, faces):
            self.ring = self.ring.flip(0)
        n_hand = len(hand.v_template)
        n_arm = int(faces.max()) + 1
        self.sizes = (n_hand, n_arm, n_hand, n_arm)
        self.skin_faces = [self.models[0].faces, faces, self.models[1].faces, faces.flip(-1)]
        cloth = torch.tensor([[SKIN, SLEEVE, BAND], [SKIN, SLEEVE_2, BAND]], device=device)
        self.skin_materials = [
            torch.full((len(hand.faces),), SKIN, device=device), cloth[0][part],
            torch.full((len(hand.faces),), SKIN, device=device), cloth[1][part],
        ]  # fmt: skip
        self.skin_labels = [
            torch.full((len(f),), k, device=device)
            for f, k in zip(self.skin_faces, (RIGHT, FOREARM, LEFT, FOREARM), strict=True)
        ]
        self.sphere, self.sphere_faces = (x.to(device) for x in arms.sphere(3))

    def __call__(self, spec: Spec, generator: torch.Generator) -> Assembled:
        """generator: for deformation, on the device."""
        b, device = len(spec), self.bank.vertices.device
        out: list[tuple[Tensor, Tensor, Tensor]] = []  # vertices, normals, canon of each block
        faces: list[Tensor] = []
        labels, materials = [], []
        first = 0

        def put(v: Tensor, n: Tensor, canon: Tensor, f: Tensor, label: Tensor | int, material: Tensor | int, there):
            nonlocal first
            away = v.new_tensor([0.0, 0.0, -1.0])
            out.append((torch.where(there[:, None, None], v, away), n, canon))
            f = f if f.ndim == 3 else f.expand(b, -1, -1)
            faces.append(f + first)
            for store, x in ((labels, label), (materials, material)):
                x = x if isinstance(x, Tensor) else torch.full((f.shape[1],), x, device=device)
                store.append(x if x.ndim == 2 else x.expand(b, -1))
            first += v.shape[1]

        hands, joints = [], []
        for k, model in enumerate(self.models):
            posed = model.with_shape(spec.betas[:, k]).with_pose(spec.rotations[:, k], spec.transl[:, k])
            hands.append(posed.vertices)
            joints.append(posed.joints)
            turn, wrist = spec.rotations[:, k, 0], posed.mano_joints[:, 0]
            sign = posed.vertices.new_tensor([1.0 - 2.0 * k, 1.0, 1.0])
            # the wrist's ring in the right hand's frame: reflected for the left
            ring = (posed.vertices[:, self.ring] - wrist[:, None]) @ turn * sign
            local, chart = arms.arm_vertices(spec.arms[k], ring)
            arm = (local * sign) @ turn.mT + wrist[:, None]
            v = torch.cat([posed.vertices, arm], 1)
            f_hand, f_arm = self.skin_faces[2 * k : 2 * k + 2]
            n = torch.cat([meshes.vertex_normals(posed.vertices, f_hand), meshes.vertex_normals(arm, f_arm)], 1)
            # skin goes on over the wrist: the same normals on both sides of the seam
            n_hand = posed.vertices.shape[1]
            seam = torch.nn.functional.normalize(n[:, self.ring] + n[:, n_hand : n_hand + len(self.ring)], dim=-1)
            n = n.index_copy(1, self.ring, seam).index_copy(
                1, torch.arange(n_hand, n_hand + len(self.ring), device=device), seam
            )
            canon = torch.cat([self.models[0].v_template.expand(b, -1, 3), chart], 1)
            f = torch.cat([f_hand, f_arm + n_hand])
            label, material = (torch.cat(x[2 * k : 2 * k + 2]) for x in (self.skin_labels, self.skin_materials))
            put(v, n, canon, f, label, material, spec.hands[:, k])

        thing = articulate(self.bank, spec.index, spec.angle)
        bent = deform(thing, generator, 0.3)  # held things hardly: grasps know the shape at rest
        thing = torch.where(spec.bend[:, None, None], bent, thing)
        canon = self.bank.vertices[spec.index]
        f = self.bank.faces[spec.index]
        part = THING + self.bank.part[spec.index].gather(1, f[..., 0]).clamp(0, 1)
        thing = thing @ spec.cam_from_object[:, :3, :3].mT + spec.cam_from_object[:, None, :3, 3]
        put(thing, meshes.vertex_normals(thing, f), canon, f, OBJECT, part, spec.has_object)
        for e in range(spec.extras.shape[1]):
            i, t = spec.extras[:, e], spec.cam_from_extra[:, e]
            v, f = self.bank.vertices[i], self.bank.faces[i]
            n = self.bank.vertex_normals[i] @ t[:, :3, :3].mT
            put(v @ t[:, :3, :3].mT + t[:, None, :3, 3], n, v, f, BACKGROUND, EXTRA + e, spec.has_extra[:, e])
        for k, material in enumerate((TORSO, HEAD)):
            middle, half = spec.blobs[:, k].chunk(2, -1)
            v = self.sphere * half[:, None]
            n = torch.nn.functional.normalize(self.sphere / half[:, None], dim=-1)
            put(v + middle[:, None], n, v, self.sphere_faces, BACKGROUND, material, spec.has_blob[:, k])

        vertices, normals, canon = (torch.cat(x, 1) for x in zip(*out, strict=True))
        hands, joints = torch.stack(hands, 1), torch.stack(joints, 1)
        faces, label, material = torch.cat(faces, 1), torch.cat(labels, 1), torch.cat(materials, 1)
        # Reflected pictures: everything, and right is left.
        s = torch.where(spec.mirror, -1.0, 1.0)
        sign = torch.stack([s, torch.ones_like(s), torch.ones_like(s)], -1)
        swapped = torch.where(label == RIGHT, LEFT, torch.where(label == LEFT, RIGHT, label))
        label = torch.where(spec.mirror[:, None], swapped, label).to(torch.uint8)

        def other(x: Tensor) -> Tensor:
            return torch.where(spec.mirror.reshape(-1, *(1,) * (x.ndim - 1)), x.flip(1), x)

        return Assembled(
            vertices * sign[:, None], normals * sign[:, None], canon, faces, label, material,
            other(hands) * sign[:, None, None], other(joints) * sign[:, None, None], thing * sign[:, None],
        )  # fmt: skip


def _outward(hand: HandModel, ring: Tensor, faces: Tensor) -> bool:
    """Whether the arm's triangles face outward when the ring runs this way round."""
    g = torch.Generator().manual_seed(0)
    spec = arms.sample_arms(1, g)
    spec = arms.ArmSpec(**{k: getattr(spec, k).to(hand.device) for k in spec.__dataclass_fields__})
    v, _ = arms.arm_vertices(spec, hand.v_template[ring][None])
    around = len(ring)
    v = v[0, : arms.RINGS * around]
    f = faces[: 2 * (arms.RINGS - 1) * around]
    middle = v.reshape(arms.RINGS, around, 3).mean(1).repeat_interleave(around, 0)
    return bool((meshes.face_cross(v, f) * (v - middle)[f[:, 0]]).sum() > 0)


def mirror_bank(bank: ObjectBank) -> ObjectBank:
    """Every object reflected in x."""
    s = torch.tensor([-1.0, 1.0, 1.0], device=bank.device)
    return replace(
        bank, vertices=bank.vertices * s, faces=bank.faces.flip(-1), vertex_normals=bank.vertex_normals * s,
        hinge_axis=-bank.hinge_axis * s, hinge_pivot=bank.hinge_pivot * s,
        sdf=bank.sdf.flip(1), sdf_centre=bank.sdf_centre * s,
    )  # fmt: skip
