"""The hand in the object's frame: derivatives, and recovery of a known grasp, scale and regrasp."""

from dataclasses import replace
from importlib import resources

import numpy as np
import pytest
import torch

from handhold.errors import StageFailed
from handhold.geometry import rigid
from handhold.hand import HandModel
from handhold.scene import HandEstimates, Landmarks
from handhold.tracking import hand_evidence, hand_motion, silhouette
from handhold.tracking import hand_solver as hs
from handhold.tracking.grasp import fit_grasp, fit_hand

F64 = torch.float64
K = np.array([[500.0, 0, 240], [0, 500, 180], [0, 0, 1]])


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def hand() -> HandModel:
    return HandModel.open(dtype=F64)


def random_state(n: int) -> hs.HandState:
    gen = torch.Generator().manual_seed(0)
    draw = lambda *s: torch.randn(*s, generator=gen, dtype=F64)  # noqa: E731
    return hs.HandState(rigid.so3_exp(0.3 * draw(n, 16, 3)), 0.05 * draw(n, 3), draw(n, 10), 0.1 * draw(n))


def derivative(f, state: hs.HandState, frames: torch.Tensor, n: int) -> torch.Tensor:
    """Central differences of f(state) along the manifold, last axis of length n."""
    out = []
    for p in range(n):
        d = torch.zeros(len(state.rot), 62, dtype=F64)
        d[:, p] = 1e-6
        out.append((f(state.retract(d, frames)) - f(state.retract(-d, frames))) / 2e-6)
    return torch.stack(out, -1)


def test_joint_derivatives(hand):
    state, offset = random_state(2), hs.landmark_offsets(hand)
    _, D = hs.joints_and_jacobian(hand, state, offset)
    want = derivative(lambda x: hs.joints_and_jacobian(hand, x, offset)[0], state, hand.joint_frames, 61)
    assert (D - want).abs().max() < 1e-8


def test_vertex_derivatives(hand):
    state, ids = random_state(2), torch.arange(0, 1609, 60)
    _, D = silhouette.vertices_and_jacobian(hand, state, ids)
    want = derivative(lambda x: silhouette.vertices_and_jacobian(hand, x, ids)[0], state, hand.joint_frames, 61)
    assert (D - want).abs().max() < 1e-8


def random_motion(n: int, seed: int = 0) -> np.ndarray:
    """(n,4,4) camera from object: turning about a wandering axis, half a metre away."""
    rng = np.random.default_rng(seed)
    w = torch.as_tensor(
        np.stack([0.5 * np.sin(np.linspace(0, 3, n)), np.linspace(0, 4.0, n), 0.3 * np.cos(np.linspace(0, 2, n))], 1)
    )
    t = torch.as_tensor(
        np.array([0, 0, 0.5]) + 0.02 * rng.standard_normal(3) + 0.03 * np.sin(np.linspace(0, 4, n))[:, None]
    )
    return rigid.rigid(rigid.so3_exp(w), t).numpy()


def test_objective_gradient(hand):
    motion = torch.as_tensor(random_motion(4))
    gen = torch.Generator().manual_seed(1)
    draw = lambda *s: torch.rand(*s, generator=gen, dtype=F64)  # noqa: E731
    ev = hs.Evidence(
        torch.as_tensor(K),
        hs.landmark_offsets(hand),
        motion[None, :, :3, :3],
        motion[None, :, :3, 3],
        points=300 * draw(1, 4, 21, 2),
        weight=draw(1, 4, 21),
        size=torch.full((1, 4), 80.0, dtype=F64),
        points3d=0.05 * draw(1, 4, 21, 3),
        weight3d=draw(1, 4, 21),
        angles=0.3 * draw(1, 4, 15, 3),
        weight_angles=draw(1, 4, 15),
    )
    terms, share, centre = (
        hs.Terms(sigma=1.0, weight3d=0.0, log_scale=0.3, log_scale_std=0.1),
        draw(2, 4),
        draw(3) * 0.1,
    )
    state = random_state(2)
    g = hs.assemble(hand, state, ev, terms, share, centre).g
    want = derivative(
        lambda x: hs.assemble(hand, x, ev, terms, share, centre, jacobian=False).cost, state, hand.joint_frames, 62
    )
    assert (g - want).abs().max() < 1e-4 * want.abs().max()


def test_chain_solver_equals_dense():
    gen = torch.Generator().manual_seed(0)
    f, n = 5, 4
    A = torch.randn(f * n, f * n, generator=gen, dtype=F64)
    mask = (torch.arange(f * n)[:, None] // n - torch.arange(f * n) // n).abs() <= 1
    A = (A + A.T) * mask + 40 * torch.eye(f * n, dtype=F64)
    b = torch.randn(f, n, generator=gen, dtype=F64)
    blocks = A.reshape(f, n, f, n).transpose(1, 2)
    diag, lower = torch.stack([blocks[i, i] for i in range(f)]), torch.stack([blocks[i + 1, i] for i in range(f - 1)])
    assert (
        hand_motion._solve_chain(diag, lower, b) - torch.linalg.solve(A, b.reshape(-1)).reshape(f, n)
    ).abs().max() < 1e-10


def landmarks_of(
    joints: np.ndarray, k: np.ndarray, noise: float = 3.0, missing: float = 0.4, seed: int = 0
) -> Landmarks:
    """Projected joints with noise, frames without a detection, and fingers thrown 30 pixels off."""
    rng = np.random.default_rng(seed)
    p = joints @ k.T
    p = p[..., :2] / p[..., 2:] + noise * rng.standard_normal((*joints.shape[:2], 2))
    p3 = joints - joints[:, :1] + 0.005 * rng.standard_normal(joints.shape)
    for f in np.where(rng.random(len(p)) < 0.25)[0]:
        finger = 1 + 4 * rng.integers(5)
        p[f, finger : finger + 4] += 30 * rng.standard_normal(2)
    gone = rng.random(len(p)) < missing
    p[gone], p3[gone] = np.nan, np.nan
    return Landmarks(p.astype(np.float32), p3.astype(np.float32), (~gone).astype(np.float32))


@pytest.fixture(scope="module")
def demo() -> dict:
    with resources.files("handhold").joinpath("data/demo/gt.npz").open("rb") as f, np.load(f) as z:
        return {k: z[k].astype(np.float64) if z[k].dtype.kind == "f" else z[k] for k in z.files}


def estimates_of(
    joints: np.ndarray, k: np.ndarray, theta: np.ndarray | None = None, missing: float = 0.1, seed: int = 0
) -> HandEstimates:
    """A regressor's answers: turned by some ten degrees, fingers bent wrongly, one frame in ten nonsense, known to be
    so; a few frames without an answer."""
    rng = np.random.default_rng(seed)
    n = len(joints)
    turn = rigid.so3_exp(torch.as_tensor(rng.normal(0, np.radians(6), (n, 3)))).numpy()
    root = joints[:, :1]
    off = (joints - root) @ turn.transpose(0, 2, 1) + rng.normal(0, 0.006, joints.shape) + root
    p = joints @ k.T
    p = p[..., :2] / p[..., 2:] + 4.0 * rng.standard_normal((*joints.shape[:2], 2))
    confidence = rng.uniform(0.4, 0.9, joints.shape[:2])
    bad, gone = rng.random(n) < 0.1, rng.random(n) < missing
    p[bad] += 40 * rng.standard_normal((bad.sum(), 1, 2))
    off[bad] = off[bad][:, rng.permutation(21)]
    confidence[bad] *= 0.2
    pose, betas = np.full((n, 16, 3), np.nan), np.full((n, 10), np.nan)
    if theta is not None:
        pose, betas = theta + 0.15 * rng.standard_normal((n, 16, 3)), np.zeros((n, 10))
    for x in (pose, betas, off, p):
        x[gone] = np.nan
    confidence[gone] = 0
    return HandEstimates(*(x.astype(np.float32) for x in (pose, betas, off, p, confidence)))


NOTHING = Landmarks(
    np.full((48, 21, 2), np.nan, np.float32), np.full((48, 21, 3), np.nan, np.float32), np.zeros(48, np.float32)
)


def relative_error(a: np.ndarray, b: np.ndarray) -> float:
    return 1e3 * float(np.linalg.norm((a - a[:, :1]) - (b - b[:, :1]), axis=-1).mean())


def demo_fit(demo, unit: float, invalid=(), seed=0, **kw):
    pose = demo["object_poses"].copy()
    wobble = np.random.default_rng(1).normal(0, np.radians(1.0), (len(pose), 3))
    pose[:, :3, :3] = rigid.so3_exp(torch.as_tensor(wobble)).numpy() @ pose[:, :3, :3]
    pose[:, :3, 3] /= unit
    pose[list(invalid)] = np.nan
    valid = np.isfinite(pose).all((1, 2))
    lm = landmarks_of(demo["right_joints"], demo["K"])
    return fit_grasp(
        HandModel.open(),
        demo["K"],
        pose,
        valid,
        None,
        lm,
        None,
        demo["object_vertices"] / unit,
        seed,
        mediapipe=False,
        **kw,
    ), lm


@pytest.mark.slow
def test_demo_grasp_and_scale_are_recovered(demo):
    fit, lm = demo_fit(demo, 1.7)
    # a hand's size is a prior: scale, and with it the joints, are known to a standard deviation of some 5 percent
    assert abs(np.log(fit.scale / 1.7)) < 0.15 and 0 < fit.scale_std < 0.15
    assert relative_error(fit.joints, demo["right_joints"]) < 16
    assert relative_error(fit.joints / (fit.scale / 1.7), demo["right_joints"]) < 8
    assert fit.windows == [(0, 48)]
    found = np.isfinite(lm.points).all((1, 2))
    assert set(fit.reason[found]) == {"landmarks"} and set(fit.reason[~found]) == {"carried by the grasp"}
    assert (fit.confidence > 0.3).all() and fit.confidence[found].mean() > fit.confidence[~found].mean()
    posed = (
        HandModel.open()
        .with_shape(torch.as_tensor(fit.betas))
        .with_pose(torch.as_tensor(fit.pose), torch.as_tensor(fit.transl))
    )
    assert (
        np.abs(posed.joints.numpy() - fit.joints).max() < 1e-5
        and np.abs(posed.vertices.numpy() - fit.vertices).max() < 1e-5
    )


@pytest.mark.slow
def test_a_known_scale_is_kept(demo):
    fit, _ = demo_fit(demo, 1.7, scale_prior=(1.7, 0.005))
    assert abs(np.log(fit.scale / 1.7)) < 0.015 and fit.scale_std < 0.006
    assert relative_error(fit.joints, demo["right_joints"]) < 8


@pytest.mark.slow
def test_object_units_do_not_matter_and_missing_poses_are_bridged(demo):
    b, lm = demo_fit(demo, 0.02, invalid=range(20, 25))
    assert abs(np.log(b.scale / 0.02)) < 0.15
    found = np.isfinite(lm.points).all((1, 2))
    for f in range(20, 25):
        assert b.reason[f] == ("landmarks only, object pose unknown" if found[f] else "not found")
        assert (b.confidence[f] > 0) == found[f]
    assert np.isfinite(b.joints).all()
    lost = np.arange(20, 25)[found[20:25]]
    assert relative_error(b.joints[lost], demo["right_joints"][lost]) < 30


@pytest.mark.slow
def test_masks_help_when_landmarks_are_few(demo):
    masks = demo["masks"] == 1
    objects = demo["masks"] == 3
    lm = landmarks_of(demo["right_joints"], demo["K"], noise=12.0, missing=0.85)
    given = (HandModel.open(), demo["K"], demo["object_poses"], np.ones(48, bool), None, lm)

    def at_scale(**kw) -> float:
        fit = fit_grasp(*given, object_points=demo["object_vertices"], mediapipe=False, **kw)
        return relative_error(fit.joints / fit.scale, demo["right_joints"])

    assert at_scale(hand_masks=masks, object_masks=objects) < 16


def test_what_two_sources_say_stands_side_by_side(demo):
    hand, n = HandModel.open(dtype=F64), 48
    lm = landmarks_of(demo["right_joints"], demo["K"])
    e = estimates_of(demo["right_joints"], demo["K"], np.broadcast_to(demo["right_pose"], (n, 16, 3)))
    still = np.broadcast_to(np.eye(3), (n, 3, 3)), np.zeros((n, 3))
    offset = hs.landmark_offsets(hand)
    ev = hand_evidence.evidence(demo["K"], *still, lm, np.arange(n), offset, hand, e)
    alone = hand_evidence.evidence(demo["K"], *still, lm, np.arange(n), offset)
    assert ev.sources == 2 and alone.sources == 1
    for k in ("points", "weight", "points3d", "weight3d", "offset"):
        assert torch.equal(getattr(ev.source(0), k), getattr(alone, k))
    assert not ev.source(1).offset.any() and not alone.weight_angles.any()
    assert np.allclose(ev.source(1).weight[0], np.nan_to_num(e.confidence))
    found = torch.as_tensor(e.confidence.any(1))
    angles = torch.einsum("kca,nkc->nka", hand.joint_frames, torch.as_tensor(np.nan_to_num(e.pose[:, 1:])).double())
    assert (ev.angles[0] - angles)[found].abs().max() < 1e-6
    # a frame without landmarks is judged by the size that the estimate has
    lost = np.isnan(lm.points).any((1, 2)) & e.confidence.any(1)
    pixels = demo["K"][0, 0] * 0.1 / demo["right_joints"][lost][..., 2].mean(1)
    assert np.abs(np.log(ev.size[0][torch.as_tensor(lost)].numpy() / pixels)).max() < 0.5
    shared = hand_evidence.balanced(ev)
    first, second = (float(shared.source(k).weight.sum() / 21) for k in range(2))
    assert first < 12.01 and second < max(3.0, 12 - 3 * first) + 0.01


@pytest.mark.slow
@pytest.mark.parametrize("posed", [True, False])
def test_estimates_alone_are_enough(demo, posed):
    e = estimates_of(
        demo["right_joints"], demo["K"], np.broadcast_to(demo["right_pose"], (48, 16, 3)) if posed else None
    )
    given = (HandModel.open(), demo["K"], demo["object_poses"], np.ones(48, bool), None)
    fit = fit_grasp(*given, NOTHING, regressed=e)
    assert relative_error(fit.joints / fit.scale, demo["right_joints"]) < 7
    found = e.confidence.any(1)
    assert set(fit.reason[found]) == {"regressor"} and set(fit.reason[~found]) == {"carried by the grasp"}


@pytest.mark.slow
def test_estimates_help_where_landmarks_are_few(demo):
    lm = landmarks_of(demo["right_joints"], demo["K"], noise=12.0, missing=0.85)
    e = estimates_of(demo["right_joints"], demo["K"], np.broadcast_to(demo["right_pose"], (48, 16, 3)))
    given = (HandModel.open(), demo["K"], demo["object_poses"], np.ones(48, bool), None, lm)

    def at_scale(**kw) -> float:
        fit = fit_grasp(*given, object_points=demo["object_vertices"], mediapipe=False, **kw)
        return relative_error(fit.joints / fit.scale, demo["right_joints"])

    assert at_scale(regressed=e) < min(7.0, 0.7 * at_scale())


def test_the_direction_of_size_changes_size_alone(hand):
    v = hs.size_direction(hand)
    a, b = (hand.with_shape(x * v).vertices for x in (0.0, 1.0))
    s, R, t = rigid.umeyama(a, b)
    left = (s * a @ R.T + t - b).norm(dim=-1).mean()
    assert s > 1.05 and left < 4e-4  # against some 10 mm that the vertices move
    assert torch.allclose(hs.size_direction(hand.mirrored()), v, atol=1e-9)


@pytest.mark.slow
def test_a_regrasp_makes_two_windows(hand):
    motion = random_motion(48)
    state = random_state(2)
    pose = torch.zeros(2, 16, 3, dtype=F64)
    pose[0, 1:, 2], pose[1, 1:, 2] = 0.3, 0.7
    state = replace(
        state, rot=rigid.so3_exp(pose), betas=torch.zeros(2, 10, dtype=F64), log_scale=torch.zeros(2, dtype=F64)
    )
    y = hand.with_shape().joints(state.rot, torch.tensor([[0.1, 0.0, 0.03], [0.08, 0.06, -0.02]], dtype=F64)).numpy()
    joints = np.stack([y[int(f >= 22)] @ motion[f, :3, :3].T + motion[f, :3, 3] for f in range(48)])
    fit = fit_grasp(hand, K, motion, np.ones(48, bool), None, landmarks_of(joints, K), mediapipe=False)
    assert len(fit.windows) == 2 and abs(fit.windows[0][1] - 22) <= 2
    assert relative_error(fit.joints / fit.scale, joints) < 10


def test_without_an_object_the_hand_still_moves_smoothly(demo):
    lm = landmarks_of(demo["right_joints"], demo["K"], noise=2.0, missing=0.2)
    fit = fit_hand(HandModel.open(), demo["K"], lm, mediapipe=False)
    found = np.isfinite(lm.points).all((1, 2))
    assert relative_error(fit.joints[found], demo["right_joints"][found]) < 22
    assert np.isinf(fit.scale_std) and fit.scale == 1 and np.isfinite(fit.vertices).all()
    assert set(fit.reason[~found]) == {"not found"} and fit.confidence[~found].max() < fit.confidence[found].mean()


def test_no_landmarks_is_one_sentence(demo):
    with pytest.raises(StageFailed, match="no hand landmarks"):
        fit_grasp(HandModel.open(), demo["K"], demo["object_poses"], np.ones(48, bool), None, NOTHING)


def test_two_dimensional_landmarks_are_enough(demo):
    lm = landmarks_of(demo["right_joints"], demo["K"], noise=2.0, missing=0.2)
    flat = replace(lm, points3d=np.full_like(lm.points3d, np.nan))
    fit = fit_grasp(HandModel.open(), demo["K"], demo["object_poses"], np.ones(48, bool), None, flat, mediapipe=False)
    assert relative_error(fit.joints / fit.scale, demo["right_joints"]) < 10
