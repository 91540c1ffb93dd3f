"""The README's tables are the generated ones, its commands parse, and the files that it lists exist."""

import re
import shlex
from pathlib import Path

import pytest

from benchmarks.table import flags_table, table
from configs.cli import parse_row

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^(?:torchrun --standalone --nproc_per_node=8|python) train_gpt.py (?!--help)(.*?)(?:\s{2,}#.*)?$",
                      README, re.MULTILINE)


def test_tables_are_the_generated_ones():
    assert table() in README and flags_table() in README


def test_the_readme_is_short_and_begins_with_the_two_commands():
    lines = README.splitlines()
    assert len(lines) <= 150 and lines.index("python train_gpt.py") < 15


def test_the_readme_has_commands():
    assert len(COMMANDS) >= 5


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_parses(command):
    words = shlex.split(command)
    assert parse_row(words[0], words[1:])


def test_every_listed_file_exists():
    block = README.split("## Files")[1].split("```")[1]
    for line in block.strip().splitlines():
        assert (ROOT / line.split()[0]).exists(), line
