"""Generated clips: a scene that moves, written as a video with intrinsics and exact truth.

folder/video.mp4  K.txt                what `handhold run` reads
folder/gt.npz                          docs/formats.md, "Truth", and more: docs/datasets.md lists it
folder/clip.json                       what it was made of
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor

from ...files import atomic_file, write_atomically
from ...geometry.rigid import apply, invert, so3_log
from ...scene import SIDES, save_npz
from . import look, sensor
from .assemble import Assembled, Assembler
from .objects import articulate
from .sample import FOREARM, SynthBatch
from .scenes import Spec, Synth, SynthConfig
from .staging import ClipConfig, Staged, stage_clip

Report = Callable[..., None]


def make_clip(
    folder: str | os.PathLike,
    config: ClipConfig | None = None,
    seed: int = 0,
    frames: int = 48,
    fps: float = 15.0,
    size: tuple[int, int] = (480, 360),
    *,
    synth: Synth | None = None,
    device: str | torch.device = "cpu",
    render: Callable | None = None,
    report: Report | None = None,
) -> Path:
    """Make a clip of `frames` pictures of size (width, height), both even, and write its folder.

    synth: the generator; by default one of 300 objects. render: makes the pictures in place of `look.render`, e.g.
    `pathtraced.render`. The same arguments give the same clip on one device. Raises `UnusableInput` when no object
    suits, ValueError for sizes or settings that do not exist.
    """
    config = config or ClipConfig()
    width, height = size
    if width % 2 or height % 2 or min(size) < 32 or frames < 2:
        raise ValueError(f"a clip of {frames} frames of {width}x{height} cannot be made; sizes are even, from 32 on")
    synth = synth or Synth(SynthConfig(size=min(size), objects=300, seed=seed), device)
    staged = stage_clip(synth, config, seed, frames, size)
    batch = draw_clip(synth, staged, seed, config.split, size, render, report)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    truth = truth_of(synth, staged, batch)
    write_video(folder / "video.mp4", batch.image, fps)
    K = truth["K"]
    write_atomically(folder / "K.txt", " ".join(f"{v:.9g}" for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2])) + "\n")
    save_npz(folder / "gt.npz", truth)
    made = {"clip": dataclasses.asdict(config), "seed": seed, "frames": frames, "fps": fps, "size": list(size)}
    made |= {"generator": dataclasses.asdict(synth.config), "object": int(staged.spec.index[0])}
    write_atomically(folder / "clip.json", json.dumps(made, indent=1) + "\n")
    return folder


def draw_clip(
    synth: Synth,
    staged: Staged,
    seed: int,
    split: str,
    size: tuple[int, int],
    render: Callable | None = None,
    report: Report | None = None,
    chunk: int = 6,
) -> SynthBatch:
    """The pictures of a staged clip (F) and their truth, on the CPU. Materials, light, room and camera are drawn once;
    the sensor's noise is new in every frame."""
    g = torch.Generator().manual_seed(seed * 104_729 + 5)
    frames = len(staged.spec)
    cast = synth.cast(1, g, split, size)
    camera = sensor.sample_sensors(1, g, 0.5)
    camera = replace(camera, blurred=torch.zeros(1, dtype=torch.bool), shrink=torch.ones(1))
    turns = _mirrored(staged.cam_from_world, bool(staged.spec.mirror[0]))[:, :3, :3].to(synth.device)
    parts = []
    for first in range(0, frames, chunk):
        rows = torch.arange(first, min(first + chunk, frames))
        stage = copy.copy(synth)
        same = torch.zeros(len(rows), dtype=torch.int64)
        each = sensor.Sensor(**{f.name: getattr(camera, f.name)[same] for f in dataclasses.fields(camera)})
        each = replace(each, place=torch.randint(512, (len(rows), 3, 2), generator=g))
        stage.expose = lambda image, g, each=each: sensor.develop(image, each)
        stage.render = render or synth.render
        if staged.shape is not None:
            stage.assemble = _Pressed(synth.assemble, staged.shape[rows].to(synth.device))
        spec = staged.spec.rows(rows).to(synth.device)
        looks = cast.rows(same.to(synth.device))
        if not torch.allclose(turns[rows], torch.eye(3, device=turns.device), atol=1e-6):
            background = turned(looks.background, spec.K, turns[rows])
            looks = replace(looks, background=background, light=turned_light(looks.light, turns[rows]))
        parts.append(stage.draw(spec, g, split, looks, size).to("cpu"))
        if report is not None:
            report((int(rows[-1]) + 1) / frames, "drawing")
    return SynthBatch.cat(parts)


class _Pressed:
    """The assembler, with other vertices for the held object."""

    def __init__(self, inner: Assembler, shape: Tensor):
        self.inner, self.shape = inner, shape

    def __getattr__(self, name: str):
        return getattr(self.inner, name)

    def __call__(self, spec: Spec, generator: torch.Generator) -> Assembled:
        mesh = self.inner(spec, generator)
        sign = torch.where(spec.mirror, -1.0, 1.0)[:, None, None] * mesh.object.new_tensor([1.0, 0, 0])
        sign = sign + mesh.object.new_tensor([0.0, 1.0, 1.0])
        thing = apply(spec.cam_from_object, self.shape)
        normals = look.vertex_normals(thing, self.inner.bank.faces[spec.index])
        first = sum(self.inner.sizes)
        rows = slice(first, first + thing.shape[1])
        vertices, all_normals = mesh.vertices.clone(), mesh.normals.clone()
        vertices[:, rows], all_normals[:, rows] = thing * sign, normals * sign
        return replace(mesh, vertices=vertices, normals=all_normals, object=thing * sign)


def turned(background: Tensor, K: Tensor, turn: Tensor) -> Tensor:
    """Far backgrounds (B,3,H,W) as a camera of intrinsics K (B,3,3) sees them when it has turned by cam_from_world
    (B,3,3): the homography K R K^-1, mirrored beyond the border."""
    b, _, height, width = background.shape
    rows, columns = (torch.arange(n, device=background.device) + 0.5 for n in (height, width))
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    pixel = torch.stack([x, y, torch.ones_like(x)], -1).reshape(1, -1, 3)
    at = pixel @ (K @ turn.mT @ torch.linalg.inv(K)).mT
    at = at[..., :2] / at[..., 2:].clamp_min(1e-3) / at.new_tensor([width, height]) * 2 - 1
    at = at.reshape(b, height, width, 2)
    return torch.nn.functional.grid_sample(background, at, padding_mode="reflection", align_corners=False)


def turned_light(light: look.Light, turn: Tensor) -> look.Light:
    """Light at rest in the world as a camera that has turned by cam_from_world (B,3,3) sees it; the small harmonics of
    order 2 are left as they are."""
    harmonics = light.harmonics.clone()
    harmonics[:, 1:4] = turn @ harmonics[:, 1:4]
    plane = (turn @ light.plane[..., None])[..., 0]
    return replace(light, direction=light.direction @ turn.mT, plane=plane, harmonics=harmonics)


# ---------------------------------------------------------------- truth


def truth_of(synth: Synth, staged: Staged, batch: SynthBatch) -> dict[str, np.ndarray]:
    """What gt.npz holds, from the drawn frames of a clip."""
    spec, labels = staged.spec, batch.labels
    frames = len(batch)
    out: dict[str, Tensor] = {
        "K": batch.K[0].double(),
        "masks": torch.where(labels == FOREARM, 0, labels).to(torch.uint8),
        "forearm": labels == FOREARM,
        "depth": batch.depth.half(),
        "world_from_cam": invert(_mirrored(staged.cam_from_world, bool(spec.mirror[0]))),
        "held": staged.held,
    }
    models = synth.assemble.models
    for side, model in zip(SIDES, models, strict=True):
        hand = batch.hand(side)
        if not hand.present[0]:
            continue
        out |= {
            f"{side}_vertices": hand.vertices,
            f"{side}_joints": hand.joints,
            f"{side}_faces": model.faces,
            f"{side}_pose": so3_log(hand.rotations.double()).float(),
            f"{side}_transl": hand.transl,
            f"{side}_contact": hand.contact,
            f"{side}_visible": hand.visible,
            "betas": hand.betas[0],
        }
    if spec.has_object[0]:
        out |= _object_truth(synth, staged, batch.object.cam_from_object, frames)
    return {k: v.detach().cpu().numpy() for k, v in out.items()}


def _object_truth(synth: Synth, staged: Staged, poses: Tensor, frames: int) -> dict[str, Tensor]:
    """The object in its own frame. A reflected clip has a reflected object."""
    spec, bank = staged.spec, synth.bank.to("cpu")
    i, mirror = int(spec.index[0]), bool(spec.mirror[0])
    n, t = int(bank.n_vertices[i]), int(bank.n_faces[i])
    s = torch.tensor([-1.0, 1.0, 1.0]) if mirror else torch.ones(3)
    faces = bank.faces[i, :t]
    out = {
        "object_vertices": bank.vertices[i, :n] * s,
        "object_faces": faces.flip(-1) if mirror else faces,
        "object_poses": poses,
    }
    if staged.shape is not None:
        out["object_vertices_per_frame"] = staged.shape[:, :n] * s
    elif spec.angle.abs().max() > 0:
        turn = -s if mirror else s  # an axis of rotation is seen reversed in a mirror
        out |= {
            "object_vertices_per_frame": articulate(bank, spec.index, spec.angle)[:, :n] * s,
            "part": bank.part[i, :n],
            "joint_axis": bank.hinge_axis[i] * turn,
            "joint_pivot": bank.hinge_pivot[i] * s,
            "joint_angle": spec.angle,
        }
    return out


def _mirrored(poses: Tensor, mirror: bool) -> Tensor:
    s = poses.new_tensor([-1.0 if mirror else 1.0, 1.0, 1.0, 1.0])
    return s[:, None] * poses * s


# ---------------------------------------------------------------- video


def write_video(path: str | os.PathLike, images: Tensor, fps: float, crf: int = 14) -> None:
    """Write pictures (F,3,H,W) in [0,1], of even size, as an .mp4, atomically: H.264 where this PyAV has it, else
    MPEG-4."""
    rate = Fraction(float(fps)).limit_denominator(1001)
    height, width = images.shape[2:]
    with atomic_file(path) as file, av.open(file, "w", format="mp4") as out:
        for codec, options in (("libx264", {"crf": str(crf), "preset": "medium"}), ("mpeg4", {"q:v": "2"})):
            try:
                av.codec.Codec(codec, "w")
            except (av.codec.codec.UnknownCodecError, ValueError):
                continue
            stream = out.add_stream(codec, rate=rate, options=options)
            break
        else:
            raise RuntimeError("this PyAV has neither an H.264 nor an MPEG-4 encoder")
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.time_base = 1 / rate
        for i, image in enumerate(images):
            levels = (image.clamp(0, 1) * 255).round().to(torch.uint8).permute(1, 2, 0).contiguous()
            frame = av.VideoFrame.from_ndarray(levels.numpy(), format="rgb24")
            frame.pts = i
            for packet in stream.encode(frame):
                out.mux(packet)
        for packet in stream.encode():
            out.mux(packet)
