"""What a step did to a group of tensors, from the weights before and after it."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from optim.bank import Bank
from optim.comm import Comm
from optim.norms import Norm

Measures = dict[str, dict[str, float]]  # role > name > value


class Moments(NamedTuple):
    """Of a stack: squared length of the step, of the old and the new weights; and the largest size in the rule's norm."""

    moved: float
    old: float
    new: float
    size: float

    def without_sums(self) -> "Moments":
        """For a stack that another rank counts already."""
        return Moments(0, 0, 0, self.size)


def moments_of(norm: Norm, before_Kmn: Tensor, after_Kmn: Tensor) -> Moments:
    """The moments of a step, summed in float64."""
    if after_Kmn.device.type == "mps":  # which has neither float64 nor eigenvalues
        before_Kmn, after_Kmn = before_Kmn.cpu(), after_Kmn.cpu()
    old, new = before_Kmn.double(), after_Kmn.double()
    sums = torch.stack([(new - old).square().sum(), old.square().sum(), new.square().sum()])
    size = norm.size(after_Kmn.float()).max().item() if after_Kmn.numel() else 0.0
    return Moments(*sums.tolist(), size)


def summarise(moments: list[Moments], elements: int, comm: Comm) -> dict[str, float]:
    """Over a group's stacks and all ranks, `elements` in all: update_rms, weight_rms, weight_size (the largest), and angle,
    in radians, between the weights before and after. A collective."""
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
