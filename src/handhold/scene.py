"""What goes in and what comes out: `Sequence` (video, camera, evidence) and `Scene` (cameras and bodies).

A `Scene` is cameras and bodies; a `Body` is a *shape* (what it looks like at rest) and a *motion* (how it moves per
frame). `Scene.save` writes `scene.npz` version 1, the public result format (docs/formats.md). World frame: OpenCV axes
(x right, y down, z forward), metres; for a static camera it is the camera's frame. Joints are 21, OpenPose order.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from .errors import UnusableInput
from .files import atomic_file

SIDES = ("right", "left")


@dataclass(frozen=True)
class Landmarks:
    """21 hand landmarks of one side over a clip, from any source."""

    points: np.ndarray  # (F,21,2) float32 pixels, OpenPose order; NaN where not found
    points3d: (
        np.ndarray
    )  # (F,21,3) float32 metres up to similarity, camera-aligned axes; NaN where not found or not given
    confidence: np.ndarray  # (F,) float32 in [0,1]; 0 where not found
    source: str = ""  # what the points mean: "mediapipe", "openpose", "mano" (HaMeR, WiLoR), "" for a model's joints


@dataclass(frozen=True)
class HandEstimates:
    """What a regressor makes of one side's hand, each frame alone; frames without an answer are NaN, confidence 0.

    Pose and shape are those of that side's open hand (`HandModel.open(side)`) in the camera's frame; NaN throughout
    when the network gives the surface only.
    """

    pose: np.ndarray  # (F,16,3) float32 axis-angle, the first is the whole hand's
    betas: np.ndarray  # (F,10) float32
    joints: np.ndarray  # (F,21,3) float32 camera frame, metres, OpenPose order; as far away as this hand must be
    points: np.ndarray  # (F,21,2) float32 pixels, OpenPose order
    confidence: np.ndarray  # (F,21) float32 in [0,1]: of each joint, 0 where not found


@dataclass(frozen=True)
class Sequence:
    """One clip, ready to be tracked: frames, intrinsics and, after `prepare`, landmarks, estimates and masks."""

    frames: np.ndarray  # (F,H,W,3) uint8 sRGB
    indices: np.ndarray  # (F,) int, index of each frame in the source
    fps: float
    K: np.ndarray  # (3,3) float64, pixels of `frames`, pixel centres at +0.5
    K_source: str  # "given", "metadata" or "default"
    source: str = ""
    landmarks: dict[str, Landmarks] = field(default_factory=dict)  # by side, only sides that are present
    regressed: dict[str, HandEstimates] = field(default_factory=dict)  # by side; empty without a regressor
    masks: dict[str, np.ndarray] = field(default_factory=dict)  # "right", "left", "object": (F,H,W) bool
    mask_confidence: dict[str, np.ndarray] = field(default_factory=dict)  # (F,) float32
    settled: tuple[str, ...] = ()  # names of masks that nothing changes any more: the user's
    notes: tuple[str, ...] = ()  # what was assumed or could not be had; shown in the report

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) in pixels."""
        return self.frames.shape[2], self.frames.shape[1]

    def with_evidence(self, **kw) -> Sequence:
        return replace(self, **kw)


@dataclass(frozen=True)
class Mesh:
    """A triangle surface at rest, in its own canonical frame."""

    vertices: np.ndarray  # (V,3) float32 metres
    faces: np.ndarray  # (T,3) int32
    colors: np.ndarray | None = None  # (V,3) float32 sRGB in [0,1]
    observed: np.ndarray | None = None  # (V,) bool, False on surface no frame has seen


@dataclass(frozen=True)
class Rigid:
    """x_world = world_from_body @ x."""

    world_from_body: np.ndarray  # (F,4,4) rigid, no scale


@dataclass(frozen=True)
class Skinned:
    """A posed hand: parameters in the named model's own convention, and vertices and joints they give in the world."""

    model: str
    pose: np.ndarray  # (F,16,3) axis-angle
    betas: np.ndarray  # (10,)
    transl: np.ndarray  # (F,3)
    vertices: np.ndarray  # (F,V,3) world, metres
    joints: np.ndarray  # (F,21,3) world, metres, OpenPose order


@dataclass(frozen=True)
class Body:
    """A shape and its motion, with what is known about each frame."""

    shape: Mesh
    motion: Rigid | Skinned
    valid: np.ndarray  # (F,) bool
    confidence: np.ndarray  # (F,) float32
    reason: np.ndarray  # (F,) str, a rung of `tracking.rungs`: "sfm", "registered", "fiducial", "not found" ...
    # (A,4) turns that no picture tells apart: axis, unit, the body's frame, and order n (360 / n degrees; 0: any angle)
    ambiguous: np.ndarray | None = None  # None: not asked

    def posed(self, frame: int) -> np.ndarray:
        """(V,3) world vertices of one frame."""
        if isinstance(self.motion, Skinned):
            return self.motion.vertices[frame]
        t = self.motion.world_from_body[frame]
        return self.shape.vertices @ t[:3, :3].T + t[:3, 3]


@dataclass(frozen=True)
class Scene:
    """Cameras and bodies over a clip. `bodies` is keyed "right", "left", "object"; absent bodies are absent."""

    K: np.ndarray  # (3,3)
    size: tuple[int, int]  # width, height
    fps: float
    frames: np.ndarray  # (F,) int index in the source video
    world_from_cam: np.ndarray  # (F,4,4)
    bodies: dict[str, Body]

    def save(self, path: str | os.PathLike) -> None:
        """Write `scene.npz` version 1, atomically."""
        out: dict[str, np.ndarray] = {
            "version": np.int64(1),
            "fps": np.float32(self.fps),
            "size": np.asarray(self.size, np.int64),
            "K": np.asarray(self.K, np.float32),
            "frames": np.asarray(self.frames, np.int64),
            "world_from_cam": np.asarray(self.world_from_cam, np.float32),
        }
        for name, body in self.bodies.items():
            if isinstance(body.motion, Skinned):
                k, m = f"hand.{name}.", body.motion
                out |= {
                    k + "joints": np.asarray(m.joints, np.float32),
                    k + "vertices": np.asarray(m.vertices, np.float32),
                    k + "faces": np.asarray(body.shape.faces, np.int32),
                    k + "pose": np.asarray(m.pose, np.float32),
                    k + "betas": np.asarray(m.betas, np.float32),
                    k + "transl": np.asarray(m.transl, np.float32),
                    k + "model": np.asarray(m.model),
                }
                if body.shape.colors is not None:
                    out[k + "colors"] = np.asarray(body.shape.colors, np.float32)
            else:
                k = f"{name}."
                s = body.shape
                grey = np.full((len(s.vertices), 3), 0.5, np.float32)
                out |= {
                    k + "vertices": np.asarray(s.vertices, np.float32),
                    k + "faces": np.asarray(s.faces, np.int32),
                    k + "colors": np.asarray(grey if s.colors is None else s.colors, np.float32),
                    k + "world_from_object": np.asarray(body.motion.world_from_body, np.float32),
                    k + "observed": np.ones(len(s.vertices), bool)
                    if s.observed is None
                    else np.asarray(s.observed, bool),
                }
                if body.ambiguous is not None:
                    out[k + "ambiguous"] = np.asarray(body.ambiguous, np.float32).reshape(-1, 4)
            out |= {
                k + "valid": np.asarray(body.valid, bool),
                k + "confidence": np.asarray(body.confidence, np.float32),
                k + "reason": np.asarray(body.reason, dtype=np.str_),
            }
        save_npz(path, out)

    @staticmethod
    def load(path: str | os.PathLike) -> Scene:
        """Read `scene.npz`; raises `UnusableInput` when it is not one."""
        z = load_npz(path)
        try:
            if int(z["version"]) != 1:
                raise UnusableInput(f"{path} is scene.npz version {int(z['version'])}; this handhold reads version 1.")
            n, bodies = len(z["frames"]), {}
            for side in SIDES:
                k = f"hand.{side}."
                if k + "joints" not in z:
                    continue
                motion = Skinned(
                    str(z[k + "model"]),
                    z[k + "pose"],
                    z[k + "betas"],
                    z[k + "transl"],
                    z[k + "vertices"],
                    z[k + "joints"],
                )
                mesh = Mesh(z[k + "vertices"][0], z[k + "faces"], z.get(k + "colors"))
                bodies[side] = Body(mesh, motion, *_frame_state(z, k, n))
            if "object.vertices" in z:
                mesh = Mesh(z["object.vertices"], z["object.faces"], z.get("object.colors"), z.get("object.observed"))
                motion, same = Rigid(z["object.world_from_object"]), z.get("object.ambiguous")
                bodies["object"] = Body(mesh, motion, *_frame_state(z, "object.", n), same)
            return Scene(
                z["K"], tuple(int(v) for v in z["size"]), float(z["fps"]), z["frames"], z["world_from_cam"], bodies
            )
        except KeyError as e:
            raise UnusableInput(
                f"{path} has no {e.args[0]!r}, so it is not a handhold scene; run the `fit` stage again."
            ) from e


def _frame_state(z: dict[str, np.ndarray], k: str, n: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    valid = z.get(k + "valid", np.ones(n, bool))
    return valid, z.get(k + "confidence", valid.astype(np.float32)), z.get(k + "reason", np.full(n, "", dtype=np.str_))


def save_npz(path: str | os.PathLike, arrays: dict[str, np.ndarray]) -> None:
    """Write arrays (never objects) to a compressed .npz, atomically: a killed or full-disk write leaves no file."""
    bad = [k for k, v in arrays.items() if np.asarray(v).dtype.hasobject]
    if bad:
        raise TypeError(f"refusing to pickle {bad}")
    with atomic_file(path) as f:
        np.savez_compressed(f, **arrays)


def load_npz(path: str | os.PathLike, max_bytes: int = 4 << 30) -> dict[str, np.ndarray]:
    """Read an .npz without pickle; raises `UnusableInput` with one sentence when it cannot be used."""
    path = Path(path)
    if not path.is_file():
        raise UnusableInput(f"{path} is not a file." if path.exists() else f"{path} does not exist.")
    if path.stat().st_size > max_bytes:
        raise UnusableInput(f"{path} is larger than {max_bytes >> 20} MiB, which no handhold file is.")
    try:
        with np.load(path, allow_pickle=False) as z:
            return {k: z[k] for k in z.files}
    except Exception as e:
        raise UnusableInput(f"{path} is not a readable .npz file of plain arrays ({type(e).__name__}).") from e
