"""The import direction of docs/architecture.md: a module imports only from its own layer and the layers below."""

from __future__ import annotations

import ast
from pathlib import Path

import handhold

LAYERS = (
    ("errors", "files", "parallel", "pickled"),
    ("scene",),  # plain data only; below everything, so that shapes and metrics can speak of a Mesh
    ("geometry", "assets", "kernels"),
    ("hand", "shapes", "motions"),
    ("render", "losses", "metrics", "priors"),
    ("datasets", "regressors", "tracking", "methods", "export"),
    ("view", "runs", "config", "pipeline", "progress", "stages", "train", "doctor", "arguments", "cli"),
)
RANK = {name: i for i, names in enumerate(LAYERS) for name in names}
ROOT = Path(handhold.__file__).parent


def imports(path: Path) -> list[tuple[int, str]]:
    """(line, top-level module of handhold) of every import, inside functions too, but not those for type checkers."""
    package = path.relative_to(ROOT).parts[:-1]
    found: list[tuple[int, str]] = []

    def visit(node: ast.AST) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            for n in node.orelse:
                visit(n)
            return
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = list(package[: len(package) - node.level + 1])
                base += node.module.split(".") if node.module else []
            elif node.module and node.module.split(".")[0] == "handhold":
                base = node.module.split(".")[1:]
            else:
                return
            found.extend((node.lineno, base[0] if base else alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "handhold" and len(parts) > 1:
                    found.append((node.lineno, parts[1]))
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(path.read_text(encoding="utf-8")))
    return found


def test_every_module_has_a_layer():
    tops = {
        p.stem if p.is_file() else p.name for p in ROOT.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert tops - {"__init__", "__main__"} <= set(RANK), "name the layer of the new module in this test"


def test_imports_point_down():
    wrong = []
    for path in sorted(ROOT.rglob("*.py")):
        top = path.relative_to(ROOT).parts[0].removesuffix(".py")
        if top in ("__init__", "__main__"):
            continue
        for line, target in imports(path):
            if target in RANK and RANK[target] > RANK[top]:
                wrong.append(f"{path.relative_to(ROOT)}:{line} ({top}) imports {target}")
    assert not wrong, "\n".join(wrong)


def test_no_pickle_but_the_restricted_loader():
    users = []
    for path in sorted(ROOT.rglob("*.py")):
        names = {
            alias.name.split(".")[0]
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, (ast.Import, ast.ImportFrom))
            for alias in (node.names if isinstance(node, ast.Import) else [ast.alias(name=node.module or "")])
        }
        if names & {"pickle", "dill", "joblib", "shelve", "marshal"}:
            users.append(path.relative_to(ROOT).as_posix())
    assert users in ([], ["hand/assets.py"])


def test_no_module_is_called_utils():
    assert not [p for p in ROOT.rglob("*util*") if p.suffix == ".py" or p.is_dir()]
