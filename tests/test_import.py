"""Quick to import: nothing heavy is loaded by `import handhold`, nor before the command line knows what to do."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "cv2", "av", "pycolmap", "scipy", "skimage", "ai_edge_litert", "numpy", "rich")


def loaded(code: str) -> set[str]:
    """Which heavy modules a fresh Python has after running `code`."""
    code += f"\nimport sys\nprint('loaded', *[m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return set(out.stdout.splitlines()[-1].split()[1:])


def test_import_handhold_loads_nothing_heavy():
    assert loaded("import handhold; dir(handhold)") == set()


def test_config_and_pipeline_load_nothing_heavy():
    assert loaded("import handhold.config, handhold.runs, handhold.progress") == set()
    assert loaded("import handhold.pipeline") <= {"numpy"}


@pytest.mark.parametrize("argv", [["--help"], ["run", "--help"], ["run"], ["--version"]])
def test_parsing_loads_nothing_heavy(argv):
    code = f"import handhold.cli\ntry: handhold.cli.main({argv!r})\nexcept SystemExit: pass"
    assert loaded(code) <= {"rich"}


def test_public_names_resolve():
    import handhold

    for name in handhold.__all__:
        assert getattr(handhold, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = handhold.nothing


def test_version_is_the_packages():
    import tomllib
    from pathlib import Path

    import handhold

    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert handhold.__version__ == project["version"]
