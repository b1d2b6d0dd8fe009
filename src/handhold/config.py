"""The one configuration tree: frozen dataclasses, read from and written to TOML, with field docstrings as the help
text.

`Config` holds one slice per stage; a stage is run again when its own slice changes, and not when another's does.
This module imports nothing heavy, so that `handhold --help` is quick.
"""

from __future__ import annotations

import dataclasses
import os
import tomllib
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from .errors import BadConfig, require
from .files import write_atomically
from .methods.settings import BigsConfig, HoldConfig

STAGES = ("prepare", "track", "fit", "evaluate", "export")
Method = Literal["rigid", "bigs", "hold"]
TrackingStep = Literal[
    "hand-pixels",  # structure from motion with the hand's pixels as well
    "loops",  # loops closed, and far sub-models joined, by descriptors
    "merging",  # joining of sub-models and placing of single frames against them
    "registration",  # of the frames left to the coarse surface (a step of `fit`)
    "regressor",  # the hand regressor's estimates
    "landmarks-3d",  # the landmark network's third coordinate
    "visibility",  # less weight for landmarks that cannot have been seen
    "silhouette",  # of the hand
    "windows",  # regrasps: one grasp for the whole clip without
    "slow-motion",  # of the hand about each window's grasp
    "grasp",  # the hand in the object's frame: each hand by itself without, as far away as its size says
    "fiducial",  # the object's pose from the hand that holds it, and structure from motion not believed against it
    "second-masks",  # masks made anew with what tracking knows
]


@dataclass(frozen=True)
class PrepareConfig:
    """Decoding, intrinsics, landmarks and masks."""

    K: Path | None = None
    """Intrinsics of the video as displayed: a text file with `fx fy cx cy` or nine numbers (3x3), in pixels. Without it
    they come from the video's metadata, or else from a stated default."""
    masks: Path | None = None
    """Folder with your own masks, right/ left/ object/ *.png, one per frame; replaces the automatic segmentation."""
    joints: Path | None = None
    """File or folder with hands that you found elsewhere: our own .npz or .json, OpenPose, MediaPipe, HaMeR or WiLoR
    (see docs/formats.md); replaces the automatic landmarks."""
    start: float | None = None
    """Skip the video before this time, in seconds."""
    end: float | None = None
    """Skip the video after this time, in seconds."""
    stride: int = 1
    """Use every n-th frame."""
    max_side: int = 640
    """Shrink frames whose longer side has more pixels than this; 0 keeps the size."""
    hand_regressor: Literal["auto", "off"] | Path = "auto"
    """Network that sees the hand's pose in single frames: auto is the one that comes with handhold, off uses landmarks
    alone, a path is a checkpoint of your own (`handhold train`)."""
    segmenter: Literal["auto", "off"] | Path = "auto"
    """Network that tells hands, object and forearm apart: auto is the one that comes with handhold, off uses colours,
    background and landmarks alone, a path is a checkpoint of your own. sam2:NAME and sam3:NAME let SAM go over the
    masks of auto; NAME is a folder or a name on the hub (docs/models.md)."""
    joints_handedness: Literal["auto", "as-written", "swapped"] = "auto"
    """Which hand `joints` means by right: auto is the rule of its layout (docs/formats.md), as-written takes its word,
    swapped the contrary."""

    def __post_init__(self) -> None:
        require(self.stride >= 1, "stride must be 1 or more")
        require(self.max_side == 0 or self.max_side >= 64, "max_side must be 0 (keep the size) or at least 64")
        require(self.start is None or self.start >= 0, "start must not be negative")
        require(self.end is None or self.end > (self.start or 0), "end must be later than start")


@dataclass(frozen=True)
class TrackConfig:
    """Hand and object poses, before any appearance is fitted."""

    without: tuple[TrackingStep, ...] = ()
    """Steps of tracking to leave out, to see what each is worth (docs/methods/tracking.md)."""
    features: Literal["auto", "sift", "xfeat"] = "auto"
    """What structure from motion matches beside flow: SIFT, or XFeat with LighterGlue (SIFT where these find nothing),
    which needs `pip install 'handhold[xfeat]'`; auto is SIFT, and XFeat, if installed, where the object would halt at
    missing frames."""

    def __post_init__(self) -> None:
        known = typing.get_args(TrackingStep)
        wrong = [name for name in self.without if name not in known]
        require(not wrong, f"track.without has {wrong[:1]}; there are {', '.join(known)}")


@dataclass(frozen=True)
class FitConfig:
    """Shape and appearance, with the poses refined."""

    pose_lr: float = 1e-4
    """Step of the pose refinement together with the surface, radians; 0 keeps the tracked poses."""
    mirror: bool = True
    """Complete surface that no frame has seen from its mirror image, where the seen surface is symmetric."""
    appearance: bool = True
    """Fit Gaussians (object_splat.ply) after the surface."""
    poses: Path | None = None
    """Object poses of your own in place of the tracked ones: a .npz with cam_from_object (F,4,4), metres, OpenCV axes,
    NaN where unknown. They stay as they are."""

    def __post_init__(self) -> None:
        require(0 <= self.pose_lr <= 0.02, "fit.pose_lr must be between 0 and 0.02")


@dataclass(frozen=True)
class EvaluateConfig:
    """Figures for the finished scene."""

    truth: Path | None = None
    """Ground truth to score against (.npz, see docs/formats.md); never read by any other stage."""


@dataclass(frozen=True)
class ExportConfig:
    """Files for other programs, and the report."""

    preview: bool = True
    """Write preview.mp4 (video, overlay, turntable)."""


@dataclass(frozen=True)
class RenderConfig:
    """New pictures of a finished scene (`handhold render`); no stage, so not part of `Config`."""

    camera: str = "input"
    """`input` is the video's own, `orbit` goes round the bodies once, or a .npz or .json file with `world_from_cam`
    (4,4) or (N,4,4) and perhaps `K`, `size`."""
    frames: str = "all"
    """Which frames of the clip, counted from 0: `all`, `12`, `0:48:2` or `3,7,9`. One frame is seen by all cameras."""
    without: tuple[Literal["right", "left", "object"], ...] = ()
    """Bodies to leave out."""
    pose: str | None = None
    """Pose the hands anew: `rest`, `open`, `fist`, `point`, or a .npz or .json file with poses, scene.npz for one."""
    outputs: tuple[Literal["color", "depth", "masks", "normals"], ...] = ("color",)
    """What to write; depth and masks also of each body as if it were alone."""
    draw: Literal["auto", "splats", "meshes"] = "auto"
    """Gaussians or meshes; `auto` takes Gaussians where every body has some."""
    size: tuple[int, int] | None = None
    """Width and height of the pictures; those of the video by default."""
    background: tuple[int, int, int] = (24, 27, 33)
    """sRGB colour behind the bodies."""
    png: bool = False
    """Also write colour pictures as PNG, beside color.mp4."""
    posed_splats: bool = False
    """Also write the bodies' Gaussians where they are in each frame, world frame, as 3DGS .ply."""
    out: Path | None = None
    """Folder to write; render/ in the run folder by default."""

    def __post_init__(self) -> None:
        require(self.size is None or all(16 <= n <= 4096 for n in self.size), "size must be 16 to 4096")
        require(all(0 <= c <= 255 for c in self.background), "background must be 0 to 255")
        require(bool(self.outputs), "outputs must name something to write")


@dataclass(frozen=True)
class Config:
    """Everything that decides a result, apart from the video."""

    prepare: PrepareConfig = field(default_factory=PrepareConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    fit: FitConfig = field(default_factory=FitConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    export: ExportConfig = field(default_factory=ExportConfig)
    bigs: BigsConfig = field(default_factory=BigsConfig)
    hold: HoldConfig = field(default_factory=HoldConfig)
    method: Method = "rigid"
    """What the scene is made of and fitted with: `rigid` is an SDF grid with Gaussians on it, `bigs` Gaussians of hands
    and object (BIGS), `hold` neural signed-distance fields of hands and object (HOLD)."""
    seed: int = 0
    """Seed of every random choice; the same seed, video and settings give the same numbers."""
    device: str = "cpu"
    """Torch device, e.g. cpu or cuda:0."""

    def __post_init__(self) -> None:
        require(0 <= self.seed < 2**32, "seed must be between 0 and 4294967295")
        require(bool(self.device.strip()), "device must be named, e.g. cpu")


PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "draft": {"prepare": {"max_side": 320}},
}
"""Named overrides of the defaults: `draft` works on quarter-size frames, for a quick look."""

T = TypeVar("T")


def preset(name: str) -> Config:
    """The configuration of that name. Raises `BadConfig` for an unknown one."""
    if name not in PRESETS:
        raise BadConfig(f"There is no preset {name!r}; choose one of {', '.join(PRESETS)}.")
    return from_dict(PRESETS[name])


def to_dict(config: Any) -> dict[str, Any]:
    """Plain nested dict of numbers, strings, booleans and lists; fields that are None are left out."""
    out = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            out[f.name] = to_dict(value)
        elif value is not None:
            out[f.name] = str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
    return out


def from_dict(values: dict[str, Any], base: Config | None = None) -> Config:
    """`base` (the defaults) with `values` on top. Raises `BadConfig` for an unknown name, a wrong type or an
    impossible value.
    """
    return _build(base if base is not None else Config(), values, "")


def read_toml(path: str | os.PathLike, base: Config | None = None) -> Config:
    """Read a TOML file. Relative paths in it are relative to the file. Raises `BadConfig`."""
    path = Path(path)
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as e:
        raise BadConfig(
            f"The configuration {path} cannot be read ({getattr(e, 'strerror', None) or 'not text'})."
        ) from e
    except tomllib.TOMLDecodeError as e:
        raise BadConfig(f"{path} is not valid TOML: {e}.") from e
    name = values.pop("preset", "default")
    start = base if base is not None else preset(name)
    config = from_dict(values, start)
    return _map_paths(config, start, lambda p: p if p.is_absolute() else path.parent / p)


def write_toml(config: Any, path: str | os.PathLike) -> None:
    """Write a configuration that `read_toml` reads back equal."""
    write_atomically(path, toml_text(config))


def toml_text(config: Any) -> str:
    """TOML of a configuration (tables one level deep)."""
    values = to_dict(config)
    lines = [f"{k} = {_toml(v)}" for k, v in values.items() if not isinstance(v, dict)]
    for table, entries in values.items():
        if isinstance(entries, dict):
            lines += ["", f"[{table}]", *(f"{k} = {_toml(v)}" for k, v in entries.items())]
    return "\n".join(lines) + "\n"


def absolute(config: Config) -> Config:
    """The same configuration with absolute paths, so that a run can be resumed from any folder."""
    return _map_paths(config, None, lambda p: p.expanduser().absolute())


def _build(base: T, values: dict[str, Any], prefix: str) -> T:
    hints = typing.get_type_hints(type(base))
    unknown = [k for k in values if k not in hints]
    if unknown:
        raise BadConfig(
            f"There is no setting {prefix + unknown[0]!r}; there are {', '.join(prefix + k for k in hints)}."
        )
    changed = {}
    for name, value in values.items():
        current = getattr(base, name)
        if dataclasses.is_dataclass(current):
            if not isinstance(value, dict):
                raise BadConfig(f"{prefix + name!r} is a table of settings, not a value.")
            changed[name] = _build(current, value, f"{prefix}{name}.")
        else:
            changed[name] = _coerce(value, hints[name], prefix + name)
    return dataclasses.replace(base, **changed)


def _coerce(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        for option in (a for a in args if a is not type(None)):
            try:
                return _coerce(value, option, name)
            except BadConfig:
                continue
    elif origin is Literal:
        if value in args:
            return value
        raise BadConfig(f"{name} must be one of {', '.join(map(str, args))}, not {value!r}.")
    elif origin is tuple and isinstance(value, (list, tuple)):
        item = [args[0]] * len(value) if len(args) == 2 and args[1] is Ellipsis else args
        if len(item) == len(value):
            return tuple(_coerce(v, t, name) for v, t in zip(value, item, strict=True))
    elif hint is Path and isinstance(value, (str, Path)):
        return Path(value)
    elif hint is float and isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    elif hint in (int, str, bool) and type(value) is hint:
        return value
    raise BadConfig(f"{name} must be {getattr(hint, '__name__', None) or hint}, not {value!r}.")


def _map_paths(config: T, unless: T | None, change: typing.Callable[[Path], Path]) -> T:
    """Apply `change` to every path in the tree, except those equal to the same field of `unless`."""
    new = {}
    for f in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, f.name)
        before = None if unless is None else getattr(unless, f.name)
        if dataclasses.is_dataclass(value):
            new[f.name] = _map_paths(value, before, change)
        elif isinstance(value, Path) and value != before:
            new[f.name] = _map_sam(value, change) if is_sam(value) else change(value)
    return dataclasses.replace(config, **new)  # type: ignore[type-var]


def is_sam(value: Any) -> bool:
    """Whether a setting names a SAM, as `sam2:FOLDER` or `sam3:HUB/NAME`, rather than a file."""
    return str(value).startswith(("sam2:", "sam3:"))


def _map_sam(value: Path, change: typing.Callable[[Path], Path]) -> Path:
    """A folder follows `change`; a name on the hub stays."""
    kind, _, where = str(value).partition(":")
    folder = change(Path(where))
    return Path(f"{kind}:{folder}") if folder.is_dir() else value


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return repr(value)  # TOML writes inf and nan as Python does
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return '"' + "".join(c if ord(c) >= 32 and ord(c) != 127 else f"\\u{ord(c):04x}" for c in escaped) + '"'
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(map(_toml, value)) + "]"
    raise TypeError(f"{type(value).__name__} has no TOML form here")
