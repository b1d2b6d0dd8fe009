"""Cameras around an object, and pictures of spheres and boxes computed ray by ray: truths for the object's tests."""

from __future__ import annotations

import numpy as np

from handhold.geometry.cameras import make_K, pixel_centres

WIDTH, HEIGHT = 96, 72
K = make_K(110.0, 110.0, 47.0, 37.0)


def looking(eye: np.ndarray, roll: float = 0.0) -> np.ndarray:
    """(4,4) cam_from_object of a camera at `eye` that looks at the origin."""
    z = -eye / np.linalg.norm(eye)
    x = np.cross(z, [np.sin(roll), 0.1, np.cos(roll)])
    x /= np.linalg.norm(x)
    r = np.stack([x, np.cross(z, x), z])
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = r, -r @ eye
    return out


def around(count: int, distance: float, front: bool = False) -> np.ndarray:
    """(count,4,4) cameras spread evenly over a sphere, or over the half with x > 0."""
    k = np.arange(count) + 0.5
    up, turn = 1 - 2 * k / count, np.pi * (1 + 5**0.5) * k
    flat = np.sqrt(1 - up**2)
    eyes = np.stack([np.cos(turn) * flat, np.sin(turn) * flat, up], 1)
    if front:
        eyes = np.stack([np.abs(up) * 0.5 + 0.5, eyes[:, 0] * 0.6, eyes[:, 1] * 0.6], 1)
        eyes /= np.linalg.norm(eyes, axis=1, keepdims=True)
    return np.stack([looking(distance * e) for e in eyes])


def rays(pose: np.ndarray, K=K, width: int = WIDTH, height: int = HEIGHT) -> tuple[np.ndarray, np.ndarray]:
    """Origin (3,) and directions (H,W,3) in the object's frame; a direction's component along the optical axis is 1."""
    xy = (pixel_centres(width, height) - K[:2, 2]) / K[[0, 1], [0, 1]]
    d = np.concatenate([xy, np.ones((height, width, 1))], -1)
    return -pose[:3, :3].T @ pose[:3, 3], d @ pose[:3, :3]


def sphere_depth(pose: np.ndarray, radius: float, centre=(0.0, 0.0, 0.0), **camera) -> np.ndarray:
    """(H,W) depth of a sphere, inf beside it."""
    o, d = rays(pose, **camera)
    o = o - np.asarray(centre)
    a, b, c = (d * d).sum(-1), d @ o, o @ o - radius**2
    root = b * b - a * c
    return np.where(root > 0, (-b - np.sqrt(np.maximum(root, 0))) / a, np.inf)


def box_depth(pose: np.ndarray, half: np.ndarray, **camera) -> np.ndarray:
    """(H,W) depth of a box of half side lengths `half`, inf beside it."""
    o, d = rays(pose, **camera)
    with np.errstate(divide="ignore"):
        t = np.stack([(-half - o) / d, (half - o) / d])
    near, far = t.min(0).max(-1), t.max(0).min(-1)
    return np.where(near < far, near, np.inf)


def colored(pose: np.ndarray, depth: np.ndarray, color, background=40, **camera) -> np.ndarray:
    """(H,W,3) uint8 picture: color(points (N,3) in the object frame) -> (N,3) in [0,1] where the depth is finite."""
    o, d = rays(pose, **camera)
    out = np.full((*depth.shape, 3), background, np.uint8)
    on = np.isfinite(depth)
    out[on] = np.round(255 * color(o + d[on] * depth[on][:, None]))
    return out


def pattern(x: np.ndarray) -> np.ndarray:
    """(N,3) colours in [0.15, 0.85]: waves a few centimetres long, another along each axis."""
    return 0.5 + 0.35 * np.sin(x @ np.array([[150.0, 40, -60], [30, 170, 80], [-70, 60, 140]]) + [0.3, 1.1, 2.0])
