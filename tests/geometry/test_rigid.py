"""Laws of SO(3), SE(3) and similarities."""

import math

import pytest
import torch

from handhold.geometry import rigid

F64 = torch.float64


def random_rotations(n: int, seed: int = 0) -> torch.Tensor:
    return rigid.matrix_from_quat(torch.randn(n, 4, dtype=F64, generator=torch.Generator().manual_seed(seed)))


def axis(n: int, seed: int = 1) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(n, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


@pytest.mark.parametrize("angle", [0.0, 1e-7, 1e-3, 0.09, 0.11, 1.0, 3.0, math.pi - 1e-4, math.pi - 1e-9])
def test_log_inverts_exp(angle):
    w = axis(50) * angle
    assert (rigid.so3_log(rigid.so3_exp(w)) - w).abs().max() < 1e-6


def test_exp_is_a_rotation_and_matches_the_matrix_exponential():
    w = axis(20) * torch.linspace(0, 6, 20, dtype=F64)[:, None]
    r = rigid.so3_exp(w)
    assert (r.mT @ r - torch.eye(3)).abs().max() < 1e-12
    assert (torch.linalg.det(r) - 1).abs().max() < 1e-12
    assert (r - torch.linalg.matrix_exp(rigid.hat(w))).abs().max() < 1e-12


def test_half_turn_keeps_its_axis():
    r = rigid.so3_exp(torch.tensor([[math.pi, 0, 0], [0, math.pi, 0], [0, 0, math.pi]], dtype=F64))
    assert torch.allclose(rigid.so3_log(r).abs(), math.pi * torch.eye(3, dtype=F64), atol=1e-9)


def test_gradients_are_finite_at_zero_in_float32():
    w = torch.zeros(4, 3, requires_grad=True)
    rigid.so3_log(rigid.so3_exp(w)).sum().backward()
    assert torch.allclose(w.grad, torch.ones(4, 3), atol=1e-5)


@pytest.mark.parametrize("size", [0.0, 1e-3, 0.5, 2.5])
def test_gradcheck_exp_and_log(size):
    w = (axis(2) * size).requires_grad_()
    assert torch.autograd.gradcheck(rigid.so3_exp, (w,), eps=1e-6, atol=1e-6)
    assert torch.autograd.gradcheck(lambda x: rigid.so3_log(rigid.so3_exp(x)), (w,), eps=1e-6, atol=1e-5)


def test_right_jacobian_is_the_derivative_of_exp():
    w, d = axis(10) * 1.3, 1e-6 * axis(10, 7)
    step = rigid.so3_log(rigid.so3_exp(w).mT @ rigid.so3_exp(w + d))
    assert (step - (rigid.right_jacobian(w) @ d[..., None])[..., 0]).abs().max() < 1e-11


def test_quaternions_round_trip_and_multiply():
    a, b = random_rotations(100), random_rotations(100, 1)
    qa, qb = rigid.quat_from_matrix(a), rigid.quat_from_matrix(b)
    assert (rigid.matrix_from_quat(qa) - a).abs().max() < 1e-12
    assert (rigid.matrix_from_quat(rigid.quat_multiply(qa, qb)) - a @ b).abs().max() < 1e-12
    assert (qa[:, 0] >= 0).all()


def test_6d_holds_the_first_two_columns():
    r = random_rotations(20)
    six = rigid.sixd_from_matrix(r)
    assert torch.equal(six[:, :3], r[:, :, 0])
    assert (rigid.matrix_from_6d(six) - r).abs().max() < 1e-12
    loose = rigid.matrix_from_6d(torch.randn(20, 6, dtype=F64))
    assert (loose.mT @ loose - torch.eye(3)).abs().max() < 1e-12


def test_rigid_group_axioms():
    xi = torch.randn(30, 6, dtype=F64, generator=torch.Generator().manual_seed(3))
    a, b, c = rigid.se3_exp(xi[:10]), rigid.se3_exp(xi[10:20]), rigid.se3_exp(xi[20:])
    eye = torch.eye(4, dtype=F64)
    assert (rigid.compose(a, rigid.invert(a)) - eye).abs().max() < 1e-12
    assert (rigid.compose(rigid.compose(a, b), c) - rigid.compose(a, rigid.compose(b, c))).abs().max() < 1e-12
    x = torch.randn(10, 5, 3, dtype=F64)
    assert (rigid.apply(a, rigid.apply(b, x)) - rigid.apply(rigid.compose(a, b), x)).abs().max() < 1e-12
    small = 0.9 * xi[:10] / xi[:10, 3:].norm(dim=-1, keepdim=True)
    assert (rigid.se3_log(rigid.se3_exp(small)) - small).abs().max() < 1e-10


def test_geodesic_slerp_and_mean():
    a, b = random_rotations(10), random_rotations(10, 5)
    d = rigid.geodesic(a, b)
    assert (rigid.geodesic(a, rigid.slerp(a, b, 0.25)) - 0.25 * d).abs().max() < 1e-7
    assert (rigid.slerp(a, b, 1.0) - b).abs().max() < 1e-7
    pair = torch.stack([a[0], b[0]])
    mid = rigid.mean_rotation(pair)
    assert abs(float(rigid.geodesic(mid, a[0]) - rigid.geodesic(mid, b[0]))) < 1e-6


def test_umeyama_recovers_a_similarity_and_ignores_zero_weights():
    x = torch.randn(3, 20, 3, dtype=F64)
    s, r, t = torch.tensor([0.3, 1.0, 4.0], dtype=F64), random_rotations(3), torch.randn(3, 3, dtype=F64)
    y = s[:, None, None] * x @ r.mT + t[:, None]
    y[:, 0] += 100
    w = torch.ones(20, dtype=F64)
    w[0] = 0
    s2, r2, t2 = rigid.umeyama(x, y, w)
    assert (s - s2).abs().max() < 1e-10 and (r - r2).abs().max() < 1e-10 and (t - t2).abs().max() < 1e-10


def test_umeyama_never_reflects():
    x = torch.randn(20, 3, dtype=F64)
    _, r, _ = rigid.umeyama(x, x * torch.tensor([-1.0, 1, 1]))
    assert torch.linalg.det(r) > 0
