"""A finished run seen anew: from the side, with the hand opened, without the hand; and what the hand hides.

python examples/07_novel_views.py RUN [OUT.png]
"""

import sys
from pathlib import Path

import numpy as np

from handhold import Scene
from handhold.datasets.masks import write_png
from handhold.methods.base import fitted_splats
from handhold.view.novel import actors, draw, input_cameras, orbit_cameras


def main(run: str, out: str | None = None, frame: int = 0) -> tuple[float, float]:
    scene = Scene.load(Path(run) / "scene.npz")
    splats = fitted_splats(Path(run) / "3_fit", scene.bodies)  # without any, meshes are drawn
    hands = [name for name in scene.bodies if name != "object"]
    camera, side = input_cameras(scene)[frame], orbit_cameras(scene, 8)[2]

    everything = actors(scene, splats)
    pictures = [
        draw(everything, frame, camera, ("color", "depth", "masks")),
        draw(everything, frame, side),
        draw(actors(scene, splats, poses="open"), frame, camera),
        draw(actors(scene, splats, without=hands), frame, camera),
    ]
    if out:
        write_png(out, np.concatenate([p.color for p in pictures], 1))
        print("wrote", out)

    first = pictures[0]
    seen, whole = first.masks["object"], first.masks_alone["object"]
    near = first.depth_alone["object"][whole]
    print(f"the object covers {whole.mean():.1%} of the picture, {seen.mean():.1%} can be seen")
    if len(near):
        print(f"it is {near.min():.3f} to {near.max():.3f} m away, also where a hand hides it")
    return float(seen.mean()), float(whole.mean())


if __name__ == "__main__":
    main(*sys.argv[1:3])
