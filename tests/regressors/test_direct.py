"""The direct family: coarse meshes and their maps, overfitting, masking, equal size."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from handhold.hand.model import HandModel
from handhold.regressors import crops as C
from handhold.regressors import direct, parametric
from handhold.regressors.direct import DirectConfig, DirectHand, coarse_maps, farthest_points
from handhold.regressors.hand_losses import exact_loss, hand_errors
from handhold.regressors.vit import ViTConfig
from synth_hands import hand_batch, random_rotations

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = (64, 64)
SMALL = DirectConfig(
    ViTConfig(48, 2, 2, image=SIZE, stem="conv"), dim=48, depth=1, heads=2, dim_head=24, mlp=96, n_coarse=80
)  # fmt: skip


def count(m: torch.nn.Module) -> int:
    return sum(p.numel() for p in m.parameters())


def test_coarse_maps_know_the_hand():
    """Other poses than those they were fitted to: the surface to about a millimetre, the joints to a fraction."""
    hand = HandModel.open()
    maps = coarse_maps(hand, 195)
    assert len(set(maps.coarse.tolist())) == 195 and maps.coarse[:5].tolist() == hand.tip_ids.tolist()
    torch.testing.assert_close(maps.up_weights.sum(1), torch.ones(1609), atol=2e-3, rtol=0)
    assert torch.linalg.eigvalsh(maps.adjacency).abs().max() < 1 + 1e-5
    g = torch.Generator().manual_seed(5)
    posed = hand.with_shape(torch.randn(30, 10, generator=g)).with_pose(random_rotations(30, g))
    up = (posed.vertices[:, maps.coarse][:, maps.up_near] * maps.up_weights[..., None]).sum(2)
    assert (up - posed.vertices).norm(dim=-1).mean() < 1e-3
    joints = (posed.vertices[:, maps.joint_near] * maps.joint_weights[..., None]).sum(2)
    assert (joints - posed.mano_joints).norm(dim=-1).mean() < 6e-4
    assert torch.equal(coarse_maps(hand, 195).up_weights, maps.up_weights)


def test_farthest_points_spread():
    x = torch.randn(300, 3, generator=torch.Generator().manual_seed(0))
    ids = farthest_points(x, 40, [7])
    gaps = torch.cdist(x[ids], x[ids]) + torch.eye(40) * 9
    cover = torch.cdist(x, x[ids]).amin(1).amax()
    assert ids[0] == 7 and gaps.amin() >= cover - 1e-6  # a net: no two are closer than any point is to the net


def test_costs_what_the_parametric_one_costs():
    with torch.device("meta"):
        a, b = count(parametric.ParametricHand()), count(DirectHand())
    assert abs(a - b) < 0.1 * a and b < 7.8e6


@pytest.mark.parametrize("graph", [False, True], ids=["metro", "graphormer"])
def test_overfits_one_batch(graph):
    torch.manual_seed(0)
    net = DirectHand(replace(SMALL, graph=graph))
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=SIZE)
    before = hand_errors(net.eval()(crops.image, crops.K), crops)
    optimiser = torch.optim.AdamW(net.train().parameters(), 2e-3, weight_decay=0.0)
    trace = []
    for _ in range(30):
        loss = exact_loss(net(crops.image, crops.K), crops)[0]
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        trace.append(loss.item())
    after = hand_errors(net.eval()(crops.image, crops.K), crops)
    assert trace[-1] < 0.6 * trace[0]
    assert after["mpjpe"].mean() < 0.6 * before["mpjpe"].mean() and "root_deg" not in after


def test_masking_is_for_training_only_and_everything_trains():
    torch.manual_seed(0)
    net = DirectHand(SMALL)
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=SIZE)
    with torch.autocast("cpu", torch.bfloat16):
        out = net(crops.image, crops.K)
        loss = exact_loss(out, crops)[0]
    loss.backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not torch.isfinite(p.grad).all()] == []
    assert not torch.equal(out.vertices, net(crops.image, crops.K).vertices)
    net.eval()
    assert torch.equal(net(crops.image, crops.K).vertices, net(crops.image, crops.K).vertices)


def test_joints_are_those_of_the_surface():
    net = DirectHand(SMALL).eval()
    crops = C.hand_crops(hand_batch(2), None, jitter=None, size=SIZE)
    out = net(crops.image, crops.K)
    torch.testing.assert_close(net.joints(out.vertices), out.joints, atol=2e-3, rtol=0)
    torch.testing.assert_close(out.joints[:, 4], out.vertices[:, net.hand.tip_ids[0]])
    p = net.predict(crops)
    assert p.rotations is None and p.vertices.shape == (4, 1609, 3) and len(p.rows(slice(0, 1))) == 1


def test_another_hand_model_is_refused():
    with pytest.raises(ValueError, match="vertices"):
        direct.DirectHand(replace(SMALL, n_vertices=778))
