"""PyTorch files read without running anything in them, and the process in which a user's checkpoint is converted.

A `.ckpt`, `.pth` or `.bin` file is a pickle with raw arrays beside it. The pickle is read as data (`handhold.pickled`):
what it would import or call (OmegaConf nodes, optimisers, loggers) stays an inert record. Tensors are then cut out of
the mapped file, each after its size, stride and place were checked. Both layouts of `torch.save` are read: the zip
archive (PyTorch 1.6 and later) and the stream of five pickles before it.

`python -m handhold.regressors._convert` runs `adapters.convert_here` on the job in its standard input, under a limit
on memory and time that its parent sets (`adapters.convert_checkpoint`).
"""

from __future__ import annotations

import io
import json
import math
import mmap
import os
import struct
import sys
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from ..errors import HandholdError, UnusableInput
from ..pickled import Inert, as_mapping, run_pickle

MAX_FILE_BYTES = 16 << 30  # the published files are under 3 GiB, with optimiser state under 8
MAX_PICKLE_BYTES = 256 << 20  # the pickle alone, arrays apart
MAX_TENSOR_BYTES = 1 << 30  # the largest published tensor is 125 MiB (a word embedding nobody uses)
_MAGIC = 0x1950A86A20F9469CFC6C  # first pickle of the old format
_DTYPES = {
    "Float": torch.float32,
    "Double": torch.float64,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
}


class TorchFile:
    """A file of `torch.save`, mapped and read: `root` is its value, `tensor(x)` the tensor that an `Inert` stands for.

    Raises `UnusableInput` for anything that is not such a file; no code from it is run and nothing is decompressed.
    """

    def __init__(self, path: str | os.PathLike) -> None:
        self.path = Path(path)
        if not self.path.is_file():
            raise UnusableInput(f"{self.path} does not exist.")
        size = self.path.stat().st_size
        if not 0 < size <= MAX_FILE_BYTES:
            raise UnusableInput(f"{self.path} is empty, or larger than {MAX_FILE_BYTES >> 30} GiB.")
        with self.path.open("rb") as f:
            # a private mapping: torch wants memory it may write to, and what is written stays in this process
            self._map = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY)
        self._places: dict[object, tuple[int, int]] = {}  # storage key -> (first byte, bytes)
        try:
            self.root = self._read_zip() if self._map[:4] == b"PK\x03\x04" else self._read_stream()
        except UnusableInput as e:
            raise UnusableInput(f"{self.path} is not a checkpoint that can be read: {e}") from e
        except Exception as e:  # a broken file fails in many ways, none of them the user's to understand
            raise UnusableInput(f"{self.path} is not a readable PyTorch file ({type(e).__name__}).") from e

    def _read_zip(self) -> object:
        with zipfile.ZipFile(self.path) as archive:
            entries = {i.filename: i for i in archive.infolist()}
        pickles = [n for n in entries if n == "data.pkl" or n.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise UnusableInput("it is a zip archive, but not one of torch.save.")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in entries:
            start, n = self._entry(entries[f"{root}byteorder"])
            if self._map[start : start + n].strip() != b"little":
                raise UnusableInput("its numbers are big-endian.")
        for name, info in entries.items():
            if name.startswith(f"{root}data/") and not info.is_dir():
                self._places[name.removeprefix(f"{root}data/")] = self._entry(info)
        start, n = self._entry(entries[pickles[0]])
        if n > MAX_PICKLE_BYTES:
            raise UnusableInput("its pickle is larger than any checkpoint's.")
        return run_pickle(io.BytesIO(self._map[start : start + n]))

    def _entry(self, info: zipfile.ZipInfo) -> tuple[int, int]:
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise UnusableInput("its entries are compressed, which torch.save never does.")
        at = info.header_offset
        if self._map[at : at + 4] != b"PK\x03\x04":
            raise UnusableInput("its directory points to places where no entry begins.")
        name, extra = struct.unpack("<HH", self._map[at + 26 : at + 30])
        start = at + 30 + name + extra
        if start + info.file_size > len(self._map):
            raise UnusableInput("it is cut short.")
        return start, info.file_size

    def _read_stream(self) -> object:
        self._map.seek(0)
        if self._map[:1] != b"\x80" or run_pickle(self._map) != _MAGIC:
            raise UnusableInput("it is neither of the two formats of torch.save.")
        run_pickle(self._map)  # protocol version
        info = run_pickle(self._map)
        if not (isinstance(info, dict) and info.get("little_endian") is True):
            raise UnusableInput("its numbers are big-endian.")
        start = self._map.tell()
        root = run_pickle(self._map)
        if self._map.tell() - start > MAX_PICKLE_BYTES:
            raise UnusableInput("its pickle is larger than any checkpoint's.")
        keys, widths = run_pickle(self._map), _widths(root)
        for key in keys if isinstance(keys, list) else ():
            at = self._map.tell()
            (count,) = struct.unpack("<q", self._map[at : at + 8])
            width = widths.get(key)
            if width is None or count < 0 or at + 8 + count * width > len(self._map):
                raise UnusableInput("it is cut short, or holds arrays that nothing refers to.")
            self._places[key] = (at + 8, count * width)
            self._map.seek(at + 8 + count * width)
        return root

    def tensor(self, value: object) -> Tensor | None:
        """The tensor an `Inert` stands for, over the mapped file; None when it stands for something else."""
        for _ in range(3):  # a parameter wraps a tensor
            if isinstance(value, Inert) and value.name == "torch._utils._rebuild_parameter" and value.args:
                value = value.args[0]
            elif isinstance(value, Inert) and value.name == "torch._tensor._rebuild_from_type_v2":
                if len(value.args) < 3 or not isinstance(value.args[0], Inert) or not isinstance(value.args[2], tuple):
                    return None
                value = Inert(value.args[0].name, value.args[2])
        if not isinstance(value, Inert) or not value.name.startswith("torch._utils._rebuild_tensor"):
            return None
        storage, offset, size, stride = (*value.args, None, None, None, None)[:4]
        pid = _storage(storage)
        numbers = [offset, *size, *stride] if isinstance(size, tuple) and isinstance(stride, tuple) else [None]
        plain = all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in numbers)
        if pid is None or not plain or len(size) != len(stride) or len(size) > 8:
            raise UnusableInput("it holds a tensor without a plain storage, size and stride.")
        key, dtype = pid
        if key not in self._places:
            raise UnusableInput("it holds a tensor whose data is missing.")
        start, n_bytes = self._places[key]
        width = dtype.itemsize
        last = offset + sum((n - 1) * s for n, s in zip(size, stride, strict=True))
        if math.prod(size) * width > MAX_TENSOR_BYTES:
            raise UnusableInput(f"it holds a tensor of size {'x'.join(map(str, size))}, larger than any network's.")
        if math.prod(size) == 0:
            return torch.empty(size, dtype=dtype)
        if (last + 1) * width > n_bytes:
            raise UnusableInput("it holds a tensor that reaches beyond its data.")
        data = self._map
        if start % width:  # the old format does not align its arrays
            data, start = bytearray(self._map[start : start + n_bytes]), 0
        flat = torch.frombuffer(data, dtype=dtype, count=n_bytes // width, offset=start)
        return torch.as_strided(flat, size, stride, offset)


def _storage(value: object) -> tuple[object, torch.dtype] | None:
    """(key, dtype) of a reference to an array: ('storage', torch.FloatStorage, key, device, count[, view])."""
    if not (isinstance(value, Inert) and value.name == "persistent" and isinstance(value.args[0], tuple)):
        return None
    pid = value.args[0]
    if len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Inert) or not isinstance(pid[2], (str, int)):
        return None
    if len(pid) > 5 and pid[5] is not None:
        return None  # views of storages went out of use before any of these checkpoints
    kind = pid[1].name.removeprefix("torch.").removeprefix("cuda.").removesuffix("Storage")
    return (pid[2], _DTYPES[kind]) if kind in _DTYPES else None


def _widths(root: object) -> dict[object, int]:
    """Bytes per number of every storage that a value refers to, however deep."""
    found: dict[object, int] = {}
    seen: set[int] = set()
    stack = [root]
    while stack:
        value = stack.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Inert):
            pid = _storage(value)
            if pid is not None:
                found[pid[0]] = pid[1].itemsize
            stack.extend((value.args, value.items, value.state))
        elif isinstance(value, dict):
            stack.extend(value.values())
            stack.extend(k for k in value if isinstance(k, Inert))
        elif isinstance(value, (list, tuple)):
            stack.extend(value)
    return found


def read_state_dict(path: str | os.PathLike) -> dict[str, Tensor]:
    """The network's tensors in a `.ckpt` of Lightning (under `state_dict`) or a bare state dict, by name.

    They lie over the mapped file: no copy is made. Raises `UnusableInput` when the file holds none.
    """
    file = TorchFile(path)
    top = as_mapping(file.root)
    if top is None:
        what = f"a whole pickled {file.root.name}" if isinstance(file.root, Inert) else "no state dict"
        raise UnusableInput(f"{path} holds {what}; give the file with its state dict (names and arrays) instead.")
    entries = as_mapping(top.get("state_dict", top)) or {}
    try:
        found = {k.removeprefix("module."): file.tensor(v) for k, v in entries.items() if isinstance(k, str)}
    except UnusableInput as e:
        raise UnusableInput(f"{path} is not a checkpoint that can be read: {e}") from e
    found = {k: v for k, v in found.items() if v is not None}
    if not found:
        raise UnusableInput(f"{path} holds no tensors by name, so it is not a checkpoint of a network.")
    return found


def main() -> int:
    """Do one job: a JSON object on standard input, an answer of the same kind on standard output."""
    from . import adapters  # it starts this module in another process, and is what that process runs

    job = json.load(sys.stdin)
    try:
        _limit_memory(int(job.pop("memory")))
        json.dump({"done": adapters.convert_here(**job)}, sys.stdout)
    except HandholdError as e:
        json.dump({"error": str(e)}, sys.stdout)
    return 0


def _limit_memory(n_bytes: int) -> None:
    try:
        import resource
    except ImportError:  # not on this system
        return
    resource.setrlimit(resource.RLIMIT_AS, (n_bytes, n_bytes))


if __name__ == "__main__":
    sys.exit(main())
