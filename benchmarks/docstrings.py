"""Paragraphs of docstrings, the same in every run whatever was imported before.

Some libraries replace functions of NumPy, SciPy or PyTorch when they are imported, and modules become
attributes of others. So docstrings are read in an interpreter of its own, which imports nothing else.
"""

import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

EVERYTHING = "sklearn.utils.discovery"
"""Stands for all estimators, functions and displays of scikit-learn."""


def digest(text: str) -> str:
    """A number that is the same in every run, by which texts are shuffled and told apart."""
    return hashlib.sha256(text.encode()).hexdigest()


def paragraphs(names: Sequence[str]) -> dict[str, list[str]]:
    """The paragraphs of what modules or classes hold, by their names."""
    # Sets are printed in some docstrings, in an order that is random otherwise.
    environment = os.environ | {"PYTHONHASHSEED": "0"}
    command = [sys.executable, __file__, *names]
    found = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    read: dict[str, list[str]] = json.loads(found.stdout)
    return read


def holder_of(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        module, _, attribute = name.rpartition(".")
        return getattr(importlib.import_module(module), attribute)


def documented(name: str) -> list[Any]:
    """What a module or class holds besides modules, in the order of names."""
    if name == EVERYTHING:
        found = holder_of(name)
        parts = (found.all_estimators(), found.all_functions(), found.all_displays())
        return [each for part in parts for _, each in part]
    holder = holder_of(name)
    values = [getattr(holder, each) for each in sorted(vars(holder))]
    return [each for each in values if not inspect.ismodule(each)]


def split(source: Any) -> Iterator[str]:
    """The paragraphs of a docstring, without examples and tables."""
    for text in (inspect.getdoc(source) or "").split("\n\n"):
        words = " ".join(text.split())
        if len(words) > 60 and ">>>" not in words and "---" not in words:
            yield words


if __name__ == "__main__":
    read = {name: [words for each in documented(name) for words in split(each)] for name in sys.argv[1:]}
    json.dump(read, sys.stdout)
