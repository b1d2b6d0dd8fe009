"""`<body>_splat.ply`: Gaussians in the field layout of 3D Gaussian Splatting (Kerbl et al., SIGGRAPH 2023)."""

from __future__ import annotations

import os

import numpy as np

from ..files import write_atomically

SH_C0 = 0.28209479177387814  # the constant spherical harmonic, 1 / (2 sqrt(pi))
FIELDS = (
    *("x", "y", "z", "nx", "ny", "nz", "f_dc_0", "f_dc_1", "f_dc_2", "opacity"),
    *("scale_0", "scale_1", "scale_2", "rot_0", "rot_1", "rot_2", "rot_3"),
)


def write_splats(
    path: str | os.PathLike,
    means: np.ndarray,
    quats: np.ndarray,
    scales: np.ndarray,
    opacities: np.ndarray,
    colors: np.ndarray,
) -> None:
    """Write Gaussians as a 3DGS .ply (spherical harmonics of degree 0). Atomic.

    means (N,3) metres; quats (N,4) wxyz, any length; scales (N,3) standard deviations in metres;
    opacities (N,) in [0,1]; colors (N,3) sRGB in [0,1], as seen. Stored as 3DGS viewers expect: log scales, logit
    opacities, (color - 0.5) / SH_C0. Gaussians with a value that is not finite are left out.
    """
    n = len(means)
    shapes = {"means": (n, 3), "quats": (n, 4), "scales": (n, 3), "opacities": (n,), "colors": (n, 3)}
    given = {"means": means, "quats": quats, "scales": scales, "opacities": opacities, "colors": colors}
    for name, shape in shapes.items():
        if np.shape(given[name]) != shape:
            raise ValueError(f"{name} must be {shape}, not {np.shape(given[name])}")
    means, quats, scales, opacities, colors = (np.asarray(v, np.float64) for v in given.values())
    alpha = np.clip(opacities, 1e-6, 1 - 1e-6)
    quats = quats / np.maximum(np.linalg.norm(quats, axis=1, keepdims=True), 1e-12)
    columns = [means, np.zeros((n, 3)), (colors - 0.5) / SH_C0, np.log(alpha / (1 - alpha))[:, None]]
    columns += [np.log(np.maximum(scales, 1e-9)), quats]
    table = np.concatenate(columns, 1)
    table = table[np.isfinite(table).all(1)].astype("<f4")
    lines = ["ply", "format binary_little_endian 1.0", f"element vertex {len(table)}"]
    lines += [f"property float {k}" for k in FIELDS] + ["end_header", ""]
    write_atomically(path, "\n".join(lines).encode() + table.tobytes())
