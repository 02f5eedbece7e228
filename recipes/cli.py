"""What the command lines of the recipes share: defaults from a YAML file, and one clear line for wrong input."""

from __future__ import annotations

import difflib
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import HfArgumentParser, TrainingArguments


class InputError(Exception):
    """What the user gave cannot be used; the message says what it is and what to give instead."""


class Parser(HfArgumentParser):
    """`HfArgumentParser` that raises `InputError` where argparse prints its usage, 200 options long, and exits."""

    def error(self, message: str) -> NoReturn:
        choice = re.match(r"argument (\S+): invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if choice:
            option, value, choices = choice.groups()
            message = f"{option} {value}: no such choice{nearest(value, choices.replace(chr(39), '').split(', '))}"
        raise InputError(message)


def nearest(word: str, choices: Iterable[str]) -> str:
    """Return "; did you mean X?", or "; choose from …" where nothing is near, or "; see --help" where that is long."""
    choices = list(choices)
    close = difflib.get_close_matches(word, choices, n=1)
    if close:
        return f"; did you mean {close[0]}?"
    return f"; choose from {', '.join(choices)}" if len(choices) <= 12 else "; see --help"


def require_positive(option: str, value: float) -> None:
    """Refuse what is not above 0."""
    if not value > 0:
        raise InputError(f"{option} {value}: give a number above 0")


def require_seed(option: str, seed: int | None) -> None:
    """Refuse a seed that NumPy takes for none."""
    if seed is not None and not 0 <= seed < 2**32:
        raise InputError(f"{option} {seed}: give a whole number from 0 to {2**32 - 1}")


def parse(types: Sequence[type], defaults: Sequence[Path], argv: Sequence[str]) -> tuple[Any, ...]:
    """Parse ``[CONFIG.yaml] [--option value …]``; what stands later wins.

    Args:
        types: the dataclasses to fill.
        defaults: the recipe's own YAML files, the lowest layers.
        argv: the command line without the program's name.

    Returns:
        One instance of each dataclass.

    Raises:
        InputError: an unknown option, a wrong value, or a file that cannot be read.
    """
    parser = Parser(types, allow_abbrev=False)
    for path in defaults:
        parser.set_defaults(**read_yaml(path))
    if TrainingArguments in types and not torch.accelerator.is_available():
        # or several processes without a GPU would each train for themselves, under torchrun and accelerate launch
        parser.set_defaults(use_cpu=True)
    if argv and argv[0].endswith((".yaml", ".yml")):
        argv = [*as_options(read_yaml(Path(argv[0]))), *argv[1:]]
    _, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [option for action in parser._actions for option in action.option_strings]
        raise InputError(f"unknown option {unknown[0]}{nearest(unknown[0].split('=')[0], known)}")
    try:
        return parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
    except ValueError as error:  # the dataclasses' own checks
        raise InputError(str(error)) from error


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file of options."""
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    try:
        options = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as error:
        raise InputError(f"{path} is not valid YAML: {error}") from error
    if not isinstance(options, dict):
        raise InputError(f"{path} must hold lines of the form 'option: value'")
    return options


def as_options(options: Mapping[str, Any]) -> list[str]:
    """Write a mapping as command-line options, so that both are checked by the same parser."""
    argv = []
    for name, value in options.items():
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        if value is not None:
            argv += [f"--{name}", *map(str, values)]
    return argv


def show(table: Table) -> None:
    """Print ``table`` whole: side by side where the terminal is wide enough, else one row below the other, a line a column.

    What is not a terminal, as a file or a pipe, is as wide as the table.
    """
    console = Console()
    width = Console(width=10_000).measure(table).maximum
    if width <= console.width or not console.is_terminal:
        (console if console.is_terminal else Console(width=width)).print(table)
        return
    if table.title:
        console.print(table.title)
    names = [str(column.header) for column in table.columns]
    for row in zip(*(column.cells for column in table.columns), strict=True):
        below = Table(box=box.SIMPLE, show_header=False)
        below.add_column(no_wrap=True)
        below.add_column(overflow="fold")
        for name, value in zip(names, row, strict=True):
            below.add_row(name, value)
        console.print(below)


def run(main: Callable[[Sequence[str]], None], argv: Sequence[str] | None = None) -> None:
    """Call ``main`` with the command line; an `InputError` becomes one line on stderr and exit status 2."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
