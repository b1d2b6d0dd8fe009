"""HOLD's own data (Fan et al., CVPR 2024): a sequence's `build/` folder, read and written.

    build/
      image/%04d.png  mask/%04d.png (0 background, 50 object, 150 right, 250 left)  corres.txt (names of the originals)
      data.npy        a pickled dictionary: cameras, poses of hands and object

`data.npy` is read by `handhold.pickled`, in which nothing of a file is run.

The build's world has OpenGL's axes (x right, y up, z backward) and metres, moved by `normalize_shift`:
x_build = D x_cam + shift with D = diag(1, -1, -1). `world_mat_i` = K [R|t] takes it to pixels whose centres are whole
numbers; `scale_mat_i` is the size of HOLD's scene, in which it lies in a sphere of radius `scene_bounding_sphere`. The
object's points are kept about the origin with radius 1; `norm_mat` takes structure from motion's points there, and
`obj_scale` is metres per unit of structure from motion. A hand turns about its wrist joint J0, so a change of frame
(G, T) makes t' = G (J0 + t) + T - J0 of its translation: it needs the hand model, here only as `rest_wrist`.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import torch

from ..errors import UnusableInput
from ..geometry import rigid
from ..geometry.cameras import check_K, make_K, opencv_K
from ..pickled import as_array, as_mapping, read_npy_object, write_npy_object
from ..scene import SIDES, Sequence
from .masks import natural_key, write_png
from .video import IMAGE_TYPES, MIN_FRAMES, read_clip

CODES = {"object": 50, "right": 150, "left": 250}
_BANDS = {"object": (25, 100), "right": (100, 200), "left": (200, 255)}  # as HOLD's losses tell them apart
MAX_DATA_BYTES, MAX_OPCODES = 128 << 20, 4_000_000  # 2000 frames and a million points need 30 MiB, 200,000
MAX_FRAMES, MAX_POINTS = 10_000, 2_000_000
SPHERE, RADIUS_RATIO = 6.0, 3.0  # HOLD's defaults
FLIP = np.diag([1.0, -1.0, -1.0])


@dataclass(frozen=True)
class CameraHand:
    """One hand over a clip in the camera's frame, by the named model; x = R (v - J0) + J0 + transl."""

    model: str
    pose: np.ndarray  # (F,16,3) axis-angle, MANO order, the first is the whole hand's
    betas: np.ndarray  # (10,)
    transl: np.ndarray  # (F,3) metres
    rest_wrist: np.ndarray  # (3,) J0: that model's wrist joint at rest with these betas, metres

    def moved(self, a_from_cam: np.ndarray) -> CameraHand:
        """The hand in another frame; a_from_cam: (4,4) or (F,4,4) rigid."""
        pose, transl = _moved(self.pose, self.transl, a_from_cam, self.rest_wrist)
        return replace(self, pose=pose, transl=transl)


@dataclass(frozen=True)
class HoldHand:
    """One hand as a build holds it: angles, betas and translation as read, in the build's world."""

    model: str  # whose numbers these are; MANO's unless the file names another
    pose: np.ndarray  # (F,16,3) axis-angle, MANO order, the first is the whole hand's
    betas: np.ndarray  # (10,)
    transl: np.ndarray  # (F,3) metres

    def in_camera(self, cam_from_build: np.ndarray, rest_wrist: np.ndarray) -> CameraHand:
        """In the camera's frame. cam_from_build: (F,4,4); rest_wrist: (3,) of the model with these betas."""
        hand = CameraHand(self.model, self.pose, self.betas, self.transl, np.asarray(rest_wrist, np.float64))
        return hand.moved(cam_from_build)


@dataclass(frozen=True)
class BuildTracks:
    """What HOLD's training starts from, in the camera's frame, metres; every frame of the clip is known."""

    cam_from_object: np.ndarray  # (F,4,4)
    points: np.ndarray  # (P,3) on the object, object frame
    hands: dict[str, CameraHand]  # by side


@dataclass(frozen=True)
class HoldBuild:
    """A build folder. `F` are the frames of `sequence`; `indices` are theirs in the folder."""

    sequence: Sequence  # frames, K, masks of right, left, object (settled); no landmarks
    full_size: tuple[int, int]  # (width, height) of the pictures in the folder
    name: str
    cam_from_build: np.ndarray  # (F,4,4) rigid, from the build's world
    cam_from_object: np.ndarray  # (F,4,4) rigid; the object frame is that of structure from motion, in metres
    points: np.ndarray  # (P,3) object frame, metres
    object_scale: float  # metres per unit of structure from motion
    object_from_canonical: np.ndarray  # (4,4) similarity from the frame of HOLD's object network, metres per its unit
    scene_scale: float  # units of HOLD's scene per metre
    hands: dict[str, HoldHand]  # by side

    def tracks(self, rest_wrists: dict[str, np.ndarray]) -> BuildTracks:
        """In the camera's frame; rest_wrists: (3,) by side, of the user's MANO with these betas."""
        hands = {s: h.in_camera(self.cam_from_build, rest_wrists[s]) for s, h in self.hands.items()}
        return BuildTracks(self.cam_from_object, self.points, hands)


def is_build(path: str | os.PathLike) -> bool:
    """Whether `path` is such a folder."""
    return (Path(path) / "data.npy").is_file() and (Path(path) / "image").is_dir()


def read_build(
    folder: str | os.PathLike,
    start: float | None = None,
    end: float | None = None,
    stride: int = 1,
    max_side: int | None = None,
    *,
    K: np.ndarray | None = None,
    min_frames: int = MIN_FRAMES,
    max_bytes: int = 1 << 30,
    report: Callable[..., None] | None = None,
) -> HoldBuild:
    """Read a build folder; the arguments are those of `read_clip`. Without K, the intrinsics are the build's.

    Masks are the user's: `settled`, confidence 1. A build whose `mask/` is empty (HOLD allows it) has none.
    Raises `UnusableInput` with one sentence for a folder that is not a build, is not whole, or contradicts itself.
    """
    folder = Path(folder)
    if not is_build(folder):
        raise UnusableInput(f"{folder} is not a HOLD build: it needs data.npy and the folder image.")
    images = [p for p in (folder / "image").iterdir() if p.suffix.lower() in IMAGE_TYPES and p.name[0] != "."]
    pictures = sorted((folder / "mask").glob("*.png"), key=natural_key)
    if not 0 < len(images) <= MAX_FRAMES:
        raise UnusableInput(f"{folder / 'image'} has {len(images)} images; a build has 1 to {MAX_FRAMES}.")
    if pictures and len(pictures) != len(images):
        raise UnusableInput(f"{folder} has {len(images)} images but {len(pictures)} masks; build it again.")
    stored = _Data(folder / "data.npy", len(images))
    if K is None and (first := cv2.imread(str(min(images, key=natural_key)))) is not None:
        check_K(stored.K, first.shape[1], first.shape[0], name=str(folder / "data.npy"))
    sequence, full_size = read_clip(
        folder / "image", start, end, stride, max_side, K=stored.K if K is None else K, min_frames=min_frames,
        max_bytes=max_bytes, report=report,
    )  # fmt: skip
    at = sequence.indices
    masks = _read_labels([pictures[i] for i in at], sequence.size, full_size, set(stored.hands)) if pictures else {}
    sequence = replace(
        sequence,
        source=str(folder),
        masks=masks,
        mask_confidence={name: np.ones(len(sequence), np.float32) for name in masks},
        settled=tuple(masks),
    )
    return HoldBuild(
        sequence=sequence,
        full_size=full_size,
        name=stored.name,
        cam_from_build=stored.cam_from_build[at],
        cam_from_object=stored.cam_from_build[at] @ stored.build_from_object[at],
        points=stored.points,
        object_scale=stored.object_scale,
        object_from_canonical=stored.object_from_canonical,
        scene_scale=stored.scene_scale,
        hands={s: replace(h, pose=h.pose[at], transl=h.transl[at]) for s, h in stored.hands.items()},
    )


class _Data:
    """The numbers of data.npy for all `n` frames, checked."""

    def __init__(self, path: Path, n: int) -> None:
        root = as_mapping(read_npy_object(path, MAX_DATA_BYTES, MAX_OPCODES))
        self.path, self.n, self.root = path, n, root if root is not None else {}
        cameras, entities = (self._part(self.root, k) for k in ("cameras", "entities"))
        obj = self._part(entities, "object")
        name = self.root.get("seq_name")
        self.name = name if isinstance(name, str) else ""
        self.K, self.cam_from_build = self._cameras(cameras)
        size = self._numbers(cameras, "scale_mat_0", (4, 4))[0, 0]
        self.scene_scale = 1 / self._positive(size, "scale_mat_0")
        self.object_scale = float(self._positive(self._numbers(obj, "obj_scale", ()), "obj_scale"))
        poses = self._numbers(obj, "object_poses", (n, 6))
        self.build_from_object = rigid.rigid(*_rotation_and_place(poses[:, :3], poses[:, 3:])).numpy()
        normal = self._numbers(obj, "norm_mat", (4, 4))
        if abs(np.linalg.det(normal)) < 1e-12 or not np.allclose(normal[3], [0, 0, 0, 1]):
            raise UnusableInput(f"{path}: norm_mat is not a similarity.")
        self.object_from_canonical = np.diag([*[self.object_scale] * 3, 1.0]) @ np.linalg.inv(normal)
        points = self._numbers(obj, "pts.cano", (None, 3))
        self.points = points @ self.object_from_canonical[:3, :3].T + self.object_from_canonical[:3, 3]
        self.hands = {s: self._hand(s, self._part(entities, s)) for s in SIDES if s in entities}

    def _cameras(self, cameras: dict) -> tuple[np.ndarray, np.ndarray]:
        """(3,3) K, pixel centres at +0.5, and (F,4,4) camera from the build's world."""
        split = [_decomposed(self._numbers(cameras, f"world_mat_{i}", (4, 4))) for i in range(self.n)]
        K = np.array([s[0] for s in split])
        if not np.isfinite(K).all() or np.abs(K[0, 0, 1]) > 1e-3 * K[0, 0, 0]:
            raise UnusableInput(f"{self.path}: world_mat_0 is not the projection of a camera without skew.")
        if np.abs(K - K[0]).max() > 1e-3 * K[0, 0, 0]:
            raise UnusableInput(f"{self.path}: the intrinsics change over the clip, which handhold does not model.")
        fx, fy, cx, cy = (K[0][i, j] for i, j in ((0, 0), (1, 1), (0, 2), (1, 2)))
        return make_K(fx, fy, cx + 0.5, cy + 0.5), np.array([s[1] for s in split])

    def _hand(self, side: str, hand: dict) -> HoldHand:
        pose = self._numbers(hand, "hand_poses", (self.n, 48)).reshape(-1, 16, 3)
        name = hand.get("hand_model")
        return HoldHand(
            name if isinstance(name, str) else f"mano_{side}(flat_hand_mean=False)",
            pose,
            self._numbers(hand, "mean_shape", (10,)),
            self._numbers(hand, "hand_trans", (self.n, 3)),
        )

    def _part(self, whole: dict, key: str) -> dict:
        part = as_mapping(whole.get(key))
        if part is None:
            raise UnusableInput(f"{self.path} has no {key!r}, so it is not the data.npy of a HOLD build.")
        return part

    def _numbers(self, part: dict, key: str, shape: tuple[int | None, ...]) -> np.ndarray:
        if key not in part:
            raise UnusableInput(f"{self.path} has no {key!r}, so it is not the data.npy of a HOLD build.")
        try:
            value = as_array(part[key])
        except UnusableInput as e:
            raise UnusableInput(f"{self.path} is not usable at {key!r}: {e}") from e
        value = value.reshape(()) if shape == () and value.size == 1 else value
        fits = value.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
        if not fits or not 0 < value.size <= 3 * MAX_POINTS or not np.isfinite(value.astype(np.float64)).all():
            wanted = "x".join("N" if n is None else str(n) for n in shape) or "one"
            found = "x".join(map(str, value.shape)) or "one"
            raise UnusableInput(f"{self.path}: {key!r} should be {wanted} finite numbers, and is {found}.")
        return value.astype(np.float64)

    def _positive(self, value: np.ndarray, key: str) -> np.ndarray:
        if not 1e-9 < value < 1e9:
            raise UnusableInput(f"{self.path}: the scale in {key!r} is {float(value):g}.")
        return value


def write_build(
    folder: str | os.PathLike,
    sequence: Sequence,
    tracks: BuildTracks,
    name: str | None = None,
    notes: tuple[str, ...] = (),
) -> tuple[str, ...]:
    """Write a clip as HOLD's training reads it, into a new or empty folder.

    Returns `notes` with what is to be known besides; they are in the folder, too (notes.txt).

    The object's middle is put at the world's origin, as in HOLD's published runs: its later rule (0.0, 0.0, -1.0) makes
    the scene's sphere vanish when the object is a metre away. Frames in which HOLD's sampler finds neither the object
    nor every hand are left out. `name`: of the sequence, by default that of the folder (or of the one around `build`).
    Raises `UnusableInput` when HOLD could not use the clip: no hand, no object, unknown poses, too few points.
    """
    folder, n = Path(folder), len(sequence)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UnusableInput(f"{folder} holds other files; give a new or empty folder.")
    if not tracks.hands or not sequence.masks.get("object", np.zeros(1)).any():
        raise UnusableInput("HOLD needs the object and at least one hand; this clip lacks one of them.")
    for what, x in (("object", tracks.cam_from_object), *((f"{s} hand", h.transl) for s, h in tracks.hands.items())):
        if len(x) != n or not np.isfinite(x).all():
            raise UnusableInput(f"HOLD needs the {what} in every frame; there are frames without it.")
    points = _trimmed(tracks.points)
    seen = {s: m.any((1, 2)) for s, m in sequence.masks.items()}
    kept = np.flatnonzero(seen["object"] | np.all([seen.get(s, np.zeros(n, bool)) for s in tracks.hands], axis=0))
    told = list(notes)
    if len(kept) < n:
        told.append(f"{n - len(kept)} frames that show neither the object nor every hand were left out.")

    middles = tracks.cam_from_object[kept, :3, :3] @ np.median(points, axis=0) + tracks.cam_from_object[kept, :3, 3]
    build_from_cam = np.eye(4)
    build_from_cam[:3, :3], build_from_cam[:3, 3] = FLIP, -FLIP @ np.median(middles, axis=0)
    entities = {}
    for side, hand in tracks.hands.items():
        placed = hand.moved(build_from_cam)
        entities[side] = {
            "hand_poses": placed.pose[kept].reshape(-1, 48),
            "hand_trans": placed.transl[kept],
            "mean_shape": np.asarray(hand.betas, np.float64),
            "hand_model": hand.model,
        }
        if not hand.model.startswith("mano"):
            told.append(
                f"The {side} hand's angles and betas are those of {hand.model}, in MANO's joint order: HOLD poses MANO "
                "with them, which is another pose."
            )
    low, high = points.min(0), points.max(0)
    centre = (low + high) / 2
    radius = np.linalg.norm(points - centre, axis=1).max()
    canonical = np.diag([1 / radius, 1 / radius, 1 / radius, 1.0])
    canonical[:3, 3] = -centre / radius
    poses = build_from_cam @ tracks.cam_from_object[kept]
    turns = rigid.so3_log(torch.as_tensor(poses[:, :3, :3])).numpy()
    entities["object"] = {
        "obj_scale": 1.0,
        "pts.cano": (points - centre) / radius,
        "norm_mat": canonical.astype(np.float32),
        "object_poses": np.concatenate([turns, poses[:, :3, 3]], 1),
    }
    world = np.eye(4)
    world[:3, :3] = opencv_K(sequence.K)
    world = world @ np.linalg.inv(build_from_cam)
    size = np.linalg.norm(build_from_cam[:3, 3]) * RADIUS_RATIO / SPHERE
    scale = np.diag([size, size, size, 1.0]).astype(np.float32)
    cameras = {f"scale_mat_{i}": scale for i in range(len(kept))} | {f"world_mat_{i}": world for i in range(len(kept))}
    for i, f in enumerate(kept):
        label = np.zeros(sequence.frames.shape[1:3], np.uint8)
        for body in ("right", "left", "object"):  # the object over the hands, as HOLD merges them
            if body in sequence.masks:
                label[sequence.masks[body][f]] = CODES[body]
        write_png(folder / "image" / f"{i:04d}.png", sequence.frames[f])
        write_png(folder / "mask" / f"{i:04d}.png", label)
    (folder / "corres.txt").write_text("".join(f"{int(i):06d}.png\n" for i in sequence.indices[kept]), encoding="utf-8")
    (folder / "notes.txt").write_text("".join(f"{note}\n" for note in told), encoding="utf-8")
    own = folder.absolute()
    data = {
        "seq_name": name or (own.parent.name if own.name == "build" else own.name),
        "cameras": cameras,
        "scene_bounding_sphere": SPHERE,
        "max_radius_ratio": RADIUS_RATIO,
        "entities": entities,
        "normalize_shift": build_from_cam[:3, 3],
    }
    write_npy_object(folder / "data.npy", data)  # last: without it the folder is no build
    return tuple(told)


def _read_labels(
    files: list[Path], size: tuple[int, int], full_size: tuple[int, int], hands: set[str]
) -> dict[str, np.ndarray]:
    """(F,H,W) bool by name: the object, and the hands that are in `hands` or in a picture."""
    stacks = {name: np.zeros((len(files), size[1], size[0]), bool) for name in CODES}
    for f, path in enumerate(files):
        label = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if label is None:
            raise UnusableInput(f"{path} is not a readable PNG; build it again.")
        if label.shape[::-1] != full_size:
            raise UnusableInput(
                f"{path} is {label.shape[1]}x{label.shape[0]}, its image {full_size[0]}x{full_size[1]}."
            )
        if label.max() == 255:
            raise UnusableInput(f"{path} is black and white; HOLD's masks are 50, 150 and 250 where the bodies are.")
        if size != full_size:
            label = cv2.resize(label, size, interpolation=cv2.INTER_NEAREST_EXACT)
        for name, (low, high) in _BANDS.items():
            stacks[name][f] = (label >= low) & (label < high)
    return {name: m for name, m in stacks.items() if name == "object" or name in hands or m.any()}


def _decomposed(P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(4,4) K [R|t] -> K (3,3), K[2,2] = 1, and [R|t] (4,4); by RQ (Hartley and Zisserman, A4.1.1)."""
    if np.linalg.det(P[:3, :3]) <= 0 or abs(P[3] - [0, 0, 0, 1]).max() > 1e-6:
        return np.full((3, 3), np.nan), np.eye(4)
    q, r = np.linalg.qr(P[2::-1, :3].T)
    K, rotation = r.T[::-1, ::-1], q.T[::-1]
    signs = np.sign(np.diag(K))
    K, rotation = K * signs, rotation * signs[:, None]
    out = np.eye(4)
    out[:3, :3], out[:3, 3] = rotation, np.linalg.solve(K, P[:3, 3])
    return K / K[2, 2], out


def _rotation_and_place(turn: np.ndarray, place: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    return rigid.so3_exp(torch.as_tensor(turn)), torch.as_tensor(place)


def _moved(
    pose: np.ndarray, transl: np.ndarray, a_from_b: np.ndarray, rest_wrist: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """pose (F,16,3) and transl (F,3) of a hand in frame b -> in frame a; a_from_b (4,4) or (F,4,4) rigid."""
    rotation, place = a_from_b[..., :3, :3], a_from_b[..., :3, 3]
    own = rigid.so3_exp(torch.as_tensor(np.asarray(pose[:, 0], np.float64)))
    out = np.array(pose, np.float64)
    out[:, 0] = rigid.so3_log(torch.as_tensor(np.ascontiguousarray(rotation)) @ own).numpy()
    wrist = np.asarray(rest_wrist, np.float64)
    return out, ((rotation @ (wrist + transl)[..., None])[..., 0] + place - wrist)


def _trimmed(points: np.ndarray, most: int = 20_000) -> np.ndarray:
    """HOLD's rule for outliers: no farther from the median than 1.5 times the 80th percentile."""
    points = np.asarray(points, np.float64)[np.isfinite(points).all(1)]
    if len(points):
        far = np.linalg.norm(points - np.median(points, axis=0), axis=1)
        points = points[far <= 1.5 * np.percentile(far, 80)]
    if len(points) < 4 or np.ptp(points, axis=0).max() < 1e-4:
        raise UnusableInput("HOLD needs points on the object; there are too few, so fit the clip first.")
    return points[:: max(1, -(-len(points) // most))]
