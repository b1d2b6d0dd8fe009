"""Splatting against a brute-force NumPy float64 reference, written from the equations and from nothing else here."""

import math

import numpy as np
import pytest
import torch

from handhold import kernels
from handhold.render import splat

compiled = pytest.mark.skipif(not kernels.available(), reason=f"no compiled kernels: {kernels.why_unavailable()}")
BACKENDS = [pytest.param("cpu", marks=compiled), "torch"]
KINDS = ("3d", "2d")
NAMES = ("means", "quats", "scales", "opacities", "colors", "viewmat", "K")


pytestmark = pytest.mark.usefixtures("one_thread")


def reference(means, quats, scales, opacities, colors, view, K, W, H, kind):
    """rgb, depth (premultiplied), alpha, median index, and which pixels a threshold could tip either way in float32."""
    fx, fy, cx, cy = K[0, 0], K[1, 1], K[0, 2], K[1, 2]
    px, py = np.meshgrid(np.arange(W) + 0.5, np.arange(H) + 0.5)
    T, out, median = np.ones((H, W)), np.zeros((H, W, 4)), np.full((H, W), -1)
    going, doubtful = np.ones((H, W), bool), np.zeros((H, W), bool)
    cam = means @ view[:3, :3].T + view[:3, 3]
    for i in np.argsort(cam[:, 2], kind="stable"):
        x, y, z = cam[i]
        if z < 0.01:
            continue
        w, a, b, c = quats[i] / np.linalg.norm(quats[i])
        skew = np.array([[0, -c, b], [c, 0, -a], [-b, a, 0]])
        R = view[:3, :3] @ (np.eye(3) + 2 * w * skew + 2 * skew @ skew)
        dx, dy, seen_z = px - (fx * x / z + cx), py - (fy * y / z + cy), z
        if kind == "3d":
            u = np.clip(x / z, -(cx + 0.15 * W) / fx, (1.15 * W - cx) / fx)
            v = np.clip(y / z, -(cy + 0.15 * H) / fy, (1.15 * H - cy) / fy)
            J = np.array([[fx / z, 0, -fx * u / z], [0, fy / z, -fy * v / z]])
            cov = J @ R @ np.diag(scales[i] ** 2) @ R.T @ J.T + 0.3 * np.eye(2)
            q = np.linalg.inv(cov)
            sigma = 0.5 * (q[0, 0] * dx**2 + 2 * q[0, 1] * dx * dy + q[1, 1] * dy**2)
        else:
            ray = np.stack([(px - cx) / fx, (py - cy) / fy, np.ones_like(px)], -1)
            # in the basis of the disk's axes and any third direction off its plane
            inside = np.linalg.inv(np.stack([R[:, 0] * scales[i, 0], R[:, 1] * scales[i, 1], R[:, 2]], 1))
            with np.errstate(divide="ignore", invalid="ignore"):
                t = (inside[2] @ cam[i]) / (ray @ inside[2])
                uv = (ray * t[..., None] - cam[i]) @ inside[:2].T
                rho = (uv**2).sum(-1)
                met = (t >= 0.01) & (rho <= 2 * (dx**2 + dy**2))
            sigma = 0.5 * np.where(met, rho, 2 * (dx**2 + dy**2))
            seen_z = np.where(met, t, z)
        alpha = np.minimum(0.999, opacities[i] * np.exp(-sigma))
        doubtful |= going & (np.abs(alpha * 255 - 1) < 2e-3)
        draw = going & (alpha >= 1 / 255)
        after = T * (1 - alpha)
        doubtful |= draw & ((np.abs(after * 1e4 - 1) < 2e-2) | (np.abs(after - 0.5) < 1e-5))
        going &= ~(draw & (after <= 1e-4))
        draw &= going
        weight = np.where(draw, alpha * T, 0)
        out[..., :3] += weight[..., None] * np.maximum(colors[i], 0 if colors.shape[1] != 3 else -np.inf)
        out[..., 3] += weight * seen_z
        median = np.where(draw & (T > 0.5) & (after <= 0.5), i, median)
        T = np.where(draw, after, T)
    return out, 1 - T, median, doubtful


def scene(seed, kind, most=60):
    """Random, with every kind of oddity in turn: float64 arrays that are exact in float32, and the image's size."""
    g = np.random.default_rng(seed)
    case = seed % 10
    n = 0 if case == 1 and seed < 20 else int(g.integers(1, most))
    W, H = [(24, 20), (24, 20), (1, 1), (7, 5), (33, 17)][int(g.integers(5))]
    f = float(g.uniform(0.8, 2.5)) * max(W, H)
    K = np.array([[f, 0, W / 2 + g.normal()], [0, f * g.uniform(0.8, 1.2), H / 2 + g.normal()], [0, 0, 1]])
    means = g.normal(size=(n, 3)) * [0.3, 0.3, 0.2] + [0, 0, 1.0]
    quats = g.normal(size=(n, 4))
    scales = np.exp(g.normal(size=(n, 3)) * 0.5 - 2.7)
    opacities = g.uniform(size=n)
    axis = g.normal(size=3) * 0.2
    theta = np.linalg.norm(axis)
    k = np.array([[0, -axis[2], axis[1]], [axis[2], 0, -axis[0]], [-axis[1], axis[0], 0]]) / theta
    view = np.eye(4)
    view[:3, :3] = np.eye(3) + math.sin(theta) * k + (1 - math.cos(theta)) * k @ k
    view[:3, 3] = g.normal(size=3) * 0.1
    if case == 2:  # principal point far out
        K[:2, 2] += g.choice([-1, 1], 2) * [1.5 * W, 0.7 * H]
        means[:, :2] -= (K[:2, 2] - [W / 2, H / 2]) / f
    if case == 3:  # behind and across the near plane
        means[:, 2] = g.uniform(-0.3, 0.3, n)
    if case == 4:
        opacities = g.choice([0.0, 1.0, 1 / 255, 0.5], n)
    if case == 5:
        scales *= 40
    if case == 6:
        scales *= 0.01
    if case == 7:  # needles and sheets
        scales *= np.exp(g.normal(size=(n, 3)) * 1.5)
    if case == 8:  # outside the frame, where the Jacobian is clamped
        means[:, :2] *= 6
        scales *= 4
    arrays = means, quats, scales, opacities, g.uniform(size=(n, 3)), view, K
    return [np.asarray(a, np.float32).astype(np.float64) for a in arrays], W, H


def render(arrays, W, H, kind, backend, dtype, grad=False):
    t = [torch.tensor(a, dtype=dtype, requires_grad=grad) for a in arrays]
    return t, splat(*t[:5], t[5][None], t[6][None], W, H, backend=backend, kind=kind)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_picture_equals_the_reference(backend, kind):
    """120 scenes. Only pixels that the reference calls doubtful may differ, and those are few."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    pixels = excused = drawn = 0
    for seed in range(120 if backend == "cpu" else 20):
        arrays, W, H = scene(seed, kind)
        want, alpha, median, doubtful = reference(*arrays, W, H, kind)
        _, r = render(arrays, W, H, kind, backend, dtype)
        got = torch.cat([r.color[0], r.depth[0] * r.alpha[0]], -1).double().numpy()
        error = np.abs(got - want).max(-1) / np.maximum(1, np.abs(want).max(-1))
        error = np.maximum(error, np.abs(r.alpha[0, ..., 0].double().numpy() - alpha))
        wrong = (error > 1e-4) | (r.median[0].numpy() != median)
        assert not (wrong & ~doubtful).any(), (seed, error.max())
        pixels, excused, drawn = pixels + W * H, excused + int(wrong.sum()), drawn + int((alpha > 0).sum())
    assert excused <= 1e-3 * pixels and drawn > 0.2 * pixels


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_differences_of_the_reference(backend, kind):
    """Along one random direction of every argument, K and camera included, in scenes of every kind."""
    dtype = torch.float32 if backend == "cpu" else torch.float64
    compared = skipped = 0
    for seed in range(2, 13):
        arrays, W, H = scene(seed, kind, 20)
        g = np.random.default_rng(seed)
        weight = g.normal(size=(H, W, 5))
        t, r = render(arrays, W, H, kind, backend, dtype, grad=True)
        out = torch.cat([r.color[0], r.depth[0] * r.alpha[0], r.alpha[0]], -1)
        (out * torch.tensor(weight, dtype=dtype)).sum().backward()

        def loss(a, weight=weight, W=W, H=H):
            rgbd, alpha, *_ = reference(*a, W, H, kind)
            return (np.concatenate([rgbd, alpha[..., None]], -1) * weight).sum()

        for j, name in enumerate(NAMES):
            v = g.normal(size=arrays[j].shape)
            if name == "scales":
                v *= arrays[j]
            if name == "viewmat":
                v[3] = 0
            if name == "K":
                v *= [[1, 0, 1], [0, 1, 1], [0, 0, 0]]
            got = t[j].grad.double().numpy()
            slopes = []
            for h in (2e-6, 1e-6):
                ends = [[*arrays[:j], arrays[j] + s * h * v, *arrays[j + 1 :]] for s in (1, -1)]
                slopes.append((loss(ends[0]) - loss(ends[1])) / (2 * h))
            size = max(abs(slopes[1]), np.linalg.norm(got * v), 1e-3)
            if abs(slopes[0] - slopes[1]) > 3e-4 * size:  # a pixel crossed a threshold within the step
                skipped += 1
                continue
            compared += 1
            assert abs((got * v).sum() - slopes[1]) < 1e-3 * size, (seed, name)
    assert skipped < 0.12 * (compared + skipped)


def test_a_gaussian_lands_where_its_centre_projects():
    """Item 32: K X within 0.01 px, and the principal point moves it by as much as it moves."""
    g = np.random.default_rng(0)
    for _ in range(20):
        x = np.append(g.uniform(-0.3, 0.3, 2), 1.0)
        K = np.array([[60.0, 0, 32 + g.normal()], [0, 55.0, 32 + g.normal()], [0, 0, 1]])
        centres = []
        for shift in (0.0, 10.0):
            K[0, 2] += shift
            t = torch.tensor
            r = splat(
                t(x)[None], t([[1.0, 0, 0, 0]]).double(), t([[0.02] * 3]).double(), t([0.5]).double(),
                torch.ones(1, 3).double(), torch.eye(4).double()[None], t(K)[None], 80, 64,
            )  # fmt: skip
            a = r.alpha[0, ..., 0].numpy()
            rows, cols = np.mgrid[:64, :80] + 0.5
            centres.append(np.array([(a * cols).sum(), (a * rows).sum()]) / a.sum())
            assert np.abs(centres[-1] - (K @ x)[:2] / x[2]).max() < 0.01
        assert abs(centres[1][0] - centres[0][0] - 10) < 0.01
