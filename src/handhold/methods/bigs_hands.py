"""Gaussians of hands: one canonical right hand for both, the left its mirror image, and each frame's pose.

BIGS (On et al., CVPR 2025) puts Gaussians on the subdivided hand mesh and skins them. Its release shares the hands by
turns: a run for one hand starts from the other's tensors, mirrored in place. Here both are functions of the same
tensors, so that every step's gradients of both reach them: what one hand shows completes what the other hides.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from ..geometry.meshes import area, subdivide, vertex_normals
from ..geometry.rigid import quat_from_matrix, quat_multiply, so3_exp
from ..hand import HandModel
from ..hand.model import PosedHand
from ..shapes.gaussians import Gaussians
from ..shapes.skinned import blended
from .bigs_decoders import Values
from .bigs_losses import swaying, turning
from .surfels import tangent_frames

CAP = 3  # strips of triangles across the wrist: where no arm hides it, one looks at it, and it has its own colour
_TINY = 1e-6  # share of a bone that the template does not give a vertex: the least that can be learnt from


@dataclass(frozen=True)
class Template:
    """The subdivided mesh of the right hand at rest, closed at the wrist, with each side's size."""

    faces: np.ndarray  # (T,3)
    weights: Tensor  # (N,16) skinning weights, of a new vertex the mean of the two it lies between
    points: dict[str, Tensor]  # side -> (N,3) right hand with that side's betas, metres
    rot: dict[str, Tensor]  # side -> (N,3,3), third column the normal
    quat: dict[str, Tensor]
    spacing: float  # metres between neighbours

    @staticmethod
    def of(betas: dict[str, np.ndarray], levels: int = 1, device: str | torch.device = "cpu") -> Template:
        """betas: side -> (10,) shape coefficients; levels: how often the mesh is subdivided."""
        model = HandModel.open("right", device=device).sealed(CAP)
        faces = model.faces.cpu().numpy()
        count = len(model.v_template)
        maps = []
        for _ in range(levels):
            pairs, faces = subdivide(faces, count)
            maps.append(torch.from_numpy(pairs).to(device))
            count = len(pairs)

        def finer(x: Tensor) -> Tensor:
            for p in maps:
                x = 0.5 * (x[p[:, 0]] + x[p[:, 1]])
            return x

        points, rot, quat, spacing = {}, {}, {}, 1.0
        f = torch.from_numpy(faces).to(device)
        for side, b in betas.items():
            x = finer(model.with_shape(torch.as_tensor(np.asarray(b, np.float32), device=device)).vertices)
            points[side], rot[side] = x, tangent_frames(F.normalize(vertex_normals(x, f), dim=-1))
            quat[side] = quat_from_matrix(rot[side])
            spacing = float(area(x, f) / count) ** 0.5
        return Template(faces, finer(model.weights), points, rot, quat, spacing)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def canonical(self) -> Tensor:
        """(N,3) where features are read: the same for both sides."""
        return next(iter(self.points.values()))

    def skinning(self, bones: Tensor | None) -> Tensor:
        """(N,16) weights: the template's, times what is learnt."""
        if bones is None:
            return self.weights
        return torch.softmax((self.weights + _TINY).log() + bones, -1)


@dataclass(frozen=True)
class RestHand:
    """One side's Gaussians in the frame of its hand model at rest."""

    gaussians: Gaussians
    weights: Tensor  # (N,16)
    tangents: Tensor  # (N,3,2) whose cross product is the outward normal

    def posed(self, bones: Tensor) -> tuple[Gaussians, Tensor]:
        """Gaussians and outward unit normals (N,3) where bones (16,4,4), posed_from_rest, carry them.

        Linear blend skinning with the full blended matrix M: means M x + t, covariances M C M^T.
        """
        M, t = blended(self.weights, bones)
        a, b = (M.detach() @ self.tangents).unbind(-1)
        return self.gaussians.transformed(M, t), F.normalize(torch.linalg.cross(a, b), dim=-1)


def rest_hand(template: Template, values: Values, side: str, body: int) -> RestHand:
    """One side's hand from the shared right-hand values; the left is their mirror image. Changes nothing in place."""
    offset, quats, scales, opacities, colors = values.free.local(template.spacing)
    rot = template.rot[side]
    means = template.points[side] + (rot @ offset[..., None])[..., 0]
    ids = torch.full((len(means),), body, device=means.device)
    g = Gaussians(means, quat_multiply(template.quat[side], quats), scales, opacities, colors, ids)
    tangents = rot[..., :2]
    if side == "left":
        flip = tangents.new_tensor([-1.0, 1.0, 1.0])[:, None]
        g, tangents = g.mirrored(), (tangents * flip).flip(-1)
    return RestHand(g, template.skinning(values.bones), tangents)


class HandPoses:
    """One hand's pose per frame: the tracked one times small turns of each joint, and a small shift."""

    def __init__(self, side: str, track, frames: list[int], device: str | torch.device = "cpu"):
        self.side, self.track = side, track
        self.model = HandModel.open(side, device=device)
        f32 = lambda x: torch.as_tensor(np.asarray(x, np.float32), device=device)  # noqa: E731
        self.shaped = self.model.with_shape(f32(track.betas))
        known = np.isfinite(track.pose).all((1, 2)) & np.isfinite(track.transl).all(1) & (track.confidence > 0)
        self.frames = [i for i in frames if known[i]]
        self.known = known
        self.base = self.model.rotations(f32(np.nan_to_num(track.pose)))  # (F,16,3,3)
        self.start = f32(np.nan_to_num(track.transl))
        self.confidence = np.clip(np.nan_to_num(track.confidence), 0.05, 1)
        self.turn = {i: torch.zeros(16, 3, device=device, requires_grad=True) for i in self.frames}
        self.shift = {i: torch.zeros(3, device=device, requires_grad=True) for i in self.frames}

    def at(self, i: int, fixed: bool = False) -> tuple[Tensor, Tensor]:
        """Joint rotations (16,3,3) and translation (3,) of frame `i`."""
        if i not in self.turn:
            return self.base[i], self.start[i]
        turn, shift = self.turn[i], self.shift[i]
        if fixed:
            turn, shift = turn.detach(), shift.detach()
        return self.base[i] @ so3_exp(turn), self.start[i] + shift

    def posed(self, i: int, fixed: bool = False) -> PosedHand:
        return self.shaped.with_pose(*self.at(i, fixed))

    def prior(self, i: int, shift: float, turn: float) -> Tensor:
        """Squared departure from the tracked pose over the given metres and radians, times tracking's confidence."""
        d = self.shift[i].square().sum() / shift**2 + self.turn[i].square().sum() / turn**2
        return float(self.confidence[i]) * d

    def limits(self, i: int) -> Tensor:
        """How far joints are beyond a hand's (`HandModel.limit_loss`)."""
        return self.model.limit_loss(self.at(i)[0])

    def unsteady(self, i: int, object_pose: dict[int, tuple[Tensor, Tensor]] | None = None) -> Tensor:
        """Change of velocity of frame `i`'s joints (radians squared) and wrist (centimetres squared); neighbours fixed.

        With `object_pose` of all three frames, the hand's motion is taken relative to the object it holds.
        """
        trio = (i - 1, i, i + 1)
        if not all(0 <= k < len(self.known) and self.known[k] for k in trio):
            return self.shift[i].sum() * 0
        poses = [self.at(k, fixed=k != i) for k in trio]
        wrist = self.shaped.rest_joints[0]
        turns = [r for r, _ in poses]
        places = [wrist + t for _, t in poses]
        if object_pose is not None and all(k in object_pose for k in trio):
            for n, k in enumerate(trio):
                r, t = (x.detach() for x in object_pose[k])
                turns[n] = torch.cat([(r.T @ turns[n][0])[None], turns[n][1:]])
                places[n] = (places[n] - t) @ r
        return turning(*turns).sum() + 1e4 * swaying(*places)

    @torch.no_grad()
    def result(self):
        """The track with the refined frames."""
        pose, transl = self.track.pose.copy(), self.track.transl.copy()
        for i in self.frames:
            r, t = self.at(i)
            pose[i], transl[i] = self.model.theta(r).cpu().numpy(), t.cpu().numpy()
        return replace(self.track, pose=pose, transl=transl)
