#!/usr/bin/env python3
"""Write the tables of README.md and docs/ from benchmarks/results/, each between its two markers.

`<!-- NAME:begin -->` and `<!-- NAME:end -->` hold the block NAME of BLOCKS. A page has those it has markers for.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import tables_methods
import tables_tracking

HERE = Path(__file__).parent
PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/models.md",
    "docs/methods/tracking.md",
    "docs/methods/bigs.md",
    "docs/methods/hold.md",
)
COLUMNS = (  # title, metric, format
    ("frames %", "frames", "{:.0f}"),
    ("MPJPE right mm", "mpjpe_right", "{:.1f}"),
    ("MPJPE left mm", "mpjpe_left", "{:.1f}"),
    ("CD cm²", "cd", "{:.2f}"),
    ("F10 %", "f10", "{:.0f}"),
    ("rotation °", "rot_deg", "{:.1f}"),
    ("CD_h right cm²", "cd_right", "{:.1f}"),
)


def clips_table(results: dict) -> str:
    """Accuracy: one row per clip, columns without a single figure left out."""
    clips = results.get("clips", {})
    if not clips:
        return "No results yet: `make bench HANDHOLD_BENCH=FOLDER`."
    metrics = {name: row.get("metrics") or {} for name, row in clips.items()}
    columns = [c for c in COLUMNS if any(m.get(c[1]) is not None for m in metrics.values())]
    lines = ["| clip | " + " | ".join(c[0] for c in columns) + (" | " if columns else "") + "time s | peak MB |"]
    lines.append("|---" * (len(columns) + 3) + "|")
    for name, row in clips.items():
        cells = ["–" if metrics[name].get(key) is None else form.format(metrics[name][key]) for _, key, form in columns]
        if "error" in row:
            cells = [row["error"]] + ["–"] * (len(columns) - 1) if columns else []
        label = name + (" (partial)" if row.get("partial") else "")
        lines.append(f"| {' | '.join([label, *cells, format(row['wall_s'], '.0f'), str(row['peak_mb'])])} |")
    machines = sorted({f"handhold {row['handhold']}, {row['machine']}" for row in clips.values()})
    lines += [
        "",
        f"Measured with {'; '.join(machines)}. Written by `benchmarks/tables.py` from `benchmarks/results/bench.json`.",
    ]
    return "\n".join(lines)


def speed_table(results: dict) -> str:
    """Every case: ours, and each peer with how many times slower it is."""
    lines = ["| task | handhold CPU-ms | against | CPU-ms | times slower | asked |", "|---|---|---|---|---|---|"]
    for case in results.get("cases", {}).values():
        asked = f" (asked {case['asked']})" if "asked" in case else ""
        start = f"| {case['title']} | {_number(case['ours']['median'])}{asked} "
        for name, peer in case["peers"].items():
            if "ratio" not in peer:
                lines.append(f"{start}| {name} | {peer['absent']} | | {peer.get('asked', '')} |")
            else:
                ratio = peer["ratio"]
                spread = f"{_number(ratio['median'])} ({_number(ratio['q1'])}–{_number(ratio['q3'])})"
                lines.append(
                    f"{start}| {name} | {_number(peer['time']['median'])} | {spread} | {peer.get('asked', '')} |"
                )
            start = "| | "
    return _signed(lines, results, results.get("cases", {}).values())


def splat_table(results: dict) -> str:
    """Splat forward+backward over numbers of Gaussians and image sizes: ours and the peers, with the ratio."""
    rows = results.get("sections", {}).get("table", {}).get("rows", [])
    names = list(dict.fromkeys(name for row in rows for name in row["peers"]))
    lines = ["| Gaussians @ px | handhold | " + " | ".join(names) + " |", "|---" * (len(names) + 2) + "|"]
    for row in rows:
        cells = [f"{row['gaussians'] // 1000}k @ {row['px']}", _number(row["ours"]["median"])]
        for name in names:
            p = row["peers"][name]
            cells.append(
                f"{_number(p['time']['median'])} ({_number(p['ratio']['median'])}x)" if "ratio" in p else p["absent"]
            )
        lines.append(f"| {' | '.join(cells)} |")
    return _signed(lines, results, rows)


def machine_table(results: dict) -> str:
    """Threads, a busy process beside, and the share of the machine's limit."""
    names = ("threads", "busy", "limits")
    sections = {name: part for name, part in results.get("sections", {}).items() if name in names}
    lines = ["| | measured |", "|---|---|"]
    for name, row in sections.get("threads", {}).get("rows", {}).items():
        lines.append(
            f"| {name}, 2 threads over 1, wall: medians; best of each; CPU time shared | {row['speedup_of_medians']}x; "
            f"{row['speedup_of_best']}x; {row['shared_cpu']}x |"
        )
    beside = sections.get("busy", {}).get("rows", {})
    for k, row in beside.items():
        slower = f", {row['median'] / beside['alone']['median']:.1f} times slower" if k != "alone" else ""
        what = "alone" if k == "alone" else f"beside {k} busy process{'es' * (k != '1')}"
        lines.append(f"| splat on all cores, wall, {what} | {_number(row['median'])} ms{slower} |")
    limits = sections.get("limits", {})
    if limits:
        peak = limits["peak_one_thread"]
        lines.append(
            f"| one thread's peak: multiply-add loop; matrix product; copy | {peak['fma_gflops'] or '–'} GFLOP/s; "
            f"{peak['mm_gflops']} GFLOP/s; {peak['copy_gbs']} GB/s |"
        )
    for name, row in limits.get("rows", {}).items():
        floor = row["floor_ms"]
        if "pairs" in row:
            counts = f"{row['intersections']:,}; {row['pairs']:,}"
            lines.append(f"| {name}: tile intersections; pixel-Gaussian pairs drawn | {counts} |")
        lines += [
            f"| {name}: useful operations; compulsory bytes | {row['mflop']} MFLOP; {row['mbytes']} MB |",
            f"| {name}: least time by operations; by bytes; measured | {floor['operations']} ms; {floor['bytes']} ms; "
            f"{row['cpu_ms']} ms: {100 * row['share_of_limit']:.1f} % of the limit |",
        ]
    return _signed(lines, results, sections.values())


def bars_table(results: dict) -> str:
    """Every demand with what was measured."""
    lines = ["| demand | measured | asked | met |", "|---|---|---|---|"]
    for b in results.get("bars", []):
        value = "not measured" if b["value"] is None else _number(b["value"])
        lines.append(f"| {b['what']} | {value} | {b['bar']} | {'yes' if b['passed'] else '**no**'} |")
    return _signed(lines, results, [])


def recon_table(results: dict) -> str:
    """Reconstruction from masked views: median over seeds and, in brackets, the worst."""
    if not results:
        return "No results yet: `python benchmarks/recon.py`."
    columns = {
        "CPU s": "cpu_s", "surface mm": "mean", "seen surface mm": "seen_mean", "95 % mm": "p95",
        "rotation °": "rotation_deg_median", "place mm": "translation_mm_median", "hidden": "hidden_share",
    }  # fmt: skip
    lines = [f"| case | seeds | {' | '.join(columns)} | asked |", "|---" * (len(columns) + 3) + "|"]
    for name, case in results["cases"].items():
        n, cells = len(case["seeds"]), []
        for key in columns.values():
            if key not in case["median"]:
                cells.append("–")
                continue
            worst = f" ({_number(case['worst'][key])})" if n > 1 else ""
            cells.append(_number(case["median"][key]) + worst)
        asked = "; ".join(
            f"{next(k for k, v in columns.items() if v == key)} <= {b['bar']:g}"
            + ("" if b["worst"] <= b["bar"] else ", **missed**")
            for key, b in case.get("bars", {}).items()
        )
        lines.append(f"| {name.replace('_', ' ')} | {n} | {' | '.join(cells)} | {asked} |")
    sign = f"One thread, {results['machine']}, {results['isa']}, torch {results['torch']}."
    return "\n".join([*lines, "", f"{sign} Written by `benchmarks/tables.py` from `benchmarks/results/recon.json`."])


def regressor_table(results: dict) -> str:
    """Both families of hand regressors by how much of the hand is hidden, then what they cost."""
    rows = {k: v for k, v in results.get("networks", {}).items() if "levels" in v}
    if not rows:
        return "No results yet: `python benchmarks/frontend.py CHECKPOINT...`."
    titles = {
        "hands": "hands", "pa_mpjpe": "PA-MPJPE mm (asked <= 9)",
        "pa_mpvpe": "PA-MPVPE mm (asked <= 9)", "mpjpe": "MPJPE mm (asked <= 20)",
        "points": "2D, % of the hand", "place": "wrist in the camera mm (median)",
    }  # fmt: skip
    lines = [f"| family | hidden | {' | '.join(titles.values())} |", "|---" * (len(titles) + 2) + "|"]
    for name, row in rows.items():
        levels = row["levels"] | {k: v for k, v in row["others"].items() if v}
        for level, figures in levels.items():
            lines.append(f"| {name} | {level} | {' | '.join(_number(figures[k]) for k in titles)} |")
            name = ""
    lines += [
        "",
        "| family | parameters M | file MB | ms a hand, best (median) | peak MB | steps | trained s |",
        "|---" * 7 + "|",
    ]
    return "\n".join([*lines, *_costs(rows), "", _held_out(results)])


def segmenter_table(results: dict) -> str:
    """Intersection over union of each mask, and the cost."""
    row = results.get("networks", {}).get("segmenter")
    if not row:
        return "No results yet: `python benchmarks/frontend.py CHECKPOINT...`."
    names = list(row["iou"]["alone"])
    lines = [f"| IoU | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for key, title in (("alone", "one picture"), ("previous", "given spoilt masks of a frame before")):
        lines.append(f"| {title} | {' | '.join(format(row['iou'][key][k], '.3f') for k in names)} |")
        one = row.get("hands_as_one", {}).get(key)
        if one:  # both columns of hands hold the same
            cells = [format(one.get(k, one["hands"]), ".3f") for k in names]
            lines.append(f"| {title}, both hands as one | {' | '.join(cells)} |")
    lines += [
        "",
        "| | parameters M | file MB | ms a 480x360 frame, best (median) | peak MB | steps | trained s |",
        "|---" * 7 + "|",
    ]
    return "\n".join([*lines, *_costs({"segmenter": row}), "", _held_out(results)])


def _costs(rows: dict) -> list[str]:
    out = []
    for name, row in rows.items():
        c, t = row["cost"], row.get("training") or {}
        cells = [
            f"{c['parameters'] / 1e6:.2f}",
            c["file_mb"],
            f"{c['ms']} ({c['ms_median']})",
            c["peak_mb"],
            t.get("steps", "–"),
        ]
        out.append(f"| {name} | {' | '.join(map(str, [*cells, t.get('seconds', '–')]))} |")
    return out


def _held_out(results: dict) -> str:
    d = results["data"]
    threads = {row["cost"]["threads"] for row in results["networks"].values()}
    seen = f"{d['pictures']} generated pictures of {d['size']} px, split {d['split']}, seed {d['seed']}"
    where = f"{results['machine']}, torch {results['torch']}, {results['date']}"
    return (
        f"{seen}; cost on {', '.join(map(str, sorted(threads)))} threads; {where}. "
        "Written by `benchmarks/tables.py` from `benchmarks/results/`."
    )


def _number(x: float) -> str:
    """Three digits, without an exponent."""
    return f"{x:.0f}" if abs(x) >= 100 else f"{x:.3g}"


def _signed(lines: list[str], results: dict, parts: Iterable[dict]) -> str:
    if not results:
        return "No results yet: `python benchmarks/render.py`."
    m, loads = results["machine"], sorted(part["load"] for part in parts)
    quick = "A --quick run, not a measurement. " if results["quick"] else ""
    load = f", load {loads[0]:g} to {loads[-1]:g}" if loads else ""
    sign = f"{quick}{m['cpu']}, {m['cores']} cores, {m['isa']}{load}, {results['date']}."
    return "\n".join([*lines, "", f"{sign} Written by `benchmarks/tables.py` from `benchmarks/results/render.json`."])


BLOCKS: dict[str, tuple[str, Callable[[dict], str]]] = {
    "results": ("bench.json", clips_table),
    "render": ("render.json", speed_table),
    "splat": ("render.json", splat_table),
    "machine": ("render.json", machine_table),
    "bars": ("render.json", bars_table),
    "recon": ("recon.json", recon_table),
    "regressors": ("frontend.json", regressor_table),
    "segmenter": ("frontend.json", segmenter_table),
    "families": ("families.json", regressor_table),
    "methods": ("methods.json", tables_methods.methods_table("rigid", "bigs", "hold", variants=False)),
    "bigs": ("methods.json", tables_methods.methods_table("rigid", "bigs")),
    "hold": ("methods.json", tables_methods.methods_table("rigid", "hold")),
    "tracking": ("tracking.json", tables_tracking.results_table),
    "tracking-sfm": ("tracking.json", tables_tracking.baselines_table),
    "tracking-rungs": ("tracking.json", tables_tracking.rungs_table),
    "tracking-ablation": ("tracking.json", tables_tracking.ablation_table),
}


def insert(page: str, name: str, text: str) -> str:
    """The page with the block between its markers replaced; as it is where it has no such markers."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    return re.sub(f"{begin}.*?{end}", lambda _: f"{begin}\n{text}\n{end}", page, flags=re.DOTALL)


def main() -> int:
    for path in (HERE.parent / page for page in PAGES):
        page = path.read_text(encoding="utf-8")
        for name, (file, make) in BLOCKS.items():
            try:
                results = json.loads((HERE / "results" / file).read_text(encoding="utf-8"))
            except OSError:
                results = {}
            page = insert(page, name, make(results))
        path.write_text(page, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
