import sys
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from handhold.scene import Mesh
from handhold.view import preview

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from truth_scene import demo_sequence, demo_truth, few, truth_scene, with_gap  # noqa: E402

K = np.array([[100.0, 0, 32], [0, 100, 24], [0, 0, 1]])
RED, BLUE = np.array([255, 0, 0], np.uint8), np.array([0, 0, 255], np.uint8)


def rectangle(x0, y0, x1, y1, z=1.0):
    """A rectangle between pixel coordinates, as two triangles at depth z."""
    corners = np.array([[x0, y0, 1], [x1, y0, 1], [x1, y1, 1], [x0, y1, 1.0]]) @ np.linalg.inv(K).T * z
    return corners, np.array([[0, 1, 2], [0, 2, 3]])


def brute_force(triangles, width, height):
    """Depth by asking every pixel centre about every triangle."""
    depth = np.full((height, width), np.inf)
    v, u = np.meshgrid(np.arange(height) + 0.5, np.arange(width) + 0.5, indexing="ij")
    rays = np.stack([(u - K[0, 2]) / K[0, 0], (v - K[1, 2]) / K[1, 1], np.ones_like(u)], -1)
    for a, b, c in triangles:
        weights = rays @ np.linalg.inv(np.stack([a, b, c], 1)).T  # ray = wa a + wb b + wc c
        inside = (weights > 0).all(-1)
        depth = np.where(inside, np.minimum(depth, 1 / weights.sum(-1)), depth)
    return depth


def test_pixel_centres_are_at_a_half():
    depth, _ = preview.rasterise(K, (64, 48), [(*rectangle(10, 5, 20, 9), RED)])
    assert np.isfinite(depth).sum() == 40 and np.isfinite(depth[5:9, 10:20]).all()
    depth, _ = preview.rasterise(K, (64, 48), [(*rectangle(10.6, 5, 20.4, 9), RED)])
    assert np.isfinite(depth).sum() == 36 and np.isfinite(depth[5:9, 11:20]).all()


@pytest.mark.parametrize("budget", [7, 400_000])
def test_depth_is_that_of_the_nearest_triangle(monkeypatch, budget):
    rng = np.random.default_rng(0)
    triangles = rng.uniform([-0.5, -0.4, 0.7], [0.5, 0.4, 1.6], (30, 3, 3))
    covered = preview._covered
    monkeypatch.setattr(preview, "_covered", lambda *a: covered(*a, budget=budget))
    vertices, faces = triangles.reshape(-1, 3), np.arange(90).reshape(-1, 3)
    depth, color = preview.rasterise(K, (64, 48), [(vertices, faces, RED)])
    truth = brute_force(triangles, 64, 48)
    same = np.isfinite(depth) == np.isfinite(truth)
    assert same.mean() > 0.999
    both = np.isfinite(depth) & np.isfinite(truth)
    assert np.abs(depth[both] - truth[both]).max() < 1e-3 and both.sum() > 500
    assert (color[both][:, 0] > 90).all() and not color[~np.isfinite(depth)].any()


def test_the_nearer_mesh_hides_the_other_and_nothing_behind_the_camera_is_drawn():
    grey = np.full((48, 64, 3), 100, np.uint8)
    near, far = (*rectangle(10, 10, 30, 30, 0.5), RED), (*rectangle(20, 10, 40, 30, 2.0), BLUE)
    for parts in ([near, far], [far, near]):
        out = preview.draw_meshes(grey, K, parts)
        assert out[20, 25, 0] > 200 and out[20, 25, 2] == 0 and out[20, 35, 2] > 200
        assert (out[40] == 100).all()
    behind = (near[0] * [1, 1, -1], near[1], RED)
    assert np.array_equal(preview.draw_meshes(grey, K, [behind]), grey)
    assert np.array_equal(preview.draw_meshes(grey, K, [(near[0] * np.nan, near[1], RED)]), grey)
    assert np.array_equal(preview.draw_meshes(grey, K, []), grey)
    half = preview.draw_meshes(grey, K, [near], opacity=0.5)
    assert 160 < half[20, 15, 0] < 185 and half[20, 15, 1] == 50


def test_the_turntable_is_upright_and_centred():
    centre = np.array([0.1, -0.2, 0.6])
    for azimuth in (0.0, 1.0, 4.0):
        K_orbit, cam_from_world = preview.orbit_camera(centre, 0.1, azimuth, (64, 48))
        assert np.linalg.det(cam_from_world[:3, :3]) == pytest.approx(1)

        def see(point, K_orbit=K_orbit, cam_from_world=cam_from_world):
            x = K_orbit @ (cam_from_world[:3, :3] @ point + cam_from_world[:3, 3])
            return x[:2] / x[2]

        assert np.allclose(see(centre), [32, 24])
        assert see(centre + [0, -0.1, 0])[1] < 5  # world -y is up, and a sphere of the radius just fits
        assert np.abs(see(centre + [0.1, 0, 0]) - [32, 24]).max() < 24


@pytest.fixture(scope="module")
def demo():
    gt = demo_truth()
    scene = truth_scene(gt)
    return scene, demo_sequence(scene, gt, 48), gt


def test_the_overlay_lies_on_the_masks(demo):
    scene, sequence, gt = demo
    for frame in (0, 30):
        parts = preview.scene_parts(scene, frame, np.eye(4))
        depth, _ = preview.rasterise(scene.K, scene.size, parts)
        mask, drawn = gt["masks"][frame] > 0, np.isfinite(depth)
        assert (mask & drawn).sum() / mask.sum() > 0.99  # the sleeve hides some of what is drawn
        truth = gt["depth"][frame].astype(float)
        assert np.median(np.abs(depth - truth)[mask & drawn]) < 1e-3


def test_preview_is_a_video_of_three_panels(demo, tmp_path):
    scene, sequence, _ = demo
    scene, sequence = few(scene, sequence, 4)
    scene = with_gap(scene, "object", slice(2, 3))
    preview.write_preview(tmp_path / "p.mp4", sequence, scene, max_side=240)
    with av.open(str(tmp_path / "p.mp4")) as clip:
        stream = clip.streams.video[0]
        frames = [f.to_ndarray(format="rgb24") for f in clip.decode(video=0)]
        assert stream.codec_context.name in ("h264", "mpeg4") and float(stream.average_rate) == pytest.approx(15)
    assert len(frames) == 4 and frames[0].shape == (180, 720, 3)
    still = frames[0].astype(float)
    assert np.abs(still[60:, :240] - sequence.frames[0][::2, ::2][60:]).mean() < 12  # the first panel is the video
    assert np.abs(still[100:, -30:] - preview.BACKDROP).mean() < 6
    assert [p.name for p in tmp_path.iterdir()] == ["p.mp4"]


def test_a_heavy_object_is_lightened(demo):
    scene, _, _ = demo
    body = scene.bodies["object"]
    assert preview.for_viewing(scene, 10_000) is scene
    light = preview.for_viewing(scene, 500)
    assert len(light.bodies["object"].shape.faces) <= 500
    assert light.bodies["right"] is scene.bodies["right"] and light.bodies["object"].motion is body.motion
    far = replace(scene, bodies={"object": replace(body, shape=Mesh(body.shape.vertices * np.nan, body.shape.faces))})
    assert np.isfinite(preview.focus(far)[1])
