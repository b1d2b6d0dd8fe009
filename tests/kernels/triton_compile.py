"""Compiles every Triton kernel for sm_90, without a GPU; prints one JSON object: kernel -> registers, stack bytes.

Run by test_triton.py in a process of its own, so that Triton is not imported where other tests run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget

from handhold.kernels import (
    grid_triton,
    splat_triton,
    splat_triton_disk,
    splat_triton_pose,
    splat_triton_project,
    splat_triton_raster,
    ssim_triton,
)

POINTERS = {
    "*i64": ("ids", "order", "ends", "slot"),
    "*i32": ("box", "tiles", "slot_owner", "owner", "start", "last", "median"),
    "*i16": ("slot_tile", "sorted_tile"),
}
TYPES = {name: kind for kind, names in POINTERS.items() for name in names}
TYPES |= {name: "fp32" for name in "h min_step band lr_sdf lr_color b1 b2 c1 c2 rel_eps".split()}
INTEGERS = "count n_ids width height capacity steps n_tiles tiles_x blocks S R"
TYPES |= {name: "i32" for name in INTEGERS.split()}


def usage(kernel, warps: int, types: dict[str, str] = TYPES, **constants) -> dict[str, int]:
    """Registers per thread and bytes of stack, where spilled registers go, as the compiled kernel says."""
    names = [p.name for p in kernel.params]
    signature = {n: "constexpr" if n in constants else types.get(n, "*fp32") for n in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if signature[n].startswith("*")}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", str(path)]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, local = (int(re.search(rf"{name}:(\d+)", said).group(1)) for name in ("REG", "STACK", "LOCAL"))
    return {"registers": registers, "spilled": stack + local}


def splat(name: str, degree: int, F: int, ids: int, coefficients: int, unroll: int, kind: str = "3d") -> dict:
    r, disk = splat_triton_raster, kind == "2d"
    row = 1 << (splat_triton.RECORD[disk] + F - 1).bit_length()
    slot = 1 << (splat_triton.SUMS[disk] + F - 1).bit_length()
    project = (splat_triton_disk.disk_forward, splat_triton_disk.disk_backward)
    if not disk:
        project = (splat_triton_project.project_forward, splat_triton_project.project_backward)
    tile = {"TX": 8, "TY": 8}
    absent = {} if F else {"features": None, "v_features": None}  # as the host passes them
    absent |= {} if ids else {"ids": None}
    shade = {"DEGREE": degree, "COEFFICIENTS": coefficients, "F": F, "ROW": row, "BLOCK": 64}
    draw = {"F": F, "IDS": ids, "ROW": row, "UNROLL": unroll, "DISK": disk, **tile}

    def unused(kernel) -> dict[str, None]:
        return {p.name: None for p in kernel.params if p.name in absent}

    found = {
        "project forward": usage(project[0], 2, IDS=ids, **shade, **tile, **unused(project[0])),
        "project backward": usage(project[1], 2, SLOT=slot, **shade, **unused(project[1])),
        "emit": usage(r.emit, 4, ROW=row, BLOCK=256, DISK=disk, **tile),
        "gather": usage(r.gather, 2, ROW=row, BLOCK=64),
        "raster forward": usage(r.raster_forward, 1, **draw),
        "raster backward": usage(r.raster_backward, 1, SLOT=slot, **draw),
        "sum": usage(r.slot_sum, 1, SLOT=slot, ROWS=8, MANY=4),
    }
    return {f"{name}: {k}": v for k, v in found.items()}


def light() -> dict:
    """The usual kernels; seconds."""
    g, r, s = grid_triton, splat_triton_raster, ssim_triton
    found = splat("3D", -1, 0, 0, 1, 4) | splat("2D", -1, 0, 2, 1, 4, "2d")
    many = TYPES | {"slot_tile": "*i32", "sorted_tile": "*i32"}  # from 32,768 tiles on
    found["emit, many tiles"] = usage(r.emit, 4, many, ROW=16, BLOCK=256, DISK=False, TX=8, TY=8)
    found["gather, many tiles"] = usage(r.gather, 2, many, ROW=16, BLOCK=64)
    found["camera_sum"] = usage(splat_triton_pose.camera_sum, 4, ROWS=32)
    found["sample_forward"] = usage(g.sample_forward, 4, BLOCK=g.POINTS)
    both = {"HAS_GRAD": True, "WANTS_X": True}
    found["sample_backward"] = usage(g.sample_backward_kernel, 4, BLOCK=g.POINTS, **both)
    found["adam"] = usage(g.adam_kernel, 4, BLOCK=g.POINTS)
    found["march"] = usage(g.march_kernel, 1, BLOCK=32)
    for rays, lanes in ((16, 16), (1, 256)):
        found[f"composite_forward {lanes}"] = usage(g.composite_forward, 4, RAYS=rays, SP=lanes)
        found[f"composite_backward {lanes}"] = usage(g.composite_backward, 4, RAYS=rays, SP=lanes)
    for kernel in (s.blur_images, s.blur_gradients, s.image_gradient):
        found[kernel.__name__] = usage(kernel, 8, BLOCK=s.BLOCK)
    found["compare"] = usage(s.compare, 8, BLOCK=s.BLOCK, GRADIENT=True)
    return found


def heavy() -> dict:
    """The most that one pass may hold: harmonics of degree 3, 32 features, 12 bodies."""
    found = splat("harmonics", 3, 8, 0, 16, 4) | splat("features and bodies", -1, 32, 12, 1, 1)
    return found | splat("2D, features and bodies", -1, 32, 12, 1, 1, "2d")


if __name__ == "__main__":
    print(json.dumps({"light": light, "heavy": heavy}[sys.argv[1]](), indent=1))
