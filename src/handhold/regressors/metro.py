"""METRO (Lin, Wang, Liu, "End-to-End Human Pose and Mesh Reconstruction with Transformers", CVPR 2021) and Mesh
Graphormer (the same authors, ICCV 2021), hands, as their public checkpoints have them.

The queries are the template's 21 joints and 195 coarse vertices, each with the picture's global feature beside it
(METRO, section 3). Three encoders of post-norm transformer layers narrow them step by step to three numbers each
(figure 2); a learned linear map takes the coarse vertices to all 778. Mesh Graphormer adds 49 grid features as tokens
and a graph convolution over the coarse mesh inside each layer of the last encoder (Graphormer, equations 1-3).

Our own network of this family is `direct.py`; this one exists to run those weights. The template comes from the
user's own MANO file, at conversion (`adapters.convert_checkpoint`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .crops import HandCrops, HandPrediction, to_camera
from .hrnet import HRNet, HRNetConfig
from .parametric import MEAN, STD, HandOutput, place


@dataclass(frozen=True)
class MetroConfig:
    """Sizes; the defaults are the released METRO hand network. `graph` says which encoders convolve over the mesh and
    `grid_tokens` how many grid features join the queries (Mesh Graphormer: only the last; 49)."""

    backbone: HRNetConfig = field(default_factory=HRNetConfig)
    widths: tuple[int, int, int] = (1024, 256, 64)  # of the three encoders
    inputs: tuple[int, int, int] = (2051, 512, 128)
    layers: int = 4
    heads: int = 4
    mlp_ratio: int = 4
    graph: tuple[bool, bool, bool] = (False, False, False)
    grid_tokens: int = 0
    joints: int = 21
    coarse: int = 195
    vertices: int = 778
    camera: int = 150
    dropout: float = 0.1
    image: int = 224


METRO = MetroConfig()
GRAPHORMER = MetroConfig(mlp_ratio=2, graph=(False, False, True), grid_tokens=49)


class MetroOutput(NamedTuple):
    """Camera is (scale, x, y): a point's x, y times the scale after the shift is in [-1,1] across the crop."""

    joints: Tensor  # (N,21,3) metres about the wrist, OpenPose order
    vertices: Tensor  # (N,778,3)
    coarse: Tensor  # (N,195,3)
    camera: Tensor  # (N,3)


_EPS = 1e-12  # of every layer norm, as in BERT


class GraphBlock(nn.Module):
    """Residual graph convolution over the coarse vertices (Graphormer, equation 3; after Kolotouros et al., CVPR 2019):
    x + W2 relu(norm(A relu(norm(W1 relu(norm(x)))) W + b)), A the row-normalised adjacency with loops."""

    def __init__(self, width: int):
        super().__init__()
        half = width // 2
        self.norm0 = nn.LayerNorm(width, eps=_EPS)
        self.lin1 = nn.Linear(width, half)
        self.norm1 = nn.LayerNorm(half, eps=_EPS)
        self.conv = nn.Linear(half, half)
        self.norm2 = nn.LayerNorm(half, eps=_EPS)
        self.lin2 = nn.Linear(half, width)

    def forward(self, x: Tensor, adjacency: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.lin1(F.relu(self.norm0(x)))))
        y = adjacency.to(y.dtype) @ F.linear(y, self.conv.weight) + self.conv.bias
        return x + self.lin2(F.relu(self.norm2(y)))


class EncoderLayer(nn.Module):
    """Post-norm transformer layer (Devlin et al., BERT): norm(x + attention(x)), then norm(x + MLP(x))."""

    def __init__(self, config: MetroConfig, width: int, graph: bool):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.joints, self.coarse = config.joints, config.coarse
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm1 = nn.LayerNorm(width, eps=_EPS)
        self.graph = GraphBlock(width) if graph else None
        self.fc1 = nn.Linear(width, config.mlp_ratio * width)
        self.fc2 = nn.Linear(config.mlp_ratio * width, width)
        self.norm2 = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, adjacency: Tensor | None) -> Tensor:
        drop = self.dropout if self.training else 0.0
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop).transpose(1, 2).flatten(2)
        x = self.norm1(x + F.dropout(self.proj(y), drop))
        if self.graph is not None:
            joints, mesh, grid = x.tensor_split([self.joints, self.joints + self.coarse], 1)
            x = torch.cat([joints, self.graph(mesh, adjacency), grid], 1)
        return self.norm2(x + F.dropout(self.fc2(F.gelu(self.fc1(x))), drop))


class Encoder(nn.Module):
    """Tokens (N,L,inputs) -> (N,L,outputs): a linear map and a learned position, the layers, and a linear map of the
    result added to one of the input."""

    def __init__(self, config: MetroConfig, stage: int):
        super().__init__()
        width, n_in = config.widths[stage], config.inputs[stage]
        n_out = (*config.inputs[1:], 3)[stage]
        self.dropout = config.dropout
        self.positions = nn.Parameter(torch.zeros(config.joints + config.coarse + config.grid_tokens, width))
        self.embed = nn.Linear(n_in, width)
        self.layers = nn.ModuleList(EncoderLayer(config, width, config.graph[stage]) for _ in range(config.layers))
        self.out = nn.Linear(width, n_out)
        self.skip = nn.Linear(n_in, n_out)

    def forward(self, tokens: Tensor, adjacency: Tensor | None) -> Tensor:
        x = F.dropout(self.embed(tokens) + self.positions, self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, adjacency)
        return self.out(x) + self.skip(tokens)


class MetroHand(nn.Module):
    """Right-hand crops (N,3,224,224) -> `HandOutput` (its rotations, betas and transl are None).

    Buffers, stored with the weights: `reference` (216,3), the template's joints and coarse vertices about its wrist in
    metres; `regressor` (21,778), the joints of a mesh in OpenPose order; `adjacency` (195,195) of the coarse mesh.
    """

    def __init__(self, config: MetroConfig = METRO):
        super().__init__()
        self.config = config
        n = config.joints + config.coarse
        self.backbone = HRNet(config.backbone)
        self.encoders = nn.ModuleList(Encoder(config, i) for i in range(3))
        grid = 4 * config.backbone.head[-1]
        self.grid_embed = nn.Linear(grid, config.inputs[0]) if config.grid_tokens else None
        self.camera1, self.camera2 = nn.Linear(3, 1), nn.Linear(n, config.camera)
        self.camera3 = nn.Linear(config.camera, 3)
        self.upsample = nn.Linear(config.coarse, config.vertices)
        self.register_buffer("reference", torch.zeros(n, 3))
        self.register_buffer("regressor", torch.zeros(config.joints, config.vertices))
        self.register_buffer("adjacency", torch.eye(config.coarse) if any(config.graph) else None)
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(f"image_{name}", torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the crops it wants."""
        return self.config.image, self.config.image

    def network(self, image: Tensor, keep: Tensor | None = None) -> MetroOutput:
        """The published network: sRGB crops (N,3,224,224) in [0,1] -> joints, vertices and camera as it says them.

        keep (N,216,1), training: 0 hides a query, which is then 0.01 everywhere (METRO, "Masked Vertex Modeling").
        """
        pooled, grid = self.backbone((image.to(self.image_mean.dtype) - self.image_mean) / self.image_std)
        n = self.config.joints + self.config.coarse
        reference = self.reference.to(pooled.dtype).expand(len(pooled), -1, -1)
        tokens = torch.cat([reference, pooled[:, None].expand(-1, n, -1)], 2)
        if keep is not None:
            tokens = tokens * keep + 0.01 * (1 - keep)
        if self.grid_embed is not None:
            tokens = torch.cat([tokens, self.grid_embed(grid.flatten(2).transpose(1, 2))], 1)
        for encoder in self.encoders:
            tokens = encoder(tokens, self.adjacency)
        found = tokens[:, :n]
        joints, coarse = found.split([self.config.joints, self.config.coarse], 1)
        camera = self.camera3(self.camera2(self.camera1(found)[..., 0]))
        vertices = self.upsample(coarse.transpose(1, 2)).transpose(1, 2)
        return MetroOutput(joints, vertices, coarse, camera)

    def forward(self, image: Tensor, K: Tensor) -> HandOutput:
        """image (N,3,224,224) sRGB in [0,1]; K (N,3,3) of the crop cameras.

        As in the public evaluation the joints are those of the mesh, J = regressor M. The published camera is
        orthographic; the hand is placed where the crop's camera sees it equally large, and `points` are the
        orthographic projection.
        """
        found, size = self.network(image), image.shape[-2:]
        vertices, camera = found.vertices.float(), found.camera.float()
        joints = self.regressor.float() @ vertices
        wrist = joints[:, :1]
        vertices, joints, tokens = vertices - wrist, joints - wrist, found.joints.float() - wrist
        t = place(camera, joints, K.float(), size, "weak", 0.0)
        points = (1 + camera[:, None, :1] * (joints[..., :2] + camera[:, None, 1:])) * (size[1] / 2)
        sigma = torch.full_like(points[..., 0], math.log(0.04))
        joints, vertices = joints + t[:, None], vertices + t[:, None]
        tokens = tokens + t[:, None]
        return HandOutput(None, None, None, joints, vertices, points, points, sigma, camera, token_joints=tokens)

    def predict(self, crops: HandCrops, trust: float = 0.0) -> HandPrediction:
        """Hands in the true cameras' frames; no gradients. `trust` as in `crops.to_camera`."""
        with torch.no_grad():
            o = self(crops.image, crops.K)
            sigma = o.log_sigma.exp() * crops.image.shape[-1]
            return to_camera(crops, o.joints, o.vertices, o.points, sigma, trust=trust)
