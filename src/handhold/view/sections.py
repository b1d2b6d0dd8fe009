"""The pieces of report.html: strings of HTML from a scene, with all text from outside escaped."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Mapping
from collections.abc import Sequence as Listing
from html import escape

import cv2
import numpy as np

from ..metrics import describe
from ..scene import Body, Scene, Sequence, Skinned
from ..tracking import rungs

LABELS = {"right": "Right hand", "left": "Left hand", "object": "Object", "other": "Other movement"}
MASK_COLORS = {
    "right": (255, 112, 60),
    "left": (64, 150, 255),
    "object": (60, 205, 120),
    "other": (176, 130, 230),
}  # sRGB
MAX_THUMBS = 60
K_SOURCES = {
    "given": "given by the user",
    "metadata": "from the file's metadata",
    "default": "assumed, because neither the user nor the file says; depth and scale depend on it",
}


def banner(scene: Scene, partial: Listing[str]) -> str:
    lines = [*partial] or ([] if scene.bodies else ["Nothing was reconstructed."])
    if not lines:
        return ""
    return (
        '<div class="banner">' + "".join(f"<p><b>Partial result.</b> {escape(line)}</p>" for line in lines) + "</div>"
    )


def toggle(name: str) -> str:
    label = escape(LABELS.get(name, name))
    return (
        f'<button data-body="{escape(name)}" aria-pressed="true"><i class="dot is-{escape(name)}"></i>{label}</button>'
    )


def tiles(scene: Scene, metrics: Mapping[str, float] | None) -> str:
    count = max(len(scene.frames), 1)
    tiles = []
    if scene.bodies:
        both = np.logical_and.reduce([np.asarray(b.valid, bool) for b in scene.bodies.values()])
        tiles.append((f"{100 * both.sum() / count:.0f} %", "of the frames with every body"))
    if "object" in scene.bodies:
        size = 1e3 * np.sort(_box(scene.bodies["object"].shape.vertices))[::-1]
        tiles.append(("×".join(f"{s:.0f}" for s in size) + " mm", "size of the object"))
        seen = scene.bodies["object"].shape.observed
        if seen is not None and len(seen):
            tiles.append((f"{100 * np.mean(seen):.0f} %", "of its surface was seen"))
    for key in ("mpjpe_right", "mpjpe_left", "mpjpe_right_peer", "f10", "rot_deg"):
        if metrics and math.isfinite(metrics.get(key, math.nan)):
            unit, _, _ = describe(key) or ("", "", "")
            names = {"f10": "object surface within 10 mm", "rot_deg": "object rotation error"}
            side = "left" if "left" in key else "right"
            tiles.append((f"{_number(metrics[key])} {unit}", names.get(key, f"joint error, {side} hand")))
    tiles = tiles[:5]
    return (
        '<div class="tiles">'
        + "".join(f"<div><b>{escape(a)}</b><span>{escape(b)}</span></div>" for a, b in tiles)
        + "</div>"
    )


def _box(vertices: np.ndarray) -> np.ndarray:
    """Extents (3,) of the box along the principal axes."""
    centred = np.asarray(vertices, np.float64) - np.mean(vertices, 0)
    return np.ptp(centred @ np.linalg.svd(centred, full_matrices=False)[2].T, axis=0)


def strip(name: str, body: Body, frames: np.ndarray) -> str:
    """One row of the confidence chart: a bar per frame, its height the confidence; lost frames are full and red. Below
    it a ribbon in the colour of each frame's rung."""
    bars, height = [], 32
    for i, valid in enumerate(body.valid):
        c, reason = float(np.clip(np.nan_to_num(body.confidence[i]), 0, 1)), str(body.reason[i])
        h = max(2.0, height * c) if valid else height
        kind = ("low" if c < 0.5 else "ok") if valid else "lost"
        text = f"frame {int(frames[i])}: " + (f"confidence {100 * c:.0f} %" if valid else "not valid")
        title = escape(f"{text}, {reason}" if reason else text)
        box = f'x="{i + 0.06:.2f}" y="{height - h:.1f}" width="0.88" height="{h:.1f}"'
        bars.append(f'<rect class="{kind}" {box}><title>{title}</title></rect>')
    label, view = escape(LABELS.get(name, name)), f"0 0 {max(len(body.valid), 1)} {height}"
    svg = f'<svg viewBox="{view}" preserveAspectRatio="none" role="img" aria-label="{label}: confidence per frame">'
    return (
        f'<div class="track is-{escape(name)}"><span><i class="dot"></i>{label}</span>'
        f'<div class="strip">{svg}{"".join(bars)}</svg>{ribbon(name, body)}<i class="playhead"></i></div></div>'
    )


def rung_of(body: Body, i: int) -> str:
    """The word of frame `i` in the vocabulary of `tracking.rungs`; empty when it says something else."""
    reason = str(body.reason[i])
    return reason if reason in rungs.MEANING else ("" if body.valid[i] else rungs.NOT_FOUND)


def ribbon(name: str, body: Body) -> str:
    """Runs of frames of one rung, a coloured rectangle each."""
    words = [rung_of(body, i) for i in range(len(body.valid))]
    rects, first = [], 0
    for i in range(1, len(words) + 1):
        if i == len(words) or words[i] != words[first]:
            word = words[first]
            kind = f"rung {css_of(word)}" if word else "rung"
            box = f'x="{first}" y="0" width="{i - first}" height="1"'
            rects.append(f'<rect class="{kind}" {box}><title>{escape(word or "no rung told")}</title></rect>')
            first = i
    view, label = f"0 0 {max(len(words), 1)} 1", escape(LABELS.get(name, name))
    return (
        f'<svg class="rungs" viewBox="{view}" preserveAspectRatio="none" role="img" '
        f'aria-label="{label}: where each frame comes from">{"".join(rects)}</svg>'
    )


def css_of(rung: str) -> str:
    """The class of report.css that colours a rung."""
    return "r-" + rung.replace(" ", "-")


def rung_legend(scene: Scene) -> str:
    """The rungs that occur, with their colour, how often, and what each means; from the surest to the least sure."""
    count = Counter(
        (part, rung_of(b, i))
        for name, b in scene.bodies.items()
        for part in ["object" if name == "object" else "hand"]
        for i in range(len(b.valid))
    )
    order = [("object", r) for r in reversed(rungs.OBJECT_RUNGS)] + [("hand", r) for r in reversed(rungs.HAND_RUNGS)]
    rows = [
        f'<li><i class="swatch {css_of(word)}"></i><b>{escape(word)}</b> ({part}, {count[part, word]} frames): '
        f"{escape(rungs.MEANING[word])}</li>"
        for part, word in order
        if count[part, word]
    ]
    return f'<ul class="legend">{"".join(rows)}</ul>' if rows else ""


def reason_table(scene: Scene) -> str:
    rows = []
    for name, body in scene.bodies.items():
        valid = np.asarray(body.valid, bool)
        told = Counter(
            (str(r) or ("found" if v else "not found"), bool(v)) for r, v in zip(body.reason, valid, strict=True)
        )
        how = ", ".join(f"{escape(reason)}{'' if ok else ' (not valid)'} {n}" for (reason, ok), n in told.most_common())
        mean = f"{100 * float(np.mean(np.nan_to_num(body.confidence)[valid])):.0f} %" if valid.any() else "–"
        label = escape(LABELS.get(name, name))
        rows.append(_row((label, ""), (f"{valid.sum()} of {len(valid)}", "unit"), (mean, "unit"), (how, "")))
    if not rows:
        return ""
    head = "<tr><th>Body</th><th>Valid frames</th><th>Mean confidence</th><th>Where it comes from, in frames</th></tr>"
    return f'<table class="reasons">{head}{"".join(rows)}</table>'


def mask_strip(sequence: Sequence) -> str:
    """A row of frames with their masks."""
    if not sequence.masks or not len(sequence):
        return ""
    rows = np.unique(np.linspace(0, len(sequence) - 1, min(len(sequence), MAX_THUMBS)).round().astype(int))
    thumbs, key = [], []
    for i in rows:
        uri, frame = jpeg_uri(mask_overlay(sequence, int(i), 320 if len(rows) <= 24 else 224), 62), sequence.indices[i]
        picture = f'<img loading="lazy" alt="masks of frame {frame}" src="{uri}">'
        thumbs.append(f'<button class="thumb" data-frame="{i}">{picture}frame {frame}</button>')
    for name in sequence.masks:
        label, sure = escape(LABELS.get(name, name)), sequence.mask_confidence.get(name)
        if sure is not None and len(sure):
            label += f", mean confidence {100 * float(np.nan_to_num(sure).mean()):.0f} %"
        key.append(f'<span class="is-{escape(name)}"><i class="dot"></i>{label}</span>')
    key, thumbs = "".join(key), "".join(thumbs)
    return f'<section><h2>Masks</h2><p class="key">{key}</p><div class="thumbs">{thumbs}</div></section>'


def mask_overlay(sequence: Sequence, i: int, side: int) -> np.ndarray:
    """Frame `i` with its masks tinted and outlined, longest side `side`; (h,w,3) uint8."""
    image = fit(sequence.frames[i], side)
    out = image.astype(np.float32)
    for name, masks in sequence.masks.items():
        mask = cv2.resize(masks[i].astype(np.uint8), (image.shape[1], image.shape[0]), interpolation=cv2.INTER_NEAREST)
        color = np.array(MASK_COLORS.get(name, (255, 255, 0)), np.float32)
        inside = mask > 0
        out[inside] = 0.55 * out[inside] + 0.45 * color
        edge = inside & (cv2.erode(mask, np.ones((3, 3), np.uint8), borderValue=0) == 0)
        out[edge] = color
    return out.astype(np.uint8)


def metric_table(metrics: Mapping[str, float] | None) -> str:
    if not metrics:
        return ""
    rows, better = [], {"lower": "lower is better", "higher": "higher is better", "one": "1 is right"}
    for key, value in metrics.items():
        unit, direction, meaning = describe(key) or ("", "", "")
        shown = _number(value) if math.isfinite(value) else "–"
        meaning = f"{escape(meaning)} <span class='quiet'>({better[direction]})</span>" if meaning else ""
        name = f"<code>{escape(key)}</code>"
        rows.append(_row((name, ""), (shown, "figure"), (escape(unit), "unit"), (meaning, "")))
    head = "<tr><th>Figure</th><th></th><th></th><th>Meaning</th></tr>"
    return f"<section><h2>Measured against the truth</h2><table>{head}{''.join(rows)}</table></section>"


def note_list(notes: Listing[str]) -> str:
    if not notes:
        return ""
    return f'<section><h2>Notes</h2><ul class="notes">{"".join(f"<li>{escape(n)}</li>" for n in notes)}</ul></section>'


def about(
    sequence: Sequence, scene: Scene, timings: Mapping[str, float] | None, versions: Mapping[str, str] | None
) -> str:
    K = scene.K
    camera = [
        ("Focal length", f"{K[0, 0]:.1f}, {K[1, 1]:.1f} px"),
        ("Principal point", f"{K[0, 2]:.1f}, {K[1, 2]:.1f} px"),
        ("Field of view", f"{math.degrees(2 * math.atan(scene.size[0] / 2 / K[0, 0])):.0f}° across"),
        ("Intrinsics", K_SOURCES.get(sequence.K_source, sequence.K_source)),
    ]
    camera += [
        (f"{LABELS.get(n, n)} model", b.motion.model) for n, b in scene.bodies.items() if isinstance(b.motion, Skinned)
    ]
    if "object" in scene.bodies:
        shape = scene.bodies["object"].shape
        camera.append(("Object mesh", f"{len(shape.vertices):,} vertices, {len(shape.faces):,} triangles"))
    files = [
        ("scene.npz", "the whole result as arrays"),
        ("scene.glb", "animated scene for any glTF viewer"),
        ("object.ply", "coloured surface of the object; right.ply, left.ply: of the hands at rest"),
        ("object_splat.ply", "Gaussians of the object, 3DGS layout; right_splat.ply, left_splat.ply: of the hands"),
        ("preview.mp4", "video, overlay and turntable"),
    ]
    out = _pairs("Camera and bodies", camera)
    if timings:
        rows = [(name, _duration(s)) for name, s in timings.items()]
        out += _pairs("Time", rows + ([("all", _duration(sum(timings.values())))] if len(rows) > 1 else []))
    out += _pairs("Versions", list((_versions() if versions is None else versions).items()))
    return out + _pairs("Files beside this page", files, code=True)


def _pairs(title: str, rows: list[tuple[str, str]], code: bool = False) -> str:
    tag = ("<code>", "</code>") if code else ("", "")
    body = "".join(f"<tr><td>{tag[0]}{escape(str(a))}{tag[1]}</td><td>{escape(str(b))}</td></tr>" for a, b in rows)
    return f"<div><h2>{escape(title)}</h2><table>{body}</table></div>"


def _versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("handhold", "numpy", "torch", "opencv-python-headless", "pycolmap", "av"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _row(*cells: tuple[str, str]) -> str:
    """A table row of (html, class) cells."""
    return "<tr>" + "".join(f'<td class="{kind}">{html}</td>' for html, kind in cells) + "</tr>"


def _number(value: float) -> str:
    """Three significant figures, without an exponent."""
    value = float(value)
    digits = 0 if value == 0 or abs(value) >= 100 else max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}".rstrip("0").rstrip(".") if digits else f"{value:.0f}"


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{int(seconds // 60)} min {int(seconds % 60):02d} s"


def fit(image: np.ndarray, side: int) -> np.ndarray:
    scale = min(1.0, side / max(image.shape[:2]))
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


def jpeg(image: np.ndarray, quality: int) -> bytes:
    ok, data = cv2.imencode(".jpg", np.ascontiguousarray(image[:, :, ::-1]), [cv2.IMWRITE_JPEG_QUALITY, quality])
    if not ok:
        raise RuntimeError("OpenCV could not encode a JPEG")
    return data.tobytes()


def jpeg_uri(image: np.ndarray, quality: int) -> str:
    return "data:image/jpeg;base64," + base64.b64encode(jpeg(image, quality)).decode()
