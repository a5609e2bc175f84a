"""The command line: arguments in, a command called, errors as one line."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence

from jsonargparse import auto_cli, set_parsing_settings
from rich.console import Console
from rich.markup import escape

from lightning_koopman.cli import commands

_COMMANDS = ["compare", "components", "demo", "effects", "evaluate", "linearize", "merge", "report"]

_FILES = {"report": ["file"], "compare": ["before", "after"]}
"""Arguments that may stand without their option's name, as people type them."""


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line."""
    given = list(sys.argv[1:] if args is None else args)
    # jsonargparse names options after parameters; dashes are what people type.
    given = [re.sub(r"^--[a-z_-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in given]
    for place, name in enumerate(_FILES.get(given[0] if given else "", []), start=1):
        if len(given) > 2 * place - 1 and not given[2 * place - 1].startswith("-"):
            given.insert(2 * place - 1, f"--{name}")
    try:
        if any(argument.startswith("--print_completion") for argument in given):
            try:
                if importlib.util.find_spec("shtab") is None:
                    raise TypeError
                set_parsing_settings(add_print_completion_argument=True)
            except TypeError:  # an older jsonargparse knows no such setting
                raise ValueError(
                    "--print-completion needs shtab and a newer jsonargparse: "
                    "pip install -U 'lightning-koopman[completion]'"
                ) from None
        offered = [getattr(commands, name) for name in _COMMANDS]
        auto_cli(offered, args=given, prog="lightning-koopman", as_positional=False)
    except (ValueError, ImportError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 130 if getattr(error, "interrupted", False) else 1
    except KeyboardInterrupt:
        Console(stderr=True).print("[bold red]error:[/] interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
