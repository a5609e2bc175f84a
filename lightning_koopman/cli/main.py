"""The command line: arguments in, a command called, errors as one line."""

from __future__ import annotations

import argparse
import ast
import difflib
import importlib
import re
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, auto_cli
from rich.console import Console
from rich.markup import escape

_COMMANDS = {
    **dict.fromkeys(
        ("compare", "components", "demo", "drift", "evaluate", "merge", "report"), "commands"
    ),
    **dict.fromkeys(("bits", "drop", "effects", "linearize"), "decide"),
}
"""In which file each command is; all of them import torch, which takes seconds."""

_FILES = {"drift": ["reference"], "report": ["file"], "compare": ["before", "after"]}
"""Arguments that may stand without their option's name, as people type them."""


class _Parser(ArgumentParser):
    """A parser whose errors are one line, in the words that people type."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, without a page of usage, and exit with 2."""
        command = next((name for name in _COMMANDS if f" {name}" in self.prog), "")
        if missing := re.fullmatch(r"the following arguments are required: (.*)", message):
            names = [name.split(".") for name in missing[1].split(", ")]
            command = names[0][0] if len(names[0]) > 1 else command
            message = f"{command} needs {', '.join(_option(name[-1]) for name in names)}"
        elif choice := re.search(r"Literal\[(.*?)\]\. Got value: (\S+)", message):
            key = re.match(r'Parser key "([\w.]+)"', message)
            option = f"{_option(key[1])}: " if key else ""
            message = f"{option}{choice[2]!r} is none of {choice[1]}"
        elif single := re.search(
            r'"([\w.]+)".*Expected a <class \'(?:list|collections.*?)\'>.*(?:Given|Got) value: (\S+)',
            message,
            re.DOTALL,
        ):
            message = f"{_option(single[1])}: {single[2]} is no list; write [{single[2]}]"
        elif stray := re.fullmatch(r"[Uu]nrecognized arguments: --([\w.]+).*", message):
            # Of options in groups people know the last part.
            known = {name.rpartition(".")[2]: name for name in (_defaults(command) if command else ())}
            word = stray[1].rpartition(".")[2]
            short = [name for name in known if _is_short_for(name, word)]
            close = short or difflib.get_close_matches(word, known, n=1)
            meant = f"; did you mean {_option(known[close[0]])}?" if close else ""
            message = f"{command or 'lightning-koopman'} has no option {_option(stray[1])}{meant}"
        elif (more := re.fullmatch(r"[Uu]nrecognized arguments: (.*)", message)) and command == "report":
            message = (
                f"report takes one file, and {more[1]} came after it; lightning-koopman merge puts "
                "several into one"
            )
        elif value := re.match(r'Parser key "([\w.]+)":\s*(.*)', message, re.DOTALL):
            option = _option(value[1])
            message = f"{option}: {value[2]}"
            if inner := re.search(r"NestedArg\(key='([\w.]+)'", value[2]):
                message = f"{command} has no option {_option(f'{value[1]}.{inner[1]}')}"
                if value[1] in {"model", "data"}:
                    message += f"; name a function that builds it so: {option} pkg.mod:function"
        elif 'expected "subcommand"' in message:
            message = f"name a command: {', '.join(_COMMANDS)}"
        elif wrong := re.match(r"argument subcommand: invalid choice: '(.*?)'", message):
            close = difflib.get_close_matches(wrong[1], _COMMANDS, n=1)
            meant = f"did you mean {close[0]!r}?" if close else f"choose one of {', '.join(_COMMANDS)}"
            message = f"there is no command {wrong[1]!r}; {meant}"
        console, asked = Console(stderr=True), f"{command} --help".strip()
        console.print(f"[bold red]error:[/] {escape(message)}", soft_wrap=True)
        console.print(f"See lightning-koopman {asked}", soft_wrap=True, highlight=False)
        self.exit(2)


def _is_short_for(name: str, word: str) -> bool:
    """Check whether an option abbreviates a word, as ``ckpt`` does ``checkpoint``."""
    letters = iter(word)
    return word[0] == name[0] and all(letter in letters for letter in name)


def _command(name: str) -> Callable[..., Any]:
    """Import a command."""
    home = importlib.import_module(f"lightning_koopman.cli.{_COMMANDS[name]}")
    found: Callable[..., Any] = getattr(home, name)
    return found


def _defaults(command: str) -> dict[str, Any]:
    """Return the options of a command, and what each is where it is left out."""
    parser = ArgumentParser()
    parser.add_function_arguments(_command(command))
    return dict(parser.get_defaults().items())


def _overview() -> str:
    """Tell what each command does, from the source of all of them: nobody waits for torch to read it."""
    parser = argparse.ArgumentParser("lightning-koopman")
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    parser.add_argument("--config", help="path to a configuration file")
    told = "Commands; lightning-koopman COMMAND --help tells more"
    commands = parser.add_subparsers(title=told, metavar="COMMAND", required=True)
    sources = {
        home: ast.parse(Path(__file__).with_name(f"{home}.py").read_text(encoding="utf-8")).body
        for home in set(_COMMANDS.values())
    }
    for name, home in _COMMANDS.items():
        functions = (node for node in sources[home] if isinstance(node, ast.FunctionDef))
        story = next(ast.get_docstring(node) or "" for node in functions if node.name == name)
        commands.add_parser(name, help=" ".join(story.split("\n\n")[0].split()))
    return parser.format_help()


def _option(name: str) -> str:
    """Return an option as people type it."""
    return "--" + name.replace("_", "-")


def _as_parsed(given: Sequence[str]) -> list[str]:
    """Return arguments as jsonargparse takes them: underscores, and a value behind every switch."""
    args = [re.sub(r"^--[a-z_.-]+", lambda m: "--" + m[0][2:].replace("-", "_"), a) for a in given]
    command = args[0] if args else ""
    if command == "merge":
        names_value = [word.startswith("-") and "=" not in word for word in args]
        for place, word in enumerate(args[1:], start=1):
            if not (word.startswith("-") or names_value[place - 1]):
                args[place] = f"--reports+={word}"
    for place, name in enumerate(_FILES.get(command, []), start=1):
        if len(args) > 2 * place - 1 and not args[2 * place - 1].startswith("-"):
            args.insert(2 * place - 1, f"--{name}")
    if command in _COMMANDS:
        switches = {f"--{name}" for name, value in _defaults(command).items() if isinstance(value, bool)}
        for i in range(len(args) - 1, 0, -1):
            if args[i] in switches and (i + 1 == len(args) or args[i + 1].startswith("-")):
                args.insert(i + 1, "true")
    return args


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line."""
    asked = list(sys.argv[1:] if args is None else args)
    if asked in (["--help"], ["-h"]):
        print(_overview(), end="")
        return 0
    if asked == ["--version"]:
        print(f"lightning-koopman {version('lightning-koopman')}")
        return 0
    try:
        auto_cli(
            [_command(name) for name in _COMMANDS],
            args=_as_parsed(asked),
            prog="lightning-koopman",
            as_positional=False,
            parser_class=_Parser,
        )
    except (ValueError, ImportError, OSError) as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", soft_wrap=True)
        return 130 if getattr(error, "interrupted", False) else 1
    except KeyboardInterrupt:
        Console(stderr=True).print("[bold red]error:[/] interrupted")
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
