"""Plain data out of pickles and into them, and damaged ones refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold.errors import UnusableInput
from handhold.pickled import as_array, as_mapping, read_npy_object, write_npy_object


def read(path) -> dict:
    return as_mapping(read_npy_object(path, 1 << 20, 10_000))


def test_numbers_of_numpy_and_torch_come_out_as_they_went_in(tmp_path):
    rng = np.random.default_rng(0)
    numbers = {
        "float": 2.5, "int": 7, "scalar": np.float32(1.5), "array": rng.normal(size=(3, 4)), "empty": np.zeros((0, 3)),
        "fortran": np.asfortranarray(rng.normal(size=(3, 2))), "ints": np.arange(5), "tensor": torch.randn(4, 4),
        "transposed": torch.randn(3, 5, dtype=torch.float64).T[1:, ::2], "one": torch.tensor(3.0),
    }  # fmt: skip
    np.save(tmp_path / "a.npy", numbers)
    found = read(tmp_path / "a.npy")
    assert all(np.array_equal(as_array(found[k]), np.asarray(v)) for k, v in numbers.items())
    with pytest.raises(UnusableInput, match="something else"):
        as_array("text")


def test_what_is_written_is_what_numpy_reads(tmp_path):
    value = {
        "text": "größe", "float": 0.1, "int": -3, "yes": True, "nothing": None, "list": [1, "a"], "tuple": (1, 2.0),
        "inner": {"f4": np.eye(3, dtype=np.float32), "f8": np.arange(6.0).reshape(2, 3).T, "i8": np.arange(3)},
    }  # fmt: skip
    write_npy_object(tmp_path / "a.npy", value)
    back = np.load(tmp_path / "a.npy", allow_pickle=True).item()
    inner, want = back.pop("inner"), value.pop("inner")
    assert back == value
    assert all(np.array_equal(inner[k], v) and inner[k].dtype == v.dtype for k, v in want.items())
    assert np.array_equal(as_array(read(tmp_path / "a.npy")["inner"]["f8"]), want["f8"])
    assert b"numpy._core" not in (tmp_path / "a.npy").read_bytes()  # a name that numpy 1 does not know
    with pytest.raises(TypeError, match="refusing"):
        write_npy_object(tmp_path / "b.npy", {"a": object()})
    assert not (tmp_path / "b.npy").exists()


def test_damaged_files_never_end_in_anything_but_a_sentence(tmp_path):
    path = tmp_path / "a.npy"
    np.save(path, {"array": np.arange(20.0), "tensor": torch.randn(4, 4), "number": np.float64(1)})
    data, rng, refused = path.read_bytes(), np.random.default_rng(0), 0
    for n in range(300):
        bad = bytearray(data[: rng.integers(1, len(data))] if n % 3 == 0 else data)
        for at in rng.integers(0, len(bad), 3):
            bad[at] = rng.integers(256)
        path.write_bytes(bad)
        try:
            found = read(path) or {}
            for value in found.values():
                as_array(value)
        except UnusableInput as e:
            refused += 1
            assert "\n" not in str(e)
    assert refused > 100
    path.write_bytes(data)
    for limits in ((100, 10_000), (1 << 20, 10)):
        with pytest.raises(UnusableInput):
            read_npy_object(path, *limits)
