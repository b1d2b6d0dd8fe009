"""What the segmenter sees in training beside the generator's pictures: other views of them, and spoilt masks of a frame
before. All of it batched on the pictures' device; what is random is drawn from a CPU generator, so that a step gives
the same pictures everywhere.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..datasets.synthetic.sample import BACKGROUND, FOREARM, LABELS, LEFT, OBJECT, RIGHT

_CLASSES = len(LABELS)


def _exact(function):
    """No gradients, and float32 also inside autocast: coordinates of pixels do not fit in bfloat16."""

    @functools.wraps(function)
    def wrapped(x: Tensor, *args, **kwargs):
        with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            return function(x, *args, **kwargs)

    return wrapped


class _Draw:
    """Random tensors from a CPU generator, on another device."""

    def __init__(self, generator: torch.Generator, device: torch.device) -> None:
        self.generator, self.device = generator, device

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return (low + (high - low) * torch.rand(shape, generator=self.generator)).to(self.device, non_blocking=True)

    def normal(self, *shape: int, sigma: float = 1.0) -> Tensor:
        return (sigma * torch.randn(shape, generator=self.generator)).to(self.device, non_blocking=True)

    def chance(self, *shape: int, p: float) -> Tensor:
        return (torch.rand(shape, generator=self.generator) < p).to(self.device, non_blocking=True)

    def integer(self, *shape: int, high: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator).to(self.device, non_blocking=True)


@_exact
def augment(
    image: Tensor,
    labels: Tensor,
    generator: torch.Generator,
    size: tuple[int, int] | None = None,
    zoom: tuple[float, float] = (0.5, 2.0),
) -> tuple[Tensor, Tensor]:
    """Another view of each picture: zoom, shift towards what is held, turn, stretch, mirror, things in front, colour.

    image (N,3,H,W) sRGB in [0,1], labels (N,H,W) -> the same of `size` (height, width; that of the picture unless
    given). A mirrored right hand is a left hand: labels follow, also in what is seen beyond the picture's border, where
    it is continued by reflection. Things in front (nobody holds them) are background.
    """
    n, _, h, w = image.shape
    out_h, out_w = size or (h, w)
    draw = _Draw(generator, image.device)
    scale = torch.exp(-draw.uniform(n, low=math.log(zoom[0]), high=math.log(zoom[1])))
    stretch = torch.exp(draw.normal(n, sigma=0.08)).clamp(0.8, 1.25)
    any_turn = draw.chance(n, p=0.15)
    angle = torch.where(any_turn, draw.uniform(n, low=-math.pi, high=math.pi), draw.normal(n, sigma=0.25))
    mirror = torch.where(draw.chance(n, p=0.5), -1.0, 1.0)
    aspect = (out_w / out_h) / (w / h)
    sx, sy = scale * stretch * max(aspect, 1.0), scale / stretch * max(1 / aspect, 1.0)
    cos, sin = torch.cos(angle), torch.sin(angle)
    # towards the middle of hands and object, the more the closer the view; and somewhat off it
    held = (labels > 0) & (labels != FOREARM)
    mass = held.sum((1, 2)).clamp(min=1)
    xs, ys = (torch.linspace(-1 + 1 / k, 1 - 1 / k, k, device=image.device) for k in (w, h))
    middle = torch.stack([(held * xs).sum((1, 2)) / mass, (held * ys[:, None]).sum((1, 2)) / mass], -1)
    pull = draw.uniform(n) * (1.3 - scale).clamp(0.2, 1.0)
    center = middle * pull[:, None] + draw.normal(n, 2, sigma=0.25)
    ratio = w / h  # the turn is one of pixels
    theta = torch.stack(
        [
            torch.stack([cos * sx * mirror, -sin * sy / ratio, center[:, 0]], -1),
            torch.stack([sin * sx * ratio * mirror, cos * sy, center[:, 1]], -1),
        ],
        1,
    )
    grid = F.affine_grid(theta, [n, 1, out_h, out_w], align_corners=False)
    picture = F.grid_sample(image.float(), grid, padding_mode="reflection", align_corners=False)
    label = F.grid_sample(labels[:, None].float(), grid, "nearest", "reflection", align_corners=False)[:, 0]
    label = label.round().to(labels.dtype)
    reflections = torch.floor((grid + 1) / 2).sum(-1)
    swapped = (reflections.remainder(2) > 0.5) ^ (mirror < 0)[:, None, None]
    label = torch.where(swapped, mirrored_labels(label), label)
    picture, label = _things_in_front(picture, label, draw)
    return _colors(picture, draw), label


def mirrored_labels(labels: Tensor) -> Tensor:
    """What labels become where a picture is seen in a mirror: right and left change places. labels: integers."""
    return torch.where(labels == RIGHT, LEFT, torch.where(labels == LEFT, RIGHT, labels)).to(labels.dtype)


def _things_in_front(image: Tensor, labels: Tensor, draw: _Draw, count: int = 2) -> tuple[Tensor, Tensor]:
    n, _, h, w = image.shape
    there = draw.chance(n, count, p=0.15)
    shapes = _blobs(draw, n, count, h, w, 0.05, 0.22) & there[..., None, None]
    tint, mix = draw.uniform(n, count, 3), draw.uniform(n, count, low=0.2)
    other = image.roll(1, 0)
    for k in range(count):
        m = shapes[:, k, None]
        paint = torch.lerp(other, tint[:, k, :, None, None].expand_as(image), mix[:, k, None, None, None])
        image = torch.where(m, paint, image)
        labels = torch.where(m[:, 0], BACKGROUND, labels).to(labels.dtype)
    return image, labels


def _colors(x: Tensor, draw: _Draw) -> Tensor:
    """Gain, contrast, white balance, saturation, gamma, a little blur and noise."""
    n = len(x)
    strong = torch.where(draw.chance(n, 1, 1, 1, p=0.3), 2.0, 1.0)
    gain = torch.exp(draw.normal(n, 1, 1, 1, sigma=0.15) * strong)
    balance = torch.exp(draw.normal(n, 3, 1, 1, sigma=0.05) * strong)
    contrast = torch.exp(draw.normal(n, 1, 1, 1, sigma=0.12) * strong)
    saturation = torch.exp(draw.normal(n, 1, 1, 1, sigma=0.2) * strong) * ~draw.chance(n, 1, 1, 1, p=0.04)
    gamma = torch.exp(draw.normal(n, 1, 1, 1, sigma=0.12) * strong)
    x = x.clamp(0, 1) ** gamma * gain * balance
    x = (x - 0.5) * contrast + 0.5
    gray = x.mean(1, keepdim=True)
    x = gray + (x - gray) * saturation
    soft = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
    x = torch.lerp(x, soft, draw.uniform(n, 1, 1, 1) * draw.chance(n, 1, 1, 1, p=0.3))
    # noise of a generator seeded by ours: drawn where the pictures are
    seed = int(torch.randint(2**31 - 1, (), generator=draw.generator))
    noise = torch.randn(x.shape, device=x.device, generator=torch.Generator(x.device).manual_seed(seed))
    return (x + noise * draw.uniform(n, 1, 1, 1, high=0.03)).clamp(0, 1)


@_exact
def corrupt_previous(labels: Tensor, generator: torch.Generator, none: float = 0.5) -> Tensor:
    """Masks of a frame before, moved into this one, as `segment_clip` would have them when the network errs: from the
    true labels (N,H,W) of this frame to probabilities (N,5,H,W) float32, zeros where nothing is known.

    With probability `none` there are none. Else they are shifted and bent, swollen or shrunk, blurred, eaten and leaked
    by smooth noise; right and left may be exchanged, labels dropped or taken for others, blobs wrong or unknown, unsure
    places unknown, and sometimes they are of another picture altogether.
    """
    n, h, w = labels.shape
    draw = _Draw(generator, labels.device)
    severity = draw.uniform(n, high=1.5)
    column = severity[:, None, None, None]
    sampled = _bent(labels, draw, severity)
    x = F.one_hot(sampled, _CLASSES).permute(0, 3, 1, 2).float()
    x = torch.einsum("nij,njhw->nihw", _confused(draw, n), x)
    soft, softer = (F.avg_pool2d(x, k, 1, k // 2, count_include_pad=False) for k in (3, 9))
    x = torch.lerp(soft, softer, draw.uniform(n, 1, 1, 1))
    gain = draw.uniform(n, 1, 1, 1, low=2.0, high=7.0)
    wide, fine = (
        F.interpolate(draw.normal(n, _CLASSES, k, k), (h, w), mode="bilinear", align_corners=False) for k in (6, 24)
    )
    noise = 0.35 * wide + 0.25 * fine + draw.normal(n, _CLASSES, 1, 1, sigma=0.35)
    p = (gain * (2 * x - 1 + column * noise)).softmax(1)
    # blobs of which nothing is known (flow that does not return), and blobs that are wrong
    blobs = _blobs(draw, n, 4, h, w, 0.02, 0.15)
    unknown = (blobs[:, :2] & draw.chance(n, 2, 1, 1, p=0.35)).any(1, keepdim=True)
    for k in (2, 3):
        wrong = blobs[:, k, None] & draw.chance(n, 1, 1, 1, p=0.25)
        what = F.one_hot(draw.integer(n, high=_CLASSES), _CLASSES)[:, :, None, None].float()
        p = torch.where(wrong, 0.1 * p + 0.9 * what, p)
    unsure = (p.amax(1, keepdim=True) < draw.uniform(n, 1, 1, 1, low=0.4, high=0.8)) & draw.chance(n, 1, 1, 1, p=0.3)
    p = p * ~(unknown | unsure)
    p = torch.where(draw.chance(n, 1, 1, 1, p=0.03), p.roll(1, 0), p)
    return p * ~draw.chance(n, 1, 1, 1, p=none)


def _bent(labels: Tensor, draw: _Draw, severity: Tensor) -> Tensor:
    """Labels after a small similarity and a smooth bending, (N,H,W) int64; background comes in from outside."""
    n, h, w = labels.shape
    angle = draw.normal(n, sigma=0.05) * severity
    scale = torch.exp(draw.normal(n, sigma=0.04) * severity)
    cos, sin = torch.cos(angle) * scale, torch.sin(angle) * scale
    shift = draw.normal(n, 2, sigma=0.03) * severity[:, None]
    theta = torch.stack([torch.stack([cos, -sin, shift[:, 0]], -1), torch.stack([sin, cos, shift[:, 1]], -1)], 1)
    grid = F.affine_grid(theta, [n, 1, h, w], align_corners=False)
    bend = draw.normal(n, 2, 6, 6, sigma=0.025) * severity[:, None, None, None]
    bend = F.interpolate(bend, (h, w), mode="bicubic", align_corners=False).permute(0, 2, 3, 1)
    x = torch.where(labels < _CLASSES, labels, BACKGROUND)
    return F.grid_sample(x[:, None].float(), grid + bend, "nearest", "zeros", align_corners=False)[:, 0].round().long()


def _confused(draw: _Draw, n: int) -> Tensor:
    """(N,5,5) columns of what each label is taken for: itself, mostly."""
    to = torch.arange(_CLASSES, device=draw.device).expand(n, -1).clone()
    for label, other, p in (
        (FOREARM, OBJECT, 0.04),
        (OBJECT, FOREARM, 0.04),
        (FOREARM, RIGHT, 0.03),
        (FOREARM, LEFT, 0.03),
        (OBJECT, BACKGROUND, 0.10),
        (RIGHT, BACKGROUND, 0.06),
        (LEFT, BACKGROUND, 0.06),
        (FOREARM, BACKGROUND, 0.08),
    ):
        to[:, label] = torch.where(draw.chance(n, p=p), other, to[:, label])
    swap = draw.chance(n, p=0.12)[:, None]
    both = torch.where(draw.chance(n, p=0.06)[:, None], to[:, [0, 2, 2, 3, 4]], to)  # two hands taken for one side's
    to = torch.where(swap, mirrored_labels(to), both)
    return F.one_hot(to, _CLASSES).transpose(1, 2).float()


def _blobs(draw: _Draw, n: int, count: int, h: int, w: int, small: float, large: float) -> Tensor:
    """(N,count,H,W) bool: turned ellipses and boxes, semi-axes a share of the longer side."""
    side = max(h, w)
    y = ((torch.arange(h, device=draw.device) + 0.5) / side)[:, None]
    x = (torch.arange(w, device=draw.device) + 0.5) / side
    at = draw.uniform(n, count, 2)[..., None, None]
    a, b = (draw.uniform(n, count, 1, 1, low=small, high=large) for _ in range(2))
    turn = draw.uniform(n, count, 1, 1, high=math.pi)
    dx, dy = x - at[:, :, 0] * w / side, y - at[:, :, 1] * h / side
    u, v = (torch.cos(turn) * dx + torch.sin(turn) * dy) / a, (torch.cos(turn) * dy - torch.sin(turn) * dx) / b
    return torch.where(draw.chance(n, count, 1, 1, p=0.5), torch.maximum(u.abs(), v.abs()), u * u + v * v) < 1
