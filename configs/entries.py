"""The optimization benchmark's entries: one row = one optimizer and the one search space that its author declares.

Everyone gets the same number of quasi-random trials in its space (after AlgoPerf, Dahl et al. 2023, arXiv 2306.07179),
so a narrow space is a claim and a wide one costs. Ranges: NAME=LOW:HIGH:SCALE; scale `one_minus` is logarithmic in 1 - x.
"""

from typing import NamedTuple

from configs.cli import nearest


class Entry(NamedTuple):
    """An optimizer on the leaderboard: its name, what it changes in the task's preset, and what is tuned."""

    name: str
    flags: str
    space: tuple[str, ...]


ADAM_SPACE = ("optim.matrix.lr=0.001:0.01:log", "optim.matrix.beta1=0.7:0.95:one_minus",
              "optim.matrix.beta2=0.9:0.999:one_minus")
MUON_SPACE = ("optim.matrix.lr=0.015:0.15:log", "optim.matrix.momentum=0.7:0.97:one_minus")

ENTRIES = (
    Entry("adamw", "--optim.matrix.rule adam", ADAM_SPACE),
    Entry("adamw_warmup", "--optim.matrix.rule adam --schedule.lr '0=0 10%=1 40%=1 100%=0.1'", ADAM_SPACE),
    Entry("muon", "", MUON_SPACE),
    Entry("muon_quintic", "--optim.matrix.ns quintic", MUON_SPACE),
    Entry("muon_svd", "--optim.matrix.ns svd", MUON_SPACE),
)
REFERENCE = "muon"  # what every entry is compared with


def entry_named(name: str) -> Entry:
    """The entry of that name. Raises ValueError naming the nearest one."""
    entries = {entry.name: entry for entry in ENTRIES}
    if name not in entries:
        raise ValueError(f"unknown entry {name!r}{nearest(name, list(entries))}")
    return entries[name]
