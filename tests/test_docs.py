"""The page of errors holds every message that the package can give, and no other."""

import ast
import re
import runpy
from pathlib import Path

import lightning_koopman

PACKAGE = Path(lightning_koopman.__file__).parent
DOCS = Path(__file__).parents[1] / "docs"

# Raised again as they came, or made of other messages.
PASSED_ON = {"error", "failure", "TypeError", "reports", "found", "message", "str(error)", "str(result)"}
# Caught where it is raised for: no user meets it.
PASSED_ON |= {"OneByOneError"}
# No user meets it: `from lightning_koopman import …` tells it as Python does.
PYTHONS_OWN = "module … has no attribute …"


def template(node: ast.expr) -> str | None:
    """Give a message's text with … for what is filled in, or nothing where it is no literal."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        parts = [template(part) if isinstance(part, ast.Constant) else "…" for part in node.values]
        return "".join(part or "" for part in parts)
    return None


def texts(tree: ast.Module) -> dict[str, set[str]]:
    """Collect the texts that names stand for."""
    assigned: dict[str, set[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and (text := template(node.value)) is not None:
            assigned.setdefault(ast.unparse(node.targets[0]), set()).add(text)
    return assigned


def messages(tree: ast.Module, constants: dict[str, set[str]]) -> set[str]:
    """Collect the errors, warnings and notes of one source file."""
    assigned = constants | texts(tree)
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            given = node.exc.args[:1]
        elif isinstance(node, ast.Raise) and node.exc is not None:
            given = [node.exc]
        elif isinstance(node, ast.Call) and re.search(
            r"(\bwarn|_warn|_warn_once|notes\.append|failures\.append)$", ast.unparse(node.func)
        ):
            given = node.args[:1]
        else:
            continue
        for argument in given:
            name = ast.unparse(argument)
            text = template(argument)
            if text is not None:
                found.add(text)
            elif name in assigned:
                found |= assigned[name]
            else:
                assert name in PASSED_ON, f"{ast.unparse(node)}: cannot tell {name}"
    return found


def test_every_message_has_an_entry_in_the_page_of_errors_and_every_entry_a_message():
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PACKAGE.rglob("*.py")]
    constants = {k: v for tree in trees for k, v in texts(tree).items() if k.isupper()}
    given = {text for tree in trees for text in messages(tree, constants)} - {PYTHONS_OWN}
    page = (DOCS / "errors.md").read_text(encoding="utf-8")
    entries = re.findall(r"^- (`+) ?(.+?) ?\1\n  \S", page, flags=re.MULTILINE)
    documented = {text for _, text in entries}
    assert len(given) > 100
    assert given - documented == set(), "messages without an entry in docs/errors.md"
    assert documented - given == set(), "entries in docs/errors.md that no code gives any more"
    assert len(documented) == len(entries), "an entry is there twice"


def test_the_text_of_the_page_on_speed_is_what_its_benchmark_writes_around_the_figures():
    page = (DOCS / "speed.md").read_text()
    text = re.sub(r"(<!-- (?!end)\w+ -->\n).*?(?=<!-- end -->)", r"\1", page, flags=re.DOTALL)
    known = runpy.run_path(str(DOCS.parent / "benchmarks" / "speed_page.py"))["PAGE"]
    assert re.sub(r"torch \d\S+\.", "torch <torch>.", text) == known
