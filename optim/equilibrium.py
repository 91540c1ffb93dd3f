"""The angle that weights turn by in a step once decay and steps balance: the rotational equilibrium.

Gradients that push in random directions lengthen the weights, decay shortens them; where both cancel, the weights turn by an
angle that neither the gradients' size nor, without decay of its own, the step's unit decides (Kosson et al. 2023,
arXiv 2305.17212; Wan et al. 2020, arXiv 2006.08419).
"""

import math

from configs.groups import RULE_READS, Group
from optim.groups import ParamGroup
from optim.schedule import Values
from optim.sharded import hyper_at

BY_BETA1 = ("adam", "soap")  # whose directions average gradients with beta1
APART = ("muown", "stiefel")  # which keep the weights' lengths apart from their directions


def equilibrium_angle(group: ParamGroup, values: Values) -> float | None:
    """sqrt(2 d s), in radians: d is the share of the weights that a step's decay takes, s = sum c_k^2 / (sum c_k)^2 of the
    weights c_k that the average gives past gradients. For AdamW sqrt(2 lr wd (1 - beta1) / (1 + beta1)), for Muon likewise.
    None where nothing decays, weights are constrained, or the theory does not say.

    Steps of an average are alike, so that they add up to longer ways than their own lengths say: hence s. It is exact for
    directions linear in the average; polar factors and signs are less alike, and random gradients turn weights by 1.1 (Muon)
    and 1.2 times (signs) as much.
    """
    if group.step.decay in ("none", "cautious") or not _is_a_walk(group.config):
        return None
    config, hyper = group.config, hyper_at(group, values, 1)
    exact = hyper._replace(lr=hyper.lr.double(), weight_decay=hyper.weight_decay.double())
    if config.rule in BY_BETA1:
        share = spread(config.beta1, nesterov=False)
    else:
        mu = 0.0 if config.averaging == "none" else hyper.momentum.item()
        share = spread(mu, nesterov=config.nesterov)
    return math.sqrt(2 * group.step.decay_share(exact) * share)


def _is_a_walk(config: Group) -> bool:
    """Whether a step is one average of gradients, turned into a direction, and nothing else holds the weights."""
    averages = config.rule in BY_BETA1 or ("averaging" in RULE_READS[config.rule] and config.averages == 1)
    held = config.constraint != "none" or config.radial_brake or config.rule in APART
    return averages and not held and not config.graft and not config.lr_factors


def spread(mu: float, *, nesterov: bool) -> float:
    """sum c_k^2 / (sum c_k)^2 of a running average's weights c_k = mu^k; with Nesterov's c_0 = 1 + mu, c_k = mu^(k + 1)."""
    return (1 - mu) / (1 + mu) * (1 + 2 * mu - 2 * mu**3 if nesterov else 1)
