"""What is trained: hand regressors of both families on crops, and the segmenter on whole pictures, from one stream."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ... import assets
from ...datasets.synthetic.sample import SynthBatch
from ...errors import UnusableInput
from ..checkpoints import load_model, save_checkpoint
from ..crops import CropJitter, HandCrops, hand_crops, upright_angles
from ..direct import DirectConfig, DirectHand
from ..hand_losses import ExactWeights, HamerWeights, exact_loss, hamer_loss, hand_errors
from ..mobile import load_trunk
from ..parametric import HandOutput, ParametricConfig, ParametricHand
from ..segmenter import Segmenter, SegmenterConfig, augment, confusion, corrupt_previous, segmenter_loss
from .augment import AugmentConfig, augment_crops, hide_points
from .loop import Task
from .pictures import draw_hands, paint_labels

LEVELS = (0.0, 0.1, 0.3, 0.5, 1.01)
"""Edges of the occlusion levels of a hand: the share of it that other bodies hide."""
MASKS = ("right", "left", "object", "forearm")


@dataclass(frozen=True)
class HandTraining:
    """How a hand regressor is trained; the same for both families, so that they compare."""

    lr: float = 1.0
    """Factor on the learning rate."""
    crops: int = 64
    """Hands a step, drawn from those in the batch of pictures."""
    loss: Literal["exact", "hamer"] = "exact"
    """`exact` is ours, for exact truth; `hamer` has the published terms and weights."""
    start: Path | None = None
    """Checkpoint whose weights the training begins with, instead of random ones."""
    start_trunk: Literal["mediapipe"] | Path | None = None
    """Pretrained weights of the mobile backbone to begin with: `mediapipe` are those that `handhold assets` fetches, a
    path is another `.tflite` or safetensors file."""
    freeze: int = 0
    """Blocks of the mobile backbone, counted from the picture, that keep their weights; with 1 or more the stem too."""
    jitter: CropJitter = field(default_factory=CropJitter)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    exact: ExactWeights = field(default_factory=ExactWeights)
    hamer: HamerWeights = field(default_factory=HamerWeights)


@dataclass(frozen=True)
class SegmenterTraining:
    """How the segmenter is trained."""

    lr: float = 1.0
    """Factor on the learning rate."""
    size: int = 256
    """Width and height of the training pictures, pixels."""
    zoom: tuple[float, float] = (0.5, 2.0)
    """Least and greatest zoom of the training pictures."""
    none: float = 0.5
    """Share of pictures without masks of a frame before."""
    dice: float = 1.0
    """Weight of the soft intersection over union."""
    boundary: float = 2.0
    """Further weight of pixels near edges of labels."""
    start: Path | None = None
    """Checkpoint whose weights the training begins with, instead of random ones."""
    start_trunk: Literal["mediapipe"] | Path | None = None
    """Pretrained weights of the mobile backbone to begin with: `mediapipe` are those that `handhold assets` fetches, a
    path is another `.tflite` or safetensors file."""


class CropMaker:
    """Training crops: jittered boxes, changed pictures, and truth that knows what was covered. Tasks that share a maker
    and ask for the same get the same crops, made once."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] | None = None
        self._crops: HandCrops | None = None

    @torch.no_grad()
    def __call__(self, batch: SynthBatch, seed: int, config: HandTraining, size: tuple[int, int]) -> HandCrops:
        key = (batch, seed, config.crops, config.jitter, config.augment, size)
        if self._key is None or batch is not self._key[0] or key[1:] != self._key[1:]:
            generator = torch.Generator(batch.image.device).manual_seed(seed)
            crops = hand_crops(batch, generator, config.jitter, size, count=config.crops)
            image, covered = augment_crops(crops.image, generator, config.augment)
            seen = hide_points(crops.truth.visible, crops.truth.points, covered)
            self._crops = replace(crops, image=image, truth=replace(crops.truth, visible=seen))
            self._key = key
        return self._crops


@dataclass(frozen=True)
class HandTask:
    """A hand regressor on crops of all hands that can be seen."""

    name: str  # "parametric" or "direct"
    net: ParametricConfig | DirectConfig
    config: HandTraining = field(default_factory=HandTraining)
    crops: CropMaker = field(default_factory=CropMaker, compare=False)

    @property
    def lr(self) -> float:
        return self.config.lr

    def build(self) -> nn.Module:
        kind = ParametricHand if isinstance(self.net, ParametricConfig) else DirectHand
        model = kind(self.net)
        if self.config.start_trunk is not None and self.config.start is None:
            if self.net.backbone != "mobile":
                raise UnusableInput("start_trunk holds a mobile backbone; set net.backbone to 'mobile'.")
            model.backbone.trunk.load_state_dict(load_trunk(_trunk(self.config.start_trunk)))
        if self.config.freeze and self.net.backbone == "mobile":
            trunk = model.backbone.trunk
            for part in (trunk.stem, *trunk.blocks[: self.config.freeze]):
                part.requires_grad_(False)
        return _started(model, self.config.start)

    def inputs(self, batch: SynthBatch, seed: int) -> HandCrops:
        return self.crops(batch, seed, self.config, self.net.vit.image)

    def loss(self, model: Any, crops: HandCrops) -> tuple[Tensor, dict[str, Tensor]]:
        out = model(crops.image, crops.K)
        c = self.config
        loss, terms = exact_loss(out, crops, c.exact) if c.loss == "exact" else hamer_loss(out, crops, c.hamer)
        return loss, terms | {"mpjpe": _mean_mpjpe(out, crops)}

    def looked_at(self, model: Any, batch: SynthBatch) -> HandCrops:
        """Crops of all usable hands, turned upright by a first look where the training does so."""
        crops = hand_crops(batch, None, None, self.net.vit.image)
        if len(crops) == 0 or self.config.jitter.upright == 0:
            return crops
        angles = upright_angles(model.predict(crops).points)
        return hand_crops(batch, None, None, self.net.vit.image, angles=angles)

    def evaluate(self, model: Any, batch: SynthBatch) -> dict[str, Tensor]:
        crops = self.looked_at(model, batch)
        if len(crops) == 0:
            return {}
        errors = hand_errors(model(crops.image, crops.K), crops)
        one = torch.ones_like(crops.truth.hidden)
        sums = {k: torch.stack([v.sum(), one.sum()]) for k, v in errors.items()}
        level = torch.bucketize(crops.truth.hidden, crops.truth.hidden.new_tensor(LEVELS[1:-1]), right=True)
        for i, (low, high) in enumerate(zip(LEVELS, LEVELS[1:], strict=False)):
            w = (level == i).float()
            name = f"{low:g}-{min(high, 1):g}"
            for k in ("pa_mpjpe", "mpjpe"):
                sums[f"{k}/{name}"] = torch.stack([(errors[k] * w).sum(), w.sum()])
        return sums

    def pictures(self, model: Any, batch: SynthBatch) -> Tensor | None:
        crops = self.looked_at(model, batch)
        if len(crops) == 0:
            return None
        crops = crops.rows(slice(0, 24))
        return draw_hands(crops.image, model(crops.image, crops.K), crops.truth.points)

    def save(self, path: Path, model: nn.Module, extra: dict[str, Any]) -> None:
        save_checkpoint(path, model, extra | {"looks": 2 if self.config.jitter.upright else 1})


@dataclass(frozen=True)
class SegmenterTask:
    """Whose pixel is it, on whole pictures, with and without the masks of a frame before."""

    net: SegmenterConfig = field(default_factory=SegmenterConfig)
    config: SegmenterTraining = field(default_factory=SegmenterTraining)
    name: str = "segmenter"

    @property
    def lr(self) -> float:
        return self.config.lr

    def build(self) -> nn.Module:
        model = Segmenter(self.net)
        if self.config.start_trunk is not None and self.config.start is None:
            if self.net.backbone != "mobile":
                raise UnusableInput("start_trunk holds a mobile backbone; set net.backbone to 'mobile'.")
            trunk = model.encoder.trunk
            found = load_trunk(_trunk(self.config.start_trunk))
            trunk.load_state_dict({k: found[k] for k in trunk.state_dict()})
        return _started(model, self.config.start)

    def inputs(self, batch: SynthBatch, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pictures, labels, and masks of a frame before."""
        c, generator = self.config, torch.Generator().manual_seed(seed)
        image, labels = augment(batch.image, batch.labels, generator, (c.size, c.size), c.zoom)
        return image, labels, corrupt_previous(labels, generator, c.none)

    def loss(self, model: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        image, labels, previous = inputs
        return segmenter_loss(model(image, previous), labels, self.config.dice, self.config.boundary)

    def evaluate(self, model: Any, batch: SynthBatch) -> dict[str, Tensor]:
        logits = model(batch.image)
        counts = confusion(logits, batch.labels)
        generator = torch.Generator().manual_seed(0)
        told = confusion(model(batch.image, corrupt_previous(batch.labels, generator, 0.0)), batch.labels)
        return _iou_sums(counts, "iou") | _iou_sums(told, "iou_previous")

    def pictures(self, model: Any, batch: SynthBatch) -> Tensor | None:
        batch = batch.rows(slice(0, 16))
        found, truth = model(batch.image).argmax(1), batch.labels.long()
        return torch.cat([paint_labels(batch.image, truth), paint_labels(batch.image, found)], 2)

    def save(self, path: Path, model: nn.Module, extra: dict[str, Any]) -> None:
        save_checkpoint(path, model, extra)


def _iou_sums(counts: Tensor, name: str) -> dict[str, Tensor]:
    hit = counts.diagonal()
    union = counts.sum(0) + counts.sum(1) - hit
    return {f"{name}/{m}": torch.stack([hit[i + 1], union[i + 1]]) for i, m in enumerate(MASKS)}


def _mean_mpjpe(out: HandOutput, crops: HandCrops) -> Tensor:
    """Root-relative error in mm of a training batch."""
    t = crops.truth
    error = (out.joints - out.joints[:, :1] - t.joints + t.joints[:, :1]).detach().norm(dim=-1).mean(1)
    return 1000 * (error * t.weight).sum() / t.weight.sum().clamp_min(1)


def _trunk(choice: str | Path) -> Path:
    return assets.path("hand_landmark") if choice == "mediapipe" else Path(choice)


def _started(model: nn.Module, path: Path | None) -> nn.Module:
    if path is None:
        return model
    found = load_model(path)
    if type(found) is not type(model) or found.config != model.config:
        raise UnusableInput(f"{path} is of another network than the settings ask for; change one of them.")
    model.load_state_dict(found.state_dict())
    return model


# ---------------------------------------------------------------- everything together


@dataclass(frozen=True)
class ParametricSettings(HandTraining):
    """The parametric family: its network and training."""

    net: ParametricConfig = field(default_factory=ParametricConfig)


@dataclass(frozen=True)
class DirectSettings(HandTraining):
    """The direct family: its network and training."""

    net: DirectConfig = field(default_factory=DirectConfig)


@dataclass(frozen=True)
class SegmenterSettings(SegmenterTraining):
    """The segmenter: its network and training."""

    net: SegmenterConfig = field(default_factory=SegmenterConfig)


def make_tasks(settings: dict[str, ParametricSettings | DirectSettings | SegmenterSettings]) -> list[Task]:
    """The tasks of these names; the hand regressors learn from the same crops where their settings agree. Raises
    `UnusableInput` for an unknown name."""
    tasks, crops = [], CropMaker()
    for name, s in settings.items():
        if name in ("parametric", "direct"):
            tasks.append(HandTask(name, s.net, s, crops))
        elif name == "segmenter":
            tasks.append(SegmenterTask(s.net, s))
        else:
            raise UnusableInput(f"There is no task {name!r}; there are parametric, direct and segmenter.")
    return tasks
