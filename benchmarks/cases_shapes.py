"""Cases of `render.py` on encodings, meshes and extraction: ours against plain torch. See `cases.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
from measure import Case, Outputs, Peer
from torch import Tensor

from handhold.geometry.queries import MeshQueries
from handhold.hand import HandModel
from handhold.render.raster import rasterize, soft_silhouette
from handhold.shapes.encodings import HashGridConfig, TriplaneConfig, make_encoding
from handhold.shapes.extraction import extract_surface

TWIN = "handhold's torch path"

# --- encodings ---


def encoding_case(quick: bool, config: HashGridConfig | TriplaneConfig, title: str, jacobian: bool) -> Case:
    g = torch.Generator().manual_seed(5)
    n = 256 if quick else 32768
    x = torch.rand(n, 3, generator=g) * 2 - 1

    def step_of(backend: str) -> Callable[[], Outputs]:
        encoding = make_encoding(config, (-1,) * 3, (1,) * 3, backend, torch.Generator().manual_seed(6))
        (table,) = encoding.parameters()
        v = [torch.randn(n, encoding.output_dim, generator=torch.Generator().manual_seed(7))]
        if jacobian:
            v.append(torch.randn(n, encoding.output_dim, 3, generator=torch.Generator().manual_seed(8)))

        def step() -> Outputs:
            out = encoding(x, jacobian=True) if jacobian else (encoding(x),)
            (grad,) = torch.autograd.grad(out, [table], v)
            return {"value": out[0], "grad table": grad} | ({"jacobian": out[1]} if jacobian else {})

        return step

    name = f"{title}, {n} points, forward+backward"
    return Case(name, step_of("cpu"), {TWIN: Peer(step_of("torch"))})


# --- meshes ---


def hand_and_ball(subdivided: bool) -> tuple[Tensor, Tensor]:
    """An open hand and a bumpy ball beside it, 0.4 m before the camera: (V,3), (T,3); 3.5k or 20k faces."""
    model = HandModel.open("right")
    v = model.with_shape().vertices
    v = v() if callable(v) else v
    rows, columns = (92, 92) if subdivided else (9, 18)
    theta = torch.linspace(0.01, torch.pi - 0.01, rows)[:, None]
    phi = torch.arange(columns) * (2 * torch.pi / columns)
    d = torch.stack([theta.sin() * phi.cos(), theta.sin() * phi.sin(), theta.cos().expand(rows, columns)], -1).reshape(
        -1, 3
    )
    ball = d * (1 + 0.15 * torch.sin(5 * d[:, :1]) * torch.cos(4 * d[:, 1:2])) * 0.05 + torch.tensor([0, 0.03, 0.05])
    i, j = torch.meshgrid(torch.arange(rows - 1), torch.arange(columns), indexing="ij")
    a, b = i * columns + j, i * columns + (j + 1) % columns
    quads = torch.stack([a, a + columns, b + columns, a, b + columns, b], -1).reshape(-1, 3)
    vertices = torch.cat([v - v.mean(0), ball])
    turned = vertices[:, [0, 2, 1]] * torch.tensor([1.0, 1.0, -1.0])
    return turned + torch.tensor([0, 0, 0.4]), torch.cat([model.faces, quads + len(v)])


def raster_case(quick: bool, what: str, subdivided: bool, at_most_ms: float | None = None) -> Case:
    px = 32 if quick else 256
    vertices, faces = hand_and_ball(subdivided and not quick)
    K = torch.tensor([[[1.9 * px, 0, px / 2], [0, 1.9 * px, px / 2], [0, 0, 1]]])
    view = torch.eye(4)[None]
    leaf = vertices.clone().requires_grad_()
    g = torch.Generator().manual_seed(9)
    attributes, weight = torch.rand(len(vertices), 3, generator=g), torch.rand(1, px, px, 1, generator=g)

    def step_of(backend: str) -> Callable[[], Outputs]:
        def hard() -> Outputs:
            r = rasterize(vertices, faces, view, K, px, px, normals=None, backend=backend)
            return {"depth": r.depth, "mask": r.mask.float()}

        def interpolated() -> Outputs:
            r = rasterize(leaf, faces, view, K, px, px, attributes, backend=backend)
            loss = ((r.depth + r.normals + r.attributes) * weight).sum()
            (grad,) = torch.autograd.grad(loss, [leaf])
            return {"depth": r.depth, "attributes": r.attributes, "grad vertices": grad}

        def outline() -> Outputs:
            coverage = soft_silhouette(leaf, faces, view, K, px, px, backend=backend)
            (grad,) = torch.autograd.grad((coverage * weight).sum(), [leaf])
            return {"coverage": coverage, "grad vertices": grad}

        return {"hard": hard, "interpolated": interpolated, "outline": outline}[what]

    titles = {
        "hard": "mesh raster, hard, forward",
        "interpolated": "mesh raster, depth, normals, attributes, forward+backward",
        "outline": "mesh silhouette (outline), forward+backward",
    }
    return Case(
        f"{titles[what]}, {len(faces)} faces, {px} px", step_of("cpu"), {TWIN: Peer(step_of("torch"))}, at_most_ms
    )


def nearest_case(quick: bool) -> Case:
    """The contact query: a hand's vertices against an object's surface, its tree built once."""
    vertices, faces = hand_and_ball(not quick)
    g = torch.Generator().manual_seed(10)
    points = vertices[torch.randint(len(vertices), (60 if quick else 800,), generator=g)]
    points = points + 0.01 * torch.randn(points.shape, generator=g)
    queries = MeshQueries(vertices, faces)

    def ours() -> Outputs:
        return {"distance": queries.nearest(points).distance}

    slow = MeshQueries(vertices, faces, backend="torch")
    twin = Peer(lambda: {"distance": slow.nearest(points).distance})
    return Case(f"closest point on a mesh, {len(points)} points, {len(faces)} faces", ours, {TWIN: twin})


def extraction_case(quick: bool) -> Case:
    """A sphere and its surface; the peer evaluates every node."""
    n = 32 if quick else 128
    lo, hi = torch.full((3,), -1.0), torch.full((3,), 1.0)

    def sphere(x: Tensor) -> Tensor:
        return x.norm(dim=-1) - 0.6

    def dense() -> Outputs:
        from skimage.measure import marching_cubes

        axis = torch.linspace(-1, 1, n + 1)
        x = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
        v, _, _, _ = marching_cubes(sphere(x).reshape((n + 1,) * 3).numpy(), 0.0)
        return {"vertices": torch.tensor(len(v))}

    def ours() -> Outputs:
        mesh, _ = extract_surface(sphere, lo, hi, n)
        return {"vertices": torch.tensor(len(mesh.vertices))}

    return Case(
        f"surface of a cheap analytic field, {n}^3, cleaned",
        ours, {"every node evaluated, scikit-image alone": Peer(dense, comparable=False)},
        note="here the field costs nothing; with a network as field ours evaluates 3 to 10 % of the nodes",
    )  # fmt: skip


CASES: dict[str, Callable[[bool], Case]] = {
    "hash": lambda q: encoding_case(q, HashGridConfig(), "hash grid 8 x 2 with Jacobian", True),
    "triplane": lambda q: encoding_case(q, TriplaneConfig(16 if q else 256, 32), "triplane 3 x 32 x 256 x 256", False),
    "raster": lambda q: raster_case(q, "hard", False, None if q else 3.0),
    "raster_20k": lambda q: raster_case(q, "hard", True),
    "raster_gradient": lambda q: raster_case(q, "interpolated", False),
    "outline": lambda q: raster_case(q, "outline", True, None if q else 25.0),
    "nearest": nearest_case,
    "extraction": extraction_case,
}
