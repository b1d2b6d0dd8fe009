"""The parametric family: an image becomes the pose and shape of the hand model, and those its surface.

`HAMER` is the published network (Pavlakos et al., "Reconstructing Hands in 3D with Transformers", CVPR 2024): ViT-H,
one query token that attends to the 192 image tokens through six decoder layers, linear read-outs of 6D rotations,
shape and a weak-perspective camera, each added to mean parameters. `TINY` is ours: a small ViT with a convolutional
stem, one query per joint beside the global one, a perspective camera (the crop's true one), joints seen directly in the
picture with a variance each, and one refinement: features of several scales, read where the first estimate projects,
give residuals (after Potamias et al., WiLoR, CVPR 2025).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnusableInput
from ..geometry import rigid
from ..hand.joints import MANO_NAMES, OPENPOSE_NAMES
from ..hand.model import HandModel
from . import mobile, vit
from .crops import HandCrops, HandPrediction, extent, project, to_camera
from .vit import ViT, ViTConfig

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, sRGB in [0,1]


@dataclass(frozen=True)
class ParametricConfig:
    """Settings of `ParametricHand`; the defaults are the small network that is shipped."""

    vit: ViTConfig = field(default_factory=lambda: ViTConfig(192, 12, 3, stem="conv", drop_path=0.05))
    dim: int = 192  # of the decoder
    depth: int = 3
    heads: int = 3
    dim_head: int = 64
    mlp: int = 384
    n_betas: int = 10
    queries: str = "joints"  # "one" as in HaMeR, or "joints": the global one and one per joint
    camera: str = "perspective"  # "perspective": log depth and image place; "weak": (s, tx, ty) as in HaMeR
    focal: float = 0.0  # weak camera: pixels for a crop of 256; 0 means the true focal length of the crop
    fov: bool = True  # tell the network the crop's field of view
    refine: int = 1  # rounds of refinement
    points: bool = True  # joints seen directly in the picture, with variances
    backbone: Literal["vit", "mobile"] = "vit"  # "mobile": of `vit`, only `image` and `width` (of the grid) are used


TINY = ParametricConfig()
HAMER = ParametricConfig(
    vit.HAMER_VIT, 1024, 6, 8, 64, 1024, queries="one", camera="weak", focal=5000.0, fov=False, refine=0, points=False
)
MOBILE = replace(TINY, backbone="mobile")
CONFIGS = {"tiny": TINY, "hamer": HAMER, "mobile": MOBILE}
CONFIGS["small"] = replace(TINY, vit=replace(vit.SIZES["small"], stem="conv", drop_path=0.1), dim=384, heads=6, mlp=768)


@dataclass(frozen=True, eq=False)
class HandOutput:
    """What a network says of N crops, in the crop cameras' frame (see `crops`), right hands, metres, crop pixels."""

    rotations: Tensor | None  # (N,16,3,3); None from the direct family
    betas: Tensor | None  # (N,B)
    transl: Tensor | None  # (N,3)
    joints: Tensor  # (N,21,3)
    vertices: Tensor  # (N,V,3)
    projected: Tensor  # (N,21,2) the joints' projection
    points: Tensor  # (N,21,2) joints as seen in the picture; the projection where there is no head for it
    log_sigma: Tensor  # (N,21) log of the expected error of `points` over the crop's width
    camera: Tensor  # (N,3) raw camera
    coarse: HandOutput | None = None  # what was before the last refinement
    token_joints: Tensor | None = None  # (N,21,3) joints of the direct family's own queries


class CrossBlock(nn.Module):
    """Self-attention among queries, cross-attention to the picture, MLP; pre-norm (HaMeR's decoder layer)."""

    def __init__(self, dim: int, context: int, heads: int, dim_head: int, mlp: int):
        super().__init__()
        inner, self.heads = heads * dim_head, heads
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * inner, bias=False)
        self.out = nn.Linear(inner, dim)
        self.q = nn.Linear(dim, inner, bias=False)
        self.kv = nn.Linear(context, 2 * inner, bias=False)
        self.cross_out = nn.Linear(inner, dim)
        self.fc1, self.fc2 = nn.Linear(dim, mlp), nn.Linear(mlp, dim)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.out(self._attend(*self.qkv(self.norm1(x)).chunk(3, -1)))
        x = x + self.cross_out(self._attend(self.q(self.norm2(x)), *self.kv(context).chunk(2, -1)))
        return x + self.fc2(F.gelu(self.fc1(self.norm3(x))))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class HandNetwork(nn.Module):
    """What both families share: the backbone, the model of the hand, the camera, and places in the picture."""

    def __init__(self, config, hand: HandModel | None):
        super().__init__()
        self.config = config
        self.mobile = getattr(config, "backbone", "vit") == "mobile"
        self.backbone = mobile.MobileBackbone(config.vit.width) if self.mobile else ViT(config.vit)
        if self.mobile:
            self.hints = nn.Linear(126, 22 * config.dim)
        with torch.device("cpu"):  # real numbers also where the network is built on the meta device
            self._hand = (hand or HandModel.open("right")).to(torch.float32)
        if self._hand.side != "right":
            raise ValueError("the network's hand must be the right one; left hands are mirrored in `crops`")
        _ = self._hand.joint_bases  # kept by the model, and must outlive inference mode
        for name, value in (("mean", MEAN), ("std", STD)):
            self.register_buffer(f"image_{name}", torch.tensor(value).view(3, 1, 1), persistent=False)

    @property
    def hand(self) -> HandModel:
        """The right hand, on the network's device."""
        if self._hand.device != self.image_mean.device:
            with torch.inference_mode(False):
                self._hand = self._hand.to(device=self.image_mean.device)
                _ = self._hand.joint_bases  # kept by the model, and must outlive inference mode
        return self._hand

    @property
    def image_size(self) -> tuple[int, int]:
        """(height, width) of the crops it wants."""
        return self.config.vit.image

    def features(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """sRGB crops (N,3,h,w) in [0,1] -> the backbone's features."""
        return self.look(image)[:2]

    def look(self, image: Tensor) -> tuple[Tensor, tuple[Tensor, ...], Tensor | float]:
        """sRGB crops (N,3,h,w) in [0,1] -> features, fine maps, and what the backbone's own landmarks add to the first
        22 queries (N,22,dim); 0 when it has none."""
        image = image.to(self.image_mean.dtype)
        if not self.mobile:
            return *self.backbone((image - self.image_mean) / self.image_std), 0.0
        grid, fine, hints = self.backbone(image)
        return grid, fine, self.hints(hints).unflatten(-1, (22, -1))

    def predict(self, crops: HandCrops, trust: float = 0.5) -> HandPrediction:
        """Hands in the true cameras' frames; no gradients. `trust` as in `crops.to_camera`."""
        with torch.no_grad():
            o = self(crops.image, crops.K)
            sigma = o.log_sigma.exp() * crops.image.shape[-1]
            return to_camera(
                crops, o.joints, o.vertices, o.points, sigma, o.rotations, o.betas, self.hand, trust
            )  # fmt: skip


def fine_widths(config) -> tuple[int, ...]:
    """Channels of the backbone's fine maps, finest first."""
    if config.backbone not in ("vit", "mobile"):
        raise ValueError(f"backbone is {config.backbone!r}; it must be 'vit' or 'mobile'")
    if config.backbone == "mobile":
        return mobile.FINE
    return (config.vit.width // 4, config.vit.width // 2) if config.vit.stem == "conv" else ()


def place(camera: Tensor, joints: Tensor, K: Tensor, size: tuple[int, int], kind: str, focal: float) -> Tensor:
    """Camera read-outs (N,3) -> translations (N,3) of hands in the crop camera's frame.

    "weak": (s, tx, ty) of HaMeR: t = (tx, ty, 2 f / (S s)) with f the focal length of a crop of S = 256 pixels.
    "perspective": (log s, u, v): the mean joint is seen at (u, v) half widths from the crop's middle and at depth
    2 f / (w s): s is half widths per metre.
    """
    if kind == "weak":
        f = K[:, 0, 0] * 256 / size[0] if focal == 0 else torch.full_like(K[:, 0, 0], focal)
        return torch.stack([camera[:, 1], camera[:, 2], 2 * f / (256 * camera[:, 0] + 1e-9)], -1)
    f = K[:, 0, 0] * 2 / size[1]  # focal length in half widths
    z = f * torch.exp(-camera[:, 0].clamp(-3.0, 6.0))
    xy = camera[:, 1:] * (z / f)[:, None]
    return torch.cat([xy, z[:, None]], -1) - joints.mean(1)


def network_K(K: Tensor, size: tuple[int, int], kind: str, focal: float) -> Tensor:
    """Intrinsics that the network's own camera means: the true ones, or those of a fixed focal length."""
    if kind != "weak" or focal == 0:
        return K
    out = K.clone()
    out[:, 0, 0] = out[:, 1, 1] = focal * size[0] / 256
    return out


class Points(nn.Module):
    """Tokens of joints -> where they are seen: soft argmax over the grid, plus a residual; and log variances."""

    def __init__(self, dim: int, context: int):
        super().__init__()
        self.q, self.k = nn.Linear(dim, 64), nn.Linear(context, 64)
        self.shift = nn.Linear(dim, 3)
        nn.init.zeros_(self.shift.weight)
        self.shift.bias.data = torch.tensor([0.0, 0.0, math.log(0.1)])

    def forward(self, tokens: Tensor, grid: Tensor) -> tuple[Tensor, Tensor]:
        """tokens (N,J,dim), grid (N,C,h,w) -> places (N,J,2) as shares of width and height, log sigma (N,J)."""
        h, w = grid.shape[-2:]
        q, k = self.q(tokens), self.k(grid.flatten(2).transpose(1, 2))
        heat = (q @ k.mT / 8).float().softmax(-1)
        y, x = torch.meshgrid(
            (torch.arange(h, device=grid.device) + 0.5) / h,
            (torch.arange(w, device=grid.device) + 0.5) / w,
            indexing="ij",
        )
        shift = self.shift(tokens).float()
        return heat @ torch.stack([x, y], -1).reshape(-1, 2) + shift[..., :2], shift[..., 2].clamp(-7.0, 2.0)


class Refinement(nn.Module):
    """Features of several scales, read where joints are thought to be, mixed into the joints' tokens."""

    def __init__(self, dim: int, widths: tuple[int, ...], context: int, config: ParametricConfig):
        super().__init__()
        self.read = nn.ModuleList(nn.Linear(c, dim) for c in widths)
        self.place = nn.Linear(5, dim)
        self.block = CrossBlock(dim, context, config.heads, config.dim_head, config.mlp)

    def forward(self, tokens: Tensor, maps: list[Tensor], context: Tensor, places: Tensor, state: Tensor) -> Tensor:
        """tokens (N,J,dim); maps (N,C,h,w); places (N,J,2) shares; state (N,J,5): where, and the parametric
        disagreement -> tokens (N,J,dim)."""
        grid = (2 * places - 1).clamp(-2, 2)[:, :, None].to(maps[0].dtype)
        for read, values in zip(self.read, maps, strict=True):
            tokens = tokens + read(F.grid_sample(values, grid, align_corners=False)[..., 0].transpose(1, 2))
        return self.block(tokens + self.place(state.to(tokens.dtype)), context)


class Readout(nn.Module):
    """Tokens -> changes of 6D rotations (N,16,6), betas (N,B) and camera (N,3)."""

    def __init__(self, config: ParametricConfig):
        super().__init__()
        dim, self.one = config.dim, config.queries == "one"
        self.pose = nn.Linear(dim, 96 if self.one else 6)
        self.betas = nn.Linear(dim, config.n_betas)
        self.camera = nn.Linear(dim, 3)
        for m in (self.pose, self.betas, self.camera):
            nn.init.xavier_uniform_(m.weight, gain=0.01)
            nn.init.zeros_(m.bias)
        if not self.one:
            self.each = nn.Parameter(torch.zeros(16, 6, dim))  # a read-out of its own for each joint
        source = [OPENPOSE_NAMES.index(n) for n in MANO_NAMES]
        self.register_buffer("source", torch.tensor(source), persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        main = tokens[:, 0]
        if self.one:
            pose = self.pose(main).unflatten(-1, (16, 6))
        else:
            t = tokens[:, 1:][:, self.source]
            pose = self.pose(t) + torch.einsum("nji,jki->njk", t, self.each.to(t.dtype))
        return pose.float(), self.betas(main).float(), self.camera(main).float()


class ParametricHand(HandNetwork):
    """Crops -> `HandOutput`. With `queries="one"`, without refinement and point head, it is HaMeR."""

    def __init__(self, config: ParametricConfig = TINY, hand: HandModel | None = None):
        super().__init__(config, hand)
        c = config
        width = c.vit.width
        if c.queries not in ("one", "joints") or c.camera not in ("weak", "perspective"):
            raise ValueError("queries must be 'one' or 'joints', and the camera 'weak' or 'perspective'")
        if (c.refine or c.points or self.mobile) and c.queries == "one":
            raise ValueError("refinement, the point head and the mobile backbone need queries='joints'")
        self.query = nn.Parameter(torch.randn(1, 1 if c.queries == "one" else 22, c.dim) * 0.02)
        self.blocks = nn.ModuleList(CrossBlock(c.dim, width, c.heads, c.dim_head, c.mlp) for _ in range(c.depth))
        one = c.queries == "one"  # HaMeR reads out its token as it is
        self.norms = nn.ModuleList(nn.Identity() if one else nn.LayerNorm(c.dim) for _ in range(1 + c.refine))
        self.readout = Readout(c)
        self.fov = nn.Linear(1, c.dim) if c.fov else None
        self.points = Points(c.dim, width) if c.points else None
        if c.refine:
            maps = (*fine_widths(c), width)
            self.refinements = nn.ModuleList(Refinement(c.dim, maps, width, c) for _ in range(c.refine))
            self.residuals = nn.ModuleList(Readout(c) for _ in range(c.refine))
            self.repoints = nn.ModuleList(nn.Linear(c.dim, 3) for _ in range(c.refine if c.points else 0))
            for m in self.repoints:
                nn.init.zeros_(m.weight)
                nn.init.zeros_(m.bias)
        eye = rigid.sixd_from_matrix(torch.eye(3)).expand(16, 6).clone()
        camera = [1.0, 0.0, 0.0] if c.camera == "weak" else [math.log(8.0), 0.0, 0.0]
        self.register_buffer("mean_pose", eye)  # 6D
        self.register_buffer("mean_betas", torch.zeros(c.n_betas))
        self.register_buffer("mean_camera", torch.tensor(camera))

    def forward(self, image: Tensor, K: Tensor) -> HandOutput:
        """image (N,3,h,w) sRGB in [0,1]; K (N,3,3) of the crop cameras."""
        c, size = self.config, image.shape[-2:]
        grid, fine, hints = self.look(image)
        context = grid.flatten(2).transpose(1, 2)
        x = self.query.expand(len(image), -1, -1) + hints
        if self.fov is not None:
            x = x + self.fov((size[1] / 2 / K[:, 0, 0]).log()[:, None, None])
        for block in self.blocks:
            x = block(x, context)
        read = self.norms[0](x)
        pose, betas, camera = self.readout(read)
        state = [self.mean_pose + pose, self.mean_betas + betas, self.mean_camera + camera]
        seen = self.points(read[:, 1:], grid) if self.points is not None else None
        out = self.output(state, seen, K, size)
        for i in range(c.refine):
            places = out.points if c.points else out.projected
            scale = extent(places, size)
            at, gap = places.detach() / scale, (out.projected - places).detach() / scale
            depth = (out.joints[..., 2:] - out.joints[:, :1, 2:]).detach() * 10
            known = torch.cat([2 * at - 1, 10 * gap.clamp(-1, 1), depth], -1)
            joints = self.refinements[i](x[:, 1:], [*fine, grid], context, at, known)
            x = torch.cat([x[:, :1] + joints.mean(1, keepdim=True), joints], 1)
            read = self.norms[1 + i](x)
            state = [s.detach() + d for s, d in zip(state, self.residuals[i](read), strict=True)]
            if seen is not None:
                change = self.repoints[i](read[:, 1:]).float()
                seen = (seen[0].detach() + 0.1 * change[..., :2], (seen[1].detach() + change[..., 2]).clamp(-7.0, 2.0))
            out = replace(self.output(state, seen, K, size), coarse=out)
        return out

    def output(self, state: list[Tensor], seen: tuple[Tensor, Tensor] | None, K: Tensor, size) -> HandOutput:
        """Parameters (N,16,6), (N,B), (N,3) -> the hand they mean; always in float32."""
        c = self.config
        with torch.autocast(K.device.type, enabled=False):
            rotations, betas, camera = rigid.matrix_from_6d(state[0]), state[1], state[2]
            K = network_K(K.float(), size, c.camera, c.focal)
            shaped = self.hand.with_shape(betas)
            posed = shaped.with_pose(rotations)
            joints, vertices = posed.joints, posed.vertices
            t = place(camera, joints, K, size, c.camera, c.focal)
            joints, vertices = joints + t[:, None], vertices + t[:, None]
            projected = project(joints, K)
            if seen is None:
                points, log_sigma = projected, torch.full_like(projected[..., 0], math.log(0.04))
            else:
                points, log_sigma = seen[0] * extent(projected, size), seen[1]
        return HandOutput(rotations, betas, t, joints, vertices, projected, points, log_sigma, camera)


def from_hamer(state: Mapping[str, Tensor], config: ParametricConfig = HAMER) -> dict[str, Tensor]:
    """State dict in the layout of a public HaMeR checkpoint -> that of `ParametricHand(HAMER)`.

    `backbone.*` goes through `vit.from_hamer`; of `mano_head.*` the zero token's embedding bias and its positional
    embedding become one query (its weight multiplies zero). Everything else (the hand model, the discriminator) is
    ignored. Raises UnusableInput when keys are missing.
    """
    try:
        head = {k.removeprefix("mano_head."): v for k, v in state.items() if k.startswith("mano_head.")}
        out = {f"backbone.{k}": v for k, v in vit.from_hamer(state, config.vit).items()}
        out["query"] = head["transformer.pos_embedding"] + head["transformer.to_token_embedding.bias"]
        for i in range(config.depth):
            old = f"transformer.transformer.layers.{i}."
            for part, name in _HAMER_LAYER.items():
                for kind in ("weight", "bias"):
                    if f"{old}{part}.{kind}" in head:
                        out[f"blocks.{i}.{name}.{kind}"] = head[f"{old}{part}.{kind}"]
        for part, name in (("decpose", "pose"), ("decshape", "betas"), ("deccam", "camera")):
            for kind in ("weight", "bias"):
                out[f"readout.{name}.{kind}"] = head[f"{part}.{kind}"]
        out["mean_pose"] = head["init_hand_pose"].reshape(16, 6)
        out["mean_betas"], out["mean_camera"] = head["init_betas"].reshape(-1), head["init_cam"].reshape(3)
    except KeyError as e:
        raise UnusableInput(f"The weights hold no {e.args[0]!r}: this is not a HaMeR checkpoint.") from e
    return out


_HAMER_LAYER = {
    "0.norm": "norm1", "0.fn.to_qkv": "qkv", "0.fn.to_out.0": "out", "1.norm": "norm2", "1.fn.to_q": "q",
    "1.fn.to_kv": "kv", "1.fn.to_out.0": "cross_out", "2.norm": "norm3", "2.fn.net.0": "fc1", "2.fn.net.3": "fc2",
}  # fmt: skip
