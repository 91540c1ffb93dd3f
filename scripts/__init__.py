"""Programs beside the training run, each started as `python -m scripts.NAME`."""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from configs.cli import fail


def command(main: Callable[..., int | None], arguments: Any, description: str, *, flags: bool = False) -> None:
    """Run a script's main on its command line. A user's mistake, a ValueError, is one line and exit status 2, as is a
    package that is missing.

    flags: main takes, as a second argument, what stands after `--`: flags of a training run.
    """
    own, more = split_flags(sys.argv[1:]) if flags else (sys.argv[1:], [])
    try:
        args = tyro.cli(arguments, description=description, args=own, use_underscores=True)
        raise SystemExit(main(args, more) if flags else main(args))
    except ValueError as error:
        fail(str(error))
    except ImportError as error:
        fail(f"{error}: pip install -r requirements.txt")


def print_table(table: Table) -> None:
    """Print a table, as wide as the terminal; 140 columns into a file or a pipe."""
    Console(width=None if sys.stdout.isatty() else 140, markup=False).print(table)


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """A script's own arguments, and the flags after `--`."""
    cut = words.index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1:])
