"""Frames that structure from motion could not place, registered against the model that the placed frames made.

Silhouette and colour of the rendered signed-distance grid against the frame, from several starts next to the nearest
placed frames, forwards and backwards in time. A frame is accepted only when it fits about as well as placed frames do
and turns about as fast: on a nearly symmetric thing a wrong turn fits too.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from ..geometry.rigid import nearest_rotation, so3_exp
from ..shapes.sdf_fit import compose, object_rays, render_band, shading
from ._sfm_refine import plausible
from .object import ObjectField, Observations, visible_pixels

_SAMPLES = 16  # per ray
_SPREAD = 0.25  # radians of the random starts around a neighbour's pose
_TURN = 15.0  # degrees per frame that no frame is refused for


def register_missing(
    field: ObjectField,
    obs: Observations,
    cam_from_object: np.ndarray,
    starts: int = 8,
    iterations: int = 60,
    rays: int = 384,
    seed: int = 0,
    progress: Callable[[float, str], None] | None = None,
    hints: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Fill NaN poses where possible: poses (F,4,4), and the error (F,) of each newly placed frame, else NaN.

    hints (F,4,4), NaN where none: poses that something else suggests, tried beside the neighbours'.
    """
    poses = cam_from_object.copy()
    error = np.full(len(poses), np.nan)
    visible = obs.inside.reshape(len(poses), -1).sum(1) > 150
    todo = [int(i) for i in np.flatnonzero(~np.isfinite(poses[:, 0, 0]) & visible)]
    placed = np.flatnonzero(np.isfinite(poses[:, 0, 0]))
    if not todo or len(placed) < 3:
        return poses, error
    # the same measure on placed frames says what a good fit is
    reference = [
        fit_frame(field, obs, int(i), poses[i][None], 0, rays, seed)[1] for i in placed[:: max(1, len(placed) // 8)]
    ]
    bar = 1.4 * float(np.median(reference)) + 0.01
    turn = _fastest(poses)
    rng = np.random.default_rng(seed)
    tries = dict.fromkeys(todo, 0)
    total = len(todo)
    waiting = set(todo)  # frames worth a try now; a newly placed neighbour gives a frame a second one
    while waiting:
        known = np.flatnonzero(np.isfinite(poses[:, 0, 0]))
        i = min(waiting, key=lambda k: (int(np.abs(known - k).min()), k))
        waiting.discard(i)
        tries[i] += 1
        tried = _starts(poses, known, i, starts, field.center, rng, None if hints is None else hints[i])
        pose, e = fit_frame(field, obs, i, tried, iterations, rays, seed, lambda p, i=i: plausible(i, p, poses, turn))
        if e < bar:
            poses[i], error[i] = pose, e
            waiting |= {k for k in (i - 1, i + 1) if tries.get(k) == 1 and not np.isfinite(error[k])}
        if progress:
            progress(min(sum(tries.values()) / total, 1.0), f"registering frame {i}")
    return poses, error


def _fastest(poses: np.ndarray) -> float:
    """Degrees per frame that a new frame may turn: twice what all but the fastest tenth of the placed ones do."""
    step = poses[1:, :3, :3] @ poses[:-1, :3, :3].transpose(0, 2, 1)
    step = step[np.isfinite(step[:, 0, 0])]
    if not len(step):
        return 2 * _TURN
    cosine = (np.trace(step, axis1=1, axis2=2) - 1) / 2
    return max(_TURN, 2 * float(np.degrees(np.quantile(np.arccos(np.clip(cosine, -1, 1)), 0.9))))


def _starts(
    poses: np.ndarray, known: np.ndarray, i: int, count: int, center: np.ndarray, rng, hint: np.ndarray | None
) -> np.ndarray:
    """(N,4,4) hypotheses: the hint, the nearest placed frames' poses, constant velocity, random turns of these."""
    before, after = known[known < i][-2:], known[known > i][:2]
    out = [poses[before[-1]]] if len(before) else []
    out += [poses[after[0]]] if len(after) else []
    for pair in (before[::-1], after):
        if len(pair) == 2 and abs(int(pair[0]) - int(pair[1])) <= 2:
            step = poses[pair[0]] @ np.linalg.inv(poses[pair[1]])
            out.append(step @ poses[pair[0]])
    if hint is not None and np.isfinite(hint).all():
        out.insert(0, hint)
    base = list(out)
    while len(out) < count:
        turn = so3_exp(torch.from_numpy(rng.normal(0, _SPREAD, 3))).numpy()
        delta = np.eye(4)
        delta[:3, :3], delta[:3, 3] = turn, center - turn @ center
        out.append(base[len(out) % len(base)] @ delta)
    return np.stack(out)


def fit_frame(
    field: ObjectField,
    obs: Observations,
    i: int,
    starts: np.ndarray,
    iterations: int,
    rays: int,
    seed: int,
    allowed: Callable[[np.ndarray], bool] = lambda pose: True,
) -> tuple[np.ndarray, float]:
    """Best pose (4,4) of several starts for one frame among those allowed, and its error; infinite where none is."""
    pixels = visible_pixels(obs, np.array([i]))
    generator = torch.Generator().manual_seed(seed + i)
    n = len(starts)
    base, center = torch.from_numpy(starts).float(), torch.from_numpy(field.center).float()
    # every hypothesis first puts the object's centre where the mask is
    y, x = np.nonzero(obs.inside[i])
    ray = torch.from_numpy(np.linalg.solve(obs.K, [x.mean() + 0.5, y.mean() + 0.5, 1.0])).float()
    if iterations:
        at = (base[:, :3, :3] @ center[:, None])[..., 0] + base[:, :3, 3]
        base[:, :3, 3] += 0.7 * (ray * at[:, 2:] - at)
    xi = torch.zeros(n, 6, requires_grad=True)
    opt = torch.optim.Adam([xi], lr=2e-2, betas=(0.9, 0.98))

    def errors(beta: float) -> torch.Tensor:
        pick = torch.randint(len(pixels.view), (rays,), generator=generator).repeat(n)
        f = torch.arange(n).repeat_interleave(rays)
        pose = compose(base, xi, center, field.radius)
        o, d = object_rays(pose, f, pixels.direction[pick])
        rgb, acc, normal = render_band(field.grid, o, d, pixels.limit[pick], beta, _SAMPLES, generator)
        shade = shading((pose[f, :3, :3] @ normal[..., None])[..., 0], field.light)
        label = pixels.label[pick]
        seen, known = label.clamp(min=0), label >= 0
        e = (rgb * shade[:, None] - pixels.color[pick]).abs().mean(-1) * seen
        e = e + 0.2 * F.binary_cross_entropy(acc.clamp(1e-2, 1 - 1e-2), seen, reduction="none") * known
        return e.reshape(n, rays).mean(1)

    for k in range(iterations):
        share = k / iterations
        opt.param_groups[0]["lr"] = 2e-2 * 0.05**share
        errors(field.grid.h * 3.0 * 0.25**share).sum().backward()
        opt.step()
        opt.zero_grad()
        field.grid.zero_grad()
    with torch.no_grad():
        final = torch.stack([errors(0.75 * field.grid.h) for _ in range(4)]).mean(0)
        poses = compose(base, xi, center, field.radius).double()
        poses[:, :3, :3] = nearest_rotation(poses[:, :3, :3])
    for k in final.argsort().tolist():
        if allowed(poses[k].numpy()):
            return poses[k].numpy(), float(final[k])
    return starts[0], np.inf
