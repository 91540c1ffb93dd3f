"""The command line: `[PRESET] [--dotted.field VALUE ...]`, parsed into a Run without importing torch."""

import contextlib
import difflib
import io
import sys
from collections.abc import Sequence
from dataclasses import fields
from typing import NoReturn

import tyro

from configs.groups import Optim, acting_fields
from configs.presets import PRESETS
from configs.schema import Run

PROGRAM = "train_gpt.py"


def fail(message: str) -> NoReturn:
    """Say what is wrong on standard error and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def nearest(word: str, choices: Sequence[str]) -> str:
    """`; did you mean X?` with the choice closest to `word`, or the list of choices."""
    close = difflib.get_close_matches(word, choices, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; choices: {', '.join(choices)}"


def parse(argv: Sequence[str]) -> Run:
    """The Run that a command line describes; a user's mistake ends the program with one message and status 2."""
    name, flags = ("tiny", list(argv)) if not argv or argv[0].startswith("-") else (argv[0], list(argv[1:]))
    if name not in PRESETS:
        fail(f"unknown preset {name!r}{nearest(name, list(PRESETS))}")
    try:
        run = tyro.cli(Run, default=PRESETS[name](), args=flags, prog=f"{PROGRAM} {name}", use_underscores=True,
                       description=f"{PRESETS[name].__doc__} Presets: {', '.join(PRESETS)}.")
        _refuse_idle_flags(run, flags)
    except ValueError as error:
        fail(str(error))
    return run


def parse_row(preset: str, flags: Sequence[str]) -> Run:
    """Like `parse`, but a mistake raises ValueError: for tables of runs."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return parse([preset, *flags])
    except SystemExit:
        raise ValueError(f"{preset} {' '.join(flags)}: {unboxed(message.getvalue())}") from None


def unboxed(message: str) -> str:
    """The words of a message that tyro has drawn a box around, on one line."""
    return " ".join(message.translate({ord(sign): " " for sign in "│─╭╮╰╯"}).split())


def _refuse_idle_flags(run: Run, flags: Sequence[str]) -> None:
    """A flag that was given but cannot act is an error: optim flags that do not act in their group."""
    given = {flag.split("=")[0].lstrip("-").replace("-", "_") for flag in flags if flag.startswith("--")}
    if "preset" in given:
        raise ValueError(f"the preset is the first word: python {PROGRAM} NAME")
    for group in (f.name for f in fields(Optim)):
        config = getattr(run.optim, group)
        acting = acting_fields(config)
        idle = sorted(flag for flag in given if flag.startswith(f"optim.{group}.")
                      and flag.rsplit(".")[-1].removeprefix("no_") not in acting)
        if idle:
            raise ValueError(f"--{idle[0]} has no effect: rule {config.rule} reads {', '.join(sorted(acting))}")
