"""Metrics of a step, from the weights before and after it; and the angle that theory expects."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from configs.optim import Averaged, RuleConfig
from optim.bank import Bank, as_matrices
from optim.comm import Comm
from optim.groups import ParamGroup
from optim.norms import Norm
from optim.rule import Hyper
from optim.schedule import Values

Metrics = dict[str, dict[str, float]]  # role or tensor > name > value


class StepMetrics:
    """Remembers the weights before a step, to compare them with those after it."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._before: list[tuple[Bank, Tensor]] = []

    def remember(self, banks: Sequence[Bank]) -> None:
        """Copy the owned weights, before the step."""
        self._before = [(bank, bank.weights[bank.own].clone()) for bank in banks]

    @torch.no_grad()
    def by_role(self, values: Values) -> Metrics:
        """By role lr, update_rms, weight_rms, weight_size (the largest) and the step's angle; nothing if no weights
        are remembered. A collective: every rank must call it."""
        moments: dict[str, list[Moments]] = {}
        for bank, before in self._before:
            of_bank = moments_of(bank.group.rule.norm, as_matrices(before), bank.matrices)
            once = bank.sharded or self._comm.rank == 0
            moments.setdefault(bank.group.role, []).append(of_bank if once else of_bank._replace(moved=0, old=0, new=0))
        groups = {bank.group.role: bank.group for bank, _ in self._before}
        self._before = []
        return {role: {"lr": groups[role].config.lr * values.lr} | summarise(parts, groups[role], self._comm)
                for role, parts in moments.items()}

    @torch.no_grad()
    def by_tensor(self, role: str) -> Metrics:
        """How each tensor of a role turned in the step: angle, in radians, and update_ratio, the step's length over that of
        the weights before it; tensors that were zero left out. A collective."""
        banks = [(bank, moments_by_tensor(bank, before)) for bank, before in self._before if bank.group.role == role]
        mine = [moments if bank.sharded or self._comm.rank == 0 else 0 * moments for bank, moments in banks]
        total = self._comm.sum(*(x for moments in mine for x in moments.flatten().tolist()))
        names = [name for bank, _ in banks for name in bank.names]
        return {name: turn(*total[3 * i:3 * i + 3]) for i, name in enumerate(names) if total[3 * i + 1]}


class Moments(NamedTuple):
    """Of a stack: squared length of the step, of the old and the new weights; and the largest size in the rule's norm."""

    moved: float
    old: float
    new: float
    size: float


def moments_of(norm: Norm, before_Kmn: Tensor, after_Kmn: Tensor) -> Moments:
    """The moments of a step, summed in float64."""
    if after_Kmn.device.type == "mps":  # which has neither float64 nor eigenvalues
        before_Kmn, after_Kmn = before_Kmn.cpu(), after_Kmn.cpu()
    old, new = before_Kmn.double(), after_Kmn.double()
    sums = torch.stack([(new - old).square().sum(), old.square().sum(), new.square().sum()])
    size = norm.size(after_Kmn.float()).max().item() if after_Kmn.numel() else 0.0
    return Moments(*sums.tolist(), size)


def summarise(moments: list[Moments], group: ParamGroup, comm: Comm) -> dict[str, float]:
    """Over a group's stacks and all ranks: update_rms, weight_rms, weight_size (the largest), and angle, in radians, between
    the weights before and after. A collective."""
    elements = sum(param.numel() for param in group.params.values())
    moved, old, new = comm.sum(*(sum(m[i] for m in moments) for i in range(3)))
    return {"update_rms": (moved / elements) ** 0.5, "weight_rms": (new / elements) ** 0.5,
            "weight_size": comm.max(max(m.size for m in moments))[0],
            "angle": angle_between(moved, old, new)}


def angle_between(moved: float, old: float, new: float) -> float:
    """The angle between two vectors, in radians, from the squared lengths of their difference and of each; a right angle
    where one of them is zero.

    By the half angle: |a - b|^2 = (|a| - |b|)^2 + 4 |a| |b| sin^2(angle / 2). The inner product has lost angles below 1e-8.
    """
    a, b = old**0.5, new**0.5
    if not a * b:
        return math.pi / 2
    return 2 * math.asin(min(1.0, (max(0.0, moved - (a - b) ** 2) / (4 * a * b)) ** 0.5))


def moments_by_tensor(bank: Bank, before: Tensor) -> Tensor:
    """Squared lengths of the step, of the old and the new weights of each of a bank's K tensors, as far as this rank owns
    them: (K, 3), float64, on the CPU. `before` is the owned slice of old."""
    old, new = (w.cpu().double().reshape(len(w), math.prod(w.shape[1:])) for w in (before, bank.weights[bank.own]))
    whole = torch.zeros(len(bank.weights), 3, dtype=torch.float64)
    whole[bank.own] = torch.stack([x.square().sum(1) for x in (new - old, old, new)], dim=1)
    return bank.stacked(whole).reshape(len(bank.names), -1, 3).sum(1)


def turn(moved: float, old: float, new: float) -> dict[str, float]:
    """How a tensor turned: angle, in radians, and update_ratio, its step's length over that of the weights before it."""
    return {"angle": angle_between(moved, old, new), "update_ratio": (moved / old) ** 0.5}


# ---- Rotational equilibrium -----------------------------------------------------------------------------------------------
# Gradients that push in random directions lengthen the weights, decay shortens them; where both cancel, the weights turn by
# an angle that neither the gradients' size nor, without decay of its own, the step's unit decides (Kosson et al. 2023,
# arXiv 2305.17212; Wan et al. 2020, arXiv 2006.08419).

BY_BETA1 = ("adam", "soap")  # whose directions average gradients with beta1
APART = ("muown", "stiefel")  # whose lengths are set apart from their directions


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
    config, hyper = group.config, Hyper.at(group.config, values, 1)
    exact = hyper._replace(lr=hyper.lr.double(), weight_decay=hyper.weight_decay.double())
    if config.rule in BY_BETA1:
        share = spread(config.beta1, nesterov=False)
    else:
        mu = 0.0 if config.averaging == "none" else hyper.momentum.item()
        share = spread(mu, nesterov=config.nesterov)
    weight = torch.ones((), dtype=torch.float64)
    group.step.shrink(weight, torch.zeros_like(weight), exact)
    return math.sqrt(2 * (1 - weight.item()) * share)


def _is_a_walk(config: RuleConfig) -> bool:
    """Whether a step is one average of gradients, turned into a direction, and nothing else holds the weights."""
    averages = config.rule in BY_BETA1 or (isinstance(config, Averaged) and config.averages == 1)
    constrained = config.constraint != "none" or config.extra.radial_brake or config.rule in APART
    return averages and not constrained and config.graft.rule == "none" and not config.extra.lr_factors


def spread(mu: float, *, nesterov: bool) -> float:
    """sum c_k^2 / (sum c_k)^2 of a running average's weights c_k = mu^k; with Nesterov's c_0 = 1 + mu, c_k = mu^(k + 1)."""
    return (1 - mu) / (1 + mu) * (1 + 2 * mu - 2 * mu**3 if nesterov else 1)
