"""Command-line tools beside the training run, each started as `python -m scripts.NAME`."""

import shutil
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.table import Table

from configs.cli import fail

PIPE_COLUMNS = 140  # where there is no terminal: wide enough that few lines are wrapped


def command(main: Callable[..., int | None], arguments: Any, description: str, *, flags: bool = False) -> None:
    """Parse the command line into `arguments`, a dataclass or a union of dataclasses; call main with it; exit.

    A ValueError, which is a mistake of the user, and a missing package end in one line on standard error and exit
    status 2. `description` is the script's docstring, the text of --help. With `flags`, main takes a second argument:
    the list of the words after `--`, which are flags of a training run.
    """
    own_words, run_flags = split_flags(sys.argv[1:]) if flags else (sys.argv[1:], [])
    try:
        args = tyro.cli(arguments, prog=f"python -m scripts.{Path(sys.argv[0]).stem}", description=wrap_help(description),
                        args=own_words, use_underscores=True)
        raise SystemExit(main(args, run_flags) if flags else main(args))
    except ValueError as error:
        fail(str(error))
    except ImportError as error:
        fail(f"{error}: pip install -r requirements.txt")


def split_flags(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split the words of a command line at the first `--`: the script's own arguments, the flags of a training run."""
    cut = words.index("--") if "--" in words else len(words)
    return list(words[:cut]), list(words[cut + 1:])


def wrap_help(docstring: str) -> str:
    """Wrap a docstring at 80 columns; indented paragraphs, which are examples, stay as they are."""
    paragraphs = [part if part.startswith(" ") else wrap(part, 80) for part in docstring.strip().split("\n\n")]
    return "\n\n".join(paragraphs).replace("\n\n ", "\n ")  # tyro doubles an empty line before an indented one


def wrap(text: str, columns: int) -> str:
    """Wrap one paragraph between words. Further lines are indented: tyro would join them again otherwise."""
    return textwrap.fill(text, columns, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def terminal_columns() -> int:
    """Return the width of the terminal, or COLUMNS if it is set; PIPE_COLUMNS into a file or a pipe."""
    return shutil.get_terminal_size(fallback=(PIPE_COLUMNS, 24)).columns


def format_value(value: float | None, form: str) -> str:
    """Return the value by a format specification, or "" for None."""
    return "" if value is None else f"{value:{form}}"


def print_table(table: Table) -> None:
    """Print a table as wide as `terminal_columns`."""
    Console(width=terminal_columns(), markup=False).print(table)


def print_wrapped(lines: Sequence[str]) -> None:
    """Print lines, each wrapped at `terminal_columns`."""
    for line in lines:
        print(wrap(line, terminal_columns()))
