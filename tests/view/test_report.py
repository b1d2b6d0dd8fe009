import base64
import hashlib
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from handhold.scene import Rigid
from handhold.view import report, sections
from handhold.view.report import write_report

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
from truth_scene import demo_sequence, demo_truth, few, truth_scene, with_gap  # noqa: E402

HOSTILE = "</script><img src=x onerror=alert(1)>\"'&.mp4"


class Page(HTMLParser):
    """Every tag with its attributes, and the text of each script."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.scripts, self.inside = [], {}, None
        self.text = path.read_text(encoding="utf-8")
        self.feed(self.text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.inside = dict(attrs).get("id", "viewer")
            self.scripts[self.inside] = ""

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside is not None:
            self.scripts[self.inside] += data


@pytest.fixture(scope="module")
def clip():
    gt = demo_truth()
    scene = truth_scene(gt)
    return few(scene, demo_sequence(scene, gt, 6), 6)


@pytest.fixture(scope="module")
def page(clip, tmp_path_factory):
    scene, sequence = clip
    scene = with_gap(scene, "object", slice(2, 4), f"lost {HOSTILE}")
    path = tmp_path_factory.mktemp("run") / "report.html"
    metrics = {"mpjpe_right": 14.234, "cd_right": float("nan"), f"<b>{HOSTILE}": 1.0, "scale_ratio": 1.004}
    write_report(
        path,
        replace(sequence, source=f"/a/b\\{HOSTILE}", K_source="default", notes=("assumed", "assumed", HOSTILE)),
        scene,
        metrics,
        notes=(f"note {HOSTILE}",),
        partial=(f"partial {HOSTILE}",),
        timings={"prepare": 3.0, HOSTILE: 200.0},
        versions={"handhold": "0.1.0", HOSTILE: HOSTILE},
    )
    return Page(path), scene


def test_nothing_is_fetched_and_only_our_script_runs(page):
    page, _ = page
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "data", "action", "poster"):
            assert attrs.get(name, "data:").startswith("data:") or name == "data", (tag, attrs[name][:80])
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    outside = re.sub(r"data:image/jpeg;base64,[A-Za-z0-9+/=]+", "", page.text)
    assert not re.search(r"https?://|url\(|@import|fetch\(|XMLHttp|WebSocket", outside)
    policy = next(a["content"] for t, a in page.tags if t == "meta" and "http-equiv" in a)
    digest = base64.b64encode(hashlib.sha256(page.scripts["viewer"].encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_text_from_outside_stays_text(page):
    page, _ = page
    assert [a for t, a in page.tags if t == "img" and a.get("src") == "x"] == []
    assert not any(k.startswith("on") for _, attrs in page.tags for k in attrs)
    assert sum(t == "script" for t, _ in page.tags) == 2
    assert "<b>&lt;" not in page.text and page.text.count("&lt;img src=x") >= 8
    assert page.text.count("<li>assumed</li>") == 1


def test_the_data_is_the_scene(page):
    page, scene = page
    data = json.loads(page.scripts["scene-data"])
    assert data["frames"] == list(range(6)) and data["size"] == [480, 360] and len(data["worldFromCam"]) == 1
    assert len(data["images"]) == 6 and data["total"] == 6 and data["start"] == 0
    hand, box = ({b["name"]: b for b in data["bodies"]}[k] for k in ("right", "object"))
    packed = np.frombuffer(base64.b64decode(hand["vertices"]), "<u2").reshape(6, -1, 3)
    truth = scene.bodies["right"].motion.vertices
    assert np.abs(np.array(hand["low"]) + packed * np.array(hand["step"]) - truth).max() < 1e-5
    joints = np.frombuffer(base64.b64decode(hand["joints"]), "<f4").reshape(6, 21, 3)
    assert np.array_equal(joints, scene.bodies["right"].motion.joints)
    assert np.frombuffer(base64.b64decode(hand["faces"]), "<u4").max() == packed.shape[1] - 1
    poses = np.frombuffer(base64.b64decode(box["poses"]), "<f4").reshape(6, 4, 4)
    assert np.array_equal(poses, scene.bodies["object"].motion.world_from_body)
    rgba = np.frombuffer(base64.b64decode(box["colors"]), "u1").reshape(-1, 4)
    assert np.array_equal(rgba[:, 3] == 255, scene.bodies["object"].shape.observed)
    assert box["valid"] == [1, 1, 0, 0, 1, 1] and box["reason"][2] == f"lost {HOSTILE}"
    assert data["floor"] > truth[..., 1].max()


def test_every_frame_has_a_bar_with_its_reason(page):
    page, _ = page
    bars = [a for t, a in page.tags if t == "rect" and not a["class"].startswith("rung")]
    assert [b["class"] for b in bars].count("lost") == 2 and len(bars) == 12
    assert "frame 2: not valid, lost &lt;/script&gt;" in page.text
    assert "14.2" in page.text and "mean error of the 21 joints" in page.text and "–" in page.text
    assert "assumed, because neither the user nor the file says" in page.text
    assert sum(a.get("class") == "thumb" for _, a in page.tags) == 6


def test_an_empty_scene_and_a_long_clip_still_make_a_page(clip, tmp_path, monkeypatch):
    scene, sequence = clip
    write_report(tmp_path / "a.html", replace(sequence, masks={}), replace(scene, bodies={}))
    assert "Nothing was reconstructed" in (tmp_path / "a.html").read_text(encoding="utf-8")
    monkeypatch.setattr(report, "MAX_FRAMES", 3)
    monkeypatch.setattr(sections, "MAX_THUMBS", 2)
    lost = with_gap(with_gap(scene, "right", slice(None)), "object", slice(None))
    moving = lost.world_from_cam.copy()
    moving[:, 0, 3] = np.arange(6)
    lost = replace(lost, world_from_cam=moving)
    write_report(tmp_path / "b.html", sequence, lost)
    data = json.loads(Page(tmp_path / "b.html").scripts["scene-data"])
    assert len(data["images"]) == len(data["worldFromCam"]) == 3 and data["rows"] == [0, 2, 5] and data["total"] == 6
    assert data["fps"] == pytest.approx(7.5)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.html", "b.html"]


def test_numbers_are_short():
    short = [sections._number(v) for v in (0, 0.00123, 0.2124, 1.5, 12.345, 99.97, 123.4)]
    assert short == ["0", "0.0012", "0.212", "1.5", "12.3", "100", "123"]
    assert sections._duration(12.34) == "12.3 s" and sections._duration(130.2) == "2 min 10 s"


def test_the_page_opens_on_the_best_frame(clip):
    scene, _ = clip
    assert report.best_frame(scene) == 0
    assert report.best_frame(with_gap(scene, "right", slice(0, 2))) == 2


def test_a_lost_frame_without_a_pose_shows_the_last_one(clip):
    scene, _ = clip
    scene = with_gap(with_gap(scene, "object", slice(3, 5)), "right", slice(0, 1))
    box, hand = scene.bodies["object"], scene.bodies["right"]
    poses, vertices = box.motion.world_from_body.copy(), hand.motion.vertices.copy()
    poses[3:5], vertices[0] = np.nan, np.nan
    bodies = {
        "object": replace(box, motion=Rigid(poses)),
        "right": replace(hand, motion=replace(hand.motion, vertices=vertices)),
    }
    packed = report._packed("object", bodies["object"], np.arange(6))
    shown = np.frombuffer(base64.b64decode(packed["poses"]), "<f4").reshape(6, 4, 4)
    assert np.array_equal(shown[3], poses[2]) and np.array_equal(shown[5], poses[5])
    packed = report._packed("right", bodies["right"], np.arange(6))
    shown = np.frombuffer(base64.b64decode(packed["vertices"]), "<u2").reshape(6, -1)
    assert np.array_equal(shown[0], shown[1])


def test_a_ribbon_and_a_legend_say_where_frames_come_from(clip):
    scene, _ = clip
    body = scene.bodies["object"]
    words = np.array(["sfm", "sfm", "fiducial", "not found", "sfm", "interpolated"])
    body = replace(body, reason=words, valid=words != "not found")
    ribbon = sections.ribbon("object", body)
    runs = re.findall(r'class="rung ([a-z-]+)" x="(\d)" y="0" width="(\d)"', ribbon)
    assert runs == [("r-sfm", "0", "2"), ("r-fiducial", "2", "1"), ("r-not-found", "3", "1"), ("r-sfm", "4", "1"),
                    ("r-interpolated", "5", "1")]  # fmt: skip
    legend = sections.rung_legend(replace(scene, bodies={"object": body}))
    assert "sfm</b> (object, 3 frames)" in legend and "the hand that holds it" in legend and "silhouette" not in legend
    css = report._asset("report.css")
    assert all(f".{sections.css_of(word)}" in css for word in sections.rungs.MEANING)
