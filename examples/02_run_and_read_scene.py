"""Reconstruct a video, or open a finished run, and read what is in the scene.

python examples/02_run_and_read_scene.py VIDEO OUT     reconstruct VIDEO into the run folder OUT (minutes), then read it
python examples/02_run_and_read_scene.py RUN           read a run folder or a scene.npz
"""

import sys
from pathlib import Path

import numpy as np

import handhold


def main(source: str, out: str | None = None) -> None:
    if out is not None:
        result = handhold.run(source, out, handhold.Config())
        print("seconds by stage:", result.seconds)
        for text in result.reasons:
            print("partial:", text)
        source = out
    path = Path(source)
    scene = handhold.Scene.load(path / "scene.npz" if path.is_dir() else path)
    print(f"{len(scene.frames)} frames, {scene.size[0]}x{scene.size[1]}, {scene.fps:g} per second")

    for name, body in scene.bodies.items():
        how, counts = np.unique(body.reason, return_counts=True)
        told = ", ".join(f"{h or 'unnamed'} {c}" for h, c in zip(how, counts, strict=True))
        print(f"{name}: {body.valid.sum()} valid frames, confidence {body.confidence.mean():.2f} ({told})")

    thing = scene.bodies.get("object")
    if thing is not None:
        size = 100 * np.ptp(thing.shape.vertices, axis=0)
        print(f"object: {len(thing.shape.vertices)} vertices, {' x '.join(f'{s:.1f}' for s in size)} cm")
        if thing.shape.observed is not None:
            print(f"object: {100 * thing.shape.observed.mean():.0f} % of its surface was seen")

    for side in ("right", "left"):
        if side not in scene.bodies or thing is None:
            continue
        hand = scene.bodies[side]
        both = np.flatnonzero(
            hand.valid & thing.valid
        )  # a frame that is not valid holds a guess: do not measure with it
        if not len(both):
            continue
        # fingertips in the object's frame: how much they wander is how much the grasp slips
        object_from_world = np.linalg.inv(thing.motion.world_from_body[both])
        tips = hand.motion.joints[both][:, [4, 8, 12, 16, 20]]
        tips = np.einsum("fab,ftb->fta", object_from_world[:, :3, :3], tips) + object_from_world[:, None, :3, 3]
        slip = 1e3 * np.linalg.norm(tips - np.median(tips, axis=0), axis=-1)
        print(f"{side} hand: its fingertips stay within {np.median(slip):.0f} mm on the object (median)")
        f = both[len(both) // 2]
        corner = scene.K @ hand.motion.joints[f, 8]  # a static camera's frame is the world
        print(f"{side} index fingertip in frame {scene.frames[f]}: pixel {np.round(corner[:2] / corner[2], 1)}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit(__doc__)
    main(*sys.argv[1:])
