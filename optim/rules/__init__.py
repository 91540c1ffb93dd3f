"""Update rules: pure mathematics on stacked tensors, one file each. A rule knows no process group, no name, no clock.

To add one: a file beside this one with a class that extends `Rule`, and a line in `RULES`.
"""

from configs.groups import Group
from optim.rules.adam import Adam
from optim.rules.agd import AGD
from optim.rules.base import Hyper, Rule
from optim.rules.dion import Dion
from optim.rules.dion2 import Dion2
from optim.rules.grafted import Grafted, plain
from optim.rules.muon2 import Muon2
from optim.rules.muown import Muown
from optim.rules.normuon import NorMuon
from optim.rules.prodigy import Prodigy
from optim.rules.psgd import PSGD
from optim.rules.shampoo import Shampoo
from optim.rules.sm3 import SM3
from optim.rules.soap import Soap, SoapMuon
from optim.rules.steepest import Steepest
from optim.rules.stiefel import Stiefel
from optim.rules.swan import SWAN

RULES: dict[str, type[Rule]] = {
    "steepest": Steepest, "adam": Adam, "normuon": NorMuon, "muon2": Muon2, "muown": Muown,
    "dion": Dion, "dion2": Dion2,
    "sm3": SM3, "prodigy": Prodigy, "agd": AGD, "swan": SWAN,
    "shampoo": Shampoo, "soap": Soap, "soap_muon": SoapMuon, "psgd": PSGD, "stiefel": Stiefel,
}


def build_rule(group: Group) -> Rule:
    """The rule that a group's configuration describes, grafted if it says so."""
    rule = RULES[group.rule].build(group)
    return Grafted(rule, RULES[group.graft].build(plain(group, group.graft))) if group.graft else rule



__all__ = ["RULES", "Hyper", "Rule", "build_rule"]
