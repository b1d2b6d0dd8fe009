import functools
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from handhold import metrics
from handhold.scene import Body, Rigid, Skinned

sys.path.insert(0, str(Path(__file__).parent / "export"))
from truth_scene import demo_truth, mirrored, truth_scene, with_gap  # noqa: E402


def turn(x, y, z):
    return Rotation.from_rotvec([x, y, z]).as_matrix()


@pytest.fixture(scope="module")
def gt():
    return demo_truth()


@pytest.fixture(scope="module")
def truth(gt):
    return truth_scene(gt)


@pytest.fixture
def few_starts(monkeypatch):
    """Alignment from the identity and three more rotations, on few points: enough where the answer is near."""
    quick = functools.partial(metrics.align_surfaces, starts=3, points=(500, 1500))
    monkeypatch.setattr(metrics, "align_surfaces", quick)


def few(scene, step=12):
    """Every `step`-th frame, to be quick."""
    bodies = {}
    for name, b in scene.bodies.items():
        m = b.motion
        if isinstance(m, Skinned):
            parts = {k: getattr(m, k)[::step] for k in ("pose", "transl", "vertices", "joints")}
            motion = replace(m, **parts)
        else:
            motion = Rigid(m.world_from_body[::step])
        bodies[name] = Body(b.shape, motion, b.valid[::step], b.confidence[::step], b.reason[::step])
    return replace(scene, frames=scene.frames[::step], world_from_cam=scene.world_from_cam[::step], bodies=bodies)


def seen_from_moving_cameras(scene):
    """The same scene in a world that each frame's camera sees differently."""
    rng, n = np.random.default_rng(0), len(scene.frames)
    world_from_cam = np.tile(np.eye(4), (n, 1, 1))
    world_from_cam[:, :3, :3] = Rotation.from_rotvec(rng.normal(size=(n, 3))).as_matrix()
    world_from_cam[:, :3, 3] = rng.normal(size=(n, 3))

    def move(points):
        return np.einsum("fij,fnj->fni", world_from_cam[:, :3, :3], points) + world_from_cam[:, None, :3, 3]

    hand, box = scene.bodies["right"], scene.bodies["object"]
    motion = replace(hand.motion, vertices=move(hand.motion.vertices), joints=move(hand.motion.joints))
    bodies = {
        "right": replace(hand, motion=motion),
        "object": replace(box, motion=Rigid(world_from_cam @ box.motion.world_from_body)),
    }
    return replace(scene, world_from_cam=world_from_cam, bodies=bodies)


def test_umeyama_recovers_a_similarity_and_never_reflects():
    rng = np.random.default_rng(0)
    x, r, t = rng.normal(size=(30, 3)), turn(0.3, -1.2, 2.0), np.array([1.0, 2, 3])
    s, rotation, shift = metrics.umeyama(x, 0.7 * x @ r.T + t)
    assert s == pytest.approx(0.7) and np.allclose(rotation, r) and np.allclose(shift, t)
    assert np.linalg.det(metrics.umeyama(x, x * [-1, 1, 1])[1]) == pytest.approx(1)
    assert metrics.umeyama(x, 2 * x, scale=False)[0] == 1


def test_joint_errors():
    rng = np.random.default_rng(0)
    q = rng.normal(size=(4, 21, 3))
    assert np.allclose(metrics.mpjpe(q + [1, 2, 3], q), 0)
    moved = q.copy()
    moved[:, 1:, 0] += 0.021
    assert np.allclose(metrics.mpjpe(moved, q), 0.02)
    assert np.allclose(metrics.mpvpe(q + 5, q[:, 0] + 5, q, q[:, 0]), 0)
    assert np.allclose(metrics.pa_mpjpe(1.3 * q @ turn(1, 0, 0.5).T + 2, q), 0, atol=1e-12)


def test_chamfer_and_f_score_of_a_known_offset():
    grid = np.stack(np.meshgrid(*[np.arange(5) * 0.1] * 3), -1).reshape(-1, 3)
    assert metrics.chamfer(grid, grid + [0.004, 0, 0]) == pytest.approx(2 * 0.004**2)
    assert metrics.f_score(grid, grid + [0.004, 0, 0], 0.005) == pytest.approx(1)
    assert metrics.f_score(grid, grid + [0.006, 0, 0], 0.005) == 0
    half = grid[grid[:, 0] < 0.15]
    assert metrics.f_score(half, grid, 0.005) == pytest.approx(
        2 * 0.4 / 1.4
    )  # all precise, two of five layers recalled
    cd, f5, f10 = metrics.surface_error(grid + [0.006, 0, 0], grid)
    assert cd == pytest.approx(0.72) and f5 == 0 and f10 == pytest.approx(100)


def test_surface_samples_are_uniform_by_area():
    vertices = np.array([[0, 0, 0], [3, 0, 0], [0, 1, 0], [0, 0, 1.0]])
    points = metrics.sample_surface(vertices, np.array([[0, 1, 2], [0, 2, 3]]), 40000)
    on_first = points[:, 2] == 0
    assert on_first.mean() == pytest.approx(0.75, abs=0.01)
    assert np.allclose(points[on_first].mean(0), [1, 1 / 3, 0], atol=0.02)
    assert np.array_equal(points, metrics.sample_surface(vertices, np.array([[0, 1, 2], [0, 2, 3]]), 40000))
    with pytest.raises(ValueError, match="no finite surface"):
        metrics.sample_surface(np.zeros((3, 3)), np.array([[0, 1, 2]]), 10)


def test_alignment_finds_a_similarity_from_far_away(truth):
    mesh = truth.bodies["object"].shape
    a = metrics.sample_surface(mesh.vertices, mesh.faces, 20000)
    b = metrics.sample_surface(mesh.vertices, mesh.faces, 20000, seed=1)
    a = 1.4 * a @ turn(2.0, 1.0, -0.5).T + [0.3, 0, 1]
    s, r, t = metrics.align_surfaces(a, b, starts=40)
    assert s == pytest.approx(1 / 1.4, rel=0.005)
    assert metrics.surface_error(metrics.transform((s, r, t), a), b)[1] == 100


def test_rotation_error_ignores_the_canonical_frame():
    rng = np.random.default_rng(0)
    r = Rotation.from_rotvec(rng.normal(size=(12, 1)) * [0, 0, 1]).as_matrix()
    assert metrics.relative_rotation_error(r @ turn(1, 2, 3), r).max() < 1e-5
    spin = Rotation.from_rotvec(np.radians(rng.choice([-3, 3], 12))[:, None] * [0, 0, 1]).as_matrix()
    assert set(np.round(metrics.relative_rotation_error(spin @ r, r)).tolist()) <= {0, 6}


def test_truth_scores_as_truth_in_any_world(truth, gt):
    figures = metrics.evaluate(few(seen_from_moving_cameras(truth)), gt)
    assert figures["mpjpe_right"] < 0.01 and figures["mpvpe_right"] < 0.01 and figures["pa_mpjpe_right"] < 0.01
    assert figures["rot_deg"] < 0.05 and figures["cd"] < 0.02 and figures["f5"] > 99.9 and figures["cd_right"] < 0.2
    assert figures["scale_ratio"] == pytest.approx(1, abs=0.005)
    assert figures["frames"] == pytest.approx(100 * 4 / 48)


def test_known_errors_come_back(truth, gt, few_starts):
    """A hand moved away from a 10 % larger object in another canonical frame, and a hole of three frames."""
    scene = few(truth)
    hand, box = scene.bodies["right"], scene.bodies["object"]
    q = np.eye(4)
    q[:3, :3], q[:3, 3] = turn(0.5, 0, 0.3), [0.1, 0, 0]
    shape = replace(box.shape, vertices=(box.shape.vertices * 1.1 - q[:3, 3]) @ q[:3, :3])
    box = replace(box, shape=shape, motion=Rigid(box.motion.world_from_body @ q))
    motion = replace(
        hand.motion, joints=hand.motion.joints + [0, 0, 0.05], vertices=hand.motion.vertices + [0, 0, 0.05]
    )
    scene = replace(scene, bodies={"right": replace(hand, motion=motion), "object": box})
    figures = metrics.evaluate(with_gap(scene, "right", slice(0, 1)), gt)
    assert figures["scale_ratio"] == pytest.approx(1.1, abs=0.02)
    assert figures["mpjpe_right"] < 0.01 and figures["rot_deg"] < 0.05
    assert 5 < figures["cd_right"] < 60  # the box is 5 cm off, seen from the wrist
    assert figures["frames"] == pytest.approx(100 * 3 / 48)


def test_absent_bodies(truth, gt, few_starts):
    scene = few(truth)
    no_hand = metrics.evaluate(replace(scene, bodies={"object": scene.bodies["object"]}), gt)
    assert np.isnan(no_hand["mpjpe_right"]) and no_hand["frames"] == 0 and no_hand["cd"] < 0.02
    no_object = metrics.evaluate(replace(scene, bodies={"right": scene.bodies["right"]}), gt)
    assert no_object["frames"] == 0 and no_object["mpjpe_right"] < 0.01 and "cd" not in no_object
    lost = metrics.evaluate(with_gap(scene, "right", slice(None)), gt)
    assert np.isnan(lost["mpjpe_right"]) and np.isnan(lost["rot_deg"]) and np.isnan(lost["cd_right"])
    with pytest.raises(ValueError, match="48 frames"):
        metrics.evaluate(replace(scene, frames=scene.frames + 40), gt)


def test_a_peer_gives_wrist_and_tips_only(truth, gt, few_starts):
    peer = gt["right_joints"].copy()
    peer[:, [k for k in range(21) if k not in (0, 4, 8, 12, 16, 20)]] = np.nan
    arrays = {k: v for k, v in gt.items() if not k.startswith("right_")} | {"right_peer_joints": peer}
    figures = metrics.evaluate(few(truth), arrays)
    assert figures["mpjpe_right_peer"] < 0.01 and "mpjpe_right" not in figures and figures["cd_right"] < 0.2


def test_left_hand_and_deforming_truth(truth, gt, few_starts):
    scene = few(mirrored(truth))
    box, hand = scene.bodies["object"], scene.bodies["left"].motion
    poses, joints = np.tile(np.eye(4), (48, 1, 1)), np.zeros((48, 21, 3))
    poses[::12], joints[::12] = box.motion.world_from_body, hand.joints
    growing = np.linspace(1, 1.2, 48)[:, None, None] * box.shape.vertices
    arrays = {"object_poses": poses, "object_faces": box.shape.faces, "object_vertices": box.shape.vertices}
    arrays |= {"left_joints": joints, "object_vertices_per_frame": growing}
    figures = metrics.evaluate(scene, arrays)
    assert figures["mpjpe_left"] < 1e-4 and "cd" not in figures and 0.02 < figures["cd_frames"] < 2
    assert 0 < figures["f5_frames"] < 100 and figures["cd_left"] < 2


def test_every_figure_is_explained(truth, gt, few_starts):
    for key in metrics.evaluate(few(truth, 24), gt):
        assert metrics.describe(key) is not None, key
    assert metrics.describe("cd_left")[0] == "cm²" and metrics.describe("mpjpe_right_peer") is not None
    assert metrics.describe("unheard_of") is None
