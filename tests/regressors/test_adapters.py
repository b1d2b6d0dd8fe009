"""Public checkpoints: every published tensor is accounted for, the converted networks compute what the public ones do,
and a hostile file runs nothing."""

from __future__ import annotations

import io
import os
import pickle
import re
import sys
import types
import zipfile
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
import torch

from handhold.errors import UnusableInput
from handhold.hand import HandModel, load_mano
from handhold.pickled import read_object_arrays
from handhold.regressors import _convert, adapters, checkpoints, metro, parametric, wilor

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parents[1] / "hand"))
import public_networks as public  # noqa: E402

from test_assets import mano as random_mano  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")
MEAN, STD = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
FULL = {
    "hamer": public.hamer_layout(),
    "wilor": public.wilor_layout(),
    "metro": public.metro_layout(),
    "graphormer": public.metro_layout(graphormer=True),
}
_METRO = dict(widths=(32, 16, 8), narrow=(24, 12), layers=2, words=40, width=4, blocks=1, modules=(1, 2, 1), stem=8)
_METRO |= dict(head=(2, 4, 6, 8), features=20)
SMALL = {
    "hamer": public.hamer_layout(width=160, depth=2, dim=96, inner=128, layers=2, mlp=64),
    "wilor": public.wilor_layout(width=160, depth=2),
    "metro": public.metro_layout(**_METRO),
    "graphormer": public.metro_layout(graphormer=True, **_METRO),
}
CONFIGS = {"hamer": parametric.HAMER, "wilor": wilor.WILOR, "metro": metro.METRO, "graphormer": metro.GRAPHORMER}


def state(kind: str, seed: int = 0) -> dict[str, torch.Tensor]:
    out = public.random_state(SMALL[kind], seed)
    for k in out:
        if k.endswith("init_cam"):
            out[k] = torch.tensor([[0.9, 0.01, 0.02]])
        elif "deccam" in k or "dec_cam" in k:
            out[k] *= 0.05  # the camera stays in front of the hand
    return out


def template(seed: int = 0) -> adapters.Template:
    g = torch.Generator().manual_seed(seed)
    reference = 0.05 * torch.randn(216, 3, generator=g)
    regressor = torch.rand(21, 778, generator=g)
    links = ((torch.rand(195, 195, generator=g) < 0.03) | torch.eye(195, dtype=torch.bool)).float()
    return adapters.Template(reference - reference[:1], regressor / regressor.sum(1, True), links / links.sum(1, True))


def normalised(image: torch.Tensor) -> torch.Tensor:
    return (image - MEAN) / STD


def built(kind: str, tmp_path: Path, seed: int = 0) -> torch.nn.Module:
    made = adapters.convert_state(state(kind, seed), "auto", template())
    adapters.write_network(tmp_path / "net.safetensors", made)
    return adapters.load_converted(tmp_path / "net.safetensors", HandModel.open("right"))


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max().clamp_min(1))


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_every_tensor_of_the_full_layout_is_taken_or_named_as_unused(kind):
    """At the published sizes, without data."""
    whole = {k: torch.empty(v, device="meta") for k, v in FULL[kind].items()}
    given = adapters.Template(*(torch.empty(s) for s in ((216, 3), (21, 778), (195, 195))))
    made = adapters.convert_state(whole, "auto", given)
    assert made.extra["kind"] == kind and made.config == CONFIGS[kind]
    unused = {
        "hamer": set(public.never_used()),
        "wilor": set(public.never_used()),
        "metro": {k for k in whole if ".bert.embeddings." in k or ".pooler." in k or "classifier" in k},
    }
    unused["graphormer"] = {k for k in whole if ".skip_conv." in k or ".embeddings." in k or ".pooler." in k}
    unused["graphormer"] |= {"backbone.classifier.weight", "backbone.classifier.bias"}
    assert made.extra["ignored"] == len(unused[kind])


@pytest.mark.parametrize("kind", adapters.KINDS)
def test_each_tensor_of_a_small_file_is_indispensable_and_of_one_shape(kind):
    whole, given = {k: v.to("meta") for k, v in state(kind).items()}, template()
    made = adapters.convert_state(whole, kind, given)
    with pytest.raises(UnusableInput, match="does not have, such as 'something.new'"):
        adapters.convert_state(whole | {"something.new": torch.zeros(1)}, kind, given)
    keys = [k for k in whole if not any(re.fullmatch(p, k) for p in adapters.IGNORED[kind])]
    assert made.extra["ignored"] == len(whole) - len(keys)
    for key in keys[3 :: len(keys) // 6]:
        with pytest.raises(UnusableInput):
            adapters.convert_state({k: v for k, v in whole.items() if k != key}, kind, given)
        if whole[key].ndim:
            wrong = torch.empty([n + 1 for n in whole[key].shape], device="meta")
            with pytest.raises(UnusableInput):
                adapters.convert_state(whole | {key: wrong}, kind, given)


def test_hamer_computes_what_the_public_network_does(tmp_path):
    net, image = built("hamer", tmp_path), torch.rand(2, 3, 256, 192)
    K = torch.tensor([[400.0, 0, 96], [0, 400, 128], [0, 0, 1]]).expand(2, 3, 3)
    with torch.no_grad():
        found = net(image, K)
    rotations, betas, camera = public.hamer(state("hamer"), normalised(image), 2, 2)
    assert close(found.rotations, rotations) and close(found.betas, betas) and close(found.camera, camera)
    # the public camera: (x, y, 2 * 5000 / (256 s)), focal length 5000, on a square of 256 of which 192 columns are seen
    s, x, y = camera.unbind(-1)
    posed = HandModel.open("right").with_shape(betas).with_pose(rotations)
    placed = posed.joints + torch.stack([x, y, 2 * 5000 / (256 * s + 1e-9)], -1)[:, None]
    seen = 5000 * placed[..., :2] / placed[..., 2:] + torch.tensor([96.0, 128.0])
    assert close(found.joints, placed, 1e-4) and close(found.projected, seen, 1e-3)


def test_wilor_computes_what_the_public_network_does(tmp_path):
    net, image = built("wilor", tmp_path), torch.rand(2, 3, 256, 192)
    hand = HandModel.open("right")
    with torch.no_grad():
        found = net(image, torch.eye(3).expand(2, 3, 3))
    want = public.wilor(state("wilor"), normalised(image), 2, lambda r, b: hand.with_shape(b).with_pose(r).vertices)
    for a, b in zip((found.rotations, found.betas, found.camera), want, strict=True):
        assert close(a, b, 1e-4)
    assert (found.betas - found.coarse.betas).abs().max() > 1e-3  # the refinement does something


@pytest.mark.parametrize("kind", ["metro", "graphormer"])
def test_metro_computes_what_the_public_network_does(kind, tmp_path):
    side = 64 if kind == "metro" else 224  # 49 grid tokens are those of 224 pixels
    net, image, given = built(kind, tmp_path), torch.rand(2, 3, side, side), template()
    K = torch.tensor([[300.0, 0, side / 2], [0, 300, side / 2], [0, 0, 1]]).expand(2, 3, 3)
    with torch.no_grad():
        found, out = net.network(image), net(image, K)
    adjacency = given.adjacency if kind == "graphormer" else None
    joints, vertices, camera = public.metro(state(kind), normalised(image), given.reference, adjacency)
    assert close(found.joints, joints) and close(found.vertices, vertices) and close(found.camera, camera)
    from_mesh = given.regressor @ vertices
    about_wrist = vertices - from_mesh[:, :1]
    assert close(out.vertices - out.joints[:, :1], about_wrist, 1e-4)
    seen = camera[:, None, :1] * ((from_mesh - from_mesh[:, :1])[..., :2] + camera[:, None, 1:])  # in [-1,1]
    assert close(out.points, (1 + seen) * side / 2, 1e-4)


def test_metro_hides_queries_by_a_constant(tmp_path):
    net, image = built("metro", tmp_path), torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        shown, same = net.network(image), net.network(image, torch.ones(1, 216, 1))
        hidden = net.network(image, torch.zeros(1, 216, 1))
        other = net.network(torch.rand(1, 3, 64, 64), torch.zeros(1, 216, 1))
    assert torch.equal(shown.vertices, same.vertices) and torch.equal(hidden.vertices, other.vertices)
    assert not torch.allclose(shown.vertices, hidden.vertices)


def fake_module(monkeypatch, name: str, **classes: type) -> None:
    module = types.ModuleType(name)
    for key, cls in classes.items():
        cls.__module__, cls.__qualname__ = name, key
        setattr(module, key, cls)
    monkeypatch.setitem(sys.modules, name, module)
    if "." in name:
        monkeypatch.setitem(sys.modules, name.split(".")[0], types.ModuleType(name.split(".")[0]))


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def lightning(values: dict, monkeypatch, tmp_path: Path) -> dict:
    """What Lightning writes around a state dict: settings, optimiser, callbacks, and here something hostile."""
    fake_module(monkeypatch, "yacs.config", CfgNode=type("CfgNode", (dict,), {}))
    node = sys.modules["yacs.config"].CfgNode(MODEL=sys.modules["yacs.config"].CfgNode(SIZE=256))
    node.__dict__["__immutable__"] = True
    return {
        "epoch": 35, "global_step": 1_000_000, "pytorch-lightning_version": "1.8.1",
        "state_dict": OrderedDict(values), "hyper_parameters": {"cfg": node}, "loops": {"fit_loop": {1, 2}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.zeros(3)}}, "param_groups": [{"params": [0]}]}],
        "callbacks": {"ModelCheckpoint": Hostile(tmp_path / "ran")},
    }  # fmt: skip


@pytest.mark.parametrize("new_format", [True, False])
def test_files_of_both_formats_are_read_exactly_and_run_nothing(new_format, monkeypatch, tmp_path):
    values = {"a": torch.randn(3, 5), "b": torch.arange(4), "c": torch.randn(6, 4)[1:, ::2].T, "d": torch.tensor(True)}
    values |= {"h": torch.randn(7).half(), "bf": torch.randn(7).bfloat16(), "p": torch.nn.Parameter(torch.randn(2))}
    values |= {"empty": torch.zeros(0, 3), "wide": torch.ones(1, dtype=torch.float64)}
    path = tmp_path / "x.ckpt"
    torch.save(lightning(values, monkeypatch, tmp_path), path, _use_new_zipfile_serialization=new_format)
    found = _convert.read_state_dict(path)
    assert found.keys() == values.keys() and not (tmp_path / "ran").exists()
    for k, v in values.items():
        assert found[k].dtype == v.dtype and torch.equal(found[k], v.detach())
    root = _convert.TorchFile(path).root
    assert root["epoch"] == 35 and root["callbacks"]["ModelCheckpoint"].name.endswith(".mkdir")


@pytest.mark.slow
def test_conversion_in_its_own_process_gives_a_loadable_file(monkeypatch, tmp_path):
    values = state("hamer", 3)
    torch.save(lightning(values, monkeypatch, tmp_path), tmp_path / "hamer.ckpt")
    done = adapters.convert_checkpoint(tmp_path / "hamer.ckpt", tmp_path / "hamer.safetensors")
    assert done["kind"] == "hamer" and done["bytes"] == (tmp_path / "hamer.safetensors").stat().st_size
    assert not (tmp_path / "ran").exists()
    net = adapters.load_converted(tmp_path / "hamer.safetensors", HandModel.open("right"))
    want = adapters.convert_state(values).state
    assert all(torch.equal(v, want[k]) for k, v in net.state_dict().items())
    with pytest.raises(UnusableInput, match="give MANO_RIGHT.pkl"):
        adapters.load_converted(tmp_path / "hamer.safetensors")


def test_the_process_answers_in_one_sentence(monkeypatch, capsys, tmp_path):
    (tmp_path / "no.ckpt").write_bytes(b"nothing")
    monkeypatch.setattr(_convert, "_limit_memory", lambda n: None)

    def run(command, input, **_):
        monkeypatch.setattr(sys, "stdin", io.StringIO(input))
        assert _convert.main() == 0
        return types.SimpleNamespace(stdout=capsys.readouterr().out)

    monkeypatch.setattr(adapters.subprocess, "run", run)
    with pytest.raises(UnusableInput, match=r"no\.ckpt is not a checkpoint that can be read: it is neither"):
        adapters.convert_checkpoint(tmp_path / "no.ckpt", tmp_path / "no.safetensors")
    assert not (tmp_path / "no.safetensors").exists()
    monkeypatch.setattr(
        adapters.subprocess, "run", lambda *_, **__: types.SimpleNamespace(stdout="", stderr="x\nKilled", returncode=-9)
    )
    with pytest.raises(UnusableInput, match="ended early"):
        adapters.convert_checkpoint(tmp_path / "no.ckpt", tmp_path / "no.safetensors")


def test_float16_halves_the_file(tmp_path):
    torch.save(state("wilor"), tmp_path / "w.ckpt")
    sizes = [
        adapters.convert_here(str(tmp_path / "w.ckpt"), str(tmp_path / f"{d}.safetensors"), dtype=d)["bytes"]
        for d in ("float32", "float16")
    ]
    assert 1.9 < sizes[0] / sizes[1] < 2.0
    a, b = (checkpoints.load_model(tmp_path / f"{d}.safetensors").state_dict() for d in ("float32", "float16"))
    assert all(close(b[k].float(), a[k].float(), 1e-3) for k in a)


def test_template_is_the_mean_hand_with_manopths_tips(tmp_path):
    data = random_mano()
    (tmp_path / "MANO_RIGHT.pkl").write_bytes(pickle.dumps(data, protocol=2))
    kept = np.random.default_rng(0).permutation(778)[:195]
    down = scipy.sparse.csc_matrix((np.ones(195), (np.arange(195), kept)), (195, 778))
    links = scipy.sparse.random(195, 195, 0.03, random_state=1)
    links = scipy.sparse.csc_matrix(links + links.T)
    links.setdiag(0)
    tables = {"A": [scipy.sparse.identity(778, format="csr"), links], "D": [down], "F": [np.eye(3)]}
    held = {k: np.empty(len(v), dtype=object) for k, v in tables.items()}
    for k, v in tables.items():
        held[k][:] = v
    np.savez(tmp_path / "mano_downsampling.npz", **held)
    assert np.array_equal(read_object_arrays(tmp_path / "mano_downsampling.npz", ("F",))["F"][0], np.eye(3))
    made = adapters.mesh_template(tmp_path / "MANO_RIGHT.pkl", tmp_path / "mano_downsampling.npz")
    hand = load_mano(tmp_path / "MANO_RIGHT.pkl", flat_hand_mean=True)
    theta = torch.zeros(16, 3)
    theta[1:] = torch.as_tensor(data["hands_mean"].reshape(15, 3)).float()
    posed = hand.with_shape().with_pose(theta)
    tips = posed.vertices[[745, 317, 444, 556, 673]]
    joints = torch.cat([posed.mano_joints, tips])[
        [0, 13, 14, 15, 16, 1, 2, 3, 17, 4, 5, 6, 18, 10, 11, 12, 19, 7, 8, 9, 20]
    ]
    want = torch.cat([joints, posed.vertices[kept.copy()]]) - joints[0]
    assert close(made.reference, want, 1e-6)
    dense = (links.toarray() != 0) | np.eye(195, dtype=bool)
    assert np.allclose(made.adjacency, dense / dense.sum(1, keepdims=True), atol=1e-6)
    assert torch.allclose((made.regressor @ posed.vertices)[[4, 8]], tips[:2], atol=1e-6)
    torch.save(OrderedDict(state("graphormer")), tmp_path / "g.bin", _use_new_zipfile_serialization=False)
    job = dict(source=str(tmp_path / "g.bin"), target=str(tmp_path / "g.safetensors"))
    with pytest.raises(UnusableInput, match="--sampling"):
        adapters.convert_here(**job)
    files = {"mano": str(tmp_path / "MANO_RIGHT.pkl"), "sampling": str(tmp_path / "mano_downsampling.npz")}
    assert adapters.convert_here(**job, **files)["kind"] == "graphormer"
    assert torch.equal(checkpoints.load_model(tmp_path / "g.safetensors").adjacency, made.adjacency)


def test_bad_files_are_refused_in_one_sentence(monkeypatch, tmp_path):
    def refused(path: Path, match: str) -> None:
        with pytest.raises(UnusableInput, match=match) as e:
            _convert.read_state_dict(path)
        assert "\n" not in str(e.value)

    good = tmp_path / "good.ckpt"
    torch.save({"a": torch.randn(100)}, good)
    data = good.read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(data[: len(data) // 2])
    refused(tmp_path / "cut.ckpt", "not a readable")
    with zipfile.ZipFile(good) as z, zipfile.ZipFile(tmp_path / "zip.ckpt", "w", zipfile.ZIP_DEFLATED) as out:
        for name in z.namelist():
            out.writestr(name, z.read(name))
    refused(tmp_path / "zip.ckpt", "compressed")
    torch.save({"a": torch.randn(100)}, tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    old = (tmp_path / "old.bin").read_bytes()
    (tmp_path / "old.bin").write_bytes(old[:-40])
    refused(tmp_path / "old.bin", "cut short")
    big = data.replace(b"K\x64\x85", b"K\xc8\x85")  # claims 200 numbers of 100
    assert big != data
    (tmp_path / "big.ckpt").write_bytes(big)
    refused(tmp_path / "big.ckpt", "beyond its data")
    fake_module(monkeypatch, "metro.modeling", METRO_Hand_Network=type("METRO_Hand_Network", (), {}))
    torch.save(sys.modules["metro.modeling"].METRO_Hand_Network(), tmp_path / "model.bin")
    refused(tmp_path / "model.bin", "whole pickled metro.modeling.METRO_Hand_Network")
    torch.save([1, 2], tmp_path / "list.bin")
    refused(tmp_path / "list.bin", "no state dict")
    torch.save({"lr": 0.1}, tmp_path / "none.bin")
    refused(tmp_path / "none.bin", "no tensors")
    (tmp_path / "plain.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "ran")))
    refused(tmp_path / "plain.bin", "neither of the two formats")
    refused(tmp_path / "missing.ckpt", "does not exist")
    assert not (tmp_path / "ran").exists()


def test_networks_that_are_not_hands_are_refused(tmp_path):
    body = state("metro") | {"conv_learn_tokens.weight": torch.zeros(1)}
    with pytest.raises(UnusableInput, match="whole body"):
        adapters.convert_state(body)
    with pytest.raises(UnusableInput, match="no known network"):
        adapters.convert_state({"fc.weight": torch.zeros(2, 2)})
    with pytest.raises(UnusableInput, match="kind is"):
        adapters.convert_state(state("hamer"), "other")
    bad = state("hamer")
    bad["mano_head.deccam.bias"][0] = float("nan")
    made = adapters.convert_state(bad)
    with pytest.raises(UnusableInput, match="not finite"):
        adapters.write_network(tmp_path / "x.safetensors", made)
    assert not list(tmp_path.iterdir())


def test_mean_shape_input_of_the_public_code_is_a_constant_too():
    """HaMeR's option TRANSFORMER_INPUT=mean_shape embeds the mean parameters instead of a zero."""
    values = state("hamer")
    head = "mano_head.transformer.to_token_embedding"
    values[f"{head}.weight"] = torch.randn(96, 109)
    mean = torch.cat([values[f"mano_head.init_{k}"] for k in ("hand_pose", "betas", "cam")], 1)
    want = mean @ values[f"{head}.weight"].T + values[f"{head}.bias"] + values["mano_head.transformer.pos_embedding"]
    made = adapters.convert_state(values)
    assert close(made.state["query"], want) and made.config == replace(made.config, dim=96)
