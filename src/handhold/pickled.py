"""Pickles read as data, and plain data written as one: nothing is imported or called.

A pickle is a program. Of this one only the operations on data are carried out; whatever the program would import or
call becomes an inert record of the name and the arguments (`Inert`), so there is nothing a hostile file could reach.
What such records mean (a tensor, an array, a sparse matrix) is decided afterwards, by code that checks them.

The writer (`write_npy_object`) emits the opcodes itself, so that a file does not depend on the version of numpy that
wrote it: arrays carry the names of numpy 1, which numpy 2 understands too, but not the other way round.
"""

from __future__ import annotations

import io
import math
import mmap
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .errors import UnusableInput
from .files import atomic_file

MAX_OPCODES = 20_000_000
MAX_ARRAY_BYTES = 64 << 20  # of an array inside a .npz pickle
_STORAGES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "LongStorage": "<i8", "IntStorage": "<i4"}


class Inert:
    """What a pickle would have imported, called or looked up: its name, and what it was given. Never run."""

    __slots__ = ("args", "items", "name", "state")

    def __init__(self, name: str, args: tuple = ()) -> None:
        self.name, self.args = name, args
        self.items: dict = {}  # of mappings; lists append under whole numbers
        self.state: object = None


class _Mark:
    pass


def _key(value: object) -> object:
    # only plain keys are hashed: the hash of nested tuples can be made to take for ever
    return value if isinstance(value, (str, int, float, bytes, bool, type(None), Inert)) else Inert("key")


def _pairs(flat: list) -> Iterator[tuple[object, object]]:
    if len(flat) % 2:
        raise UnusableInput("the pickle sets a key without a value.")
    return ((_key(flat[i]), flat[i + 1]) for i in range(0, len(flat), 2))


def run_pickle(stream: io.IOBase | mmap.mmap, max_opcodes: int = MAX_OPCODES) -> object:
    """The value of one pickle: plain Python values, and `Inert` for everything else. Reads up to its STOP."""
    stack: list = []
    memo: dict[int, object] = {}
    pushes = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}

    def to_mark() -> list:
        at = _last_mark(stack)
        found = stack[at + 1 :]
        del stack[at:]
        return found

    def call(callee: object, args: object) -> Inert:
        if not isinstance(callee, Inert):
            raise UnusableInput("the pickle calls something that is not a name.")
        return Inert(callee.name, args if isinstance(args, tuple) else (args,))

    def extend(target: object, values: list) -> None:
        if isinstance(target, list):
            target.extend(values)
        elif isinstance(target, Inert):
            n = len(target.items)
            target.items.update({n + i: v for i, v in enumerate(values)})
        else:
            raise UnusableInput("the pickle appends to something that is not a list.")

    def set_items(target: object, flat: list) -> None:
        if not isinstance(target, (dict, Inert)):
            raise UnusableInput("the pickle sets a key of something that is not a dictionary.")
        (target if isinstance(target, dict) else target.items).update(_pairs(flat))

    for count, (opcode, arg, _) in enumerate(pickletools.genops(stream)):
        name = opcode.name
        if count > max_opcodes:
            raise UnusableInput("its pickle has more operations than any file of its kind.")
        if name in ("PROTO", "FRAME"):
            pass
        elif name == "STOP":
            return stack.pop()
        elif name in pushes:
            stack.append(pushes[name])
        elif name.endswith("BINPUT") or name in ("PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else arg] = stack[-1]
        elif name.endswith("BINGET") or name == "GET":
            stack.append(memo[arg])
        elif name == "MARK":
            stack.append(_Mark())
        elif name == "POP":
            stack.pop()
        elif name == "POP_MARK":
            to_mark()
        elif name == "DUP":
            stack.append(stack[-1])
        elif name in ("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"):
            stack.append({"EMPTY_LIST": list, "EMPTY_DICT": dict}.get(name, lambda: Inert("set"))())
        elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
            n = int(name[-1])
            stack[-n:] = [tuple(stack[-n:])]
        elif name == "TUPLE":
            stack.append(tuple(to_mark()))
        elif name == "LIST":
            stack.append(to_mark())
        elif name == "FROZENSET":
            stack.append(Inert("set", tuple(to_mark())))
        elif name == "DICT":
            stack.append(dict(_pairs(to_mark())))
        elif name == "APPEND":
            value = stack.pop()
            extend(stack[-1], [value])
        elif name in ("APPENDS", "ADDITEMS"):
            values = to_mark()
            extend(stack[-1], values)
        elif name == "SETITEM":
            flat = stack[-2:]
            del stack[-2:]
            set_items(stack[-1], flat)
        elif name == "SETITEMS":
            flat = to_mark()
            set_items(stack[-1], flat)
        elif name == "GLOBAL":
            stack.append(Inert(arg.replace(" ", ".")))
        elif name == "STACK_GLOBAL":
            stack[-2:] = [Inert(f"{stack[-2]}.{stack[-1]}" if isinstance(stack[-1], str) else "?")]
        elif name in ("REDUCE", "NEWOBJ"):
            stack[-2:] = [call(stack[-2], stack[-1])]
        elif name == "NEWOBJ_EX":
            stack[-3:] = [call(stack[-3], stack[-2])]
        elif name == "OBJ":
            callee, *args = to_mark()
            stack.append(call(callee, tuple(args)))
        elif name == "INST":
            stack.append(Inert(arg.replace(" ", "."), tuple(to_mark())))
        elif name == "BUILD":
            state = stack.pop()
            if isinstance(stack[-1], Inert):
                stack[-1].state = state
        elif name == "BINPERSID":
            stack[-1:] = [Inert("persistent", (stack[-1],))]
        elif name.startswith("EXT"):
            stack.append(Inert("extension"))
        elif name in ("PERSID", "NEXT_BUFFER", "READONLY_BUFFER"):
            raise UnusableInput("its pickle refers to data outside the file.")
        else:  # the rest are constants
            stack.append(arg)
    raise UnusableInput("its pickle has no end.")


def _last_mark(stack: list) -> int:
    for i in range(len(stack) - 1, -1, -1):
        if isinstance(stack[i], _Mark):
            return i
    raise UnusableInput("its pickle closes a bracket it never opened.")


def as_mapping(value: object) -> dict | None:
    """A dictionary, or anything that was filled like one (OrderedDict, configuration nodes); None for the rest."""
    if isinstance(value, dict):
        return value
    if not isinstance(value, Inert):
        return None
    if value.items:
        return value.items
    if value.name == "collections.OrderedDict":  # Python 2 passes the pairs as an argument
        listed = value.args[0] if value.args and isinstance(value.args[0], list) else []
        return {_key(p[0]): p[1] for p in listed if isinstance(p, (list, tuple)) and len(p) == 2}
    return None


def read_object_arrays(path: str | os.PathLike, names: tuple[str, ...]) -> dict[str, list[np.ndarray]]:
    """Lists of (sparse) matrices in a `.npz` of object arrays, such as `mano_downsampling.npz`, dense and float64."""
    path, found = Path(path), {}
    if not path.is_file() or path.stat().st_size > MAX_ARRAY_BYTES:
        raise UnusableInput(f"{path} does not exist, or is too large to be a table of mesh samplings.")
    try:
        with zipfile.ZipFile(path) as archive:
            for name in names:
                info = archive.getinfo(f"{name}.npy")
                if info.file_size > MAX_ARRAY_BYTES:
                    raise UnusableInput("an array is too large.")
                data = io.BytesIO(archive.read(info))
                _npy_header(data)
                found[name] = [_matrix(v) for v in _objects(run_pickle(data))]
    except Exception as e:
        reason = f": {e}" if isinstance(e, UnusableInput) else f" ({type(e).__name__})."
        raise UnusableInput(f"{path} is not a table of mesh samplings{reason}") from e
    return found


def read_npy_object(path: str | os.PathLike, max_bytes: int, max_opcodes: int) -> object:
    """The one object in a `.npy` that `numpy.save` made of a dictionary or the like: plain values and `Inert`.

    Raises `UnusableInput` for anything else; nothing in the file is run.
    """
    path = Path(path)
    if not path.is_file():
        raise UnusableInput(f"{path} does not exist.")
    if path.stat().st_size > max_bytes:
        raise UnusableInput(f"{path} is larger than {max_bytes >> 20} MiB, which no such file is.")
    try:
        data = io.BytesIO(path.read_bytes())
        shape, _, dtype = _npy_header(data)
        if shape != () or dtype.kind != "O":
            raise UnusableInput("it holds an array, not one object.")
        (value,) = _objects(run_pickle(data, max_opcodes))
    except Exception as e:  # a broken file fails in many ways, none of them the user's to understand
        reason = f": {e}" if isinstance(e, UnusableInput) else f" ({type(e).__name__})."
        raise UnusableInput(f"{path} is not a pickled .npy file that can be read{reason}") from e
    return value


def _npy_header(data: io.BytesIO) -> tuple[tuple[int, ...], bool, np.dtype]:
    first = np.lib.format.read_magic(data) == (1, 0)
    return (np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0)(data)


def as_array(value: object) -> np.ndarray:
    """Plain numbers of any kind a pickle holds them in: a number, an array or scalar of numpy, a tensor of torch.

    Raises `UnusableInput` for anything else.
    """
    if isinstance(value, (bool, int, float)):
        return np.asarray(value, np.float64)
    name = value.name if isinstance(value, Inert) else ""
    try:
        if name.endswith("multiarray._reconstruct"):
            return _array(value)
        if name.endswith("multiarray.scalar") and len(value.args) == 2:
            return _numbers((), value.args[0], value.args[1], False)
        if name.startswith("torch._utils._rebuild_tensor") and len(value.args) >= 4:
            return _tensor(*value.args[:4])
    except (IndexError, TypeError, ValueError, OverflowError, struct.error) as e:
        raise UnusableInput(f"it holds numbers that cannot be read ({type(e).__name__}).") from e
    raise UnusableInput("it holds something else where numbers belong.")


def _tensor(storage: object, offset: object, size: object, stride: object) -> np.ndarray:
    """A torch tensor pickled on its own: its storage is a file of `torch.save` (the older format) in one string."""
    if not (isinstance(storage, Inert) and storage.name.endswith("_load_from_bytes") and len(storage.args) == 1):
        raise UnusableInput("it holds a tensor without its data.")
    stream = io.BytesIO(_bytes(storage.args[0]))
    _magic, _version, _info, root, keys = (run_pickle(stream, 1000) for _ in range(5))
    pid = root.args[0] if isinstance(root, Inert) and root.name == "persistent" else None
    plain = isinstance(pid, tuple) and len(pid) >= 5 and isinstance(pid[1], Inert) and keys == [pid[2]]
    kind = pid[1].name.removeprefix("torch.").removeprefix("cuda.") if plain else ""
    if kind not in _STORAGES:
        raise UnusableInput("it holds a tensor that is not of plain numbers.")
    (count,) = struct.unpack("<q", stream.read(8))
    flat = np.frombuffer(stream.read(), _STORAGES[kind])
    shaped = isinstance(size, tuple) and isinstance(stride, tuple) and len(size) == len(stride) <= 4
    whole = [offset, *size, *stride] if shaped else [None]
    if count != len(flat) or not all(type(n) is int and 0 <= n <= MAX_ARRAY_BYTES for n in whole):
        raise UnusableInput("it holds a tensor that is cut short, or has no plain size.")
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    if math.prod(size) > MAX_ARRAY_BYTES // 8 or last >= count:
        raise UnusableInput("it holds a tensor that reaches beyond its data.")
    at = np.full(size, offset, np.int64)
    for axis, (n, step) in enumerate(zip(size, stride, strict=True)):
        at += (np.arange(n) * step).reshape([-1 if k == axis else 1 for k in range(len(size))])
    return flat[at]


def _objects(value: object) -> list:
    if not (isinstance(value, Inert) and value.name.endswith("multiarray._reconstruct")):
        raise UnusableInput("it holds no array.")
    state = value.state
    if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[4], list)):
        raise UnusableInput("it holds an array without its objects.")
    return state[4]


def _array(value: object) -> np.ndarray:
    """An `Inert` numpy array of plain numbers -> the array."""
    if not (isinstance(value, Inert) and isinstance(value.state, tuple) and len(value.state) == 5):
        raise UnusableInput("it holds an array without data.")
    _, shape, dtype, fortran, data = value.state
    return _numbers(shape, dtype, data, bool(fortran))


def _bytes(data: object) -> bytes:
    if isinstance(data, Inert) and data.name == "_codecs.encode" and data.args:  # bytes, as Python 3 writes them for 2
        data = data.args[0]
    data = data.encode("latin1") if isinstance(data, str) else data
    if not isinstance(data, bytes):
        raise UnusableInput("it holds an array without data.")
    return data


def _numbers(shape: object, dtype: object, data: object, fortran: bool) -> np.ndarray:
    data = _bytes(data)
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    order = dtype.state[1] if isinstance(dtype, Inert) and isinstance(dtype.state, tuple) else "<"
    if code not in ("f8", "f4", "i8", "i4", "u4", "u8") or order not in ("<", "=", "|"):
        raise UnusableInput("it holds an array that is not of plain numbers.")
    if not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise UnusableInput("it holds an array without a shape.")
    if math.prod(shape) * int(code[1]) != len(data):
        raise UnusableInput("it holds an array that is cut short.")
    return np.frombuffer(data, f"<{code}").reshape(shape, order="F" if fortran else "C")


def _matrix(value: object) -> np.ndarray:
    """A dense array, or a scipy matrix in compressed columns or rows, or in triples -> dense float64."""
    name = value.name.rsplit(".", 1)[-1] if isinstance(value, Inert) else ""
    if name == "_reconstruct":
        return _array(value).astype(np.float64)
    state = as_mapping(value.state) if isinstance(value, Inert) else None
    shape = (state or {}).get("_shape", (state or {}).get("shape"))
    if name not in ("csc_matrix", "csr_matrix", "coo_matrix") or not isinstance(shape, tuple) or len(shape) != 2:
        raise UnusableInput("it holds a matrix of an unknown kind.")
    if not all(isinstance(n, int) and 0 <= n <= 4096 for n in shape):
        raise UnusableInput("it holds a matrix of an impossible size.")
    data, out = _array(state["data"]), np.zeros(shape)
    if name == "coo_matrix":
        rows, cols = _array(state["row"]), _array(state["col"])
    else:
        first, starts = _array(state["indices"]), _array(state["indptr"])
        second = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
        rows, cols = (first, second) if name == "csc_matrix" else (second, first)
    np.add.at(out, (rows, cols), data)
    return out


def write_npy_object(path: str | os.PathLike, value: object) -> None:
    """Write dictionaries, lists, strings, numbers and arrays of numbers as the `.npy` that `numpy.save` makes of them.

    Reads back by `numpy.load(path, allow_pickle=True).item()` under numpy 1 and 2. Written whole or not at all.
    """
    held = _emit_reconstruct((), "O8", "|", 63, b"]" + _emit(value) + b"a")
    with atomic_file(path) as f:
        np.lib.format.write_array_header_1_0(f, {"descr": "|O", "fortran_order": False, "shape": ()})
        f.write(b"\x80\x03" + held + b".")


def _emit(value: object) -> bytes:
    """Opcodes of pickle protocol 3 that leave `value` on the stack."""
    if value is None or isinstance(value, (bool, np.bool_)):
        return b"N" if value is None else b"\x88" if value else b"\x89"
    if isinstance(value, (int, np.integer)):
        return b"J" + struct.pack("<i", value)
    if isinstance(value, (float, np.floating)):
        return b"G" + struct.pack(">d", value)
    if isinstance(value, (str, bytes)):
        data = value.encode() if isinstance(value, str) else value
        return (b"X" if isinstance(value, str) else b"B") + struct.pack("<I", len(data)) + data
    if isinstance(value, tuple):
        return b"(" + b"".join(map(_emit, value)) + b"t"
    if isinstance(value, list):
        return b"](" + b"".join(map(_emit, value)) + b"e"
    if isinstance(value, dict):
        return b"}(" + b"".join(_emit(k) + _emit(v) for k, v in value.items()) + b"u"
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
        value = np.asarray(value, value.dtype.newbyteorder("<"))
        return _emit_reconstruct(value.shape, value.dtype.str[1:], "<", 0, _emit(value.tobytes()))
    raise TypeError(f"refusing to pickle a {type(value).__name__}")


def _emit_reconstruct(shape: tuple[int, ...], code: str, order: str, flags: int, data: bytes) -> bytes:
    """An array as numpy pickles it: an empty one by `_reconstruct`, then its state; `data` are opcodes."""
    dtype = b"cnumpy\ndtype\n" + _emit((code, 0, 1)) + b"R" + _emit((3, order, None, None, None, -1, -1, flags)) + b"b"
    empty = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + _emit((0,)) + _emit(b"b") + b"tR"
    return empty + b"(" + _emit(1) + _emit(shape) + dtype + _emit(False) + data + b"tb"
