"""A tree over the triangles of one mesh: closest points, winding numbers and ray hits on the CPU, in double precision.

What the compiled library holds and computes; `handhold.geometry.queries` checks, converts and chooses the backend.
"""

from __future__ import annotations

import weakref

import numpy as np

from . import _lib
from ._lib import threads


class TriangleTree:
    """Owns a tree over vertices (V,3) float64 and faces (T,3) int64; the arrays are copied.

    Raises ValueError when there are no faces, an index is out of range or a vertex is not finite or beyond 1e15, and
    `HandholdError` without the compiled kernels.
    """

    def __init__(self, vertices: np.ndarray, faces: np.ndarray):
        lib = _lib.lib()
        vertices, faces = _rows(vertices, np.float64), _rows(faces, np.int64)
        self._handle = lib.hh_bvh_build(len(vertices), len(faces), vertices.ctypes.data, faces.ctypes.data)
        if not self._handle:
            raise ValueError("a tree needs faces with indices of existing, finite vertices")
        weakref.finalize(self, lib.hh_bvh_free, self._handle)

    def closest(self, points: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """points (N,3) -> face (N,) int64, barycentric weights (N,3), squared distance (N,)."""
        points = _rows(points, np.float64)
        n = len(points)
        face, bary, d2 = np.empty(n, np.int64), np.empty((n, 3)), np.empty(n)
        _lib.lib().hh_bvh_closest(
            self._handle, n, points.ctypes.data, face.ctypes.data, bary.ctypes.data, d2.ctypes.data, threads()
        )
        return face, bary, d2

    def winding(self, points: np.ndarray, beta: float = 2.0) -> np.ndarray:
        """Winding number (N,) at points (N,3); clusters farther than `beta` radii are taken by their expansion."""
        points = _rows(points, np.float64)
        out = np.empty(len(points))
        _lib.lib().hh_bvh_winding(
            self._handle, len(points), points.ctypes.data, float(beta), out.ctypes.data, threads()
        )
        return out

    def rays(self, origins: np.ndarray, directions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """First hits of o + t d, t >= 0: face (N,) or -1, barycentric weights (N,3), t (N,) or inf."""
        origins, directions = _rows(origins, np.float64), _rows(directions, np.float64)
        if origins.shape != directions.shape:
            raise ValueError(f"origins {origins.shape} and directions {directions.shape} differ")
        n = len(origins)
        face, bary, t = np.empty(n, np.int64), np.empty((n, 3)), np.empty(n)
        _lib.lib().hh_bvh_rays(
            self._handle, n, origins.ctypes.data, directions.ctypes.data,
            face.ctypes.data, bary.ctypes.data, t.ctypes.data, threads(),
        )  # fmt: skip
        return face, bary, t


def _rows(x: np.ndarray, dtype) -> np.ndarray:
    x = np.ascontiguousarray(x, dtype)
    if x.ndim != 2 or x.shape[1] != 3:
        raise ValueError(f"expected rows of three, not {x.shape}")
    return x
