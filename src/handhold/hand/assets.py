"""A user's own MANO file, read without chumpy and without trusting the pickle.

`MANO_{RIGHT,LEFT}.pkl` (Romero et al. 2017; https://mano.is.tue.mpg.de, its own licence, never shipped here) is a
Python 2 pickle of numpy arrays, one scipy sparse matrix and chumpy expressions. A pickle can call anything it can
import, so the unpickler here imports nothing: it admits a short list of names and answers each with an inert class or
a checked constructor of ours. Anything else ends in `UnusableInput` before it is called.
"""

from __future__ import annotations

import functools
import os
import pickle
import re
from pathlib import Path

import numpy as np
import scipy.sparse
import torch

from ..errors import UnusableInput
from . import joints as jt
from .model import HandModel

MAX_FILE_BYTES = 64 << 20  # the released files are under 4 MiB
MAX_ARRAY_BYTES = 32 << 20  # hands_coeffs, the largest array of the released files, is 0.6 MiB
N_VERTICES, N_FACES, N_JOINTS = 778, 1538, 16
MANO_TIP_IDS = (
    744,
    320,
    443,
    554,
    671,
)  # thumb, index, middle, ring, pinky as in smplx; other tools name other vertices
_DTYPE = re.compile(r"[<>=|]?(?:[?]|b1|[biuf][1248]|S[0-9]{1,3}|U[0-9]{1,3}|[bBhHiIlLqQfd])\Z")


class _Array:
    """Stands in for ndarray while unpickling; becomes an array when its state has passed the checks."""

    def __init__(self, *args: object) -> None:
        self.value: np.ndarray | None = None

    def __setstate__(self, state: object) -> None:
        if not (isinstance(state, tuple) and len(state) == 5):
            raise UnusableInput("the pickle holds an array whose state is not numpy's.")
        _, shape, dtype, fortran, data = state
        self.value = _array(shape, dtype, data, bool(fortran))


class _Dtype:
    """Stands in for numpy.dtype: plain numbers and short strings only, never objects or records."""

    def __init__(self, code: object = "f8", *_: object) -> None:
        code = code.decode("latin1") if isinstance(code, bytes) else code
        if not isinstance(code, str) or not _DTYPE.match(code):
            raise UnusableInput(f"the pickle asks for an array of {str(code)[:40]!r}; only plain numbers are accepted.")
        self.code, self.order = code, "="

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, tuple) or len(state) < 2 or any(x is not None for x in state[2:5]):
            raise UnusableInput("the pickle holds a record dtype; only plain numbers are accepted.")
        order = state[1].decode("latin1") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "=", "|"):
            raise UnusableInput("the pickle holds a dtype with an unknown byte order.")
        self.order = order

    def numpy(self) -> np.dtype:
        plain = np.dtype(self.code)
        return plain if self.order in "=|" else plain.newbyteorder(self.order)


def _array(shape: object, dtype: object, data: object, fortran: bool) -> np.ndarray:
    if not isinstance(dtype, _Dtype) or not isinstance(shape, tuple) or len(shape) > 4:
        raise UnusableInput("the pickle holds an array without a plain shape and dtype.")
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in shape):
        raise UnusableInput("the pickle holds an array with an impossible shape.")
    data = data.encode("latin1") if isinstance(data, str) else data
    kind, count = dtype.numpy(), 1
    for n in shape:
        count *= n
    if not isinstance(data, bytes) or count * kind.itemsize > MAX_ARRAY_BYTES or len(data) != count * kind.itemsize:
        raise UnusableInput(
            f"the pickle holds an array of shape {shape} whose data is missing, too large or cut short."
        )
    return np.frombuffer(data, kind).reshape(shape, order="F" if fortran else "C").copy()


def _reconstruct(*args: object) -> _Array:
    return _Array()


def _scalar(dtype: object, data: object = b"") -> object:
    return _array((), dtype, data, False)[()]


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """`_codecs.encode`, which Python 3 writes for bytes in old protocols; latin1 text only."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise UnusableInput("the pickle re-encodes something that is not latin1 text.")
    return text.encode("latin1")


class _Inert:
    """An object whose attributes are kept and whose code is never run (chumpy expressions, sparse matrices)."""

    def __init__(self, *args: object) -> None:
        self.state: dict[str, object] = {}

    def __setstate__(self, state: object) -> None:
        if isinstance(state, tuple) and len(state) == 2:  # (dict, slots)
            state = {**(state[0] or {}), **(state[1] or {})}
        if not isinstance(state, dict):
            raise UnusableInput("the pickle holds an object whose state is not a dictionary.")
        self.state = state


class _Chumpy(_Inert):
    pass


class _Select(_Inert):
    pass


class _Csc(_Inert):
    pass


class _Csr(_Inert):
    pass


class _Coo(_Inert):
    pass


def _copyreg(cls: object, base: object, state: object) -> object:
    """`copy_reg._reconstructor`: makes one of our own inert objects, nothing else."""
    if not (isinstance(cls, type) and issubclass(cls, _Inert)):
        raise UnusableInput("the pickle builds an object of a class that no MANO file needs.")
    return cls()


_NAMES: dict[tuple[str, str], object] = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
    ("copy_reg", "_reconstructor"): _copyreg,
    ("copyreg", "_reconstructor"): _copyreg,
    ("__builtin__", "object"): "object",  # only ever the unused base of `_reconstructor`
    ("builtins", "object"): "object",
    ("chumpy.ch", "Ch"): _Chumpy,
    ("chumpy", "Ch"): _Chumpy,
}
_NAMES |= {(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")}
_NAMES |= {(f"numpy.{core}.multiarray", "scalar"): _scalar for core in ("core", "_core")}
_NAMES |= {("chumpy.reordering", name): _Select for name in ("Select", "Reshape", "Ravel", "Concatenate", "Transpose")}
_NAMES |= {
    (f"scipy.sparse.{module}", f"{kind}_matrix"): cls
    for kind, cls in (("csc", _Csc), ("csr", _Csr), ("coo", _Coo))
    for module in (kind, f"_{kind}")
}


class _Unpickler(pickle._Unpickler):
    """Admits the names above and nothing else; `find_class` is the only door of a pickle.

    The Python implementation, because in the C one a few hostile bytes (a huge memo index) allocate gigabytes.
    """

    def find_class(self, module: str, name: str) -> object:
        found = _NAMES.get((module, name))
        if found is None:
            raise UnusableInput(f"it asks for {module}.{name}, which no MANO file needs; it was not run.")
        # functions go out wrapped, so that a BUILD opcode cannot set attributes on ours
        return found if isinstance(found, (type, str)) else functools.partial(found)

    def persistent_load(self, pid: object) -> object:
        raise UnusableInput("it refers to objects outside the file, which no MANO file does.")


def read_mano_pickle(path: str | os.PathLike) -> dict[str, object]:
    """The file's dictionary with every array as a plain ndarray. Runs no code from the file.

    Raises `UnusableInput` when the file is missing, too large, not a pickle, or asks for anything beyond the few numpy,
    scipy.sparse and chumpy names a MANO file needs.
    """
    path = Path(path)
    if not path.is_file():
        raise UnusableInput(f"{path} does not exist; download MANO_RIGHT.pkl or MANO_LEFT.pkl from mano.is.tue.mpg.de.")
    if path.stat().st_size > MAX_FILE_BYTES:
        raise UnusableInput(f"{path} is larger than {MAX_FILE_BYTES >> 20} MiB, which no MANO file is.")
    try:
        with path.open("rb") as f:
            raw = _Unpickler(f, encoding="latin1").load()
        if not isinstance(raw, dict):
            raise UnusableInput("it does not hold a dictionary.")
        return {str(k): _plain(v) for k, v in raw.items()}
    except UnusableInput as e:
        raise UnusableInput(f"{path} is not a MANO file: {e}") from e
    except Exception as e:  # a broken pickle fails in many ways, none of them the user's to understand
        raise UnusableInput(f"{path} is not a readable MANO pickle ({type(e).__name__}); download it again.") from e


def _plain(value: object, depth: int = 0) -> object:
    """Arrays out of the stand-ins: chumpy's base arrays sit in `x`, selections in `a` at `idxs`."""
    if depth > 8:
        raise UnusableInput("its chumpy expressions are nested too deeply.")
    if isinstance(value, _Array):
        if value.value is None:
            raise UnusableInput("it holds an array without data.")
        return value.value
    if isinstance(value, _Chumpy):
        return np.asarray(_plain(value.state.get("x"), depth + 1))
    if isinstance(value, _Select):
        a, idxs = _plain(value.state.get("a"), depth + 1), _plain(value.state.get("idxs"), depth + 1)
        shape = _plain(value.state.get("preferred_shape"), depth + 1)
        a = np.asarray(a) if idxs is None else np.asarray(a).ravel()[np.asarray(idxs).astype(np.int64)]
        return a if shape is None else a.reshape([int(n) for n in np.atleast_1d(shape)])
    if isinstance(value, (_Csc, _Csr, _Coo)):
        return _dense(value, depth)
    if isinstance(value, (_Inert, _Dtype, type)):
        raise UnusableInput("it holds an expression that cannot be turned into an array.")
    return value


def _dense(value: _Inert, depth: int) -> np.ndarray:
    s = {k.lstrip("_"): _plain(v, depth + 1) for k, v in value.state.items()}
    shape = tuple(int(n) for n in np.atleast_1d(np.asarray(s.get("shape"))))
    if len(shape) != 2 or min(shape) < 0 or shape[0] * shape[1] * 8 > MAX_ARRAY_BYTES:
        raise UnusableInput("it holds a sparse matrix of an impossible size.")
    data = np.asarray(s["data"], np.float64)
    if isinstance(value, _Coo):
        m = scipy.sparse.coo_matrix((data, (np.asarray(s["row"]), np.asarray(s["col"]))), shape)
    else:
        cls = scipy.sparse.csc_matrix if isinstance(value, _Csc) else scipy.sparse.csr_matrix
        m = cls((data, np.asarray(s["indices"]), np.asarray(s["indptr"])), shape)
        m.check_format(full_check=True)
    return m.toarray()


def _take(raw: dict[str, object], key: str, shape: tuple[int | None, ...], path: Path) -> np.ndarray:
    value = np.asarray(raw[key]) if key in raw else None
    wanted = "x".join("?" if n is None else str(n) for n in shape)
    if value is None:
        raise UnusableInput(f"{path} has no {key!r} ({wanted}), so it is not a MANO file.")
    fits = value.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, value.shape, strict=True))
    if not fits or value.dtype.kind not in "fiu":
        raise UnusableInput(f"{path}: {key!r} is {value.dtype} {value.shape}, where a MANO file has numbers {wanted}.")
    if not np.isfinite(value.astype(np.float64)).all():
        raise UnusableInput(f"{path}: {key!r} holds values that are not finite.")
    return value


def load_mano(
    path: str | os.PathLike,
    side: str | None = None,
    flat_hand_mean: bool = False,
    fix_left_shapedirs: bool | None = None,
    right: str | os.PathLike | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> HandModel:
    """A user's `MANO_RIGHT.pkl` or `MANO_LEFT.pkl` -> `HandModel`.

    Args:
        path: the file; `side` ("right", "left") is read from the file's name when not given.
        flat_hand_mean: False (the default of smplx, ARCTIC, HO3D): `hands_mean` is added to the fifteen finger
            rotations. True (the default of manopth): zero pose is the flat hand. The model's name says which.
        fix_left_shapedirs: released left files carry the right hand's sign in the x row of `shapedirs`. True flips it,
            False keeps the file as shipped (ARCTIC and DexYCB were annotated with it). None: fixed when comparison with
            `right` shows the defect, else as shipped.
        right: MANO_RIGHT.pkl to compare a left file with.

    Raises `UnusableInput` in one sentence for anything that is not a MANO file; no code from the file is run.
    """
    path = Path(path)
    if side is None:
        hints = [s for s in ("right", "left") if s in path.name.lower()]
        if len(hints) != 1:
            raise UnusableInput(f"{path} does not say which hand it is; pass side='right' or side='left'.")
        side = hints[0]
    if side not in ("right", "left"):
        raise ValueError(f"side is {side!r}; it must be 'right' or 'left'")
    raw = read_mano_pickle(path)
    take = lambda key, *shape: _take(raw, key, shape, path)  # noqa: E731
    template = take("v_template", N_VERTICES, 3)
    shapedirs = np.asarray(take("shapedirs", N_VERTICES, 3, None), np.float64)[..., :10]
    posedirs, weights = take("posedirs", N_VERTICES, 3, 135), take("weights", N_VERTICES, N_JOINTS)
    regressor, faces = take("J_regressor", N_JOINTS, N_VERTICES), take("f", N_FACES, 3)
    tree, mean = take("kintree_table", 2, N_JOINTS), take("hands_mean", 45)
    if faces.min() < 0 or faces.max() >= N_VERTICES:
        raise UnusableInput(f"{path}: faces name vertices that do not exist.")
    for key, rows in (("weights", weights), ("J_regressor", regressor)):
        if np.abs(rows.sum(1) - 1).max() > 1e-3 or (key == "weights" and rows.min() < -1e-6):
            raise UnusableInput(f"{path}: the rows of {key!r} do not sum to one, so the file is damaged.")
    if tuple(int(p) for p in tree[0][1:]) != jt.MANO_PARENTS[1:]:
        raise UnusableInput(f"{path}: its kinematic tree is not MANO's.")
    if np.abs(template).max() > 1:
        raise UnusableInput(f"{path}: its template is more than a metre from the origin; a MANO file is in metres.")
    shape_note = ""
    if side == "left":
        if fix_left_shapedirs is None:
            fix_left_shapedirs = right is not None and left_shapedirs_defect(
                shapedirs, read_mano_pickle(right), Path(right)
            )
        if fix_left_shapedirs:
            shapedirs = shapedirs * np.array([-1.0, 1.0, 1.0])[:, None]
        shape_note = ",shapedirs_fixed" if fix_left_shapedirs else ",shapedirs_as_shipped"

    def real(x: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(np.asarray(x, np.float64)).to(dtype).to(device)

    weights = np.clip(weights.astype(np.float64), 0, None)
    pose_mean = np.zeros((16, 3))
    if not flat_hand_mean:
        pose_mean[1:] = mean.reshape(15, 3)
    return HandModel(
        name=f"mano_{side}(flat_hand_mean={flat_hand_mean}{shape_note})",
        side=side,
        v_template=real(template),
        shapedirs=real(shapedirs),
        posedirs=real(posedirs),
        J_regressor=real(regressor),
        weights=real(weights / weights.sum(1, keepdims=True)),
        faces=torch.as_tensor(faces.astype(np.int64)).to(device),
        tip_ids=torch.tensor(MANO_TIP_IDS, device=device),
        pose_mean=real(pose_mean),
    )


def left_shapedirs_defect(left_shapedirs: np.ndarray, right: dict[str, object], path: Path) -> bool:
    """True when a left file's x row of shapedirs equals the right hand's instead of its mirror (smplx issue 48)."""
    reference = np.asarray(_take(right, "shapedirs", (N_VERTICES, 3, None), path), np.float64)[..., :10]
    same = np.abs(left_shapedirs[:, 0] - reference[:, 0]).sum()
    return bool(same < np.abs(left_shapedirs[:, 0] + reference[:, 0]).sum())


__all__ = ["left_shapedirs_defect", "load_mano", "read_mano_pickle"]
