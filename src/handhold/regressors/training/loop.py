"""The training loop: several tasks learn from one stream of batches, and a killed training goes on exactly.

Nothing random is carried from step to step: the batch, the augmentations and dropout of a step follow from the seed and
the step's number alone. So the state is the weights, their average, the optimizer's moments and two numbers (step and
elapsed seconds), and a training on the CPU that is killed and resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ...errors import UnusableInput
from ...files import write_atomically
from .config import LoopConfig, OptimConfig
from .devices import Mixed, StepGraph, make_fabric
from .pictures import write_sheet
from .state import load_state, optimizer_tensors, restore_module, restore_optimizer, save_state, strip
from .streams import Ahead, Reuse, Stream, seed_of

Report = Callable[..., None]  # report(fraction, text, **metrics)


class Task(Protocol):
    """What is learnt: a network, its loss on a batch, and figures on held-out data. Holds no weights itself.

    `model` is what `build` made, on the batch's device; it may be wrapped (mixed precision, several devices), and calls
    of it return fp32.
    """

    name: str  # of the exported file and in front of the metrics
    lr: float  # factor on the learning rate

    def build(self) -> nn.Module:
        """A freshly initialised network, on the CPU, from torch's global seed."""
        ...

    def inputs(self, batch: Any, seed: int) -> Any:
        """What the loss needs of a batch, augmented: tensors, or (nested) dataclasses and tuples of them. All
        randomness comes from `seed`. With `LoopConfig.graphs` their shapes must not change from step to step."""
        ...

    def loss(self, model: Any, inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Scalar loss with gradient, and detached scalars worth logging. Randomness comes from torch's global
        generators."""
        ...

    def evaluate(self, model: Any, batch: Any) -> dict[str, Tensor]:
        """Figures on a held-out batch, each as (2,): a sum and what to divide it by, added over batches first."""
        ...

    def pictures(self, model: Any, batch: Any) -> Tensor | None:
        """Predictions to look at, (N,H,W,3) uint8, or None."""
        ...

    def save(self, path: Path, model: nn.Module, extra: dict[str, Any]) -> None:
        """Write the weights for use; `extra` is what the training has to say of them, as JSON values."""
        ...


@dataclass(frozen=True)
class Trained:
    """What a training left behind."""

    steps: int
    seconds: float
    metrics: dict[str, float]  # of the last evaluation, "task/figure"
    exports: dict[str, Path]


class Learner:
    """One task's weights: the network, its average and its optimizer."""

    def __init__(self, task: Task, config: LoopConfig, device: torch.device, fabric: Any = None):
        self.task, self.config, self.fabric = task, config, fabric
        torch.manual_seed(seed_of(config.seed, "weights", task.name))
        self.net = task.build().to(device).train()
        self.ema = copy.deepcopy(self.net).eval().requires_grad_(False)
        bf16 = config.precision == "bf16" or (config.precision == "auto" and device.type == "cuda")
        self.optimizer = make_optimizer(self.net, config.optim)
        self.params = [p for p in self.net.parameters() if p.requires_grad]
        self.names = {p: n for n, p in self.net.named_parameters()}
        self.graph: StepGraph | None = None
        if config.compile:
            self.net.compile(dynamic=True)
        wrapped = self.net
        if fabric is not None:
            wrapped, _ = fabric.setup(self.net, self.optimizer)
        self.model, self.average = Mixed(wrapped, device, bf16), Mixed(self.ema, device, bf16)

    def step(self, batch: Any, step: int, rate: float, rank: int = 0) -> dict[str, Tensor]:
        """One optimizer step at `rate` times the peak learning rate; returns detached scalars."""
        optim, seed = self.config.optim, seed_of(self.config.seed, "step", step, rank)
        torch.manual_seed(seed)  # dropout
        inputs = self.task.inputs(batch, seed)
        if self.config.graphs and self.fabric is None and self.params[0].is_cuda:
            if self.graph is None:
                self.graph = StepGraph(lambda x: self.task.loss(self.model, x), inputs, self.params)
            loss, metrics = self.graph(inputs)
        else:
            loss, metrics = self.task.loss(self.model, inputs)
            self.optimizer.zero_grad(set_to_none=True)
            if self.fabric is not None:
                self.fabric.backward(loss)
            else:
                loss.backward()
        norm = nn.utils.clip_grad_norm_(self.params, optim.clip if optim.clip > 0 else math.inf)
        bad = (~torch.isfinite(norm)).float().reshape(())
        self.optimizer.found_inf = bad  # the fused kernel leaves everything as it is where this is 1, without a sync
        for group in self.optimizer.param_groups:
            group["lr"] = optim.lr * self.task.lr * rate * group["factor"]
        self.optimizer.step()
        self._average(step)
        return {"loss": loss.detach(), "grad": norm.detach(), "skipped": bad} | metrics

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self.config.optim.ema, (1 + step) / (10 + step))
        for mine, theirs in ((self.ema.parameters(), self.net.parameters()), (self.ema.buffers(), self.net.buffers())):
            pairs = [(a, b) for a, b in zip(mine, theirs, strict=True)]
            real = [(a, b) for a, b in pairs if a.is_floating_point()]
            if real:
                torch._foreach_lerp_([a for a, _ in real], [b for _, b in real], 1 - decay)
            for a, b in pairs:
                if not a.is_floating_point():
                    a.copy_(b)

    def state(self) -> dict[str, Tensor]:
        parts = {"net": self.net.state_dict(), "ema": self.ema.state_dict()}
        parts["optim"] = optimizer_tensors(self.optimizer, self.names)
        # safetensors stores no tensor twice, and tied or shared weights would be
        return {f"{self.task.name}/{part}/{k}": v.clone() for part, ts in parts.items() for k, v in ts.items()}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        name = self.task.name
        restore_module(self.net, strip(tensors, f"{name}/net/"))
        restore_module(self.ema, strip(tensors, f"{name}/ema/"))
        restore_optimizer(self.optimizer, self.names, strip(tensors, f"{name}/optim/"))


def make_optimizer(model: nn.Module, config: OptimConfig) -> torch.optim.AdamW:
    """Fused AdamW that decays the matrices of linear layers and convolutions, and nothing else."""
    sorts: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decay = config.weight_decay if p.ndim >= 2 and name.endswith(".weight") else 0.0
            factor = config.trunk if "trunk" in name.split(".") else 1.0
            sorts.setdefault((decay, factor), []).append(p)
    groups = [{"params": ps, "weight_decay": d, "factor": f} for (d, f), ps in sorts.items()]
    return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, fused=True)


def schedule(fraction: float, config: OptimConfig) -> float:
    """Learning rate as a share of its peak when `fraction` of the training is over: linear warmup, then a cosine."""
    fraction = min(max(fraction, 0.0), 1.0)
    if fraction < config.warmup:
        return fraction / config.warmup
    x = (fraction - config.warmup) / max(1 - config.warmup, 1e-9)
    return config.floor + (1 - config.floor) * 0.5 * (1 + math.cos(math.pi * x))


def train(
    tasks: Sequence[Task],
    stream: Callable[[torch.device], Stream],
    config: LoopConfig,
    out: Path,
    *,
    worker_stream: Callable[[torch.device], Stream] | None = None,
    export: Path | None = None,
    settings: dict[str, Any] | None = None,
    report: Report = lambda *a, **k: None,
    clock: Callable[[], float] = time.monotonic,
    started: float | None = None,
) -> Trained:
    """Train the tasks until the steps or the time budget are over, going on from the state in `out` if there is one.

    stream: makes the stream on a device. With `data.workers`, worker_stream (or stream) makes it in each of them: it
    must be picklable, and its batches on the CPU or made to travel (`SlimStream`).
    out gets state.safetensors, metrics.jsonl, settings.json and tensorboard/ (where tensorboard is installed); export
    (out/export by default) gets <task>.safetensors with the averaged weights, <task>.png and the metrics.
    settings: what decided the result, as JSON values; a state made with others is refused (`UnusableInput`), those of
    the rhythm and the place apart. started: `clock()` when the budget began, now by default.
    """
    return _Training(tasks, stream, config, Path(out), worker_stream, export, settings, report, clock, started).run()


class _Training:
    """One call of `train`."""

    def __init__(self, tasks, stream, config, out, worker_stream, export, settings, report, clock, started):
        self.clock, self.started = clock, clock() if started is None else started
        self.config, self.out, self.report = config, out, report
        self.export_dir = out / "export" if export is None else Path(export)
        self.settings = {} if settings is None else json.loads(json.dumps(settings))
        self.fabric = make_fabric(config) if config.devices > 1 else None
        self.rank = 0 if self.fabric is None else self.fabric.global_rank
        if self.rank:
            self.report = lambda *a, **k: None
        self.device = torch.device(config.device) if self.fabric is None else self.fabric.device
        out.mkdir(parents=True, exist_ok=True)
        self.learners = [Learner(t, config, self.device, self.fabric) for t in tasks]
        self.step, self.before, self.done, self.evaluated = 0, 0.0, False, -1
        self.metrics: dict[str, float] = {}
        if (out / "state.safetensors").is_file():
            self._resume()
        data, world = config.data, max(config.devices, 1)
        if data.workers:
            held = config.val_batches if self.rank == 0 else 0
            factory = partial(worker_stream or stream, self.device)
            make = self.ahead = Ahead(factory, data.batch, data.workers, data.prefetch, self.rank, world, held)
        else:
            self.ahead, self.stream = None, None if self.done else stream(self.device)
            make = lambda i: self.stream.batch(i * world + self.rank, data.batch, "train")  # noqa: E731
        self.batches = Reuse(lambda i: make(i).to(self.device), data.repeats, data.spacing)
        self.held_out: list[Any] = []
        self.sums: dict[str, Tensor] = {}
        self.board = _board(out) if self.rank == 0 else None

    @property
    def elapsed(self) -> float:
        """Seconds spent on this training, over all its runs up to the saved states."""
        return self.before + self.clock() - self.started

    def fraction(self) -> float:
        c, by_step = self.config, (self.step + 0.5) / self.config.steps
        if c.budget_seconds <= 0:
            return by_step
        return min(max(by_step, self.elapsed / max(c.budget_seconds - c.reserve_seconds, 1e-9)), 1.0)

    def over(self, step_seconds: float) -> bool:
        """No step is left, or the next one would not end within the budget."""
        c = self.config
        late = c.budget_seconds > 0 and self.elapsed + step_seconds > c.budget_seconds - c.reserve_seconds
        return self.step >= c.steps or late

    def run(self) -> Trained:
        c, last = self.config, {k: self.clock() for k in ("state", "export", "log")}
        queue: deque[torch.cuda.Event] = deque()  # keeps the clock honest: the host is at most two steps ahead
        typical, logged = 0.0, self.step
        if not self.done and self.rank == 0:
            write_atomically(self.out / "settings.json", json.dumps(self.settings, indent=1) + "\n")
        while not self.done:
            now = self.clock()
            due = {k: now - last[k] >= getattr(c, f"{k}_seconds") for k in ("state", "export")}
            over, fraction, due = self._agreed((self.over(typical), self.fraction(), due))
            if due["export"]:
                self._export()
                last["export"] = self.clock()
            if due["state"]:
                self._save()
                last["state"] = self.clock()
            if over:
                break
            begun = self.clock()
            self._one_step(fraction)
            if self.device.type == "cuda":
                queue.append(torch.cuda.Event())
                queue[-1].record()
                if len(queue) > 2:
                    queue.popleft().synchronize()
            took = self.clock() - begun
            if self.step > 1:  # the first step waits for workers, libraries and graphs
                typical = took if typical == 0 else 0.9 * typical + 0.1 * took
            if self.step % c.log_steps == 0:
                self._log(fraction, (self.step - logged) / max(self.clock() - last["log"], 1e-9))
                logged, last["log"] = self.step, self.clock()
            if self.step % c.val_steps == 0:
                self._evaluate()
            if c.state_steps and self.step % c.state_steps == 0:
                self._save()
                last["state"] = self.clock()
        if not self.done:
            if self.evaluated != self.step:
                self._evaluate()
            self.done = True
            self._save()
        files = self._export()
        self.report(1.0, "trained")
        if self.board is not None:
            self.board.close()
        return Trained(self.step, self.elapsed, self.metrics, files)

    def _agreed(self, decision: Any) -> Any:
        """What the first process decides: clocks differ, and what all do together must not."""
        return decision if self.fabric is None else self.fabric.broadcast(decision, 0)

    def _one_step(self, fraction: float) -> None:
        batch, rate = self.batches.at(self.step), schedule(fraction, self.config.optim)
        for learner in self.learners:
            for k, v in learner.step(batch, self.step, rate, self.rank).items():
                name = f"{learner.task.name}/{k}"
                total, count = self.sums.get(name, (0.0, 0))
                self.sums[name] = (total + v.float(), count + 1)
        self.step += 1

    def _log(self, fraction: float, speed: float) -> None:
        means = torch.stack([total / count for total, count in self.sums.values()]).tolist()
        values = dict(zip(self.sums, means, strict=True))
        self.sums = {}
        rate = schedule(fraction, self.config.optim)
        self._write("train", values | {"rate": rate, "steps_per_second": speed})
        losses = {k: v for k, v in values.items() if k.endswith("/loss")}
        self.report(fraction, f"step {self.step}", **losses, steps_per_second=speed)

    @torch.no_grad()
    def _evaluate(self) -> None:
        """Figures of the averaged weights on the held-out batches, on the first process."""
        self.evaluated = self.step
        if self.rank == 0:
            c, sums = self.config, {}
            if not self.held_out:
                if self.ahead is None:
                    made = [self.stream.batch(i, c.data.batch, "val") for i in range(c.val_batches)]
                else:
                    made = self.ahead.held_out
                self.held_out = [b.to(self.device) for b in made]
            for learner in self.learners:
                for batch in self.held_out:
                    for k, v in learner.task.evaluate(learner.average, batch).items():
                        name = f"{learner.task.name}/{k}"
                        sums[name] = sums.get(name, 0.0) + v.double()
            if sums:
                table = torch.stack(list(sums.values())).tolist()
                self.metrics = {k: a / b for k, (a, b) in zip(sums, table, strict=True) if b}
                self._write("val", self.metrics)
                self.report(self.fraction(), f"step {self.step}, held-out", **self.metrics)
        if self.fabric is not None:
            self.fabric.barrier()

    def _write(self, kind: str, values: dict[str, float]) -> None:
        if self.rank != 0:
            return
        clean = {k: float(f"{v:.6g}") if math.isfinite(v) else None for k, v in values.items()}
        line = {"kind": kind, "step": self.step, "seconds": round(self.elapsed, 1)} | clean
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")
        if self.board is not None:
            for k, v in values.items():
                self.board.add_scalar(f"{kind}/{k}", v, self.step)

    def _export(self) -> dict[str, Path]:
        files = {}
        if self.rank != 0:
            return files
        for learner in self.learners:
            files[learner.task.name] = path = self.export_dir / f"{learner.task.name}.safetensors"
            path.parent.mkdir(parents=True, exist_ok=True)
            figures = {k: v for k, v in self.metrics.items() if k.startswith(learner.task.name + "/")}
            extra = {"training": {"steps": self.step, "seconds": round(self.elapsed, 1)}, "held_out": figures}
            learner.task.save(path, learner.ema, extra)
            if self.held_out:
                with torch.no_grad():
                    tiles = learner.task.pictures(learner.average, self.held_out[0])
                if tiles is not None:
                    write_sheet(path.with_suffix(".png"), tiles)
        metrics = self.out / "metrics.jsonl"
        if metrics.is_file():
            write_atomically(self.export_dir / "metrics.jsonl", metrics.read_bytes())
        return files

    def _save(self) -> None:
        if self.rank == 0:
            tensors = {k: v for learner in self.learners for k, v in learner.state().items()}
            values = {"step": self.step, "seconds": self.elapsed, "done": self.done, "metrics": self.metrics}
            save_state(self.out / "state.safetensors", tensors, values | {"settings": self.settings})
        if self.fabric is not None:
            self.fabric.barrier()

    def _resume(self) -> None:
        tensors, values = load_state(self.out / "state.safetensors")
        changed = differing(values["settings"], self.settings)
        if changed:
            what = ", ".join(changed)
            raise UnusableInput(f"{self.out} holds a training with another {what}; use another --out or its settings.")
        for learner in self.learners:
            learner.restore(tensors)
        self.step, self.before, self.done = values["step"], values["seconds"], values["done"]
        self.metrics = values["metrics"]
        path = self.out / "metrics.jsonl"
        if path.is_file() and self.rank == 0:  # lines of steps that will be done again
            lines = [x for x in path.read_text(encoding="utf-8").splitlines(True) if _step_of(x) <= self.step]
            write_atomically(path, "".join(lines))


FREE = {"device", "precision", "compile", "log_steps", "val_steps", "val_batches", "state_steps", "state_seconds"}
FREE |= {"export_seconds", "reserve_seconds", "workers", "prefetch", "graphs"}
"""Settings that may change when a training is resumed; the numbers of the end may then differ in their last bits."""


def differing(saved: Any, now: Any, prefix: str = "") -> list[str]:
    """Dotted names of settings that differ between two nested dicts, `FREE` ones apart."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [k for k in dict.fromkeys([*saved, *now]) if k not in FREE]
        return [n for k in keys for n in differing(saved.get(k), now.get(k), f"{prefix}{k}.")]
    return [] if saved == now else [prefix.rstrip(".")]


def _board(out: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        return None
    return SummaryWriter(str(out / "tensorboard"))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError):
        return math.inf  # half a line, of the moment of the kill
