"""A printed egg: a small closed surface and its colours."""

from __future__ import annotations

import numpy as np

RADIUS = 0.05


def ball(n: int = 24) -> tuple[np.ndarray, np.ndarray]:
    """Vertices and outward faces of an egg-shaped closed surface."""
    theta, phi = np.linspace(0, np.pi, n // 2 + 1)[1:-1], np.arange(n) / n * 2 * np.pi
    t, p = np.meshgrid(theta, phi, indexing="ij")
    ring = np.stack([np.sin(t) * np.cos(p), np.sin(t) * np.sin(p), np.cos(t)], -1).reshape(-1, 3)
    v = np.concatenate([ring, [[0, 0, 1], [0, 0, -1]]]) * RADIUS * [1.0, 0.8, 1.2]
    f, last = [], len(ring)
    for j in range(n):
        k = (j + 1) % n
        f += [[last, j, k], [last + 1, last - n + k, last - n + j]]
        for i in range(len(theta) - 1):
            a, b, c, d = i * n + j, (i + 1) * n + j, (i + 1) * n + k, i * n + k
            f += [[a, b, c], [a, c, d]]
    return v.astype(np.float32), np.array(f, np.int32)


def paint(x: np.ndarray) -> np.ndarray:
    """A colour for every point of the surface, with enough pattern to tell a turn."""
    return np.clip(0.5 + 0.35 * np.sin(x / RADIUS * 5.0 + [0.0, 1.0, 2.0]), 0, 1).astype(np.float32)
