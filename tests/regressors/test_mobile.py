"""The converted network says what MediaPipe's does; the backbone is one of ours."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from handhold import assets
from handhold.errors import MissingAsset, UnusableInput
from handhold.regressors import mobile
from handhold.regressors.mobile import MobileBackbone, MobileLandmarks, MobileTrunk, load_trunk, mobile_from_tflite
from synth_hands import hand_batch

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def asset():
    try:
        return assets.path("hand_landmark")
    except MissingAsset:
        pytest.skip("the hand landmark network is not on this machine; `handhold assets` fetches it")


def test_the_converted_network_is_mediapipes(asset):
    from ai_edge_litert.interpreter import Interpreter

    net = MobileLandmarks().eval()
    net.load_state_dict(mobile_from_tflite(asset))
    theirs = Interpreter(model_path=str(asset), num_threads=1)
    theirs.allocate_tensors()
    rng = np.random.default_rng(0)
    smooth = np.kron(rng.random((7, 7, 3)), np.ones((32, 32, 1)))
    spots = hand_batch(1, width=224, height=224).image[0].permute(1, 2, 0).numpy()
    for image in (rng.random((224, 224, 3)), smooth, spots):
        image = image.astype(np.float32)
        theirs.set_tensor(theirs.get_input_details()[0]["index"], image[None])
        theirs.invoke()
        points, presence, left, world = (theirs.get_tensor(o["index"]) for o in theirs.get_output_details())
        with torch.no_grad():
            ours = net(torch.from_numpy(image).permute(2, 0, 1)[None])
        assert np.abs(ours[0].numpy() - points.reshape(1, 21, 3)).max() < 1e-2  # pixels
        assert np.abs(ours[1].numpy() - presence[0]).max() < 1e-4
        assert np.abs(ours[2].numpy() - left[0]).max() < 1e-4
        assert np.abs(ours[3].numpy() - world.reshape(1, 21, 3)).max() < 1e-5  # metres


def test_the_trunk_survives_safetensors(asset, tmp_path):
    from safetensors.torch import save_file

    trunk = load_trunk(asset)
    save_file(
        {f"backbone.trunk.{k}": v for k, v in trunk.items()} | {"query": torch.zeros(1)}, tmp_path / "a.safetensors"
    )
    again = load_trunk(tmp_path / "a.safetensors")
    assert trunk.keys() == again.keys() and all(torch.equal(v, again[k]) for k, v in trunk.items())


@pytest.mark.parametrize("size", [(64, 64), (96, 160)])
def test_maps_of_four_strides_at_any_size(size):
    h, w = size
    *maps, landmarks = MobileTrunk()(torch.rand(2, 3, h, w))
    assert landmarks.shape == (2, 2, 21, 3)
    assert [tuple(m.shape) for m in maps] == [
        (2, c, h // s, w // s) for c, s in zip((*mobile.FINE, *mobile.COARSE), (4, 8, 16, 32), strict=True)
    ]
    grid, fine, hints = MobileBackbone(48)(torch.rand(2, 3, h, w))
    assert hints.shape == (2, 126)
    assert grid.shape == (2, 48, h // 16, w // 16) and [m.shape[1] for m in fine] == list(mobile.FINE)


def test_other_sizes_and_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match="multiples of 32"):
        MobileTrunk()(torch.rand(1, 3, 48, 64))
    with pytest.raises(MissingAsset):
        load_trunk(tmp_path / "none.tflite")
    with pytest.raises(MissingAsset):
        load_trunk(tmp_path / "none.safetensors")
    for name in ("bad.tflite", "bad.safetensors"):
        (tmp_path / name).write_bytes(b"no network" * 100)
        with pytest.raises(UnusableInput):
            load_trunk(tmp_path / name)
