"""Least squares on the hand model's parameters with analytic Jacobians: the machinery under `tracking.grasp`.

A hand state is 61 numbers on a manifold: 48 rotation increments (16 joints, each in its own frame: flexion, abduction,
twist; the wrist about the axes of the hand), the wrist's translation, 10 shape coefficients. Joints depend on it
through closed-form derivatives, so one Gauss-Newton step for many hypotheses at once costs milliseconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..geometry import rigid
from ..hand import HandModel, PosedHand
from ..hand import joints as jt

F64 = torch.float64
N_ROT, N_HAND = 48, 51  # rotation increments; with translation
SHAPE = slice(51, 61)

# Rotation vectors of the fifteen finger joints of a hand that holds something, away from the open rest pose, in the
# joints' own frames (flexion, abduction, twist), radians: mean and standard deviation. Broad where anatomy is free.
_PRIOR = {
    "1": ((0.30, 0.0, 0.0), (0.50, 0.13, 0.06)),
    "2": ((0.40, 0.0, 0.0), (0.50, 0.03, 0.03)),
    "3": ((0.25, 0.0, 0.0), (0.40, 0.03, 0.03)),
    "thumb1": ((0.15, 0.1, 0.1), (0.35, 0.40, 0.30)),
    "thumb2": ((0.10, 0.0, 0.0), (0.35, 0.10, 0.08)),
    "thumb3": ((0.15, 0.0, 0.0), (0.45, 0.03, 0.03)),
}


def pose_prior(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (15,3) of the finger joints' angles in a grasp."""
    rows = [_PRIOR.get(n, _PRIOR[n[-1]]) for n in jt.MANO_NAMES[1:]]
    return torch.tensor([r[0] for r in rows], dtype=dtype), torch.tensor([r[1] for r in rows], dtype=dtype)


def _owners() -> tuple[list[int], Tensor]:
    """Bone that carries each OpenPose landmark (the one that ends at it), and (21,16): which joints' turns move it."""
    bone = [0] + [max(p, 0) for p in jt.MANO_PARENTS[1:]] + list(jt.MANO_TIP_PARENTS)
    owner = [bone[m] for m in jt.OPENPOSE_FROM_MANO]
    reach = torch.zeros(21, 16, dtype=F64)
    for i, k in enumerate(owner):
        while k >= 0:
            reach[i, k] = 1.0
            k = jt.MANO_PARENTS[k]
    return owner, reach


OWNER, REACH = _owners()

# How large hands are, along `size_direction`. One camera cannot tell: a larger hand further away looks the same. The
# open hand's mean is 208 mm long from the wrist's joint to the middle fingertip; adults' hands measure 187 +- 11 mm
# from wrist to fingertip (ANSUR II), which is a coefficient of about -1. This is half way between the two.
SIZE = -0.5

# Where a landmark network means another point than the model's joint: millimetres, right hand, in the rest axes of the
# bone that ends at the joint (fingers -x, back of the hand +y, thumb side +z). Measured for MediaPipe's network against
# the open hand on seven rendered clips, visible joints only; between clips it varies by 1-3 mm. Unmeasured ones are
# zero.
_MEDIAPIPE_MM = (
    (0, 0, 0), (10, -8, 4), (4, 3, 5), (0, 0, 0), (0, 0, 0),
    (10, 2, -3), (1, -4, -1), (0, -6, 0), (4, 3, -1),
    (6, 2, 1), (-2, -1, 2), (0, -3, 1), (5, -2, 1),
    (4, 1, 1), (-2, -5, -1), (-3, -6, -1), (5, -1, 3),
    (6, 1, 3), (-1, -2, -1), (-2, -5, -1), (3, -4, 2),
)  # fmt: skip


def landmark_offsets(model: HandModel) -> Tensor:
    """(21,3) metres from the model's joints to MediaPipe's landmarks; zero for models it was not measured on."""
    if not model.name.startswith("open_hand"):
        return torch.zeros(21, 3, dtype=F64)
    return 1e-3 * torch.tensor(_MEDIAPIPE_MM, dtype=F64) * (torch.tensor([-1.0, 1, 1]) if model.side == "left" else 1.0)


FARTHEST = math.log(100)  # times an object's distance, and its inverse: evidence at odds would drive a scale for ever


@dataclass(frozen=True, eq=False)
class HandState:
    """S hands. Rotations are absolute (no pose mean), the first places the hand in its frame."""

    rot: Tensor  # (S,16,3,3)
    transl: Tensor  # (S,3) metres, the model's own convention
    betas: Tensor  # (S,10)
    log_scale: Tensor  # (S,) metres per unit of the frame that carries the hand

    def __getitem__(self, i) -> HandState:
        return HandState(self.rot[i], self.transl[i], self.betas[i], self.log_scale[i])

    def retract(self, step: Tensor, frames: Tensor) -> HandState:
        """Move along step (S,62) = rotations, translation, betas, log scale."""
        w = step[:, :N_ROT].reshape(-1, 16, 3)
        w = torch.cat([w[:, :1], torch.einsum("kca,ska->skc", frames, w[:, 1:])], 1)
        return HandState(
            self.rot @ rigid.so3_exp(w),
            self.transl + step[:, 48:51],
            self.betas + step[:, SHAPE],
            (self.log_scale + step[:, 61]).clamp(-FARTHEST, FARTHEST),
        )

    def angles(self, frames: Tensor) -> Tensor:
        """(S,15,3) flexion, abduction, twist."""
        return torch.einsum("kca,skc->ska", frames, rigid.so3_log(self.rot[:, 1:]))


def landmark_points(posed: PosedHand, offset: Tensor) -> Tensor:
    """(S,J,3) the points that each source means: the joints, moved by offset (J,3) in their bones' axes; J = 21 a
    source."""
    m = len(offset) // 21
    return posed.joints.repeat(1, m, 1) + (posed.global_rotations[:, OWNER * m] @ offset[..., None])[..., 0]


def joints_and_jacobian(model: HandModel, state: HandState, offset: Tensor) -> tuple[Tensor, Tensor]:
    """Landmark points (S,J,3), OpenPose order, and their derivative (S,J,3,61) by rotations, translation, betas."""
    posed = model.with_shape(state.betas).with_pose(state.rot, state.transl)
    y, a, p = landmark_points(posed, offset), posed.global_rotations, posed.mano_joints
    axes = torch.cat([a[:, :1], a[:, 1:] @ model.joint_frames], 1)  # (S,16,3,3) columns: axes of the increments
    s, n = y.shape[:2]
    arm = y[:, :, None] - p[:, None]  # (S,J,16,3)
    turn = torch.linalg.cross(
        axes.mT[:, None].expand(-1, n, -1, -1, -1), arm[:, :, :, None].expand(-1, -1, -1, 3, -1), dim=-1
    )
    turn = turn * REACH.to(y).repeat(n // 21, 1)[:, :, None, None]
    jd = model.joint_bases[1]
    shape: list[Tensor] = []
    for j, up in enumerate(model.parents):
        shape.append(jd[j].expand(s, 3, -1) if up < 0 else shape[up] + a[:, up] @ (jd[j] - jd[up]))
    for tip, up in zip(model.tip_ids.tolist(), jt.MANO_TIP_PARENTS, strict=True):
        shape.append(shape[up] + a[:, up] @ (model.shapedirs[tip] - jd[up]))
    by_shape = torch.stack([shape[m] for m in jt.OPENPOSE_FROM_MANO], 1).repeat(1, n // 21, 1, 1)
    by_transl = torch.eye(3, dtype=y.dtype).expand(s, n, 3, 3)
    return y, torch.cat([turn.reshape(s, n, N_ROT, 3).mT, by_transl, by_shape], -1)


def geman_mcclure(r2: Tensor) -> tuple[Tensor, Tensor]:
    """rho = r2 / (1 + r2) and its weight d rho / d r2, for squared residuals in units of the scale."""
    w = 1 / (1 + r2)
    return r2 * w, w * w


@dataclass(frozen=True, eq=False)
class Evidence:
    """What N frames say, in the camera, about each of S hands (B = 1: the same frames for all, else B = S).

    J is 21 for each source of landmarks: a landmark network, then a regressor.
    """

    K: Tensor  # (3,3)
    offset: Tensor  # (J,3) from the model's joints to the points these landmarks mean, see `landmark_points`
    rot: Tensor  # (B,N,3,3) camera from carrier (the object, or the camera itself), rotation
    t: Tensor  # (B,N,3) translation in the carrier's units
    points: Tensor  # (B,N,J,2) pixels
    weight: Tensor  # (B,N,J) >= 0, zero where nothing was found
    size: Tensor  # (B,N) pixels per 0.1 m of hand: residuals are judged against it
    points3d: Tensor  # (B,N,J,3) metres up to scale, each source's about their mean, axes of the camera (ray-corrected)
    weight3d: Tensor  # (B,N,J)
    angles: Tensor  # (B,N,15,3) the finger joints' flexion, abduction, twist as a regressor sees them, radians
    weight_angles: Tensor  # (B,N,15)

    def map(self, f) -> Evidence:
        """The same function on every per-frame tensor."""
        return Evidence(self.K, self.offset, *(f(getattr(self, k)) for k in list(self.__dataclass_fields__)[2:]))

    def frames(self, rows: Tensor) -> Evidence:
        """Only some frames, for all hands."""
        return self.map(lambda x: x[:, rows])

    def source(self, k: int) -> Evidence:
        """One source of landmarks alone."""
        at = slice(21 * k, 21 * k + 21)
        per_joint = {n: getattr(self, n)[:, :, at] for n in ("points", "weight", "points3d", "weight3d")}
        return replace(self, offset=self.offset[at], **per_joint)

    @property
    def sources(self) -> int:
        return len(self.offset) // 21

    def apart(self) -> Evidence:
        """One hand per frame: (1,N) -> (N,1)."""
        return self.map(lambda x: x.transpose(0, 1))


@dataclass(frozen=True)
class Terms:
    """Scales and weights of the terms."""

    sigma: float = 0.05  # of `Evidence.size`: 5 mm on the hand
    sigma3d: float = 0.02  # metres
    sigma_angles: float = 0.3  # radians
    weight2d: float = 1.0
    weight3d: float = 0.6
    weight_angles: float = 0.2
    prior: float = 1.0
    limits: float = 40.0  # 1/rad
    betas: float = 1.0
    size: float = 30.0  # the same along `size_direction`: what evidence seems to say of size is its bias
    near: float = 0.25  # metres: hand to the object's middle
    log_scale: float = 0.0  # what is known of the scale beforehand,
    log_scale_std: float = math.inf  # and how well


def ray_rotation(points: Tensor, K: Tensor) -> Tensor:
    """(N,3,3) rotation from the optical axis to the ray through the mean of the points (N,21,2).

    Landmark regressors see a crop as if it lay on the optical axis; this turns their 3D output to the true camera.
    """
    mid = points.mean(-2)
    ray = torch.stack(
        [(mid[:, 0] - K[0, 2]) / K[0, 0], (mid[:, 1] - K[1, 2]) / K[1, 1], torch.ones_like(mid[:, 0])], -1
    )
    ray = torch.nn.functional.normalize(ray, dim=-1)
    z = torch.tensor([0.0, 0.0, 1.0], dtype=ray.dtype)
    axis = torch.linalg.cross(z.expand_as(ray), ray)
    s = axis.norm(dim=-1, keepdim=True)
    angle = torch.atan2(s, ray[:, 2:])
    return rigid.so3_exp(axis / s.clamp_min(1e-12) * angle)


def size_direction(model: HandModel, shown: float = 5e-4) -> Tensor:
    """(B,) unit vector of shape coefficients that make the hand larger and show in nothing else.

    (RᵀR / shown² + 1)⁻¹ ∇log size, where R is what is left of each coefficient's effect on the vertices after a change
    of size, root mean square, and `shown` the change of shape in metres that can just be seen.
    """
    v = model.v_template - model.v_template.mean(0)
    d = model.shapedirs - model.shapedirs.mean(0)
    grow = torch.einsum("vc,vcb->b", v, d) / v.square().sum()
    rest = (d - grow * v[..., None]).flatten(0, 1) / (shown * len(v) ** 0.5)
    x = torch.linalg.solve(rest.mT @ rest + torch.eye(len(grow), dtype=v.dtype), grow)
    return x / x.norm()


@dataclass(frozen=True, eq=False)
class System:
    """Normal equations of S hypotheses."""

    cost: Tensor  # (S,)
    H: Tensor  # (S,62,62)
    g: Tensor  # (S,62)


def assemble(
    model: HandModel,
    state: HandState,
    ev: Evidence,
    terms: Terms,
    share: Tensor,
    centre: Tensor | None,
    jacobian: bool = True,
) -> System:
    """Cost and normal equations of one grasp per hypothesis over all frames.

    share (S,N): how much each frame counts for each hypothesis (windows); centre (3,) the object's middle in its own
    units, or None.
    """
    s = len(state.rot)
    y, D = joints_and_jacobian(model, state, ev.offset)
    scale = state.log_scale.exp()
    moved = scale[:, None, None] * ev.t  # (S,N,3)
    cam = y[:, None] @ ev.rot.mT + moved[:, :, None]
    z = cam[..., 2].clamp_min(0.02)
    f = torch.stack([ev.K[0, 0], ev.K[1, 1]])
    pix = cam[..., :2] / z[..., None] * f + ev.K[:2, 2]
    unit = (terms.sigma * ev.size)[..., None]
    r = (pix - ev.points) / unit[..., None]
    r2 = r.square().sum(-1) + 100.0 * (cam[..., 2] < 0.02)
    rho, w = geman_mcclure(r2)
    base = terms.weight2d * share[:, :, None] * ev.weight
    cost = (base * rho).sum((1, 2))
    w = base * w

    # 3D landmarks, about their mean; the model is scaled to each frame's landmarks, never the other way round: a
    # residual that shrinks with the hand would shrink the hand, and the object's scale with it
    j = y.shape[1]
    m = j // 21  # sources, each with its own mean and scale
    y0 = y.reshape(s, 1, m, 21, 3)
    y0 = y0 - y0.mean(3, keepdim=True)
    local = (ev.points3d @ ev.rot).unflatten(2, (m, 21))  # in the carrier's axes
    fit = (y0 * local).sum((3, 4), keepdim=True) / y0.square().sum((3, 4), keepdim=True)
    fit = fit.clamp(0.6, 1.6)
    base3 = terms.weight3d * share[:, :, None] * ev.weight3d
    for _ in range(2):
        q = (fit * y0 - local) / terms.sigma3d
        rho3, w3 = geman_mcclure(q.square().sum(-1, keepdim=True))
        size = (w3 * y0.square()).sum((3, 4), keepdim=True).clamp_min(1e-12)
        fit = ((w3 * y0 * local).sum((3, 4), keepdim=True) / size).clamp(0.6, 1.6)
    cost = cost + (base3 * rho3.reshape(*rho3.shape[:2], j)).sum((1, 2))
    w3 = base3 * w3.reshape(*w3.shape[:2], j)
    q, fit = q.flatten(2, 3), fit[..., 0].expand(-1, -1, -1, 21).flatten(2)

    frames = model.joint_frames
    angle = state.angles(frames)
    mean, std = (x.to(angle) for x in pose_prior())
    lim = torch.tensor(jt.LIMITS, dtype=angle.dtype)
    over = (angle - lim[..., 1]).clamp_min(0) - (lim[..., 0] - angle).clamp_min(0)
    bend = (angle[:, None] - ev.angles) / terms.sigma_angles  # (S,N,15,3)
    rho_a, w_a = geman_mcclure(bend.square().sum(-1))
    base_a = terms.weight_angles * share[:, :, None] * ev.weight_angles
    cost = cost + (base_a * rho_a).sum((1, 2))
    w_a = base_a * w_a
    cost = cost + 0.5 * terms.prior * ((angle - mean) / std).square().sum((1, 2))
    cost = cost + 0.5 * terms.limits * over.square().sum((1, 2)) * 10
    larger = size_direction(model)
    off_size = (state.betas @ larger - (SIZE if model.name.startswith("open_hand") else 0.0))[:, None]
    cost = cost + 0.5 * terms.betas * (state.betas.square().sum(1) + terms.size * off_size[:, 0].square())
    scale_off = (state.log_scale - terms.log_scale) / terms.log_scale_std
    cost = cost + 0.5 * scale_off.square()
    off = None
    if centre is not None:
        off = (y.mean(1) - scale[:, None] * centre) / terms.near
        cost = cost + 0.5 * off.square().sum(1)
    if not jacobian:
        return System(cost, cost, cost)

    # 2D: derivative by (joint in the carrier, log scale) is 2x4 per frame and joint; frames add up per joint
    P = torch.zeros(*cam.shape[:-1], 2, 3, dtype=y.dtype)
    P[..., 0, 0], P[..., 1, 1] = f[0] / z, f[1] / z
    P[..., :, 2] = -cam[..., :2] / z[..., None] ** 2 * f
    A = torch.cat([P @ ev.rot[:, :, None], P @ moved[:, :, None, :, None]], -1) / unit[..., None, None]
    Hj = 2 * torch.einsum("snj,snjra,snjrb->sjab", w, A, A)
    gj = 2 * torch.einsum("snj,snjra,snjr->sja", w, A, r)
    D4 = torch.zeros(s, j, 4, 62, dtype=y.dtype)
    D4[:, :, :3, :61] = D
    D4[:, :, 3, 61] = 1
    D4 = D4.reshape(s, 4 * j, 62)
    H = D4.mT @ (Hj @ D4.reshape(s, j, 4, 62)).reshape(s, 4 * j, 62)
    g = (D4.mT @ gj.reshape(s, 4 * j, 1))[..., 0]
    D0 = D.unflatten(1, (m, 21))
    D0 = (D0 - D0.mean(2, keepdim=True)).flatten(1, 2)
    h3 = 2 * (w3 * fit**2).sum(1) / terms.sigma3d**2  # (S,J)
    g3 = 2 * torch.einsum("snj,snja->sja", w3 * fit, q) / terms.sigma3d
    flat = D0.reshape(s, 3 * j, 61)
    H[:, :61, :61] += flat.mT @ (flat * h3.repeat_interleave(3, 1)[..., None])
    g[:, :61] += (flat * g3.reshape(s, 3 * j, 1)).sum(1)

    Jr = torch.linalg.inv(rigid.right_jacobian(angle))  # angles by increments
    h_a = 2 * w_a.sum(1)[..., None] / terms.sigma_angles**2
    curve = torch.diag_embed(terms.prior / std**2 + 10 * terms.limits * (over != 0) + h_a)
    blocks = Jr.mT @ curve @ Jr
    slope = terms.prior * (angle - mean) / std**2 + 10 * terms.limits * over
    slope = slope + 2 * (w_a[..., None] * bend).sum(1) / terms.sigma_angles
    down = (Jr.mT @ slope[..., None])[..., 0]
    for k in range(15):
        at = slice(3 + 3 * k, 6 + 3 * k)
        H[:, at, at] += blocks[:, k]
    g[:, 3:48] += down.reshape(s, 45)
    H[:, SHAPE, SHAPE] += terms.betas * (torch.eye(10, dtype=y.dtype) + terms.size * larger[:, None] * larger)
    g[:, SHAPE] += terms.betas * (state.betas + terms.size * off_size * larger)
    H[:, 61, 61] += terms.log_scale_std**-2
    g[:, 61] += scale_off / terms.log_scale_std
    if off is not None:
        C = torch.cat([D.mean(1), -(scale[:, None] * centre)[..., None]], -1) / terms.near
        H = H + C.mT @ C
        g = g + (C.mT @ off[..., None])[..., 0]
    return System(cost, H, g)


def minimise(
    model: HandModel,
    state: HandState,
    ev: Evidence,
    terms: Terms,
    share: Tensor,
    centre: Tensor | None = None,
    iterations: int = 40,
    free: Tensor | None = None,
) -> tuple[HandState, Tensor]:
    """Levenberg-Marquardt on all hypotheses side by side. free (62,) bool: parameters that may move. Returns states,
    costs."""
    free = torch.ones(62, dtype=torch.bool) if free is None else free
    lam = torch.full((len(state.rot),), 1e-3, dtype=state.transl.dtype)
    sys = assemble(model, state, ev, terms, share, centre)
    for _ in range(iterations):
        H = sys.H[:, free][:, :, free]
        d = H.diagonal(dim1=1, dim2=2)
        damp = torch.diag_embed(lam[:, None] * (d + 1e-3 * d.amax(1, keepdim=True)) + 1e-9)
        part, info = torch.linalg.cholesky_ex(H + damp)
        step = torch.zeros_like(sys.g)
        solved = torch.cholesky_solve(-sys.g[:, free][..., None], part)[..., 0]
        step[:, free] = torch.where((info == 0)[:, None], solved, torch.zeros_like(solved))
        size = step[:, :N_ROT].abs().amax(1).clamp_min(1e-12)
        step = step * (0.7 / size).clamp_max(1.0)[:, None]
        trial = state.retract(step, model.joint_frames)
        new = assemble(model, trial, ev, terms, share, centre)
        better = (new.cost < sys.cost) & (info == 0)
        gain = ((sys.cost - new.cost) / sys.cost.clamp_min(1e-9))[better]
        pick = lambda a, b: torch.where(better.reshape(-1, *[1] * (a.dim() - 1)), a, b)  # noqa: E731,B023
        state = HandState(
            *(pick(getattr(trial, k), getattr(state, k)) for k in ("rot", "transl", "betas", "log_scale"))
        )
        sys = System(pick(new.cost, sys.cost), pick(new.H, sys.H), pick(new.g, sys.g))
        lam = torch.where(better, lam * 0.3, lam * 6).clamp(1e-7, 1e6)
        if (len(gain) == 0 and bool((lam > 1e4).all())) or (
            len(gain) and bool(better.all()) and float(gain.max()) < 1e-6
        ):
            break
    return state, sys.cost


def minimise_shared(
    model: HandModel,
    state: HandState,
    ev: Evidence,
    terms: Terms,
    share: Tensor,
    centre: Tensor | None,
    iterations: int = 20,
    extra: Callable[[HandState], tuple[Tensor, Tensor, Tensor]] | None = None,
) -> tuple[HandState, Tensor, float]:
    """W hands (windows) with their own pose and placement but one shape and one scale, solved together.

    `extra(state)` may add a term: cost (W,), H (W,62,62), g (W,62).
    Returns the states, their costs (W,), and the standard deviation of the log scale from the curvature at the optimum.
    """
    w = len(state.rot)
    terms = replace(terms, betas=terms.betas / w, log_scale_std=terms.log_scale_std * math.sqrt(w))
    own = torch.arange(w * N_HAND).reshape(w, N_HAND)
    index = torch.cat([own, (w * N_HAND + torch.arange(11)).expand(w, 11)], 1)  # (W,62) into the joint system
    n = w * N_HAND + 11

    def system(x: HandState) -> System:
        base = assemble(model, x, ev, terms, share, centre)
        return (
            base
            if extra is None
            else System(*(a + b for a, b in zip((base.cost, base.H, base.g), extra(x), strict=True)))
        )

    sys, lam = system(state), 1e-3

    def joint(sys: System) -> tuple[Tensor, Tensor]:
        H, g = torch.zeros(n * n, dtype=F64), torch.zeros(n, dtype=F64)
        H.index_add_(0, (index[:, :, None] * n + index[:, None, :]).flatten(), sys.H.flatten())
        return H.reshape(n, n), g.index_add_(0, index.flatten(), sys.g.flatten())

    H, g = joint(sys)
    for _ in range(iterations):
        step = torch.linalg.solve(H + torch.diag(lam * H.diagonal() + 1e-9), -g)[index].clamp(-0.5, 0.5)
        trial = state.retract(step, model.joint_frames)
        new = system(trial)
        if new.cost.sum() < sys.cost.sum():
            small = float(sys.cost.sum() - new.cost.sum()) < 1e-6 * float(sys.cost.sum())
            state, sys, lam = trial, new, lam * 0.3
            H, g = joint(sys)
            if small:
                break
        else:
            lam *= 8
            if lam > 1e5:
                break
    variance = torch.linalg.inv(H + 1e-9 * torch.eye(n, dtype=F64))[-1, -1]
    return orthonormal(state), sys.cost, float(variance.clamp_min(0).sqrt())


def orthonormal(state: HandState) -> HandState:
    """Remove the drift of many products from the rotations."""
    return replace(state, rot=rigid.nearest_rotation(state.rot))
