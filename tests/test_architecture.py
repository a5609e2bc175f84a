"""The file list is the pipeline: a core module imports only from its left."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import lightning_koopman

PACKAGE = Path(lightning_koopman.__file__).parent
CORE = [
    "tensors",
    "dataflow",
    "isolation",
    "hooks",
    "module_tree",
    "automatic",
    "components",
    "recorded",
    "origins",
    "recorder",
    "capture",
    "pooling",
    "row_forms",
    "graph",
    "plan",
    "lifts",
    "keys",
    "basis",
    "states",
    "layout",
    "moments",
    "covariance",
    "ridge",
    "regression",
    "operator",
    "chain",
    "fits",
    "ranks",
    "alignment",
    "volumes",
    "jackknife",
    "credit",
    "delay",
    "effects",
    "whole_files",
    "schema",
    "tables",
    "report",
    "assembly",
]
SHELLS = {"lightning", "pytorch_lightning", "lightning_fabric", "torchmetrics", "tensorboard"}


def imported(nodes: list[ast.stmt]) -> set[str]:
    """Dotted names of all modules that statements import, at any depth."""
    names = set()
    for node in (inner for statement in nodes for inner in ast.walk(statement)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def own(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("lightning_koopman.")}


def at_module_level(tree: ast.Module) -> list[ast.stmt]:
    """Statements that run on import; an ``if TYPE_CHECKING`` body never does."""
    return [
        node
        for node in tree.body
        if not isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef)
        and not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING")
    ]


@pytest.mark.parametrize("name", CORE)
def test_a_core_module_imports_only_from_its_left(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    allowed = set(CORE[: CORE.index(name)])
    assert own(imported(at_module_level(tree))) <= allowed
    # A report is drawn only when it is asked to be; its table and its saved form know it by type alone.
    later = own(imported(tree.body)) - allowed
    assert later <= {"report": {"plots"}, "tables": {"report"}, "schema": {"report"}}.get(name, set())


@pytest.mark.parametrize("name", CORE)
def test_the_core_knows_no_shell(name: str) -> None:
    tree = ast.parse((PACKAGE / f"{name}.py").read_text(encoding="utf-8"))
    assert not {module.split(".")[0] for module in imported(tree.body)} & SHELLS


def test_only_the_callback_side_imports_lightning() -> None:
    users = {
        path.stem
        for path in PACKAGE.glob("*.py")
        if {m.split(".")[0] for m in imported(ast.parse(path.read_text(encoding="utf-8")).body)}
        & (SHELLS - {"torchmetrics"})
    }
    assert users <= {"harmless", "checkpoints", "evaluate", "cli", "demo"}


def test_the_reader_of_imports_sees_them() -> None:
    tree = ast.parse(
        "import lightning.pytorch as pl\n"
        "from lightning_koopman.plots import x\n"
        "def f():\n import torchmetrics"
    )
    assert imported(at_module_level(tree)) == {
        "lightning.pytorch",
        "lightning_koopman.plots",
        "lightning_koopman.plots.x",
    }
    assert "torchmetrics" in imported(tree.body)
    assert own(imported(tree.body)) == {"plots"}


def test_every_module_has_its_place_on_the_map() -> None:
    text = (PACKAGE.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    named = [name for row in rows for name in re.findall(r"`(\w+)`", row)]
    assert sorted(named) == sorted(p.stem for p in PACKAGE.glob("*.py") if p.stem != "__init__")
    assert [name for name in named if name in CORE] == CORE
