"""BIGS on a tiny clip that its own renderer drew: a printed ball between two hands."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from drawn_ball import ball, paint
from handhold.geometry.queries import MeshQueries
from handhold.geometry.rigid import so3_exp
from handhold.kernels.grid import SdfGrid
from handhold.methods.base import posed_hand
from handhold.methods.bigs import Interaction, finish, meetings, optimiser_of, subjects, train
from handhold.methods.bigs_model import detached, draw, score
from handhold.methods.crops import crops
from handhold.methods.settings import BigsConfig
from handhold.methods.surfels import OBJECT
from handhold.priors.sds import Guidance
from handhold.scene import Mesh, Sequence

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE, FRAMES = 48, 5
K = np.array([[95.0, 0, SIZE / 2], [0, 95.0, SIZE / 2], [0, 0, 1]])
TINY = BigsConfig(levels=0, count=400, resolution=16, features=4)


@dataclass(frozen=True)
class Track:
    pose: np.ndarray
    betas: np.ndarray
    transl: np.ndarray
    confidence: np.ndarray
    reason: np.ndarray


@dataclass(frozen=True)
class Start:
    tracked: dict
    hands: dict
    reason: np.ndarray


@dataclass(frozen=True)
class Fine:
    mesh: Mesh
    confidence: np.ndarray
    ambiguous: tuple = ()


def hand_track(x: float) -> Track:
    pose = np.zeros((FRAMES, 16, 3), np.float32)
    transl = np.tile(np.float32([x, 0.0, 0.42]), (FRAMES, 1))
    return Track(pose, np.zeros(10), transl, np.full(FRAMES, 0.5), np.full(FRAMES, "grasp"))


def setting(config: BigsConfig, tracks: dict[str, Track], sequence: Sequence | None = None, seen: bool = True):
    """Views, subjects, start and generator on a clip; without one, a grey one."""
    v, f = ball()
    observed = np.ones(len(v), bool) if seen else v[:, 2] < 0
    mesh = Mesh(v, f, np.full((len(v), 3), 0.5, np.float32), observed)
    poses = np.tile(np.eye(4), (FRAMES, 1, 1))
    w = torch.tensor([[0.2, 1.0, 0.1]]).double() * torch.arange(FRAMES)[:, None] * 0.2
    poses[:, :3, :3], poses[:, :3, 3] = so3_exp(w).numpy(), [0, 0, 0.4]
    start = Start(tracks, {s: posed_hand(s, t) for s, t in tracks.items()}, np.full(FRAMES, "sfm"))
    if sequence is None:
        blank = np.zeros((FRAMES, SIZE, SIZE), bool)
        blank[:, 4:-4, 4:-4] = True
        masks = {"object": blank, **{s: np.roll(blank, 20, 2) & ~blank for s in tracks}}
        sequence = Sequence(
            np.zeros((FRAMES, SIZE, SIZE, 3), np.uint8), np.arange(FRAMES), 10.0, K, "given", masks=masks
        )
    views = crops(sequence, np.ones(FRAMES), poses, {s: h[0] for s, h in start.hands.items()})
    generator = torch.Generator().manual_seed(0)
    return (
        sequence,
        mesh,
        poses,
        start,
        views,
        subjects(sequence, start, mesh, poses, views, config, generator, "cpu", 0),
    )


@pytest.fixture(scope="module")
def clip():
    """Frames and masks of a printed ball and two hands of different skin; their true tracks."""
    tracks = {"right": hand_track(-0.02), "left": hand_track(0.02)}
    sequence, mesh, poses, start, views, s = setting(replace(TINY, shared_hands=False), tracks)
    with torch.no_grad():
        s.object.color.copy_(torch.from_numpy(paint(s.base.points.numpy())).clamp(0.02, 0.98).logit())
        for k, side in enumerate(tracks):
            s.sources[side].color.copy_(torch.tensor([0.8, 0.5 + 0.1 * k, 0.4]).logit().expand(len(s.template), 3))
        whole = replace(views[0], image=torch.zeros(SIZE, SIZE, 3), K=torch.from_numpy(K).float())
        values, rest = s.object_values(), s.rest_hands()
        outs = [draw(replace(whole, frame=i, has_object=True), s, values, rest).out for i in range(FRAMES)]
    frames = np.stack([(o.color[0].clamp(0, 1).numpy() * 255).round().astype(np.uint8) for o in outs])
    shares = np.stack([o.ids[0].numpy() for o in outs])
    masks = {name: shares[..., k] > 0.5 for k, name in enumerate(("object", "right", "left"))}
    return Sequence(frames, np.arange(FRAMES), 10.0, K, "given", masks=masks), tracks


def grid() -> SdfGrid:
    v, f = ball()
    axis = np.linspace(-0.08, 0.08, 17)
    x = np.stack(np.meshgrid(axis, axis, axis, indexing="ij"), -1).reshape(-1, 3)
    phi = MeshQueries(v, f).signed_distance(x).reshape(17, 17, 17)
    return SdfGrid(torch.from_numpy(phi).float(), [-0.08] * 3, 0.01)


def run(clip, config: BigsConfig, steps: int = 16, wrong: float = 0.0, prior=None):
    sequence, tracks = clip
    sign = np.where(np.arange(FRAMES) % 2, 1, -1)[:, None]  # not all alike: that the hands' Gaussians could explain
    off = {s: replace(t, transl=t.transl + np.float32([wrong, 0, 0]) * sign) for s, t in tracks.items()}
    sequence, mesh, poses, start, views, s = setting(config, off, sequence)
    s.complete = prior is not None
    opt, generator = optimiser_of(s), torch.Generator().manual_seed(1)
    quiet = lambda share, what: None  # noqa: E731
    first = score(views, s, held_out=False)
    train(views, s, opt, config, steps, generator, None, prior, quiet)
    before = score(views, s)
    touch = meetings(start, s, poses, mesh)
    met = {k: m.figures() for k, m in touch.items()}
    if config.stage2:
        train(views, s, opt, config, 2 * steps, generator, Interaction(grid(), touch), None, quiet)
    fitted = finish(sequence, start, Fine(mesh, np.ones(FRAMES)), views, s, config, before, met, touch, [])
    return s, first, score(views, s, held_out=False), fitted


def test_both_stages_explain_the_pictures(clip):
    s, first, last, fitted = run(clip, TINY)
    assert last.psnr > first.psnr + 2 and last.iou > 0.9
    assert {"object_gaussians", "right_gaussians", "left_gaussians", "bigs_metrics"} <= set(fitted.arrays)
    g = fitted.arrays["left_gaussians"]
    assert g["weights"].shape == (len(g["means"]), 16) and np.allclose(g["weights"].sum(1), 1, atol=1e-4)
    assert all(
        np.isfinite(x).all() for name in ("object_gaussians", "left_gaussians") for x in fitted.arrays[name].values()
    )
    assert fitted.hand_colors["right"].shape == (len(s.hands["right"].model.v_template), 3)


def test_a_triplane_explains_them_too(clip):
    config = replace(TINY, variant="triplane")
    *_, views, s = setting(config, clip[1], clip[0])
    first = score(views, s, held_out=False)
    train(views, s, optimiser_of(s), config, 16, torch.Generator().manual_seed(1), None, None, lambda share, what: None)
    assert score(views, s, held_out=False).psnr > first.psnr + 0.3


def test_hands_that_were_tracked_beside_their_masks_come_back(clip):
    _, tracks = clip
    *_, fitted = run(clip, TINY, steps=20, wrong=0.008)
    for side, t in tracks.items():
        off = np.abs(fitted.hands[side].transl[:, 0] - t.transl[:, 0])
        assert np.median(off) < 0.007, off


def test_without_the_second_stage_poses_stay(clip):
    _, tracks = clip
    *_, fitted = run(clip, replace(TINY, stage2=False), steps=10)
    assert np.allclose(fitted.hands["right"].pose, tracks["right"].pose, atol=1e-6)


def test_one_subject_alone_does_not_answer_for_the_others(clip):
    *_, views, s = setting(TINY, clip[1], clip[0])
    drawn = draw(views[0], s, s.object_values(), s.rest_hands(), bodies={OBJECT})
    assert drawn.bodies == (OBJECT,) and drawn.out.ids[..., 1:].sum() == 0


def test_a_network_of_the_users_is_asked_about_the_pictures_that_teach(clip):
    *_, views, s = setting(TINY, clip[1], clip[0])
    asked = []
    network = lambda x: [asked.append(x.requires_grad) or x]  # noqa: E731
    quiet = lambda share, what: None  # noqa: E731
    train(views, s, optimiser_of(s), TINY, 2, torch.Generator().manual_seed(1), None, None, quiet, network)
    assert any(asked) and not all(asked)  # the drawn image with gradients, the frame without


def test_held_out_frames_teach_no_colour(clip):
    *_, views, s = setting(TINY, clip[1], clip[0])
    values, rest = detached(s.object_values(), s.rest_hands())
    held = next(v for v in views if v.held_out)
    draw(held, s, values, rest, learn=False, move=True).out.color.sum().backward()
    assert s.object.color.grad is None and s.light.grad is None and s.poses.rotation[held.frame].grad is not None


class Grey:
    """A prior that wants everything grey."""

    alphas_cumprod = torch.linspace(0.99, 0.01, 50)

    def encode(self, image):
        self.latent = image.detach()
        return image

    def predict(self, noisy, step, condition):
        kept = self.alphas_cumprod[step]
        return (noisy - kept.sqrt() * torch.full_like(noisy, 0.5)) / (1 - kept).sqrt()


def test_a_prior_colours_only_what_no_frame_has_seen(clip):
    sequence, tracks = clip
    config = replace(TINY, densify=False)
    colors = {}
    for name in ("with", "without", "again"):
        *_, views, s = setting(config, {}, sequence, seen=False)
        prior = Guidance(Grey(), None, 12, weight=1.0) if name == "with" else None
        s.complete = prior is not None
        quiet = lambda share, what: None  # noqa: E731
        train(views, s, optimiser_of(s), config, 12, torch.Generator().manual_seed(1), None, prior, quiet)
        colors[name] = s.object().free.color.detach()
    unseen = ~s.base.observed[:, 0]
    assert torch.equal(colors["without"], colors["again"])
    assert not torch.equal(colors["with"][unseen], colors["without"][unseen])
    start = s.start[unseen]
    assert torch.equal(s.object_values().free.color[unseen], start)
