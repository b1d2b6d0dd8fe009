"""`preview.mp4`: the video, the reconstruction drawn over it, and the reconstruction turning, side by side.

Drawn by a small z-buffered rasteriser in numpy, so no display or GPU is needed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from collections.abc import Sequence as Listing
from dataclasses import replace
from fractions import Fraction

import av
import cv2
import numpy as np

from ..export.glb import HAND_COLORS
from ..export.meshes import colors_u8, simplify, vertex_normals
from ..files import atomic_file
from ..scene import Scene, Sequence

Part = tuple[
    np.ndarray, np.ndarray, np.ndarray
]  # vertices (V,3) camera frame, faces (T,3), colours (V,3) or (3,) uint8
BACKDROP = (24, 27, 33)
MAX_FACES = 12_000  # of the object as drawn here


def draw_meshes(
    image: np.ndarray, K: np.ndarray, parts: Listing[Part], opacity: float = 1.0, supersample: int = 2
) -> np.ndarray:
    """Draw shaded triangle meshes over an image; the nearest surface hides the others.

    image (H,W,3) uint8; K (3,3) pixels of the image, pixel centres at +0.5; vertices in the camera frame (x right, y
    down, z forward), metres. Lit from the camera, both sides alike. Returns a new image. Triangles that reach behind
    the camera are left out.
    """
    height, width = image.shape[0] * supersample, image.shape[1] * supersample
    depth, color = rasterise(np.diag([supersample, supersample, 1.0]) @ K, (width, height), parts)
    drawn = np.isfinite(depth)
    if supersample > 1:
        coverage = cv2.resize(drawn.astype(np.float32), (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA)
        color = cv2.resize(color, (image.shape[1], image.shape[0]), interpolation=cv2.INTER_AREA)
    else:
        coverage = drawn.astype(np.float32)
    # colours are zero where nothing is drawn, so the averaged colour already carries the coverage
    out = image * (1 - opacity * coverage[..., None]) + opacity * color
    return np.clip(out + 0.5, 0, 255).astype(np.uint8)


def rasterise(K: np.ndarray, size: tuple[int, int], parts: Listing[Part]) -> tuple[np.ndarray, np.ndarray]:
    """Nearest surface per pixel: depth (H,W), inf where empty, and shaded colour (H,W,3), 0-255 and 0 where empty.

    All triangles are spread over the pixel centres they cover at once; a scatter-maximum of 1/z decides.
    """
    width, height = size
    corners, inverse, shade = [], [], []
    for vertices, faces, colors in parts:
        vertices, faces = np.asarray(vertices, np.float64), np.asarray(faces)
        z = vertices[:, 2]
        ahead = np.isfinite(vertices).all(1) & (z > 1e-3)
        faces = faces[ahead[faces].all(1)]
        safe = np.where(ahead, z, 1.0)
        pixels = np.nan_to_num(vertices[:, :2]) / safe[:, None] * [K[0, 0], K[1, 1]] + [K[0, 2], K[1, 2]]
        view = -np.nan_to_num(vertices) / np.maximum(
            np.linalg.norm(np.nan_to_num(vertices), axis=1, keepdims=True), 1e-9
        )
        facing = np.abs((vertex_normals(np.nan_to_num(vertices), faces) * view).sum(1))
        lit = np.broadcast_to(np.asarray(colors, np.float64), vertices.shape) * (0.38 + 0.62 * facing[:, None])
        corners.append(pixels[faces])
        inverse.append(1 / safe[faces])
        shade.append(lit[faces])
    depth, image = np.full(height * width, np.inf, np.float32), np.zeros((height * width, 3), np.float32)
    if corners and sum(len(c) for c in corners):
        xy, iz = np.concatenate(corners), np.concatenate(inverse).astype(np.float32)
        rgb = np.concatenate(shade).astype(np.float32)
        nearest = np.zeros(height * width, np.float32)
        for pixel, face, weights in _covered(xy, width, height):
            near = np.einsum("nk,nk->n", weights, iz[face])  # 1/z is linear on the screen
            np.maximum.at(nearest, pixel, near)
            front = near == nearest[pixel]
            pixel, face, weights, near = pixel[front], face[front], weights[front], near[front]
            color = np.einsum("nk,nkc->nc", weights * iz[face], rgb[face])
            image[pixel] = color / near[:, None]  # perspective-correct
        drawn = nearest > 0
        depth[drawn] = 1 / nearest[drawn]
    return depth.reshape(height, width), image.reshape(height, width, 3)


def _covered(xy: np.ndarray, width: int, height: int, budget: int = 400_000) -> Iterator[tuple[np.ndarray, ...]]:
    """(pixel (N,), face (N,), barycentric weights (N,3)) of the pixel centres inside triangles xy (T,3,2), in batches.

    A barycentric weight is linear on the screen, so its sign bounds an interval on each pixel row: rows are enumerated
    first, and then only the pixels that are covered. budget: rows in a batch.
    """
    low = np.ceil(xy.min(1) - 0.5).clip(0, [width, height]).astype(np.int64)
    high = np.floor(xy.max(1) - 0.5).clip(-1, [width - 1, height - 1]).astype(np.int64)
    (ax, ay), (bx, by), (cx, cy) = xy[:, 0].T, xy[:, 1].T, xy[:, 2].T
    area = (bx - ax) * (cy - ay) - (by - ay) * (cx - ax)
    faces = np.flatnonzero((high >= low).all(1) & (np.abs(area) > 1e-9))
    order = np.concatenate([[0], np.cumsum((high - low + 1)[faces, 1])])
    for start in range(0, int(order[-1]), budget):
        f = faces[np.searchsorted(order, start) : np.searchsorted(order, min(start + budget, order[-1]))]
        if not len(f):
            continue
        # weights at the centre of pixel (low_x + i, low_y + j): at_low + right i + down j
        right = np.stack([by - cy, cy - ay, ay - by], 1)[f] / area[f, None]
        down = np.stack([cx - bx, ax - cx, bx - ax], 1)[f] / area[f, None]
        px, py = low[f, 0] + 0.5 - ax[f], low[f, 1] + 0.5 - ay[f]
        at_low = right * px[:, None] + down * py[:, None] + [1.0, 0.0, 0.0]
        row_face, j = _ranges((high - low + 1)[f, 1])
        at_row, slope = at_low[row_face] + down[row_face] * j[:, None], right[row_face]
        with np.errstate(divide="ignore", invalid="ignore"):
            cross = -(at_row + 1e-7) / slope  # where each weight changes its sign
        first = np.where(slope > 0, cross, np.where((slope == 0) & (at_row < -1e-7), np.inf, -np.inf)).max(1)
        last = np.where(slope < 0, cross, np.inf).min(1)
        first = np.ceil(first.clip(0, width)).astype(np.int64)
        last = np.floor(last.clip(-1, (high - low)[f, 0][row_face])).astype(np.int64)
        row, i = _ranges((last - first + 1).clip(0))
        i = i + first[row]
        face = row_face[row]
        weights = at_row.astype(np.float32)[row] + right.astype(np.float32)[face] * i.astype(np.float32)[:, None]
        yield ((low[f, 1][row_face] + j) * width + low[f, 0][row_face])[row] + i, f[face], weights


def _ranges(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each n in `counts`, n times its index, and 0..n-1."""
    which = np.repeat(np.arange(len(counts)), counts)
    return which, np.arange(len(which)) - np.repeat(np.cumsum(counts) - counts, counts)


def for_viewing(scene: Scene, max_faces: int = MAX_FACES) -> Scene:
    """The scene with an object light enough to draw."""
    if "object" not in scene.bodies or len(scene.bodies["object"].shape.faces) <= max_faces:
        return scene
    body = scene.bodies["object"]
    return replace(scene, bodies={**scene.bodies, "object": replace(body, shape=simplify(body.shape, max_faces))})


def scene_parts(scene: Scene, frame: int, cam_from_world: np.ndarray, true_colors: bool = False) -> list[Part]:
    """The valid bodies of one frame in a camera, ready to draw; hands by side, or with `true_colors` as they look."""
    parts = []
    for name, body in scene.bodies.items():
        if body.valid[frame]:
            points = body.posed(frame) @ cam_from_world[:3, :3].T + cam_from_world[:3, 3]
            by_side = name in HAND_COLORS and not (true_colors and body.shape.colors is not None)
            color = np.array(HAND_COLORS[name], np.uint8) if by_side else colors_u8(body.shape)
            parts.append((points, body.shape.faces, color))
    return parts


def focus(scene: Scene) -> tuple[np.ndarray, float]:
    """World centre (3,) and radius, metres, that hold the valid bodies over the clip, a few outliers aside."""
    clouds = [np.zeros((0, 3))]
    for body in scene.bodies.values():
        frames = np.flatnonzero(body.valid)
        step = max(1, len(body.shape.vertices) // 200)
        clouds += [body.posed(f)[::step] for f in frames[:: max(1, len(frames) // 24)]]
    points = np.concatenate(clouds)
    points = points[np.isfinite(points).all(1)]
    if not len(points):
        return np.array([0, 0, 0.5]), 0.15
    centre = np.percentile(points, [2, 98], axis=0).mean(0)
    return centre, float(max(np.percentile(np.linalg.norm(points - centre, axis=1), 99), 0.02))


def orbit_camera(
    centre: np.ndarray, radius: float, azimuth: float, size: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """(K, cam_from_world) of a camera 15 degrees above the centre, `azimuth` radians around the world's vertical."""
    width, height = size
    focal = 1.8 * min(width, height)
    c, s = np.cos(azimuth), np.sin(azimuth)
    turn = np.array([[c, 0, -s], [0, 1, 0], [s, 0, c]])
    c, s = np.cos(np.radians(15)), np.sin(np.radians(15))
    tilt = np.array([[1, 0, 0], [0, c, -s], [0, s, c]])
    cam_from_world = np.eye(4)
    cam_from_world[:3, :3] = tilt @ turn
    distance = 2 * radius * focal / (0.86 * min(width, height))
    cam_from_world[:3, 3] = [0, 0, distance] - cam_from_world[:3, :3] @ centre
    return np.array([[focal, 0, width / 2], [0, focal, height / 2], [0, 0, 1.0]]), cam_from_world


def draw_overlay(scene: Scene, frame: int, image: np.ndarray) -> np.ndarray:
    """The bodies of one frame over its image (H,W,3) uint8, which may be smaller than the video."""
    scale = np.diag([image.shape[1] / scene.size[0], image.shape[0] / scene.size[1], 1.0])
    parts = scene_parts(scene, frame, np.linalg.inv(np.asarray(scene.world_from_cam[frame], float)))
    return draw_meshes((image * 0.6).astype(np.uint8), scale @ scene.K, parts, opacity=0.92)


def draw_turntable(
    scene: Scene, frame: int, azimuth: float, size: tuple[int, int], view: tuple[np.ndarray, float] | None = None
) -> np.ndarray:
    """The bodies of one frame seen by `orbit_camera`, (H,W,3) uint8; view is (centre, radius), or `focus(scene)`."""
    K, cam_from_world = orbit_camera(*(view or focus(scene)), azimuth, size)
    backdrop = np.full((size[1], size[0], 3), BACKDROP, np.uint8)
    return draw_meshes(backdrop, K, scene_parts(scene, frame, cam_from_world, true_colors=True))


def frame_images(sequence: Sequence, scene: Scene) -> list[np.ndarray]:
    """The video frame of each frame of the scene; grey where the sequence lacks it."""
    row = {int(i): k for k, i in enumerate(sequence.indices)}
    grey = np.full((scene.size[1], scene.size[0], 3), 90, np.uint8)
    return [sequence.frames[row[int(i)]] if int(i) in row else grey for i in scene.frames]


def write_preview(path: str | os.PathLike, sequence: Sequence, scene: Scene, max_side: int = 480) -> None:
    """Write an .mp4 of three panels, the video, the overlay and the turntable (one turn in the clip). Atomic.

    H.264 where this PyAV has it, MPEG-4 otherwise. max_side: longest side of a panel, in pixels.
    """
    width, height = panel_size(scene.size, max_side)
    light, images, count = for_viewing(scene), frame_images(sequence, scene), len(scene.frames)
    view = focus(light)
    with video_writer(path, 3 * width, height, scene.fps) as write:
        for i, image in enumerate(images):
            small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
            # starts where the camera is and turns as the clip plays
            around = draw_turntable(light, i, 2 * np.pi * i / max(count, 1), (width, height), view)
            panels = [small, draw_overlay(light, i, small), around]
            for text, panel in zip(("video", "overlay", "turntable"), panels, strict=True):
                _label(panel, text)
            lost = [
                f"{name}: {body.reason[i] or 'not found'}" for name, body in scene.bodies.items() if not body.valid[i]
            ]
            for k, text in enumerate(lost):
                _label(panels[1], text, row=k + 1, color=(255, 120, 96))
            write(np.concatenate(panels, 1))


@contextlib.contextmanager
def video_writer(
    path: str | os.PathLike, width: int, height: int, fps: float
) -> Iterator[Callable[[np.ndarray], None]]:
    """A function that appends a frame (height,width,3) uint8 sRGB to an .mp4; width and height even. Atomic."""
    count = 0
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as out:
        stream = _stream(out, width, height, fps)

        def write(image: np.ndarray) -> None:
            nonlocal count
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, count = count, count + 1
            for packet in stream.encode(frame):
                out.mux(packet)

        yield write
        for packet in stream.encode():
            out.mux(packet)


def panel_size(size: tuple[int, int], max_side: int) -> tuple[int, int]:
    """Even width and height with the video's shape, at most `max_side`; even because of 4:2:0 colour."""
    scale = min(1.0, max_side / max(size))
    return tuple(max(2, 2 * round(s * scale / 2)) for s in size)


def _stream(out: av.container.OutputContainer, width: int, height: int, fps: float) -> av.VideoStream:
    rate = Fraction(float(fps)).limit_denominator(1001)
    for codec, options in (("libx264", {"crf": "21", "preset": "veryfast"}), ("mpeg4", {"q:v": "3"})):
        try:
            av.codec.Codec(codec, "w")
        except (av.codec.codec.UnknownCodecError, ValueError):
            continue
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = 1 / rate
        return stream
    raise RuntimeError("this PyAV has neither an H.264 nor an MPEG-4 encoder")


def _label(image: np.ndarray, text: str, row: int = 0, color: tuple[int, int, int] = (235, 235, 235)) -> None:
    at, face = (8, 18 + 18 * row), cv2.FONT_HERSHEY_SIMPLEX
    text = text.encode("ascii", "replace").decode()[:60]
    cv2.putText(image, text, (at[0] + 1, at[1] + 1), face, 0.45, (0, 0, 0), 1, cv2.LINE_AA)
    cv2.putText(image, text, at, face, 0.45, color, 1, cv2.LINE_AA)
