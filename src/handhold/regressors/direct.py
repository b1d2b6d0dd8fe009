"""The direct family: an image becomes the surface itself, M, and joints J = J_reg M.

After METRO (Lin et al., CVPR 2021), Mesh Graphormer (Lin et al., ICCV 2021) and the simple baselines that followed:
one query per joint and per vertex of a coarse mesh, each made of its place on the template; they attend to each other
and to the picture, a graph convolution over the coarse mesh being the option that makes a METRO a Graphormer; in
training a random share of the queries is masked, so that the rest has to imply them. A learned linear map takes the
coarse vertices to the full mesh. It is born as the local map that best upsamples random poses of the hand model
(weights over eight coarse neighbours, ridge regression towards inverse distances), with a low-rank correction that
starts at zero; so is J_reg, which the hand model only has for the rest pose.

The backbone, camera, point head and refinement are those of the parametric family.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import rigid
from ..hand.joints import OPENPOSE_FROM_MANO
from ..hand.model import HandModel
from .crops import extent, project
from .parametric import CrossBlock, HandNetwork, HandOutput, Points, Refinement, fine_widths, place
from .vit import ViTConfig


@dataclass(frozen=True)
class DirectConfig:
    """Settings of `DirectHand`; the defaults cost what the small parametric network costs."""

    vit: ViTConfig = field(default_factory=lambda: ViTConfig(192, 12, 3, stem="conv", drop_path=0.05))
    dim: int = 192
    depth: int = 2
    heads: int = 3
    dim_head: int = 64
    mlp: int = 384
    n_coarse: int = 195
    n_vertices: int = 1609  # of the hand model: 1609 the open hand, 778 MANO
    mask: float = 0.3  # largest share of the queries that is masked in training
    graph: bool = True
    rank: int = 16  # of the learned correction of the upsampling
    fov: bool = True
    refine: int = 1
    backbone: Literal["vit", "mobile"] = "vit"  # as in `ParametricConfig`


TINY = DirectConfig()
MOBILE = replace(TINY, backbone="mobile")


class Graph(nn.Module):
    """A residual graph convolution over the coarse vertices (Mesh Graphormer, eq. 3): x + W2 gelu(A W1 norm(x))."""

    def __init__(self, dim: int, adjacency: Tensor):
        super().__init__()
        self.norm, self.fc1, self.fc2 = nn.LayerNorm(dim), nn.Linear(dim, dim // 2), nn.Linear(dim // 2, dim)
        self.register_buffer("adjacency", adjacency, persistent=False)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.fc2(F.gelu(self.adjacency.to(x.dtype) @ self.fc1(self.norm(x))))


class LocalMap(nn.Module):
    """Linear map from S points to T points, each a combination of a few near ones, plus a low-rank correction."""

    def __init__(self, near: Tensor, weights: Tensor, n_source: int, rank: int = 0):
        super().__init__()
        self.register_buffer("near", near)  # (T,k)
        self.weights = nn.Parameter(weights)  # (T,k)
        self.left = nn.Parameter(torch.zeros(len(near), rank)) if rank else None
        self.right = nn.Parameter(torch.randn(rank, n_source) / math.sqrt(n_source)) if rank else None

    def forward(self, x: Tensor) -> Tensor:
        """(N,S,3) -> (N,T,3)"""
        out = (x[:, self.near] * self.weights[..., None]).sum(2)
        return out if self.left is None else out + self.left @ (self.right @ x)


class DirectHand(HandNetwork):
    """Crops -> `HandOutput` with `rotations`, `betas` and `transl` None."""

    def __init__(self, config: DirectConfig = TINY, hand: HandModel | None = None):
        super().__init__(config, hand)
        c, width = config, config.vit.width
        if c.n_vertices != len(self._hand.v_template):
            raise ValueError(f"the network has {c.n_vertices} vertices and the hand {len(self._hand.v_template)}")
        maps = coarse_maps(self._hand, c.n_coarse)
        here = self.image_mean.device
        template = torch.cat([maps.rest_joints, self._hand.v_template.to(maps.coarse.device)[maps.coarse]])
        template = (template - template.mean(0)) / template.std()
        self.register_buffer("template", template.to(here))
        self.register_buffer("coarse", maps.coarse.to(here))
        self.register_buffer("order", torch.tensor(OPENPOSE_FROM_MANO, device=here), persistent=False)
        self.upsample = LocalMap(maps.up_near.to(here), maps.up_weights.to(here), c.n_coarse, c.rank)
        self.regress = LocalMap(maps.joint_near.to(here), maps.joint_weights.to(here), c.n_vertices)
        self.embed = nn.Linear(3, c.dim)
        self.query = nn.Parameter(torch.randn(1, 22 + c.n_coarse, c.dim) * 0.02)  # camera, joints, coarse vertices
        self.masked = nn.Parameter(torch.zeros(c.dim))
        self.fov = nn.Linear(1, c.dim) if c.fov else None
        self.blocks = nn.ModuleList(CrossBlock(c.dim, width, c.heads, c.dim_head, c.mlp) for _ in range(c.depth))
        adjacency = maps.adjacency.to(here)
        self.graphs = nn.ModuleList(Graph(c.dim, adjacency.clone()) for _ in range(c.depth if c.graph else 0))
        self.norms = nn.ModuleList(nn.LayerNorm(c.dim) for _ in range(1 + c.refine))
        self.points = Points(c.dim, width)
        self.xyz, self.camera = nn.Linear(c.dim, 3), nn.Linear(c.dim, 3)
        widths = (*fine_widths(c), width)
        self.refinements = nn.ModuleList(Refinement(c.dim, widths, width, c) for _ in range(c.refine))
        self.rexyz = nn.ModuleList(nn.Linear(c.dim, 3) for _ in range(c.refine))
        self.recamera = nn.ModuleList(nn.Linear(c.dim, 3) for _ in range(c.refine))
        self.repoints = nn.ModuleList(nn.Linear(c.dim, 3) for _ in range(c.refine))
        for m in (self.camera, *self.rexyz, *self.recamera, *self.repoints):
            nn.init.zeros_(m.weight)
            nn.init.zeros_(m.bias)
        self.register_buffer("mean_camera", torch.tensor([math.log(8.0), 0.0, 0.0]))

    def forward(self, image: Tensor, K: Tensor) -> HandOutput:
        """image (N,3,h,w) sRGB in [0,1]; K (N,3,3) of the crop cameras."""
        size = image.shape[-2:]
        grid, fine, hints = self.look(image)
        context = grid.flatten(2).transpose(1, 2)
        x = (self.query + F.pad(self.embed(self.template), (0, 0, 1, 0))).expand(len(image), -1, -1)
        if self.training and self.config.mask:
            share = torch.rand(len(x), 1, device=x.device) * self.config.mask
            hide = torch.rand(x.shape[:2], device=x.device) < share
            hide = hide & (torch.arange(x.shape[1], device=x.device) > 0)
            x = torch.where(hide[..., None], (self.query + self.masked).to(x.dtype), x)
        if self.mobile:
            x = x + F.pad(hints, (0, 0, 0, self.config.n_coarse))
        if self.fov is not None:
            x = x + self.fov((size[1] / 2 / K[:, 0, 0]).log()[:, None, None])
        for i, block in enumerate(self.blocks):
            x = block(x, context)
            if self.config.graph:
                x = torch.cat([x[:, :22], self.graphs[i](x[:, 22:])], 1)
        read = self.norms[0](x)
        xyz = 0.1 * self.xyz(read[:, 1:]).float()
        camera = self.mean_camera + self.camera(read[:, 0]).float()
        seen = self.points(read[:, 1:22], grid)
        out, all_points = self.output(xyz, camera, seen, K, size)
        for i, refinement in enumerate(self.refinements):
            at = (all_points / extent(all_points, size)).detach()
            gap = F.pad((at[:, :21] - seen[0]).detach(), (0, 0, 0, self.config.n_coarse))
            at = torch.cat([seen[0].detach(), at[:, 21:]], 1)
            known = torch.cat([2 * at.clamp(-1, 2) - 1, 10 * gap.clamp(-1, 1), 10 * xyz[..., 2:].detach()], -1)
            tokens = refinement(x[:, 1:], [*fine, grid], context, at, known)
            x = torch.cat([x[:, :1] + tokens.mean(1, keepdim=True), tokens], 1)
            read = self.norms[1 + i](x)
            xyz = xyz.detach() + 0.1 * self.rexyz[i](read[:, 1:]).float()
            camera = camera.detach() + self.recamera[i](read[:, 0]).float()
            change = self.repoints[i](read[:, 1:22]).float()
            seen = (seen[0].detach() + 0.1 * change[..., :2], (seen[1].detach() + change[..., 2]).clamp(-7.0, 2.0))
            before = out
            out, all_points = self.output(xyz, camera, seen, K, size)
            out = replace(out, coarse=before)
        return out

    def output(
        self, xyz: Tensor, camera: Tensor, seen: tuple[Tensor, Tensor], K: Tensor, size
    ) -> tuple[HandOutput, Tensor]:
        """Joint and coarse vertex places (N,21+S,3) up to a translation, camera (N,3) -> the hand, always in float32,
        and where the 21+S places project (N,21+S,2)."""
        with torch.autocast(K.device.type, enabled=False):
            K = K.float()
            vertices = self.upsample(xyz[:, 21:])
            joints = self.joints(vertices)
            t = place(camera, joints, K, size, "perspective", 0.0)[:, None]
            points = seen[0] * extent(xyz, size)
            out = HandOutput(
                None, None, None, joints + t, vertices + t, project(joints + t, K), points, seen[1], camera,
                token_joints=xyz[:, :21] + t,
            )  # fmt: skip
            return out, project(xyz + t, K)

    def joints(self, vertices: Tensor) -> Tensor:
        """J = J_reg M and the tips' vertices: (N,V,3) -> (N,21,3), OpenPose order."""
        both = torch.cat([self.regress(vertices), vertices[:, self.hand.tip_ids]], 1)
        return both.index_select(1, self.order)


@dataclass(frozen=True, eq=False)
class CoarseMaps:
    """A coarse mesh of a hand model, and the linear maps around it."""

    coarse: Tensor  # (S,) int64 vertices, farthest points, the five tips first
    adjacency: Tensor  # (S,S) normalised, with self loops
    up_near: Tensor  # (V,k) int64 rows of `coarse`
    up_weights: Tensor  # (V,k)
    joint_near: Tensor  # (16,m) int64 vertices
    joint_weights: Tensor  # (16,m)
    rest_joints: Tensor  # (21,3) OpenPose order


def coarse_maps(hand: HandModel, n_coarse: int, poses: int = 64, seed: int = 0) -> CoarseMaps:
    """Coarse vertices of a hand by farthest-point sampling, and local linear maps from them to all vertices and from
    all vertices to the joints, fitted to random poses and shapes (ridge towards inverse square distances, weights
    summing to one). On the CPU; the same for the same seed."""
    with torch.device("cpu"), torch.no_grad(), torch.inference_mode(False):
        hand = hand.to(torch.float32, "cpu")
        rest = hand.v_template
        g = torch.Generator().manual_seed(seed)
        theta = torch.randn(poses, 16, 3, generator=g) * 0.45
        theta[:, 0] = 0
        posed = hand.with_shape(torch.randn(poses, hand.n_betas, generator=g)).with_pose(rigid.so3_exp(theta))
        coarse = farthest_points(rest, n_coarse, hand.tip_ids.tolist())
        up_near, up_weights = _local_map(rest[coarse], rest, posed.vertices[:, coarse], posed.vertices, 8)
        joint_near, joint_weights = _local_map(
            rest, hand.joint_bases[0], posed.vertices, posed.mano_joints, min(32, len(rest))
        )
        near = up_near[:, :2]  # coarse vertices that share a vertex's neighbourhood are connected
        adjacency = torch.eye(n_coarse)
        adjacency[near[:, 0], near[:, 1]] = 1
        adjacency[near[:, 1], near[:, 0]] = 1
        degree = adjacency.sum(1).rsqrt()
        joints = hand.with_shape().with_pose(torch.eye(3).expand(16, 3, 3)).joints
        return CoarseMaps(
            coarse, degree[:, None] * adjacency * degree, up_near, up_weights, joint_near, joint_weights, joints
        )


def farthest_points(x: Tensor, n: int, first: list[int]) -> Tensor:
    """(V,3) -> (n,) int64: `first`, then always the point farthest from those taken."""
    ids = list(first)
    distance = torch.cdist(x, x[ids]).amin(1)
    while len(ids) < n:
        ids.append(int(distance.argmax()))
        distance = torch.minimum(distance, (x - x[ids[-1]]).norm(dim=-1))
    return torch.tensor(ids)


def _local_map(rest_from: Tensor, rest_to: Tensor, x: Tensor, y: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Neighbours (T,k) and weights (T,k) that take points x (P,S,3) to y (P,T,3)."""
    d, near = torch.cdist(rest_to, rest_from).topk(k, largest=False)
    prior = 1 / (d + 1e-4).square()
    prior = prior / prior.sum(1, keepdim=True)
    a = x[:, near].permute(1, 0, 3, 2).flatten(1, 2).double()  # (T,3P,k)
    b = y.permute(1, 0, 2).flatten(1).double()
    ridge, tie = 1e-6 * a.shape[1], 0.1 * a.shape[1]  # squared metres; `tie` holds the sum of weights at one
    left = a.mT @ a + ridge * torch.eye(k, dtype=torch.float64) + tie
    right = (a.mT @ b[..., None])[..., 0] + ridge * prior + tie
    return near, torch.linalg.solve(left, right).float()
