"""WiLoR (Potamias et al., "WiLoR: End-to-end 3D Hand Localization and Reconstruction in-the-wild", CVPR 2025), the
regressor of its public checkpoint.

A ViT reads 18 task tokens (16 joints, shape, camera) in front of the picture's (figure 4) and gives a first hand. The
refinement module projects that hand's vertices into three feature maps, takes the largest value of each channel over
all vertices, and adds linear corrections to pose, shape and camera. Output as in HaMeR: 6D rotations, MANO betas, a
weak camera.

The published projection divides by the map's size twice and so samples around the map's first corner instead of on the
hand; the public weights were trained with it, hence it is kept (`_project`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry import rigid
from ..hand.model import HandModel
from .crops import project
from .parametric import HandNetwork, HandOutput, network_K, place
from .vit import HAMER_VIT, ViTConfig

FOCAL = 5000.0  # pixels of the 256-pixel crop: the focal length that HaMeR and WiLoR assume


@dataclass(frozen=True)
class WilorConfig:
    """Sizes; the defaults are the released network."""

    vit: ViTConfig = HAMER_VIT
    n_betas: int = 10


WILOR = WilorConfig()


class WilorHand(HandNetwork):
    """Right-hand crops (N,3,256,192) -> `HandOutput`; its `coarse` is the hand before the refinement.

    Give it the user's MANO model (`hand`): the refinement looks where that model's vertices are. Rotations are absolute
    (MANO under `flat_hand_mean=True`). `tokens` (1,18,width) are the task tokens: linear maps of MANO's mean
    parameters, which are constants, so that the maps are folded into them at conversion. `mean_*` are those
    parameters, added to what the network predicts.
    """

    def __init__(self, config: WilorConfig = WILOR, hand: HandModel | None = None):
        super().__init__(config, hand)
        width = config.vit.width
        self.tokens = nn.Parameter(torch.zeros(1, 18, width))
        self.pose, self.shape, self.camera = nn.Linear(width, 6), nn.Linear(width, config.n_betas), nn.Linear(width, 3)
        self.register_buffer("mean_pose", rigid.sixd_from_matrix(torch.eye(3)).repeat(16, 1))
        self.register_buffer("mean_betas", torch.zeros(config.n_betas))
        self.register_buffer("mean_camera", torch.tensor([0.9, 0.0, 0.0]))
        self.refine = Refinement(width, config.n_betas)

    def forward(self, image: Tensor, K: Tensor) -> HandOutput:
        """image (N,3,256,192) sRGB in [0,1]; K (N,3,3) of the crop cameras (only their centres are used: the network
        means a focal length of 5000 pixels)."""
        net, n, size = self.backbone, len(image), image.shape[-2:]
        x = net.stem((image.to(self.image_mean.dtype) - self.image_mean) / self.image_std)
        grid = x.shape[-2:]
        x = x.flatten(2).transpose(1, 2) + net.pos_embed.to(x.dtype)
        x = torch.cat([self.tokens.to(x.dtype).expand(n, -1, -1), x], 1)
        for block in net.blocks:
            x = block(x)
        x = net.norm(x)
        state = [self.pose(x[:, :16]), self.shape(x[:, 16]), self.camera(x[:, 17])]
        means = [self.mean_pose, self.mean_betas, self.mean_camera]
        state = [a.float() + b for a, b in zip(state, means, strict=True)]
        first = self._output(state, K, size)
        vertices = first.vertices - first.transl[:, None]
        change = self.refine(x[:, 18:].transpose(1, 2).unflatten(2, grid), vertices.to(x.dtype), state[2].to(x.dtype))
        state = [a + b.float() for a, b in zip(state, change, strict=True)]
        return replace(self._output(state, K, size), coarse=first)

    def _output(self, state: list[Tensor], K: Tensor, size) -> HandOutput:
        with torch.autocast(K.device.type, enabled=False):
            rotations, betas, camera = rigid.matrix_from_6d(state[0]), state[1], state[2]
            K = network_K(K.float(), size, "weak", FOCAL)
            posed = self.hand.with_shape(betas).with_pose(rotations)
            t = place(camera, posed.joints, K, size, "weak", FOCAL)
            joints, vertices = posed.joints + t[:, None], posed.vertices + t[:, None]
            seen = project(joints, K)
        sigma = torch.full_like(seen[..., 0], math.log(0.04))
        return HandOutput(rotations, betas, t, joints, vertices, seen, seen, sigma, camera)


class Refinement(nn.Module):
    """Features (N,width,16,12), vertices (N,V,3) and camera (N,3) -> corrections of pose (N,16,6), betas and camera."""

    def __init__(self, width: int, betas: int):
        super().__init__()
        half, quarter, eighth = width // 2, width // 4, width // 8
        self.reduce = nn.Conv2d(width, half, 1)
        self.up2 = _up(half, quarter)
        self.up4 = nn.Sequential(*_up(half, quarter), *_up(quarter, eighth))
        n = half + quarter + eighth
        self.pose, self.shape, self.camera = nn.Linear(n, 96), nn.Linear(n, betas), nn.Linear(n, 3)

    def forward(self, features: Tensor, vertices: Tensor, camera: Tensor) -> tuple[Tensor, ...]:
        coarse = self.reduce(features)
        found = []
        for level in (self.up4(coarse), self.up2(coarse), coarse):
            points = _project(vertices, camera, level.shape[-2])
            span = points.new_tensor([level.shape[-1] - 1, level.shape[-2] - 1])
            at = (points / span * 2 - 1)[:, :, None].to(level.dtype)
            found.append(F.grid_sample(level, at, align_corners=True)[..., 0].amax(2))
        x = torch.cat(found, 1)
        return self.pose(x).unflatten(-1, (16, 6)), self.shape(x), self.camera(x)


def _up(a: int, b: int) -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(a, b, 4, 2, 1, bias=False), nn.BatchNorm2d(b), nn.ReLU())


def _project(vertices: Tensor, camera: Tensor, height: int) -> Tensor:
    """Where WiLoR's refinement looks for vertices (N,V,3) in a map of so many rows: (N,V,2), in "pixels" that reach
    from about -1/2 to 1/2 across the crop (see the module's text)."""
    scale, x, y = camera.unbind(-1)
    depth = 2 * FOCAL / (height * scale + 1e-9)
    placed = vertices + torch.stack([x, y, depth], -1)[:, None]
    return FOCAL / height * placed[..., :2] / placed[..., 2:]
