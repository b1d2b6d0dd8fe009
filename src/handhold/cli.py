"""The command line: `handhold run VIDEO`, each stage alone, and demo, synth, train, convert, assets, doctor.

Exit codes: 0 ok (also for a result marked partial), 2 wrong usage, 3 unusable input, 130 stopped by Ctrl-C.
Nothing heavy is imported before the arguments are known.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .config import (
    PRESETS,
    STAGES,
    BadConfig,
    Config,
    EvaluateConfig,
    ExportConfig,
    FitConfig,
    PrepareConfig,
    TrackConfig,
    preset,
    read_toml,
)
from .errors import HandholdError

Bare = tyro.conf.arg(name="")  # a table whose settings are given without its name: --stride, not --prepare.stride
Method = Literal["rigid"]
COMMANDS = ("run", *STAGES, "demo", "synth", "train", "convert", "assets", "doctor")


@dataclass(frozen=True)
class _Common:
    config: Path | None = None
    """TOML file with settings; options on the command line win over it."""
    preset: Literal["default", "draft"] = "default"
    """Named settings to start from."""
    fresh: bool = False
    """Do the chosen stages again even if nothing has changed."""
    quiet: bool = False
    """Print nothing but errors."""
    json: bool = False
    """Print one JSON object with the result on stdout, and nothing else there."""


@dataclass(frozen=True)
class _Settings:
    prepare: Annotated[PrepareConfig, Bare] = PrepareConfig()
    track: TrackConfig = TrackConfig()
    fit: FitConfig = FitConfig()
    evaluate: Annotated[EvaluateConfig, Bare] = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    method: Method = "rigid"
    """What the scene is made of: `rigid` is skinned hands and one rigid object."""
    seed: int = 0
    """Seed of every random choice; the same seed, video and settings give the same numbers."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda:0."""

    def settings(self) -> Config:
        return Config(
            self.prepare, self.track, self.fit, self.evaluate, self.export, self.method, self.seed, self.device
        )


@dataclass(frozen=True)
class RunArgs(_Settings, _Common):
    """Reconstruct the hands and the object of a video: prepare, track, fit, evaluate and export."""

    video: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="VIDEO")] = tyro.MISSING
    """Video file, or folder of png or jpg frames."""
    out: Path | None = None
    """Run folder; runs/<name of the video> by default. The same command goes on where it stopped."""


@dataclass(frozen=True)
class StageArgs(_Settings, _Common):
    """One stage of a run folder, with the settings of that run unless others are given."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run folder; for `prepare` also a video, whose run folder is --out."""
    out: Path | None = None
    """Run folder when the target is a video; runs/<name of the video> by default."""


@dataclass(frozen=True)
class DemoArgs(_Settings, _Common):
    """Reconstruct the built-in clip and score it against its truth."""

    out: Path = Path("runs/demo")
    """Run folder."""


@dataclass(frozen=True)
class SynthArgs:
    """Make pictures of hands and objects with exact truth: shards of single pictures, or with --clip a video."""

    out: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="OUT")] = tyro.MISSING
    """Folder to write. The same command goes on where it stopped; more samples are added to those there."""
    samples: int = 1024
    """Pictures."""
    size: int = 256
    """Their width and height, pixels."""
    split: Literal["train", "val", "test"] = "train"
    """No two splits share an object, a print or a room."""
    seed: int = 0
    """Seed of everything; the same seed and settings give the same pictures."""
    look: Literal["fast", "path"] = "fast"
    """Rasterised, or path traced by Mitsuba (pip install "handhold[pathtraced]")."""
    paths: int = 48
    """Light paths per pixel of the path-traced look."""
    images: Path | None = None
    """Folder of pictures for backgrounds, used beside the procedural ones."""
    meshes: Path | None = None
    """Folder of closed meshes in metres (.obj, .ply) to be held, used beside the procedural objects."""
    objects: int = 600
    """Procedural objects."""
    amodal: bool = False
    """Also draw every body's mask as if it were alone."""
    png: bool = False
    """Keep pictures as PNG rather than JPEG."""
    shard: int = 256
    """Pictures per shard, a multiple of 16."""
    clip: bool = False
    """Make one video with truth, fit for `handhold run` and its --truth."""
    kind: Literal["hold", "grasp", "regrasp", "hinge", "squeeze", "empty"] = "hold"
    """What happens in the video: held and turned all the time, taken and put back, taken otherwise half way, opened,
    squeezed, or nothing held."""
    hands: Literal["right", "left", "both"] = "right"
    """Whose hands are in the video."""
    camera: Literal["static", "moving"] = "static"
    """Whether the camera of the video moves."""
    turn: float = 300.0
    """Degrees by which the object of the video is rolled."""
    frames: int = 48
    """Frames of the video."""
    fps: float = 15.0
    """Frames per second of the video."""
    frame_size: tuple[int, int] = (480, 360)
    """Width and height of the video, even."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda."""
    quiet: bool = False
    """Print nothing but errors."""
    json: bool = False
    """Print one JSON object with the result on stdout, and nothing else there."""


@dataclass(frozen=True)
class TrainArgs:
    """Train networks of the front end on generated pictures: `regressor`, `segmenter`, or `frontend` for both at once.

    The same command goes on where an interrupted training stopped."""

    kind: Annotated[
        tyro.conf.Positional[Literal["regressor", "segmenter", "frontend"]], tyro.conf.arg(metavar="KIND")
    ] = tyro.MISSING
    """What is trained, of the tasks that the settings name."""
    config: Path | None = None
    """TOML file with the settings of the training, see configs/frontend.toml and docs/training.md."""
    out: Path = Path("runs/train")
    """Folder of the training: its state, its metrics and, in export/, the weights."""
    export: Path | None = None
    """Another folder for the weights."""
    device: str | None = None
    """Torch device, e.g. cpu or cuda, over the settings."""
    steps: int | None = None
    """Optimizer steps, over the settings."""
    budget_seconds: float | None = None
    """Wall time of the whole training, over the settings."""
    quiet: bool = False
    """Print nothing but errors."""
    json: bool = False
    """Print one JSON object with the result on stdout, and nothing else there."""


@dataclass(frozen=True)
class ConvertArgs:
    """Make a checkpoint of ours of a public one: HaMeR and WiLoR (.ckpt), METRO (.bin). Runs none of the code in it."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")] = tyro.MISSING
    """The public checkpoint."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")] = tyro.MISSING
    """File to write, .safetensors."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class AssetsArgs:
    """Fetch the weights that are not part of the package, check their SHA-256 and keep them in a cache."""

    status: bool = False
    """Only say what is there."""
    wheel: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """The mediapipe wheel as a file, for a machine without network."""
    json: bool = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class DoctorArgs:
    """Say what this machine has of what handhold uses; exit code 0 if a reconstruction can run."""

    json: bool = False
    """Print one JSON object on stdout."""


def parser_inputs(base: Config | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Subcommand names -> argument classes, and names -> defaults taken from a configuration."""
    c = base if base is not None else Config()
    settings = {f: getattr(c, f) for f in ("prepare", "track", "fit", "evaluate", "export", "method", "seed", "device")}
    kinds = {"run": RunArgs, **dict.fromkeys(STAGES, StageArgs), "demo": DemoArgs}
    kinds |= {"synth": SynthArgs, "train": TrainArgs, "convert": ConvertArgs}
    kinds |= {"assets": AssetsArgs, "doctor": DoctorArgs}
    defaults = {name: kind(**settings) if issubclass(kind, _Settings) else kind() for name, kind in kinds.items()}
    return kinds, defaults


def parse(argv: Sequence[str]) -> tuple[str, Any]:
    """(command, its arguments). Exits with 2 on wrong usage, with 0 after --help, as argparse does."""
    kinds, defaults = parser_inputs(_base_config(argv))
    union = tyro.extras.subcommand_type_from_defaults(
        {name: defaults[name] for name in kinds},
        descriptions={name: _describe(name, kind) for name, kind in kinds.items()},
        prefix_names=False,
    )
    args = tyro.cli(
        union,
        args=list(argv),
        prog="handhold",
        description="One video of hands handling an object in; hands and object out in 3D, in metres.",
        config=(tyro.conf.FlagCreatePairsOff, tyro.conf.OmitSubcommandPrefixes),
    )
    return next(a for a in argv if a in kinds), args


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
    from .regressors.adapters import convert_checkpoint

    convert_checkpoint(args.source, args.target)
    print(json.dumps({"ok": True, "file": str(args.target)}) if args.json else args.target)
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
    names = ("scene.npz", "scene.glb", "object.ply", "object_splat.ply", "metrics.json", "report.html", "preview.mp4")
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


def _describe(name: str, kind: type) -> str:
    if kind is StageArgs:
        stages = {
            "prepare": "Decode a video, and find landmarks and masks.",
            "track": "Find the poses of hands and object over the clip.",
            "fit": "Fit shape and appearance, refining the poses.",
            "evaluate": "Write metrics.json, scored against --truth if given.",
            "export": "Write meshes, splats, glTF, preview and report.",
        }
        return stages[name]
    return (kind.__doc__ or "").splitlines()[0]


def _default_out(video: Path) -> Path:
    return Path("runs") / (Path(video).stem or "run")


def _base_config(argv: Sequence[str]) -> Config:
    """The configuration that the options on the command line change: --config, else the run folder's own, else
    --preset.
    """
    file, name = _value(argv, "--config"), _value(argv, "--preset")
    if argv[:1] == ["train"]:  # its --config is of another kind
        return Config()
    if name is not None and name not in PRESETS:
        name = None  # tyro says what is wrong
    if file is not None:
        return read_toml(file, preset(name) if name else None)
    if argv and argv[0] in STAGES and name is None:
        for a in argv[1:]:
            if (Path(a) / "run.json").is_file():
                from .errors import UnusableInput
                from .runs import open_run

                try:
                    return open_run(a).config()
                except (BadConfig, KeyError, TypeError) as e:
                    message = f"The settings in {a} are of another version of handhold; do `handhold run` anew."
                    raise UnusableInput(message) from e
    return preset(name or "default")


def _value(argv: Sequence[str], option: str) -> str | None:
    for i, a in enumerate(argv):
        if a == option and i + 1 < len(argv):
            return argv[i + 1]
        if a.startswith(option + "="):
            return a.split("=", 1)[1]
    return None


if __name__ == "__main__":
    sys.exit(main())
