"""Prompts without clicks and the fusion of answers, with a segmenter that only looks at colours; loading, where
transformers is installed, with a tiny random SAM."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from handhold.config import Config, PrepareConfig, absolute, is_sam
from handhold.errors import MissingAsset, UnusableInput
from handhold.regressors.sam import CLASSES, open_sam, refine_masks, sam_choice
from handhold.regressors.sam_prompts import choose_prompts, fuse
from handhold.scene import Sequence

COUNT, H, W = 24, 60, 80
NAMES = ("right", "object", "other")
COLORS = {"right": (200, 150, 120), "object": (30, 60, 200), "other": (20, 120, 20)}


def truth() -> dict[str, np.ndarray]:
    out = {n: np.zeros((COUNT, H, W), bool) for n in NAMES}
    for i in range(COUNT):
        x = 5 + i
        out["right"][i, 20:40, x : x + 14] = True
        out["object"][i, 22:38, x + 14 : x + 30] = True
        out["other"][i, 40:58, x : x + 12] = True
    return out


def sequence() -> Sequence:
    """A clip, and first masks of it: eroded, wrong and unsure in frames 10 to 13, missing in frame 20."""
    frames = np.full((COUNT, H, W, 3), 90, np.uint8)
    masks, sure = {}, {}
    for name, mask in truth().items():
        frames[mask] = COLORS[name]
        first = mask.copy()
        first[:, ::7] &= np.random.default_rng(1).random((COUNT, len(range(0, H, 7)), W)) > 0.5
        first[10:14] = np.roll(first[10:14], 15, axis=1)
        first[20] = False
        masks[name], sure[name] = first, np.full(COUNT, 0.8, np.float32)
        sure[name][10:14], sure[name][20] = 0.2, 0
    return Sequence(frames, np.arange(COUNT), 30.0, np.eye(3), "given", masks=masks, mask_confidence=sure)


class ByColor:
    """Takes the colour under a body's positive points, and answers at half the size."""

    def __init__(self):
        self.prompts = []

    def __call__(self, frames, prompts, bodies, report):
        self.prompts = prompts
        out = np.full((2, len(frames), bodies, H // 2, W // 2), -8.0, np.float16)
        for body in {p.body for p in prompts}:
            mine = [p for p in prompts if p.body == body]
            inside = [(p.frame, x, y) for p in mine for x, y in p.points[p.labels == 1]]
            color = np.median([frames[f, int(y), int(x)] for f, x, y in inside], axis=0)
            near = np.abs(frames[:, ::2, ::2].astype(float) - color).max(-1) < 20
            out[:, :, body][:, near] = 8.0
        report(1.0)
        return out


def iou(a, b):
    return (a & b).sum() / (a | b).sum()


def test_prompts_are_in_sure_frames_apart_and_inside():
    s = sequence()
    masks = [s.masks[n] for n in NAMES]
    prompts = choose_prompts(masks, [s.mask_confidence[n] for n in NAMES])
    for body, name in enumerate(NAMES):
        mine = [p for p in prompts if p.body == body]
        frames = [p.frame for p in mine]
        assert 2 <= len(frames) <= 4 and frames == sorted(frames) and min(np.diff(frames)) >= 0.12 * COUNT
        assert not set(frames) & {10, 11, 12, 13, 20}
        for p in mine:
            x, y = p.points.astype(int).T
            assert (masks[body][p.frame][y, x] == (p.labels == 1)).all() and (p.labels == 1).any()
            ys, xs = np.nonzero(masks[body][p.frame])
            assert p.box.tolist() == [xs.min(), ys.min(), xs.max(), ys.max()]
            for (px, py), label in zip(p.points.astype(int), p.labels, strict=True):
                assert label or any(m[p.frame][py, px] for k, m in enumerate(masks) if k != body), name
    assert [(p.frame, p.body) for p in prompts] == sorted((p.frame, p.body) for p in prompts)
    none = np.zeros_like(masks[0])
    assert choose_prompts([none], [np.zeros(COUNT)]) == []


def test_answers_take_the_place_of_the_first_masks():
    s, true = sequence(), truth()
    told = []
    got = refine_masks(ByColor(), s, lambda share, what: told.append(share))
    for name in NAMES:
        assert iou(got.masks[name], true[name]) > 0.8 > iou(s.masks[name], true[name])
        assert iou(got.masks[name][20], true[name][20]) > 0.8 and got.mask_confidence[name][20] > 0.8
    assert not (np.sum([got.masks[n] for n in NAMES], axis=0) > 1).any()
    assert told == sorted(told) and told[-1] == 1 and got.notes == ()


def test_disagreeing_directions_lower_the_confidence():
    s = sequence()
    masks, sure = [s.masks["right"]], [s.mask_confidence["right"]]
    logits = np.where(truth()["right"][:, None], 6.0, -6.0)[None].repeat(2, 0)
    logits[1, 5] = np.roll(logits[1, 5], 9, axis=-1)
    _, c, agreement = fuse(logits, masks, sure)
    assert c[0][5] < 0.5 < 0.9 < c[0][4] and agreement[0] > 0.7


def test_an_answer_that_lost_the_body_is_not_taken():
    s, true = sequence(), truth()["right"]
    masks, sure = [s.masks["right"]], [s.mask_confidence["right"]]
    logits = np.where(true[:, None], 6.0, -6.0)[None].repeat(2, 0)
    logits[:, 3] = -6
    found, c, _ = fuse(logits, masks, sure)
    assert np.array_equal(found[0][3], masks[0][3]) and c[0][3] == pytest.approx(0.4)
    assert iou(found[0][4], true[4]) == 1
    found, c, agreement = fuse(-logits, masks, sure)
    assert agreement[0] < 0.2 and np.array_equal(found[0], masks[0]) and np.array_equal(c[0], sure[0])


def test_a_segmenter_that_knows_nothing_changes_nothing():
    s = sequence()
    got = refine_masks(lambda f, p, n, report: np.zeros((2, COUNT, n, 8, 8), np.float16), s)
    assert all(np.array_equal(got.masks[n], s.masks[n]) for n in NAMES) and len(got.notes) == 3
    unsure = replace(s, mask_confidence={n: np.zeros(COUNT, np.float32) for n in NAMES})
    assert "no frame is sure" in refine_masks(ByColor(), unsure).notes[0]


def test_the_setting_names_a_folder_or_a_hub_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    for given, meant in (("sam2:mine", f"sam2:{tmp_path / 'mine'}"), ("sam3:facebook/sam3", "sam3:facebook/sam3")):
        config = absolute(Config(prepare=PrepareConfig(segmenter=Path(given))))
        assert str(config.prepare.segmenter) == meant and is_sam(config.prepare.segmenter)
    assert sam_choice("sam2:a/b") == ("sam2", "a/b") and sam_choice("auto") is None and not is_sam(Path("x/sam2"))
    with pytest.raises(UnusableInput, match="neither a folder nor a name"):
        open_sam("sam2:no such thing")
    with pytest.raises(UnusableInput, match="config.json"):
        open_sam(f"sam2:{tmp_path / 'mine'}")


def test_without_transformers_one_sentence_says_what_to_install(tmp_path, monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *a, **k):
        if name == "transformers":
            raise ImportError("no")
        return real(name, *a, **k)

    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "model.safetensors").write_bytes(b"")
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(MissingAsset, match=r"handhold\[sam\]"):
        open_sam(f"sam2:{tmp_path}")


MEMORY = dict(
    memory_attention_hidden_size=128, memory_attention_num_layers=1, memory_attention_feed_forward_hidden_size=64,
    memory_attention_rope_feat_sizes=[8, 8], memory_encoder_hidden_size=128, memory_encoder_output_channels=64,
    mask_downsampler_embed_dim=128, memory_fuser_embed_dim=128, memory_fuser_intermediate_dim=64,
    memory_fuser_num_layers=1,
    mask_decoder_config={"hidden_size": 128, "mlp_dim": 64, "num_attention_heads": 2, "iou_head_hidden_dim": 32},
)  # fmt: skip


def tiny_config(kind: str):
    import transformers as t

    features = {"backbone_feature_sizes": [[32, 32], [16, 16], [8, 8]], "fpn_hidden_size": 128}
    if kind == "sam2":
        back = t.Sam2HieraDetConfig(
            hidden_size=12, image_size=[128, 128], blocks_per_stage=[1, 2, 2, 1], embed_dim_per_stage=[12, 24, 48, 96],
            num_attention_heads_per_stage=[1, 2, 4, 8], global_attention_blocks=[4],
        )  # fmt: skip
        vision = t.Sam2VisionConfig(backbone_config=back, backbone_channel_list=[96, 48, 24, 12], **features)
        prompt = {"hidden_size": 128, "image_size": 128, "mask_input_channels": 8}
        return t.Sam2VideoConfig(vision_config=vision, prompt_encoder_config=prompt, image_size=128, **MEMORY)
    back = dict(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=112, patch_size=14,
        window_size=4, global_attn_indexes=[1], pretrain_image_size=56,
    )  # fmt: skip
    vision = t.Sam3VisionConfig(backbone_config=t.Sam3ViTConfig(**back), **features)
    prompt = {"hidden_size": 128, "image_size": 112, "patch_size": 14, "mask_input_channels": 8}
    return t.Sam3TrackerVideoConfig(vision_config=vision, prompt_encoder_config=prompt, image_size=112, **MEMORY)


@pytest.fixture(scope="module", params=["sam2", "sam3"])
def tiny_sam(request, tmp_path_factory) -> tuple[str, Path]:
    """A random SAM on disk, as `save_pretrained` leaves it."""
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    import torch
    import transformers as t

    kind, size = request.param, 128 if request.param == "sam2" else 112
    try:
        model, processor = (getattr(t, name) for name in CLASSES[kind])
        images, videos = getattr(t, f"{kind.capitalize()}ImageProcessor"), t.Sam2VideoVideoProcessor
    except (AttributeError, ImportError, RuntimeError) as e:
        pytest.skip(f"this transformers has no {kind} ({type(e).__name__})")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(kind)
    model(tiny_config(kind)).save_pretrained(folder)
    square = {"height": size, "width": size}
    processor(images(size=square), videos(size=square)).save_pretrained(folder)
    return kind, folder


@pytest.mark.usefixtures("one_thread")
def test_a_random_sam_loads_and_answers_both_ways(tiny_sam):
    kind, folder = tiny_sam
    predictor = open_sam(f"{kind}:{folder}")
    assert type(predictor.model).__name__ == CLASSES[kind][0]
    s = sequence()
    prompts = choose_prompts([s.masks[n][:9] for n in NAMES], [s.mask_confidence[n][:9] for n in NAMES])
    told = []
    logits = predictor(s.frames[:9], prompts, len(NAMES), told.append)
    assert logits.shape == (2, 9, 3, 32, 32) and np.isfinite(logits.astype(float)).all()
    assert told[-1] == 1 and len(told) == 18
    again = predictor(s.frames[:9], prompts, len(NAMES), told.append)
    assert np.array_equal(logits, again)


@pytest.mark.usefixtures("one_thread")
def test_a_damaged_sam_is_one_sentence(tiny_sam, tmp_path):
    kind, folder = tiny_sam
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes()[: 2000 if file.suffix == ".safetensors" else None])
    with pytest.raises(UnusableInput, match=f"cannot be read as {kind}") as e:
        open_sam(f"{kind}:{tmp_path}")
    assert "\n" not in str(e.value)
