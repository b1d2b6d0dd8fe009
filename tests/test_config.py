"""The configuration tree: TOML round trip, types, and messages."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from handhold import config as c

FULL = c.Config(
    prepare=c.PrepareConfig(
        K=Path('/a/K "quoted" \\ back.txt'), masks=Path("/m"), start=0.1, end=2.5, stride=3, max_side=0
    ),
    evaluate=c.EvaluateConfig(truth=Path("/gt.npz")),
    export=c.ExportConfig(preview=False),
    seed=7,
    device="cuda:0",
)


@pytest.mark.parametrize("config", [c.Config(), FULL])
def test_toml_round_trip(tmp_path, config):
    c.write_toml(config, tmp_path / "c.toml")
    assert c.read_toml(tmp_path / "c.toml") == config
    assert c.from_dict(c.to_dict(config)) == config


def test_paths_in_a_file_are_relative_to_it_and_absolute_fixes_the_rest(tmp_path, monkeypatch):
    (tmp_path / "c.toml").write_text('[prepare]\nK = "K.txt"\n')
    assert c.read_toml(tmp_path / "c.toml").prepare.K == tmp_path / "K.txt"
    monkeypatch.chdir(tmp_path)
    fixed = c.absolute(c.Config(evaluate=c.EvaluateConfig(truth=Path("gt.npz"))))
    assert fixed.evaluate.truth == tmp_path / "gt.npz" and fixed.prepare.K is None


def test_a_file_may_start_from_a_preset(tmp_path):
    (tmp_path / "c.toml").write_text('preset = "draft"\nseed = 3\n')
    config = c.read_toml(tmp_path / "c.toml")
    assert config.seed == 3 and config.prepare == c.preset("draft").prepare != c.Config().prepare


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("colour = 1", "no setting 'colour'"),
        ("[prepare]\nstrides = 1", "no setting 'prepare.strides'"),
        ('seed = "one"', "seed must be int"),
        ("seed = true", "seed must be int"),
        ("prepare = 1", "a table of settings"),
        ('method = "magic"', "must be one of"),
        ("[prepare]\nstride = 0", "stride must be 1 or more"),
        ('[track]\nfeatures = "orb"', "track.features must be one of auto, sift, xfeat"),
        ("[prepare]\nstart = 2\nend = 1", "end must be later"),
        ("[prepare\n", "not valid TOML"),
        ('preset = "best"', "no preset 'best'"),
    ],
)
def test_messages(tmp_path, text, words):
    (tmp_path / "c.toml").write_text(text)
    with pytest.raises(c.BadConfig, match=words) as e:
        c.read_toml(tmp_path / "c.toml")
    assert e.value.exit_code == 2


def test_missing_file(tmp_path):
    with pytest.raises(c.BadConfig, match="cannot be read"):
        c.read_toml(tmp_path / "none.toml")


def test_whole_numbers_are_taken_for_floats(tmp_path):
    (tmp_path / "c.toml").write_text("[prepare]\nstart = 1\n")
    start = c.read_toml(tmp_path / "c.toml").prepare.start
    assert start == 1.0 and isinstance(start, float)


@pytest.mark.parametrize("name", c.PRESETS)
def test_presets_are_valid(name):
    assert isinstance(c.preset(name), c.Config)


def test_every_setting_is_explained_and_frozen():
    import inspect

    def walk(kind):
        source = inspect.getsource(kind)
        for f in dataclasses.fields(kind):
            value = getattr(kind(), f.name)
            if dataclasses.is_dataclass(value):
                walk(type(value))
            else:
                after = source.split(f"    {f.name}:", 1)[1].split("\n", 1)[1].lstrip()
                assert after.startswith('"""'), (
                    f"{kind.__name__}.{f.name} has no docstring, so --help cannot explain it"
                )
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(kind(), dataclasses.fields(kind)[0].name, 1) if dataclasses.fields(kind) else _raise()

    def _raise():
        raise dataclasses.FrozenInstanceError

    walk(c.Config)
