"""The tables of docs/methods/tracking.md, from tracking.json and tracking_baselines.json; see tables.py."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

NOTHING = "No results yet: `python benchmarks/tracking.py FOLDER`."
Column = tuple[str, tuple[str, str], str]  # title, (part of the row, figure), format
TRACKS: tuple[Column, ...] = (
    ("poses %", ("tracks", "poses"), "{:.0f}"),
    ("rotation °", ("tracks", "rot_deg"), "{:.1f}"),
    ("place mm", ("tracks", "place_mm"), "{:.1f}"),
    ("object to hand, size %", ("tracks", "scale_error"), "{:+.1f}"),
    ("MPJPE right mm", ("tracks", "mpjpe_right"), "{:.1f}"),
    ("PA right mm", ("tracks", "pa_mpjpe_right"), "{:.1f}"),
    ("MPJPE left mm", ("tracks", "mpjpe_left"), "{:.1f}"),
    ("PA left mm", ("tracks", "pa_mpjpe_left"), "{:.1f}"),
    ("IoU object", ("tracks", "iou_object"), "{:.3f}"),
    ("IoU right", ("tracks", "iou_right"), "{:.3f}"),
    ("IoU left", ("tracks", "iou_left"), "{:.3f}"),
    ("IoU any hand", ("tracks", "iou_hand"), "{:.3f}"),
    ("prepare s", ("seconds", "prepare"), "{:.0f}"),
    ("track s", ("seconds", "track"), "{:.0f}"),
)
FIT: tuple[Column, ...] = (
    ("frames %", ("fit", "frames_given"), "{:.0f}"),
    ("rotation °", ("fit", "rot_deg"), "{:.1f}"),
    ("MPJPE right mm", ("fit", "mpjpe_right"), "{:.1f}"),
    ("PA right mm", ("fit", "pa_mpjpe_right"), "{:.1f}"),
    ("MPJPE left mm", ("fit", "mpjpe_left"), "{:.1f}"),
    ("size ratio", ("fit", "scale_ratio"), "{:.3f}"),
    ("CD cm²", ("fit", "cd"), "{:.2f}"),
    ("F10 %", ("fit", "f10"), "{:.0f}"),
    ("CD_h right cm²", ("fit", "cd_right"), "{:.1f}"),
    ("CD_h left cm²", ("fit", "cd_left"), "{:.1f}"),
    ("fit s", ("seconds", "fit"), "{:.0f}"),
)
ASKED = {  # of rigid clips; docs/methods/tracking.md names what differs
    "poses": ">= 95", "rot_deg": "<= 2.5", "scale_error": "within 3", "mpjpe_right": "<= 10", "pa_mpjpe_right": "<= 7",
    "mpjpe_left": "<= 14", "iou_object": ">= 0.90", "iou_hand": ">= 0.85", "track": "<= 150 with prepare",
    "frames_given": ">= 95", "scale_ratio": "0.97 to 1.03", "cd_right": "<= 8",
}  # fmt: skip
KINDS = {"default": "", "corrupt": " (spoilt)", "corrupt+learned": " (spoilt, `handhold[xfeat]` installed)"}
ABLATED = {
    "poses",
    "rot_deg",
    "scale_error",
    "mpjpe_right",
    "pa_mpjpe_right",
    "frames_given",
    "scale_ratio",
    "cd_right",
}


def figure(row: dict, key: tuple[str, str]) -> float | None:
    """A figure of a row, that against a peer's joints where there is no true one; None where there is neither."""
    part = row.get(key[0]) or {}
    value = part.get(key[1])
    return part.get(f"{key[1]}_peer") if value is None else value


def results_table(results: dict) -> str:
    """Tracks alone, then after the fit: one line per clip, and one for its spoilt evidence."""
    rows = {
        name + KINDS[kind]: row
        for name, kinds in results.get("clips", {}).items()
        for kind, row in kinds.items()
        if kind in KINDS
    }
    if not rows:
        return NOTHING
    lines = _columns(rows, TRACKS, ("peak MB", lambda row: str(max(row.get("peak_mb", {}).values(), default="–"))))
    if any("fit" in row for row in rows.values()):
        lines += ["", "After the default fit:", "", *_columns(rows, FIT)]
    return "\n".join([*lines, "", _sign(rows.values())])


def baselines_table(results: dict, baselines: dict | None = None) -> str:
    """What structure from motion by itself does on these clips, beside ours: frames in a model @ rotation error."""
    if baselines is None:
        path = Path(__file__).parent / "results" / "tracking_baselines.json"
        baselines = json.loads(path.read_text(encoding="utf-8"))
    lines = [
        f"| clip | {' | '.join(baselines['columns'].values())} | ours, own masks |",
        "|---" * (len(baselines["columns"]) + 2) + "|",
    ]
    for name, row in baselines["clips"].items():
        cells = [", ".join(f"{n} @ {e}°" for n, e in row.get(k, [])) or "–" for k in baselines["columns"]]
        mine = results.get("clips", {}).get(name, {}).get("default", {})
        rot, share = figure(mine, ("tracks", "rot_deg")), figure(mine, ("tracks", "poses"))
        ours = "–" if rot is None or share is None else f"{round(share * mine['frames'] / 100)} @ {rot:.1f}°"
        lines.append(f"| {' | '.join([name, *cells, ours])} |")
    what = f"{baselines['what'].split(':')[0]}, {baselines['date']}"
    lines += ["", f"Baselines: {what}; n @ e: frames in one model @ median error of its relative rotations."]
    return "\n".join(lines)


def rungs_table(results: dict) -> str:
    """How many frames each rung placed, by clip."""
    rows = {name: kinds["default"] for name, kinds in results.get("clips", {}).items() if "default" in kinds}
    rows = {name: row["rungs"] for name, row in rows.items() if "rungs" in row}
    if not rows:
        return NOTHING
    told = lambda counts: "; ".join(f"{n} {reason}" for reason, n in counts.items()) or "–"  # noqa: E731
    lines = [
        "| clip | object, tracking alone | object, after the fit | right hand | left hand |",
        "|---|---|---|---|---|",
    ]
    for name, counts in rows.items():
        cells = [told(counts.get(k, {})) for k in ("object", "object after the fit", "right", "left")]
        lines.append(f"| {' | '.join([name, *cells])} |")
    return "\n".join(lines)


def ablation_table(results: dict) -> str:
    """Means over the clips that a step was left out on and, in brackets, what the default gives on the same clips."""
    clips = results.get("clips", {})
    names = dict.fromkeys(k for kinds in clips.values() for k in kinds if k.startswith("without:"))
    if not names:
        return NOTHING.replace("FOLDER", "FOLDER --without all")
    columns = [c for c in (*TRACKS, *FIT) if c[1][1] in ABLATED and (c[1][0] == "tracks" or c[1][1] not in _TRACKED)]
    lines = [f"| without | clips | {' | '.join(c[0] for c in columns)} |", "|---" * (len(columns) + 2) + "|"]
    for name in names:
        pairs = {k: (v[name], v["default"]) for k, v in clips.items() if name in v and "default" in v}
        cells = [name.removeprefix("without:"), ", ".join(pairs)]
        for _, key, form in columns:
            both = [(figure(a, key), figure(b, key)) for a, b in pairs.values()]
            both = np.array([p for p in both if None not in p]).reshape(-1, 2)
            cells.append("{} ({})".format(*map(form.format, both.mean(0))) if len(both) else "–")
        lines.append(f"| {' | '.join(cells)} |")
    failed = [f"{c}, {n}: {v[n]['error']}" for c, v in clips.items() for n in names if "error" in v.get(n, {})]
    return "\n".join(
        [*lines, "", *(f"Failed: {text}\n" for text in failed), _sign(v[n] for v in clips.values() for n in v)]
    )


_TRACKED = {key[1] for _, key, _ in TRACKS}


def _columns(rows: dict[str, dict], columns: Iterable[Column], *more) -> list[str]:
    shown = [c for c in columns if any(figure(row, c[1]) is not None for row in rows.values())]
    titles = [c[0] for c in shown] + [title for title, _ in more]
    lines = [f"| clip | {' | '.join(titles)} |", "|---" * (len(titles) + 1) + "|"]
    for name, row in rows.items():
        cells = ["–" if (v := figure(row, key)) is None else form.format(v) for _, key, form in shown]
        if "error" in row and set(cells) <= {"–"}:
            cells = [row["error"], *["–"] * (len(shown) - 1)] if shown else []
        lines.append(f"| {' | '.join([name, *cells, *(make(row) for _, make in more)])} |")
    asked = [ASKED.get(key[1], "") for _, key, _ in shown]
    return [*lines, f"| {' | '.join(['asked', *asked, *('<= 3000' for _ in more)])} |"]


def _sign(rows: Iterable[dict]) -> str:
    told = sorted({f"handhold {r['handhold']}, {r['machine']}, {r['date']}" for r in rows})
    return (
        f"Measured with {'; '.join(told)}. Written by `benchmarks/tables.py` from `benchmarks/results/tracking.json`."
    )
