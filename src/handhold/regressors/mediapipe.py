"""MediaPipe's palm detector and hand landmark network, run through LiteRT with our own pre- and post-processing.

The two `.tflite` files (Apache-2.0, Google; `handhold assets` fetches them) are plain functions of a square crop.
This file holds what is around them: anchors and weighted non-maximum suppression (Zhang et al., "MediaPipe Hands",
2020, section 2.1; Bazarevsky et al., "BlazeFace", 2019, for the tie resolution by averaging), the rotated region of
interest (ROI), the crop, and the way back to the image. Pixels have their centres at +0.5 throughout; angles are
radians, image axes (x right, y down).
"""

from __future__ import annotations

import os
import queue
from dataclasses import dataclass, replace

import cv2
import numpy as np

from ..errors import MissingAsset, UnusableInput

PALM_SIZE, HAND_SIZE = 192, 224
# Landmarks that do not move with the fingers' tips: wrist, thumb 1-3, and the first two joints of each finger.
_STABLE = [0, 1, 2, 3, 5, 6, 9, 10, 13, 14, 17, 18]


@dataclass(frozen=True)
class Roi:
    """A rotated square in the image. In its own axes the hand points up: fingers at small y."""

    center: np.ndarray  # (2,) pixels
    size: float  # side, pixels
    angle: float  # image-from-ROI rotation; 0 when the fingers point up in the image

    def image_from_unit(self) -> np.ndarray:
        """(2,3) affine: ROI coordinates in [0,1]^2 to pixels."""
        c, s = np.cos(self.angle) * self.size, np.sin(self.angle) * self.size
        a = np.array([[c, -s], [s, c]])
        return np.concatenate([a, (self.center - a @ [0.5, 0.5])[:, None]], 1)

    def to_image(self, unit: np.ndarray) -> np.ndarray:
        """(...,2) ROI coordinates in [0,1] to pixels."""
        m = self.image_from_unit()
        return unit @ m[:, :2].T + m[:, 2]

    def to_unit(self, points: np.ndarray) -> np.ndarray:
        """(...,2) pixels to ROI coordinates in [0,1]; inverse of `to_image`."""
        m = self.image_from_unit()
        return (points - m[:, 2]) @ np.linalg.inv(m[:, :2]).T

    def jittered(self, shift=(0.0, 0.0), scale: float = 1.0, turn: float = 0.0) -> Roi:
        """A neighbour of this ROI: shifted by a share of its side in its own axes, scaled and turned."""
        c, s = np.cos(self.angle), np.sin(self.angle)
        d = np.array([c * shift[0] - s * shift[1], s * shift[0] + c * shift[1]]) * self.size
        return Roi(self.center + d, self.size * scale, self.angle + turn)


@dataclass(frozen=True)
class Palm:
    """One palm detection."""

    box: np.ndarray  # (4,) x0 y0 x1 y1 pixels
    keypoints: np.ndarray  # (7,2) pixels: wrist, index, middle, ring, little knuckles, thumb base, thumb knuckle
    score: float


@dataclass(frozen=True)
class HandDetection:
    """One hand as the landmark network sees it through one ROI."""

    points: np.ndarray  # (21,2) pixels, OpenPose order
    points3d: np.ndarray  # (21,3) metres of a generic hand, camera-aligned axes, origin near the knuckles
    presence: float  # probability that the ROI holds a hand
    right: float  # probability of a right hand, for an image that is not mirrored
    roi: Roi


def palm_anchors() -> np.ndarray:
    """(2016,2) anchor centres in [0,1]: two a cell on the 24x24 grid, six on the 12x12 grid (three merged layers)."""
    out = []
    for cells, per_cell in ((24, 2), (12, 6)):
        y, x = np.mgrid[:cells, :cells]
        out.append(np.repeat((np.stack([x, y], -1).reshape(-1, 2) + 0.5) / cells, per_cell, axis=0))
    return np.concatenate(out)


def weighted_nms(boxes: np.ndarray, scores: np.ndarray, threshold: float = 0.3) -> list[tuple[np.ndarray, float]]:
    """Clusters of overlapping detections, each averaged with its scores as weights (BlazeFace, section 4).

    boxes: (N,D) rows starting with x0 y0 x1 y1, the rest averaged alike. Returns [(row (D,), best score)], best first.
    """
    order, out = np.argsort(-scores, kind="stable"), []
    while len(order):
        first, rest = boxes[order[0]], boxes[order]
        lo, hi = np.maximum(first[:2], rest[:, :2]), np.minimum(first[2:4], rest[:, 2:4])
        inter = np.prod(np.clip(hi - lo, 0, None), 1)
        area = np.prod(rest[:, 2:4] - rest[:, :2], 1)
        same = inter / np.maximum(area[0] + area - inter, 1e-12) > threshold
        same[0] = True
        w = scores[order[same]]
        out.append(((rest[same] * w[:, None]).sum(0) / w.sum(), float(w[0])))
        order = order[~same]
    return out


def roi_from_palm(palm: Palm) -> Roi:
    """The square that should hold the whole hand: turned so that wrist to middle knuckle is up, moved on, enlarged."""
    d = palm.keypoints[2] - palm.keypoints[0]
    side = float(np.max(palm.box[2:] - palm.box[:2]))
    center = (palm.box[:2] + palm.box[2:]) / 2
    return Roi(center, side, float(np.arctan2(d[0], -d[1]))).jittered(shift=(0.0, -0.5), scale=2.6)


def roi_from_points(points: np.ndarray) -> Roi:
    """The ROI that goes with (21,2) landmarks: what the network was trained to be shown when it follows a hand."""
    d = (points[5] + points[13]) / 4 + points[9] / 2 - points[0]
    angle = float(np.arctan2(d[0], -d[1]))
    c, s = np.cos(angle), np.sin(angle)
    r = np.array([[c, -s], [s, c]])
    q = points[_STABLE] @ r  # ROI axes
    lo, hi = q.min(0), q.max(0)
    return Roi(r @ ((lo + hi) / 2), float(np.max(hi - lo)), angle).jittered(shift=(0.0, -0.1), scale=2.0)


def crop(pyramid: list[np.ndarray], image_from_unit: np.ndarray, side: int) -> np.ndarray:
    """(side,side,3) uint8: the part of an image that an affine (2,3) from [0,1]^2 covers; black outside."""
    scale = np.sqrt(abs(np.linalg.det(image_from_unit[:, :2]))) / side  # image pixels per crop pixel
    level = int(np.clip(np.floor(np.log2(max(scale, 1.0)) + 0.5), 0, len(pyramid) - 1))
    m = image_from_unit / 2.0**level
    a = m[:, :2] / side
    # cv2 puts pixel centres at integers; ours are at +0.5 on both sides.
    t = m[:, 2] + a @ [0.5, 0.5] - 0.5
    return cv2.warpAffine(pyramid[level], np.c_[a, t], (side, side), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)


def image_pyramid(image: np.ndarray, levels: int = 4) -> list[np.ndarray]:
    """The image and its halves, so that crops of large hands do not alias. Odd sizes lose their last row or column."""
    out = [image]
    while len(out) < levels and min(out[-1].shape[:2]) >= 2 * 96:
        h, w = out[-1].shape[0] // 2, out[-1].shape[1] // 2
        out.append(cv2.resize(out[-1][: 2 * h, : 2 * w], (w, h), interpolation=cv2.INTER_AREA))
    return out


def mirrored(d: HandDetection, width: float) -> HandDetection:
    """The same hand in the left-right mirrored image of that width."""
    c = np.array([width - d.roi.center[0], d.roi.center[1]])
    return HandDetection(
        np.stack([width - d.points[:, 0], d.points[:, 1]], -1),
        d.points3d * [-1, 1, 1],
        d.presence,
        1 - d.right,
        Roi(c, d.roi.size, -d.roi.angle),
    )


class HandLandmarker:
    """The two networks.

    palm_path, landmark_path: the `.tflite` files (`handhold.assets.path`). threads: how many may call them at once
    (others wait); a call has one.
    Raises MissingAsset when a file is absent, UnusableInput when it is not the expected network.
    """

    def __init__(self, palm_path: str | os.PathLike, landmark_path: str | os.PathLike, threads: int = 1):
        self._palm = _Network(palm_path, PALM_SIZE, [(1, 2016, 18), (1, 2016, 1)], threads)
        self._hand = _Network(landmark_path, HAND_SIZE, [(1, 63), (1, 1), (1, 1), (1, 63)], threads)
        self._anchors = palm_anchors()

    def palms(
        self, image: np.ndarray | list[np.ndarray], turn: float = 0.0, score: float = 0.5, window: Roi | None = None
    ) -> list[Palm]:
        """Palms in an image, or in a window of it, looked at after turning it by `turn` radians.

        image: (H,W,3) uint8 RGB or its `image_pyramid`. score: least probability of a palm. The detector is not
        invariant to rotation: hands that point down are found better in a turned image.
        """
        pyramid = image if isinstance(image, list) else image_pyramid(image)
        h, w = pyramid[0].shape[:2]
        roi = window or Roi(np.array([w / 2, h / 2]), float(max(h, w)), 0.0)
        roi = replace(roi, angle=roi.angle + turn)
        raw, logit = self._palm(crop(pyramid, roi.image_from_unit(), PALM_SIZE))
        p = 1 / (1 + np.exp(-np.clip(logit[0, :, 0].astype(np.float64), -100, 100)))
        keep = p >= score
        if not keep.any():
            return []
        raw, anchors = raw[0, keep].astype(np.float64) / PALM_SIZE, self._anchors[keep]
        center, half = raw[:, :2] + anchors, raw[:, 2:4] / 2
        keys = raw[:, 4:].reshape(-1, 7, 2) + anchors[:, None]
        rows = np.concatenate([center - half, center + half, keys.reshape(-1, 14)], 1)
        out = []
        for row, s in weighted_nms(rows, p[keep]):
            # The box is square up to a few per cent; its centre and side survive the turn, its corners do not.
            mid, side = roi.to_image((row[:2] + row[2:4]) / 2), np.max(row[2:4] - row[:2]) * roi.size
            out.append(Palm(np.r_[mid - side / 2, mid + side / 2], roi.to_image(row[4:].reshape(7, 2)), s))
        return out

    def read(self, image: np.ndarray | list[np.ndarray], roi: Roi, mirror: bool = False) -> HandDetection:
        """The landmark network through one ROI. image: (H,W,3) uint8 RGB or its `image_pyramid`.

        mirror: show the network the mirrored crop and mirror its answer back (test-time augmentation).
        """
        pyramid = image if isinstance(image, list) else image_pyramid(image)
        x = crop(pyramid, roi.image_from_unit(), HAND_SIZE)
        points, presence, left, world = self._hand(np.ascontiguousarray(x[:, ::-1]) if mirror else x)
        unit = points.reshape(21, 3)[:, :2].astype(np.float64) / HAND_SIZE
        world = world.reshape(21, 3).astype(np.float64)
        left = float(left.item())
        if mirror:
            unit[:, 0], world[:, 0], left = 1 - unit[:, 0], -world[:, 0], 1 - left
        c, s = np.cos(roi.angle), np.sin(roi.angle)
        world = world @ np.array([[c, s, 0], [-s, c, 0], [0, 0, 1]])
        # The network was trained on mirrored (selfie) images: its "left" is a right hand in an image as it is.
        return HandDetection(roi.to_image(unit), world, float(presence.item()), left, roi)

    def detect(self, image_rgb: np.ndarray, presence: float = 0.5) -> list[HandDetection]:
        """All hands of one image (H,W,3) uint8 RGB, most certain first; the plain MediaPipe procedure."""
        pyramid = image_pyramid(image_rgb)
        found = [self.read(pyramid, roi_from_palm(p)) for p in self.palms(pyramid)]
        return sorted((d for d in found if d.presence >= presence), key=lambda d: -d.presence)


class _Network:
    """LiteRT interpreters, one a thread, with one square RGB input in [0,1]."""

    def __init__(self, path: str | os.PathLike, side: int, outputs: list[tuple[int, ...]], threads: int):
        if not os.path.isfile(path):
            raise MissingAsset(f"{path} is not there; run `handhold assets` to fetch it.")
        from ai_edge_litert.interpreter import Interpreter

        self._idle: queue.SimpleQueue = queue.SimpleQueue()
        try:
            for _ in range(threads):
                net = Interpreter(model_path=os.fspath(path), num_threads=1)
                net.allocate_tensors()
                self._idle.put(net)
            ins, outs = net.get_input_details(), net.get_output_details()
            fits = tuple(ins[0]["shape"]) == (1, side, side, 3) and [tuple(o["shape"]) for o in outs] == outputs
        except (ValueError, RuntimeError, IndexError) as e:
            raise UnusableInput(
                f"{path} is not a TensorFlow Lite network; run `handhold assets` to fetch it again."
            ) from e
        if not fits:
            raise UnusableInput(
                f"{path} is not the MediaPipe network expected here; run `handhold assets` to fetch it."
            )
        self._in, self._out = ins[0]["index"], [o["index"] for o in outs]

    def __call__(self, crop_rgb: np.ndarray) -> list[np.ndarray]:
        net = self._idle.get()
        try:
            net.set_tensor(self._in, crop_rgb[None].astype(np.float32) / 255.0)
            net.invoke()
            return [net.get_tensor(i) for i in self._out]
        finally:
            self._idle.put(net)
