"""The segmenter's network, its loss, and what it is trained on."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from handhold.datasets.synthetic.sample import LABELS, LEFT, OBJECT, RIGHT
from handhold.regressors import segmenter, segmenter_data
from handhold.regressors.segmenter import (
    IGNORE,
    Segmenter,
    SegmenterConfig,
    augment,
    confusion,
    corrupt_previous,
    iou,
    segmenter_loss,
)

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = SegmenterConfig(widths=(8, 12, 16, 24, 32), depths=(1, 1, 1, 1, 1), up_depths=(1, 1, 1, 1), heads=2)
MOBILE = replace(segmenter.MOBILE, widths=(8, 12, 16, 24, 32), depths=(1,), up_depths=(1, 1, 1, 1), heads=2)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(n: int = 4, size: int = 64) -> tuple[torch.Tensor, torch.Tensor]:
    """Boxes of one colour per label on gray, with noise: image (N,3,H,W), labels (N,H,W) uint8."""
    g = seeded(3)
    labels = torch.zeros(n, size, size, dtype=torch.uint8)
    for i in range(n):
        for c in range(1, 5):
            x, y = torch.randint(0, size - 20, (2,), generator=g).tolist()
            labels[i, y : y + 18, x : x + 18] = c
    colors = torch.tensor([[0.4, 0.4, 0.4], [0.9, 0.6, 0.5], [0.5, 0.2, 0.1], [0.1, 0.3, 0.9], [0.2, 0.8, 0.3]])
    image = colors[labels.long()].permute(0, 3, 1, 2) + 0.03 * torch.randn(n, 3, size, size, generator=g)
    return image.clamp(0, 1), labels


def untrained(config: SegmenterConfig | None = None) -> Segmenter:
    """A network whose every layer does something: what begins at zero is given random values."""
    torch.manual_seed(0)
    model = Segmenter(config)
    with torch.no_grad():
        for p in model.parameters():
            if p.abs().sum() == 0:
                p.normal_(0, 0.2)
        for b in model.modules():
            if isinstance(b, torch.nn.BatchNorm2d):
                b.running_mean.normal_(0, 0.1)
                b.running_var.uniform_(0.5, 1.5)
    return model.eval()


def test_an_unknown_backbone_is_refused():
    with pytest.raises(ValueError, match="own.*mobile"):
        SegmenterConfig(backbone="resnet")


def test_the_shipped_size():
    assert sum(p.numel() for p in Segmenter(segmenter.MOBILE).parameters()) < 5e6
    assert sum(p.numel() for p in Segmenter().parameters()) < 5e6


@pytest.mark.parametrize("config", [SMALL, MOBILE], ids=["own", "mobile"])
@pytest.mark.parametrize("size", [(64, 64), (45, 71), (36, 100)])
def test_any_size_and_folding_changes_nothing(size, config):
    model = untrained(config)
    x = torch.rand(2, 3, *size, generator=seeded())
    previous = torch.rand(2, 5, *size, generator=seeded()).softmax(1)
    with torch.no_grad():
        plain, folded = model(x, previous), model.folded()(x, previous)
        assert plain.shape == (2, len(LABELS), *size)
        assert torch.allclose(plain, folded, atol=1e-4)
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in model.folded().modules())
        assert torch.equal(model(x), model(x, torch.zeros_like(previous))) and not torch.equal(model(x), plain)
        assert torch.allclose(model(x)[:1], model(x[:1]), atol=1e-5)  # a picture does not depend on its batch


def test_far_places_are_seen():
    """The answer in one corner depends on the opposite one."""
    model = untrained(SMALL)
    x = torch.rand(1, 3, 96, 160, generator=seeded(), requires_grad=True)
    model(x)[0, :, :8, :8].sum().backward()
    assert x.grad[0, :, 90:, 150:].abs().max() > 0


def test_the_loss_is_least_at_the_truth_and_ignores_the_unknown():
    labels = pictures()[1]
    right = 20 * torch.nn.functional.one_hot(labels.long(), 5).permute(0, 3, 1, 2).float()
    best = segmenter_loss(right, labels)[0]
    assert best < 0.02 < segmenter_loss(right.roll(3, -1), labels)[0] < segmenter_loss(-right, labels)[0]
    hidden = labels.clone()
    hidden[:, :20] = IGNORE
    a, b = right.clone(), right.clone()
    a[:, :, :20] = torch.randn(4, 5, 20, 64, generator=seeded())
    assert torch.allclose(segmenter_loss(a, hidden)[0], segmenter_loss(b, hidden)[0])
    assert torch.equal(confusion(a, hidden), confusion(b, hidden)) and confusion(a, hidden).sum() == 4 * 44 * 64
    assert torch.equal(iou(confusion(right, labels)), torch.ones(5, dtype=torch.float64))


def test_a_few_pictures_are_learned_by_heart():
    torch.manual_seed(0)
    image, labels = pictures()
    model = Segmenter(SMALL).train()
    opt = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss, _ = segmenter_loss(model(image), labels)
        opt.zero_grad()
        loss.backward()
        opt.step()
    with torch.no_grad():
        for _ in range(10):  # let the running statistics settle
            model(image)
        assert iou(confusion(model.eval()(image), labels)).min() > 0.8


def test_every_parameter_learns():
    model = untrained(SMALL).train()
    image, labels = pictures()
    segmenter_loss(model(image, corrupt_previous(labels, seeded(), none=0.0)), labels)[0].backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in model.parameters())


def test_a_mirror_exchanges_the_hands(monkeypatch):
    """Pictures painted with their own coordinates tell where they were reflected: there, and only there, right and left
    have changed places, inside the picture and beyond its border."""
    monkeypatch.setattr(segmenter_data, "_colors", lambda x, draw: x)
    monkeypatch.setattr(segmenter_data, "_things_in_front", lambda x, y, draw: (x, y))
    y, x = torch.meshgrid(*(torch.linspace(0, 1, 64),) * 2, indexing="ij")
    image = torch.stack([x, y, (x > 0.5).float()]).expand(24, -1, -1, -1)
    labels = torch.where(image[:, 2] > 0.5, RIGHT, LEFT).to(torch.uint8)
    seen, label = augment(image, labels, seeded(1), zoom=(0.5, 1.0))
    assert seen.shape == image.shape and label.dtype == torch.uint8
    dy, dx = torch.gradient(seen[:, :2], dim=(2, 3))
    turned = dx[:, 0] * dy[:, 1] - dx[:, 1] * dy[:, 0]
    extreme = torch.nn.functional.max_pool2d(torch.stack([turned, -turned], 1), 5, 1, 2)
    clear = (extreme.amin(1) < 0) & ((seen[:, 2] - 0.5).abs() > 0.49)  # not on a seam
    exchanged = label != torch.where(seen[:, 2] > 0.5, RIGHT, LEFT)
    assert clear.float().mean() > 0.5 and 0.2 < exchanged[clear].float().mean() < 0.8
    assert ((turned < 0) == exchanged)[clear].float().mean() > 0.999


def test_augmenting_keeps_pictures_and_labels_together_and_repeats():
    image, labels = pictures(8)
    a, y = augment(image, labels, seeded(5), size=(48, 80))
    assert a.shape == (8, 3, 48, 80) and y.shape == (8, 48, 80) and 0 <= a.min() and a.max() <= 1
    assert all(torch.equal(p, q) for p, q in zip((a, y), augment(image, labels, seeded(5), size=(48, 80)), strict=True))
    blue = (a[:, 2] - a[:, 0])[y == OBJECT].mean() - (a[:, 2] - a[:, 0])[y == RIGHT].mean()
    assert blue > 0.3


def test_autocast_changes_no_picture_and_trains():
    image, labels = pictures(3)
    whole = augment(image, labels, seeded(2)), corrupt_previous(labels, seeded(2), none=0.0)
    model = untrained(SMALL).train()
    with torch.autocast("cpu", torch.bfloat16):
        half = augment(image, labels, seeded(2)), corrupt_previous(labels, seeded(2), none=0.0)
        loss = segmenter_loss(model(half[0][0], half[1]), half[0][1])[0]
    assert all(torch.equal(a, b) for a, b in zip((*whole[0], whole[1]), (*half[0], half[1]), strict=True))
    loss.backward()
    assert loss.dtype == torch.float32 and torch.isfinite(loss) and model.head[1].weight.grad.isfinite().all()


def test_previous_masks_are_spoilt_but_tell():
    labels = pictures(32)[1]
    p = corrupt_previous(labels, seeded())
    given = p.sum(1).amax((1, 2)) > 0
    assert 0.2 < given.float().mean() < 0.8 and p.shape == (32, 5, 64, 64)
    assert corrupt_previous(labels, seeded(), none=1.0).abs().max() == 0
    p = corrupt_previous(labels, seeded(), none=0.0)
    total = p.sum(1)
    assert ((total < 1e-6) | ((total - 1).abs() < 1e-3)).all() and torch.equal(
        p, corrupt_previous(labels, seeded(), none=0.0)
    )
    scores = iou(confusion(p, labels))
    assert ((scores > 0.3) & (scores < 0.98)).all()


@pytest.mark.parametrize("growth", [1.0, 1e4])
def test_attention_stays_within_the_range_of_fused_kernels_however_large_its_weights_grow(monkeypatch, growth):
    model = untrained(SMALL).train()
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, segmenter.Attention):
                m.qkv.weight.mul_(growth)
                m.sharpness.mul_(growth)
    lowest, attention = [], torch.nn.functional.scaled_dot_product_attention

    def spy(q, k, v, scale):
        lowest.append((scale * q @ k.transpose(-1, -2)).logsumexp(-1).min())
        return attention(q, k, v, scale=scale)

    monkeypatch.setattr(segmenter.F, "scaled_dot_product_attention", spy)
    image, labels = pictures()
    loss, _ = segmenter_loss(model(image, corrupt_previous(labels, seeded())), labels)
    loss.backward()
    assert min(lowest) > -60  # exp of the negative overflows single precision at 88.7
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
