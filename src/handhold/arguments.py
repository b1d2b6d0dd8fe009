"""The arguments of the command line: one class per command, whose docstrings are the help text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from .config import (
    PRESETS,
    STAGES,
    BadConfig,
    BigsConfig,
    Config,
    EvaluateConfig,
    ExportConfig,
    FitConfig,
    HoldConfig,
    Method,
    PrepareConfig,
    RenderConfig,
    TrackConfig,
    preset,
    read_toml,
)

Bare = tyro.conf.arg(name="")  # a table whose settings are given without its name: --stride, not --prepare.stride
# On the command line alone, so --no-NAME means nothing; a setting has both, as a run folder may say either.
Switch = Annotated[bool, tyro.conf.FlagCreatePairsOff]
SETTINGS = ("prepare", "track", "fit", "evaluate", "export", "bigs", "hold", "method", "seed", "device")
SHORT = ("--poses",)  # settings of the fit that are also known without its name
COMMANDS = ("run", *STAGES, "demo", "render", "synth", "train", "convert", "assets", "doctor")


@dataclass(frozen=True)
class _Common:
    config: Path | None = None
    """TOML file with settings; options on the command line win over it."""
    preset: Literal["default", "draft"] = "default"
    """Named settings to start from."""
    fresh: Switch = False
    """Do the chosen stages again even if nothing has changed."""
    quiet: Switch = False
    """Print nothing but errors."""
    json: Switch = False
    """Print one JSON object with the result on stdout, and nothing else there."""


@dataclass(frozen=True)
class _Settings:
    prepare: Annotated[PrepareConfig, Bare] = PrepareConfig()
    track: TrackConfig = TrackConfig()
    fit: FitConfig = FitConfig()
    evaluate: Annotated[EvaluateConfig, Bare] = EvaluateConfig()
    export: ExportConfig = ExportConfig()
    bigs: BigsConfig = BigsConfig()
    hold: HoldConfig = HoldConfig()
    method: Method = "rigid"
    """What the scene is made of and fitted with: `rigid` is an SDF grid with Gaussians on it, `bigs` Gaussians of hands
    and object (BIGS), `hold` neural signed-distance fields of hands and object (HOLD)."""
    seed: int = 0
    """Seed of every random choice; the same seed, video and settings give the same numbers."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda:0."""

    def settings(self) -> Config:
        return Config(**{f: getattr(self, f) for f in SETTINGS})


@dataclass(frozen=True)
class RunArgs(_Settings, _Common):
    """Reconstruct the hands and the object of a video: prepare, track, fit, evaluate and export."""

    video: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="VIDEO")] = tyro.MISSING
    """Video file, folder of png or jpg frames, or a build/ folder of HOLD."""
    out: Path | None = None
    """Run folder; runs/<name of the video> by default. The same command goes on where it stopped."""


@dataclass(frozen=True)
class StageArgs(_Settings, _Common):
    """One stage of a run folder, with the settings of that run unless others are given."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run folder; for `prepare` also a video or a build/ folder of HOLD, whose run folder is --out."""
    out: Path | None = None
    """Run folder when the target is a video; runs/<name of the video> by default."""


@dataclass(frozen=True)
class DemoArgs(_Settings, _Common):
    """Reconstruct the built-in clip and score it against its truth."""

    out: Path = Path("runs/demo")
    """Run folder."""


@dataclass(frozen=True)
class RenderArgs(RenderConfig):
    """Draw a finished run from other cameras, with hands in other poses or without a body; on the CPU."""

    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")] = tyro.MISSING
    """Run folder whose `fit` is done."""
    quiet: Switch = False
    """Print nothing but errors."""
    json: Switch = False
    """Print one JSON object with the result on stdout, and nothing else there."""

    def order(self) -> RenderConfig:
        return RenderConfig(**{f.name: getattr(self, f.name) for f in fields(RenderConfig)})


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
    amodal: Switch = False
    """Also draw every body's mask as if it were alone."""
    png: Switch = False
    """Keep pictures as PNG rather than JPEG."""
    shard: int = 256
    """Pictures per shard, a multiple of 16."""
    clip: Switch = False
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
    quiet: Switch = False
    """Print nothing but errors."""
    json: Switch = False
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
    quiet: Switch = False
    """Print nothing but errors."""
    json: Switch = False
    """Print one JSON object with the result on stdout, and nothing else there."""


@dataclass(frozen=True)
class ConvertArgs:
    """Make our checkpoint of a public one (HaMeR, WiLoR, METRO), running none of its code, or HOLD's build of a run."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")] = tyro.MISSING
    """The public checkpoint, or the run folder."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")] = tyro.MISSING
    """File to write, .safetensors; for HOLD a new folder, code/data/NAME/build."""
    kind: Literal["auto", "hamer", "wilor", "metro", "graphormer", "hold-build"] = "auto"
    """Whose checkpoint it is; `auto` finds out, and takes a run folder for hold-build."""
    mano: Path | None = None
    """Your MANO_RIGHT.pkl, which METRO and Mesh Graphormer need. For HOLD, hands are posed by it (MANO_LEFT.pkl is
    looked for beside it); without it they keep the open hand's angles, which MANO takes for another pose."""
    sampling: Path | None = None
    """mano_downsampling.npz of METRO's repository, which METRO and Mesh Graphormer need."""
    dtype: Literal["float32", "float16"] = "float32"
    """Numbers in the file: float16 halves it and rounds the weights."""
    json: Switch = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class AssetsArgs:
    """Fetch the weights that are not part of the package, check their SHA-256 and keep them in a cache."""

    status: Switch = False
    """Only say what is there."""
    wheel: Annotated[Path | None, tyro.conf.arg(name="from")] = None
    """The mediapipe wheel as a file, for a machine without network."""
    json: Switch = False
    """Print one JSON object on stdout."""


@dataclass(frozen=True)
class DoctorArgs:
    """Say what this machine has of what handhold uses; exit code 0 if a reconstruction can run."""

    json: Switch = False
    """Print one JSON object on stdout."""


def parser_inputs(base: Config | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Subcommand names -> argument classes, and names -> defaults taken from a configuration."""
    c = base if base is not None else Config()
    settings = {f: getattr(c, f) for f in SETTINGS}
    kinds = {"run": RunArgs, **dict.fromkeys(STAGES, StageArgs), "demo": DemoArgs, "render": RenderArgs}
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
        args=["--fit" + a.replace("--", ".", 1) if a.partition("=")[0] in SHORT else a for a in argv],
        prog="handhold",
        description="One video of hands handling an object in; hands and object out in 3D, in metres.",
        config=(tyro.conf.OmitSubcommandPrefixes,),
    )
    return next(a for a in argv if a in kinds), args


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
