"""A hand before a board, three frames, as meshes and as Gaussians: a scene that is drawn in no time."""

from __future__ import annotations

import numpy as np
import torch

from handhold.geometry.meshes import interpolate, sample_surface, vertex_normals
from handhold.geometry.rigid import quat_from_matrix
from handhold.hand import HandModel
from handhold.methods.surfels import tangent_frames
from handhold.scene import Body, Mesh, Rigid, Scene, Skinned
from handhold.shapes.gaussians import Gaussians
from handhold.shapes.skinned import SkinnedGaussians

SIZE, FRAMES = (192, 144), 3
K = np.array([[200.0, 0, 96], [0, 200.0, 72], [0, 0, 1]])
HAND_SPLATS = 8000
GREEN, SKIN = (0.1, 0.8, 0.2), (0.8, 0.6, 0.5)


def box() -> tuple[np.ndarray, np.ndarray]:
    """A board of 20 x 16 x 2 cm whose sides share no vertices, so that it has edges."""
    v = np.array([[x, y, z] for x in (-0.1, 0.1) for y in (-0.08, 0.08) for z in (-0.01, 0.01)], np.float32)
    f = [[0, 1, 3], [0, 3, 2], [4, 6, 7], [4, 7, 5], [0, 4, 5], [0, 5, 1], [2, 3, 7], [2, 7, 6], [0, 2, 6], [0, 6, 4]]
    corners = v[np.array([*f, [1, 5, 7], [1, 7, 3]])].reshape(-1, 3)
    return corners, np.arange(36, dtype=np.int32).reshape(-1, 3)


def discs(v: torch.Tensor, f: torch.Tensor, color: tuple, count: int, size: float, weights=None):
    """Flat Gaussians on a mesh; with the skinning weights (V,16) of its vertices if there are some."""
    x, face, bary = sample_surface(v, f, count, torch.Generator().manual_seed(0))
    n = torch.nn.functional.normalize(interpolate(vertex_normals(v, f), f, face, bary), dim=-1)
    scales = torch.tensor([size, size, 0.1 * size]).repeat(count, 1)
    colors, ids = torch.tensor(color).repeat(count, 1), torch.zeros(count, dtype=torch.int64)
    g = Gaussians(x, quat_from_matrix(tangent_frames(n)), scales, torch.full((count,), 0.97), colors, ids)
    return g if weights is None else SkinnedGaussians(g, interpolate(weights, f, face, bary))


def made() -> tuple[Scene, dict]:
    """The hand 45 cm away with its back to the camera, the board 10 cm behind it; frame 2 has no hand."""
    model = HandModel.open("right")
    betas = np.zeros(10, np.float32)
    rest = model.with_shape().vertices
    turn = torch.zeros(16, 3)
    turn[0] = torch.tensor([np.pi / 2, 0, 0])
    transl = np.tile(np.float32([0.09, 0, 0.45]), (FRAMES, 1))
    transl[:, 0] += 0.01 * np.arange(FRAMES)
    pose = np.tile(turn.numpy(), (FRAMES, 1, 1))
    posed = model.with_shape().with_pose(torch.from_numpy(pose), torch.from_numpy(transl))
    motion = Skinned("open_hand_right", pose, betas, transl, posed.vertices.numpy(), posed.joints.numpy())
    hand = Mesh(rest.numpy(), np.asarray(model.faces), np.tile(np.float32(SKIN), (len(rest), 1)))
    v, f = box()
    poses = np.tile(np.eye(4, dtype=np.float32), (FRAMES, 1, 1))
    poses[:, 2, 3] = 0.56
    state = (np.ones(FRAMES, np.float32), np.array(["sfm"] * FRAMES))
    bodies = {
        "right": Body(hand, motion, np.array([True, True, False]), *state),
        "object": Body(Mesh(v, f, np.tile(np.float32(GREEN), (36, 1))), Rigid(poses), np.ones(FRAMES, bool), *state),
    }
    splats = {
        "right": discs(rest, model.faces, SKIN, HAND_SPLATS, 0.0012, model.weights),
        "object": discs(torch.from_numpy(v), torch.from_numpy(f).long(), GREEN, 8000, 0.0016),
    }
    return Scene(K, SIZE, 10.0, np.arange(10, 10 + FRAMES), np.tile(np.eye(4), (FRAMES, 1, 1)), bodies), splats
