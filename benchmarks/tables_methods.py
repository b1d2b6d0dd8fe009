"""The table of methods in the README and docs/methods/, from methods.json; see tables.py."""

from __future__ import annotations

from collections.abc import Callable

NOTHING = "No results yet: `python benchmarks/methods.py FOLDER RUNS --method {}`."
COLUMNS = (  # title, metric, format
    ("CD cm²", "cd", "{:.2f}"),
    ("F5 %", "f5", "{:.0f}"),
    ("F10 %", "f10", "{:.0f}"),
    ("rotation °", "rot_deg", "{:.1f}"),
    ("CD_h right cm²", "cd_right", "{:.1f}"),
    ("CD_h left cm²", "cd_left", "{:.1f}"),
    ("MPJPE right mm", "mpjpe_right", "{:.1f}"),
    ("MPJPE left mm", "mpjpe_left", "{:.1f}"),
    ("PSNR dB", "psnr", "{:.1f}"),
    ("SSIM", "ssim", "{:.2f}"),
    ("mask IoU", "mask_iou", "{:.2f}"),
)


def methods_table(*names: str, variants: bool = True) -> Callable[[dict], str]:
    """A maker of the table of these methods, with those of their variants (`NAME:VARIANT`) that were measured."""

    def make(results: dict) -> str:
        chosen = {k: v for k, v in results.get("methods", {}).items() if k.partition(":")[0] in names}
        if not variants:
            chosen = {k: v for k, v in chosen.items() if k in names}
        rows = [(name, clip, row) for name, clips in chosen.items() for clip, row in clips.items()]
        if not rows:
            return NOTHING.format(" ".join(names))
        columns = [c for c in COLUMNS if any((row.get("metrics") or {}).get(c[1]) is not None for *_, row in rows)]
        lines = ["| clip | method | " + " | ".join(c[0] for c in columns) + " | fit s | peak MB |"]
        lines.append("|---" * (len(columns) + 4) + "|")
        for name, clip, row in sorted(rows, key=lambda r: (r[1], names.index(r[0].partition(":")[0]), r[0])):
            metrics = row.get("metrics") or {}
            cells = [form.format(metrics[k]) if metrics.get(k) is not None else "–" for _, k, form in columns]
            if "error" in row:
                cells = [row["error"], *["–"] * (len(columns) - 1)]
            label = name.replace(":", ", ")
            cells += [f"{row['fit_s']:.0f}" if "fit_s" in row else "–", str(row.get("fit_peak_mb", "–"))]
            lines.append(f"| {' | '.join([clip, label, *cells])} |")
        days = sorted({row["when"] for *_, row in rows if "when" in row})
        lines += [
            "",
            f"Measured {' and '.join(days)} with handhold {results.get('handhold')} on {results.get('cpus')} cores "
            f"({results.get('machine')}), all from the same tracks. Written by `benchmarks/tables.py` from "
            "`benchmarks/results/methods.json`.",
        ]
        return "\n".join(lines)

    return make
