"""`<body>.ply`: the coloured surfaces, and the little mesh arithmetic that exporters and viewers share."""

from __future__ import annotations

import os

import numpy as np

from ..files import write_atomically
from ..geometry.meshes import fill_holes
from ..scene import Mesh


def write_ply(path: str | os.PathLike, mesh: Mesh, frame: str = "object frame") -> None:
    """Write a triangle mesh as binary little-endian PLY, with the name of its frame as a comment. Atomic.

    Vertex properties: x y z float (metres), red green blue uchar (sRGB), observed uchar.
    `observed` is 0 on surface that no frame has seen. A mesh without colours is grey, one without `observed` all seen.
    """
    vertices, faces = np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces)
    check_mesh(vertices, faces)
    record = np.dtype([("p", "<f4", 3), ("c", "u1", 3), ("observed", "u1")])
    points = np.zeros(len(vertices), record)
    points["p"], points["c"] = vertices, colors_u8(mesh)
    points["observed"] = True if mesh.observed is None else np.asarray(mesh.observed, bool)
    triangles = np.zeros(len(faces), np.dtype([("n", "u1"), ("i", "<i4", 3)]))
    triangles["n"], triangles["i"] = 3, faces
    lines = [
        "ply",
        "format binary_little_endian 1.0",
        f"comment handhold: {frame}, metres, sRGB",
        f"element vertex {len(points)}",
    ]
    lines += [f"property float {k}" for k in "xyz"]
    lines += [f"property uchar {k}" for k in ("red", "green", "blue", "observed")]
    lines += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header", ""]
    write_atomically(path, "\n".join(lines).encode() + points.tobytes() + triangles.tobytes())


def sealed(mesh: Mesh) -> Mesh:
    """Watertight: each hole closed by a fan around one new vertex, the mean of its ring (`HandModel.sealed`)."""
    faces, rings = fill_holes(np.asarray(mesh.faces), len(mesh.vertices))

    def extended(values: np.ndarray) -> np.ndarray:
        return np.concatenate([values, *(values[r].mean(0, keepdims=True) for r in rings)])

    colors = None if mesh.colors is None else extended(np.asarray(mesh.colors))
    seen = None if mesh.observed is None else extended(np.asarray(mesh.observed, np.float32)) > 0.5
    return Mesh(extended(np.asarray(mesh.vertices)), faces, colors, seen)


def check_mesh(vertices: np.ndarray, faces: np.ndarray) -> None:
    """Raise ValueError unless vertices are finite (V,3) and faces (T,3) index them."""
    if vertices.ndim != 2 or vertices.shape[1] != 3 or faces.ndim != 2 or faces.shape[1] != 3:
        raise ValueError(f"a mesh is vertices (V,3) and faces (T,3), not {vertices.shape} and {faces.shape}")
    if not np.isfinite(vertices).all():
        raise ValueError("the mesh has vertices that are not finite")
    if len(faces) and (faces.min() < 0 or faces.max() >= len(vertices)):
        raise ValueError("the mesh has faces that name vertices it does not have")


def colors_u8(mesh: Mesh) -> np.ndarray:
    """(V,3) uint8 sRGB; grey where the mesh has no colours."""
    if mesh.colors is None:
        return np.full((len(mesh.vertices), 3), 160, np.uint8)
    return (np.clip(np.nan_to_num(mesh.colors), 0, 1) * 255 + 0.5).astype(np.uint8)


def vertex_normals(vertices: np.ndarray, faces: np.ndarray) -> np.ndarray:
    """(V,3) unit normals, area-weighted over the faces around each vertex; (0,0,1) where there are none."""
    a, b, c = (np.asarray(vertices, np.float64)[faces[:, k]] for k in range(3))
    weighted = np.cross(b - a, c - a)
    count = len(vertices)
    flat = np.asarray(faces).reshape(-1)
    normals = np.stack([np.bincount(flat, np.repeat(weighted[:, k], 3), count) for k in range(3)], 1)
    length = np.linalg.norm(normals, axis=1, keepdims=True)
    return np.where(length > 1e-20, normals / np.maximum(length, 1e-20), [0.0, 0.0, 1.0]).astype(np.float32)


def simplify(mesh: Mesh, max_faces: int) -> Mesh:
    """A mesh of at most `max_faces` triangles, by merging the vertices of each cell of a grid.

    A mesh that is small enough comes back as it is. For viewing, not for results. Rossignac and Borrel,
    "Multi-resolution 3D approximations for rendering complex scenes", 1993.
    """
    if len(mesh.faces) <= max_faces:
        return mesh
    vertices, faces = np.asarray(mesh.vertices, np.float64), np.asarray(mesh.faces)
    a, b, c = (vertices[faces[:, k]] for k in range(3))
    area = np.linalg.norm(np.cross(b - a, c - a), axis=1).sum() / 2
    cell = np.sqrt(2 * area / max_faces)  # a cell of side h on a surface leaves about 2 triangles per h^2
    while True:
        keys = np.floor((vertices - vertices.min(0)) / cell).astype(np.int64)
        _, group = np.unique(keys, axis=0, return_inverse=True)
        group = group.reshape(-1)
        merged = np.sort(group[faces], 1)
        whole = (merged[:, 0] != merged[:, 1]) & (merged[:, 1] != merged[:, 2])
        kept = group[faces][whole]
        _, first = np.unique(merged[whole], axis=0, return_index=True)
        kept = kept[np.sort(first)]
        if len(kept) <= max_faces:
            break
        cell *= 1.1 * np.sqrt(len(kept) / max_faces)
    count = np.bincount(group)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.stack([np.bincount(group, values[:, k]) / count for k in range(values.shape[1])], 1).astype(
            np.float32
        )

    colors = None if mesh.colors is None else mean(np.asarray(mesh.colors, np.float64))
    observed = None if mesh.observed is None else np.bincount(group, mesh.observed) * 2 >= count
    return Mesh(mean(vertices), kept.astype(np.int32), colors, observed)
