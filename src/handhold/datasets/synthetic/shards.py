"""Generated pictures on disk: `write_shards` keeps a stream, `Shards` is the same stream again.

    folder/index.json                      what is in it, of which settings and seed, with SHA-256 of every shard
    folder/objects.safetensors             the bank of objects, but for its distance grids, if the stream has one
    folder/train-000000.safetensors, ...   shard_size pictures each; safetensors of

- `<field>.bytes` uint8 (N,) and `.offsets` int64 (n+1,): the field's n pictures as files; `image` JPEG or PNG, `labels`
  PNG, `amodal` PNG with a bit per body, `depth` PNG of 16 bits in units of 0.1 mm
- `<field>.quantised` int16 (n,V,3), `.centre` float32 (n,3), `.unit` float32 (n,1): `vertices`, which are
  centre + unit * quantised within a few micrometres
- `<field>.packed` uint8 (n,ceil(V/8)): the bits of `contact`
- `<field>`: all else as it is in the batch, exact

`<field>` is the name in `SynthBatch`, e.g. `right.joints`. Nothing is pickled, and a shard is read in parts.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import cv2
import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from ...errors import UnusableInput
from ...files import digest, write_atomically
from .sample import HandTruth, ObjectTruth, SynthBatch

FORMAT, VERSION = "handhold synth shards", 1
DEPTH_UNIT = 1e-4  # metres; 16 bits reach 6.5 m
MAX_SHARD = 1 << 30  # bytes
OBJECTS = "objects.safetensors"
_PICTURES = ("image", "labels", "amodal", "depth")


class Stream(Protocol):
    """Whatever gives pictures by step number: `scenes.Synth`, or `Shards`."""

    def batch(self, step: int, n: int, split: str = ...) -> SynthBatch: ...


# ---------------------------------------------------------------- writing


def write_shards(
    stream: Stream,
    folder: str | os.PathLike,
    samples: int,
    shard_size: int = 256,
    report: Callable[..., None] | None = None,
    *,
    split: str = "train",
    chunk: int = 16,
    image: str = "jpeg",
    quality: int = 95,
    settings: dict[str, Any] | None = None,
    max_bytes: int = 1 << 40,
) -> Path:
    """Write the first `samples` pictures of a stream's split, in shards; go on where an earlier call stopped.

    The pictures are those of `stream.batch(i, chunk, split)` for i = 0, 1, ..., `shard_size` a multiple of `chunk`.
    image: "jpeg" at this `quality`, without chroma subsampling, or "png", exact to 8 bits. settings: what makes the
    stream what it is, kept in the index; by default `stream.config` and `stream.seed` where there are such. A folder
    that holds other settings is refused; one that holds fewer samples, or another split, is added to.
    Raises `UnusableInput` when the folder holds something else, or the disk or `max_bytes` is too small.
    """
    folder = Path(folder)
    if samples < 1 or shard_size < 1 or shard_size % chunk:
        raise ValueError(f"{samples} samples in shards of {shard_size}, a multiple of {chunk}, cannot be written")
    if image not in ("jpeg", "png"):
        raise ValueError(f"image is {image!r}; it must be 'jpeg' or 'png'")
    settings = json.loads(json.dumps(stream_settings(stream) if settings is None else settings, default=str))
    head = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings,
        "shard_size": shard_size,
        "chunk": chunk,
        "image": image if image == "png" else f"jpeg {quality}",
    }
    index = _resume(folder, head)
    shards = index["splits"].setdefault(split, [])
    total = math.ceil(samples / shard_size)
    for k in range(total):
        count = min(shard_size, samples - k * shard_size)
        if k < len(shards) and shards[k]["samples"] >= count and _intact(folder, shards[k]):
            continue
        parts, first = [], k * shard_size // chunk
        for j in range(math.ceil(count / chunk)):
            part = stream.batch(first + j, chunk, split)
            parts.append(part.rows(slice(0, min(chunk, count - j * chunk))).to("cpu"))
            if report is not None:
                report((k * shard_size + (j + 1) * chunk) / (total * shard_size), "making pictures")
        batch = SynthBatch.cat(parts)
        data = encode(batch, image, quality)
        height, width = batch.image.shape[-2:]
        if index.setdefault("size", [width, height]) != [width, height]:
            raise UnusableInput(f"{folder} holds pictures of another size; choose another folder.")
        _check_space(folder, len(data), total - k, max_bytes, k)
        name = f"{split}-{k:06d}.safetensors"
        write_atomically(folder / name, data)
        if hasattr(stream, "bank") and not (folder / OBJECTS).exists():
            write_atomically(folder / OBJECTS, _encode_objects(stream.bank))
        entry = {"file": name, "samples": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        shards[k:] = [entry, *shards[k + 1 :]]
        write_atomically(folder / "index.json", json.dumps(index, indent=1) + "\n")
    if report is not None:
        report(1.0, "done")
    return folder


def _encode_objects(bank: Any) -> bytes:
    """The tensors of an `ObjectBank` of which `object.index` counts the rows; distance grids are left out, and counts
    kept small."""
    out = {}
    for f in dataclasses.fields(bank):
        x = getattr(bank, f.name)
        if isinstance(x, Tensor) and not f.name.startswith("sdf") and f.name != "part_rows":
            x = x.cpu().numpy()
            out[f.name] = np.ascontiguousarray(x.astype(np.int32) if x.dtype == np.int64 else x)
    return save(out, {"kind": json.dumps(list(bank.kind))})


def stream_settings(stream: Any) -> dict[str, Any]:
    """`config` and `seed` of a stream, as plain data; tensors and the like are left out."""
    config = getattr(stream, "config", None)
    plain = _plain(dataclasses.asdict(config)) if dataclasses.is_dataclass(config) else {}
    out = {"kind": type(stream).__name__, "config": plain}
    return out | ({"seed": int(stream.seed)} if isinstance(getattr(stream, "seed", None), int) else {})


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (str, int, float, bool)) or value is None:
        return value
    if isinstance(value, (Tensor, np.ndarray)):
        return f"{type(value).__name__} {tuple(value.shape)}"
    return str(value)


def _resume(folder: Path, head: dict[str, Any]) -> dict[str, Any]:
    if not (folder / "index.json").exists():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UnusableInput(f"{folder} exists and is not a folder of shards; choose another one.")
        return {**head, "splits": {}}
    index = read_index(folder)
    for key, value in head.items():
        if index.get(key) != value:
            raise UnusableInput(
                f"{folder} holds pictures of other settings ({key} differs); choose another folder or remove this one."
            )
    return index


def _intact(folder: Path, entry: dict[str, Any]) -> bool:
    path = folder / entry["file"]
    return path.is_file() and path.stat().st_size == entry["bytes"]


def _check_space(folder: Path, size: int, left: int, max_bytes: int, done: int) -> None:
    if size > MAX_SHARD:
        raise UnusableInput(f"A shard would have {size >> 20} MiB; use fewer pictures per shard.")
    if size * (left + done) > max_bytes:
        raise UnusableInput(
            f"The pictures need about {size * (left + done) / 2**30:.1f} GiB, more than the "
            f"{max_bytes / 2**30:.1f} GiB allowed; make fewer or smaller ones."
        )
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size * left > free:
        raise UnusableInput(
            f"The disk of {folder} has {free / 2**30:.1f} GiB left, but the pictures need about "
            f"{size * left / 2**30:.1f} GiB; make fewer or smaller ones."
        )


# ---------------------------------------------------------------- reading


def read_index(folder: str | os.PathLike) -> dict[str, Any]:
    """index.json of a folder of shards; raises `UnusableInput` when it is none."""
    path = Path(folder) / "index.json"
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        if index["format"] != FORMAT:
            raise KeyError("format")
        if index["version"] != VERSION:
            raise UnusableInput(f"{path} is version {index['version']}; this handhold reads version {VERSION}.")
        for shards in index["splits"].values():
            for s in shards:
                if Path(s["file"]).name != s["file"]:
                    raise KeyError("file")
                int(s["samples"]), int(s["bytes"]), str(s["sha256"])
        return index
    except FileNotFoundError as e:
        raise UnusableInput(f"{folder} has no index.json; make pictures with `handhold synth {folder}`.") from e
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise UnusableInput(f"{path} is not an index of shards; make the pictures again.") from e


class Shards:
    """The pictures of a folder as an endless stream, stateless in `step` as the generator is.

    Every epoch is a permutation of the split, a function of `seed` and the epoch's number. `batch` decodes the next
    step while the caller works on this one.
    """

    def __init__(
        self,
        folder: str | os.PathLike,
        device: str | torch.device = "cpu",
        seed: int = 0,
        workers: int = 2,
        ahead: bool = True,
    ):
        self.folder, self.device, self.seed, self.ahead = Path(folder), torch.device(device), seed, ahead
        self.index = read_index(folder)
        self._starts = {}
        for split, shards in self.index["splits"].items():
            for s in shards:
                if not _intact(self.folder, s):
                    raise UnusableInput(
                        f"{self.folder / s['file']} is missing or cut off; repeat the `handhold synth` command."
                    )
            self._starts[split] = np.cumsum([0, *(int(s["samples"]) for s in shards)])
        self._orders: OrderedDict[tuple[str, int], np.ndarray] = OrderedDict()
        self._open: dict[str, Any] = {}
        self._pool = ThreadPoolExecutor(max(1, workers), "shards")
        self._lead = ThreadPoolExecutor(1, "shards-ahead")  # alone in opening files and submitting to the pool
        self._next: tuple[tuple[int, int, str], Future] | None = None

    def size(self, split: str = "train") -> int:
        """Pictures in a split; 0 when there is no such split."""
        return int(self._starts[split][-1]) if split in self._starts else 0

    def batch(self, step: int, n: int, split: str = "train") -> SynthBatch:
        """Pictures step n ... step n + n - 1 of the endless stream, on the device."""
        if not self.size(split):
            have = ", ".join(self._starts) or "none"
            raise UnusableInput(f"{self.folder} has no pictures of the split {split!r}; it has {have}.")
        key, job = (step, n, split), None
        if self._next is not None and self._next[0] == key:
            job = self._next[1]
        job = job or self._lead.submit(self._decode, *key)
        batch = job.result()
        if self.ahead:
            after = (step + 1, n, split)
            self._next = (after, self._lead.submit(self._decode, *after))
        return batch.to(self.device)

    def row(self, i: int, split: str = "train") -> SynthBatch:
        """Picture i of the split as it was written, a batch of one."""
        return self._lead.submit(self._gather, np.array([i]), split).result().to(self.device)

    def verify(self) -> None:
        """Compare every shard with its SHA-256; raises `UnusableInput` at the first that differs."""
        for shards in self.index["splits"].values():
            for s in shards:
                if digest(self.folder / s["file"]) != s["sha256"]:
                    raise UnusableInput(f"{self.folder / s['file']} is damaged; remove it and repeat `handhold synth`.")

    def _decode(self, step: int, n: int, split: str) -> SynthBatch:
        total = self.size(split)
        at = step * n + np.arange(n)
        return self._gather(np.array([self._order(split, int(i // total))[i % total] for i in at]), split)

    def _gather(self, rows: np.ndarray, split: str) -> SynthBatch:
        starts = self._starts[split]
        jobs = []
        for r in rows:
            k = int(np.searchsorted(starts, r, side="right")) - 1
            entry = self.index["splits"][split][k]
            jobs.append((entry["file"], self._handle(entry["file"]), int(r - starts[k])))
        try:
            return SynthBatch.cat(list(self._pool.map(lambda j: decode(j[1], j[2]), jobs)))
        except (SafetensorError, KeyError, ValueError, IndexError, RuntimeError, cv2.error) as e:
            raise UnusableInput(f"A shard of {self.folder} is damaged ({e}); repeat `handhold synth`.") from e

    def _handle(self, name: str) -> Any:
        if name not in self._open:
            try:
                self._open[name] = safe_open(str(self.folder / name), "numpy")
            except (SafetensorError, OSError) as e:
                raise UnusableInput(f"{self.folder / name} is damaged; remove it and repeat `handhold synth`.") from e
        return self._open[name]

    def _order(self, split: str, epoch: int) -> np.ndarray:
        key = (split, epoch)
        if key not in self._orders:
            rng = np.random.default_rng([self.seed, epoch, *split.encode()])
            self._orders[key] = rng.permutation(self.size(split))
            while len(self._orders) > 4:
                self._orders.popitem(last=False)
        return self._orders[key]


# ---------------------------------------------------------------- one shard


def encode(batch: SynthBatch, image: str = "jpeg", quality: int = 95) -> bytes:
    """A batch on the CPU as the bytes of a shard."""
    out: dict[str, np.ndarray] = {}
    for name, value in _flatten(batch):
        x = value.detach().cpu().numpy()
        if name in _PICTURES and x.shape[1]:
            files = [_encode_picture(name, p, image, quality) for p in x]
            out[name + ".offsets"] = np.cumsum([0, *(len(f) for f in files)]).astype(np.int64)
            out[name + ".bytes"] = np.frombuffer(b"".join(files), np.uint8)
        elif name.endswith(".vertices"):
            low, high = x.min(1), x.max(1)
            centre = ((low + high) / 2).astype(np.float32)
            unit = np.maximum((high - low).max(1, keepdims=True) / 2 / 32767, 1e-9).astype(np.float32)
            out[name + ".centre"], out[name + ".unit"] = centre, unit
            steps = np.rint((x - centre[:, None]) / unit[:, None])
            out[name + ".quantised"] = np.clip(steps, -32767, 32767).astype(np.int16)
        elif name.endswith(".contact"):
            out[name + ".packed"] = np.packbits(x, axis=1)
        else:
            out[name] = x
    return save(
        {k: np.ascontiguousarray(v) for k, v in out.items()},
        {"vertices": str(batch.right.vertices.shape[1])},  # one entry: safetensors keeps no order of several
    )


def decode(shard: Any, i: int) -> SynthBatch:
    """Row i of an open shard (`safe_open(path, "numpy")`), a batch of one on the CPU."""
    keys = set(shard.keys())

    def field(name: str) -> Tensor:
        if name + ".bytes" in keys:
            a, b = (int(v) for v in shard.get_slice(name + ".offsets")[i : i + 2])
            return torch.from_numpy(_decode_picture(name, shard.get_slice(name + ".bytes")[a:b]))[None]
        if name + ".quantised" in keys:
            part = {k: shard.get_slice(f"{name}.{k}")[i : i + 1] for k in ("quantised", "centre", "unit")}
            x = part["quantised"].astype(np.float32) * part["unit"][:, None] + part["centre"][:, None]
            return torch.from_numpy(x)
        if name + ".packed" in keys:
            bits = np.unpackbits(shard.get_slice(name + ".packed")[i : i + 1], axis=1)
            return torch.from_numpy(bits[:, : int(shard.metadata()["vertices"])].astype(bool))
        return torch.from_numpy(np.array(shard.get_slice(name)[i : i + 1]))

    return _build(SynthBatch, field, "")


def _encode_picture(name: str, x: np.ndarray, image: str, quality: int) -> bytes:
    """One picture of a field as a JPEG or PNG file."""
    kind, options = ".png", [cv2.IMWRITE_PNG_COMPRESSION, 3]
    if name == "image":  # (3,H,W) in [0,1]
        x = np.rint(np.clip(x, 0, 1) * 255).astype(np.uint8).transpose(1, 2, 0)[:, :, ::-1]
        if image == "jpeg":
            kind, options = ".jpg", [cv2.IMWRITE_JPEG_QUALITY, quality]
            options += [cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444]
    elif name == "amodal":  # (4,H,W) bool
        x = np.packbits(x, axis=0, bitorder="little")[0]
    elif name == "depth":
        x = np.clip(np.rint(x / DEPTH_UNIT), 0, 65535).astype(np.uint16)
    ok, data = cv2.imencode(kind, np.ascontiguousarray(x), options)
    if not ok:
        raise ValueError(f"cannot encode {name} of shape {x.shape}")
    return data.tobytes()


def _decode_picture(name: str, data: np.ndarray) -> np.ndarray:
    x = cv2.imdecode(np.ascontiguousarray(data), cv2.IMREAD_COLOR if name == "image" else cv2.IMREAD_UNCHANGED)
    if x is None:
        raise ValueError(f"{name} is not a picture")
    if name == "image":
        return x[:, :, ::-1].transpose(2, 0, 1).astype(np.float32) / 255
    if name == "amodal":
        return np.unpackbits(x[None], axis=0, count=4, bitorder="little").astype(bool)
    if name == "depth":
        return x.astype(np.float32) * np.float32(DEPTH_UNIT)
    return x


_PARTS = {"right": HandTruth, "left": HandTruth, "object": ObjectTruth}


def _flatten(x: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    out = []
    for f in dataclasses.fields(x):
        v = getattr(x, f.name)
        out += [(prefix + f.name, v)] if isinstance(v, Tensor) else _flatten(v, f"{prefix}{f.name}.")
    return out


def _build(kind: type, field: Callable[[str], Tensor], prefix: str) -> Any:
    return kind(
        **{
            f.name: _build(_PARTS[f.name], field, f"{f.name}.") if f.name in _PARTS else field(prefix + f.name)
            for f in dataclasses.fields(kind)
        }
    )
