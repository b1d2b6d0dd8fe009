"""What is written is read back; writing goes on where it stopped; reading is a function of the step."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

from handhold.datasets.synthetic.sample import HandTruth, ObjectTruth, SynthBatch
from handhold.datasets.synthetic.shards import Shards, read_index, write_shards
from handhold.errors import UnusableInput

V, N, H, W = 37, 23, 32, 40


@dataclasses.dataclass(frozen=True)
class FakeConfig:
    size: int = 32
    colour: tuple[float, ...] = (0.1, 0.2)


class Fake:
    """A stream of pictures of nothing; betas[0] counts them."""

    def __init__(self, seed=0, fail_at=None, n_object=N, bodies=4):
        self.seed, self.config, self.fail_at, self.calls = seed, FakeConfig(), fail_at, 0
        self.n_object, self.bodies = n_object, bodies

    def batch(self, step, n, split="train"):
        self.calls += 1
        if self.fail_at is not None and step >= self.fail_at:
            raise KeyboardInterrupt
        g = torch.Generator().manual_seed(hash((step, n, split, self.seed)) % 2**31)
        rand = lambda *s: torch.rand(*s, generator=g)  # noqa: E731

        def hand():
            betas = rand(n, 10)
            betas[:, 0] = step * n + torch.arange(n)
            return HandTruth(
                rand(n) > 0.3,
                rand(n, 16, 3, 3),
                betas,
                rand(n, 3),
                rand(n, V, 3) * 0.2 + 0.4,
                rand(n, 21, 3),
                rand(n, 21, 2) * 200,
                rand(n, 21) > 0.5,
                rand(n),
                rand(n),
                rand(n, V) > 0.5,
            )

        image = torch.nn.functional.interpolate(rand(n, 3, 4, 5), (H, W), mode="bilinear")
        depth = torch.where(rand(n, H, W) > 0.5, rand(n, H, W) + 0.3, 0)
        pose = torch.eye(4).repeat(n, 1, 1)
        vertices = rand(n, self.n_object, 3)
        there, bent, mirrored = (rand(n) > 0.3 for _ in range(3))
        obj = ObjectTruth(there, (rand(n) * 9).long(), pose, vertices, rand(n), bent, mirrored)
        labels = (rand(n, H, W) * 5).to(torch.uint8)
        amodal = rand(n, self.bodies, H, W) > 0.5
        return SynthBatch(image, pose[:, :3, :3], labels, amodal, depth, hand(), hand(), obj)


def write(folder, samples=40, stream=None, **kw):
    return write_shards(stream or Fake(), folder, samples, 16, chunk=8, **kw)


def equal(a, b):
    for f in dataclasses.fields(a):
        x, y = getattr(a, f.name), getattr(b, f.name)
        if not (torch.equal(x, y) if isinstance(x, torch.Tensor) else equal(x, y)):
            return False
    return True


def test_round_trip(tmp_path):
    write(tmp_path, image="png")
    shards = Shards(tmp_path)
    assert shards.size() == 40 and shards.size("test") == 0
    truth = Fake().batch(2, 8)
    got = SynthBatch.cat([shards.row(16 + i) for i in range(8)])
    assert (got.image - truth.image).abs().max() <= 0.5 / 255 + 1e-6
    assert (got.depth - truth.depth).abs().max() <= 0.5e-4 + 1e-7 and torch.equal(got.depth > 0, truth.depth > 0)
    assert torch.equal(got.labels, truth.labels) and torch.equal(got.amodal, truth.amodal)
    for a, b in ((got.right, truth.right), (got.left, truth.left), (got.object, truth.object)):
        for f in dataclasses.fields(a):
            x, y = getattr(a, f.name), getattr(b, f.name)
            assert x.dtype == y.dtype and x.shape == y.shape
            if f.name == "vertices":
                assert (x - y).abs().max() < 2e-5  # the object here is 1 m wide
            else:
                assert torch.equal(x, y), f.name
    shards.verify()


def test_without_amodal_masks(tmp_path):
    write(tmp_path, 8, Fake(bodies=0))
    assert Shards(tmp_path).batch(0, 4).amodal.shape == (4, 0, H, W)


def test_jpeg_is_close(tmp_path):
    write(tmp_path)
    got, truth = Shards(tmp_path).row(3).image[0], Fake().batch(0, 8).image[3]
    assert (got - truth).abs().mean() < 0.01


def test_batches_are_a_function_of_the_step(tmp_path):
    write(tmp_path)
    a, b = Shards(tmp_path, workers=1), Shards(tmp_path, workers=3, ahead=False)
    first = [a.batch(s, 8) for s in (0, 1, 2, 7)]
    again = [b.batch(s, 8) for s in (7, 2, 1, 0)][::-1]
    assert all(equal(x, y) for x, y in zip(first, again, strict=True))
    ids = lambda s, n: [int(v) for v in a.batch(s, n).right.betas[:, 0]]  # noqa: E731
    epoch = sum((ids(s, 10) for s in range(4)), [])
    second = sum((ids(s, 10) for s in range(4, 8)), [])
    assert sorted(epoch) == sorted(second) == list(range(40)) and epoch != second
    assert ids(0, 4) + ids(1, 4) == ids(0, 8)
    assert epoch != [int(v) for s in range(4) for v in Shards(tmp_path, seed=1).batch(s, 10).right.betas[:, 0]]


def test_writing_goes_on_where_it_stopped(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "a", stream=Fake(fail_at=3))
    assert len(read_index(tmp_path / "a")["splits"]["train"]) == 1
    stream = Fake()
    write(tmp_path / "a", stream=stream)
    assert stream.calls == 3
    write(tmp_path / "b")
    assert read_index(tmp_path / "a") == read_index(tmp_path / "b")
    write(tmp_path / "a", stream=(stream := Fake()))
    assert stream.calls == 0
    write(tmp_path / "a", 64, stream=stream)  # the third shard was short, and the fourth was not there
    assert stream.calls == 4 and Shards(tmp_path / "a").size() == 64
    write(tmp_path / "a", 16, split="test")
    assert Shards(tmp_path / "a").size("test") == 16 and Shards(tmp_path / "a").size() == 64


def test_other_settings_are_refused(tmp_path):
    write(tmp_path / "a", 8)
    with pytest.raises(UnusableInput, match="other settings"):
        write(tmp_path / "a", 8, stream=Fake(seed=1))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(UnusableInput, match="not a folder of shards"):
        write(tmp_path / "b")
    with pytest.raises(UnusableInput, match="GiB allowed"):
        write(tmp_path / "c", max_bytes=1000)
    assert not (tmp_path / "c").exists()


def test_damage_is_told(tmp_path):
    with pytest.raises(UnusableInput, match="no index.json"):
        Shards(tmp_path)
    write(tmp_path)
    with pytest.raises(UnusableInput, match="no pictures of the split 'test'"):
        Shards(tmp_path).batch(0, 4, "test")
    file = tmp_path / "train-000001.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 255
    file.write_bytes(data)
    with pytest.raises(UnusableInput, match="damaged"):
        Shards(tmp_path).verify()
    data[:200] = bytes(200)
    file.write_bytes(data)
    with pytest.raises(UnusableInput, match="damaged"):
        Shards(tmp_path).row(20)
    file.write_bytes(data[:-10])
    with pytest.raises(UnusableInput, match="cut off"):
        Shards(tmp_path)
    index = json.loads((tmp_path / "index.json").read_text())
    index["splits"]["train"][0]["file"] = "../secret"
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(UnusableInput, match="not an index"):
        Shards(tmp_path)


def test_no_objects_and_numpy_only(tmp_path):
    from safetensors import safe_open

    write(tmp_path, 8)
    with safe_open(str(tmp_path / "train-000000.safetensors"), "numpy") as f:
        assert all(isinstance(f.get_tensor(k), np.ndarray) for k in f.keys())  # noqa: SIM118
