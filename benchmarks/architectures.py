"""Which networks get a report without options, and what it holds. Writes docs/architectures.md.

The networks are those of the tests: families of transformers in small, networks on graphs, and networks
written by hand. Run from the repository: `python benchmarks/architectures.py` (two minutes on one core).
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_koopman import CreditReport, Options, credit_report

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "architectures.md"
sys.path.insert(0, str(ROOT / "tests" / "network"))

import families  # ruff: ignore[module-import-not-at-top-of-file]
import graphs  # ruff: ignore[module-import-not-at-top-of-file]
import test_architectures as by_hand  # ruff: ignore[module-import-not-at-top-of-file]

Made = tuple[nn.Module, Iterable[Any]]
EVERYDAY = (
    "samples are few",
    "states keep less than",
    "the data skips components",
    "takes no floating-point input",
    "joined into one state",
)
"""Notes that say nothing odd, left out of the page."""

HEAD = """# Architectures

Written by `benchmarks/architectures.py`: {count} networks with random weights, on small random batches
as a `DataLoader` gives them (mappings with labels, tuples, objects of torch_geometric), with no options
but `max_dim=16`. **{passed} of {count} have a report with finite numbers for all that reaches the
outputs.** A slow test (`tests/network/test_families.py`) checks by gradients that no parameter that
moves the outputs is left out, that blocks are components of their own, and, in a Trainer, that training
stays the same to the last bit. Families that need further libraries (timm, natten, detectron2) or cannot
be made small are not among them.

How to read a row: `layers.0` to `layers.2` stand for what lies between; `a+b` was joined, for the same
components read both, or they are the heads that the network ends with. Notes that most reports hold (few
samples, little variance kept, skip connections, embeddings that are x_0) are not repeated. {failures}
"""


def cases() -> Iterator[tuple[str, str, Callable[[], Made]]]:
    """Go through all networks, by group."""
    for name, make in by_hand.plain().items():
        yield "Written by hand", name, make
    for name in graphs.NAMES:
        yield "torch_geometric", name, lambda name=name: (graphs.networks()[name](), graphs.graphs())
    for family in sorted(families.FAMILIES, key=lambda family: (family.task, family.name)):

        def made(family: families.Family = family) -> Made:
            model = families.build(family)
            return model, families.loader(family, model)

        yield f"transformers: {family.task}", family.name, made


def measure(make: Callable[[], Made]) -> CreditReport:
    """Measure a network; raise where a number is not finite and no note says why."""
    torch.manual_seed(0)
    model, batches = make()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = credit_report(model.eval(), batches, options=Options(max_dim=16))
    dead = " ".join(note for note in report.notes if "dead branch" in note)
    finite = np.isfinite(report.credit) & np.isfinite(report.r2)
    odd = [name for name, ok in zip(report.components, finite, strict=True) if not ok]
    if any(name not in dead for name in odd):
        raise ValueError(f"no finite numbers for {odd}")
    return report


def shortened(names: tuple[str, ...]) -> str:
    """Write runs of numbered names short."""
    shown: list[str] = []
    for name in names:
        stem, _, number = name.rpartition(".")
        before = shown[-1].split("` to `")[-1].strip("`") if shown else ""
        follows = number.isdigit() and before == f"{stem}.{int(number) - 1}"
        if follows:
            shown[-1] = f"{shown[-1].split(' to ')[0]} to `{name}`"
        else:
            shown.append(f"`{name}`")
    return ", ".join(shown)


def page() -> str:
    """Measure everything and write the page's text."""
    lines: list[str] = []
    failures: list[str] = []
    group, count = "", 0
    for kind, name, make in cases():
        if kind != group:
            lines += [
                "",
                f"## {kind}",
                "",
                "| network | components | what the report notes |",
                "|---|---|---|",
            ]
            group = kind
        count += 1
        try:
            report = measure(make)
        except Exception as error:
            failures.append(f"{name} ({kind}): {type(error).__name__}: {error}")
            lines.append(f"| {name} | none | {type(error).__name__}: {error} |")
            continue
        notes = [note for note in report.notes if not any(word in note for word in EVERYDAY)]
        lines.append(f"| {name} | {shortened(report.components)} | {'; '.join(notes) or 'nothing'} |")
    told = "No network fails." if not failures else "Failures: " + "; ".join(failures) + "."
    head = HEAD.format(count=count, passed=count - len(failures), failures=told)
    return head + "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
