#!/usr/bin/env python3
"""Write the README's results table from benchmarks/results/bench.json, between its two markers."""

from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
COLUMNS = (  # title, metric, format
    ("frames %", "frames", "{:.0f}"),
    ("MPJPE right mm", "mpjpe_right", "{:.1f}"),
    ("MPJPE left mm", "mpjpe_left", "{:.1f}"),
    ("CD cm²", "cd", "{:.2f}"),
    ("F10 %", "f10", "{:.0f}"),
    ("rotation °", "rot_deg", "{:.1f}"),
    ("CD_h right cm²", "cd_right", "{:.1f}"),
)


def table(results: dict) -> str:
    """Markdown: one row per clip, columns without a single figure left out."""
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


def insert(readme: str, text: str) -> str:
    """The README with the block between the markers replaced. Raises ValueError without the markers."""
    before, found, rest = readme.partition(BEGIN)
    _, found_end, after = rest.partition(END)
    if not found or not found_end:
        raise ValueError(f"the README needs the lines {BEGIN} and {END}")
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


def main() -> int:
    try:
        results = json.loads((HERE / "results" / "bench.json").read_text(encoding="utf-8"))
    except OSError:
        results = {}
    readme = HERE.parent / "README.md"
    readme.write_text(insert(readme.read_text(encoding="utf-8"), table(results)), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
