"""A fast rasterised look for synthetic pictures of hands and objects: B pictures at once, on the CPU or a GPU.

What it does, in this order: one z-buffer pass (`gbuffer`); materials at the visible points only (`textures`,
`skin`); relief from screen-space height (Mikkelsen, "Bump mapping unparametrized surfaces on the GPU", 2010); lamps
with variance shadow maps, spherical-harmonic environment and depth-based hollows (`light`); diffuse light that wraps
around skin, more for red (after d'Eon and Luebke, GPU Gems 3, chapter 14), GGX highlights; a shadow on the surface
behind; outlines softened by coverage. The result is linear; `sensor.expose` makes a photograph of it.

    textures = make_textures(device=device)
    image, gbuffer = render(surfaces, materials, light, background, K, width, height, textures)
    photo = sensor.expose(image, generator)

All random draws happen on the CPU, from the caller's generator: a picture is the same on every device up to rounding.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...geometry.meshes import vertex_normals
from . import light as lighting
from .filters import pick
from .gbuffer import GBuffer, batch_faces, rasterize_batch
from .light import Light, sample_lights
from .skin import ATTRIBUTES, skin_attributes
from .textures import PRINT, Materials, Points, Textures, evaluate, make_textures, sample_materials, smooth_noise

__all__ = [
    "ATTRIBUTES", "Light", "Materials", "Surfaces", "Textures", "make_textures", "render", "sample_lights",
    "sample_materials", "skin_attributes", "vertex_normals",
]  # fmt: skip


PIXELS = 1 << 23  # rendered at a time on an accelerator
PIXELS_CPU = 1 << 16


@dataclass(frozen=True, eq=False)
class Surfaces:
    """The triangles of B pictures, all bodies together."""

    vertices: Tensor  # (B,V,3) camera frame, metres
    faces: Tensor  # (T,3) or (B,T,3) int64; padding is faces without area
    normals: Tensor | None  # (B,V,3) unit, outward, or None: the mean of the faces around a vertex
    label: Tensor  # (T,) or (B,T) uint8 of sample.LABELS; distractors have 0
    material: Tensor  # (T,) or (B,T) int64 column of the material table
    canon: Tensor  # (B,V,3) or (V,3) coordinates of the texture, metres
    attrs: Tensor | None = None  # (B,V,A) or (V,A) of ATTRIBUTES, zero off the hands


@torch.no_grad()
def render(
    surfaces: Surfaces,
    materials: Materials,
    light: Light,
    background: Tensor,
    K: Tensor,
    width: int,
    height: int,
    textures: Textures,
    supersample: int = 1,
) -> tuple[Tensor, GBuffer]:
    """Linear pictures (B,3,H,W) and what each pixel sees.

    materials (B,M) table; background (B,3,H,W) linear radiance; K (B,3,3) pixels; supersample s renders s times larger
    and averages (the G-buffer keeps the plain size). Everything on one device. One host synchronisation for the visible
    pixels and one per kind of material.
    """
    if supersample > 1:
        s = supersample
        big = K.clone()
        big[:, :2] *= s
        large = F.interpolate(background, scale_factor=s, mode="nearest")
        image, _ = render(surfaces, materials, light, large, big, width * s, height * s, textures)
        faces = batch_faces(surfaces.faces, len(K))
        return F.avg_pool2d(image, s), rasterize_batch(surfaces.vertices, faces, K, width, height)
    n, v = surfaces.vertices.shape[:2]
    s = Surfaces(
        surfaces.vertices, batch_faces(surfaces.faces, n), surfaces.normals, surfaces.label,
        surfaces.material.long().expand(n, surfaces.faces.shape[-2]), surfaces.canon.expand(n, v, 3),
        None if surfaces.attrs is None else surfaces.attrs.expand(n, v, surfaces.attrs.shape[-1]),
    )  # fmt: skip
    if s.normals is None:
        s = replace(s, normals=vertex_normals(s.vertices, s.faces))
    budget = PIXELS_CPU if background.device.type == "cpu" else PIXELS
    step = max(1, budget // (width * height))
    parts = []
    for i in range(0, n, step):  # a few pictures at a time: what fits the caches, or the memory
        some = slice(i, i + step)
        cut = [None if x is None else x[some] for x in (getattr(s, k.name) for k in fields(s))]
        lamps = replace(light, **{k.name: getattr(light, k.name)[some] for k in fields(light)})
        parts.append(
            _render(Surfaces(*cut), materials.rows(some), lamps, background[some], K[some], width, height, textures)
        )
    images, buffers = zip(*parts, strict=True)
    return torch.cat(images), GBuffer(*(torch.cat([getattr(b, k) for b in buffers]) for k in ("face", "bary", "depth")))


def _render(
    surfaces: Surfaces, materials: Materials, light: Light, background: Tensor, K: Tensor, width: int, height: int,
    textures: Textures,
) -> tuple[Tensor, GBuffer]:  # fmt: skip
    n, t = surfaces.faces.shape[:2]
    v = surfaces.vertices.shape[1]
    gb = rasterize_batch(surfaces.vertices, surfaces.faces, K, width, height)
    ray = pixel_rays(K, width, height)  # (B,3,H,W)
    centre, radius = lighting.scene_sphere(gb.depth, ray)
    shadows = lighting.shadow_map(surfaces.vertices, surfaces.faces, light, centre, radius)
    image = background * _ground_shadow(light, shadows, gb.depth, ray)
    pixel = torch.nonzero(gb.depth.reshape(-1) > 0)[:, 0]
    if len(pixel) == 0:
        return image, gb
    picture = torch.div(pixel, height * width, rounding_mode="floor")
    tri = pick(gb.face.reshape(-1), pixel) + picture * t
    z = pick(gb.depth.reshape(-1), pixel)
    toward = _at_pixels(ray, pixel, picture)  # (3,N), z is 1
    row = pick(surfaces.material.reshape(-1), tri) + picture * materials.shape[1]
    columns = [surfaces.normals, surfaces.canon]
    if surfaces.attrs is not None:
        columns.append(surfaces.attrs)
    corners = pick(surfaces.faces.reshape(-1, 3), tri) + (picture * v)[:, None]
    value = F.embedding_bag(
        corners, torch.cat(columns, -1).reshape(n * v, -1), mode="sum",
        per_sample_weights=pick(gb.bary.reshape(-1, 3), pixel),
    )  # fmt: skip
    view = -toward * torch.rsqrt((toward * toward).sum(0))
    normal = _facing(_unit(value[:, :3].T.contiguous()), view)
    focal = lighting.per_point(K[:, 0, 0].to(z), picture)
    box = _canonical_box(surfaces, materials)
    attrs = value[:, 6:] if surfaces.attrs is not None else None
    points = Points(row, value[:, 3:6], corners, surfaces.canon.reshape(-1, 3), box, attrs, z / focal)
    look = evaluate(materials, textures, points)
    body = torch.full((n * height * width,), -1, dtype=torch.int32, device=image.device)
    body[pixel] = row.int()
    body = body.reshape(n, height, width)
    normal = _facing(_relief(normal, look.height, toward, z / focal, pixel, body), view)
    hollow = lighting.hollows(gb.depth, light.hollow).reshape(-1).index_select(0, pixel)
    color = _shade(light, shadows, textures, look, normal, view, toward * z, hollow, picture)
    return _composed(image, color, pixel, picture, body, gb.depth), gb


def pixel_rays(K: Tensor, width: int, height: int) -> Tensor:
    """(B,3,H,W) directions with z = 1 through pixel centres."""
    x = (torch.arange(width, device=K.device, dtype=torch.float32) + 0.5 - K[:, 0, 2, None]) / K[:, 0, 0, None]
    y = (torch.arange(height, device=K.device, dtype=torch.float32) + 0.5 - K[:, 1, 2, None]) / K[:, 1, 1, None]
    shape = (len(K), height, width)
    x, y = x[:, None].expand(shape), y[:, :, None].expand(shape)
    return torch.stack([x, y, torch.ones_like(x)], 1).float()


def _at_pixels(x: Tensor, pixel: Tensor, picture: Tensor) -> Tensor:
    """(C,N) of x (B,C,H,W) at flat pixels (N,) of all pictures."""
    n, c = x.shape[:2]
    flat = x.flatten(2)
    if n == 1:
        return pick(flat[0], pixel, 1)
    inside = pixel - picture * flat.shape[2]
    return flat[picture[None], torch.arange(c, device=x.device)[:, None], inside[None]]


def _unit(x: Tensor) -> Tensor:
    """(3,N) made unit vectors."""
    return x * torch.rsqrt((x * x).sum(0).clamp_min(1e-20))


def _facing(normal: Tensor, view: Tensor) -> Tensor:
    """Normals (3,N) turned as little as needed not to face away."""
    return _unit(normal + (0.03 - (normal * view).sum(0)).clamp_min(0) * view)


def _canonical_box(surfaces: Surfaces, materials: Materials) -> Tensor:
    """(B*M,2,3) canonical box of each printed material; of others it is empty."""
    n, m = materials.shape
    printed = (materials.kind == PRINT).gather(1, surfaces.material)
    first, second, third = surfaces.faces.unbind(-1)
    at = torch.nonzero((printed & (first != second) & (second != third)).reshape(-1))[:, 0]  # not padding
    picture = torch.div(at, surfaces.faces.shape[1], rounding_mode="floor")
    corners = surfaces.faces.reshape(-1, 3)[at] + (picture * surfaces.canon.shape[1])[:, None]
    c = surfaces.canon.reshape(-1, 3)[corners]
    index = (surfaces.material.reshape(-1)[at] + picture * m)[:, None].expand(-1, 3)
    low = c.new_full((n * m, 3), math.inf).scatter_reduce(0, index, c.amin(1), "amin")
    high = c.new_full((n * m, 3), -math.inf).scatter_reduce(0, index, c.amax(1), "amax")
    return torch.nan_to_num(torch.stack([low, high], 1), posinf=0.0, neginf=0.0)


def _ground_shadow(light: Light, shadows: lighting.ShadowMap, depth: Tensor, ray: Tensor) -> Tensor:
    """(B,1,H,W) factor of the background: the scene's shadow on a plane under or behind it, computed at a quarter."""
    n, h, w = depth.shape
    normal = light.plane
    d = ray[:, :, 2::4, 2::4] if min(h, w) >= 16 else ray
    z = depth[:, 2::4, 2::4] if min(h, w) >= 16 else depth
    towards = (d * normal[:, :, None, None]).sum(1)
    level = torch.where(z > 0, z * towards, math.inf).flatten(1).amin(1)
    level = torch.where(torch.isfinite(level), level, -1.0) - light.gap
    t = level[:, None, None] / torch.where(towards.abs() < 1e-4, 1e-4, towards)
    on_plane = (t > 0.05) & (t < 3)
    spot = d * torch.where(on_plane, t, 0.0)[:, None]
    picture = torch.arange(n, device=depth.device).repeat_interleave(z[0].numel())
    lit = shadows.lit(spot.movedim(1, 0).reshape(3, -1), picture).reshape(z.shape)
    away = (spot - shadows.centre[:, :, None, None]).square().sum(1).sqrt()
    near = (1 - away / (6 * shadows.radius[:, None, None])).clamp(0, 1)
    strength = (light.ground * light.shadow * 0.75)[:, None, None]
    factor = 1 - (1 - lit) * near.sqrt() * on_plane * strength
    return F.interpolate(factor[:, None], (h, w), mode="bilinear")


def _relief(normal: Tensor, height: Tensor, ray: Tensor, unit: Tensor, pixel: Tensor, body: Tensor) -> Tensor:
    """Normals (3,N) bent by the slope of the relief (N) metres between neighbouring pixels of the same body (B,H,W).
    ray (3,N) with z 1; unit (N) metres that a pixel spans."""
    grid = height.new_zeros(body.numel())
    grid[pixel] = height
    grid = grid.reshape(body.shape)
    slopes = []
    for dim in (2, 1):
        step = torch.diff(grid, dim=dim) * (torch.diff(body, dim=dim) == 0)
        pad = (1, 1) if dim == 2 else (0, 0, 1, 1)
        step = F.pad(step, pad)
        both = step[..., 1:] + step[..., :-1] if dim == 2 else step[:, 1:] + step[:, :-1]
        slopes.append(0.5 * pick(both.reshape(-1), pixel) / unit)
    nx, ny, nz = normal
    facing = (normal * ray).sum(0).clamp_max(-0.15)
    a, b = nx / facing, ny / facing  # how much farther along the ray the surface is a pixel to the right, or down
    px, py, pz = 1 - a * ray[0], -a * ray[1], -a  # one pixel to the right on the surface, in units
    qx, qy, qz = -b * ray[0], 1 - b * ray[1], -b
    across = torch.stack([qy * nz - qz * ny, qz * nx - qx * nz, qx * ny - qy * nx])
    down = torch.stack([ny * pz - nz * py, nz * px - nx * pz, nx * py - ny * px])
    det = px * across[0] + py * across[1] + pz * across[2]
    det = torch.where(det.abs() < 1e-6, 1e-6, det)
    gradient = (across * slopes[0] + down * slopes[1]) / det
    size = (gradient * gradient).sum(0).sqrt()
    return normal - gradient * (0.8 / (0.8 + size))


def _shade(light, shadows, textures, look, normal, view, at, ao, picture) -> Tensor:
    """(3,N) radiance."""
    of = lighting.per_point
    lit = shadows.lit(at + normal * 0.003, picture)
    lit = 1 - of(light.shadow, picture) * (1 - lit)
    under = look.skin
    wrap = under * normal.new_tensor([[0.32], [0.14], [0.09]])
    diffuse = lighting.ambient(light.harmonics, normal, picture) * ao
    f0 = look.f0 * (1 - look.metal) + look.albedo * look.metal
    nv = (normal * view).sum(0).clamp_min(0.02)
    spec = 0.0
    for k in range(light.direction.shape[1]):
        d, color = of(light.direction[:, k], picture), of(light.color[:, k], picture)
        nl = (normal * d).sum(0)
        reached = lit if k == 0 else ao
        direct = ((nl + wrap) / (1 + wrap)).clamp_min(0) * reached
        if k == 0:  # light under the skin reaches into the shadow, red light farthest
            direct = direct + under * normal.new_tensor([[0.30], [0.07], [0.02]]) * (lit.sqrt() - lit) * nl.clamp_min(0)
        diffuse = diffuse + direct * color
        half = _unit(d + view)
        nh, vh = (normal * half).sum(0).clamp(0, 1), (view * half).sum(0).clamp(0, 1)
        alpha = (look.rough + of(light.spread[:, k], picture)).clamp(0.1, 1).square()
        lobe = _ggx(nh, alpha)
        if k == 0:  # skin has a second, sharper lobe: its oil
            lobe = lobe + 0.25 * under * (_ggx(nh, alpha * 0.5) - lobe)
        nl = nl.clamp_min(0)
        shape = lobe * nl * (math.pi * 0.25) / (nl + nv - nl * nv).clamp_min(0.05) * reached
        fresnel = f0 + (1 - f0) * (1 - vh).square().square() * (1 - vh)
        spec = spec + fresnel * color * shape.clamp_max(8.0 - 5.0 * under)
    mirror = 2 * nv * normal - view
    gloss = (1 - look.rough).clamp(0, 1).square()
    around = lighting.ambient(light.harmonics, mirror, picture) * ao
    at = torch.nonzero(gloss > 0.2)[:, 0]  # what is mirrored: bright and dark things of the room
    room = smooth_noise(textures, 0.3 * pick(mirror, at, 1) + of(light.direction[:, 0], pick(picture, at)))[0]
    around[:, at] *= torch.exp(1.8 * pick(gloss, at) * room)
    edge = f0 + ((0.8 * gloss).maximum(f0) - f0) * (1 - nv).square().square() * (1 - nv)
    return look.albedo * diffuse * (1 - look.metal) + spec + around * edge


def _ggx(nh: Tensor, alpha: Tensor) -> Tensor:
    """Distribution of microfacets (Walter et al., "Microfacet models for refraction", EGSR 2007, eq. 33)."""
    a = alpha * alpha
    return a / (math.pi * (nh * nh * (a - 1) + 1).square())


def _composed(image: Tensor, color: Tensor, pixel: Tensor, picture: Tensor, body: Tensor, depth: Tensor) -> Tensor:
    """The background (B,3,H,W) with colors (3,N) at flat pixels (N,), outlines blended over about a pixel, as an area
    sensor would."""
    n, _, h, w = image.shape
    flat = image.flatten(2)
    if n == 1:
        flat[0].index_copy_(1, pixel, color)
    else:
        flat[picture, :, pixel - picture * (h * w)] = color.T
    edge = torch.zeros_like(body, dtype=torch.bool)
    for dim in (1, 2):
        jump = (torch.diff(body, dim=dim) != 0) | (torch.diff(depth, dim=dim).abs() > 0.006)
        size = jump.shape[dim]
        edge.narrow(dim, 0, size).logical_or_(jump)
        edge.narrow(dim, 1, size).logical_or_(jump)
    at = torch.nonzero(edge.reshape(-1))[:, 0]
    k = torch.div(at, h * w, rounding_mode="floor")
    y = torch.div(at - k * (h * w), w, rounding_mode="floor")
    x = at - k * (h * w) - y * w
    soft = 0.0
    for dy, wy in ((-1, 0.25), (0, 0.5), (1, 0.25)):
        for dx, wx in ((-1, 0.25), (0, 0.5), (1, 0.25)):
            there = (y + dy).clamp(0, h - 1) * w + (x + dx).clamp(0, w - 1)
            soft = soft + wy * wx * (pick(flat[0], there, 1).T if n == 1 else flat[k, :, there])
    if n == 1:
        flat[0][:, at] = soft.T
    else:
        flat[k, :, at - k * (h * w)] = soft
    return flat.reshape(image.shape)
