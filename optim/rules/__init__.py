"""Update rules: pure mathematics on stacked tensors, one file each. A rule knows no process group, no name, no clock.

To add one: a file beside this one with a class that extends `Rule`, and a line in `RULES`.
"""

from optim.rules.adam import Adam
from optim.rules.base import Hyper, Rule
from optim.rules.dion import Dion
from optim.rules.dion2 import Dion2
from optim.rules.muon2 import Muon2
from optim.rules.muown import Muown
from optim.rules.normuon import NorMuon
from optim.rules.steepest import Steepest

RULES: dict[str, type[Rule]] = {
    "steepest": Steepest, "adam": Adam, "normuon": NorMuon, "muon2": Muon2, "muown": Muown,
    "dion": Dion, "dion2": Dion2,
}

__all__ = ["RULES", "Hyper", "Rule"]
