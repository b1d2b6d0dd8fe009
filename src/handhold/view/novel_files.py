"""`handhold render RUN`: what `view.novel` draws, as files; cameras and hand poses from files (docs/formats.md)."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..config import RenderConfig
from ..datasets.masks import write_png
from ..errors import UnusableInput, require
from ..export.splats import write_splats
from ..geometry.cameras import scale_K
from ..hand.presets import PRESETS
from ..methods.base import fitted_splats
from ..runs import Run
from ..scene import SIDES, Scene, load_npz, save_npz
from .novel import Actor, Camera, HandPose, Picture, actors, draw, has_splats, input_cameras, orbit_cameras
from .preview import video_writer

MAX_BYTES = 256 << 20  # of a file with cameras or poses
MAX_CAMERAS = 100_000
ORBIT = 48  # pictures of an orbit around one frame
CAMERAS = "cameras.npz"  # its folder is a rendering of ours, finished or not
_MADE = (CAMERAS, "color.mp4", "color", "depth", "masks", "masks_alone", "normals", "splats")


def render_run(run: Run, order: RenderConfig, report: Callable[..., None] | None = None) -> dict[str, Any]:
    """Draw a run as ordered and write the files; returns what `--json` prints.

    Raises `UnusableInput` for a run without a scene, cameras or poses that do not fit, and a folder that holds other
    things, and `BadConfig` for frames that the clip has not.
    """
    say = report or (lambda share, what="": None)
    scene, folder = Scene.load(run.scene_path), order.out or run.root / "render"
    rows = frame_rows(order.frames, len(scene.frames))
    poses = None
    if order.pose is not None:
        poses = order.pose if order.pose in PRESETS else read_poses(order.pose)
        poses = poses if isinstance(poses, str) else {s: p for s, p in poses.items() if s in scene.bodies}
        if not poses:
            raise UnusableInput(f"{order.pose} poses no hand of this scene.")
    splats = {} if order.draw == "meshes" else fitted_splats(run.fit_dir, scene.bodies)
    bodies = actors(scene, splats, order.without, poses)
    if (order.draw == "splats" or order.posed_splats) and not has_splats(bodies):
        lacking = next((b.name for b in bodies if b.splats is None), "scene")
        raise UnusableInput(f"The {lacking} has no Gaussians; run the `fit` stage again, or draw meshes.")
    shots = pair(rows, cameras_of(order.camera, scene, rows, order.size, order.without))
    own = len({r for r, _ in shots}) == len(shots)
    numbers = [int(scene.frames[r]) if own else k for k, (r, _) in enumerate(shots)]
    _clear(folder)
    save_npz(
        folder / CAMERAS,
        {
            "world_from_cam": np.stack([c.world_from_cam for _, c in shots]),
            "K": np.stack([c.K for _, c in shots]),
            "size": np.asarray(shots[0][1].size),
            "frames": np.asarray([scene.frames[r] for r, _ in shots]),
            "numbers": np.asarray(numbers),
        },
    )
    started = time.perf_counter()
    with _writer(folder, order, shots[0][1].size, scene.fps, len(shots)) as write:
        for k, (row, camera) in enumerate(shots):
            picture = draw(bodies, row, camera, order.outputs, background=order.background)
            write(numbers[k], picture)
            if order.posed_splats:
                write_posed(folder / "splats", bodies, row, numbers[k])
            say((k + 1) / len(shots), f"picture {k + 1} of {len(shots)}")
    seconds = time.perf_counter() - started
    made = [n for n in _MADE if (folder / n).exists()]
    return {
        "folder": str(folder),
        "pictures": len(shots),
        "drawn_as": "splats" if has_splats(bodies) else "meshes",
        "bodies": [b.name for b in bodies],
        "seconds": round(seconds, 2),
        "files": {n: str(folder / n) for n in made},
    }


def write_posed(folder: Path, bodies: Sequence[Actor], row: int, number: int) -> None:
    """The Gaussians of each valid body at frame `row`, world frame: folder/<body>/%06d.ply."""
    for b in bodies:
        if b.valid[row]:
            write_splats(folder / b.name / f"{number:06d}.ply", **b.gaussians(row).arrays())


def frame_rows(text: str, count: int) -> list[int]:
    """Rows of a clip of `count` frames from `all`, `12`, `0:48:2` or `3,7,9`. Raises `BadConfig`."""
    rows: list[int] = []
    try:
        if text == "all":
            rows = list(range(count))
        elif ":" in text:
            rows = list(range(count))[slice(*(int(p) if p else None for p in text.split(":")))]
        else:
            rows = [int(p) for p in text.split(",")]
    except (ValueError, TypeError):
        rows = [-1]
    fine = bool(rows) and all(0 <= r < count for r in rows)
    require(fine, f"frames {text!r}; they are `all`, `12`, `0:48:2` or `3,7,9`, and this clip has 0 to {count - 1}")
    return rows


def cameras_of(
    how: str, scene: Scene, rows: Sequence[int], size: tuple[int, int] | None, without: Sequence[str] = ()
) -> list[Camera]:
    """Cameras for the frames `rows`: `input`, `orbit`, or those of a file. Raises `UnusableInput`."""
    if how == "input":
        every = input_cameras(scene, size)
        return [every[r] for r in rows]
    if how == "orbit":
        return orbit_cameras(scene, len(rows) if len(rows) > 1 else ORBIT, size, without)
    return read_cameras(how, scene, size)


def pair(rows: Sequence[int], cameras: Sequence[Camera]) -> list[tuple[int, Camera]]:
    """What is drawn: frame by frame with its camera; one frame goes with all cameras, one camera with all frames."""
    n = max(len(rows), len(cameras))
    if len(rows) not in (1, n) or len(cameras) not in (1, n):
        raise UnusableInput(
            f"There are {len(cameras)} cameras for {len(rows)} frames; give one of either, or as many of both."
        )
    return [(rows[k % len(rows)], cameras[k % len(cameras)]) for k in range(n)]


def read_cameras(path: str | os.PathLike, scene: Scene, size: tuple[int, int] | None = None) -> list[Camera]:
    """Cameras from .npz or .json: `world_from_cam` (4,4) or (N,4,4), rigid, OpenCV axes, metres, world of the scene.

    `K` (3,3) or (N,3,3), pixels of `size` (width, height); without them the scene's. `size`, the argument: of the
    pictures to be made. Raises `UnusableInput`.
    """
    z = _read(path)
    told = z.get("size", np.asarray(scene.size)).reshape(-1)
    poses = z.get("world_from_cam", np.zeros(0))
    K = z.get("K", np.asarray(scene.K))
    good = poses.shape[-2:] == (4, 4) and poses.ndim in (2, 3) and K.shape[-2:] == (3, 3) and K.ndim in (2, 3)
    if not good or not 1 <= len(poses.reshape(-1, 4, 4)) <= MAX_CAMERAS:
        raise UnusableInput(f"{path} has no world_from_cam (4,4) or (N,4,4), or a K that is not (3,3) or (N,3,3).")
    poses, K = poses.reshape(-1, 4, 4).astype(np.float64), K.reshape(-1, 3, 3).astype(np.float64)
    turn = poses[:, :3, :3]
    rigid = np.isfinite(poses).all() and np.abs(turn @ turn.swapaxes(1, 2) - np.eye(3)).max() < 1e-3
    if not rigid or (np.linalg.det(turn) < 0).any() or np.abs(poses[:, 3] - [0, 0, 0, 1]).max() > 1e-6:
        raise UnusableInput(f"{path} has a world_from_cam that is not a rigid motion.")
    lens = np.isfinite(K).all() and (K[:, [0, 1], [0, 1]] > 0).all() and (K[:, 2] == [0, 0, 1]).all()
    if (
        not lens
        or len(K) not in (1, len(poses))
        or len(told) != 2
        or not (told >= 16).all()
        or not (told <= 4096).all()
    ):
        raise UnusableInput(f"{path} has a K or a size that no camera has.")
    told = (int(told[0]), int(told[1]))
    size = size or told
    K = [scale_K(k, size[0] / told[0], size[1] / told[1]) for k in np.broadcast_to(K, (len(poses), 3, 3))]
    return [Camera(k, t, size) for k, t in zip(K, poses, strict=True)]


def read_poses(path: str | os.PathLike) -> dict[str, HandPose]:
    """Hand poses from .npz or .json: `hand.<side>.pose` and perhaps `.transl`, as in scene.npz; or `<side>.pose`, ....

    JSON may nest them: {"right": {"pose": ...}}. Frames that `.valid` says are not valid are left undrawn.
    Raises `UnusableInput`.
    """
    if not Path(path).is_file():
        raise UnusableInput(f"{path} is neither a file nor a pose by name ({', '.join(PRESETS)}).")
    z = _read(path)
    out = {}
    for side in SIDES:
        get = lambda key, s=side: z.get(f"hand.{s}.{key}", z.get(f"{s}.{key}"))  # noqa: E731
        pose, model = get("pose"), get("model")
        if pose is None:
            continue
        if model is not None and not str(model).startswith("open"):
            raise UnusableInput(f"{path} has poses of the model {str(model)!r}; only the built-in hand's can be used.")
        transl, valid = get("transl"), get("valid")
        if any(a is not None and a.dtype.kind not in "fiub" for a in (pose, transl, valid)):
            raise UnusableInput(f"{path} has a pose that is not made of numbers.")
        if valid is not None and valid.shape == pose.shape[:1] and pose.ndim == 3:
            pose = np.where(valid.astype(bool)[:, None, None], pose, np.nan)
        out[side] = HandPose(pose, transl)
    if not out:
        raise UnusableInput(
            f"{path} has no right.pose or left.pose, and no preset has this name ({', '.join(PRESETS)})."
        )
    return out


def _read(path: str | os.PathLike) -> dict[str, np.ndarray]:
    """Arrays of an .npz, or of a .json with numbers in lists, nested names joined by dots."""
    path = Path(path)
    if path.suffix.lower() != ".json":
        return load_npz(path, MAX_BYTES)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnusableInput(f"{path} is larger than {MAX_BYTES >> 20} MiB, which no such file is.")
        data = json.loads(path.read_text(encoding="utf-8"))
        return dict(_flat(data))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as e:
        raise UnusableInput(f"{path} is not a readable .json file of numbers ({type(e).__name__}).") from e


def _flat(data: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, np.ndarray]]:
    for key, value in data.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", np.asarray(value) if isinstance(value, str) else np.asarray(value, np.float64)


def _clear(folder: Path) -> None:
    """Make the folder, and remove an earlier rendering, of which nothing shall stay beside the new one."""
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / CAMERAS).is_file():
            raise UnusableInput(f"{folder} is not empty and no rendering; remove it, or choose another --out.")
        for name in _MADE:
            shutil.rmtree(folder / name) if (folder / name).is_dir() else (folder / name).unlink(missing_ok=True)
    elif folder.exists() and not folder.is_dir():
        raise UnusableInput(f"{folder} is a file; choose another --out.")
    folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def _writer(
    folder: Path, order: RenderConfig, size: tuple[int, int], fps: float, count: int
) -> Iterator[Callable[[int, Picture], None]]:
    width, height = size
    even = (width + width % 2, height + height % 2)
    film = "color" in order.outputs and count > 1
    with video_writer(folder / "color.mp4", *even, fps) if film else contextlib.nullcontext() as add:

        def write(number: int, p: Picture) -> None:
            name = f"{number:06d}"
            if film:
                add(np.pad(p.color, ((0, even[1] - height), (0, even[0] - width), (0, 0)), mode="edge"))
            if "color" in order.outputs and (order.png or not film):
                write_png(folder / "color" / f"{name}.png", p.color)
            if "depth" in order.outputs:
                save_npz(folder / "depth" / f"{name}.npz", {"depth": p.depth, **p.depth_alone})
            if "normals" in order.outputs:
                drawn = np.abs(p.normals).sum(-1, keepdims=True) > 0
                image = np.where(drawn, (p.normals + 1) * 127.5 + 0.5, 0).astype(np.uint8)
                write_png(folder / "normals" / f"{name}.png", image)
            for kind, masks in (("masks", p.masks), ("masks_alone", p.masks_alone)):
                for body, mask in masks.items():
                    write_png(folder / kind / body / f"{name}.png", mask.astype(np.uint8) * 255)

        yield write
