"""What every update rule is: a map from gradients to descent directions, with a memory; on stacked matrices (K, m, n)."""

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from configs.groups import Group
from optim.norms import Norm, Scope
from optim.step import Step


class Hyper(NamedTuple):
    """Numbers that change from step to step, as 0-D float32 tensors (Python floats would recompile every step)."""

    lr: Tensor
    weight_decay: Tensor
    momentum: Tensor
    count: Tensor
    """Updates so far, this one included: 1, 2, ..."""
    shared: dict[str, Tensor] = {}  # noqa: RUF012
    """Numbers of the whole group, float32 0-D: what the rule's `init_shared` returned and its `absorb` keeps up."""


class Rule:
    """The base of all rules: a new rule defines build, init_state and direction, and overrides the rest where it must.

    It sees stacks of matrices (K, m, n): a vector is a matrix of one row; a rank's share may be any K, even 0. State
    tensors start with K; where `scope` is row, with (1, rows); where it is element, with (1, elements).
    """

    __slots__ = ()
    norm: Norm
    """The norm whose steepest descent it is, given or learned (without averages)."""
    compiles: ClassVar[bool] = True
    """Whether `update` is one graph; not where it does other work at some steps, or needs eigenvectors."""

    @property
    def scope(self) -> Scope:
        """How finely a tensor may be cut and each part updated alone: element, row or matrix."""
        return self.norm.scope

    @classmethod
    def build(cls, group: Group) -> "Rule":
        """The rule that a group's configuration describes."""
        raise NotImplementedError

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The memory of the weights `param`, of its dtype unless more is needed."""
        raise NotImplementedError

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The direction D of the step W <- W - lr D, a new tensor of `grad`'s shape; updates `state` in place."""
        raise NotImplementedError

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """The whole step, in place: the direction, then `step`; or a faster equal."""
        step.apply(param, self.direction(param, grad, state, hyper), state, hyper)

    # ---- Rules that need sums over their whole group, on all ranks ----

    def init_shared(self) -> dict[str, Tensor]:
        """Numbers that the whole group shares, float32 0-D; none for most rules."""
        return {}

    def sums(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor | None:
        """This stack's part, float32 (s,), of sums over the group that must be known before any `direction`; or None."""
        return None

    def absorb(self, sums: Tensor, hyper: Hyper) -> None:
        """Update `hyper.shared` in place by the sums over all stacks and ranks."""


def zeros_like_bank(param: Tensor) -> Tensor:
    """A zero memory of the parameter's shape, dtype and device."""
    return torch.zeros_like(param, memory_format=torch.contiguous_format)
