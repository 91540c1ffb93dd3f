"""Update rules: pure mathematics on stacked tensors, one file each. A rule knows no process group, no name, no clock.

To add one: a file beside this one with a class that extends `Rule`, and a line in `RULES`.
"""

from optim.rules.adam import Adam
from optim.rules.base import Hyper, Rule
from optim.rules.steepest import Steepest

RULES: dict[str, type[Rule]] = {"steepest": Steepest, "adam": Adam}

__all__ = ["RULES", "Hyper", "Rule"]
