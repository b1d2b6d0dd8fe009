"""Meshes that the user gives: OBJ and PLY files as vertices and triangles, colours and all else ignored."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from ...errors import UnusableInput

MAX_BYTES = 256 << 20
_TYPES = {
    "char": "i1", "int8": "i1", "uchar": "u1", "uint8": "u1", "short": "i2", "int16": "i2", "ushort": "u2",
    "uint16": "u2", "int": "i4", "int32": "i4", "uint": "u4", "uint32": "u4", "float": "f4", "float32": "f4",
    "double": "f8", "float64": "f8",
}  # fmt: skip


def read_mesh(path: str | os.PathLike) -> tuple[np.ndarray, np.ndarray]:
    """Vertices (V,3) float64 in the file's units and triangles (T,3) int64 of an .obj or .ply file (ascii or binary).

    Polygons are cut into fans, vertices at one place are joined, triangles without area and unused vertices left out.
    Raises `UnusableInput` where the file is no such mesh, or larger than 256 MiB.
    """
    path = Path(path)
    try:
        if path.stat().st_size > MAX_BYTES:
            raise UnusableInput(f"{path} is larger than {MAX_BYTES >> 20} MiB; give a simpler mesh.")
        data = path.read_bytes()
        vertices, polygons = _ply(data) if data[:3] == b"ply" else _obj(data)
        faces = np.array([(p[0], p[i], p[i + 1]) for p in polygons for i in range(1, len(p) - 1)], np.int64)
        if not len(faces) or not np.isfinite(vertices).all() or faces.min() < 0 or faces.max() >= len(vertices):
            raise ValueError("faces and vertices do not fit")
    except (OSError, ValueError, IndexError, KeyError, UnicodeDecodeError, OverflowError) as e:
        raise UnusableInput(f"{path} is not a mesh that can be read ({e}); give an OBJ or PLY file.") from e
    vertices, back = np.unique(vertices, axis=0, return_inverse=True)
    faces = back.reshape(-1)[faces]
    faces = faces[(faces[:, 0] != faces[:, 1]) & (faces[:, 1] != faces[:, 2]) & (faces[:, 2] != faces[:, 0])]
    used, back = np.unique(faces, return_inverse=True)
    return vertices[used], back.reshape(-1, 3)


def _obj(data: bytes) -> tuple[np.ndarray, list[list[int]]]:
    vertices, polygons = [], []
    for line in data.decode("utf-8", "replace").replace("\\\n", " ").splitlines():
        word, _, rest = line.strip().partition(" ")
        if word == "v":
            vertices.append([float(x) for x in rest.split()[:3]])
        elif word == "f":
            corners = [int(x.split("/")[0]) for x in rest.split()]
            polygons.append([i - 1 if i > 0 else len(vertices) + i for i in corners])  # negative: counted from here
    return np.array(vertices, np.float64).reshape(-1, 3), polygons


def _ply(data: bytes) -> tuple[np.ndarray, list[list[int]]]:
    end = data.index(b"end_header")
    body = data.index(b"\n", end) + 1
    kind, elements = "", []
    for line in data[:end].decode("ascii").splitlines():
        words = line.split()
        if words[:1] == ["format"]:
            kind = words[1]
        elif words[:1] == ["element"]:
            elements.append((words[1], int(words[2]), []))
        elif words[:1] == ["property"]:
            elements[-1][2].append(words[1:])
    if kind not in ("ascii", "binary_little_endian", "binary_big_endian"):
        raise ValueError(f"PLY of the kind {kind!r}")
    read = (
        _ascii(data[body:]) if kind == "ascii" else _binary(memoryview(data)[body:], "<" if "little" in kind else ">")
    )
    vertices, polygons = np.zeros((0, 3)), []
    for name, count, properties in elements:
        rows = read(count, properties)
        if name == "vertex":
            at = [[p[-1] for p in properties].index(k) for k in "xyz"]
            vertices = np.array([[float(r[i]) for i in at] for r in rows], np.float64).reshape(-1, 3)
        elif name == "face":
            at = [p[-1] in ("vertex_indices", "vertex_index") for p in properties].index(True)
            polygons = [[int(i) for i in r[at]] for r in rows]
    return vertices, polygons


def _ascii(text: bytes):
    words = iter(text.split())

    def value(p: list[str]):
        if p[0] == "list":
            return [float(next(words)) for _ in range(int(next(words)))]
        return float(next(words))

    def read(count: int, properties: list) -> list:
        try:
            return [[value(p) for p in properties] for _ in range(count)]
        except StopIteration as e:
            raise ValueError("the file is cut off") from e

    return read


def _binary(data: memoryview, order: str):
    at = 0

    def take(kind: str, n: int) -> np.ndarray:
        nonlocal at
        out = np.frombuffer(data, np.dtype(order + _TYPES[kind]), n, at)
        at += out.nbytes
        return out

    def value(p: list[str]):
        return take(p[2], int(take(p[1], 1)[0])) if p[0] == "list" else take(p[0], 1)[0]

    def read(count: int, properties: list) -> list:
        nonlocal at
        if all(p[0] != "list" for p in properties) and properties:  # at once
            row = np.dtype([(str(i), order + _TYPES[p[0]]) for i, p in enumerate(properties)])
            out = np.frombuffer(data, row, count, at)
            at += out.nbytes
            return out.tolist()
        return [[value(p) for p in properties] for _ in range(count)]

    return read
