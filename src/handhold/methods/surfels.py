"""Flat Gaussians on known surfaces, object poses that move a little, and the loss of their pictures.

What `methods.appearance` and `methods.bigs` share. A Gaussian is a disc on the surface (2DGS, Huang et al., SIGGRAPH
2024): its normal is the surface's; it moves a little, grows, and turns in its plane. Its free values have no units:
lengths are over the spacing of the discs.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy.spatial import cKDTree
from torch import Tensor

from ..geometry.meshes import area, interpolate, sample_surface, vertex_normals
from ..geometry.rigid import quat_from_matrix, quat_multiply, so3_exp
from ..losses import l1, ssim
from ..render import Splatted
from ..scene import Mesh
from .crops import View

OBJECT = 0  # body id; hands follow in the order of `hands`
THIN = 0.1  # thickness of a disc over the spacing of discs
OPACITY = 0.95  # at the start, as a logit:
LOGIT = float(np.log(OPACITY / (1 - OPACITY)))
SIZE = float(np.log(0.6))  # log of a disc's standard deviation over the spacing, at the start


class Free(NamedTuple):
    """The free values of N discs, without units."""

    offset: Tensor  # (N,3) from the base point, in the base frame (third axis: the normal), over the spacing
    size: Tensor  # (N,2) log of the standard deviations over the spacing
    spin: Tensor  # (N,) radians in the plane
    opacity: Tensor  # (N,) logit
    color: Tensor  # (N,3) logit

    @staticmethod
    def of(colors: Tensor) -> Free:
        """Where all discs start: on their base points, with the colours (N,3) in [0,1]."""
        z = torch.zeros_like(colors)
        return Free(z, z[:, :2] + SIZE, z[:, 0], z[:, 0] + LOGIT, colors.clamp(0.01, 0.99).logit())

    def local(self, spacing: float) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Offsets in metres, quats (in the base frame), scales in metres, opacities, colours."""
        half = 0.5 * self.spin
        zero = torch.zeros_like(half)
        quats = torch.stack([half.cos(), zero, zero, half.sin()], -1)
        scales = torch.cat([self.size.exp(), torch.full_like(self.size[:, :1], THIN)], 1) * spacing
        return self.offset * spacing, quats, scales, self.opacity.sigmoid(), self.color.sigmoid()

    def prior(self, start: Tensor) -> Tensor:
        """Stay on the surface, of one size, opaque, and of the first colour `start` (N,3 logits) where no picture says
        another."""
        place = 0.05 * self.offset.square().mean() + 0.02 * (self.size - SIZE).square().mean()
        return place + 1e-3 * ((self.opacity - LOGIT).square().mean() + (self.color - start).square().mean())


class ObjectBase(NamedTuple):
    """Where an object's discs are at first: object frame, metres."""

    points: Tensor  # (N,3)
    rot: Tensor  # (N,3,3), third column the normal
    quat: Tensor  # (N,4)
    colors: Tensor  # (N,3) of the mesh
    observed: Tensor  # (N,1) bool
    spacing: float

    @staticmethod
    def on(mesh: Mesh, count: int, generator: torch.Generator) -> ObjectBase:
        """Even discs on the mesh, with its colours, and which of them lie on surface that was seen."""
        v, f = torch.from_numpy(np.asarray(mesh.vertices, np.float32)), torch.from_numpy(np.asarray(mesh.faces)).long()
        face, bary, points = even_samples(v, f, count, generator)
        given = np.full(v.shape, 0.5, np.float32) if mesh.colors is None else np.asarray(mesh.colors, np.float32)
        seen = torch.ones(len(v)) if mesh.observed is None else torch.from_numpy(np.asarray(mesh.observed, np.float32))
        normals = F.normalize(interpolate(vertex_normals(v, f), f, face, bary), dim=-1)
        observed = interpolate(seen[:, None], f, face, bary) > 0.5
        rot = tangent_frames(normals)
        colors = interpolate(torch.from_numpy(given), f, face, bary)
        return ObjectBase(points, rot, quat_from_matrix(rot), colors, observed, float(area(v, f) / count) ** 0.5)

    def to(self, device: str | torch.device) -> ObjectBase:
        return ObjectBase(*(x.to(device) for x in self[:-1]), self.spacing)

    def rows(self, index: Tensor) -> ObjectBase:
        """The same of the discs `index` (M,), repeats allowed."""
        return ObjectBase(*(x[index] for x in self[:-1]), self.spacing)

    def placed(self, offset: Tensor, quats: Tensor) -> tuple[Tensor, Tensor]:
        """Means and quats in the object's frame."""
        return self.points + (self.rot @ offset[..., None])[..., 0], quat_multiply(self.quat, quats)


class ObjectPoses:
    """Small motions of each frame's object about its centre: base @ (rotation, then shift times radius)."""

    def __init__(self, cam_from_object: np.ndarray, points: Tensor, views: list[View]):
        device = points.device
        self.start = cam_from_object
        self.frames = [v.frame for v in views if v.has_object]
        self.base = {i: torch.from_numpy(cam_from_object[i]).float().to(device) for i in self.frames}
        self.weight = torch.tensor([v.weight for v in views if v.has_object], device=device)
        self.center = 0.5 * (points.amin(0) + points.amax(0))
        self.radius = float((points - self.center).norm(dim=1).max())
        self.rotation = {i: torch.zeros(3, device=device, requires_grad=True) for i in self.frames}
        self.shift = {i: torch.zeros(3, device=device, requires_grad=True) for i in self.frames}

    def at(self, i: int) -> tuple[Tensor, Tensor]:
        """Rotation and translation of frame `i`."""
        r0, t0 = self.base[i][:3, :3], self.base[i][:3, 3]
        r = so3_exp(self.rotation[i])
        return r0 @ r, r0 @ (self.center + self.radius * self.shift[i] - r @ self.center) + t0

    def prior(self, i: int) -> Tensor:
        """Poses are good already."""
        return self.rotation[i].square().sum() + self.shift[i].square().sum()

    @torch.no_grad()
    def recentre(self) -> None:
        """Take out what all frames have in common: it is the object frame's choice, not motion."""
        w = (self.weight / self.weight.sum())[:, None]
        for parts in (self.rotation, self.shift):
            mean = (w * torch.stack([parts[i] for i in self.frames])).sum(0)
            for i in self.frames:
                parts[i] -= mean

    @torch.no_grad()
    def result(self) -> np.ndarray:
        """(F,4,4) float64; frames without a view stay as they were."""
        out = np.array(self.start, np.float64, copy=True)
        r0 = torch.from_numpy(out[self.frames])
        r = so3_exp(torch.stack([self.rotation[i] for i in self.frames]).double().cpu())
        c = self.center.double().cpu()
        shift = c + self.radius * torch.stack([self.shift[i] for i in self.frames]).double().cpu() - r @ c
        out[self.frames, :3, :3] = (r0[:, :3, :3] @ r).numpy()
        out[self.frames, :3, 3] = ((r0[:, :3, :3] @ shift[..., None])[..., 0] + r0[:, :3, 3]).numpy()
        return out


def image_loss(view: View, out: Splatted, bodies: tuple[int, ...] | None = None) -> Tensor:
    """Colour where the picture and the rendering agree on whose pixel it is, alpha where the masks know it.

    bodies: ids that were drawn; by default all. Pixels of a body that was not drawn are unknown.
    """
    color, shares = out.color[0], out.ids[0]
    drawn = range(shares.shape[-1]) if bodies is None else bodies
    hands = [b for b in drawn if b != OBJECT]
    mine = (view.label * shares.detach()).sum(-1, keepdim=True)
    weight = mine * (mine > 0.5)
    count = weight.mean()
    loss = 0.0 * color.sum()
    if count > 1e-3:
        sure = (weight > 0).float()
        loss = 0.8 * l1(color, view.image, weight) + 0.2 * (1 - ssim(color * sure, view.image * sure)) / sure.mean()
    if view.has_object and OBJECT in drawn:
        wrong = view.known * (shares[..., OBJECT] - view.target).square()
        loss = loss + 0.5 * wrong.sum() / view.target.sum().clamp(min=50)
    if hands:
        on = view.label[..., hands]
        over = view.empty[..., None] * shares[..., hands]
        wrong = (on * (1 - shares[..., hands]).square()).sum() + over.square().sum()
        loss = loss + 0.1 * wrong / on.sum().clamp(min=50)
    return loss


def even_samples(v: Tensor, f: Tensor, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Triangle, weights and point of `count` surface samples, spread by a few steps of Lloyd's algorithm."""
    points, face, bary = sample_surface(v, f, 6 * count, generator)
    x = points.double().numpy()
    chosen = np.arange(count)
    tree = cKDTree(x)
    for _ in range(3):
        owner = cKDTree(x[chosen]).query(x)[1]
        size = np.maximum(np.bincount(owner, minlength=count), 1)[:, None]
        mean = np.stack([np.bincount(owner, x[:, a], count) for a in range(3)], -1) / size
        chosen = tree.query(mean)[1]
    chosen = torch.from_numpy(chosen)
    return face[chosen], bary[chosen], points[chosen]


def tangent_frames(normals: Tensor) -> Tensor:
    """(N,3,3) rotations whose third column is the unit normal (Duff et al., JCGT 2017)."""
    x, y, z = normals.unbind(-1)
    sign = torch.where(z >= 0, 1.0, -1.0)
    a = -1 / (sign + z)
    b = x * y * a
    first = torch.stack([1 + sign * x * x * a, sign * b, -sign * x], -1)
    second = torch.stack([b, sign + y * y * a, -y], -1)
    return torch.stack([first, second, normals], -1)
