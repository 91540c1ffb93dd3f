"""What every update rule is: a direction for a stack of tensors; and how a direction becomes a step with decay."""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from configs.schema import Group
from optim.norms import Norm


class Hyper(NamedTuple):
    """Numbers that change from step to step, as 0-D float32 tensors (Python floats would recompile every step)."""

    lr: Tensor
    weight_decay: Tensor
    momentum: Tensor
    count: Tensor
    """Updates so far, this one included: 1, 2, ..."""


class Decay(NamedTuple):
    """A group's kind of weight decay, and its lr before the curve."""

    kind: str
    peak_lr: float


class Rule(Protocol):
    """A map from gradients to descent directions, with a memory."""

    norm: Norm
    """The norm whose steepest descent it is (without averages); its scope says how finely a tensor may be cut."""

    @classmethod
    def build(cls, group: Group) -> "Rule":
        """The rule that a group's configuration describes."""

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Zeroed memory for `param`; every entry's first dimension is the parameter's first dimension."""

    def direction(self, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The direction D of the step W <- W - lr D, a new tensor of `grad`'s shape; updates `state` in place."""

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, decay: Decay) -> None:
        """The whole step, in place: `apply_step` of the direction, or a faster equal."""


def apply_step(param: Tensor, direction: Tensor, hyper: Hyper, *, decay: Decay) -> None:
    """W <- W - lr D with weight decay, in place, computed in at least float32.

    none; decoupled: W <- (1 - lr wd) W (Loshchilov & Hutter 2017, arXiv 1711.05101); independent: W <- (1 - wd
    lr/peak_lr) W, so that wd does not depend on the peak; cautious: decoupled, only where D W >= 0, that is where the
    step shrinks the weight anyway (Chen et al. 2025, arXiv 2510.12402).
    """
    weights, direction = param.float(), direction.float()
    if decay.kind == "decoupled":
        weights.mul_(1 - hyper.lr * hyper.weight_decay)
    elif decay.kind == "independent" and decay.peak_lr > 0:
        weights.mul_(1 - hyper.lr / decay.peak_lr * hyper.weight_decay)
    elif decay.kind == "cautious":
        weights.sub_(weights * (direction * weights >= 0) * (hyper.lr * hyper.weight_decay))
    weights.sub_(direction * hyper.lr)
    if weights is not param:
        param.copy_(weights)


def zeros_like_bank(param: Tensor) -> Tensor:
    """A zero memory of the parameter's shape, dtype and device."""
    return torch.zeros_like(param, memory_format=torch.contiguous_format)
