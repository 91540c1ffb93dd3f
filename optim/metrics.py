"""Metrics of an optimizer step, from the weights before and after it; and the angle per step that theory predicts.

Tensors: before_Kmn and after_Kmn are K stacked matrices, m rows, n columns.
"""

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
CHUNK_ELEMENTS = 2**24  # numbers that are measured at once: 128 MB in float64


class StepMetrics:
    """Copies the weights before a step and compares them with those after it."""

    def __init__(self, comm: Comm) -> None:
        self._comm = comm
        self._before: list[tuple[Bank, Tensor]] = []

    def remember(self, banks: Sequence[Bank]) -> None:
        """Copy this rank's shard of the weights; call it before the step."""
        self._before = [(bank, bank.weights[bank.shard].clone()) for bank in banks]

    @torch.no_grad()
    def by_role(self, values: Values) -> Metrics:
        """Return the metrics of each role (`role_metrics`, and lr), and drop the copies; {} without copies.

        A collective: every rank must call it.
        """
        squares: dict[str, list[StepSquares]] = {}
        for bank, before in self._before:
            of_bank = step_squares(bank.group.rule.norm, as_matrices(before), bank.matrices)
            counted = of_bank if self._counts(bank) else of_bank._replace(update=0, before=0, after=0)
            squares.setdefault(bank.group.role, []).append(counted)
        groups = {bank.group.role: bank.group for bank, _ in self._before}
        self._before = []
        return {role: {"lr": groups[role].config.lr * values.lr} | role_metrics(of_role, groups[role], self._comm)
                for role, of_role in squares.items()}

    @torch.no_grad()
    def by_tensor(self, role: str) -> Metrics:
        """Return `angle` and `update_ratio` of each tensor of a role (see `rotation`); without tensors that were zero.

        A collective. The copies stay, for `by_role`.
        """
        names, squares = [], []
        for bank, before in self._before:
            if bank.group.role == role:
                of_bank_K3 = squares_by_tensor(bank, before)
                names += bank.names
                squares += (of_bank_K3 if self._counts(bank) else torch.zeros_like(of_bank_K3)).flatten().tolist()
        totals = self._comm.sum(*squares)
        triples = zip(names, totals[0::3], totals[1::3], totals[2::3], strict=True)
        return {name: rotation(update, before, after) for name, update, before, after in triples if before}

    def _counts(self, bank: Bank) -> bool:
        """True if this rank's numbers enter the sum over ranks: of a bank that every rank has whole, only rank 0's."""
        return bank.sharded or self._comm.rank == 0


class StepSquares(NamedTuple):
    """Squared Frobenius norms of one step of a stack, and the size of its weights."""

    update: float
    """Of the weights' change."""
    before: float
    """Of the weights before the step."""
    after: float
    """Of the weights after the step."""
    size: float
    """Largest size of a matrix after the step, in the rule's norm."""


def step_squares(norm: Norm, before_Kmn: Tensor, after_Kmn: Tensor) -> StepSquares:
    """Return the squared norms of a step, summed in float64, as the change may be far smaller than the weights."""
    if after_Kmn.device.type == "mps":  # has neither float64 nor eigenvalues
        before_Kmn, after_Kmn = before_Kmn.cpu(), after_Kmn.cpu()
    sums = after_Kmn.new_zeros(3, dtype=torch.float64)
    # In chunks: float64 copies of a whole table of n-grams would take 9 GB.
    for before, after in zip(*(w.flatten().split(CHUNK_ELEMENTS) for w in (before_Kmn, after_Kmn)), strict=True):
        before, after = before.double(), after.double()
        sums += torch.stack([(after - before).square().sum(), before.square().sum(), after.square().sum()])
    size = norm.size(after_Kmn.float()).max().item() if after_Kmn.numel() else 0.0
    return StepSquares(*sums.tolist(), size)


def role_metrics(squares: list[StepSquares], group: ParamGroup, comm: Comm) -> dict[str, float]:
    """Return metrics of a group from its banks' squares, over all ranks; a collective.

    `update_rms`, `weight_rms`: root mean square of the change and of the weights; `weight_size`: the largest size in the
    rule's norm; `angle`: between the weights before and after, all as one vector, in radians.
    """
    elements = sum(param.numel() for param in group.params.values())
    update, before, after = comm.sum(sum(s.update for s in squares), sum(s.before for s in squares),
                                     sum(s.after for s in squares))
    return {"update_rms": (update / elements) ** 0.5, "weight_rms": (after / elements) ** 0.5,
            "weight_size": comm.max(max(s.size for s in squares))[0],
            "angle": angle_between(update, before, after)}


def angle_between(difference: float, first: float, second: float) -> float:
    """Return the angle between vectors a and b in radians, from |a - b|^2, |a|^2 and |b|^2; pi / 2 if one of them is zero.

    Uses the half angle, |a - b|^2 = (|a| - |b|)^2 + 4 |a| |b| sin^2(angle / 2), because the cosine of an angle below 1e-8
    rounds to 1 in float64.
    """
    a, b = first**0.5, second**0.5
    if not a * b:
        return math.pi / 2
    return 2 * math.asin(min(1.0, (max(0.0, difference - (a - b) ** 2) / (4 * a * b)) ** 0.5))


def squares_by_tensor(bank: Bank, before: Tensor) -> Tensor:
    """Return |change|^2, |before|^2 and |after|^2 of each of a bank's K parameters, (K, 3), float64 on the CPU.

    `before` is this rank's shard of the weights before the step; what other ranks own counts as zero.
    """
    old, new = (w.cpu().double().reshape(len(w), math.prod(w.shape[1:])) for w in (before, bank.weights[bank.shard]))
    whole = torch.zeros(len(bank.weights), 3, dtype=torch.float64)
    whole[bank.shard] = torch.stack([x.square().sum(1) for x in (new - old, old, new)], dim=1)
    # A parameter may be cut between ranks, anywhere in the shard dimension: sum over its rows or elements.
    return torch.stack([whole[part].sum(0) for part in bank.parts])


def rotation(update: float, before: float, after: float) -> dict[str, float]:
    """Return a tensor's `angle` between before and after, in radians, and `update_ratio` = |change| / |before|."""
    return {"angle": angle_between(update, before, after), "update_ratio": (update / before) ** 0.5}


# ---- Rotational equilibrium -----------------------------------------------------------------------------------------------
# Random gradients make the weights longer, weight decay makes them shorter. Where the two cancel, the weights turn by a
# constant angle per step. It does not depend on the gradients' size, nor on the step's unit unless decay does (Kosson et al.
# 2023, arXiv 2305.17212; Wan et al. 2020, arXiv 2006.08419).

BETA1_RULES = ("adam", "soap")  # rules whose running average has the coefficient beta1
SEPARATE_LENGTH_RULES = ("muown", "stiefel")  # rules that set the weights' lengths apart from their directions


def equilibrium_angle(group: ParamGroup, values: Values) -> float | None:
    """Return the angle per step at equilibrium, sqrt(2 d s), in radians; None if the theory does not apply.

    d is the share of the weights that one step's decay removes, s the `variance_ratio` of the gradient average. For AdamW
    this is sqrt(2 lr wd (1 - beta1) / (1 + beta1)), for Muon likewise. s enters because consecutive steps along an average
    are correlated and add up to more than independent ones. Exact for directions linear in the average; measured on random
    gradients, Muon turns the weights by 1.1 times and a sign by 1.2 times as much. None without decay, with cautious decay,
    and for constrained weights.
    """
    if group.step.decay in ("none", "cautious", "cautious_moving") or not _is_random_walk(group.config):
        return None
    config, hyper = group.config, Hyper.at(group.config, values, 1)
    if config.rule in BETA1_RULES:
        ratio = variance_ratio(config.beta1, nesterov=False)
    else:
        mu = 0.0 if config.averaging == "none" else hyper.momentum.item()
        ratio = variance_ratio(mu, nesterov=config.nesterov)
    # Measure d on a weight of 1, so that every kind of decay is covered; in float64, because 1 - d may round to 1.
    hyper = hyper._replace(lr=hyper.lr.double(), weight_decay=hyper.weight_decay.double())
    weight = torch.ones((), dtype=torch.float64)
    group.step.apply_decay(weight, torch.zeros_like(weight), hyper)
    return math.sqrt(2 * (1 - weight.item()) * ratio)


def _is_random_walk(config: RuleConfig) -> bool:
    """True if a step follows one average of the gradients, and nothing but decay limits the weights."""
    one_average = config.rule in BETA1_RULES or (isinstance(config, Averaged) and config.averages == 1 and not config.kernel)
    constrained = config.constraint != "none" or config.extra.radial_brake or config.rule in SEPARATE_LENGTH_RULES
    return one_average and not constrained and config.graft.rule == "none" and not config.extra.lr_factors


def variance_ratio(mu: float, *, nesterov: bool) -> float:
    """Return sum c_k^2 / (sum c_k)^2 of an average's weights c_k on past gradients: its variance for random gradients.

    c_k = mu^k; with Nesterov's look-ahead c_0 = 1 + mu, c_k = mu^(k + 1).
    """
    return (1 - mu) / (1 + mu) * (1 + 2 * mu - 2 * mu**3 if nesterov else 1)
