"""The restricted MANO loader: a file in the released form loads; a hostile one is refused and runs nothing."""

import io
import os
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import scipy.sparse
import torch

from handhold.errors import UnusableInput
from handhold.hand import joints as jt
from handhold.hand import load_mano
from handhold.hand.assets import read_mano_pickle


@pytest.fixture
def chumpy(monkeypatch):
    """A stand-in for chumpy that pickles the way chumpy does: class by name, arrays in `x`."""
    ch, package = types.ModuleType("chumpy.ch"), types.ModuleType("chumpy")
    Ch = type("Ch", (), {"__module__": "chumpy.ch"})
    ch.Ch, package.ch = Ch, ch
    reordering = types.ModuleType("chumpy.reordering")
    reordering.Select = type("Select", (), {"__module__": "chumpy.reordering"})
    for name, module in (("chumpy", package), ("chumpy.ch", ch), ("chumpy.reordering", reordering)):
        monkeypatch.setitem(sys.modules, name, module)

    def wrap(x):
        out = Ch()
        out.x = x
        return out

    wrap.select = reordering.Select
    return wrap


def mano(rng_seed: int = 0) -> dict:
    """Arrays of MANO's shapes with MANO's tree; the geometry is noise."""
    rng = np.random.default_rng(rng_seed)
    weights = rng.random((778, 16))
    regressor = scipy.sparse.random(16, 778, 0.05, format="csc", random_state=0) + scipy.sparse.csc_matrix(
        np.eye(16, 778)
    )
    regressor = scipy.sparse.csc_matrix(regressor / regressor.sum(1))
    tree = np.array([[2**32 - 1, *jt.MANO_PARENTS[1:]], range(16)], np.int64)
    return {
        "v_template": 0.05 * rng.standard_normal((778, 3)),
        "shapedirs": 0.003 * rng.standard_normal((778, 3, 10)),
        "posedirs": 0.001 * rng.standard_normal((778, 3, 135)),
        "weights": weights / weights.sum(1, keepdims=True),
        "J_regressor": regressor,
        "f": rng.integers(0, 778, (1538, 3)).astype(np.uint32),
        "kintree_table": tree,
        "hands_mean": 0.3 * rng.standard_normal(45),
        "hands_components": np.eye(45),
        "bs_style": "lbs",
        "J": rng.standard_normal((16, 3)),
    }


def write(path, data, protocol=2):
    path.write_bytes(pickle.dumps(data, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_loads_with_chumpy_arrays_and_sparse_matrix(tmp_path, chumpy, protocol):
    data = mano()
    chosen = chumpy.select()
    chosen.a, chosen.idxs, chosen.preferred_shape = chumpy(data["v_template"]), np.arange(778 * 3), (778, 3)
    stored = dict(data, shapedirs=chumpy(data["shapedirs"]), v_template=chosen)
    path = write(tmp_path / "MANO_RIGHT.pkl", stored, protocol)
    for name in ("chumpy", "chumpy.ch", "chumpy.reordering"):
        sys.modules.pop(name, None)
    model = load_mano(path, flat_hand_mean=True, dtype=torch.float64)
    assert model.side == "right" and "flat_hand_mean=True" in model.name
    assert np.allclose(model.v_template, data["v_template"]) and np.allclose(model.shapedirs, data["shapedirs"])
    assert np.allclose(model.J_regressor, data["J_regressor"].toarray())
    posed = model.with_shape().with_pose(torch.zeros(16, 3, dtype=torch.float64))
    assert (posed.vertices - model.v_template).abs().max() < 1e-12


def test_hand_mean_conventions_differ_by_the_mean(tmp_path):
    path = write(tmp_path / "MANO_RIGHT.pkl", mano())
    flat, mean = (load_mano(path, flat_hand_mean=k, dtype=torch.float64) for k in (True, False))
    theta = torch.zeros(16, 3, dtype=torch.float64)
    theta[1:] = torch.as_tensor(mano()["hands_mean"].reshape(15, 3))
    a, b = flat.with_shape().with_pose(theta), mean.with_shape().with_pose(torch.zeros_like(theta))
    assert (a.vertices - b.vertices).abs().max() < 1e-12
    assert (mean.with_shape().with_pose(-mean.pose_mean).vertices - mean.v_template).abs().max() < 1e-12


def test_left_shapedirs_defect_is_found_and_mended(tmp_path):
    right = mano()
    mirror = np.array([-1.0, 1, 1])
    good = dict(right, v_template=right["v_template"] * mirror, shapedirs=right["shapedirs"] * mirror[:, None])
    bad = dict(good, shapedirs=right["shapedirs"])
    r = write(tmp_path / "MANO_RIGHT.pkl", right)
    a = load_mano(write(tmp_path / "good_LEFT.pkl", good), right=r)
    b = load_mano(write(tmp_path / "bad_LEFT.pkl", bad), right=r)
    shipped = load_mano(tmp_path / "bad_LEFT.pkl", fix_left_shapedirs=False)
    assert (
        torch.equal(a.shapedirs, b.shapedirs)
        and "fixed" in b.name
        and "as_shipped" in a.name
        and "as_shipped" in shipped.name
    )
    betas = torch.full((10,), 2.0)
    apart = (b.with_shape(betas).vertices - shipped.with_shape(betas).vertices).norm(dim=-1).max()
    assert apart > 1e-3 and torch.equal(b.with_shape().vertices, shipped.with_shape().vertices)


class Runs:
    def __init__(self, call, *args):
        self.call = (call, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_hostile_pickles_run_nothing(tmp_path, protocol):
    mark = tmp_path / "pwned"
    attacks = [
        Runs(os.system, f"touch {mark}"),
        Runs(eval, f"open({str(mark)!r}, 'w')"),
        Runs(np.load, str(mark)),
        Runs(getattr, "a", "upper"),
        dict(mano(), extra=Runs(os.mkdir, str(mark))),
    ]
    for i, attack in enumerate(attacks):
        path = write(tmp_path / f"{i}_RIGHT.pkl", attack, protocol)
        with pytest.raises(UnusableInput, match="was not run"):
            load_mano(path)
        assert not mark.exists()


@pytest.mark.parametrize(
    "payload",
    [
        b"cos\nsystem\n(S'true'\ntR.",
        b"\x80\x02cnumpy.core.multiarray\n_reconstruct\ncbuiltins\neval\n.",
        b"\x80\x02" + b"r" + struct.pack("<I", 2**32 - 1),  # a huge memo index: gigabytes in the C unpickler
        b"\x80\x04\x8d" + struct.pack("<Q", 2**40) + b"x",
        b"",
        b"not a pickle at all",
        b"(" * 1000,
        b"Pid\n.",
        b"\x80\x02c_codecs\nencode\n}X\x0b\x00\x00\x00__defaults__K\x01sb.",  # tries to write on one of our functions
    ],
)
def test_broken_and_hostile_bytes_are_one_sentence(tmp_path, payload):
    path = tmp_path / "MANO_RIGHT.pkl"
    path.write_bytes(payload)
    with pytest.raises(UnusableInput) as e:
        load_mano(path)
    assert "\n" not in str(e.value) and str(path) in str(e.value)


def test_object_arrays_and_giant_arrays_are_refused(tmp_path):
    path = write(tmp_path / "MANO_RIGHT.pkl", {"v_template": np.array([1, "x", None], object)})
    with pytest.raises(UnusableInput, match="plain numbers"):
        read_mano_pickle(path)

    class Giant(pickle.Pickler):
        pass

    buffer = io.BytesIO()
    Giant(buffer, 2).dump({"v": np.zeros(4)})
    grown = buffer.getvalue().replace(b"K\x04\x85", b"J\xff\xff\xff\x7f\x85")
    assert grown != buffer.getvalue()
    path.write_bytes(grown)
    with pytest.raises(UnusableInput, match="too large or cut short"):
        read_mano_pickle(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": np.ones((778, 16))}, "sum to one"),
        ({"v_template": np.zeros((777, 3))}, "v_template"),
        ({"f": np.full((1538, 3), 778, np.uint32)}, "do not exist"),
        ({"kintree_table": np.zeros((2, 16), np.int64)}, "tree"),
        ({"hands_mean": np.full(45, np.nan)}, "not finite"),
        ({"posedirs": "text"}, "posedirs"),
    ],
)
def test_a_file_that_is_not_mano_says_why(tmp_path, change, message):
    with pytest.raises(UnusableInput, match=message):
        load_mano(write(tmp_path / "MANO_RIGHT.pkl", dict(mano(), **change)))


def test_missing_keys_files_and_sides(tmp_path):
    data = mano()
    del data["posedirs"]
    with pytest.raises(UnusableInput, match="no 'posedirs'"):
        load_mano(write(tmp_path / "MANO_RIGHT.pkl", data))
    with pytest.raises(UnusableInput, match="does not exist"):
        load_mano(tmp_path / "none_RIGHT.pkl")
    with pytest.raises(UnusableInput, match="which hand"):
        load_mano(write(tmp_path / "hand.pkl", mano()))
