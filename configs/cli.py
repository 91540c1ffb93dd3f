"""The command line: `[PRESET] [--dotted.field VALUE ...]`, parsed into a Run without importing torch."""

import contextlib
import copy
import io
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import NoReturn

import tyro

from configs.help import print_help
from configs.notation import nearest, raise_if
from configs.optim import RULES, Optim, switch_rule
from configs.presets import PRESETS, preset_title
from configs.schema import Run, with_settings
from configs.serialize import config_to_dict, flatten

PROGRAM = "train_gpt.py"


def fail(message: str) -> NoReturn:
    """Print an error message to standard error and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv: Sequence[str]) -> Run:
    """Return the Run that a command line describes. Print help and exit with status 0 where it asks for help; print one
    error message and exit with status 2 where it is wrong."""
    name, flags = ("tiny", list(argv)) if not argv or argv[0].startswith("-") else (argv[0], list(argv[1:]))
    if name not in PRESETS:
        fail(f"unknown preset {name!r}{nearest(name, list(PRESETS))}")
    try:
        if help_flags := [i for i, flag in enumerate(flags) if flag in ("--help", "-h")]:
            print_help(name, topic="".join(flags[help_flags[0] + 1:][:1]))
            raise SystemExit(0)
        run, flags = choose_rules(PRESETS[name](), flags)
        check_flags(run, flags)
        return tyro.cli(Run, default=run, args=flags, prog=f"{PROGRAM} {name}", use_underscores=True,
                        description=preset_title(name))
    except ValueError as error:
        fail(str(error))


def parse_row(preset: str, flags: Sequence[str]) -> Run:
    """Return the Run of a preset and flags, for tables of runs. Raises ValueError where `parse` would exit."""
    message = io.StringIO()
    try:
        with contextlib.redirect_stderr(message):
            return parse([preset, *flags])
    except SystemExit:
        raise ValueError(f"{preset} {' '.join(flags)}: {unboxed(message.getvalue())}") from None


def unboxed(message: str) -> str:
    """Return the text of a message on one line, without the box that tyro draws around it."""
    return " ".join(message.translate({ord(sign): " " for sign in "│─╭╮╰╯"}).split())


def as_flags(settings: Mapping[str, object]) -> str:
    """Return the flags that give settings by dotted name: `--name value`, or `--name` and `--group.no_name` for switches."""
    words: list[str] = []
    for name, value in settings.items():
        group, _, field = name.rpartition(".")
        if isinstance(value, bool):
            words += [f"--{name}" if value else f"--{group}.no_{field}"]
        else:
            words += [f"--{name}", *map(str, value if isinstance(value, tuple) else (value,))]
    return " ".join(words)


def choose_rules(run: Run, flags: Sequence[str]) -> tuple[Run, list[str]]:
    """Apply `--optim.ROLE.rule NAME` and `--optim.ROLE.graft.rule NAME`; return the new run and the flags that remain.

    These flags come first because the rule decides which other flags exist. Raises ValueError for an unknown role or rule.
    """
    words, remaining, optim = list(flags), [], run.optim
    while words:
        flag, equals, value = words.pop(0).partition("=")
        path = flag.removeprefix("--").split(".")
        if not (flag.startswith("--optim.") and path[-1] == "rule" and len(path) in (3, 4)):
            remaining.append(flag + equals + value)
            continue
        roles = [f.name for f in fields(Optim)]
        if path[1] not in roles:
            raise ValueError(f"{flag}: unknown role {path[1]!r}{nearest(path[1], roles)}")
        name = value if equals else words.pop(0) if words else ""
        config = getattr(optim, path[1])
        config = config if len(path) == 3 else config.graft
        optim = with_settings(optim, {".".join(path[1:-1]): switch_rule(config, name)})
    # Set without the checks of Run: two roles may have to be equal, and are so only after all flags are applied.
    run = copy.copy(run)
    object.__setattr__(run, "optim", optim)
    return run, remaining


def check_flags(run: Run, flags: Sequence[str]) -> None:
    """Raise ValueError for a flag that the rule of its role does not have, with the nearest field and the rules that have
    it; and for a preset given as a flag. tyro finds all other unknown flags, but knows nothing of the other rules."""
    known = flatten(config_to_dict(run))
    for flag in (flag.split("=")[0].removeprefix("--").replace("-", "_") for flag in flags if flag.startswith("--")):
        raise_if(flag == "preset", f"the preset is the first word: python {PROGRAM} NAME")
        group, _, name = flag.rpartition(".")
        role = flag.split(".")[1] if flag.count(".") > 1 else ""
        if not flag.startswith("optim.") or not hasattr(run.optim, role) or flag in known:
            continue
        if name.startswith("no_") and isinstance(known.get(f"{group}.{name[3:]}"), bool):
            continue
        own = [key.removeprefix(f"optim.{role}.") for key in known if key.startswith(f"optim.{role}.")]
        given, rule = flag.removeprefix(f"optim.{role}."), getattr(run.optim, role).rule
        is_group = any(key.startswith(f"{given}.") for key in own)  # graft, extra: they need one more word
        names = {given, given.removeprefix("no_")}
        rules = [] if is_group else [other for other, config in RULES.items() if names & set(config.__dataclass_fields__)]
        advice = f"; rules that have it: {', '.join(rules)}" if rules else nearest(given, own)
        raise ValueError(f"--{flag}: rule {rule} has no {given}{advice}")
