"""Skin: where on the hand it is palm, nail or crease, and what colour and relief it has there.

The tone has two parameters, after the melanin and haemoglobin axes of measured skin (Tsumura et al., "Image-based
skin color and texture analysis/synthesis by extracting hemoglobin and melanin information", SIGGRAPH 2003): a path of
optical densities from pale to dark, and a red absorber on top.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ...hand import joints as jt
from ...hand.model import HandModel
from .filters import pick

ATTRIBUTES = ("palm", "red", "nail_across", "nail_along", "nail_up", "crease1", "crease2", "crease3", "finger")
"""Columns of `skin_attributes`. All zero means bare skin without any of them, as on a forearm. palm 0 back to 1 palm;
red 0 to 1; nail_across and nail_along in half nails from its middle where nail_up > 0.2; crease k is one metre plus the
signed distance along the finger from its joint k; finger 1 thumb to 5 little."""
EXTRA = ("red", "polish", "crease", "mottle", "hair", "ring_finger", "ring_place", "palm_light")
# Linear reflectance from pale to dark skin at even steps of melanin.
_TONES = ((0.80, 0.58, 0.46), (0.70, 0.44, 0.32), (0.58, 0.32, 0.20), (0.41, 0.20, 0.115), (0.235, 0.105, 0.060),
          (0.115, 0.052, 0.033), (0.052, 0.028, 0.021))  # fmt: skip


def skin_attributes(model: HandModel) -> Tensor:
    """(V,A) of ATTRIBUTES for either hand, from its rest pose; compute once."""
    right = model if model.side == "right" else model.mirrored()
    v = right.v_template.double().cpu()
    right = right.to(device="cpu")
    faces = right.faces
    joints = torch.cat([right.joint_bases[0], right.v_template[right.tip_ids]]).double()
    frames = right.joint_frames.double()  # flexion, abduction, twist axes
    normal = _normals(v, faces)
    bone = right.weights.argmax(1)
    dorsal = torch.tensor([0.0, 1.0, 0.0], dtype=v.dtype).expand(16, 3).clone()
    dorsal[1:] = torch.where((frames[:, :, 1] @ dorsal[0])[:, None] > 0, 1.0, -1.0) * frames[:, :, 1]
    dorsal[13:] = frames[12:, :, 1] * torch.where((frames[12:, :, 1] @ _thumb_back(joints)) > 0, 1.0, -1.0)[:, None]
    up = (normal * dorsal[bone]).sum(1)
    palm = torch.sigmoid(-(up + 0.1) * 6)
    out = torch.zeros(len(v), len(ATTRIBUTES), dtype=v.dtype)
    out[:, 0] = palm
    red = torch.zeros(len(v), dtype=v.dtype)
    for f, tip_joint in enumerate(jt.MANO_TIP_PARENTS):
        chain = [tip_joint - 2, tip_joint - 1, tip_joint]
        mine = torch.isin(bone, torch.tensor(chain))
        out[mine, 8] = f + 1.0
        tip = joints[16 + f]
        frame = frames[tip_joint - 1]
        for k, j in enumerate(chain):
            along = frames[j - 1, :, 2]
            reach = (v - joints[j]).norm(dim=1) < 0.035
            out[mine & reach, 5 + k] = 1.0 + ((v - joints[j]) @ along)[mine & reach]
            red += 0.5 * torch.exp(-(((v - joints[j]).norm(dim=1) / 0.011) ** 2)) * (1 - palm)
        last = bone == tip_joint
        length = (tip - joints[tip_joint]).norm()
        local = v - tip
        across, along = local @ frame[:, 0], local @ frame[:, 2]
        half = across[last].abs().quantile(0.9) * 0.72
        middle = -0.27 * length
        out[last, 2] = (across / half)[last]
        out[last, 3] = ((along - middle) / (0.27 * length))[last]
        out[last, 4] = (normal @ dorsal[tip_joint])[last]
        red += torch.exp(-((local.norm(dim=1) / 0.016) ** 2)) * (0.4 + 0.6 * palm)
    wrist = (v - joints[0]).norm(dim=1)
    red += palm * torch.exp(-(((wrist - 0.03) / 0.03) ** 2)) * 0.5 + 0.25 * palm
    out[:, 1] = red.clamp(0, 1)
    return out.to(model.dtype).to(model.device)


def _thumb_back(joints: Tensor) -> Tensor:
    """Direction that the thumb's nail faces at rest: away from the palm's middle, square to the thumb."""
    along = torch.nn.functional.normalize(joints[16] - joints[14], dim=0)
    away = joints[14] - 0.5 * (joints[0] + joints[4])
    away = away + 0.02 * torch.tensor([0.0, 1.0, 0.0], dtype=joints.dtype)
    return torch.nn.functional.normalize(away - (away @ along) * along, dim=0)


def _normals(v: Tensor, faces: Tensor) -> Tensor:
    a, b, c = (v[faces[:, k]] for k in range(3))
    n = torch.linalg.cross(b - a, c - a)
    out = torch.zeros_like(v)
    for k in range(3):
        out.index_add_(0, faces[:, k], n)
    return torch.nn.functional.normalize(out, dim=1)


def tone(melanin: Tensor, haemoglobin: Tensor) -> Tensor:
    """(*,3) linear reflectance of melanin and haemoglobin in [0,1] each."""
    density = -torch.tensor(_TONES, dtype=melanin.dtype, device=melanin.device).log()
    at = melanin.clamp(0, 1) * (len(density) - 1)
    low = at.long().clamp(max=len(density) - 2)
    d = density[low] + (density[low + 1] - density[low]) * (at - low)[..., None]
    red = torch.tensor([0.0, 0.32, 0.26], dtype=d.dtype, device=d.device)
    return (-(d + red * (haemoglobin[..., None] - 0.4))).exp().clamp(0.01, 0.9)


def sample(n: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tones (n,3), nail polish colours (n,3), EXTRA (n,8) and roughness (n), the whole human range."""
    g = generator

    def u() -> Tensor:
        return torch.rand(n, generator=g)

    tones = tone(u() ** 1.25, u()) * (1 + 0.03 * torch.randn(n, 3, generator=g))
    polish = torch.stack([0.3 + 0.6 * u(), 0.5 * u() ** 2, 0.5 * u() ** 2], 1)
    polish = torch.where((u() < 0.3)[:, None], torch.rand(n, 3, generator=g) ** 2, polish)
    extra = torch.stack(
        [
            0.4 + 0.9 * u(),
            (u() < 0.12).float() * (0.5 + 0.5 * u()),
            0.3 + 1.2 * u(),
            0.3 + u(),
            (u() < 0.4).float() * u(),
            torch.where(u() < 0.15, (1 + 5 * u()).floor(), torch.zeros(n)),
            0.25 + 0.3 * u(),
            0.4 + 0.8 * u(),
        ],
        1,
    )
    return tones.clamp(0.01, 0.9), polish, extra, 0.35 + 0.35 * u()


def evaluate(
    colors: Tensor,
    extra: Tensor,
    offset: Tensor,
    rough: Tensor,
    canon: Tensor,
    attrs: Tensor | None,
    footprint: Tensor,
    noise: Callable[[Tensor], Tensor],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Albedo (3,N), relief (N) metres, roughness (N) and reflectance (N) of skin at points.

    colors (N,4,3), extra (8,N), offset (3,N) of each point's material; canon (3,N) metres; attrs (A,N) of ATTRIBUTES.
    """
    base = colors[:, 0].T.contiguous()
    broad = noise(canon / 0.09 + offset)  # mottles from 4.5 cm down
    fine = noise(canon / 0.016 + offset)  # 8 mm to 0.7 mm
    shown = (1 - footprint / 0.004).clamp(0, 1)
    density = (0.035 * broad[0] + 0.03 * fine[0]) * extra[3]
    blush = 0.05 * broad[1] * extra[3]
    height = 3e-5 * fine[1] * shown
    f0 = torch.full_like(rough, 0.035)
    rough = (rough + 0.1 * fine[3]).clamp(0.25, 1)
    if attrs is None:
        return _absorbed(base, density, blush), height, rough, f0
    palm, red = attrs[0], attrs[1]
    # Palms have little melanin: dark skin is much lighter there.
    light = _column(base, 0.56, 0.30, 0.21)
    pale = (base * 0.35 + 0.65 * light).maximum(base)
    base = base + (pale - base) * (palm * 0.75 * extra[7].clamp(0, 1))
    blush = blush + 0.24 * red * extra[0]
    hairs = noise(canon * _column(canon, 25.0, 140.0, 140.0) + offset)[3]
    density = density + 0.5 * extra[4] * (1 - palm) * (hairs - 1.2).clamp(0, 1) * shown
    # Creases: across the fingers at their joints, and the lines of the palm.
    wobble = 1.2e-3 * broad[2] + 4e-4 * fine[2]
    crease = torch.zeros_like(palm)
    for k, gain in enumerate((0.25, 0.7, 0.45)):
        d = attrs[5 + k] - 1 + wobble
        on_palm = torch.exp(-(d * (1 / 7e-4)).square()) + 0.6 * torch.exp(-((d - 2.5e-3) * (1 / 6e-4)).square())
        on_back = torch.exp(-(d * 200).square()) * (0.5 + 0.5 * torch.cos(d * (6.2832 / 1.7e-3)))
        crease = crease + on_palm * palm + on_back * (1 - palm) * (1.5 * gain)
    at = torch.nonzero(palm > 0.1)[:, 0]
    crease[at] += pick(palm, at) * _palm_lines(pick(canon, at, 1), pick(wobble, at))
    crease = crease * extra[2]
    soft = (1 - footprint / 0.003).clamp(0.1, 1)
    density = density + 0.28 * crease * soft
    blush = blush + 0.1 * crease * palm * soft
    height = height - 2.5e-4 * crease * shown
    albedo = _absorbed(base, density, blush)
    # Nails and rings cover little: only their points are touched.
    at = torch.nonzero((attrs[4] > 0.02) & (attrs[3].abs() < 1.3))[:, 0]
    polish = pick(colors, at)[:, 1].T
    albedo[:, at], nail = _nails(
        pick(albedo, at, 1), pick(base, at, 1), pick(attrs[2:5], at, 1), polish, pick(extra[1], at)
    )
    height[at] += 2.5e-4 * nail
    rough[at] += (0.28 - rough[at]) * nail
    f0[at] += 0.02 * nail
    place = attrs[5] - 1 - extra[6] * 0.04
    at = torch.nonzero((extra[5] > 0) & ((attrs[8] - extra[5]).abs() < 0.3) & (place.abs() < 4e-3))[:, 0]
    band = torch.sigmoid((2.2e-3 - place[at].abs()) * 4e3)
    albedo[:, at] += (_column(base, 0.7, 0.58, 0.38) - albedo[:, at]) * band
    height[at] += 6e-4 * band
    rough[at] += (0.28 - rough[at]) * band
    f0[at] += 0.5 * band
    return albedo.clamp(0.004, 0.95), height, rough, f0


def _nails(albedo: Tensor, base: Tensor, attrs: Tensor, polish: Tensor, amount: Tensor) -> tuple[Tensor, Tensor]:
    """Albedo (3,N) with nails, and how much each point is nail (N). attrs (3,N) nail_across, nail_along, nail_up."""
    a, b, up = attrs
    r = (a.square().square() + b.square().square()).sqrt().sqrt()
    nail = torch.sigmoid((1 - r) * 14) * torch.sigmoid((up - 0.25) * 14)
    plate = base * 0.75 + _column(base, 0.20, 0.11, 0.09) * (1 - 0.4 * base)
    white, moon = torch.sigmoid((b - 0.72) * 16), torch.sigmoid((-b - 0.62) * 12)
    plate = plate + (_column(base, 0.66, 0.58, 0.48) - plate) * (white * 0.7 + moon * 0.18)
    plate = plate + (polish - plate) * amount
    albedo = albedo + (plate - albedo) * nail
    return albedo * (1 - 0.25 * nail * torch.sigmoid((r - 0.82) * 14)), nail


def _absorbed(base: Tensor, density: Tensor, blush: Tensor) -> Tensor:
    """(3,N) reflectance base behind more melanin (N) and blood (N)."""
    seen = torch.exp(-density - _column(base, 0.05, 1.0, 0.8) * blush)
    return (base * seen).clamp(0.004, 0.95)


def _column(like: Tensor, *values: float) -> Tensor:
    return like.new_tensor(values)[:, None]


def _palm_lines(canon: Tensor, wobble: Tensor) -> Tensor:
    """The three lines of the palm at rest coordinates (fingers -x, thumb +z): strength (N) in [0,1]."""
    x, z = canon[0] + wobble, canon[2]
    heart = (x + 0.096 - 10 * (z - 0.02).square()) + 0.25 * (z - 0.01)
    head = (x + 0.078) - 0.35 * (z - 0.022)
    life = ((x + 0.045).square() + (z - 0.047).square()).sqrt() - 0.041
    out = torch.exp(-(heart * 1250).square()) * ((z < 0.022) & (z > -0.05))
    out = out + 0.8 * torch.exp(-(head * 1250).square()) * ((z < 0.03) & (z > -0.03))
    return out + torch.exp(-(life * 1100).square()) * ((x > -0.085) & (z < 0.04))
