"""The path-traced look: the scene description of the rasterised one (`look.Surfaces`, materials, light), rendered by
Mitsuba 3 (BSD-3, https://mitsuba-renderer.org; `pip install "handhold[pathtraced]"`).

Light bounces, shadows are soft by the lamps' sizes, and things mirror each other. Textures stay what they are: each
triangle is cut so finely that its corners are about a pixel apart, and `textures.evaluate` colours the corners. The
surface behind shows the background as its own colour, so that hands and objects cast shadows on it and colour it.
Skin is opaque here; nothing shines through it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ...errors import MissingAsset
from . import light as lighting
from .gbuffer import GBuffer, batch_faces, rasterize_batch
from .light import Light
from .look import Surfaces, pixel_rays, vertex_normals
from .textures import Materials, Points, Textures, evaluate

VARIANT = "scalar_rgb"  # needs neither LLVM nor a GPU
FINEST = 1.5  # pixels between the corners of a cut triangle
MOST = 256  # pieces along an edge
DISTANCE = 1.6  # metres of a lamp from the scene's centre
RADII = (0.03, 0.35)  # metres of a lamp, from hard to soft


def available() -> bool:
    """Whether Mitsuba is installed."""
    try:
        import mitsuba  # noqa: F401
    except ImportError:
        return False
    return True


def render(
    surfaces: Surfaces,
    materials: Materials,
    light: Light,
    background: Tensor,
    K: Tensor,
    width: int,
    height: int,
    textures: Textures,
    *,
    samples: int = 64,
    bounces: int = 4,
    seed: int = 0,
) -> tuple[Tensor, GBuffer]:
    """Linear pictures (B,3,H,W) and what each pixel sees, as `look.render` gives them; on the CPU, one after another.

    samples: light paths per pixel; bounces: surfaces that a path touches at most; seed: of the noise. Raises
    `MissingAsset` where Mitsuba is not installed.
    """
    if not available():
        raise MissingAsset('Mitsuba is not installed; get it with `pip install "handhold[pathtraced]"`.')
    device = background.device
    n = len(surfaces.vertices)
    faces = batch_faces(surfaces.faces, n)
    gb = rasterize_batch(surfaces.vertices, faces, K, width, height)
    normals = surfaces.normals if surfaces.normals is not None else vertex_normals(surfaces.vertices, faces)
    pictures = []
    for b in range(n):
        one = Surfaces(
            surfaces.vertices[b : b + 1].cpu(),
            faces[b : b + 1].cpu(),
            normals[b : b + 1].cpu(),
            surfaces.label,
            _row(surfaces.material, b, 2).cpu(),
            _row(surfaces.canon, b, 3).cpu(),
            None if surfaces.attrs is None else _row(surfaces.attrs, b, 3).cpu(),
        )
        table, lamps = materials.rows(slice(b, b + 1)).to("cpu"), _one(light, b)
        view = (background[b].cpu(), K[b].cpu(), width, height)
        pictures.append(
            _picture(one, table, lamps, *view, textures.to("cpu"), gb.depth[b].cpu(), samples, bounces, seed)
        )
    return torch.stack(pictures).to(device), gb


def _row(x: Tensor, b: int, dims: int) -> Tensor:
    return x[b : b + 1] if x.ndim == dims else x[None]


def _one(light: Light, b: int) -> Light:
    return Light(**{k: getattr(light, k)[b : b + 1].cpu() for k in light.__dataclass_fields__})


def _picture(
    surfaces: Surfaces, materials: Materials, light: Light, background: Tensor, K: Tensor, width: int, height: int,
    textures: Textures, depth: Tensor, samples: int, bounces: int, seed: int,
) -> Tensor:  # fmt: skip
    """(3,H,W) linear."""
    import mitsuba as mi

    if mi.variant() is None:
        mi.set_variant(VARIANT)
    with mi.variant_context(VARIANT):  # whatever the caller works with is kept
        scene: dict[str, Any] = {
            "type": "scene",
            "integrator": {"type": "path", "max_depth": bounces + 1, "hide_emitters": True},
            "sensor": _camera(mi, K, width, height, samples),
            "environment": _environment(mi, light),
        }
        seen = (pixel_rays(K[None], width, height)[0] * depth).flatten(1)[:, depth.reshape(-1) > 0].T
        centre = seen.mean(0) if len(seen) else torch.tensor([0.0, 0.0, 1.0])
        scene |= _lamps(mi, light, centre)
        for k, part in enumerate(pieces(surfaces, materials, textures, K, width, height)):
            scene[f"body{k}"] = _mesh(mi, **part)
        floor = _floor(light, background, K, width, height, seen)
        if floor is not None:
            scene["floor"] = _mesh(mi, **floor)
        image = np.array(mi.render(mi.load_dict(scene), seed=seed))
    image = torch.from_numpy(image).permute(2, 0, 1).float()
    image = torch.where(torch.isfinite(image), image, 0.0)
    alpha = image[3:].clamp(0, 1)
    return image[:3].clamp(0, 12) + (1 - alpha) * background


def _camera(mi, K: Tensor, width: int, height: int, samples: int) -> dict[str, Any]:
    fx, fy, cx, cy = (float(v) for v in (K[0, 0], K[1, 1], K[0, 2], K[1, 2]))
    if abs(fx / fy - 1) > 1e-4:
        raise ValueError(f"pixels are not square: the focal lengths are {fx:g} and {fy:g}")
    return {
        "type": "perspective",
        "fov": math.degrees(2 * math.atan(width / 2 / fx)),
        "fov_axis": "x",
        "near_clip": 0.01,
        "far_clip": 100.0,
        "principal_point_offset_x": 0.5 - cx / width,
        "principal_point_offset_y": 0.5 - cy / height,
        "to_world": mi.ScalarTransform4f().look_at([0, 0, 0], [0, 0, 1], [0, -1, 0]),
        "film": {
            "type": "hdrfilm",
            "width": width,
            "height": height,
            "rfilter": {"type": "tent"},
            "pixel_format": "rgba",
            "component_format": "float32",
        },
        "sampler": {"type": "independent", "sample_count": samples},
    }


# ---------------------------------------------------------------- light


def _environment(mi, light: Light, rows: int = 32) -> dict[str, Any]:
    """The environment whose light on a matt surface is `light.ambient`: its harmonics over those of a cosine lobe
    (Ramamoorthi and Hanrahan, SIGGRAPH 2001: 1, 2/3, 1/4 for orders 0, 1, 2), never negative."""
    v = (torch.arange(rows) + 0.5) / rows * math.pi
    u = (torch.arange(2 * rows) + 0.5) / (2 * rows) * 2 * math.pi
    # Mitsuba's map: y up, and the middle of the picture is -z there; turned below so that these are camera axes
    direction = torch.stack(
        [
            u.sin() * v.sin()[:, None],
            v.cos()[:, None].expand(-1, 2 * rows),
            -u.cos() * v.sin()[:, None],
        ],
        -1,
    )
    order = torch.tensor([1.0, 1.5, 1.5, 1.5, 4.0, 4.0, 4.0, 4.0, 4.0])
    radiance = _ambient(light.harmonics[0] * order[:, None], direction.reshape(-1, 3)).reshape(rows, -1, 3)
    return {"type": "envmap", "bitmap": mi.Bitmap(np.ascontiguousarray(radiance.numpy(), np.float32))}


def _ambient(harmonics: Tensor, normal: Tensor) -> Tensor:
    """(N,3) light from harmonics (9,3) on surfaces with normals (N,3)."""
    return lighting.ambient(harmonics[None], normal.T, torch.zeros(len(normal), dtype=torch.int64)).T


def _lamps(mi, light: Light, centre: Tensor) -> dict[str, Any]:
    """Discs that give a facing matt white surface at the centre the radiance of `light.color`."""
    out = {}
    for k in range(light.direction.shape[1]):
        color = light.color[0, k]
        if color.max() < 1e-3:
            continue
        soft = float(light.softness[0]) if k == 0 else 1.0
        radius = RADII[0] * (RADII[1] / RADII[0]) ** soft
        place = centre + DISTANCE * light.direction[0, k]
        up = [0.0, 1.0, 0.0] if abs(float(light.direction[0, k, 1])) < 0.9 else [1.0, 0.0, 0.0]
        turn = mi.ScalarTransform4f().look_at(place.tolist(), centre.tolist(), up)
        radiance = color * (DISTANCE**2 + radius**2) / radius**2
        out[f"lamp{k}"] = {
            "type": "disk",
            "to_world": turn @ mi.ScalarTransform4f().scale(radius),
            "emitter": {"type": "area", "radiance": {"type": "rgb", "value": radiance.tolist()}},
        }
    return out


def _floor(light: Light, background: Tensor, K: Tensor, width: int, height: int, seen: Tensor) -> dict | None:
    """The surface behind: a corner per pixel, of the colour that gives the background's radiance where nothing throws
    a shadow."""
    if float(light.ground[0]) <= 0 or len(seen) == 0:
        return None
    normal = light.plane[0]
    level = (seen @ normal).min() - light.gap[0]
    received = _ambient(light.harmonics[0], normal[None])[0]
    for k in range(light.direction.shape[1]):
        received = received + light.color[0, k] * (light.direction[0, k] @ normal).clamp_min(0)
    ray = pixel_rays(K[None], width, height)[0].flatten(1).T
    towards = ray @ normal
    t = level / torch.where(towards.abs() < 1e-4, 1e-4, towards)
    there = ((t > 0.05) & (t < 3)).reshape(height, width)
    quad = there[:-1, :-1] & there[1:, :-1] & there[:-1, 1:] & there[1:, 1:]
    if not quad.any():
        return None
    i = torch.arange(width * height).reshape(height, width)
    a, b, c, d = (x[quad] for x in (i[:-1, :-1], i[:-1, 1:], i[1:, :-1], i[1:, 1:]))
    faces = torch.cat([torch.stack([a, c, b], 1), torch.stack([b, c, d], 1)])
    color = background.reshape(3, -1).T / received.clamp_min(1e-3)
    points = ray * torch.where(there.reshape(-1), t, 1.0)[:, None]
    ones = torch.ones(len(points))
    return {
        "vertices": points,
        "normals": normal.expand_as(points),
        "faces": faces,
        "color": color.clamp(0, 0.95),
        "rough": ones,
        "f0": 0.0,
        "metal": 0.0,
    }


# ---------------------------------------------------------------- bodies


def pieces(
    surfaces: Surfaces, materials: Materials, textures: Textures, K: Tensor, width: int, height: int
) -> list[dict[str, Any]]:
    """The triangles of one picture, cut finely and coloured: one mesh for each material in use, with vertices (N,3),
    normals (N,3), faces (M,3), color (N,3) linear, rough (N,), f0 and metal."""
    vertices, faces = surfaces.vertices[0], surfaces.faces[0]
    corner = vertices[faces]
    area = torch.linalg.cross(corner[:, 1] - corner[:, 0], corner[:, 2] - corner[:, 0]).norm(dim=1)
    keep = (area > 1e-12) & (corner[..., 2].amin(1) > 0.01)
    count = _cuts(corner, K, width, height)
    columns = [vertices, surfaces.normals[0], surfaces.canon[0]]
    columns += [] if surfaces.attrs is None else [surfaces.attrs[0]]
    values = torch.cat(columns, 1)
    out = []
    for m in torch.unique(surfaces.material[0][keep]).tolist():
        mine = keep & (surfaces.material[0] == m)
        table = materials.rows((slice(0, 1), slice(m, m + 1)))
        own = surfaces.canon[0][faces[mine]].flatten(0, 1)
        box = torch.stack([own.amin(0), own.amax(0)])[None]
        parts = []
        for n in torch.unique(count[mine]).tolist():
            some = torch.nonzero(mine & (count == n))[:, 0]
            bary, small = _grid(n)
            x = torch.einsum("pk,tkc->tpc", bary, values[faces[some]])
            parts.append(_coloured(x, small, faces[some], surfaces.canon[0], box, table, textures, K))
        start = np.cumsum([0] + [len(p["vertices"]) for p in parts])
        mesh = {k: torch.cat([p[k] for p in parts]) for k in ("vertices", "normals", "color", "rough")}
        mesh["faces"] = torch.cat([p["faces"] + int(s) for p, s in zip(parts, start, strict=False)])
        mesh["f0"], mesh["metal"] = float(parts[0]["f0"].mean()), float(materials.metal[0, m])
        out.append(mesh)
    return out


def _cuts(corner: Tensor, K: Tensor, width: int, height: int) -> Tensor:
    """(T,) pieces along the edges of triangles (T,3,3), a power of two: one where they are small or out of sight."""
    z = corner[..., 2].clamp_min(0.02)
    pixel = corner[..., :2] / z[..., None] * K[0, 0] + K[:2, 2]
    edge = torch.stack([(pixel[:, k] - pixel[:, k - 1]).norm(dim=1) for k in range(3)]).amax(0)
    low, high = pixel.amin(1), pixel.amax(1)
    hidden = (high < 0).any(1) | (low[:, 0] > width) | (low[:, 1] > height)
    n = torch.exp2((edge / FINEST).clamp(1, MOST).log2().ceil()).long()
    return torch.where(hidden, 1, n)


def _grid(n: int) -> tuple[Tensor, Tensor]:
    """Barycentric corners (P,3) and faces (n*n,3) of a triangle cut into n pieces along each edge."""
    i, j = torch.meshgrid(torch.arange(n + 1), torch.arange(n + 1), indexing="ij")
    inside = i + j <= n
    number = torch.full((n + 1, n + 1), -1)
    number[inside] = torch.arange(int(inside.sum()))
    u, v = i[inside] / n, j[inside] / n
    up = (i + j < n) & (i < n) & (j < n)
    a, b = i[up], j[up]
    faces = [torch.stack([number[a, b], number[a + 1, b], number[a, b + 1]], 1)]
    down = (i + j < n - 1) & (i < n) & (j < n)
    a, b = i[down], j[down]
    faces.append(torch.stack([number[a + 1, b], number[a + 1, b + 1], number[a, b + 1]], 1))
    return torch.stack([1 - u - v, u, v], 1), torch.cat(faces)


def _coloured(x, small, corners, canon, box, materials, textures, K) -> dict[str, Tensor]:
    """Corners x (T,P,C) of cut triangles, columns position, normal, canonical place, attributes -> a coloured mesh."""
    t, p = x.shape[:2]
    flat = x.reshape(t * p, -1)
    normal = F.normalize(flat[:, 3:6], dim=1)
    attrs = flat[:, 9:] if flat.shape[1] > 9 else None
    row = torch.zeros(t * p, dtype=torch.int64)
    footprint = flat[:, 2].clamp_min(0.02) / K[0, 0]
    points = Points(row, flat[:, 6:9], corners.repeat_interleave(p, 0), canon, box, attrs, footprint)
    look = evaluate(materials, textures, points)
    faces = (small + torch.arange(t)[:, None, None] * p).reshape(-1, 3)
    return {
        "vertices": flat[:, :3],
        "normals": normal if p == 3 else _relief(flat[:, :3], normal, look.height, faces),
        "faces": faces,
        "color": look.albedo.T,
        "rough": look.rough,
        "f0": look.f0,
    }


def _relief(vertices: Tensor, normal: Tensor, height: Tensor, faces: Tensor) -> Tensor:
    """Normals (N,3) bent by the slope of the relief (N) metres on the cut triangles."""
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    ha, hb, hc = (height[faces[:, k]] for k in range(3))
    across = torch.linalg.cross(b - a, c - a)
    size = across.square().sum(1, keepdim=True).clamp_min(1e-24)
    # gradient of the linear function with these values at the corners
    slope = torch.linalg.cross(c - a, across) * (hb - ha)[:, None] / size
    slope = slope + torch.linalg.cross(across, b - a) * (hc - ha)[:, None] / size
    total = torch.zeros_like(vertices).index_add_(0, faces.T.reshape(-1), slope.repeat(3, 1))
    count = torch.zeros(len(vertices)).index_add_(0, faces.reshape(-1), torch.ones(faces.numel()))
    gradient = total / count.clamp_min(1)[:, None]
    steep = gradient.norm(dim=1, keepdim=True)
    return F.normalize(normal - gradient * (0.8 / (0.8 + steep)), dim=1)


def _mesh(mi, vertices, normals, faces, color, rough, f0: float, metal: float):
    """A Mitsuba mesh with the principled material (Burley, "Physically based shading at Disney", 2012)."""
    material = mi.load_dict(
        {
            "type": "twosided",
            "bsdf": {
                "type": "principled",
                "base_color": {"type": "mesh_attribute", "name": "vertex_color"},
                "roughness": {"type": "mesh_attribute", "name": "vertex_rough"},
                "metallic": metal,
                "specular": min(max(f0 / 0.08, 0.0), 1.0),
            },
        }
    )
    properties = mi.Properties()
    properties["bsdf"] = material
    mesh = mi.Mesh("body", len(vertices), len(faces), has_vertex_normals=True, props=properties)
    mesh.add_attribute("vertex_color", 3, _flat(color.clamp(0, 0.97)))
    mesh.add_attribute("vertex_rough", 1, _flat(rough.clamp(0.08, 1)))
    data = mi.traverse(mesh)
    data["vertex_positions"], data["vertex_normals"] = _flat(vertices), _flat(normals)
    data["faces"] = np.ascontiguousarray(faces.numpy(), np.uint32).ravel()
    data.update()
    return mesh


def _flat(x: Tensor) -> np.ndarray:
    return np.ascontiguousarray(x.numpy(), np.float32).ravel()
