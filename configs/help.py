"""`--help` without torch: one screen, or one group of flags with the chosen preset's values.

Names, types, values and texts come from the dataclasses: the string below a field is its help text. Only the few flags of
the first screen have shorter texts here.
"""

import ast
import inspect
import os
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import cache
from types import NoneType
from typing import Any, Literal, get_args, get_origin

from configs.notation import nearest
from configs.optim import RULES, Optim, RuleConfig, summary
from configs.presets import PRESETS, preset_title
from configs.schema import Run

SECTIONS = ("model", "data", "optim", "schedule", "train", "log", "run")
COMMON_FLAGS = {
    "train.steps": "optimizer steps",
    "train.batch_tokens": "tokens of one step, over all GPUs",
    "train.micro_tokens": "tokens of one forward pass; less, less memory",
    "data.source": "corpus, shards (.bin) or text (your files)",
    "model.layers": "number of blocks",
    "optim.matrix.rule": "update rule of the hidden matrices",
    "optim.matrix.lr": "its learning rate",
    "run.name": "folder under runs/; '': the preset's name",
    "run.seed": "seed of initial weights and data order",
    "run.resume": "continue runs/NAME from its checkpoint",
    "run.dry_run": "print the plan and stop",
    "log.wandb": "auto, online, offline or disabled",
}
MAX_COLUMNS = 100  # longer lines of prose are hard to read


def print_help(preset: str, topic: str) -> None:
    """Print the help on a topic, with the values of a preset.

    `topic` is a section, a rule or `all`; empty or a preset's name: the first screen. Raises ValueError for any other. A
    reader that closes the pipe early, as `| head` does, is no error.
    """
    if topic in PRESETS:
        preset, topic = topic, ""
    run, columns = PRESETS[preset](), min(shutil.get_terminal_size().columns, MAX_COLUMNS)
    text = "\n".join(first_screen(run, columns) if not topic else topic_lines(run, topic, columns))
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Python flushes standard output once more when it exits; into the closed pipe that would print a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def first_screen(run: Run, columns: int) -> list[str]:
    """Return the lines of `--help`: what this is, the presets, the flags that people use most, and where the others are."""
    twins = [name for name in PRESETS if name.endswith("_adamw")]
    titles = {name: without_sources(preset_title(name)) for name in PRESETS if name not in twins}
    titles["..._adamw"] = f"with AdamW: {', '.join(twins)}."
    presets = [shorten(f"  {name:19}{title}", columns) for name, title in titles.items()]
    values = {name: value_text(value) for name, value, _, _ in all_flags(run)}
    flags = [shorten(f"  --{name:20} {values[name]:8} {text}", columns) for name, text in COMMON_FLAGS.items()]
    return ["usage: python train_gpt.py [PRESET] [--section.field VALUE ...]",
            "Trains a GPT with Muon and Adam. No preset means tiny: a minute on a laptop.",
            "Presets:", *presets, "", f"Flags used most, with the values of {run.preset}:", *flags,
            f"More: --help {'|'.join(SECTIONS)}|RULE|all",
            *textwrap.wrap(f"Rules: {', '.join(RULES)}", columns, subsequent_indent="  ")]


def topic_lines(run: Run, topic: str, columns: int) -> list[str]:
    """Return the lines of `--help TOPIC`. Raises ValueError naming the nearest topic."""
    if topic == "all":
        return [line for name in (*SECTIONS, *RULES) for line in (*topic_lines(run, name, columns), "")]
    if topic in RULES:
        return rule_lines(run, topic, columns)
    if topic == "optim":
        return optim_lines(run, columns)
    if topic not in SECTIONS:
        raise ValueError(f"no help on {topic!r}{nearest(topic, [*SECTIONS, *RULES, 'all'])}")
    config = getattr(run, topic)
    return section_lines(f"{topic}: {class_title(type(config))} Values of {run.preset}.", topic, config, columns)


def section_lines(title: str, prefix: str, config: Any, columns: int, names: Sequence[str] | None = None) -> list[str]:
    """Return a title, then each flag of a config dataclass (`names` alone, if given) and below it its help text."""
    lines = textwrap.wrap(title, columns)
    for name, value, kind, text in flags_of(prefix, config):
        if names is None or name.removeprefix(f"{prefix}.").partition(".")[0] in names:
            lines += ["", *textwrap.wrap(flag_title(name, value, kind), columns, subsequent_indent="      ")]
            lines += textwrap.wrap(text, columns, initial_indent="    ", subsequent_indent="    ")
    return lines


def optim_lines(run: Run, columns: int) -> list[str]:
    """Return the rule of each role in the preset, all rules, and the flags that every rule has."""
    intro = ("optim: every parameter has a role, and every role an update rule. --optim.ROLE.rule NAME chooses the rule, "
             "--optim.ROLE.FIELD VALUE sets one of its fields, --help RULE lists them.")
    lines = [*textwrap.wrap(intro, columns), "", f"Roles, with the rules of {run.preset}:"]
    for role in fields(Optim):
        config = getattr(run.optim, role.name)
        lines += textwrap.wrap(f"{role.name:14}{config.rule} lr={config.lr:g} {summary(config)}", columns,
                               initial_indent="  ", subsequent_indent=" " * 18)
    lines += ["", "Rules:"]
    lines += [shorten(f"  {name:14}{without_sources(class_title(config))}", columns) for name, config in RULES.items()]
    common = [f.name for f in fields(RuleConfig)]
    return [*lines, "", *section_lines("Fields of every rule, with the values of matrix:", "optim.ROLE", run.optim.matrix,
                                       columns, common)]


def rule_lines(run: Run, rule: str, columns: int) -> list[str]:
    """Return the fields that not every rule has, after lr; values are those of the preset's matrices if they use the rule,
    else the rule's defaults."""
    config = run.optim.matrix if run.optim.matrix.rule == rule else RULES[rule]()
    own = [f.name for f in fields(config) if f.name not in {f.name for f in fields(RuleConfig)}]
    lines = section_lines(f"{rule}: {class_title(type(config))}", "optim.ROLE", config, columns, ["lr", *own])
    return [*lines, "", f"To choose it: --optim.ROLE.rule {rule}. Fields of every rule: --help optim."]


# ---- Flags from dataclasses -----------------------------------------------------------------------------------------------


def all_flags(run: Run) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield the flags of every section; see `flags_of`."""
    for section in SECTIONS:
        yield from flags_of(section, getattr(run, section))


def flags_of(prefix: str, config: Any) -> Iterator[tuple[str, Any, Any, str]]:
    """Yield (dotted name, value, type, help text) of each field of a config dataclass, nested ones included, but of a
    graft only its rule."""
    if isinstance(config, RuleConfig):
        yield f"{prefix}.rule", config.rule, Literal[tuple(RULES)], "Update rule of the role's parameters; --help optim."
    for f in fields(config):
        value, text = getattr(config, f.name), field_texts(type(config)).get(f.name, "")
        if f.name == "graft":
            yield f"{prefix}.graft.rule", value.rule, str, text
        elif is_dataclass(value):
            yield from flags_of(f"{prefix}.{f.name}", value)
        else:
            yield f"{prefix}.{f.name}", value, f.type, text


@cache
def field_texts(config: type) -> dict[str, str]:
    """Return the string below each field of a dataclass and of the classes it extends, on one line: its help text."""
    texts: dict[str, str] = {}
    for cls in reversed([cls for cls in config.__mro__ if is_dataclass(cls)]):
        body = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0].body
        for statement, below in zip(body, body[1:], strict=False):
            if isinstance(statement, ast.AnnAssign) and isinstance(below, ast.Expr):
                texts[statement.target.id] = " ".join(below.value.value.split())
    return texts


def class_title(config: type) -> str:
    """Return the first paragraph of a dataclass's docstring, on one line."""
    return " ".join(config.__doc__.split("\n\n")[0].split())


def flag_title(name: str, value: Any, kind: Any) -> str:
    """Return a flag as it is typed, and its value: `--train.steps INT = 520`; a switch shows both of its forms."""
    if kind is bool:
        section, _, field = name.rpartition(".")
        return f"--{name} | --{section}.no_{field} = {value_text(value)}"
    return f"--{name} {kind_name(kind)} = {value_text(value)}"


def value_text(value: Any) -> str:
    """Return a value for reading: switches as on or off, an empty tuple as none, floats to six digits."""
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return " ".join(map(str, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value) or "''"


def kind_name(kind: Any) -> str:
    """Return a field's type as help shows it: INT, FLOAT, STR, choices joined by |, or INT ... for several values."""
    choices = [choice for choice in get_args(kind) if choice not in (NoneType, ...)]
    if get_origin(kind) is Literal:
        return " | ".join(map(str, choices))
    if get_origin(kind) is tuple:
        return f"{choices[0].__name__.upper()} ..."
    return kind_name(choices[0]) if choices else kind.__name__.upper()


def without_sources(text: str) -> str:
    """Return the text without what stands in brackets: one line of a list has no room for sources."""
    return re.sub(r" \([^()]*\)", "", text)


def shorten(line: str, columns: int) -> str:
    """Return the line, cut with dots to the width of the screen."""
    return line if len(line) <= columns else line[:columns - 3] + "..."
