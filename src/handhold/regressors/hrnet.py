"""HRNet as an image classifier's trunk (Wang et al., "Deep High-Resolution Representation Learning for Visual
Recognition", TPAMI 2021, section 3 and appendix A; Sun et al., CVPR 2019), the backbone of METRO and Mesh Graphormer.

Four resolutions side by side that exchange features after every module, then a head that gathers them from fine to
coarse. Parameter names are those of the public ImageNet weights, so that they load as they are.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class HRNetConfig:
    """Sizes; the defaults are HRNet-W64. `width` is that of the finest branch, each coarser one has twice as many."""

    width: int = 64
    stem: int = 64
    blocks: int = 4  # residual blocks per branch and module, and of the first stage
    modules: tuple[int, int, int] = (1, 4, 3)  # of stages 2, 3 and 4, with 2, 3 and 4 branches
    head: tuple[int, int, int, int] = (32, 64, 128, 256)  # inner widths of the head; it gives out four times as many
    features: int = 2048


def _bn(n: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(n)


def _conv(a: int, b: int, kernel: int = 3, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(a, b, kernel, stride, kernel // 2, bias=False)


def _conv_bn(a: int, b: int, kernel: int = 3, stride: int = 1, relu: bool = True) -> nn.Sequential:
    return nn.Sequential(_conv(a, b, kernel, stride), _bn(b), *([nn.ReLU()] if relu else []))


class Basic(nn.Module):
    """Two 3x3 convolutions and the identity (He et al., CVPR 2016, figure 5, left)."""

    def __init__(self, n: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(n, n), _bn(n)
        self.conv2, self.bn2 = _conv(n, n), _bn(n)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x + self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x))))))


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions and the identity, or a 1x1 convolution where widths differ (figure 5, right)."""

    def __init__(self, a: int, n: int):
        super().__init__()
        self.conv1, self.bn1 = _conv(a, n, 1), _bn(n)
        self.conv2, self.bn2 = _conv(n, n), _bn(n)
        self.conv3, self.bn3 = _conv(n, 4 * n, 1), _bn(4 * n)
        self.downsample = None if a == 4 * n else _conv_bn(a, 4 * n, 1, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return F.relu(y + (x if self.downsample is None else self.downsample(x)))


class Exchange(nn.Module):
    """One module: residual blocks in every branch, then every branch adds up all others at its own resolution."""

    def __init__(self, widths: tuple[int, ...], blocks: int):
        super().__init__()
        self.branches = nn.ModuleList(nn.Sequential(*(Basic(w) for _ in range(blocks))) for w in widths)
        self.fuse_layers = nn.ModuleList(
            nn.ModuleList(self._path(widths, source, target) for source in range(len(widths)))
            for target in range(len(widths))
        )

    @staticmethod
    def _path(widths: tuple[int, ...], source: int, target: int) -> nn.Module:
        a, b = widths[source], widths[target]
        if source == target:
            return nn.Identity()
        if source > target:
            return nn.Sequential(*_conv_bn(a, b, 1, relu=False), nn.Upsample(scale_factor=2 ** (source - target)))
        steps = range(target - source)
        return nn.Sequential(*(_conv_bn(a, b if k == steps[-1] else a, stride=2, relu=k != steps[-1]) for k in steps))

    def forward(self, xs: list[Tensor]) -> list[Tensor]:
        xs = [branch(x) for branch, x in zip(self.branches, xs, strict=True)]
        out = []
        for paths in self.fuse_layers:
            total = paths[0](xs[0])
            for path, x in zip(paths[1:], xs[1:], strict=True):
                total = total + path(x)
            out.append(F.relu(total))
        return out


class HRNet(nn.Module):
    """Images (N,3,H,W), normalised, H and W multiples of 32 -> (pooled features (N,features), the head's last map
    (N,4 head[-1],H/32,W/32))."""

    def __init__(self, config: HRNetConfig):
        super().__init__()
        self.config = config
        stem, first = config.stem, 4 * config.stem
        self.conv1, self.bn1 = _conv(3, stem, stride=2), _bn(stem)
        self.conv2, self.bn2 = _conv(stem, stem, stride=2), _bn(stem)
        self.layer1 = nn.Sequential(
            Bottleneck(stem, stem), *(Bottleneck(first, stem) for _ in range(config.blocks - 1))
        )
        w = tuple(config.width * 2**k for k in range(4))
        self.transition1 = nn.ModuleList([_conv_bn(first, w[0]), nn.Sequential(_conv_bn(first, w[1], stride=2))])
        self.stage2 = self._stage(w[:2], config.modules[0])
        self.transition2 = self._widen(w[:3])
        self.stage3 = self._stage(w[:3], config.modules[1])
        self.transition3 = self._widen(w[:4])
        self.stage4 = self._stage(w, config.modules[2])
        out = tuple(4 * n for n in config.head)
        self.incre_modules = nn.ModuleList(nn.Sequential(Bottleneck(a, n)) for a, n in zip(w, config.head, strict=True))
        self.downsamp_modules = nn.ModuleList(
            nn.Sequential(nn.Conv2d(a, b, 3, 2, 1), _bn(b), nn.ReLU()) for a, b in zip(out[:-1], out[1:], strict=True)
        )
        self.final_layer = nn.Sequential(nn.Conv2d(out[-1], config.features, 1), _bn(config.features), nn.ReLU())

    def _stage(self, widths: tuple[int, ...], modules: int) -> nn.Sequential:
        return nn.Sequential(*(Exchange(widths, self.config.blocks) for _ in range(modules)))

    @staticmethod
    def _widen(widths: tuple[int, ...]) -> nn.ModuleList:
        new = nn.Sequential(_conv_bn(widths[-2], widths[-1], stride=2))
        return nn.ModuleList([*(nn.Identity() for _ in widths[:-1]), new])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.bn1(self.conv1(x)))
        x = F.relu(self.bn2(self.conv2(x)))
        x = self.layer1(x)
        xs = self.stage2([t(x) for t in self.transition1])
        for transition, stage in ((self.transition2, self.stage3), (self.transition3, self.stage4)):
            xs = stage([t(x) for t, x in zip(transition, [*xs, xs[-1]], strict=True)])
        y = self.incre_modules[0](xs[0])
        for gather, down, x in zip(self.incre_modules[1:], self.downsamp_modules, xs[1:], strict=True):
            y = gather(x) + down(y)
        return self.final_layer(y).mean((2, 3)), y
