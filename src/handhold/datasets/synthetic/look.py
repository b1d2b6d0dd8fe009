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
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from . import light as lighting
from .gbuffer import GBuffer, batch_faces, rasterize_batch
from .light import Light, sample_lights
from .skin import ATTRIBUTES, skin_attributes
from .textures import Materials, Points, Textures, evaluate, make_textures, noise, sample_materials

__all__ = [
    "ATTRIBUTES", "Light", "Materials", "Surfaces", "Textures", "make_textures", "render", "sample_lights",
    "sample_materials", "skin_attributes", "vertex_normals",
]  # fmt: skip


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


def vertex_normals(vertices: Tensor, faces: Tensor) -> Tensor:
    """(B,V,3) unit normals, area-weighted, of vertices (B,V,3) and each picture's own faces (B,T,3)."""
    n, v = vertices.shape[:2]
    faces = batch_faces(faces, n)
    offset = torch.arange(n, device=faces.device)[:, None] * v
    flat = vertices.reshape(-1, 3)
    corner = (faces + offset[..., None]).reshape(-1, 3)
    a, b, c = (flat[corner[:, k]] for k in range(3))
    normal = torch.linalg.cross(b - a, c - a)
    out = torch.zeros_like(flat).index_add_(0, corner.T.reshape(-1), normal.repeat(3, 1))
    return F.normalize(out, dim=1).reshape(n, v, 3)


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
    n = len(surfaces.vertices)
    faces = batch_faces(surfaces.faces, n)
    t, v = faces.shape[1], surfaces.vertices.shape[1]
    gb = rasterize_batch(surfaces.vertices, faces, K, width, height)
    ray = pixel_rays(K, width, height)  # (B,HW,3)
    depth = gb.depth.reshape(n, -1)
    seen = depth > 0
    position = ray * depth[..., None]
    centre, radius = lighting.scene_sphere(position, seen)
    shadows = lighting.shadow_map(surfaces.vertices, faces, light, centre, radius)
    ao = lighting.hollows(gb.depth, light.hollow)
    image = background * _ground_shadow(light, shadows, position, seen, ray).reshape(n, 1, height, width)

    pixel = torch.nonzero(seen.reshape(-1))[:, 0]
    if len(pixel) == 0:
        return image, gb
    picture = torch.div(pixel, height * width, rounding_mode="floor")
    tri = gb.face.reshape(-1)[pixel] + picture * t
    at = position.reshape(-1, 3)[pixel]
    material = surfaces.material.long().expand(n, t)
    row = material.reshape(-1)[tri] + picture * materials.shape[1]
    normals = surfaces.normals
    if normals is None:
        normals = vertex_normals(surfaces.vertices, faces)
    canon = surfaces.canon.expand(n, v, 3)
    columns = [normals, canon]
    if surfaces.attrs is not None:
        columns.append(surfaces.attrs.expand(n, v, surfaces.attrs.shape[-1]))
    corner = (faces + torch.arange(n, device=faces.device)[:, None, None] * v).reshape(-1, 3)
    value = F.embedding_bag(
        corner[tri], torch.cat(columns, -1).reshape(n * v, -1), mode="sum",
        per_sample_weights=gb.bary.reshape(-1, 3)[pixel],
    )  # fmt: skip
    view = -F.normalize(at, dim=1)
    normal = _facing(F.normalize(value[:, :3], dim=1), view)
    axis, box = _canonical(canon, faces, material, materials.shape[1])
    focal = K[:, 0, 0].to(at)[picture]
    points = Points(
        row, value[:, 3:6], axis.reshape(-1)[tri], box, value[:, 6:] if surfaces.attrs is not None else None,
        at[:, 2] / focal,
    )  # fmt: skip
    look = evaluate(materials, textures, points)
    normal = _relief(normal, look.height, ray.reshape(-1, 3)[pixel], at[:, 2], focal, row, pixel, gb.face.shape)
    normal = _facing(normal, view)
    color = _shade(light, shadows, textures, look, normal, view, at, ao.reshape(-1)[pixel], picture)
    image = image.permute(0, 2, 3, 1).reshape(-1, 3)
    image[pixel] = color
    image = image.reshape(n, height, width, 3).permute(0, 3, 1, 2)
    body = torch.full((n * height * width,), -1, dtype=torch.int32, device=image.device)
    body[pixel] = row.int()
    return _soften_outlines(image, body.reshape(n, height, width), gb.depth), gb


def pixel_rays(K: Tensor, width: int, height: int) -> Tensor:
    """(B,H*W,3) directions with z = 1 through pixel centres."""
    x = (torch.arange(width, device=K.device, dtype=torch.float32) + 0.5 - K[:, 0, 2, None]) / K[:, 0, 0, None]
    y = (torch.arange(height, device=K.device, dtype=torch.float32) + 0.5 - K[:, 1, 2, None]) / K[:, 1, 1, None]
    n = len(K)
    x, y = x[:, None].expand(n, height, width), y[:, :, None].expand(n, height, width)
    return torch.stack([x, y, torch.ones_like(x)], -1).reshape(n, -1, 3).float()


def _facing(normal: Tensor, view: Tensor) -> Tensor:
    """Normals turned as little as needed not to face away."""
    away = (normal * view).sum(1, keepdim=True)
    return F.normalize(normal + (0.03 - away).clamp_min(0) * view, dim=1)


def _canonical(canon: Tensor, faces: Tensor, material: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """The axis each face's canonical normal follows most (B,T), and the canonical box (B*M,2,3) of each material."""
    n, t = faces.shape[:2]
    c = canon.gather(1, faces.reshape(n, -1, 1).expand(-1, -1, 3)).reshape(n, t, 3, 3)
    cross = torch.linalg.cross(c[:, :, 1] - c[:, :, 0], c[:, :, 2] - c[:, :, 0])
    axis = cross.abs().argmax(-1)
    real = (cross.abs().sum(-1) > 0)[..., None]
    index = (material + torch.arange(n, device=faces.device)[:, None] * m).reshape(-1, 1).expand(-1, 3)
    low = c.new_full((n * m, 3), math.inf)
    low = low.scatter_reduce(0, index, torch.where(real, c.amin(2), math.inf).reshape(-1, 3), "amin")
    high = c.new_full((n * m, 3), -math.inf)
    high = high.scatter_reduce(0, index, torch.where(real, c.amax(2), -math.inf).reshape(-1, 3), "amax")
    used = torch.isfinite(low) & torch.isfinite(high)
    return axis, torch.stack([torch.where(used, low, 0.0), torch.where(used, high, 1.0)], 1)


def _ground_shadow(light: Light, shadows: lighting.ShadowMap, position: Tensor, seen: Tensor, ray: Tensor) -> Tensor:
    """(B,HW) factor of the background: the scene's shadow on a plane under or behind it."""
    normal = light.plane[:, :, None]
    level = torch.where(seen, (position @ normal)[..., 0], math.inf).amin(1)
    level = torch.where(torch.isfinite(level), level, -1.0) - light.gap
    towards = (ray @ normal)[..., 0]
    t = level[:, None] / torch.where(towards.abs() < 1e-4, 1e-4, towards)
    on_plane = (t > 0.05) & (t < 3)
    spot = ray * torch.where(on_plane, t, 0.0)[..., None]
    lit = shadows.lit(spot)
    near = (1 - (spot - shadows.centre[:, None]).norm(dim=2) / (6 * shadows.radius[:, None])).clamp(0, 1)
    return 1 - (1 - lit) * near.sqrt() * on_plane * (light.ground * light.shadow * 0.75)[:, None]


def _relief(
    normal: Tensor, height: Tensor, ray: Tensor, z: Tensor, focal: Tensor, row: Tensor, pixel: Tensor, shape: torch.Size
) -> Tensor:
    """Normals (N,3) bent by the slope of the relief (N) metres between neighbouring pixels of the same material."""
    n, rows, cols = shape
    dense = height.new_zeros(n * rows * cols)
    dense[pixel] = height
    body = torch.full((n * rows * cols,), -1, dtype=torch.int32, device=height.device)
    body[pixel] = row.int()
    grid, body = dense.reshape(n, rows, cols), body.reshape(n, rows, cols)
    slopes = []
    for dim in (2, 1):
        step = torch.diff(grid, dim=dim) * (torch.diff(body, dim=dim) == 0)
        pad = (0, 1) if dim == 2 else (0, 0, 0, 1)
        back = (1, 0) if dim == 2 else (0, 0, 1, 0)
        slopes.append((0.5 * (F.pad(step, pad) + F.pad(step, back))).reshape(-1)[pixel])
    facing = (normal * ray).sum(1).clamp_max(-0.15)
    unit = (z / focal)[:, None]
    px = unit * (normal.new_tensor([1.0, 0, 0]) - (normal[:, 0] / facing)[:, None] * ray)
    py = unit * (normal.new_tensor([0, 1.0, 0]) - (normal[:, 1] / facing)[:, None] * ray)
    across, down = torch.linalg.cross(py, normal), torch.linalg.cross(normal, px)
    det = (px * across).sum(1)
    det = torch.where(det.abs() < 1e-12, 1e-12, det)
    gradient = (slopes[0][:, None] * across + slopes[1][:, None] * down) / det[:, None]
    size = gradient.norm(dim=1, keepdim=True)
    return F.normalize(normal - gradient * (0.8 / (0.8 + size)), dim=1)


def _shade(light, shadows, textures, look, normal, view, at, ao, picture) -> Tensor:
    """(N,3) radiance."""
    under = look.skin[:, None]
    lit = shadows.lit(at + normal * 0.003, picture)
    lit = 1 - light.shadow[picture] * (1 - lit)
    wrap = under * normal.new_tensor([0.32, 0.14, 0.09])
    bleed = 1 - under * normal.new_tensor([0.4, 0.12, 0.05])  # light under the skin reaches into the shadow
    diffuse = lighting.ambient(light.harmonics[picture], normal) * ao[:, None]
    spec = torch.zeros_like(normal)
    tint = look.metal[:, None]
    f0 = look.f0[:, None] * (1 - tint) + look.albedo * tint
    nv = (normal * view).sum(1).clamp_min(0.02)
    for k in range(light.direction.shape[1]):
        d, color = light.direction[picture, k], light.color[picture, k]
        nl = (normal * d).sum(1)
        direct = ((nl[:, None] + wrap) / (1 + wrap)).clamp_min(0)
        if k == 0:
            direct = direct * lit[:, None] ** bleed
            reached = lit
        else:
            direct, reached = direct * ao[:, None], ao
        diffuse = diffuse + direct * color
        half = F.normalize(d + view, dim=1)
        nh, vh = (normal * half).sum(1).clamp(0, 1), (view * half).sum(1).clamp(0, 1)
        alpha = (look.rough + light.spread[picture, k]).clamp(0.1, 1).square()
        lobe = _ggx(nh, alpha)
        if k == 0:  # skin has a second, sharper lobe: its oil
            lobe = lobe + 0.25 * look.skin * (_ggx(nh, alpha * 0.35) - lobe)
        nl = nl.clamp_min(0)
        fresnel = f0 + (1 - f0) * ((1 - vh) ** 5)[:, None]
        shape = lobe * nl * math.pi * 0.25 / (nl + nv - nl * nv).clamp_min(0.05) * reached
        spec = spec + fresnel * color * shape.clamp_max(8.0)[:, None]
    mirror = 2 * nv[:, None] * normal - view
    around = lighting.ambient(light.harmonics[picture], mirror)
    gloss = (1 - look.rough).clamp(0, 1)
    room = noise(textures.volume, mirror * 0.35 + light.direction[picture, 0])[:, 0]  # things that are mirrored
    around = around * torch.exp(1.3 * gloss * room)[:, None]
    edge = f0 + (torch.maximum(gloss[:, None], f0) - f0) * ((1 - nv) ** 5)[:, None]
    spec = spec + around * edge * ao[:, None]
    return look.albedo * diffuse * (1 - tint) + spec


def _ggx(nh: Tensor, alpha: Tensor) -> Tensor:
    """Distribution of microfacets (Walter et al., "Microfacet models for refraction", EGSR 2007, eq. 33)."""
    a = alpha * alpha
    return a / (math.pi * (nh * nh * (a - 1) + 1).square())


def _soften_outlines(image: Tensor, body: Tensor, depth: Tensor) -> Tensor:
    """The picture with its outlines blended over about a pixel, as an area sensor would."""
    edge = torch.zeros_like(depth)
    for dim in (1, 2):
        jump = (torch.diff(body, dim=dim) != 0) | (torch.diff(depth, dim=dim).abs() > 0.006)
        jump = jump.to(depth)
        pad = (0, 1) if dim == 2 else (0, 0, 0, 1)
        back = (1, 0) if dim == 2 else (0, 0, 1, 0)
        edge = torch.maximum(edge, torch.maximum(F.pad(jump, pad), F.pad(jump, back)))
    soft = F.pad(image, (1, 1, 1, 1), mode="replicate")
    soft = 0.25 * soft[:, :, :-2] + 0.5 * soft[:, :, 1:-1] + 0.25 * soft[:, :, 2:]
    soft = 0.25 * soft[..., :-2] + 0.5 * soft[..., 1:-1] + 0.25 * soft[..., 2:]
    return image + (soft - image) * edge[:, None]
