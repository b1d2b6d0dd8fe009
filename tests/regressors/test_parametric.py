"""The parametric family: published size and layout, overfitting, losses, bf16, determinism."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from handhold.errors import UnusableInput
from handhold.geometry import rigid
from handhold.regressors import crops as C
from handhold.regressors.hand_losses import HamerWeights, exact_loss, hamer_loss, hand_errors
from handhold.regressors.parametric import HAMER, TINY, HandOutput, ParametricConfig, ParametricHand, from_hamer, place
from handhold.regressors.vit import ViTConfig
from synth_hands import hand_batch

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (64, 64)
SMALL = ParametricConfig(
    ViTConfig(48, 2, 2, image=SIZE, stem="conv"), dim=48, depth=1, heads=2, dim_head=24, mlp=96
)  # fmt: skip
SMALL_HAMER = replace(
    HAMER, vit=ViTConfig(64, 2, 2, image=(64, 48), padding=2), dim=64, depth=2, heads=2, dim_head=16, mlp=48
)


def count(m: torch.nn.Module) -> int:
    return sum(p.numel() for p in m.parameters())


def test_published_size():
    """HaMeR: ViT-H, and a decoder of six layers of 1024 with eight heads of 64, context 1280, mlp 1024."""
    with torch.device("meta"):
        m = ParametricHand(HAMER)
    layer = 3 * 2 * 1024 + 1024 * 1536 + (512 + 1) * 1024 + 1024 * 512 + 1280 * 1024 + (512 + 1) * 1024
    layer += 2 * (1024 * 1024 + 1024)
    head = 6 * layer + 1024 + (96 + 10 + 3) * 1025
    assert count(m) - count(m.backbone) == head
    assert 669e6 < count(m) < 672e6


def test_shipped_size():
    with torch.device("meta"):
        assert count(ParametricHand(TINY)) <= 7.8e6


def overfit(net, crops, loss, steps, rate=2e-3):
    """Losses at the first and at the last step on one batch."""
    optimiser = torch.optim.AdamW(net.parameters(), rate, weight_decay=0.0)
    trace = []
    for _ in range(steps):
        value = loss(net(crops.image, crops.K), crops)[0]
        optimiser.zero_grad()
        value.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        trace.append(value.item())
    return trace


@pytest.mark.parametrize("config", [SMALL, SMALL_HAMER], ids=["ours", "hamer"])
def test_overfits_one_batch(config):
    torch.manual_seed(0)
    net = ParametricHand(config)
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=net.image_size)
    before = hand_errors(net(crops.image, crops.K), crops)
    trace = overfit(net, crops, hamer_loss if config is SMALL_HAMER else exact_loss, 30, 2e-3)
    after = hand_errors(net.eval()(crops.image, crops.K), crops)
    assert trace[-1] < (0.6 if config is SMALL else 0.7) * trace[0]
    assert after["mpjpe"].mean() < 0.6 * before["mpjpe"].mean()
    if config is SMALL:
        assert after["projected"].mean() < 0.6 * before["projected"].mean()


def exact_output(crops: C.HandCrops) -> HandOutput:
    t = crops.truth
    tight = torch.full(t.points.shape[:2], -4.0)
    return HandOutput(
        t.rotations, t.betas, t.transl, t.joints, t.vertices, t.points, t.points, tight, t.transl
    )  # fmt: skip


def test_losses_are_least_at_the_truth():
    crops = C.hand_crops(hand_batch(3), None, jitter=None, size=SIZE)
    out = exact_output(crops)
    assert hamer_loss(out, crops)[0] < 1e-6
    _, terms = exact_loss(out, crops)
    assert all(v.abs() < 1e-3 for k, v in terms.items() if k != "points")
    for k, v in hand_errors(out, crops).items():
        assert v.max() < (0.2 if k == "root_deg" else 0.02), k
    turned = rigid.so3_exp(torch.tensor([0.0, 0.2, 0.0])) @ out.rotations
    worse = replace(out, rotations=turned, joints=out.joints + torch.randn(1, 21, 3) * 0.01, points=out.points + 3)
    assert exact_loss(worse, crops)[0] > exact_loss(out, crops)[0] + 0.05
    # the published weights, term by term
    loss, terms = hamer_loss(worse, crops)
    w = HamerWeights()
    assert (w.joints, w.points, w.root, w.pose, w.betas) == (0.05, 0.01, 0.001, 0.001, 0.0005)
    torch.testing.assert_close(loss, sum(getattr(w, k) * v for k, v in terms.items()))


def test_uncertainty_is_honest_at_the_least_loss():
    """The Laplacian likelihood of an error e, over both axes, is best at a scale of e/2 per axis."""
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=SIZE)
    out = exact_output(crops)
    off = replace(out, points=out.points + torch.tensor([0.0, 6.4]))
    scales = torch.linspace(-5, -1, 81)
    losses = [exact_loss(replace(off, log_sigma=torch.full_like(off.log_sigma, s)), crops)[1]["points"] for s in scales]
    best = scales[torch.stack(losses).argmin()].exp()
    assert best == pytest.approx(0.05, rel=0.06)


def test_rows_of_no_weight_do_not_count():
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=SIZE)
    net = ParametricHand(SMALL).eval()
    out = net(crops.image, crops.K)
    full = exact_loss(out, crops.rows(slice(None)))[0]
    bad = replace(crops.truth, weight=torch.tensor([1.0, 1, 1, 0]), joints=crops.truth.joints.clone())
    bad.joints[3] += 5
    again = exact_loss(out, replace(crops, truth=bad))[0]
    assert torch.isfinite(again) and (again - full).abs() < 0.5 * full


@pytest.mark.parametrize("config", [SMALL, SMALL_HAMER], ids=["ours", "hamer"])
def test_everything_trains_and_bf16_keeps_geometry_exact(config):
    torch.manual_seed(1)
    net = ParametricHand(config)
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=net.image_size)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(crops.image, crops.K)
        loss, _ = exact_loss(out, crops)
    loss.backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    eye = out.rotations @ out.rotations.mT
    assert out.vertices.dtype == torch.float32 and (eye - torch.eye(3)).abs().max() < 1e-5


def test_evaluation_is_deterministic_and_independent_of_the_batch():
    net = ParametricHand(SMALL).eval()
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=SIZE)
    a, b = net.predict(crops), net.predict(crops)
    assert torch.equal(a.vertices, b.vertices) and torch.equal(a.confidence, b.confidence)
    alone = net.predict(crops.rows(slice(2, 3)))
    torch.testing.assert_close(alone.vertices, a.vertices[2:3], atol=1e-4, rtol=0)
    assert len(net.predict(crops.rows(slice(0, 0)))) == 0
    assert ((a.confidence > 0) & (a.confidence <= 1)).all() and (a.sigma > 0).all()


def test_predictions_are_hands_of_their_side():
    """Vertices, joints and parameters of a prediction agree under each side's own model."""
    from handhold.hand.model import HandModel

    net = ParametricHand(SMALL).eval()
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=SIZE)
    p = net.predict(crops)
    for rows, side in ((slice(0, 2), "right"), (slice(2, 4), "left")):
        posed = HandModel.open(side).with_shape(p.betas[rows]).with_pose(p.rotations[rows], p.transl[rows])
        torch.testing.assert_close(posed.vertices, p.vertices[rows], atol=1e-4, rtol=0)
        torch.testing.assert_close(posed.joints, p.joints[rows], atol=1e-4, rtol=0)


def test_mirrored_input_gives_mirrored_output():
    """The whole network, not only the geometry: a mirrored picture called left gives the mirrored hand."""
    net = ParametricHand(SMALL).eval()
    image = torch.rand(1, 3, 90, 120)
    K = torch.tensor([[100.0, 0, 60], [0, 100, 45], [0, 0, 1]])
    right = net.predict(C.crop_hands(image, K, [[20.0, 10.0, 70.0, 60.0]], [False], size=SIZE))
    left = net.predict(C.crop_hands(image.flip(-1), K, [[50.0, 10.0, 100.0, 60.0]], [True], size=SIZE))
    flip = torch.tensor([-1.0, 1.0, 1.0])
    torch.testing.assert_close(right.vertices, left.vertices * flip, atol=1e-3, rtol=0)
    torch.testing.assert_close(right.points, left.points * flip[:2] + torch.tensor([120.0, 0.0]), atol=0.05, rtol=0)


def test_weak_camera_is_the_published_one():
    camera = torch.tensor([[0.8, 0.02, -0.03]])
    K = torch.tensor([[[900.0, 0, 96], [0, 900, 128], [0, 0, 1]]])
    t = place(camera, torch.zeros(1, 21, 3), K, (256, 192), "weak", 5000.0)
    torch.testing.assert_close(t, torch.tensor([[0.02, -0.03, 2 * 5000 / (256 * 0.8)]]))


def hamer_state(config: ParametricConfig, g: torch.Generator) -> dict[str, torch.Tensor]:
    """A random HaMeR checkpoint in the true layout."""
    from test_vit import public_state

    c, inner, ctx = config, config.heads * config.dim_head, config.vit.width
    state = {f"backbone.{k}": v for k, v in public_state(c.vit, 13, "last_norm", g).items()}
    t = "mano_head.transformer."
    shapes = {f"{t}pos_embedding": (1, 1, c.dim), f"{t}to_token_embedding.weight": (c.dim, 1)}
    shapes |= {f"{t}to_token_embedding.bias": (c.dim,)}
    for i in range(c.depth):
        p = f"{t}transformer.layers.{i}."
        for k in range(3):
            shapes |= {f"{p}{k}.norm.weight": (c.dim,), f"{p}{k}.norm.bias": (c.dim,)}
        shapes |= {f"{p}0.fn.to_qkv.weight": (3 * inner, c.dim), f"{p}1.fn.to_q.weight": (inner, c.dim)}
        shapes |= {f"{p}1.fn.to_kv.weight": (2 * inner, ctx)}
        for k in range(2):
            shapes |= {f"{p}{k}.fn.to_out.0.weight": (c.dim, inner), f"{p}{k}.fn.to_out.0.bias": (c.dim,)}
        shapes |= {f"{p}2.fn.net.0.weight": (c.mlp, c.dim), f"{p}2.fn.net.0.bias": (c.mlp,)}
        shapes |= {f"{p}2.fn.net.3.weight": (c.dim, c.mlp), f"{p}2.fn.net.3.bias": (c.dim,)}
    for name, n in (("decpose", 96), ("decshape", 10), ("deccam", 3)):
        shapes |= {f"mano_head.{name}.weight": (n, c.dim), f"mano_head.{name}.bias": (n,)}
    shapes |= {"mano_head.init_hand_pose": (1, 96), "mano_head.init_betas": (1, 10), "mano_head.init_cam": (1, 3)}
    return state | {k: torch.randn(*s, generator=g) * 0.1 for k, s in shapes.items()}


def test_hamer_layout(monkeypatch):
    from pathlib import Path

    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    state = hamer_state(SMALL_HAMER, torch.Generator().manual_seed(3))
    net = ParametricHand(SMALL_HAMER).eval()
    net.load_state_dict(from_hamer(state | {"mano.faces": torch.zeros(1)}, SMALL_HAMER))
    torch.testing.assert_close(net.mean_camera, state["mano_head.init_cam"][0])
    # the decoder, written out
    context = torch.randn(2, 12, 64)
    x = state["mano_head.transformer.to_token_embedding.bias"] + state["mano_head.transformer.pos_embedding"]
    x = x.expand(2, -1, -1)

    def attend(q, k, v):
        q, k, v = (z.unflatten(-1, (2, 16)).transpose(1, 2) for z in (q, k, v))
        return ((q @ k.mT / 4).softmax(-1) @ v).transpose(1, 2).flatten(2)

    for i in range(2):
        p = f"mano_head.transformer.transformer.layers.{i}."
        s = {k.removeprefix(p): v for k, v in state.items() if k.startswith(p)}
        norms = [
            lambda z, k=k, s=s: torch.layer_norm(z, (64,), s[f"{k}.norm.weight"], s[f"{k}.norm.bias"])
            for k in (0, 1, 2)
        ]
        y = attend(*(norms[0](x) @ s["0.fn.to_qkv.weight"].T).chunk(3, -1))
        x = x + y @ s["0.fn.to_out.0.weight"].T + s["0.fn.to_out.0.bias"]
        y = attend(norms[1](x) @ s["1.fn.to_q.weight"].T, *(context @ s["1.fn.to_kv.weight"].T).chunk(2, -1))
        x = x + y @ s["1.fn.to_out.0.weight"].T + s["1.fn.to_out.0.bias"]
        y = torch.nn.functional.gelu(norms[2](x) @ s["2.fn.net.0.weight"].T + s["2.fn.net.0.bias"])
        x = x + y @ s["2.fn.net.3.weight"].T + s["2.fn.net.3.bias"]
    mine = net.query.expand(2, -1, -1)
    for block in net.blocks:
        mine = block(mine, context)
    torch.testing.assert_close(mine, x, atol=1e-4, rtol=1e-4)
    with pytest.raises(UnusableInput):
        from_hamer({k: v for k, v in state.items() if "deccam" not in k}, SMALL_HAMER)
