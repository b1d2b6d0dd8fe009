"""Checkpoints: exact reload, settings, caps, and what is said of files that are not ours."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from handhold.errors import MissingAsset, UnusableInput
from handhold.regressors import direct, parametric
from handhold.regressors.checkpoints import FORMAT, from_dict, load_model, read_header, save_checkpoint
from handhold.regressors.vit import ViTConfig

pytestmark = pytest.mark.usefixtures("one_thread")
VIT = ViTConfig(32, 1, 2, image=(64, 48), stem="conv")
SMALL = parametric.ParametricConfig(VIT, dim=32, depth=1, heads=2, dim_head=16, mlp=32)
NETS = {
    "parametric": lambda: parametric.ParametricHand(SMALL),
    "direct": lambda: direct.DirectHand(
        direct.DirectConfig(VIT, dim=32, depth=1, heads=2, dim_head=16, mlp=32, n_coarse=40)
    ),
}


@pytest.mark.parametrize("name", NETS)
def test_exact_reload(tmp_path, name):
    torch.manual_seed(0)
    net = NETS[name]().eval()
    file = tmp_path / "net.safetensors"
    save_checkpoint(file, net, {"steps": 7}, dtype=torch.float32)
    again = load_model(file)
    assert type(again) is type(net) and again.config == net.config and not again.training
    assert again.extra == {"steps": 7} and read_header(file)["network"] == name
    for k, v in net.state_dict().items():
        assert torch.equal(v, again.state_dict()[k]), k
    image, K = torch.rand(2, 3, 64, 48), torch.tensor([[[90.0, 0, 24], [0, 90, 32], [0, 0, 1]]]).expand(2, 3, 3)
    assert torch.equal(net(image, K).vertices, again(image, K).vertices)


def test_half_the_size_in_half_precision(tmp_path):
    net = NETS["parametric"]().eval()
    full = save_checkpoint(tmp_path / "a", net, dtype=torch.float32)
    half = save_checkpoint(tmp_path / "b", net)
    assert half == (tmp_path / "b").stat().st_size < 0.6 * full
    once = load_model(tmp_path / "b")
    assert all(v.dtype != torch.float16 for v in once.state_dict().values())
    save_checkpoint(tmp_path / "c", once)
    twice = load_model(tmp_path / "c")
    assert all(torch.equal(v, twice.state_dict()[k]) for k, v in once.state_dict().items())


def test_what_cannot_be_saved(tmp_path):
    net = NETS["parametric"]()
    with pytest.raises(ValueError, match="bytes"):
        save_checkpoint(tmp_path / "a", net, max_bytes=1000)
    net.query.data[0, 0, 0] = 1e6
    with pytest.raises(ValueError, match="query"):
        save_checkpoint(tmp_path / "a", net)
    with pytest.raises(ValueError, match="Linear"):
        save_checkpoint(tmp_path / "a", torch.nn.Linear(1, 1))
    assert not (tmp_path / "a").exists()


def test_files_that_are_not_ours(tmp_path):
    with pytest.raises(MissingAsset):
        load_model(tmp_path / "none")
    (tmp_path / "noise").write_bytes(b"\x00" * 300)
    save_file({"x": torch.zeros(1)}, tmp_path / "other")
    config = json.dumps({"unknown": 1})
    header = {"format": FORMAT, "network": "parametric", "config": config}
    save_file({"x": torch.zeros(1)}, tmp_path / "newer", metadata=header)
    save_file({"x": torch.zeros(1)}, tmp_path / "empty", metadata=header | {"config": "{}"})
    good = tmp_path / "good"
    save_checkpoint(good, NETS["parametric"]())
    (tmp_path / "cut").write_bytes(good.read_bytes()[:-1000])
    for name in ("noise", "other", "newer", "empty", "cut"):
        with pytest.raises(UnusableInput):
            load_model(tmp_path / name)


def test_settings_round_trip():
    from dataclasses import asdict

    for config in (parametric.TINY, parametric.HAMER, direct.TINY, replace(SMALL, refine=0)):
        assert from_dict(type(config), json.loads(json.dumps(asdict(config)))) == config
    with pytest.raises(ValueError, match="nothing"):
        from_dict(ViTConfig, {"nothing": 1})
