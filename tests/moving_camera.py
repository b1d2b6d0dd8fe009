"""A tiny ray caster for tests of the camera: a room of textured planes, seen by a camera that moves, with a subject."""

from __future__ import annotations

import cv2
import numpy as np
from scipy.spatial.transform import Rotation

SIZE = (240, 180)
K = np.array([[230.0, 0, 120], [0, 230.0, 90], [0, 0, 1]])
# normal, offset (n.x = d) and two axes that texture runs along; a box stands before the wall on the table
PLANES = (
    ((0, 0, 1), 1.6, (1, 0, 0), (0, 1, 0), None),
    ((0, 1, 0), 0.35, (1, 0, 0), (0, 0, 1), None),
    ((1, 0, 0), -1.1, (0, 0, 1), (0, 1, 0), None),
    ((0, 0, 1), 0.9, (1, 0, 0), (0, 1, 0), ((-0.45, -0.15), (-0.15, 0.35))),
    ((0, 0, 1), 1.1, (1, 0, 0), (0, 1, 0), ((0.25, -0.3), (0.6, 0.35))),
)


def texture(seed: int, size: int = 512) -> np.ndarray:
    rng = np.random.default_rng(seed)
    out = np.zeros((size, size, 3), np.float32)
    for step in (64, 24, 9):
        coarse = rng.random((size // step + 2, size // step + 2, 3)).astype(np.float32)
        out += cv2.resize(coarse, (size, size), interpolation=cv2.INTER_CUBIC)
    return np.clip(out / 3 * 1.6 - 0.3, 0, 1) * 220 + 20


TEXTURES = [texture(k) for k in range(len(PLANES))]


def path(count: int, turn: float, shift: float, seed: int = 0) -> np.ndarray:
    """Smooth world_from_cam (F,4,4) from the identity on: turns by about `turn` degrees, moves by `shift` metres."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, count)[:, None]
    phase, rate = rng.uniform(0, 6, (2, 3)), rng.uniform(2, 6, (2, 3))
    wave = [np.sin(rate[k] * t + phase[k]) - np.sin(phase[k]) for k in (0, 1)]
    out = np.tile(np.eye(4), (count, 1, 1))
    out[:, :3, :3] = Rotation.from_rotvec(np.radians(turn) * wave[0] * [1, 1, 0.4]).as_matrix()
    out[:, :3, 3] = shift * wave[1]
    return out


def subject(count: int, seed: int = 0, reach: float = 0.04) -> np.ndarray:
    """(F,3) world positions, metres: a hand that hovers and drifts."""
    rng = np.random.default_rng(seed)
    t = np.linspace(0, 1, count)[:, None]
    return np.array([0, 0, 0.55]) + reach * np.sin(rng.uniform(3, 14, 3) * t + rng.uniform(0, 6, 3))


def film(world_from_cam: np.ndarray, noise: float = 3.0, seed: int = 0, blob: np.ndarray | None = None):
    """frames (F,H,W,3) uint8 and subject masks (F,H,W) bool of a ball of 7 cm at `blob` (F,3), world."""
    rng = np.random.default_rng(seed)
    w, h = SIZE
    x, y = np.meshgrid(np.arange(w) + 0.5, np.arange(h) + 0.5)
    rays = np.stack([(x - K[0, 2]) / K[0, 0], (y - K[1, 2]) / K[1, 1], np.ones_like(x)], -1)
    frames, masks = [], []
    for f, pose in enumerate(world_from_cam):
        d, c = rays @ pose[:3, :3].T, pose[:3, 3]
        near, image = np.full((h, w), np.inf), np.zeros((h, w, 3), np.float32)
        for (n, offset, u, v, box), tex in zip(PLANES, TEXTURES, strict=True):
            with np.errstate(divide="ignore", invalid="ignore"):
                z = (offset - c @ np.array(n, float)) / (d @ np.array(n, float))
            p = c + z[..., None] * d
            a, b = p @ np.array(u, float), p @ np.array(v, float)
            ok = (z > 0.05) & (z < near)
            if box is not None:
                ok &= (a > box[0][0]) & (a < box[1][0]) & (b > box[0][1]) & (b < box[1][1])
            a, b = (((np.where(ok, q, 0) * 300 + 1e4) % len(tex)).astype(np.float32) for q in (a, b))
            seen = cv2.remap(tex, a, b, cv2.INTER_LINEAR, borderMode=cv2.BORDER_WRAP)
            image[ok], near[ok] = seen[ok], z[ok]
        mask = np.zeros((h, w), bool)
        if blob is not None:
            q = pose[:3, :3].T @ (blob[f] - c)
            at, r = (K @ q)[:2] / q[2], K[0, 0] * 0.07 / q[2]
            mask = (x - at[0]) ** 2 + (y - at[1]) ** 2 < r * r
            image[mask] = TEXTURES[0][:h, :w][mask][:, ::-1] * 0.5 + 90
        frames.append(np.clip(image + rng.normal(0, noise, image.shape), 0, 255).astype(np.uint8))
        masks.append(mask)
    return np.stack(frames), np.stack(masks)
