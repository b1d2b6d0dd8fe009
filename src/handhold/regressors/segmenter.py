"""Whose pixel is it: right hand, left hand, held object, forearm or background, by a small convolutional network.

A U-Net (Ronneberger et al., MICCAI 2015) of depthwise blocks in the order of ConvNeXt (Liu et al., CVPR 2022) with the
batch normalisation and ReLU of mobile networks (Sandler et al., CVPR 2018), so that it is small, trains from scratch
in minutes on a GPU and folds into plain convolutions on a CPU. Which hand it is and what is held are questions about
the whole picture: at 1/32 of the size four layers of self-attention look everywhere.

The same network reads single pictures and clips: five more input channels hold the masks of the frame before, moved
by optical flow (`segment_clip`), zeros where there are none. In training they are made from the truth by
`segmenter_data.corrupt_previous`, which spoils them enough that the network uses them without trusting them.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..datasets.synthetic.sample import LABELS
from .mobile import COARSE, FINE, MobileTrunk
from .segmenter_data import augment, corrupt_previous

__all__ = [
    "Segmenter",
    "SegmenterConfig",
    "augment",
    "confusion",
    "corrupt_previous",
    "iou",
    "segmenter_loss",
]

IGNORE = 255  # a label that neither loss nor score counts
SHARPEST = 32.0  # largest attention logit


@dataclass(frozen=True)
class SegmenterConfig:
    """Sizes of the network. Stages are at 1/2, 1/4, 1/8, 1/16 and 1/32 of the picture; the default has 4.6 M parameters
    (9.2 MB in fp16)."""

    widths: tuple[int, ...] = (24, 48, 96, 160, 256)  # channels of the stages, descending
    depths: tuple[int, ...] = (1, 2, 3, 4, 4)  # blocks of the stages, descending
    up_depths: tuple[int, ...] = (1, 1, 2, 2)  # blocks of the stages at 1/2 .. 1/16, ascending
    expansion: int = 3  # channels inside a block, as a multiple
    heads: int = 8  # of the attention at 1/32; 0 leaves it out
    backbone: Literal["own", "mobile"] = "own"
    """`mobile` sees with the pretrained `mobile.MobileTrunk` beside a thin branch for details and the masks before; of
    `depths` only the last counts."""

    def __post_init__(self) -> None:
        for name in ("widths", "depths", "up_depths"):
            object.__setattr__(self, name, tuple(getattr(self, name)))  # lists, when they come from JSON
        if self.backbone not in ("own", "mobile"):
            raise ValueError(f"backbone is {self.backbone!r}; it must be 'own' or 'mobile'")


MOBILE = SegmenterConfig(widths=(16, 32, 64, 128, 192), depths=(2,), up_depths=(1, 1, 2, 2), backbone="mobile")
THIN = (16, 24, 32, 48, 64)  # channels of the branch beside the trunk, at 1/2 .. 1/32


class Segmenter(nn.Module):
    """Pictures to label logits.

    `forward(image (N,3,H,W) sRGB in [0,1], previous (N,5,H,W) probabilities or None) -> (N,5,H,W)` logits in the order
    of `LABELS`. Any height and width (padded inside). `previous` is zero where nothing is known.
    """

    def __init__(self, config: SegmenterConfig | None = None) -> None:
        super().__init__()
        c = self.config = config or SegmenterConfig()
        w, classes = c.widths, len(LABELS)
        self.register_buffer("mean", torch.tensor([0.485, 0.456, 0.406])[:, None, None], persistent=False)
        self.register_buffer("std", torch.tensor([0.229, 0.224, 0.225])[:, None, None], persistent=False)
        self.encoder = Beside(c) if c.backbone == "mobile" else Encoder(c)
        self.context = Context(w[-1])
        self.lateral, self.lift, self.up = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for i in range(len(w) - 1):
            self.lateral.append(conv_bn(self.encoder.channels[i], w[i], 1, act=False))
            self.lift.append(conv_bn(w[i + 1], w[i], 1, act=False))
            self.up.append(nn.Sequential(*blocks(w[i], 2, c.up_depths[i])))
        self.head = nn.Sequential(conv_bn(w[0], 32, 3), nn.Conv2d(32, 4 * classes, 1))
        nn.init.zeros_(self.head[1].bias)
        nn.init.normal_(self.head[1].weight, std=0.01)

    def forward(self, image: Tensor, previous: Tensor | None = None) -> Tensor:
        n, _, h, w = image.shape
        if previous is None:
            previous = image.new_zeros(n, len(LABELS), h, w)
        x = torch.cat([(image - self.mean) / self.std, previous.to(image.dtype)], 1)
        pad = 2 ** len(self.config.widths)
        pad = (0, -w % pad, 0, -h % pad)
        x = F.pad(x, pad, mode="replicate").contiguous(memory_format=torch.channels_last)
        if self.config.backbone == "mobile":
            image = F.pad(image, pad, mode="replicate")
        *skips, x = self.encoder(x, image)
        x = self.context(x)
        for i in reversed(range(len(self.lateral))):
            lifted = F.interpolate(self.lift[i](x), scale_factor=2, mode="bilinear", align_corners=False)
            x = self.up[i](F.relu(self.lateral[i](skips[i]) + lifted))
        return F.pixel_shuffle(self.head(x), 2)[..., :h, :w]

    @torch.no_grad()
    def folded(self) -> Segmenter:
        """A copy for inference in which every batch normalisation is part of the convolution before it."""
        model = copy.deepcopy(self).eval()
        for module in list(model.modules()):
            for name, child in list(module.named_children()):
                if isinstance(child, nn.Sequential) and len(child) > 1 and isinstance(child[1], nn.BatchNorm2d):
                    conv = nn.utils.fuse_conv_bn_eval(child[0], child[1])
                    rest = list(child)[2:]
                    setattr(module, name, nn.Sequential(conv, *rest)) if not name.isdigit() else module.__setitem__(
                        int(name), nn.Sequential(conv, *rest)
                    )
        return model.to(memory_format=torch.channels_last)


class Encoder(nn.Module):
    """Normalised pictures with masks before (N,8,H,W) -> maps at 1/2 .. 1/32, from random weights."""

    def __init__(self, c: SegmenterConfig) -> None:
        super().__init__()
        self.channels = c.widths
        self.down, self.stages = nn.ModuleList(), nn.ModuleList()
        before = 3 + len(LABELS)
        for i, (width, depth) in enumerate(zip(c.widths, c.depths, strict=True)):
            self.down.append(conv_bn(before, width, 3 if i < 2 else 2, stride=2, act=i < 2))
            last = i == len(c.widths) - 1
            self.stages.append(
                whole(c, depth) if last else nn.Sequential(*blocks(width, c.expansion if i else 2, depth))
            )
            before = width

    def forward(self, x: Tensor, image: Tensor) -> list[Tensor]:
        maps = []
        for down, stage in zip(self.down, self.stages, strict=True):
            x = stage(down(x))
            maps.append(x)
        return maps


class Beside(nn.Module):
    """As `Encoder`: a pretrained trunk, which sees the picture (N,3,H,W) in [0,1] alone, and beside it strided
    convolutions of picture and masks before. Their maps are stacked, at 1/32 mixed and looked at as a whole."""

    def __init__(self, c: SegmenterConfig) -> None:
        super().__init__()
        self.trunk = MobileTrunk(landmarks=False)
        seen = (*FINE, *COARSE)
        self.thin = nn.ModuleList()
        for i, (before, width) in enumerate(zip((3 + len(LABELS), *THIN), THIN, strict=False)):
            self.thin.append(conv_bn(before, width, 3 if i < 2 else 2, stride=2))
        self.channels = (THIN[0], *(a + b for a, b in zip(THIN[1:], seen, strict=True)))
        self.mix = conv_bn(self.channels[-1], c.widths[-1], 1)
        self.whole = whole(c, c.depths[-1])

    def forward(self, x: Tensor, image: Tensor) -> list[Tensor]:
        maps = []
        for thin in self.thin:
            x = thin(x)
            maps.append(x)
        maps[1:] = [torch.cat([a, b], 1) for a, b in zip(maps[1:], self.trunk.maps(image), strict=True)]
        maps[-1] = self.whole(self.mix(maps[-1]))
        return maps


def blocks(width: int, expansion: int, depth: int) -> list[nn.Module]:
    """So many blocks."""
    return [Block(width, expansion) for _ in range(depth)]


def whole(c: SegmenterConfig, depth: int) -> nn.Sequential:
    """Blocks at 1/32, each after a look at the whole picture."""
    layers: list[nn.Module] = []
    for block in blocks(c.widths[-1], c.expansion, depth):
        layers += [Attention(c.widths[-1], c.heads), block] if c.heads else [block]
    return nn.Sequential(*layers)


def conv_bn(inputs: int, outputs: int, size: int, stride: int = 1, groups: int = 1, act: bool = True) -> nn.Sequential:
    """Convolution without bias, batch normalisation, and ReLU if `act`."""
    padding = (size - 1) // 2
    conv = nn.Conv2d(inputs, outputs, size, stride, padding, groups=groups, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    if groups > 1:
        nn.init.normal_(conv.weight, std=(2.0 / size**2) ** 0.5)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), *([nn.ReLU(inplace=True)] if act else []))


class Block(nn.Module):
    """x + narrow(relu(widen(depthwise 5x5 of x))). It begins as the identity."""

    def __init__(self, width: int, expansion: int) -> None:
        super().__init__()
        self.spread = conv_bn(width, width, 5, groups=width, act=False)
        self.widen = conv_bn(width, expansion * width, 1)
        self.narrow = conv_bn(expansion * width, width, 1, act=False)
        nn.init.zeros_(self.narrow[1].weight)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.narrow(self.widen(self.spread(x)))


class Attention(nn.Module):
    """x + self-attention over all places (Vaswani et al., NeurIPS 2017). Places are told apart by a depthwise
    convolution (Chu et al., ICLR 2023, conditional positional encoding), so that any picture size works.

    Queries and keys have unit length and each head a learnt sharpness of at most `SHARPEST` (Dehghani et al., ICML
    2023), which bounds the logits. Free, they grow to hundreds in training; the attention is then saturated, and fused
    kernels that compute exp(-log sum exp) overflow where all logits of a query are below -88."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.place = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.sharpness = nn.Parameter(torch.full((heads, 1, 1), (width / heads) ** 0.5))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.place(x)
        n, c, h, w = x.shape
        tokens = self.norm(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).reshape(n, h * w, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q = F.normalize(q.float(), dim=-1) * self.sharpness.clamp(0.0, SHARPEST)
        k = F.normalize(k.float(), dim=-1)
        seen = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, scale=1.0)
        seen = seen.transpose(1, 2).reshape(n, h * w, c)
        return x + self.out(seen).transpose(1, 2).reshape(n, c, h, w)


class Context(nn.Module):
    """Channels gated by the mean over the picture (Hu et al., CVPR 2018); the gates begin at 1."""

    def __init__(self, width: int, reduction: int = 4) -> None:
        super().__init__()
        self.squeeze = nn.Linear(width, width // reduction)
        self.excite = nn.Linear(width // reduction, width)
        nn.init.zeros_(self.excite.weight)
        nn.init.zeros_(self.excite.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate = 2 * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3))))))
        return x * gate[..., None, None]


def segmenter_loss(logits: Tensor, labels: Tensor, dice: float = 1.0, boundary: float = 2.0) -> tuple[Tensor, dict]:
    """Cross-entropy, weighted by class (frequency of the batch to the power -1/2) and towards the edges of labels, plus
    `dice` times one minus the soft intersection over union (Rahman & Wang, ISVC 2016) of the foreground classes: half
    of it per picture over the classes that are there, half over the whole batch, which also counts what is not there.

    logits (N,5,H,W); labels (N,H,W) integers, `IGNORE` where unknown. Returns the loss and detached parts.
    """
    with torch.autocast(logits.device.type, enabled=False):
        return _loss(logits.float(), labels, dice, boundary)


def _loss(logits: Tensor, labels: Tensor, dice: float, boundary: float) -> tuple[Tensor, dict]:
    known = labels != IGNORE
    y = torch.where(known, labels, 0).long()
    classes = torch.arange(logits.shape[1], device=y.device)[:, None, None]
    one_hot = (y[:, None] == classes).float() * known[:, None]
    weight = (one_hot.mean((0, 2, 3)) + 0.005).rsqrt()[y] * (1 + boundary * label_edges(y)) * known
    entropy = (F.cross_entropy(logits, y, reduction="none") * weight).sum() / weight.sum().clamp(min=1.0)
    p = logits.softmax(1) * known[:, None]
    shared, p_area, y_area = ((a[:, 1:]).sum((2, 3)) for a in (p * one_hot, p, one_hot))  # (N,4)
    there = (y_area > 12).float()
    each = shared / (p_area + y_area - shared).clamp(min=1.0)
    each = (each * there).sum() / there.sum().clamp(min=1.0)
    shared, p_area, y_area = shared.sum(0), p_area.sum(0), y_area.sum(0)
    whole = ((shared + 1.0) / (p_area + y_area - shared + 1.0)).mean()
    loss = entropy + dice * (1 - 0.5 * (each + whole))
    return loss, {"entropy": entropy.detach(), "soft_iou": whole.detach()}


def label_edges(labels: Tensor, reach: int = 2) -> Tensor:
    """(N,H,W) 1 within `reach` pixels of another label, else 0. labels (N,H,W) integers."""
    x = labels[:, None].float()
    size = 2 * reach + 1
    return (F.max_pool2d(x, size, 1, reach) != -F.max_pool2d(-x, size, 1, reach)).float()[:, 0]


@torch.no_grad()
def confusion(logits: Tensor, labels: Tensor) -> Tensor:
    """(5,5) float64 counts of pixels, rows true, columns found; add them up over pictures and give them to `iou`."""
    classes = logits.shape[1]
    known = labels != IGNORE
    pair = torch.where(known, labels, 0).long() * classes + logits.argmax(1)
    pair = torch.where(known, pair, classes**2)
    counts = torch.zeros(classes**2 + 1, dtype=torch.float64, device=logits.device)
    counts.scatter_add_(0, pair.flatten(), torch.ones_like(pair.flatten(), dtype=torch.float64))
    return counts[:-1].reshape(classes, classes)


def iou(counts: Tensor) -> Tensor:
    """(5,) intersection over union of each label, nan where neither truth nor answer has it. counts: `confusion`."""
    hit = counts.diagonal()
    return hit / (counts.sum(0) + counts.sum(1) - hit)
