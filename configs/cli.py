"""The command line: `[PRESET] [--dotted.field VALUE ...]`, parsed into a Run without importing torch."""

import contextlib
import copy
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import NoReturn

import tyro

from configs.notation import nearest
from configs.optim import RULES, Optim, switch_rule
from configs.presets import PRESETS, preset_title
from configs.schema import Run, with_settings
from configs.serialize import config_to_dict, flatten

PROGRAM = "train_gpt.py"


def fail(message: str) -> NoReturn:
    """Print what is wrong to standard error and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str]) -> Run:
    """The Run that a command line describes; a user's mistake ends the program with one message and status 2."""
    name, flags = ("tiny", list(argv)) if not argv or argv[0].startswith("-") else (argv[0], list(argv[1:]))
    if name not in PRESETS:
        fail(f"unknown preset {name!r}{nearest(name, list(PRESETS))}")
    try:
        run, flags = choose_rules(PRESETS[name](), flags)
        check_flags(run, flags)
        return tyro.cli(Run, default=run, args=flags, prog=f"{PROGRAM} {name}", use_underscores=True,
                        description=f"{preset_title(name)} Presets: {', '.join(PRESETS)}.")
    except ValueError as error:
        fail(str(error))


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


def as_flags(settings: Mapping[str, object]) -> str:
    """The flags that give settings by dotted name: `--name value`, `--name` or `--group.no_name` for switches."""
    words: list[str] = []
    for name, value in settings.items():
        group, _, field = name.rpartition(".")
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--{group}.no_{field}"]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def choose_rules(run: Run, flags: Sequence[str]) -> tuple[Run, list[str]]:
    """The run with the optimizers that `--optim.ROLE.rule NAME` (and `.graft.rule NAME`) name, and the other flags.

    First of all flags, because the rule decides which others there are. Raises ValueError for an unknown role or rule.
    """
    words, rest, optim = list(flags), [], run.optim
    while words:
        flag, equals, value = words.pop(0).partition("=")
        path = flag.removeprefix("--").split(".")
        if not (flag.startswith("--optim.") and path[-1] == "rule" and len(path) in (3, 4)):
            rest.append(flag + equals + value)
            continue
        roles = [f.name for f in fields(Optim)]
        if path[1] not in roles:
            raise ValueError(f"{flag}: unknown role {path[1]!r}{nearest(path[1], roles)}")
        name = value if equals else words.pop(0) if words else ""
        old = getattr(optim, path[1])
        old = old if len(path) == 3 else old.graft
        optim = with_settings(optim, {".".join(path[1:-1]): switch_rule(old, name)})
    run = copy.copy(run)
    object.__setattr__(run, "optim", optim)  # unchecked: only with the other flags the run must be possible
    return run, rest


def check_flags(run: Run, flags: Sequence[str]) -> None:
    """Raise ValueError for a flag of an optimizer that the role's rule does not have, naming the nearest one and the rules
    that have it; and for a preset given as a flag."""
    known = flatten(config_to_dict(run))
    for flag in (flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")):
        if flag == "preset":
            raise ValueError(f"the preset is the first word: python {PROGRAM} NAME")
        group, _, name = flag.rpartition(".")
        role = flag.split(".")[1] if flag.count(".") > 1 else ""
        if not flag.startswith("optim.") or not hasattr(run.optim, role) or flag in known:
            continue
        if name.startswith("no_") and isinstance(known.get(f"{group}.{name[3:]}"), bool):
            continue
        own = [key.removeprefix(f"optim.{role}.") for key in known if key.startswith(f"optim.{role}.")]
        given, rule = flag.removeprefix(f"optim.{role}."), getattr(run.optim, role).rule
        part = any(key.startswith(f"{given}.") for key in own)  # of a flag's name: graft, extra
        names = {given, given.removeprefix("no_")}
        having = [] if part else [other for other, config in RULES.items() if names & set(config.__dataclass_fields__)]
        elsewhere = f"; rules that have it: {', '.join(having)}" if having else nearest(given, own)
        raise ValueError(f"--{flag}: rule {rule} has no {given}{elsewhere}")
