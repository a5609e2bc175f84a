"""The folder list is the pipeline: a folder imports only from those above it; no file imports itself."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import lightning_koopman

PACKAGE = Path(lightning_koopman.__file__).parent
FOLDERS = [
    "network",
    "network/access",
    "network/axes",
    "network/flow",
    "network/capture",
    "network/runs",
    "koopman",
    "report",
    "measurement",
    "effects",
    "decisions",
    "callback",
    "checkpoints",
    "cli",
]
FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
OTHERS = {"__init__.py", "demo.py", "py.typed"}
SHELLS = {"lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities", "torchmetrics"}
CORE = {"torch", "numpy", "scipy", "lightning_koopman", "__future__"}


def imported(tree: ast.AST) -> set[str]:
    """Dotted names of all that is imported, at any depth, for types alone too."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {str(node.module)}
    return names


def read(path: Path) -> set[str]:
    return imported(ast.parse(path.read_text(encoding="utf-8")))


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


def files_read(path: Path) -> Iterator[Path]:
    """Files of the package that a file imports."""
    by_name = {name_of(other): other for other in FILES if other.name != "__init__.py"}
    yield from (by_name[name] for name in read(path) if name in by_name)


def folder_of(path: Path) -> str:
    folder = path.relative_to(PACKAGE).parent.as_posix()
    return path.stem if folder == "." else folder


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_folder_imports_only_from_those_above_it(path):
    # The demo is a user, and a command.
    order = [*FOLDERS[:-1], "demo", "cli"]
    below = order.index(folder_of(path))
    assert {folder_of(other) for other in files_read(path)} <= set(order[: below + 1])


def test_no_file_imports_itself_however_far_around():
    done: set[Path] = set()

    def visit(path: Path, way: tuple[Path, ...]) -> None:
        assert path not in way, " -> ".join(map(name_of, (*way[way.index(path) :], path)))
        if path not in done:
            for other in files_read(path):
                visit(other, (*way, path))
            done.add(path)

    for path in FILES:
        visit(path, ())
    assert len(done) == len(FILES)


@pytest.mark.parametrize("folder", FOLDERS[: FOLDERS.index("koopman") + 1])
def test_the_core_imports_torch_numpy_and_scipy_only(folder):
    import sys

    for path in (PACKAGE / folder).glob("*.py"):
        others = {name.split(".")[0] for name in read(path)} - CORE - sys.stdlib_module_names
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("folder", sorted({*FOLDERS} - {"callback"}))
def test_only_the_callback_knows_lightning_and_only_the_metric_torchmetrics(folder):
    for path in (PACKAGE / folder).glob("*.py"):
        known = {name.split(".")[0] for name in read(path)} & SHELLS
        assert known == ({"torchmetrics"} if path.name == "metric.py" else set()), path.name


def test_the_folder_list_can_be_taken_in_at_a_glance():
    entries = {path.name for path in PACKAGE.iterdir()} - {"__pycache__"}
    assert entries == {folder for folder in FOLDERS if "/" not in folder} | OTHERS
    assert len(entries) <= 12
    for folder in FOLDERS:
        assert len(list((PACKAGE / folder).glob("*.py"))) <= 16, folder


MAKE = {f"torch.{f.__name__}" for f in _device_constructors()}


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "demo.py"], ids=name_of)
def test_what_is_made_says_on_which_device_whatever_the_users_default_is(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) in MAKE]
    silent = [call for call in made if "device" not in {keyword.arg for keyword in call.keywords}]
    assert [f"line {call.lineno}: {ast.unparse(call)}" for call in silent] == []
