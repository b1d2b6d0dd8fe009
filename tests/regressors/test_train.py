"""The training loop: it learns, keeps to its budget, and a killed training ends with the bits of one that was not."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from handhold.errors import UnusableInput
from handhold.regressors.training.config import OptimConfig
from handhold.regressors.training.loop import Learner, differing, make_optimizer, schedule
from handhold.regressors.training.streams import Ahead, Reuse, SlimStream, reused, seed_of
from synth_hands import hand_batch

sys.path.insert(0, str(Path(__file__).parent))
from training_fakes import SMALL, TASKS, PointStream, PointTask, run  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


def lines(out: Path, kind: str) -> list[dict]:
    rows = [json.loads(x) for x in (out / "metrics.jsonl").read_text().splitlines()]
    return [r for r in rows if r["kind"] == kind]


def same(a: Path, b: Path) -> bool:
    a, b = load_file(a), load_file(b)
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_it_learns_and_leaves_its_files(tmp_path):
    done = run(tmp_path, replace(SMALL, steps=300, val_steps=100))
    errors = [r["points/error"] for r in lines(tmp_path, "val")]
    assert errors[-1] < 0.25 * errors[0] or errors[-1] < 0.1
    assert done.steps == 300 and done.metrics["points/error"] == pytest.approx(errors[-1], rel=1e-4)
    assert [r["step"] for r in lines(tmp_path, "train")] == list(range(20, 301, 20))
    assert {p.name for p in (tmp_path / "export").iterdir()} == {
        "points.safetensors", "points.png", "again.safetensors", "again.png", "metrics.jsonl",
    }  # fmt: skip


@pytest.mark.slow
def test_a_killed_training_goes_on_exactly(tmp_path):
    script = str(Path(__file__).parent / "training_fakes.py")
    env = os.environ | {"PYTHONPATH": os.pathsep.join([p for p in sys.path if p])}
    killed = tmp_path / "killed"
    process = subprocess.Popen([sys.executable, script, str(killed)], stdout=subprocess.PIPE, text=True, env=env)
    for line in process.stdout:
        if line.startswith("step 80"):
            process.send_signal(signal.SIGKILL)
            break
    process.wait(30)
    assert process.returncode == -signal.SIGKILL and not (killed / "export").exists()
    run(killed)
    run(tmp_path / "whole")
    for name in ("points", "again"):
        assert same(killed / f"export/{name}.safetensors", tmp_path / f"whole/export/{name}.safetensors")
    a, b = load_file(killed / "state.safetensors"), load_file(tmp_path / "whole/state.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    steps = [r["step"] for r in lines(killed, "train")]
    assert steps == list(range(20, 121, 20))  # no line is lost or doubled


def test_a_finished_training_is_not_done_again(tmp_path):
    first = run(tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    again = run(tmp_path)
    assert again.steps == first.steps and again.metrics == first.metrics
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_other_settings_or_a_damaged_state_are_refused(tmp_path):
    run(tmp_path)
    with pytest.raises(UnusableInput, match="lr"):
        run(tmp_path, replace(SMALL, optim=replace(SMALL.optim, lr=1.0)))
    (tmp_path / "state.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UnusableInput, match="damaged"):
        run(tmp_path)


def test_settings_of_place_and_rhythm_may_change():
    a = {"loop": {"device": "cpu", "steps": 5, "data": {"workers": 0, "batch": 4}}}
    b = {"loop": {"device": "cuda", "steps": 6, "data": {"workers": 3, "batch": 4}}, "new": 1}
    assert differing(a, b) == ["loop.steps", "new"] and differing(a, a) == []


class Clock:
    """A second for every look."""

    def __init__(self, tick: float):
        self.now, self.tick = 0.0, tick

    def __call__(self) -> float:
        self.now += self.tick
        return self.now


def test_a_time_budget_ends_the_training_with_the_rate_at_zero(tmp_path):
    config = replace(SMALL, steps=10**6, budget_seconds=100.0, reserve_seconds=10.0, state_steps=0)
    done = run(tmp_path, config, clock=Clock(0.05))
    rates = [r["rate"] for r in lines(tmp_path, "train")]
    assert 80 < lines(tmp_path, "val")[-1]["seconds"] <= 95 and done.seconds <= 100
    assert max(rates) > 0.8 and rates[-1] < 0.02 and done.steps < 10**4


def test_schedule():
    config = OptimConfig(warmup=0.1, floor=0.0)
    assert schedule(0.0, config) == 0 and schedule(0.1, config) == pytest.approx(1)
    assert schedule(0.05, config) == pytest.approx(0.5) and schedule(1.0, config) == pytest.approx(0)
    assert schedule(0.55, config) == pytest.approx(0.5)
    rates = [schedule(f / 100, config) for f in range(10, 101)]
    assert rates == sorted(rates, reverse=True)


@pytest.mark.parametrize(("repeats", "spacing"), [(1, 4), (2, 1), (3, 2), (4, 3)])
def test_every_batch_is_used_as_often_as_asked(repeats, spacing):
    last = 40 * repeats
    uses = Counter(reused(s, repeats, spacing)[0] for s in range(last))
    start, end = (repeats - 1) * spacing, 40 - (repeats - 1) * spacing
    assert all(uses[i] == repeats for i in range(start, end))
    made = []
    reuse = Reuse(lambda i: made.append(i) or i, repeats, spacing)
    assert [reuse.at(s) for s in range(last)] == [reused(s, repeats, spacing)[0] for s in range(last)]
    assert made == list(range(40))  # each once, in order
    assert len(reuse._held) <= start + 1
    resumed = Reuse(lambda i: i, repeats, spacing)
    assert [resumed.at(s) for s in range(last // 2, last)] == [
        reused(s, repeats, spacing)[0] for s in range(last // 2, last)
    ]


@pytest.mark.slow
def test_worker_processes_keep_the_order():
    ahead = Ahead(partial(PointStream, "cpu"), 4, workers=2, held_out=1)
    for index in (5, 6, 7):
        assert torch.equal(ahead(index).x, PointStream("cpu").batch(index, 4).x)
    assert torch.equal(ahead.held_out[0].x, PointStream("cpu").batch(0, 4, "val").x)


def test_a_slim_batch_is_the_batch_but_for_what_nobody_reads():
    class Hands:
        def batch(self, step, n, split="train"):
            return hand_batch(n, seed=step, width=40, height=30)

    batch, slim = Hands().batch(3, 2), SlimStream(Hands()).batch(3, 2)
    back = slim.to("cpu")
    assert (back.image - batch.image).abs().max() <= 0.5 / 255 + 1e-6 and back.depth.numel() == back.amodal.numel() == 0
    assert torch.equal(back.left.vertices, batch.left.vertices) and torch.equal(back.labels, batch.labels)


def test_a_step_without_a_finite_gradient_changes_nothing():
    class Broken(PointTask):
        def loss(self, model, inputs):
            loss, metrics = super().loss(model, inputs)
            return loss * math.nan, metrics

    learner = Learner(Broken(), SMALL, torch.device("cpu"))
    before = {k: v.clone() for k, v in learner.net.state_dict().items() if k != "seen"}
    out = learner.step(PointStream("cpu").batch(0, 8), 0, 1.0)
    assert out["skipped"] == 1 and all(torch.equal(v, learner.net.state_dict()[k]) for k, v in before.items())
    learner.task = PointTask()
    assert learner.step(PointStream("cpu").batch(0, 8), 1, 1.0)["skipped"] == 0
    assert not torch.equal(before["a.weight"], learner.net.a.weight)


def test_the_average_follows_the_weights():
    learner = Learner(TASKS[0], replace(SMALL, optim=OptimConfig(lr=1e-2, ema=0.5)), torch.device("cpu"))
    expected = learner.ema.a.weight.clone()
    for step in range(30):
        learner.step(PointStream("cpu").batch(step, 8), step, 1.0)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * learner.net.a.weight.detach()
    assert torch.allclose(expected, learner.ema.a.weight, atol=1e-6) and int(learner.ema.seen) == 30


def test_norms_and_biases_do_not_decay():
    groups = Learner(TASKS[0], SMALL, torch.device("cpu")).optimizer.param_groups
    assert {g["weight_decay"] for g in groups} == {0.05, 0.0}
    assert all((p.ndim >= 2) == (g["weight_decay"] > 0) for g in groups for p in g["params"])


def test_a_pretrained_trunk_has_a_rate_of_its_own():
    model = torch.nn.ModuleDict({"trunk": torch.nn.Linear(2, 2), "head": torch.nn.Linear(2, 2)})
    groups = make_optimizer(model, OptimConfig(trunk=0.25)).param_groups
    factor = {p: g["factor"] for g in groups for p in g["params"]}
    assert {factor[p] for p in model["trunk"].parameters()} == {0.25}
    assert {factor[p] for p in model["head"].parameters()} == {1.0}


def test_seeds_differ():
    assert len({seed_of("step", i, name) for i in range(1000) for name in "ab"}) == 2000


def test_a_batch_must_be_used_at_least_once():
    with pytest.raises(ValueError):
        Reuse(lambda i: i, repeats=0)
