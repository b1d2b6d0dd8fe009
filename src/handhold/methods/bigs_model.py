"""All that BIGS optimises in one place, and its pictures: subjects drawn alone or together, in true occlusion order."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ..geometry.rigid import quat_from_matrix, quat_multiply
from ..losses import ssim_within
from ..render import Splatted, splat
from ..shapes.gaussians import Gaussians, concatenate
from ..shapes.sdf_fit import shading
from .bigs_decoders import Values
from .bigs_hands import HandPoses, RestHand, Template, rest_hand
from .crops import View
from .surfels import OBJECT, Free, ObjectBase, ObjectPoses


@dataclass
class Subjects:
    """Object, hands, their poses, and the light. Body 0 is the object, hands follow in the order of `hands`."""

    base: ObjectBase
    object: nn.Module  # gives `Values` of the object's Gaussians
    template: Template | None
    sources: dict[str, nn.Module]  # side -> values of its Gaussians; one module for both sides when shared
    hands: dict[str, HandPoses]
    poses: ObjectPoses
    light: Tensor  # (9,)
    gains: dict[int, Tensor]  # frame -> (3,) logarithms; of frames that teach colours
    start: Tensor  # (N,3) logits of the object's colours on the mesh
    complete: bool = False  # a prior colours what no frame has seen

    def ids(self) -> dict[str, int]:
        return {side: OBJECT + 1 + k for k, side in enumerate(self.hands)}

    def gain(self, frame: int) -> Tensor:
        """(3,) factor of a frame; a held-out one's is between its neighbours'."""
        if frame in self.gains:
            return self.gains[frame].exp()
        taught = np.array(sorted(self.gains))
        if not len(taught):
            return torch.ones_like(self.light[:3])
        before, after = taught[taught < frame], taught[taught > frame]
        near = [*before[-1:], *after[:1]]
        return torch.stack([self.gains[int(k)].detach() for k in near]).mean(0).exp()

    def object_values(self) -> Values:
        """Of the object; what no frame has seen keeps the mesh's colour."""
        v = self.object()
        if self.complete:
            return v
        free = v.free._replace(color=torch.where(self.base.observed, v.free.color, self.start))
        return Values(free, v.bones)

    def rest_hands(self, values: dict[int, Values] | None = None) -> dict[str, RestHand]:
        """side -> Gaussians at rest, each source asked once."""
        values = values if values is not None else self.hand_values()
        return {s: rest_hand(self.template, values[id(self.sources[s])], s, b) for s, b in self.ids().items()}

    def hand_values(self) -> dict[int, Values]:
        return {k: m() for k, m in {id(m): m for m in self.sources.values()}.items()}


@dataclass(frozen=True)
class Drawn:
    """A picture, and where in the camera the object's Gaussians were."""

    out: Splatted
    means: Tensor | None  # (N,3) camera frame, of the object
    bodies: tuple[int, ...]


def draw(
    view: View,
    s: Subjects,
    values: Values | None,
    rest: dict[str, RestHand],
    learn: bool = True,
    move: bool = False,
    bodies: set[int] | None = None,
) -> Drawn | None:
    """Bodies of a frame (`bodies`: those ids alone), lit, in one pass; None when there is none.

    Gradients: of poses with `move`, of all else with `learn` (give detached `values` and `rest` otherwise).
    """
    parts, normals, drawn, means = [], [], [], None
    if values is not None and view.has_object and (bodies is None or OBJECT in bodies):
        offset, quats, scales, opacities, colors = values.free.local(s.base.spacing)
        x, quats = s.base.placed(offset, quats)
        r, t = s.poses.at(view.frame)
        if not move:
            r, t = r.detach(), t.detach()
        means = x @ r.T + t
        ids = torch.full((len(x),), OBJECT, device=x.device)
        quats = quat_multiply(quat_from_matrix(r), quats)
        parts.append(Gaussians(means, quats, scales, opacities, colors, ids))
        normals.append(s.base.rot[..., 2] @ r.detach().T)
        drawn.append(OBJECT)
    for side, body in s.ids().items():
        if side in rest and view.frame in s.hands[side].turn and (bodies is None or body in bodies):
            g, n = rest[side].posed(s.hands[side].posed(view.frame, fixed=not move).bone_transforms)
            parts.append(g)
            normals.append(n)
            drawn.append(body)
    if not parts:
        return None
    g, light, gain = concatenate(parts), s.light, s.gain(view.frame)
    if not learn:
        light, gain = light.detach(), gain.detach()
    colors = g.colors * shading(torch.cat(normals), light)[:, None] * gain
    h, w = view.image.shape[:2]
    camera = torch.eye(4, device=colors.device)[None], view.K[None], w, h
    out = splat(g.means, g.quats, g.scales, g.opacities, colors, *camera, ids=g.ids, n_ids=1 + len(s.hands))
    return Drawn(out, means, tuple(drawn))


def draw_unseen(s: Subjects, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The object alone from a random side: image (size,size,3) on white, and where no frame has seen it (size,size).

    Only the colours of unseen Gaussians have gradients.
    """
    free = s.object().free
    colors = torch.where(s.base.observed, free.color.detach(), free.color)
    offset, quats, scales, opacities, colors = Free(*(x.detach() for x in free[:-1]), colors).local(s.base.spacing)
    x, quats = s.base.placed(offset, quats)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator))[0]
    turn = (turn * torch.linalg.det(turn).sign()).to(x)
    camera = torch.eye(4, device=x.device)
    camera[:3, :3], camera[2, 3] = turn, 5 * s.poses.radius
    camera[:3, 3] -= turn @ s.poses.center
    K = x.new_tensor([[2.2 * size, 0, size / 2], [0, 2.2 * size, size / 2], [0, 0, 1]])
    seen = s.base.observed[:, 0].long()
    white = torch.ones(1, 3, device=x.device)
    shape = x, quats, scales, opacities, colors
    out = splat(*shape, camera[None], K[None], size, size, backgrounds=white, ids=seen, n_ids=2)
    return out.color[0], (out.ids[0, ..., 0] > 0.5).float()


def detached(values: Values | None, rest: dict[str, RestHand]) -> tuple[Values | None, dict[str, RestHand]]:
    """The same without gradients."""
    if values is not None:
        values = Values(Free(*(x.detach() for x in values.free)), None)
    still = {}
    for side, h in rest.items():
        g = h.gaussians
        floats = {k: getattr(g, k).detach() for k in ("means", "quats", "scales", "opacities", "colors")}
        still[side] = replace(h, gaussians=g.with_values(**floats), weights=h.weights.detach())
    return values, still


@dataclass(frozen=True)
class Score:
    """Frames that teach no colour, against their pictures."""

    psnr: float  # dB, pixels labelled object or hand
    psnr_object: float  # dB, the object's pixels alone
    psnr_hands: float
    ssim: float  # mean over the labelled pixels, all others black
    iou: float  # object's visible mask against its label
    frames: int


@torch.no_grad()
def score(views: list[View], s: Subjects, held_out: bool = True) -> Score:
    """Measure the frames that are held out (or, else, those that are not)."""
    error = {"all": [0.0, 0], "object": [0.0, 0], "hands": [0.0, 0]}
    inter = union = 0.0
    similar = []
    values, rest = s.object_values(), s.rest_hands() if s.hands else {}
    for v in views:
        if v.held_out != held_out:
            continue
        drawn = draw(v, s, values, rest)
        if drawn is None:
            continue
        color, shares = drawn.out.color[0].clamp(0, 1), drawn.out.ids[0]
        e = (color - v.image).square().mean(-1)
        body = v.label.sum(-1) > 0
        masks = {"all": body, "object": v.label[..., OBJECT] > 0, "hands": v.label[..., OBJECT + 1 :].sum(-1) > 0}
        for name, where in masks.items():
            error[name][0] += float(e[where].sum())
            error[name][1] += int(where.sum())
        if body.any():
            similar.append(float(ssim_within(color, v.image, body)))
        if v.has_object:
            seen, want, known = shares[..., OBJECT] > 0.5, v.target > 0.5, v.known > 0
            inter += float((seen & want & known).sum())
            union += float(((seen | want) & known).sum())
    db = {k: float(-10 * np.log10(max(e / n, 1e-12))) if n else float("nan") for k, (e, n) in error.items()}
    share = float(np.mean(similar)) if similar else float("nan")
    return Score(db["all"], db["object"], db["hands"], share, inter / max(union, 1.0), len(similar))


@torch.no_grad()
def mean_light(views: list[View], s: Subjects) -> Tensor:
    """(3,) factor by which light and gain brighten what the frames show of the object, on average."""
    factor = []
    for v in views:
        if v.has_object:
            r, t = s.poses.at(v.frame)
            normal = s.base.rot[..., 2] @ r.T
            facing = ((normal * (s.base.points @ r.T + t)).sum(-1) < 0) & s.base.observed[:, 0]
            if facing.any():
                factor.append(shading(normal[facing], s.light).mean() * s.gain(v.frame))
    return torch.stack(factor).mean(0) if factor else torch.ones_like(s.light[:3])
