"""A plain Vision Transformer (Dosovitskiy et al., ICLR 2021) that keeps its grid of tokens, patch 16.

Pre-norm blocks, learned positional embedding (born as 2D sine-cosine, as in MAE), no pooling. Sizes tiny, small, base,
large (DeiT and ViT papers) and huge (1280 wide, 32 deep, 16 heads: the backbone of MAE, ViTPose-H and HaMeR). The stem
is one 16x16 convolution, or four 3x3 convolutions of stride 2 (Xiao et al., "Early convolutions help transformers see
better", NeurIPS 2021), which small networks trained from scratch need; its inner maps are given out as fine features.

Public state dicts: `from_mae` and `from_hamer` (also ViTPose) rename them to this module's layout.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UnusableInput


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a ViT. `padding` is the zero padding of the patch convolution (2 in ViTPose and HaMeR)."""

    width: int = 192
    depth: int = 12
    heads: int = 3
    image: tuple[int, int] = (224, 224)  # height, width: multiples of 16; the grid that the positions are stored for
    stem: str = "patch"  # "patch" or "conv"
    padding: int = 0
    class_token: bool = False
    mlp_ratio: float = 4.0
    drop_path: float = 0.0  # stochastic depth of the last block, growing linearly from 0

    @property
    def grid(self) -> tuple[int, int]:
        return self.image[0] // 16, self.image[1] // 16


SIZES: dict[str, ViTConfig] = {
    "tiny": ViTConfig(192, 12, 3),
    "small": ViTConfig(384, 12, 6),
    "base": ViTConfig(768, 12, 12),
    "large": ViTConfig(1024, 24, 16),
    "huge": ViTConfig(1280, 32, 16),
}
HAMER_VIT = replace(SIZES["huge"], image=(256, 192), padding=2, drop_path=0.55)


class Block(nn.Module):
    """Attention and a two-layer MLP, each on the normalised tokens and added to them."""

    def __init__(self, width: int, heads: int, mlp_ratio: float = 4.0, drop_path: float = 0.0):
        super().__init__()
        self.heads, self.drop_path = heads, drop_path
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.fc1 = nn.Linear(width, int(width * mlp_ratio))
        self.fc2 = nn.Linear(int(width * mlp_ratio), width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(n, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(n, length, width)
        x = x + self._drop(self.proj(mixed))
        return x + self._drop(self.fc2(F.gelu(self.fc1(self.norm2(x)))))

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.training and self.drop_path):
            return x
        keep = torch.rand(len(x), 1, 1, device=x.device) >= self.drop_path
        return x * keep.to(x.dtype) / (1 - self.drop_path)


class ConvStem(nn.Module):
    """Four convolutions of stride 2, then a linear map to the width of the tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.channels = (width // 8, width // 4, width // 2, width)
        before = (3, *self.channels[:-1])
        self.convs = nn.ModuleList(
            nn.Conv2d(a, b, 3, stride=2, padding=1, bias=False) for a, b in zip(before, self.channels, strict=True)
        )
        self.norms = nn.ModuleList(nn.GroupNorm(max(1, c // 24), c) for c in self.channels)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """(N,3,H,W) -> tokens (N,width,H/16,W/16) and the maps of strides 4 and 8."""
        maps = []
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.relu(norm(conv(x)))
            maps.append(x)
        return self.proj(x), (maps[1], maps[2])


class ViT(nn.Module):
    """Images (N,3,H,W), normalised -> (features (N,width,H/16,W/16), fine maps, finest first: strides 4 and 8 of a conv
    stem, none of a patch stem). H and W are multiples of 16; positions are interpolated when they are not the config's.
    """

    def __init__(self, config: ViTConfig):
        super().__init__()
        if config.stem not in ("patch", "conv"):
            raise ValueError(f"stem is {config.stem!r}; it must be 'patch' or 'conv'")
        if config.image[0] % 16 or config.image[1] % 16 or config.width % config.heads:
            raise ValueError("the image must be a multiple of 16 on both sides and the width one of the heads")
        self.config = config
        width = config.width
        conv = config.stem == "conv"
        self.stem = ConvStem(width) if conv else nn.Conv2d(3, width, 16, stride=16, padding=config.padding)
        self.class_token = nn.Parameter(torch.zeros(1, 1, width)) if config.class_token else None
        self.pos_embed = nn.Parameter(sincos_positions(*config.grid, width))
        drops = torch.linspace(0, config.drop_path, config.depth, device="cpu").tolist()
        self.blocks = nn.ModuleList(Block(width, config.heads, config.mlp_ratio, d) for d in drops)
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.apply(_init)

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        maps: tuple[Tensor, ...] = ()
        if isinstance(self.stem, ConvStem):
            x, maps = self.stem(x)
        else:
            x = self.stem(x)
        h, w = x.shape[-2:]
        pos = (
            self.pos_embed if (h, w) == self.config.grid else resize_positions(self.pos_embed, self.config.grid, (h, w))
        )
        x = x.flatten(2).transpose(1, 2) + pos.to(x.dtype)
        if self.class_token is not None:
            x = torch.cat([self.class_token.expand(len(x), -1, -1).to(x.dtype), x], 1)
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if self.class_token is not None:
            x = x[:, 1:]
        return x.transpose(1, 2).unflatten(2, (h, w)), maps


def _init(m: nn.Module) -> None:
    if isinstance(m, nn.Linear):
        nn.init.trunc_normal_(m.weight, std=0.02)
        if m.bias is not None:
            nn.init.zeros_(m.bias)
    elif isinstance(m, nn.Conv2d) and m.kernel_size[0] == 3:
        nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")


def sincos_positions(height: int, width: int, channels: int) -> Tensor:
    """2D sine-cosine embedding (1, height*width, channels), row by row (MAE, appendix A; Chen et al., MoCo v3)."""
    quarter = channels // 4
    omega = torch.exp(-math.log(10000.0) * torch.arange(quarter, dtype=torch.float32) / quarter)
    y, x = torch.meshgrid(torch.arange(height).float(), torch.arange(width).float(), indexing="ij")
    ax, ay = x.reshape(-1, 1) * omega, y.reshape(-1, 1) * omega
    out = torch.cat([ax.sin(), ax.cos(), ay.sin(), ay.cos()], 1)
    return F.pad(out, (0, channels - 4 * quarter))[None]


def resize_positions(pos: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """Positional embedding (1, h*w, C) of grid `old` for grid `new`, bicubic."""
    if tuple(old) == tuple(new):
        return pos
    grid = pos.float().transpose(1, 2).unflatten(2, tuple(old))
    grid = F.interpolate(grid, size=tuple(new), mode="bicubic", align_corners=False)
    return grid.flatten(2).transpose(1, 2).to(pos.dtype)


def from_mae(state: Mapping[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """State dict in the layout of MAE (also timm's ViT) -> this module's, for `ViT(config)` with a patch stem.

    The position of the class token is added to the class token itself when the config keeps one, else both are
    dropped. Decoder, mask token and classifier are ignored. Square grids are resized to the config's.
    Raises UnusableInput when keys are missing or of another size.
    """
    out = _rename(state, {"norm.": "norm."})
    pos = _want(state, "pos_embed")
    if config.class_token:
        out["class_token"] = _want(state, "cls_token") + pos[:, :1]
    side = math.isqrt(pos.shape[1] - 1)
    if side * side != pos.shape[1] - 1:
        raise UnusableInput("The weights' positional embedding is not of a square picture: is this an MAE checkpoint?")
    out["pos_embed"] = resize_positions(pos[:, 1:], (side, side), config.grid)
    return _checked(out, config)


def from_hamer(state: Mapping[str, Tensor], config: ViTConfig = HAMER_VIT) -> dict[str, Tensor]:
    """State dict of a HaMeR or ViTPose backbone (with or without the `backbone.` prefix) -> this module's.

    Those networks have no class token but keep its position and add it to all others; so does this. Their patch
    convolution is padded by 2 (`config.padding`). Their grid is 16x12.
    """
    if any(k.startswith("backbone.") for k in state):
        state = {k.removeprefix("backbone."): v for k, v in state.items() if k.startswith("backbone.")}
    out = _rename(state, {"last_norm.": "norm."})
    pos = _want(state, "pos_embed")
    out["pos_embed"] = resize_positions(pos[:, 1:] + pos[:, :1], _portrait(pos.shape[1] - 1), config.grid)
    return _checked(out, config)


def _portrait(n: int) -> tuple[int, int]:
    """Grid of n tokens of a 4:3 portrait picture."""
    width = round(math.sqrt(n * 3 / 4))
    if width == 0 or n % width:
        raise UnusableInput("The weights' positional embedding is not of a 256x192 picture.")
    return n // width, width


def _rename(state: Mapping[str, Tensor], tail: dict[str, str]) -> dict[str, Tensor]:
    names = {"patch_embed.proj.": "stem.", **tail}
    out = {}
    for key, value in state.items():
        if key.startswith("blocks."):
            out[key.replace(".attn.", ".").replace(".mlp.", ".")] = value
        for old, new in names.items():
            if key.startswith(old):
                out[new + key.removeprefix(old)] = value
    return out


def _want(state: Mapping[str, Tensor], key: str) -> Tensor:
    if key not in state:
        raise UnusableInput(f"The weights hold no {key!r}: this is not the layout of the backbone that was named.")
    return state[key]


def _checked(state: dict[str, Tensor], config: ViTConfig) -> dict[str, Tensor]:
    """Exactly the keys and shapes of `ViT(config)`, or UnusableInput."""
    with torch.device("meta"):
        wanted = {k: tuple(v.shape) for k, v in ViT(config).state_dict().items()}
    found = {k: tuple(v.shape) for k, v in state.items()}
    if found != wanted:
        bad = sorted(k for k in wanted.keys() | found.keys() if wanted.get(k) != found.get(k))
        raise UnusableInput(f"The weights do not fit the backbone: {len(bad)} tensors differ, first {bad[0]!r}.")
    return state
