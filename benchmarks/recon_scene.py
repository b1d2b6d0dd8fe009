"""The truth of benchmarks/recon.py: an analytic object, hand-like occluders, their pictures, and masks made worse.

All lengths are metres. The object is 66 x 100 x 42 mm: a rounded box, a neck, a knob, and an 8 mm deep dent that no
silhouette shows. Its signed distance is exact near the surface but for points opposite an edge, so |sdf| is the
distance of a reconstructed point to the true surface. Pictures are traced at twice the size and averaged.
"""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
import torch
from scipy import ndimage
from skimage import measure
from torch import Tensor

from handhold.geometry.cameras import make_K
from handhold.geometry.meshes import sample_surface
from handhold.geometry.rigid import so3_exp

SIZE, FOCAL, DISTANCE, VIEWS = 256, 600.0, 0.35, 30
BOUND = 0.064  # radius about the origin that holds the object
SKIN, BACKGROUND = (0.80, 0.60, 0.50), 0.16


@dataclass(frozen=True)
class Capsules:
    """Round-ended cylinders: a, b (N,3) ends of the axes, radius (N,)."""

    a: Tensor
    b: Tensor
    radius: Tensor

    def distance(self, x: Tensor) -> Tensor:
        """(P,) signed distance at points (P,3), negative inside."""
        out = torch.full((len(x),), torch.inf)
        for a, b, r in zip(self.a, self.b, self.radius, strict=True):
            along = ((x - a) @ (b - a) / (b - a).square().sum()).clamp(0, 1)
            out = torch.minimum(out, (x - a - along[:, None] * (b - a)).norm(dim=1) - r)
        return out


@dataclass(frozen=True)
class Pictures:
    """What the views show."""

    K: np.ndarray  # (3,3)
    cam_from_object: np.ndarray  # (V,4,4)
    frames: np.ndarray  # (V,H,W,3) uint8
    labels: np.ndarray  # (V,H,W) uint8: 0 background, 1 object, 2 occluder
    hidden: float  # share of the object's silhouette that occluders hide
    seen: np.ndarray  # (P,) bool: which of `points` at least two views show
    points: np.ndarray  # (P,3) spread evenly over the true surface


def object_sdf(x: Tensor) -> Tensor:
    """(P,) signed distance of the object at (P,3)."""
    q = (x - x.new_tensor([0, -0.015, 0])).abs() - x.new_tensor([0.033, 0.035, 0.021]) + 0.008
    box = q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0) - 0.008
    radial, y = x[:, [0, 2]].norm(dim=1) - 0.008, (x[:, 1] - 0.03).abs() - 0.012
    q = torch.stack([radial, y], 1)
    neck = q.clamp(min=0).norm(dim=1) + q.amax(1).clamp(max=0)
    knob = (x - x.new_tensor([0, 0.038, 0])).norm(dim=1) - 0.012
    dent = (x - x.new_tensor([0.012, -0.008, 0.027])).norm(dim=1) - 0.014
    return torch.maximum(torch.minimum(torch.minimum(box, neck), knob), -dent)


def normals(sdf, x: Tensor, step: float = 2e-4) -> Tensor:
    """(P,3) unit gradient by four differences."""
    k = x.new_tensor([[1, -1, -1], [-1, -1, 1], [-1, 1, -1], [1, 1, 1]])
    g = sum(k[i] * sdf(x + step * k[i])[:, None] for i in range(4))
    return g / g.norm(dim=1, keepdim=True).clamp(min=1e-12)


def texture(seed: int):
    """(P,3) -> (P,3) colours: waves 12 to 60 mm long, some of them with sharp edges."""
    g = torch.Generator().manual_seed(seed)
    direction = torch.nn.functional.normalize(torch.randn(3, 6, 3, generator=g), dim=-1)
    length = 0.012 * 5 ** torch.rand(3, 6, generator=g)
    k, phase = direction * (2 * np.pi / length)[..., None], 2 * np.pi * torch.rand(3, 6, generator=g)

    def color(x: Tensor) -> Tensor:
        wave = torch.sin(torch.einsum("pk,cwk->pcw", x, k) + phase)
        wave = torch.cat([wave[..., :4], torch.tanh(6 * wave[..., 4:])], -1)
        return (0.5 + 0.25 * wave.sum(-1) / 6**0.5).clamp(0.05, 0.95)

    return color


def cameras(seed: int, views: int = VIEWS) -> np.ndarray:
    """(V,4,4) cam_from_object, evenly around, turned as a whole and rolled at random; all look near the origin."""
    rng = np.random.default_rng(seed)
    k = np.arange(views) + 0.5
    up, turn = 1 - 2 * k / views, np.pi * (1 + 5**0.5) * k
    eyes = np.stack([np.cos(turn) * np.sqrt(1 - up**2), up, np.sin(turn) * np.sqrt(1 - up**2)], 1)
    eyes = eyes @ so3_exp(torch.from_numpy(rng.normal(0, 1, 3))).numpy().T
    out = np.tile(np.eye(4), (views, 1, 1))
    for pose, eye in zip(out, eyes, strict=True):
        side = np.cross(eye, rng.normal(size=3))
        side /= np.linalg.norm(side)
        pose[:3, :3] = np.stack([side, np.cross(-eye, side), -eye])
        pose[:3, 3] = [*rng.normal(0, 0.003, 2), DISTANCE + rng.normal(0, 0.01)]
    return out


def perturbed(poses: np.ndarray, degrees: float, mm: float, seed: int) -> np.ndarray:
    """Every pose turned about the object's centre by `degrees` and moved by `mm`, each along its own random axis."""
    rng = np.random.default_rng(seed + 1000)
    unit = lambda: (lambda v: v / np.linalg.norm(v, axis=1, keepdims=True))(rng.normal(size=(len(poses), 3)))  # noqa: E731
    out = poses.copy()
    out[:, :3, :3] = poses[:, :3, :3] @ so3_exp(torch.from_numpy(np.radians(degrees) * unit())).numpy()
    out[:, :3, 3] += 1e-3 * mm * unit()
    return out


def grasp(poses: np.ndarray, seed: int) -> list[Capsules]:
    """Per view, in the object's frame: palm, fingers and thumb that rest on the object, a forearm that swings from view
    to view, and in every fourth view another bar in front of the object."""
    rng = np.random.default_rng(seed + 2000)
    side = rng.choice([-1.0, 1.0])
    ends = [((-45, -38, 0), (-45, 14, 0), 13), ((-43, -6, -14), (-8, 2, -29.5), 9)]  # palm, thumb
    for y in (-40, -23, -6, 10):
        knuckle, middle, tip = ((-44, y, 14), (-24, y + rng.normal(0, 2), 29.5), (rng.normal(-4, 4), y, 28.5))
        ends += [(knuckle, middle, 8), (middle, tip, 7.5)]
    out = []
    for i, pose in enumerate(poses):
        swing = np.array([-1, 0.5 * np.sin(1.1 * i), 0.5 * np.cos(0.7 * i)])
        now = [*ends, ((-48, -10, 0), np.array([-48, -10, 0]) + 150 * swing / np.linalg.norm(swing), 17)]
        a, b, r = (np.array([e[k] for e in now], float) * 1e-3 for k in range(3))
        mirror = np.array([1, 1, side])
        a, b = a * mirror, b * mirror
        if i % 4 == 0:
            centre = rng.normal(0, [0.025, 0.025, 0.005]) + [0, 0, DISTANCE - 0.09]
            axis = rng.normal(0, 0.05, 3)
            ab = (np.stack([centre - axis, centre + axis]) - pose[:3, 3]) @ pose[:3, :3]
            a, b, r = np.r_[a, ab[:1]], np.r_[b, ab[1:]], np.r_[r, 0.008]
        out.append(Capsules(*(torch.from_numpy(v).float() for v in (a, b, r))))
    return out


def true_points(count: int, seed: int = 0) -> np.ndarray:
    """(count,3) spread evenly over the true surface: on a 1.2 mm mesh, then along the gradient to the surface."""
    axis = torch.linspace(-BOUND, BOUND, 108)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    v, f, *_ = measure.marching_cubes(object_sdf(x).reshape(108, 108, 108).numpy(), 0.0)
    v = torch.from_numpy(v * float(axis[1] - axis[0]) - BOUND).float()
    p = sample_surface(v, torch.from_numpy(f.astype(np.int64)), count, torch.Generator().manual_seed(seed))[0]
    for _ in range(5):
        p = p - object_sdf(p)[:, None] * normals(object_sdf, p, 5e-5)
    return p.numpy().astype(np.float64)


def trace(sdf, o: Tensor, d: Tensor, near: Tensor, far: Tensor, steps: int = 160) -> Tensor:
    """(N,) distance along o + t d to the surface, inf where there is none before `far`."""
    t, hit = near.clone(), torch.full_like(near, torch.inf)
    alive = torch.arange(len(t))
    for _ in range(steps):
        s = sdf(o + t[alive, None] * d[alive])
        t[alive] += s
        done = s < 1e-5
        hit[alive[done]] = t[alive[done]]
        alive = alive[~done & (t[alive] < far[alive])]
        if not len(alive):
            break
    return hit


def pixel_rays(K: np.ndarray, times: int) -> Tensor:
    """(N,3) unit directions in the camera's frame through the middles of pixels split `times` by `times`."""
    y, x = (np.mgrid[0 : times * SIZE, 0 : times * SIZE] + 0.5) / times
    d = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], np.ones_like(x)], -1)
    return torch.from_numpy(d / np.linalg.norm(d, axis=-1, keepdims=True)).float().reshape(-1, 3)


def depths(o: Tensor, d: Tensor, solid: Capsules | None) -> tuple[Tensor, Tensor]:
    """Distances (N,) of the object and of what hides it, along rays from o (3,); inf where there is none."""
    b = d @ o
    inside = b.square() - (o @ o - BOUND**2)
    index = torch.nonzero(inside > 0)[:, 0]
    root = inside[index].sqrt()
    depth, front = torch.full((2, len(d)), torch.inf)
    depth[index] = trace(object_sdf, o, d[index], -b[index] - root, -b[index] + root)
    if solid is not None:
        front = trace(solid.distance, o, d, torch.full_like(depth, 0.15), torch.full_like(depth, 0.6))
    return depth, front


def pictures(
    seed: int, occluded: bool = False, turning_light: bool = False, samples: int = 20000, views: int = VIEWS
) -> Pictures:
    """Pictures of the object from all sides. The light is fixed to the object (as for a camera that flies about it), or
    to the camera (turning_light: as for an object turned in the hand)."""
    poses = cameras(seed, views)
    K = make_K(FOCAL, FOCAL, SIZE / 2 + 1.5, SIZE / 2 - 2.0)
    color, points = texture(seed), true_points(samples)
    solids = grasp(poses, seed) if occluded else [None] * views
    big = 2 * SIZE
    fine, coarse = pixel_rays(K, 2), pixel_rays(K, 1)
    light = torch.nn.functional.normalize(torch.tensor([0.4, 0.7, 0.6]), dim=0)
    frames, labels, count, silhouette, hidden = [], [], np.zeros(len(points), int), 0, 0
    for pose, solid in zip(poses, solids, strict=True):
        r, t = torch.from_numpy(pose[:3, :3]).float(), torch.from_numpy(pose[:3, 3]).float()
        o, d = -t @ r, fine @ r
        middle = depths(o, coarse @ r, solid)
        depth, _ = depths(o, d, None)
        front = middle[1].reshape(SIZE, 1, SIZE, 1).expand(-1, 2, -1, 2).reshape(-1)
        rgb = torch.full((len(d), 3), BACKGROUND)
        on = torch.nonzero(depth < front)[:, 0]
        p = o + depth[on, None] * d[on]
        toward = light * light.new_tensor([1, -1, -1]) @ r if turning_light else light
        rgb[on] = color(p) * (0.45 + 0.55 * (normals(object_sdf, p) @ toward).clamp(min=0))[:, None]
        hand = torch.nonzero(front < depth)[:, 0]
        if len(hand):
            n = normals(solid.distance, o + front[hand, None] * d[hand])
            rgb[hand] = torch.tensor(SKIN) * (0.5 + 0.5 * (n @ light).clamp(min=0))[:, None]
        frames.append((255 * rgb.reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3)) + 0.5).to(torch.uint8).numpy())
        # a pixel's label is what its middle shows: the majority of four samples is a quarter of a pixel too large
        label = torch.where(middle[1] < middle[0], 2, torch.where(middle[0].isfinite(), 1, 0))
        labels.append(label.reshape(SIZE, SIZE).to(torch.uint8).numpy())
        silhouette += int(depth.isfinite().sum())
        hidden += int((depth.isfinite() & (front < depth)).sum())
        # a point is seen where the picture shows the object at its distance
        q = points @ pose[:3, :3].T + pose[:3, 3]
        at = np.floor(2 * (q[:, :2] / q[:, 2:] * FOCAL + K[:2, 2])).astype(int)
        shown = torch.where(depth < front, depth, torch.inf).reshape(big, big).numpy()[at[:, 1], at[:, 0]]
        count += np.abs(shown - np.linalg.norm(q, axis=1)) < 1.5e-3
    return Pictures(K, poses, np.stack(frames), np.stack(labels), hidden / silhouette, count >= 2, points)


def noisy_labels(labels: np.ndarray, seed: int, jitter: float = 1.5) -> np.ndarray:
    """Labels with borders off by `jitter` px rms along smooth waves, and in every view a bite taken out of the object
    and a false piece added beside it, 3 to 8 px in radius."""
    rng = np.random.default_rng(seed + 3000)
    h, w = labels.shape[1:]
    y, x = np.mgrid[0:h, 0:w].astype(np.float32)
    out = []
    for label in labels:
        shift = ndimage.gaussian_filter(rng.normal(size=(2, h, w)), (0, 5, 5))
        shift = (shift * jitter / shift.std()).astype(np.float32)
        new = cv2.remap(label, x + shift[0], y + shift[1], cv2.INTER_NEAREST)
        edge = np.argwhere((label == 1) & (ndimage.minimum_filter(label, 3) == 0))
        for value in (0, 1):
            cy, cx = edge[rng.integers(len(edge))]
            new[((x - cx) ** 2 + (y - cy) ** 2 < rng.uniform(3, 8) ** 2) & (new != 2)] = value
        out.append(new)
    return np.stack(out)
