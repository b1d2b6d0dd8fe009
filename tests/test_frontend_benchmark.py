"""The front end's benchmark judges a perfect network perfectly, and its tables can be made."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.append(str(FOLDER))
tables = pytest.importorskip("tables", reason="an installed package without benchmarks/")
frontend = pytest.importorskip("frontend")

from handhold.regressors.checkpoints import save_checkpoint  # noqa: E402
from handhold.regressors.crops import hand_crops, recrop, to_camera  # noqa: E402
from handhold.regressors.hand_losses import hand_errors  # noqa: E402
from handhold.regressors.parametric import HandOutput, ParametricConfig, ParametricHand  # noqa: E402
from handhold.regressors.segmenter import Segmenter, SegmenterConfig  # noqa: E402
from handhold.regressors.vit import ViTConfig  # noqa: E402
from synth_hands import hand_batch  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


class Oracle:
    """Knows the truth of the crops it is shown, and adds `error` metres along x to every joint but the wrist."""

    image_size = (64, 64)

    def __init__(self, error: float = 0.0):
        self.error, self.crops = error, None

    def look(self, batch, generator, jitter, size):
        self.crops = hand_crops(batch, generator, jitter, size)
        return self.crops

    def __call__(self, image, K):
        t = self.crops.truth
        off = torch.zeros(21, 3)
        off[1:, 0] = self.error
        zero = torch.zeros_like(t.points[..., 0])
        return HandOutput(None, None, None, t.joints + off, t.vertices, t.points, t.points, zero - 3, zero[:, :3])

    def predict(self, crops):
        out = self(crops.image, crops.K)
        return to_camera(crops, out.joints, out.vertices, out.points, out.log_sigma.exp())


def judged(error, monkeypatch, looks=1):
    oracle = Oracle(error)
    monkeypatch.setattr(frontend, "hand_crops", oracle.look)

    def again(prediction, *args, **kwargs):
        crops = recrop(prediction, *args, **kwargs)
        return SimpleNamespace(with_truth=lambda t: setattr(oracle, "crops", crops.with_truth(t)) or oracle.crops)

    monkeypatch.setattr(frontend, "recrop", again)
    batch = hand_batch(4)
    hidden = torch.tensor([0.0, 0.2, 0.4, 0.9])
    batch = replace(batch, right=replace(batch.right, hidden=hidden), left=replace(batch.left, hidden=hidden))
    return frontend.regressor_figures(oracle, [batch], looks)


@pytest.mark.parametrize("looks", [1, 2])
def test_truth_has_no_error_and_levels_share_out_the_hands(looks, monkeypatch):
    figures = judged(0.0, monkeypatch, looks)
    assert [figures["levels"][k]["hands"] for k in ("all", "0–0.1", "0.1–0.3", "0.3–0.5", "0.5–1")] == [8, 2, 2, 2, 2]
    assert all(figures["levels"]["all"][k] < 0.05 for k in frontend.FIGURES)
    assert set(figures["others"]) == {"all, boxes shaken"} | ({"all, one look"} if looks == 2 else set())


def test_an_error_of_a_centimetre_is_ten_millimetres(monkeypatch):
    figures = judged(0.01, monkeypatch)["levels"]["all"]
    assert figures["mpjpe"] == pytest.approx(10 * 20 / 21, rel=1e-3) and figures["pa_mpjpe"] < figures["mpjpe"]
    assert hand_errors is frontend.hand_errors


@pytest.mark.slow
def test_it_runs_and_makes_its_tables(tmp_path, monkeypatch, capsys):
    vit = ViTConfig(48, 1, 2, image=(64, 64), stem="conv")
    nets = {
        "hands": ParametricHand(ParametricConfig(vit=vit, dim=48, depth=1, heads=2, mlp=48)),
        "masks": Segmenter(SegmenterConfig(widths=(8, 8, 8, 16, 16), depths=(1,) * 5, heads=2)),
    }
    for name, net in nets.items():
        save_checkpoint(tmp_path / name, net, {"training": {"steps": 3, "seconds": 1.0}})
    batch = hand_batch(4, width=96, height=64, focal=90.0)
    labels = torch.randint(0, 5, (4, 64, 96), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    monkeypatch.setattr(frontend, "held_out", lambda args: [replace(batch, labels=labels)])
    argv = ["frontend.py", *(str(tmp_path / n) for n in nets), "--batch", "4", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", [*argv, "--threads", "1"])
    assert frontend.main() == 0
    import json

    results = json.loads((tmp_path / "out.json").read_text())
    for make in (tables.regressor_table, tables.segmenter_table):
        text = make(results)
        for block in text.split("\n\n"):
            rows = [line for line in block.splitlines() if line.startswith("|")]
            assert len({row.count("|") for row in rows}) <= 1, text
        assert " 3 | 1.0 |" in text
    assert results["networks"]["parametric"]["cost"]["ms"] > 0
