"""HOLD: canonicalisation, fields, losses, rendering and training. What is not here is tested where the engines are
(docs/methods/hold.md has the list)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import safetensors.torch
import torch

from handhold.errors import BadConfig, UnusableInput
from handhold.geometry.rigid import so3_exp
from handhold.kernels.grid import SdfGrid
from handhold.methods import hold_losses as losses
from handhold.methods.hold import fit_template, hand_template
from handhold.methods.hold_canonical import FAR, RigidPoses, SkinnedPoses
from handhold.methods.hold_fields import GridField, NetworkField, NetworkSize, field_mesh, field_tensors, load_field
from handhold.methods.hold_files import grown, open_scene, scene_tensors
from handhold.methods.hold_rays import NOTHING, PixelTable
from handhold.methods.hold_scene import Density, HoldBody, HoldScene, Sampling, render_view
from handhold.methods.hold_train import Templates, Training, field_eikonal, train
from handhold.methods.settings import HoldConfig
from handhold.render.samplers import Rays

RADIUS = 0.04


@dataclass(frozen=True)
class Track:
    pose: np.ndarray
    betas: np.ndarray
    transl: np.ndarray


def hand_track(frames: int = 3) -> Track:
    rng = np.random.default_rng(3)
    pose = np.clip(rng.normal(0, 0.15, (frames, 16, 3)), -0.3, 0.3)
    return Track(pose, np.zeros(10), np.tile([0.0, 0.0, 0.5], (frames, 1)) + 0.01 * rng.normal(size=(frames, 3)))


@pytest.fixture(scope="module")
def hand() -> SkinnedPoses:
    return SkinnedPoses("right", hand_track())


def object_poses(frames: int = 3) -> RigidPoses:
    m = np.tile(np.eye(4), (frames, 1, 1))
    m[:, :3, :3] = so3_exp(torch.linspace(0, 1, frames)[:, None] * torch.tensor([0.3, 1.0, -0.2])).numpy()
    m[:, :3, 3] = [0.01, -0.02, 0.4]
    return RigidPoses(m, np.zeros(3), RADIUS)


def ball_grid(resolution: int = 40, radius: float = RADIUS) -> SdfGrid:
    half = 1.5 * RADIUS
    h = 2 * half / (resolution - 1)
    axis = torch.linspace(-half, half, resolution)
    x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    return SdfGrid(x.norm(dim=-1) - radius, [-half] * 3, h)


def ball(frames: int = 3, kind="neus", name: str = "object") -> HoldBody:
    grid = ball_grid()
    law = Density(kind, 0.5 * grid.h, RADIUS, False)
    return HoldBody(name, object_poses(frames), GridField(frames, grid), law, Sampling(True))


# ----------------------------------------------------------------------------------------------- canonicalisation


def test_surface_points_go_to_their_rest_place_and_fingers_do_not_mix(hand):
    frames = torch.tensor([0, 2])
    posed = hand.posed(frames).vertices.detach()
    rest = torch.as_tensor(hand.rest()[0])
    at = hand.to_canonical(posed.reshape(-1, 3), frames.repeat_interleave(posed.shape[1]))
    off = (at.points.detach().reshape(posed.shape) - rest).norm(dim=-1)
    assert (off < 1e-4).float().mean() > 0.99
    assert at.known.all()


def test_far_from_the_hand_is_outside(hand):
    x = torch.tensor([[0.0, 0.0, 0.5 + 4 * FAR], [0.9, 0.0, 0.5]])
    frame = torch.zeros(2, dtype=torch.long)
    assert not hand.to_canonical(x, frame).known.any()
    body = HoldBody("right", hand, GridField(3, ball_grid()), Density("neus", 1e-3, 0.1, False), Sampling(True))
    assert (body.sdf(x, frame) > 0).all()


def test_the_jacobian_is_that_of_the_whole_inverse_map():
    hand = SkinnedPoses("right", hand_track())
    torch.manual_seed(1)
    v = hand.posed(torch.tensor([1])).vertices[0].detach()
    centres = v[hand.faces].mean(1)
    pick = torch.randperm(len(centres))[:200]
    normal = torch.linalg.cross(*(v[hand.faces][pick][:, k] - v[hand.faces][pick][:, 0] for k in (1, 2)))
    x = centres[pick] + 0.002 * torch.nn.functional.normalize(normal, dim=-1)
    frame = torch.ones(len(x), dtype=torch.long)
    jacobian = hand.to_canonical(x, frame).jacobian
    eps, columns = 2e-5, []
    for k in range(3):
        step = eps * torch.eye(3)[k]
        ends = [hand.to_canonical(x + s * step, frame).points.detach() for s in (1, -1)]
        columns.append((ends[0] - ends[1]) / (2 * eps))
    error = (torch.stack(columns, -1) - jacobian).flatten(1).norm(dim=1)
    assert error.median() < 0.02  # float32 differences
    assert (error < 0.1).float().mean() > 0.95  # the rest is where the closest triangle changes in between


def test_the_jacobian_moves_with_pose_gradients_only(hand):
    x = hand.posed(torch.tensor([0])).vertices[0, :20].detach() + 0.001
    hand.requires_grad_(True)
    at = hand.to_canonical(x, torch.zeros(20, dtype=torch.long))
    assert at.points.requires_grad and not at.jacobian.requires_grad
    at.points.square().sum().backward()
    assert hand.turn.grad[0].abs().sum() > 0 and hand.turn.grad[1:].abs().sum() == 0 and hand.bend.grad.abs().sum() > 0
    hand.zero_grad()


def test_rigid_there_and_back_with_the_scale_entering_once():
    poses = object_poses()
    with torch.no_grad():
        poses.log_scale.fill_(np.log(1.3))
        poses.xi.copy_(0.05 * torch.randn(3, 6, generator=torch.Generator().manual_seed(0)))
    x, frame = torch.randn(50, 3) * 0.1 + torch.tensor([0.0, 0.0, 0.4]), torch.arange(50) % 3
    at = poses.to_canonical(x, frame)
    assert torch.allclose(poses.to_world(at.points, frame), x, rtol=0, atol=1e-6)
    gram = at.jacobian @ at.jacobian.mT
    assert torch.allclose(gram, torch.eye(3).expand_as(gram) / 1.3**2, atol=1e-5)
    # A similarity seen from the camera: what is 1.3 times as large is 1.3 times as far away.
    metric = torch.as_tensor(poses.result(), dtype=torch.float32)[frame]
    grown = (metric[:, :3, :3] @ (1.3 * at.points)[..., None])[..., 0] + metric[:, :3, 3]
    assert torch.allclose(grown, x, atol=1e-6)


def test_distances_scale_with_the_similarity_and_normals_turn_with_the_body():
    body = ball()
    with torch.no_grad():
        body.poses.log_scale.fill_(np.log(0.1))
    frame = torch.tensor([0, 1, 2])
    centre = body.poses.to_world(torch.zeros(3, 3), frame)
    direction = torch.nn.functional.normalize(torch.tensor([[1.0, 2, 3], [-1, 0, 1], [0, 1, -1]]), dim=-1)
    x = centre + 0.1 * (RADIUS + 0.01) * direction
    assert torch.allclose(body.sdf(x, frame), torch.full((3,), 0.001), atol=3e-5)
    from handhold.render.volume import Points

    normal = body.matter(Points(x, -direction, torch.full((3,), 1e-4), frame)).normal
    assert torch.allclose(torch.nn.functional.normalize(normal, dim=-1), direction, atol=4e-2)  # of a trilinear grid
    assert torch.allclose(normal.norm(dim=-1), torch.ones(3), atol=4e-2)


# ------------------------------------------------------------------------------------------------ fields


@pytest.mark.parametrize("kind", ["grid", "network"])
def test_a_field_survives_its_checkpoint(kind):
    torch.manual_seed(0)
    size = NetworkSize(16, 3, 2, 8)
    field = GridField(2, ball_grid(12)) if kind == "grid" else NetworkField(2, np.zeros(3), 0.1, size)
    again = load_field(field_tensors(field))
    x, jacobian = 0.02 * torch.randn(9, 3), torch.eye(3).expand(9, 3, 3)
    frame = torch.zeros(9, dtype=torch.long)
    for a, b in zip(field(x, frame, jacobian), again(x, frame, jacobian), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="no field"):
        load_field({"code": torch.zeros(2, 4)})


def test_a_field_becomes_a_closed_mesh_of_its_size():
    mesh, report = field_mesh(GridField(1, ball_grid(48)))
    radius = np.linalg.norm(mesh.vertices, axis=1)
    assert abs(radius - RADIUS).max() < 1e-3 and mesh.colors is not None and not report.capped


def test_beyond_the_grid_distances_go_on():
    field = GridField(1, ball_grid())
    x = torch.tensor([[1.0, 0, 0], [0, -2.0, 0]])
    assert torch.allclose(field.sdf(x), torch.tensor([1 - RADIUS, 2 - RADIUS]), atol=1e-3)


def test_a_network_learns_the_hands_template(hand):
    torch.manual_seed(0)
    middle = hand.rest()[0].mean(0)
    field = NetworkField(3, middle, 0.13, NetworkSize(48, 4, 2, 8))
    body = HoldBody("right", hand, field, Density("laplace", 0.005, 0.13, True), Sampling(False))
    grid = hand_template(hand, resolution=24)
    first = fit_template(body, grid, 1, 0)
    assert fit_template(body, grid, 60, 0) < 0.7 * first


def test_a_scene_survives_its_files_and_others_are_refused(tmp_path):
    body, hand = ball(), SkinnedPoses("right", hand_track())
    with torch.no_grad():
        body.poses.log_scale.fill_(np.log(1.1))
    law = Density("neus", 2e-3, 0.1, False)
    right = HoldBody("right", hand, GridField(3, hand_template(hand, resolution=24)), law, Sampling(True, edges=8))
    K = np.array([[100.0, 0, 24], [0, 100, 24], [0, 0, 1]])
    before = render_view(HoldScene([body, right]), K, (48, 48), 1)
    scene = HoldScene([grown(body), right])
    for name, tensors in scene_tensors(scene).items():
        safetensors.torch.save_file(tensors, tmp_path / f"{name}.safetensors")
    after = render_view(open_scene(tmp_path), K, (48, 48), 1)
    assert np.abs(before.rgb - after.rgb).mean() < 2e-3 and np.abs(before.depth - after.depth).mean() < 1e-3
    (tmp_path / "right_field.safetensors").write_bytes(b"no")
    with pytest.raises(UnusableInput, match="right_field"):
        open_scene(tmp_path)
    with pytest.raises(UnusableInput, match="no fields"):
        open_scene(tmp_path / "nowhere")


# ------------------------------------------------------------------------------------------------ losses


def test_a_missing_hand_does_not_carve_the_object_beneath_its_mask():
    shares = torch.tensor([[0.9, 0.0]], requires_grad=True)
    label, sure = torch.tensor([1]), torch.ones(1)
    losses.semantic(shares, torch.tensor([[0.9, 0.0]]), label, sure).backward()
    assert shares.grad[0, 0] == 0  # the hand is not there: nothing is said of the object
    shares.grad = None
    losses.semantic(shares, torch.tensor([[0.9, 1.0]]), label, sure).backward()
    assert shares.grad[0, 0] > 0


def test_contact_and_penetration_of_two_balls():
    gap = torch.linspace(-0.02, 0.03, 11, requires_grad=True)
    deep = torch.stack([losses.penetration(g[None], 0.0) for g in gap])
    assert (deep[gap > 0] == 0).all() and (deep[:-1] >= deep[1:]).all() and deep[0] > 0
    deep.sum().backward()
    assert (gap.grad[gap < 0] < 0).all()
    assert losses.contact(torch.tensor([0.5]), torch.zeros(1)) == 0
    assert losses.contact(torch.tensor([0.004]), torch.ones(1)) == pytest.approx(0.004)


def test_smoothness_lives_on_so3():
    turn = torch.tensor([0.4, -0.2, 0.9])
    known = torch.ones(9, dtype=torch.bool)
    steady = so3_exp(torch.arange(9.0, dtype=torch.float64)[:, None] * turn)  # passes pi
    assert losses.acceleration(steady, known) < 1e-9
    noisy = so3_exp(0.1 * torch.randn(9, 3, dtype=torch.float64)) @ steady
    outside = so3_exp(torch.tensor([1.0, 2, 3], dtype=torch.float64))
    assert losses.acceleration(outside @ noisy, known) == pytest.approx(float(losses.acceleration(noisy, known)))
    assert losses.acceleration(noisy, known) > 1e-4
    assert losses.acceleration(noisy, torch.zeros(9, dtype=torch.bool)) == 0


def test_the_template_holds_only_near_itself():
    assert losses.template(torch.tensor([0.5]), torch.tensor([0.02])) == 0
    assert losses.template(torch.tensor([0.004]), torch.tensor([0.001])) == pytest.approx(0.003)


def test_sparsity_counts_rays_that_stay_away():
    alone, away = torch.tensor([[0.5, 0.2], [1.0, 0.4]]), torch.tensor([[True, False], [False, True]])
    assert losses.sparsity(alone, away) == pytest.approx(0.45)
    assert losses.sparsity(alone, torch.zeros_like(away)) == 0


# ------------------------------------------------------------------------------------------------ rendering, training


@pytest.mark.parametrize("kind", ["neus", "laplace"])
def test_a_view_shows_the_ball_where_it_is(kind):
    K = np.array([[100.0, 0, 24], [0, 100, 24], [0, 0, 1]])
    view = render_view(HoldScene([ball(kind=kind)]), K, (48, 48), 1)
    centre = np.array([0.01, -0.02, 0.4])
    px = K @ centre
    u, v = (px[:2] / px[2]).astype(int)
    assert view.depth[v, u] == pytest.approx(0.4 - RADIUS, abs=1.5e-3)
    assert view.normal[v, u] @ (-centre / np.linalg.norm(centre)) > 0.98
    assert view.shares["object"][v, u] > 0.97 and view.shares["object"][2, 2] < 1e-3
    assert view.opacity.sum() == pytest.approx(np.pi * (100 * RADIUS / 0.4) ** 2, rel=0.08 if kind == "neus" else 0.25)


def test_a_novel_view_is_a_turned_camera():
    K = np.array([[100.0, 0, 24], [0, 100, 24], [0, 0, 1]])
    turn = np.eye(4)
    turn[:3, :3] = [[-1, 0, 0], [0, 1, 0], [0, 0, -1]]
    turn[:3, 3] = [0, 0, 0.8]  # from behind
    view = render_view(HoldScene([ball()]), K, (48, 48), 0, turn)
    x = int(24 - 100 * 0.01 / 0.4)
    assert view.depth[19, x] == pytest.approx(0.4 - RADIUS, abs=1.5e-3)
    assert view.normal[19, x, 2] < -0.95


def test_what_hides_what_is_in_the_shares_and_order_does_not_matter():
    front, back = ball(name="right"), ball()
    with torch.no_grad():
        front.poses.base[:, 2, 3] -= 0.2
    K = np.array([[100.0, 0, 24], [0, 100, 24], [0, 0, 1]])
    a = render_view(HoldScene([back, front]), K, (48, 48), 0)
    b = render_view(HoldScene([front, back], shared=True), K, (48, 48), 0)
    both = (a.amodal["object"] > 0.9) & (a.amodal["right"] > 0.9)
    assert both.any() and a.shares["object"][both].max() < 0.05 and a.shares["right"][both].min() > 0.9
    assert np.abs(a.shares["right"] - b.shares["right"]).max() < 0.02
    alone = render_view(HoldScene([back, front]), K, (48, 48), 0, only=["object"])
    assert np.abs(alone.opacity - a.amodal["object"]).max() < 1e-3


def ball_table(frames: int = 3, size: int = 60, radius: float = RADIUS) -> PixelTable:
    """Pixels of a ball of one colour, as `object_poses` place it."""
    f = 2.2 * size
    y, x = np.mgrid[:size, :size] + 0.5
    d = np.stack([(x - size / 2) / f, (y - size / 2) / f, np.ones_like(x)], -1).reshape(-1, 3)
    d /= np.linalg.norm(d, axis=1, keepdims=True)
    c = np.array([0.01, -0.02, 0.4])
    inside = np.linalg.norm(c - (d @ c)[:, None] * d, axis=1) < radius
    n = len(d)
    rows = lambda a: torch.as_tensor(np.tile(a, (frames, *[1] * (np.ndim(a) - 1))), dtype=torch.float32)  # noqa: E731
    color = np.where(inside[:, None], [0.7, 0.3, 0.2], 0.0)
    label = torch.where(rows(inside) > 0, 0, NOTHING)
    frame = torch.arange(frames).repeat_interleave(n)
    start = n * torch.arange(frames + 1)
    return PixelTable(
        frame, rows(d), rows(color), label, rows(inside), torch.ones(n * frames), start, torch.ones(frames)
    )


def test_training_a_grid_fills_its_masks_in_its_colour_and_stays_a_distance():
    body = ball()
    body.field.grid.data[..., 0] += 0.1 * RADIUS  # a ball too small
    scene, table = HoldScene([body]), ball_table()
    K = np.array([[132.0, 0, 30], [0, 132, 30], [0, 0, 1]])
    true = ball_table(1, 60).clear.sum()
    before = render_view(scene, K, (60, 60), 0).opacity.sum()
    course = train(scene, table, Templates(), Training(80, 768, 3, (1.5, 0.7), grid_rate=0.3, object_rate=0.0))
    after = render_view(scene, K, (60, 60), 0).opacity.sum()
    assert abs(after - true) < 0.4 * abs(before - true)
    assert course[-1]["color"] < 0.3 * course[0]["color"]
    assert field_eikonal(scene)["object"] < 0.05
    assert not body.poses.xi.any()


def test_training_networks_keeps_the_eikonal_equation_and_is_seeded():
    def once():
        torch.manual_seed(0)
        field = NetworkField(3, np.zeros(3), 1.3 * RADIUS, NetworkSize(32, 3, 2, 8))
        law = Density("laplace", 0.05 * RADIUS, RADIUS, True)
        few = Sampling(False, bounded=12, extra=8)
        scene = HoldScene([HoldBody("object", object_poses(), field, law, few)], shared=True)
        table = ball_table()
        return scene, train(scene, table, Templates(), Training(40, 96, 3, None, 1e-3, bands=(5, 20)))

    scene, course = once()
    assert course[-1]["color"] < course[0]["color"]
    assert field_eikonal(scene, 512)["object"] < 0.05
    assert once()[1] == course


def test_ablations_and_a_diverged_field_are_told_apart():
    body = ball()
    table = ball_table()
    alone = replace(Training(2, 128, 2), compositing=False, eikonal=False)
    assert len(train(HoldScene([body]), table, Templates(), alone)) == 1
    with torch.no_grad():
        body.field.light.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="color"):
        train(HoldScene([body]), table, Templates(), Training(1, 64, 2))


def test_a_frame_without_a_pose_is_empty():
    poses = object_poses().result()
    poses[1] = np.nan
    grid = ball_grid()
    body = HoldBody(
        "object",
        RigidPoses(poses, np.zeros(3), RADIUS),
        GridField(3, grid),
        Density("neus", grid.h, 0.1, False),
        Sampling(True),
    )
    d = torch.nn.functional.normalize(torch.tensor([[0.025, -0.05, 1.0]] * 2), dim=-1)
    along = HoldScene([body]).along(Rays(torch.zeros(2, 3), d, torch.tensor([0, 1])))
    assert along.tau[0].sum() > 1 and along.tau[1].sum() == 0
    assert np.isnan(body.poses.result()[1]).all()


def test_settings_are_checked():
    assert HoldConfig().density_kind == "neus" and HoldConfig(preset="paper").density_kind == "laplace"
    with pytest.raises(BadConfig):
        HoldConfig(iterations=-1)
