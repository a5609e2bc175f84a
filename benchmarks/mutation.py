"""Changes the package one expression at a time and tells which changes no test notices.

``python benchmarks/mutation.py RESULTS MODULE... -- TEST_FILE...`` with the ``benchmarks`` extra and
``OMP_NUM_THREADS=1``, on a system that forks; modules are named like ``koopman.chain``. The changes are
mutmut's, of properties and of constants' numbers too. Everything is imported, and every test run once,
in one process. Each change is made in a fork of it, which gives one function new code and runs the tests
that reached the changed lines: those that found other changes of the function first, then the others by
their length. RESULTS gets one line of JSON per change; changes that it holds are not tried again. Behind
``--``, options of pytest are taken too, and three of this script: ``--again`` tries again what survived,
``--few`` takes at most two parametrisations of a test, and no long one, and ``--numbers`` leaves alone
what no number depends on: wordings, devices, and whether lengths are checked (``strict``).
"""

from __future__ import annotations

import ast
import functools
import inspect
import json
import os
import re
import resource
import signal
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType, FunctionType, ModuleType
from typing import Any

import libcst as cst
import pytest
from libcst.metadata import MetadataWrapper, PositionProvider
from mutmut.mutation.file_mutation import MutationVisitor, deep_replace
from mutmut.mutation.mutators import mutation_operators
from mutmut.mutation.pragma_handling import IgnoredCode

import lightning_koopman

PACKAGE = Path(lightning_koopman.__file__).parent
FLAGS = ("again", "few", "numbers")
READ_ONCE = ("property", "cached_property")
LEAST_SECONDS, TIMES_AS_LONG = 5, 20
"""A test that takes so many seconds and so many times as long as without a change has no end."""
LONG = 0.25
"""Seconds of the processor, traced, from which on a test is long."""
MEMORY = 12 * 2**30
WORDING = re.compile(r"""\w?(["']).* .*\1$""")
WHERE = re.compile(r"(device|strict)=(?:[^,()]|\([^()]*\))*,?\s*")


@dataclass(frozen=True)
class Change:
    """One expression of a module and what takes its place.

    ``nth`` numbers changes of a function that look the same, ``lines`` are those whose tests may notice
    (none for a constant), and ``code`` is all of the changed module.
    """

    module: str
    function: str
    line: int
    lines: frozenset[int]
    before: str
    after: str
    nth: int
    code: str


def file_of(module: str) -> Path:
    return (PACKAGE / module.replace(".", "/")).with_suffix(".py")


KEY = ("module", "function", "before", "after", "nth")


class Visitor(MutationVisitor):
    """Mutmut's visitor, which also changes properties, and remembers places."""

    def __init__(self) -> None:
        nothing = IgnoredCode(no_mutate_lines=set(), ignore_node_lines=set(), ignore_pattern_lines=set())
        super().__init__(mutation_operators, nothing)
        self.places: list[int] = []

    def _create_mutations(self, node: cst.CSTNode) -> None:
        super()._create_mutations(node)
        line = self.get_metadata(PositionProvider, node).start.line
        self.places += [line] * (len(self.mutations) - len(self.places))

    def _skip_node_and_children(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.FunctionDef) and [
            d.decorator.value for d in node.decorators if isinstance(d.decorator, cst.Name)
        ] in [[name] for name in READ_ONCE]:
            return False
        return super()._skip_node_and_children(node)


def statements(tree: ast.Module) -> Iterator[tuple[ast.stmt, range, str]]:
    """Each statement, the lines that run with it alone, and the function or method that it is in."""

    def walk(
        body: Sequence[ast.AST], classes: str, inside: str
    ) -> Iterator[tuple[ast.stmt, range, str]]:
        for node in body:
            if not isinstance(node, ast.stmt):
                yield from walk(list(ast.iter_child_nodes(node)), classes, inside)
                continue
            within, below = inside, classes
            if isinstance(node, ast.FunctionDef) and not inside:
                within = f"{classes}{node.name}"
            elif isinstance(node, ast.ClassDef) and not inside:
                below = f"{classes}{node.name}."
            inner = [
                child
                for child in ast.iter_child_nodes(node)
                if isinstance(child, ast.stmt | ast.ExceptHandler)
            ]
            start = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", []))])
            stop = inner[0].lineno if inner else int(node.end_lineno or 0) + 1
            yield node, range(start, max(stop, start + 1)), within
            yield from walk(inner, below, within)

    return walk(tree.body, "", "")


def changes(name: str) -> Iterator[Change]:
    """All changes of a module: in functions, methods and properties, and of its constants' numbers."""
    text = file_of(name).read_text(encoding="utf-8")
    visitor = Visitor()
    module = MetadataWrapper(cst.parse_module(text)).visit(visitor)
    tree = ast.parse(text)
    places = list(statements(tree))
    alike: Counter[tuple[str, str, str]] = Counter()
    for mutation, line in zip(visitor.mutations, visitor.places, strict=True):
        node, lines, inside = [place for place in places if line in place[1]][-1]
        is_number = isinstance(mutation.original_node, cst.BaseNumber)
        is_constant = node in tree.body and isinstance(node, ast.Assign) and is_number
        if not inside and not is_constant:
            continue
        function = inside or (ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else "")
        before = module.code_for_node(mutation.original_node).strip()
        after = module.code_for_node(mutation.mutated_node).strip()
        alike[function, before, after] += 1
        yield Change(
            name,
            function,
            line,
            frozenset(lines) if inside else frozenset(),
            before,
            after,
            alike[function, before, after],
            deep_replace(module, mutation.original_node, mutation.mutated_node).code,
        )


def may_tell(change: Change) -> bool:
    """Check whether a change is more than one of a wording, a device or of a check of lengths."""
    is_wording = WORDING.match(change.before) and WORDING.match(change.after)
    before, after = (WHERE.sub("", each).replace(" ", "") for each in (change.before, change.after))
    return not is_wording and before.rstrip(",)") != after.rstrip(",)")


def codes(code: CodeType, prefix: str = "") -> Iterator[tuple[str, CodeType]]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield prefix + part.co_name, part
            yield from codes(part, f"{prefix}{part.co_name}.")


def function_of(module: ModuleType, name: str) -> FunctionType:
    found: Any = module
    for part in name.split("."):
        found = inspect.getattr_static(found, part)
    if isinstance(found, property):
        found = found.fget
    elif isinstance(found, functools.cached_property):
        found = found.func
    elif isinstance(found, staticmethod | classmethod):
        found = found.__func__
    return inspect.unwrap(found)


def make(change: Change) -> None:
    """Change the package as it is loaded in this process."""
    module = sys.modules[f"lightning_koopman.{change.module}"]
    if not change.lines:
        namespace = dict(vars(module))
        tree = ast.parse(change.code)
        tree.body = [
            node
            for node in tree.body
            if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == change.function
        ]
        exec(compile(tree, "<changed>", "exec"), namespace)
        old = getattr(module, change.function)
        for other in list(sys.modules.values()):
            if getattr(other, "__dict__", {}).get(change.function) is old:
                setattr(other, change.function, namespace[change.function])
        return
    function = function_of(module, change.function)
    compiled = compile(change.code, str(file_of(change.module)), "exec")
    function.__code__ = dict(codes(compiled))[change.function]
    node = next(
        node
        for node, _, inside in statements(ast.parse(change.code))
        if inside == change.function and isinstance(node, ast.FunctionDef)
    )
    given = [ast.unparse(default) for default in node.args.defaults]
    function.__defaults__ = tuple(eval(text, vars(module)) for text in given) or None
    named = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    function.__kwdefaults__ = {
        arg.arg: eval(ast.unparse(default), vars(module))
        for arg, default in named
        if default is not None
    } or None


class Runner:
    """Takes the place of pytest's own loop over the tests collected."""

    def __init__(self, modules: Sequence[str], results: Path, flags: set[str]) -> None:
        self.modules, self.results = modules, results
        self.again, self.few, self.numbers = (f"--{name}" in flags for name in FLAGS)
        self.failed = False
        self.reached: dict[tuple[str, int], set[int]] = defaultdict(set)
        self.seconds: list[float] = []
        self.usable: set[int] = set()
        self.found: dict[str, Counter[int]] = defaultdict(Counter)

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        self.items = session.items
        if self.few:
            alike: Counter[str] = Counter()
            numbers = []
            for item in session.items:
                name = item.nodeid.split("[")[0]
                numbers.append(alike[name])
                alike[name] += 1
            self.items = [item for item, n in zip(session.items, numbers, strict=True) if n < 2]
        self.run_once()
        known = {}
        if self.results.exists():
            rows = map(json.loads, self.results.read_text(encoding="utf-8").splitlines())
            known = {tuple(row[name] for name in KEY): row["outcome"] for row in rows}
        with self.results.open("a", encoding="utf-8") as file:
            for name in self.modules:
                counts: Counter[str] = Counter()
                start = time.time()
                for change in changes(name):
                    row = {name: getattr(change, name) for name in (*KEY, "line")}
                    before = known.get(tuple(row[name] for name in KEY))
                    if self.numbers and not may_tell(change):
                        continue
                    if before and not (self.again and before in ("survived", "not reached")):
                        continue
                    outcome, by = self.attempt(change)
                    counts[outcome] += 1
                    file.write(json.dumps(row | {"outcome": outcome, "by": by}) + "\n")
                    file.flush()
                print(name, dict(counts), f"{time.time() - start:.0f} s", flush=True)
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def fails(self, item: pytest.Item) -> bool:
        self.failed = False
        item.ihook.pytest_runtest_protocol(item=item, nextitem=None)
        return self.failed

    def run_once(self) -> None:
        """Run every test as it is, and note which lines it reaches and how long it takes."""
        wanted = {str(file_of(name)): name for name in self.modules}

        def line(frame: FrameType, event: str, arg: object) -> Any:
            self.reached[wanted[frame.f_code.co_filename], frame.f_lineno].add(place)
            return line

        def call(frame: FrameType, event: str, arg: object) -> Any:
            return line(frame, event, arg) if frame.f_code.co_filename in wanted else None

        for place, item in enumerate(self.items):
            start = time.process_time()
            sys.settrace(call)
            fails = self.fails(item)
            sys.settrace(None)
            self.seconds.append(time.process_time() - start)
            if fails or (self.few and self.seconds[-1] > LONG):
                print("left out,", "failing:" if fails else "long:", item.nodeid, flush=True)
            else:
                self.usable.add(place)
        seconds = sum(self.seconds[place] for place in self.usable)
        print(f"{len(self.usable)} tests, {seconds:.0f} s", flush=True)

    def attempt(self, change: Change) -> tuple[str, str]:
        which = self.usable
        if change.lines:
            which = which & set().union(*(self.reached[change.module, n] for n in change.lines))
        if not which:
            return "not reached", ""
        killers = self.found[f"{change.module}.{change.function}"]
        order = sorted(which, key=lambda place: (-killers[place], self.seconds[place]))
        receive, send = os.pipe()
        pid = os.fork()
        if not pid:
            self.child(change, order, send)
        os.close(send)
        with os.fdopen(receive) as pipe:
            tried = pipe.read().split()
        status = os.waitpid(pid, 0)[1]
        if os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0:
            return "survived", ""
        by = self.items[int(tried[-1])].nodeid if tried else ""
        if tried:
            killers[int(tried[-1])] += 1
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGALRM:
            return "timed out", by
        return "killed", by

    def child(self, change: Change, order: Sequence[int], send: int) -> None:
        failed = 1
        try:
            nowhere = os.open(os.devnull, os.O_RDWR)
            for stream in (0, 1, 2):
                os.dup2(nowhere, stream)
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            make(change)
            failed = 0
            for place in order:
                os.write(send, b"%d " % place)
                signal.alarm(int(LEAST_SECONDS + TIMES_AS_LONG * self.seconds[place]))
                if self.fails(self.items[place]):
                    failed = 1
                    break
        except BaseException:
            failed = 1
        finally:
            os._exit(failed)


def main() -> None:
    if "--" not in sys.argv[3:]:
        sys.exit(__doc__)
    split = sys.argv.index("--")
    results, *modules = sys.argv[1:split]
    flags = {f"--{name}" for name in FLAGS} & set(sys.argv)
    tests = [given for given in sys.argv[split + 1 :] if given not in flags]
    runner = Runner(modules, Path(results), flags)
    rewritten = "ignore::pytest.PytestAssertRewriteWarning"
    quiet = ["-p", "no:cacheprovider", "-p", "no:terminal", "--capture=no", "-W", rewritten]
    addopts = "addopts=--doctest-modules -m 'not slow'"
    sys.exit(pytest.main([*quiet, "-o", addopts, *tests], plugins=[runner]))


if __name__ == "__main__":
    main()
