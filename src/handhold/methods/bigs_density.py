"""Adaptive density: more Gaussians where pictures ask for them, none where they are transparent.

After Kerbl et al. (SIGGRAPH 2023, section 5.2), for discs on a surface: what is split moves within its own plane. The
optimiser's moments go along, row by row; a new Gaussian starts with none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .bigs_decoders import Explicit
from .surfels import Free, ObjectBase

SHARE = 0.1  # of the Gaussians are copied or split each time: those that the pictures want moved most
FAINT = 0.05  # opacity below which a Gaussian goes
BIG = 0.6  # scale over the spacing above which a Gaussian is split rather than copied
SHRINK = 1.6  # a split Gaussian's halves are smaller by this much (3DGS)
CAP = 2.0  # at most so many times the Gaussians of the start


@dataclass
class Movement:
    """Mean gradient of the loss in each Gaussian's place in the picture, over the frames that showed it."""

    total: Tensor  # (N,)
    count: Tensor  # (N,)

    @staticmethod
    def of(n: int, device: torch.device) -> Movement:
        return Movement(torch.zeros(n, device=device), torch.zeros(n, device=device))

    @torch.no_grad()
    def add(self, means: Tensor, gradient: Tensor, focal: float) -> None:
        """means, gradient (N,3): camera frame, metres; focal in pixels. One pixel is z / focal metres at depth z."""
        per_pixel = gradient[:, :2].norm(dim=1) * means[:, 2].abs() / focal
        self.total += per_pixel
        self.count += per_pixel > 0

    def mean(self) -> Tensor:
        return self.total / self.count.clamp(min=1)


def select_rows(opt: torch.optim.Optimizer, old: nn.Parameter, index: Tensor, fresh: Tensor) -> nn.Parameter:
    """Put old[index] into the optimiser in the place of `old`, with its moments; those of the rows `fresh` are zero."""
    new = nn.Parameter(old.detach()[index].clone())
    state = opt.state.pop(old, None)
    if state:
        for k, v in state.items():
            if isinstance(v, Tensor) and v.shape == old.shape:
                moved = v[index].clone()
                moved[fresh] = 0
                state[k] = moved
        opt.state[new] = state
    for group in opt.param_groups:
        group["params"] = [new if p is old else p for p in group["params"]]
    return new


def rebuild(
    opt: torch.optim.Optimizer, source: Explicit, base: ObjectBase, start: Tensor, index: Tensor, fresh: Tensor
) -> tuple[ObjectBase, Tensor]:
    """Make row k of everything what row index[k] was; returns the new base and starting colours."""
    for name in Free._fields:
        setattr(source, name, select_rows(opt, getattr(source, name), index, fresh))
    return base.rows(index), start[index]


@torch.no_grad()
def densify(
    opt: torch.optim.Optimizer,
    source: Explicit,
    base: ObjectBase,
    start: Tensor,
    movement: Movement,
    cap: int,
    generator: torch.Generator,
    share: float = SHARE,
) -> tuple[ObjectBase, Tensor]:
    """Prune what is faint, then copy small and split large Gaussians whose place the pictures want changed most.

    A copy and its original share the opacity: 1 - (1 - a)^2 is what the one had, so that the picture stays. At most
    `cap` Gaussians are left. Only observed surface grows.
    """
    opacity = source.opacity.sigmoid()
    keep = opacity > FAINT
    wish = movement.mean() * keep * base.observed[:, 0]
    room = min(max(cap - int(keep.sum()), 0), int(share * len(keep)), int((wish > 0).sum()))
    wanted = wish.argsort(descending=True)[:room]
    kept = keep.nonzero()[:, 0]
    index = torch.cat([kept, wanted])
    fresh = torch.arange(len(index), device=index.device) >= len(kept)
    row = torch.full((len(keep),), -1, device=index.device)
    row[kept] = torch.arange(len(kept), device=index.device)
    twins = torch.cat([row[wanted], torch.arange(len(kept), len(index), device=index.device)])
    base, start = rebuild(opt, source, base, start, index, fresh)
    half = 1 - (1 - source.opacity[twins].sigmoid()).clamp(min=1e-4).sqrt()
    source.opacity[twins] = half.clamp(1e-4, 1 - 1e-4).logit()
    big = source.size[twins].exp().amax(1) > BIG
    step = torch.randn(len(wanted), 2, generator=generator).to(index.device) * source.size[row[wanted]].exp()
    turn = source.spin[row[wanted]]
    inplane = torch.stack([turn.cos() * step[:, 0] - turn.sin() * step[:, 1],
                           turn.sin() * step[:, 0] + turn.cos() * step[:, 1]], -1)  # fmt: skip
    source.offset[twins, :2] += torch.cat([inplane, -inplane]) * 0.5
    source.size[twins[big]] -= torch.tensor(SHRINK).log()
    return base, start
