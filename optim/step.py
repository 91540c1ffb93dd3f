"""From a direction to a step: W <- W - lr D with decay, constraint and rounding, the same for every rule."""

from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from configs.groups import Group
from optim.constraints import Free, build_constraint
from optim.norms import Scope
from optim.shape import Shape


class Rates(Protocol):
    """What a step needs of optim.rules.Hyper."""

    lr: Tensor
    weight_decay: Tensor
    count: Tensor


@dataclass(frozen=True, slots=True)
class Step:
    """How the weights of a group move along their directions.

    decay: none; decoupled W <- (1 - lr wd) W (Loshchilov & Hutter 2017, arXiv 1711.05101); independent (1 - wd lr/peak),
    so that wd does not depend on the peak; corrected (1 - lr wd lr/peak) (Defazio 2025, arXiv 2506.02285); cautious:
    decoupled, only where D W >= 0, that is where the step shrinks the weight anyway (Chen et al. 2025, arXiv 2510.12402).

    constraint: the set that the weights stay in; see optim/constraints.py.

    shape: what is done to a direction before all that; see optim/shape.py.

    rounding of weights in bfloat16: nearest; stochastic, up or down by a hash of the weight, right in the mean; remainder:
    what rounding to the nearest drops of the float32 weight is kept as state, 16 bits, so that nothing is lost.
    """

    decay: str = "none"
    peak_lr: float = 0.0
    constraint: Free = Free()  # noqa: RUF009
    rounding: str = "nearest"
    shape: Shape = Shape()  # noqa: RUF009

    @classmethod
    def build(cls, group: Group) -> "Step":
        """The step that a group's configuration describes."""
        return cls(group.decay if group.weight_decay else "none", group.lr, build_constraint(group), group.rounding,
                   Shape.build(group))

    def along(self, axis: int) -> "Step":
        """The same for tensors whose model dimension is `axis`, -1 or -2."""
        return replace(self, constraint=self.constraint.along(axis))

    @property
    def scope(self) -> Scope:
        """How finely a tensor may be cut and each part stepped alone."""
        return coarsest(self.constraint.scope, self.shape.scope)

    @property
    def is_plain(self) -> bool:
        """Whether it is W <- (1 - lr wd) W - lr D and then the constraint's `retract`, and nothing more."""
        return self.decay in ("none", "decoupled") and self.constraint.plain and self.rounding == "nearest" and (
                self.shape == Shape())

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """What the step remembers of weights (K, m, n): names begin with `step_`."""
        state = self.constraint.init_state(param)
        if self.rounding == "remainder" and param.dtype == torch.bfloat16:
            state["step_remainder"] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def enter(self, param: Tensor) -> None:
        """Bring the first weights into the constraint set, in place."""
        weights = param.float()
        self.constraint.enter(weights)
        if weights is not param:
            param.copy_(weights)

    def apply(self, param: Tensor, direction: Tensor, state: dict[str, Tensor], rates: Rates) -> None:
        """W <- W - lr D, in place, computed in at least float32."""
        weights = self.exact(param, state)
        direction = self.shape(weights, direction.float())
        self._shrink(weights, direction, rates)
        self.constraint.move(weights, direction, rates.lr, state)
        if weights is not param:
            self._round(param, weights, state, rates.count)

    def _shrink(self, weights: Tensor, direction: Tensor, rates: Rates) -> None:
        if self.decay == "decoupled":
            weights.mul_(1 - rates.lr * rates.weight_decay)
        elif self.decay == "independent" and self.peak_lr > 0:
            weights.mul_(1 - rates.lr / self.peak_lr * rates.weight_decay)
        elif self.decay == "corrected" and self.peak_lr > 0:
            weights.mul_(1 - rates.lr * rates.weight_decay * rates.lr / self.peak_lr)
        elif self.decay == "cautious":
            weights.sub_(weights * (direction * weights >= 0) * (rates.lr * rates.weight_decay))

    def decay_share(self, rates: Rates) -> float:
        """The share of the weights that one step's decay takes; the most of them where it is cautious."""
        whole = torch.ones((), dtype=torch.float64)
        self._shrink(whole, torch.zeros_like(whole), rates)
        return 1 - whole.item()

    def exact(self, param: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The float32 weights: the parameter itself if it is float32; else its value, with the remainder if kept."""
        if "step_remainder" not in state:
            return param.float()
        high = param.view(torch.int16).to(torch.int32) << 16
        return (high + state["step_remainder"].to(torch.int32)).view(torch.float32)

    def place(self, param: Tensor, weights: Tensor, state: dict[str, Tensor], count: int) -> None:
        """Put the weights elsewhere: at the nearest point of the constraint set to float32 `weights`, which is spent."""
        self.constraint.retract(weights, state)
        self._round(param, weights, state, torch.tensor(count))

    def _round(self, param: Tensor, weights: Tensor, state: dict[str, Tensor], count: Tensor) -> None:
        if self.rounding == "nearest" or param.dtype != torch.bfloat16:
            param.copy_(weights)
            return
        bits = weights.contiguous().view(torch.int32)
        if self.rounding == "stochastic":  # the carry of a random 16-bit number rounds up with the right probability
            high = (bits + _noise(bits, count)) >> 16
        else:
            high = (bits + 0x8000) >> 16  # to the nearest, so that the remainder fits 16 bits with its sign
            state["step_remainder"].copy_(bits - (high << 16))
        param.view(torch.int16).copy_(high)


def coarsest(*scopes: Scope) -> Scope:
    """How finely a tensor may be cut, where several have a say."""
    return next(scope for scope in ("matrix", "row", "element") if scope in scopes)


def _noise(bits: Tensor, count: Tensor) -> Tensor:
    """16 pseudo-random bits for every element, as int32: a hash of the weight and the step, so that it is the same however
    the weights are divided among ranks, and needs no generator to be saved (finaliser of MurmurHash3)."""
    x = bits.to(torch.int64) + count.to(torch.int64) * 0x9E3779B9 & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFF).to(torch.int32)
