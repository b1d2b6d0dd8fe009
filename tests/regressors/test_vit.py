"""The backbone: sizes, public layouts, positions of other grids, conv stem."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from handhold.errors import UnusableInput
from handhold.regressors import vit
from handhold.regressors.vit import SIZES, ViT, ViTConfig, from_hamer, from_mae, resize_positions

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = ViTConfig(32, 2, 2, image=(64, 48))


def count(m: torch.nn.Module) -> int:
    return sum(p.numel() for p in m.parameters())


# DeiT (Touvron et al. 2021, table 1) and ViT/MAE: millions of parameters with a class token and a 1000-way classifier
@pytest.mark.parametrize(
    ("name", "published"), [("tiny", 5.7), ("small", 22.1), ("base", 86.6), ("large", 304.3), ("huge", 632.4)]
)
def test_published_sizes(name, published):
    with torch.device("meta"):
        m = ViT(replace(SIZES[name], class_token=True))
    classifier = 1000 * (m.config.width + 1)
    position_of_class = m.config.width
    assert (count(m) + classifier + position_of_class) / 1e6 == pytest.approx(published, rel=5e-3)


def public_state(config: ViTConfig, positions: int, norm: str, g: torch.Generator) -> dict[str, torch.Tensor]:
    """Random weights in the layout that MAE, ViTPose and HaMeR share."""
    w, hidden = config.width, int(config.width * config.mlp_ratio)
    shapes = {"patch_embed.proj.weight": (w, 3, 16, 16), "patch_embed.proj.bias": (w,), "pos_embed": (1, positions, w)}
    for i in range(config.depth):
        shapes |= {
            f"blocks.{i}.norm1.weight": (w,), f"blocks.{i}.norm1.bias": (w,),
            f"blocks.{i}.attn.qkv.weight": (3 * w, w), f"blocks.{i}.attn.qkv.bias": (3 * w,),
            f"blocks.{i}.attn.proj.weight": (w, w), f"blocks.{i}.attn.proj.bias": (w,),
            f"blocks.{i}.norm2.weight": (w,), f"blocks.{i}.norm2.bias": (w,),
            f"blocks.{i}.mlp.fc1.weight": (hidden, w), f"blocks.{i}.mlp.fc1.bias": (hidden,),
            f"blocks.{i}.mlp.fc2.weight": (w, hidden), f"blocks.{i}.mlp.fc2.bias": (w,),
        }  # fmt: skip
    shapes |= {f"{norm}.weight": (w,), f"{norm}.bias": (w,)}
    return {k: torch.randn(*s, generator=g) * 0.1 for k, s in shapes.items()}


def reference(state, image, heads, padding, norm, class_token):
    """The published computation, written out from the papers in the plainest way."""
    x = F.conv2d(image, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16, padding=padding)
    h, w = x.shape[-2:]
    x = x.flatten(2).mT
    pos = state["pos_embed"]
    if class_token:
        x = torch.cat([(state["cls_token"] + pos[:, :1]).expand(len(x), -1, -1), x + pos[:, 1:]], 1)
    else:
        x = x + pos[:, 1:] + pos[:, :1]
    depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
    for i in range(depth):
        p = {k.removeprefix(f"blocks.{i}."): v for k, v in state.items() if k.startswith(f"blocks.{i}.")}
        y = F.layer_norm(x, x.shape[-1:], p["norm1.weight"], p["norm1.bias"], 1e-6)
        q, k, v = (y @ p["attn.qkv.weight"].T + p["attn.qkv.bias"]).chunk(3, -1)
        q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
        a = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1) @ v
        x = x + a.transpose(1, 2).flatten(2) @ p["attn.proj.weight"].T + p["attn.proj.bias"]
        y = F.layer_norm(x, x.shape[-1:], p["norm2.weight"], p["norm2.bias"], 1e-6)
        y = F.gelu(y @ p["mlp.fc1.weight"].T + p["mlp.fc1.bias"])
        x = x + y @ p["mlp.fc2.weight"].T + p["mlp.fc2.bias"]
    x = F.layer_norm(x, x.shape[-1:], state[f"{norm}.weight"], state[f"{norm}.bias"], 1e-6)
    return x[:, -h * w :].mT.unflatten(2, (h, w))


@pytest.mark.parametrize("prefix", ["", "backbone."])
def test_hamer_layout(prefix):
    g = torch.Generator().manual_seed(0)
    config = replace(SMALL, padding=2)
    state = public_state(config, 1 + 12, "last_norm", g)
    m = ViT(config).eval()
    m.load_state_dict(
        from_hamer({prefix + k: v for k, v in state.items()} | {"keypoint_head.x": g.get_state()}, config)
    )
    image = torch.randn(2, 3, 64, 48, generator=g)
    torch.testing.assert_close(m(image)[0], reference(state, image, 2, 2, "last_norm", False), atol=1e-4, rtol=1e-4)


def test_mae_layout():
    g = torch.Generator().manual_seed(1)
    config = ViTConfig(32, 2, 2, image=(64, 64), class_token=True)
    state = public_state(config, 1 + 16, "norm", g) | {"cls_token": torch.randn(1, 1, 32, generator=g)}
    m = ViT(config).eval()
    m.load_state_dict(from_mae(state | {"decoder_pred.weight": torch.zeros(3), "mask_token": torch.zeros(1)}, config))
    image = torch.randn(2, 3, 64, 64, generator=g)
    torch.testing.assert_close(m(image)[0], reference(state, image, 2, 0, "norm", True), atol=1e-4, rtol=1e-4)
    portrait = ViT(replace(config, image=(256, 192), class_token=False))
    portrait.load_state_dict(from_mae(state, portrait.config))
    assert portrait.pos_embed.shape == (1, 16 * 12, 32)


def test_full_size_hamer_shapes():
    """256x192 with padding 2 still gives the grid 16x12."""
    with torch.device("meta"):
        features, fine = ViT(vit.HAMER_VIT)(torch.zeros(1, 3, 256, 192))
    assert features.shape == (1, 1280, 16, 12) and fine == ()


def test_wrong_layouts_say_so():
    g = torch.Generator().manual_seed(2)
    state = public_state(SMALL, 1 + 12, "last_norm", g)
    for bad in ({}, {k: v for k, v in state.items() if "fc2" not in k}, state | {"pos_embed": torch.zeros(1, 8, 32)}):
        with pytest.raises(UnusableInput):
            from_hamer(bad, SMALL)


def test_positions_resize():
    pos = vit.sincos_positions(4, 3, 32)
    assert resize_positions(pos, (4, 3), (4, 3)) is pos
    assert len(torch.unique(pos[0], dim=0)) == 12
    ramp = torch.linspace(0, 1, 8).repeat(8, 1).reshape(1, 64, 1)  # grows along the row
    wide = resize_positions(ramp, (8, 8), (8, 16)).reshape(8, 16)
    assert (wide.diff(dim=1) > 0).all() and torch.allclose(wide[0], wide[5], atol=1e-6)


@pytest.mark.parametrize("stem", ["patch", "conv"])
def test_any_picture_size_and_bf16(stem):
    m = ViT(replace(SMALL, stem=stem)).eval()
    with torch.no_grad():
        features, fine = m(torch.randn(1, 3, 96, 64))
        assert features.shape == (1, 32, 6, 4)
        assert [f.shape[-2:] for f in fine] == ([(24, 16), (12, 8)] if stem == "conv" else [])
        assert m.bfloat16()(torch.randn(1, 3, 64, 48).bfloat16())[0].dtype == torch.bfloat16


def test_evaluation_is_deterministic_and_training_drops():
    torch.manual_seed(0)
    m = ViT(replace(SMALL, drop_path=0.5)).eval()
    x = torch.randn(4, 3, 64, 48)
    assert torch.equal(m(x)[0], m(x)[0])
    m.train()
    assert not torch.equal(m(x)[0], m(x)[0])
