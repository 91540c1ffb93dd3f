"""Entries of the optimizer benchmark: each is an optimizer and the one search space in which it is tuned.

All entries get the same number of quasi-random trials in their space (after AlgoPerf, Dahl et al. 2023, arXiv 2306.07179): a
narrow space must contain good values, a wide one wastes trials. Ranges are NAME=LOW:HIGH:SCALE; scale `one_minus` is
logarithmic in 1 - x.
"""

from typing import NamedTuple

from configs.ablations import SCION
from configs.notation import nearest


class Entry(NamedTuple):
    """An optimizer on the leaderboard."""

    name: str
    """Name on the leaderboard."""
    flags: str
    """Flags that change the preset of the benchmark."""
    space: tuple[str, ...]
    """Ranges of the hyperparameters that are tuned."""


ADAM_SPACE = ("optim.matrix.lr=0.001:0.01:log", "optim.matrix.beta1=0.7:0.95:one_minus",
              "optim.matrix.beta2=0.9:0.999:one_minus")
MUON_SPACE = ("optim.matrix.lr=0.015:0.15:log", "optim.matrix.momentum=0.7:0.97:one_minus")

ENTRIES = (
    Entry("adamw", "--optim.matrix.rule adam", ADAM_SPACE),
    Entry("adamw_warmup", "--optim.matrix.rule adam --schedule.lr '0=0 10%=1 40%=1 100%=0.1'", ADAM_SPACE),
    Entry("muon", "", MUON_SPACE),
    Entry("muon_quintic", "--optim.matrix.ns quintic", MUON_SPACE),
    Entry("muon_svd", "--optim.matrix.ns svd", MUON_SPACE),
    Entry("muon_equilibrated", "--optim.matrix.equilibrate", MUON_SPACE),
    Entry("muon_averages", "--optim.matrix.averages 3", MUON_SPACE),
    Entry("normuon", "--optim.matrix.rule normuon --optim.matrix.normalise longer", MUON_SPACE),
    Entry("muon2", "--optim.matrix.rule muon2", MUON_SPACE),
    Entry("soap_muon", "--optim.matrix.rule soap_muon --optim.matrix.beta2 0.85",
          ("optim.matrix.lr=0.03:0.09:log", "optim.matrix.momentum=0.8:0.95:one_minus",
           "optim.matrix.gram_beta=0.7:0.95:one_minus")),
    Entry("soap", "--optim.matrix.rule soap --optim.matrix.eps 1e-8",
          ("optim.matrix.lr=0.002:0.02:log", "optim.matrix.beta1=0.8:0.95:one_minus",
           "optim.matrix.beta2=0.85:0.98:one_minus")),
    Entry("shampoo_adam", "--optim.matrix.rule shampoo --optim.matrix.graft.rule adam --optim.matrix.eps 1e-8 "
          "--optim.matrix.graft.eps 1e-8",
          ("optim.matrix.lr=0.001:0.01:log", "optim.matrix.momentum=0.7:0.95:one_minus",
           "optim.matrix.gram_beta=0.8:0.98:one_minus")),
    Entry("muonh", "--optim.matrix.constraint hyperball --model.no_zero_init_projections", MUON_SPACE),
    Entry("adamh", "--optim.matrix.rule adam --optim.matrix.constraint hyperball --model.no_zero_init_projections",
          ADAM_SPACE),
    Entry("stiefel", "--optim.matrix.rule stiefel --optim.matrix.dual_steps 6 --model.no_zero_init_projections",
          MUON_SPACE),
    Entry("psgd", "--optim.matrix.rule psgd",
          ("optim.matrix.lr=0.001:0.01:log", "optim.matrix.beta1=0.8:0.97:one_minus",
           "optim.matrix.factor_lr=0.03:0.5:log")),
    Entry("signum", "--optim.matrix.rule steepest --optim.matrix.norm sign",
          ("optim.matrix.lr=0.0003:0.01:log", "optim.matrix.momentum=0.7:0.97:one_minus")),
    Entry("normalised_sgd", "--optim.matrix.rule steepest --optim.matrix.norm frobenius --optim.matrix.unit rms",
          ("optim.matrix.lr=0.0003:0.03:log", "optim.matrix.momentum=0.7:0.97:one_minus")),
    Entry("scion", f"{SCION} --optim.embed.lr 0.03 --optim.head.lr 0.004", MUON_SPACE),
    Entry("dion", "--optim.matrix.rule dion --optim.matrix.rank_frac 0.5", MUON_SPACE),
    Entry("dion2", "--optim.matrix.rule dion2 --optim.matrix.rank_frac 0.5", MUON_SPACE),
    Entry("sm3", "--optim.matrix.rule sm3",
          ("optim.matrix.lr=0.003:0.1:log", "optim.matrix.momentum=0.7:0.97:one_minus")),
    Entry("swan", "--optim.matrix.rule swan", ("optim.matrix.lr=0.001:0.03:log",)),
    Entry("prodigy", "--optim.matrix.rule prodigy --optim.matrix.distance_start 0.0001",
          ("optim.matrix.lr=0.3:3:log", "optim.matrix.beta1=0.7:0.95:one_minus", "optim.matrix.beta2=0.9:0.999:one_minus")),
    Entry("agd", "--optim.matrix.rule agd", ("optim.matrix.lr=0.3:3:log",)),
)
REFERENCE = "muon"  # the entry that all others are compared with


def find_entry(name: str) -> Entry:
    """Return the entry of that name. Raises ValueError, with the nearest name, if there is none."""
    entries = {entry.name: entry for entry in ENTRIES}
    if name not in entries:
        raise ValueError(f"unknown entry {name!r}{nearest(name, list(entries))}")
    return entries[name]
