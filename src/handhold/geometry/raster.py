"""Depth of a triangle mesh, without gradients: what hides what."""

from __future__ import annotations

import cv2
import numpy as np


def depth_image(vertices: np.ndarray, faces: np.ndarray, K: np.ndarray, width: int, height: int) -> np.ndarray:
    """(H,W) float32 depth of a mesh's front surface, inf where there is none.

    vertices (V,3) camera frame, all in front of the camera; faces (T,3); K (3,3) pixels. Each triangle is filled with
    its mean depth, far to near, so the error is a fraction of a triangle's own extent in depth.
    """
    uv = vertices[:, :2] / vertices[:, 2:] * [K[0, 0], K[1, 1]] + [K[0, 2], K[1, 2]] - 0.5
    z = vertices[faces, 2].mean(1)
    image = np.full((height, width), np.inf, np.float32)
    tri = np.round(np.clip(uv, -4 * width, 5 * width)[faces] * 16).astype(np.int32)
    for k in np.argsort(-z):
        cv2.fillConvexPoly(image, tri[k], float(z[k]), lineType=cv2.LINE_8, shift=4)
    return image
