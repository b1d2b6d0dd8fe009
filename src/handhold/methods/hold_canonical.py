"""From a frame's camera to the rest space of a body and back: rigid, or by inverse linear blend skinning.

The world of HOLD's rendering is each frame's camera. Every map also tells its Jacobian, so that the gradient of a
field in rest space becomes one in the world: by the transposed Jacobian of the inverse map, which is the inverse
transpose of the forward map's (HOLD, Fan et al., CVPR 2024, section 3.1).
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..geometry.queries import MeshQueries
from ..geometry.rigid import so3_exp
from ..hand import HandModel
from ..render.samplers import Rays
from ..shapes.sdf_fit import compose, gauge_modes, without

FAR = 0.1  # metres from the hand beyond which a point is outside; bones are not extrapolated


class Canonical(NamedTuple):
    """Points in a body's rest space."""

    points: Tensor  # (M,3) metres of the rest space
    jacobian: Tensor  # (M,3,3) d points / d world; no gradient
    known: Tensor  # (M,) bool; False where the point is surely outside


class RigidPoses(nn.Module):
    """Per-frame rigid poses of the object, moved by small numbers, and one scale for the clip.

    world = scale (R x + t): the scale enters once, seen from the camera, so that no picture depends on it and only
    contact tells it. Poses are `shapes.sdf_fit.compose`: turned about the object's centre, moved along camera axes.
    """

    def __init__(self, cam_from_object: np.ndarray, center: np.ndarray, radius: float):
        """cam_from_object (F,4,4), NaN where unknown; center (3,), radius: a ball round the object in its frame."""
        super().__init__()
        base = torch.as_tensor(np.asarray(cam_from_object), dtype=torch.float32)
        known = torch.isfinite(base[:, 0, 0])
        self.register_buffer("known", known)
        self.register_buffer("base", torch.where(known[:, None, None], base, torch.eye(4)))
        self.register_buffer("center", torch.as_tensor(np.asarray(center), dtype=torch.float32))
        self.radius = float(radius)
        self.xi = nn.Parameter(torch.zeros(len(base), 6))
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.register_buffer("modes", gauge_modes(self.base, self.center, self.radius))

    @property
    def scale(self) -> Tensor:
        return self.log_scale.exp()

    def matrices(self) -> Tensor:
        """(F,4,4) cam_from_object without the scale."""
        return compose(self.base, self.xi, self.center, self.radius)

    def to_canonical(self, x: Tensor, frame: Tensor) -> Canonical:
        """World points (M,3) of the frames (M,) -> the object's frame."""
        m = self.matrices()[frame]
        r, s = m[:, :3, :3], self.scale
        points = ((x / s - m[:, :3, 3])[:, None] @ r)[:, 0]
        return Canonical(points, (r.mT / s).detach(), self.known[frame])

    def to_world(self, x: Tensor, frame: Tensor) -> Tensor:
        """Points (M,3) of the object's frame -> world."""
        m = self.matrices()[frame]
        return self.scale * ((m[:, :3, :3] @ x[..., None])[..., 0] + m[:, :3, 3])

    @torch.no_grad()
    def rays(self, rays: Rays) -> Rays:
        """The rays in the object's frame; distances along them are divided by the scale."""
        m = self.matrices()[rays.frame]
        r = m[:, :3, :3]
        return Rays(((rays.o / self.scale - m[:, :3, 3])[:, None] @ r)[:, 0], (rays.d[:, None] @ r)[:, 0], rays.frame)

    @torch.no_grad()
    def settle(self, weight: Tensor) -> None:
        """Take out of the small motions what all frames (weight (F,)) do together: a choice of frame, not motion."""
        self.xi.copy_(without(self.xi, self.modes, weight * self.known) * self.known[:, None])

    @torch.no_grad()
    def result(self) -> np.ndarray:
        """(F,4,4) metric cam_from_object for a shape grown by `scale`; NaN where unknown."""
        m = self.matrices().double().cpu().numpy()
        m[:, :3, 3] *= float(self.scale)
        m[~self.known.cpu().numpy()] = np.nan
        return m


class SkinnedPoses(nn.Module):
    """Per-frame poses of one hand, moved by small numbers; points go to rest by the closest triangle's weights.

    The whole hand turns and shifts in each frame; fingers bend alike in all: they hold something, one frame's outline
    hardly tells them, and moved frame by frame they get worse (docs/methods/hold.md).
    Weights are barycentric on the one closest triangle, so that fingers do not mix (HOLD averages the 15 nearest
    vertices almost evenly, and they do). Trees over the posed triangles answer exact queries; they are of the poses at
    the last `refresh`, while the map itself follows the poses of the moment.
    """

    def __init__(self, side: str, track):
        """track: pose (F,16,3), betas, transl (F,3) as in `stages.track.HandTrack`; NaN frames are not known."""
        super().__init__()
        self.track = track
        self.model = HandModel.open(side, dtype=torch.float32).sealed()
        pose, transl = (torch.as_tensor(np.asarray(a), dtype=torch.float32) for a in (track.pose, track.transl))
        known = torch.isfinite(pose).all(-1).all(-1) & torch.isfinite(transl).all(-1)
        self.register_buffer("known", known)
        rotations = self.model.rotations(torch.where(known[:, None, None], pose, 0.0))
        self.register_buffer("base", rotations)
        self.register_buffer("transl", torch.where(known[:, None], transl, 0.0))
        self.register_buffer("betas", torch.as_tensor(np.asarray(track.betas), dtype=torch.float32))
        self.turn = nn.Parameter(torch.zeros(len(pose), 3))
        self.bend = nn.Parameter(torch.zeros(15, 3))
        self.shift = nn.Parameter(torch.zeros(len(pose), 3))
        self._trees: dict[int, MeshQueries] = {}

    def _apply(self, fn, recurse=True):
        out = super()._apply(fn, recurse)
        self.model = self.model.to(device=self.base.device)
        return out

    @property
    def faces(self) -> Tensor:
        return self.model.faces

    def rotations(self, frames: Tensor | slice = slice(None)) -> Tensor:
        """(F,16,3,3) absolute joint rotations."""
        turn = self.turn[frames]
        moved = torch.cat([turn[:, None], self.bend.expand(len(turn), -1, -1)], 1)
        return so3_exp(moved) @ self.base[frames]

    def posed(self, frames: Tensor):
        """`hand.model.PosedHand` of the frames (B,)."""
        return self.model.with_shape(self.betas).with_pose(
            self.rotations(frames), self.transl[frames] + self.shift[frames]
        )

    def rest(self) -> tuple[np.ndarray, np.ndarray]:
        """Vertices (V,3) and faces of the sealed template at rest, the field's own space."""
        return self.model.with_shape(self.betas).vertices.cpu().numpy(), self.faces.cpu().numpy()

    @torch.no_grad()
    def refresh(self) -> None:
        """Forget the trees of former poses."""
        self._trees = {}

    @torch.no_grad()
    def tree(self, frame: int) -> MeshQueries:
        if frame not in self._trees:
            v = self.posed(torch.tensor([frame], device=self.base.device)).vertices[0]
            self._trees[frame] = MeshQueries(v.cpu().double().numpy(), self.faces.cpu().numpy())
        return self._trees[frame]

    def to_canonical(self, x: Tensor, frame: Tensor) -> Canonical:
        """World points (M,3) of the frames (M,) -> rest space; see `hand.model.PosedHand.unpose`."""
        frames, row = torch.unique(frame, return_inverse=True)
        hand = self.posed(frames)
        face, bary, distance = self._closest(x.detach(), frames.tolist(), row)
        corner = self.faces[face]  # (M,3)
        v, rest = hand.vertices[row[:, None], corner], self.model.with_shape(self.betas).vertices[corner]
        if self.model.posedirs is not None:
            rest = hand.rest_vertices[row[:, None], corner]
        bones = torch.einsum("mcj,mjab->mcab", self.model.weights[corner], hand.bone_transforms[row][..., :3, :3])
        blend = (bones * bary[..., None, None]).sum(1)
        foot, rest_foot = (v * bary[..., None]).sum(1), (rest * bary[..., None]).sum(1)
        inverse = torch.linalg.inv(blend)
        offset = (inverse @ (x - foot)[..., None])[..., 0]
        with torch.no_grad():
            jacobian = inverse_skinning_jacobian(v, rest, bones, bary, inverse, offset)
        known = self.known[frame] & (distance < FAR)
        return Canonical(rest_foot + offset, jacobian, known)

    @torch.no_grad()
    def _closest(self, x: Tensor, frames: list[int], row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        points, of = x.cpu().double().numpy(), row.cpu().numpy()
        face, bary, distance = np.zeros(len(x), np.int64), np.zeros((len(x), 3)), np.zeros(len(x))
        for k, i in enumerate(frames):
            at = np.flatnonzero(of == k)
            found = self.tree(i).nearest(points[at])
            face[at], bary[at], distance[at] = found.face, found.bary, found.distance
        return (
            torch.from_numpy(face).to(x.device),
            torch.from_numpy(bary).to(x),
            torch.from_numpy(distance).to(x),
        )

    @torch.no_grad()
    def trace(self, rays: Rays, reach: float, steps: int = 6) -> tuple[Tensor, Tensor]:
        """Where each ray first comes within `reach` of the posed template: t (N,), and whether it does (N,).

        Sphere tracing by exact distances; rays that run out of steps close to the hand count as met.
        """
        out_t, met = torch.zeros_like(rays.d[:, 0]), torch.zeros_like(rays.d[:, 0], dtype=torch.bool)
        for i in torch.unique(rays.frame).tolist():
            if not bool(self.known[i]):
                continue
            at = torch.nonzero(rays.frame == i)[:, 0]
            tree = self.tree(i)
            o, d = (a[at].cpu().double().numpy() for a in (rays.o, rays.d))
            middle = tree.vertices.mean(0)
            size = np.linalg.norm(tree.vertices - middle, axis=1).max() + reach
            along = ((middle - o) * d).sum(1)
            square = size**2 - ((middle - o) ** 2).sum(1) + along**2
            t = along - np.sqrt(np.maximum(square, 0))
            open_, hit = np.flatnonzero((square > 0) & (along + size > 0)), np.zeros(len(t), bool)
            t = np.maximum(t, 0)
            for _ in range(steps):
                distance = tree.nearest(o[open_] + t[open_, None] * d[open_]).distance
                close = distance < 1.05 * reach
                hit[open_[close]] = True
                t[open_] += np.where(close, 0, distance - 0.95 * reach)
                open_ = open_[~close & (t[open_] < along[open_] + size)]
                if not len(open_):
                    break
            out_t[at], met[at] = torch.from_numpy(t).to(out_t), torch.from_numpy(hit).to(met.device)
        return out_t, met

    @torch.no_grad()
    def result(self):
        """The track with these poses, frames that are not known as they were."""
        known = self.known.cpu().numpy()
        pose, transl = np.array(self.track.pose, np.float64), np.array(self.track.transl, np.float64)
        pose[known] = self.model.theta(self.rotations()).cpu().double().numpy()[known]
        transl[known] = (self.transl + self.shift).cpu().double().numpy()[known]
        return replace(self.track, pose=pose, transl=transl)


def inverse_skinning_jacobian(
    v: Tensor, rest: Tensor, bones: Tensor, bary: Tensor, inverse: Tensor, offset: Tensor
) -> Tensor:
    """(M,3,3) Jacobian of x -> rest_foot + blend^-1 (x - foot), with the foot point and the blend moving along with x.

    v, rest (M,3,3) corners posed and at rest; bones (M,3,3,3) blended matrices of the corners; bary (M,3) of the foot;
    inverse (M,3,3) of the blend there; offset (M,3) = inverse (x - foot). On an edge the foot moves along it only, on a
    vertex not at all.
    """
    first = bary.argmax(1, keepdim=True)
    others = torch.cat([(first + 1) % 3, (first + 2) % 3], 1)  # (M,2)
    pick = lambda a, k: a.gather(1, k.reshape(*k.shape, *(1,) * (a.ndim - 2)).expand(-1, -1, *a.shape[2:]))  # noqa: E731
    active = (bary.gather(1, others) > 1e-7).to(v)
    e = (pick(v, others) - pick(v, first)).mT * active[:, None]  # (M,3,2)
    gram = e.mT @ e + torch.diag_embed(1 - active)
    slope = torch.linalg.solve(gram, e.mT)  # (M,2,3) d (weights of the other corners) / d x
    rest_edges = (pick(rest, others) - pick(rest, first)).mT * active[:, None]
    change = pick(bones, others) - pick(bones, first)  # (M,2,3,3)
    turning = (inverse[:, None] @ (change @ offset[:, None, :, None]))[..., 0].mT * active[:, None]
    eye = torch.eye(3, dtype=v.dtype, device=v.device)
    return rest_edges @ slope + inverse @ (eye - e @ slope) - turning @ slope
