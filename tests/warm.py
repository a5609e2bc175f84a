"""Runs programs as a user would, in processes that begin with what they take seconds to import."""

import atexit
import multiprocessing
import os
import runpy
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

METHOD = "forkserver"
CONTEXT = multiprocessing.get_context(METHOD)
CONTEXT.set_forkserver_preload([
    "lightning.pytorch",
    "torchmetrics",
    "torch.utils.tensorboard",
    "lightning_koopman.cli.main",
    "matplotlib.pyplot",
    "pandas",
    "sklearn.datasets",
])


class Program:
    """A running program: a file of Python code, or a command that is one, and its arguments."""

    def __init__(
        self, command: Sequence[str | Path], cwd: Path | None = None, env: Mapping[str, str] = os.environ
    ) -> None:
        self.command = [str(word) for word in command]
        file = self.command[0] if self.command[0].endswith(".py") else shutil.which(self.command[0])
        assert file is not None, self.command
        self.folder = tempfile.TemporaryDirectory()
        given = ([file, *self.command[1:]], str(cwd or Path.cwd()), dict(env), self.folder.name)
        self.process = CONTEXT.Process(target=_run, args=given)
        self.process.start()

    def __enter__(self) -> "Program":
        return self

    def __exit__(self, *_: object) -> None:
        """Kill it if it still runs."""
        self.process.kill()
        self.process.join()
        self.folder.cleanup()

    def printed(self, name: str) -> str:
        """Give what it has printed so far, as ``out`` or ``err``."""
        path = Path(self.folder.name, name)
        return path.read_text() if path.exists() else ""

    def wait(self, timeout: float = 300) -> "subprocess.CompletedProcess[str]":
        """Wait for the end, which must come in time."""
        self.process.join(timeout)
        code = self.process.exitcode
        assert code is not None, f"{self.command} takes more than {timeout} s\n{self.printed('err')}"
        return subprocess.CompletedProcess(self.command, code, self.printed("out"), self.printed("err"))


def run(
    command: Sequence[str | Path],
    cwd: Path | None = None,
    env: Mapping[str, str] = os.environ,
    timeout: float = 300,
) -> "subprocess.CompletedProcess[str]":
    """Run a program to its end."""
    with Program(command, cwd, env) as program:
        return program.wait(timeout)


def _run(command: list[str], cwd: str, env: dict[str, str], folder: str) -> None:
    """Become the program."""
    for descriptor, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    # The first entry is the folder of the program, as Python has it.
    sys.path[:0] = [
        str(Path(command[0]).parent),
        *filter(None, env.get("PYTHONPATH", "").split(os.pathsep)),
    ]
    sys.argv = command
    np.random.seed()  # that of the process before this one would be the same in all
    try:
        runpy.run_path(command[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
