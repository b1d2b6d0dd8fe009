"""The hand model in one sitting: shape, pose, joints, the left hand, and points carried along by the skin.

python examples/01_hand_model.py [OUT.obj]
"""

import sys
from pathlib import Path

import torch

from handhold.geometry import meshes
from handhold.hand import HandModel, mirror_pose
from handhold.hand import joints as jt


def main(out: str | None = None) -> None:
    hand = HandModel.open("right")
    print(f"{hand.name}: {len(hand.v_template)} vertices, {len(hand.faces)} triangles, {hand.n_betas} shape directions")

    # five hands from small to large, each closing in three steps: batches broadcast
    betas = torch.zeros(5, 1, 10)
    betas[:, 0, 0] = torch.linspace(-2, 2, 5)
    theta = torch.zeros(3, 16, 3)
    theta[:, 1:13] = torch.linspace(0, 1, 3)[:, None, None] * hand.joint_frames[:12, :, 0]  # bend all four fingers
    posed = hand.with_shape(betas).with_pose(theta, torch.tensor([0.0, 0.0, 0.5]))
    print("vertices", tuple(posed.vertices.shape), "joints", tuple(posed.joints.shape))

    reach = (posed.joints[..., 12, :] - posed.joints[..., 0, :]).norm(dim=-1) * 1e3
    for row, size in zip(reach, betas[:, 0, 0], strict=True):
        print(
            f"beta0 {size:+.0f}: wrist to middle fingertip {', '.join(f'{x:.0f}' for x in row)} mm as the hand closes"
        )
    print("beyond the joint limits:", [round(float(x), 3) for x in hand.limit_loss(theta * 2.5)], "squared radians")

    # closed for signed distances; mirrored for the other hand
    sealed = hand.sealed()
    volume = 1e6 * meshes.volume(sealed.v_template, sealed.faces)
    print(f"sealed: watertight {meshes.is_watertight(sealed.faces)}, {volume:.0f} cm^3")
    left = hand.mirrored().with_shape().with_pose(mirror_pose(theta[1]))
    print("left index fingertip", [round(float(x), 3) for x in left.joints[jt.OPENPOSE_NAMES.index("index_tip")]])

    # a point a millimetre above the skin follows it from pose to pose
    a, b = (hand.with_shape().with_pose(t) for t in (theta[0], theta[2]))
    point = a.vertices[hand.tip_ids[1]][None] + torch.tensor([[0.0, 0.001, 0.0]])
    print("carried along:", [round(float(x), 4) for x in b.repose(a.unpose(point))[0]])

    if out:
        lines = [f"v {x:.5f} {y:.5f} {z:.5f}" for x, y, z in posed.vertices[2, 1].tolist()]
        Path(out).write_text("\n".join(lines + [f"f {i} {j} {k}" for i, j, k in (hand.faces + 1).tolist()]) + "\n")
        print("wrote", out)


if __name__ == "__main__":
    main(*sys.argv[1:2])
