"""The command line: `handhold run VIDEO`, each stage alone, and demo, render, synth, train, convert, assets, doctor.

Exit codes: 0 ok (also for a result marked partial), 2 wrong usage, 3 unusable input, 130 stopped by Ctrl-C.
Nothing heavy is imported before the arguments are known.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from .arguments import (
    AssetsArgs,
    ConvertArgs,
    DemoArgs,
    DoctorArgs,
    RenderArgs,
    RunArgs,
    StageArgs,
    SynthArgs,
    TrainArgs,
    parse,
)
from .config import BadConfig
from .errors import HandholdError


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in argv
    try:
        if argv[:1] == ["--version"]:
            from . import __version__

            print(f"handhold {__version__}")
            return 0
        command, args = parse(argv)
        return _COMMANDS.get(command, _stage)(command, args, argv)
    except HandholdError as e:
        _fail(str(e), e.exit_code, as_json)
        return e.exit_code
    except KeyboardInterrupt:
        again = "handhold " + shlex.join(argv)
        if as_json:
            print(json.dumps({"ok": False, "stopped": True, "resume": again}))
        print(f"\nStopped. What is finished is kept; go on with:\n  {again}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # e.g. piped into head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as e:
        if as_json:  # a defect of ours: whoever reads the JSON must know, and the traceback goes to stderr
            print(json.dumps({"ok": False, "error": f"{type(e).__name__}: {e}", "exit_code": 1}))
        raise


def _run(command: str, args: RunArgs, argv: list[str]) -> int:
    out = args.out if args.out is not None else _default_out(args.video)
    return _pipeline(args, args.video, out)


def _stage(command: str, args: StageArgs, argv: list[str]) -> int:
    from .errors import UnusableInput
    from .runs import is_run

    if is_run(args.target):
        return _pipeline(args, None, args.target, command)
    if command != "prepare":
        how = f"make one with `handhold run VIDEO --out {args.target}`"
        raise UnusableInput(f"{args.target} is not a run folder; {how}.")
    return _pipeline(args, args.target, args.out if args.out is not None else _default_out(args.target), command)


def _demo(command: str, args: DemoArgs, argv: list[str]) -> int:
    clip = Path(__file__).parent / "data" / "demo"
    prepare = replace(args.prepare, K=args.prepare.K or clip / "K.txt")
    evaluate = replace(args.evaluate, truth=args.evaluate.truth or clip / "gt.npz")
    return _pipeline(replace(args, prepare=prepare, evaluate=evaluate), clip / "video.mp4", args.out)


def _render(command: str, args: RenderArgs, argv: list[str]) -> int:
    from .errors import UnusableInput
    from .progress import make_progress
    from .runs import Run, is_run

    if not is_run(args.target):
        how = f"make one with `handhold run VIDEO --out {args.target}`"
        raise UnusableInput(f"{args.target} is not a run folder; {how}.")
    from .view.novel_files import render_run

    report = make_progress(None, args.quiet or args.json)
    report.begin("render")
    ended = "failed"
    try:
        told = render_run(Run(args.target), args.order(), report)
        ended = "done"
    finally:
        report.end(ended)
        report.close()
    if args.json:
        print(json.dumps({"ok": True, **told}))
    elif not args.quiet:
        print(told["folder"])
    return 0


def _synth(command: str, args: SynthArgs, argv: list[str]) -> int:
    from functools import partial

    from .datasets.synthetic import pathtraced
    from .datasets.synthetic.scenes import Synth, SynthConfig
    from .errors import UnusableInput
    from .progress import make_progress

    if min(args.samples, args.objects, args.paths) < 1 or args.shard < 16 or args.shard % 16:
        raise BadConfig("--samples, --objects and --paths are 1 or more, --shard a multiple of 16.")
    if min(args.size, *args.frame_size) < 32 or any(n % 2 for n in args.frame_size) or args.frames < 2 or args.fps <= 0:
        raise BadConfig("--size and --frame-size are 32 or more, --frame-size even, --frames 2 or more.")
    report = make_progress(None, args.quiet or args.json)
    report.begin("synth")
    ended = "failed"
    try:
        folders = {k: None if (v := getattr(args, k)) is None else str(v) for k in ("images", "meshes")}
        size = min(args.frame_size) if args.clip else args.size
        config = SynthConfig(size=size, objects=args.objects, seed=args.seed, amodal=args.amodal, **folders)
        report(0.0, "making objects")
        try:
            stream = Synth(config, args.device)
        except ValueError as e:
            raise UnusableInput(f"An object of {args.meshes or 'the bank'} cannot be used: {e}.") from e
        render = partial(pathtraced.render, samples=args.paths) if args.look == "path" else None
        if args.clip:
            from .datasets.synthetic.clips import ClipConfig, make_clip

            clip = ClipConfig(args.kind, args.hands, args.camera, args.turn, split=args.split)
            how = {"synth": stream, "render": render, "report": report}
            make_clip(args.out, clip, args.seed, args.frames, args.fps, args.frame_size, **how)
            told = {"files": {n: str(args.out / n) for n in ("video.mp4", "K.txt", "gt.npz", "clip.json")}}
        else:
            from .datasets.synthetic.shards import stream_settings, write_shards

            settings = stream_settings(stream) | {"look": [args.look, args.paths] if render else ["fast"]}
            stream.render = render or stream.render
            how = {"split": args.split, "image": "png" if args.png else "jpeg", "settings": settings}
            write_shards(stream, args.out, args.samples, args.shard, report, **how)
            told = {"samples": args.samples, "files": {"index.json": str(args.out / "index.json")}}
        ended = "done"
    finally:
        report.end(ended)
        report.close()
    if args.json:
        print(json.dumps({"ok": True, "folder": str(args.out), **told}))
    elif not args.quiet:
        print(args.out)
    return 0


def _train(command: str, args: TrainArgs, argv: list[str]) -> int:
    from . import train

    config = train.with_options(train.read_config(args.config), args.device, args.steps, args.budget_seconds)
    report = (lambda *a, **k: None) if args.quiet or args.json else train.Lines()
    done = train.run(args.kind, config, args.out, args.export, report, train.STARTED)
    if args.json:
        files = {k: str(v) for k, v in done.exports.items()}
        figures = {"steps": done.steps, "seconds": round(done.seconds, 1), "metrics": done.metrics}
        print(json.dumps({"ok": True, **figures, "files": files}))
    elif not args.quiet:
        for name, value in done.metrics.items():
            print(f"{name:40s} {value:.3f}")
        for path in done.exports.values():
            print(path)
    return 0


def _convert(command: str, args: ConvertArgs, argv: list[str]) -> int:
    from .runs import is_run

    if args.kind == "hold-build" or (args.kind == "auto" and is_run(args.source)):
        return _hold_build(args)
    from .regressors.adapters import convert_checkpoint

    made = convert_checkpoint(args.source, args.target, args.kind, args.mano, args.sampling, args.dtype)
    print(json.dumps({"ok": True, "file": str(args.target)} | made) if args.json else args.target)
    return 0


def _hold_build(args: ConvertArgs) -> int:
    from .runs import open_run
    from .stages.hold_build import write_hold_build

    notes = write_hold_build(open_run(args.source), args.target, args.mano)
    if args.json:
        print(json.dumps({"ok": True, "kind": "hold-build", "folder": str(args.target), "notes": list(notes)}))
    else:
        print("\n".join([*(f"note: {note}" for note in notes), str(args.target)]))
    return 0


def _assets(command: str, args: AssetsArgs, argv: list[str]) -> int:
    from . import assets

    if not args.status:
        tell = None if args.json else lambda text: print(text, file=sys.stderr, flush=True)
        assets.fetch(progress=tell, wheel=args.wheel)
    state = assets.status()
    missing = [name for name, s in state.items() if not s]
    if args.json:
        print(json.dumps({"ok": not missing, "assets": {k: str(v) if v else None for k, v in state.items()}}))
    else:
        for name, s in state.items():
            print(f"{name:32s} {s if s else 'missing; get it with `handhold assets`'}")
    return 3 if missing else 0


def _doctor(command: str, args: DoctorArgs, argv: list[str]) -> int:
    from .doctor import examine, print_findings

    findings = examine()
    ok = all(f.ok or not f.needed for f in findings)
    if args.json:
        print(json.dumps({"ok": ok, "findings": [vars(f) for f in findings]}, indent=1))
    else:
        print_findings(findings)
    return 0 if ok else 3


_COMMANDS: dict[str, Callable[[str, Any, list[str]], int]] = {
    "run": _run,
    "demo": _demo,
    "render": _render,
    "synth": _synth,
    "train": _train,
    "convert": _convert,
    "assets": _assets,
    "doctor": _doctor,
}


def _pipeline(args: Any, video: Path | None, out: Path, only: str | None = None) -> int:
    from .pipeline import run
    from .progress import make_progress
    from .runs import Run

    out = Path(out)
    report = make_progress(None, args.quiet or args.json)
    try:
        result = run(video, out, args.settings(), report, first=only, last=only, fresh=args.fresh)
    finally:
        report.close()
    summary = summarize(result)
    if args.json:
        print(json.dumps(summary, allow_nan=False))
    elif not args.quiet:
        _print_summary(summary, Run(out))
    return 0


def summarize(result: Any) -> dict[str, Any]:
    """What `--json` prints: state, metrics, files, seconds per stage, notes."""
    root = result.run.root
    try:
        told = json.loads(result.run.metrics_path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        told = {}
    bodies = [f"{body}{kind}.ply" for body in ("object", "right", "left") for kind in ("", "_splat")]
    names = ("scene.npz", "scene.glb", *bodies, "metrics.json", "report.html", "preview.mp4")
    return {
        "ok": True,
        "run": str(root),
        "stages": list(result.stages),
        "kept": list(result.kept),
        "partial": result.partial,
        "reasons": list(result.reasons),
        "notes": list(result.notes),
        "metrics": told.get("metrics", {}),
        "bodies": told.get("bodies", {}),
        "seconds": {k: round(v, 2) for k, v in result.seconds.items()},
        "peak_mb": round(result.peak_mb),
        "files": {n: str(root / n) for n in names if (root / n).is_file()},
    }


def _print_summary(summary: dict[str, Any], run: Any) -> None:
    for name, body in summary["bodies"].items():
        print(f"{name:14s} {body['valid']} of {body['frames']} frames")
    for name, value in summary["metrics"].items():
        print(f"{name:14s} {'-' if value is None else format(value, '.3f')}")
    for reason in summary["reasons"]:
        print(f"partial: {reason}")
    seconds = sum(summary["seconds"].values())
    kept = set(summary["stages"]) <= set(summary["kept"])  # then this process has done nothing worth a figure
    print(f"{'time':14s} {seconds:.0f} s, " + ("kept from before" if kept else f"at most {summary['peak_mb']} MB"))
    report = summary["files"].get("report.html")
    print(f"{'report':14s} {report}" if report else f"{'run folder':14s} {summary['run']}")


def _fail(message: str, code: int, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"ok": False, "error": message, "exit_code": code}))
    print(f"handhold: {message}", file=sys.stderr)


def _default_out(video: Path) -> Path:
    video = Path(video)
    if video.name == "build" and (video / "data.npy").is_file():  # HOLD's folder: the sequence is the one around it
        video = video.absolute().parent
    return Path("runs") / (video.stem or "run")


if __name__ == "__main__":
    sys.exit(main())
