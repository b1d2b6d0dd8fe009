"""HOLD's scene on disk: one safetensors file per body in `3_fit/`, with everything that a view of it needs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from torch import Tensor

from ..errors import UnusableInput
from ..scene import SIDES
from .hold_canonical import RigidPoses, SkinnedPoses
from .hold_fields import Background, GridField, NetworkField, field_tensors, load_field
from .hold_scene import Density, HoldBody, HoldScene, Sampling

LARGEST = 2 << 30  # bytes of one file


@dataclass(frozen=True)
class Posed:
    """A hand's parameters as `SkinnedPoses` reads them."""

    pose: np.ndarray  # (F,16,3)
    betas: np.ndarray  # (10,)
    transl: np.ndarray  # (F,3)


def grown(body: HoldBody) -> HoldBody:
    """The same object with its scale put into field and poses: metric, of scale 1. Hands are returned as they are."""
    if not isinstance(body.poses, RigidPoses):
        return body
    s, field, device = float(body.poses.scale.detach()), body.field, body.poses.base.device
    if isinstance(field, GridField):
        data = field.grid.data.clone()
        data[..., 0] *= s
        again = type(field.grid)(data, s * field.grid.lo, s * field.grid.h, field.grid.backend)
        field.grid = again
    elif isinstance(field, NetworkField):
        field.center *= s
        field.radius *= s
    poses = RigidPoses(body.poses.result(), s * body.poses.center.cpu().numpy(), s * body.poses.radius).to(device)
    law = Density(body.density.kind, s * float(body.density.width.detach()), s * body.density.unit, True).to(device)
    return HoldBody(body.name, poses, field, law, body.sampling)


def scene_tensors(scene: HoldScene) -> dict[str, dict[str, Tensor]]:
    """File name (without ending) -> tensors, of a scene whose bodies are `grown`."""
    out = {}
    for b in scene.bodies:
        f64 = lambda x: torch.as_tensor(np.asarray(x, np.float64))  # noqa: E731
        law = [float(b.density.kind == "laplace"), float(b.density.width.detach()), b.density.unit]
        tensors = field_tensors(b.field) | {"density": f64(law), "cached": torch.tensor(int(b.sampling.cached))}
        if isinstance(b.poses, RigidPoses):
            tensors |= {"poses.cam_from_object": f64(b.poses.result()), "poses.center": f64(b.poses.center.cpu())}
            tensors["poses.radius"] = f64(b.poses.radius)
        else:
            h = b.poses.result()
            tensors |= {f"poses.{k}": f64(getattr(h, k)) for k in ("pose", "betas", "transl")}
        out[f"{b.name}_field"] = tensors
    if scene.background is not None:
        tensors = {k: v.detach().cpu().contiguous() for k, v in scene.background.state_dict().items()}
        out["background_field"] = tensors | {"radius": torch.tensor(scene.background.radius)}
    return out


def open_scene(fit_dir: str | os.PathLike, device: str = "cpu") -> HoldScene:
    """The trained scene of a run's `3_fit/`, for `hold_scene.render_view`. Raises `UnusableInput`."""
    folder, bodies, background = Path(fit_dir), [], None
    for name in ("object", *SIDES):
        path = folder / f"{name}_field.safetensors"
        if path.is_file():
            bodies.append(_body(name, _read(path), path))
    if not bodies:
        raise UnusableInput(f"{folder} holds no fields; fit the run with --method hold.")
    path = folder / "background_field.safetensors"
    if path.is_file():
        t = _read(path)
        try:
            background = Background(len(t["code"]), t["center"], float(t["radius"]))
            background.load_state_dict({k: v for k, v in t.items() if k != "radius"})
        except (KeyError, RuntimeError, TypeError) as e:
            raise UnusableInput(f"{path} is no background of handhold.") from e
    cached = all(b.sampling.cached for b in bodies)
    scene = HoldScene(bodies, background, shared=not cached)
    scene.modules().to(device)
    return scene


def _read(path: Path) -> dict[str, Tensor]:
    if path.stat().st_size > LARGEST:
        raise UnusableInput(f"{path} is larger than {LARGEST >> 20} MiB, which no field of handhold is.")
    try:
        return safetensors.torch.load_file(path)
    except Exception as e:
        raise UnusableInput(f"{path} is not a safetensors file.") from e


def _body(name: str, t: dict[str, Tensor], path: Path) -> HoldBody:
    try:
        field = load_field(t)
        laplace, width, unit = t["density"].tolist()
        law = Density("laplace" if laplace else "neus", width, unit, True)
        cached = bool(t["cached"])
        if name == "object":
            poses = RigidPoses(t["poses.cam_from_object"].numpy(), t["poses.center"].numpy(), float(t["poses.radius"]))
            return HoldBody(name, poses, field, law, Sampling(cached))
        track = Posed(*(t[f"poses.{k}"].numpy() for k in ("pose", "betas", "transl")))
        return HoldBody(name, SkinnedPoses(name, track), field, law, Sampling(cached, edges=8))
    except (KeyError, IndexError, RuntimeError, ValueError) as e:
        raise UnusableInput(f"{path} is no field of handhold ({e}).") from e
