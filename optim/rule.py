"""What every rule is: a map from gradients to directions D, with state; and the step W <- W - lr D, the same for all rules.

Everything here sees stacks of matrices (K, m, n): a vector is a matrix of one row, a rank's share may be any K, even 0.
State tensors start with K; where a rule's `scope` is row, with (1, rows); where it is element, with (1, elements).
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from configs.optim import RuleConfig
from optim.constraint import Constraint, Scope
from optim.schedule import Values

if TYPE_CHECKING:
    from optim.norms import Norm

# Where each constraint set is; its module is imported when a role names it.
CONSTRAINTS = {"hyperball": "optim.zoo.hyperball:Hyperball", "radial": "optim.zoo.radial:Radial",
               "sphere": "optim.zoo.sphere:Sphere", "stiefel": "optim.zoo.stiefel:StiefelSet"}


def load_class(place: str) -> type:
    """The class at `module:Class`, its module imported only now."""
    module, name = place.split(":")
    return getattr(import_module(module), name)


def coarsest(*scopes: Scope) -> Scope:
    """The coarsest of several scopes."""
    return next(scope for scope in ("matrix", "row", "element") if scope in scopes)


class Hyper(NamedTuple):
    """Numbers that change from step to step, as 0-D float32 tensors (Python floats would recompile every step)."""

    lr: Tensor
    weight_decay: Tensor
    momentum: Tensor
    count: Tensor
    """Updates so far, this one included: 1, 2, ..."""
    shared: dict[str, Tensor] = {}  # noqa: RUF012
    """Numbers of the whole role, float32 0-D: what the rule's `init_shared` returned and its `update_shared` updates."""

    @classmethod
    def at(cls, config: RuleConfig, values: Values, count: int, shared: dict[str, Tensor] | None = None) -> "Hyper":
        """A rule's numbers at the schedule's `values`; `count` steps so far, this one included."""
        own = getattr(config, "momentum", getattr(config.graft, "momentum", 0.0))  # one for both rules of a graft
        momentum = own if values.momentum is None else values.momentum
        numbers = (config.lr * values.lr, config.weight_decay * values.weight_decay, momentum, count // config.update_every)
        return cls(*(torch.tensor(x, dtype=torch.float32) for x in numbers), shared or {})


@dataclass(frozen=True, slots=True)
class Step:
    """How the weights of a group move along their directions.

    decay: none; decoupled W <- (1 - lr wd) W (Loshchilov & Hutter 2017, arXiv 1711.05101); independent (1 - wd lr/peak),
    so that wd does not depend on the peak; corrected (1 - lr wd lr/peak) (Defazio 2025, arXiv 2506.02285); cautious:
    decoupled, only where D W >= 0, that is where the step shrinks the weight anyway (Chen et al. 2025, arXiv 2510.12402).

    constraint: the set that the weights stay in; None: all of space. shape: what may change a direction before all that
    (optim/zoo/radial.py: a brake on growth, a floor under rows); None: nothing.

    rounding of weights in bfloat16: nearest; stochastic, up or down by a hash of the weight, right in the mean; remainder:
    what rounding to the nearest drops of the float32 weight is state, 16 bits, so that nothing is lost.
    """

    decay: str = "none"
    peak_lr: float = 0.0
    constraint: Constraint | None = None
    rounding: str = "nearest"
    shape: "object | None" = None

    @classmethod
    def build(cls, config: RuleConfig) -> "Step":
        """The step that a rule's configuration describes."""
        constraint = "stiefel" if config.rule == "stiefel" else config.constraint
        shaped = config.extra.radial_brake or config.extra.row_floor
        return cls(config.decay if config.weight_decay else "none", config.lr,
                   load_class(CONSTRAINTS[constraint]).build(config) if constraint != "none" else None, config.rounding,
                   load_class("optim.zoo.radial:Shape")(config.extra.radial_brake, config.extra.row_floor) if shaped else None)

    def with_axis(self, axis: int) -> "Step":
        """The same for tensors whose model dimension is `axis`, -1 or -2."""
        return self if self.constraint is None else replace(self, constraint=self.constraint.with_axis(axis))

    @property
    def scope(self) -> Scope:
        """How finely a tensor may be cut and each part stepped alone."""
        return coarsest("element", *(part.scope for part in (self.constraint, self.shape) if part is not None))

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """State that the step needs of weights (K, m, n): names begin with `step_`."""
        state = {} if self.constraint is None else self.constraint.init_state(param)
        if self.rounding == "remainder" and param.dtype == torch.bfloat16:
            state["step_remainder"] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def project_start(self, param: Tensor) -> None:
        """Bring the first weights into the constraint set, in place."""
        if self.constraint is not None:
            weights = param.float()
            self.constraint.project_start(weights)
            param.copy_(weights)

    def apply(self, param: Tensor, direction: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
        """W <- W - lr D, in place, computed in at least float32."""
        weights = self.exact(param, state) if "step_remainder" in state else param.float()
        direction = direction.float() if self.shape is None else self.shape(weights, direction.float())
        if self.decay != "none":
            self.shrink(weights, direction, hyper)
        if self.constraint is None:
            weights.sub_(direction * hyper.lr)
        else:
            self.constraint.move(weights, direction, hyper.lr, state)
        if weights is not param:  # weights in bfloat16 were stepped as a float32 copy
            self.round(param, weights, state, hyper.count)

    def shrink(self, weights: Tensor, direction: Tensor, hyper: Hyper) -> None:
        """The decay of one step, in place."""
        if self.decay == "decoupled":
            weights.mul_(1 - hyper.lr * hyper.weight_decay)
        elif self.decay == "independent" and self.peak_lr > 0:
            weights.mul_(1 - hyper.lr / self.peak_lr * hyper.weight_decay)
        elif self.decay == "corrected" and self.peak_lr > 0:
            weights.mul_(1 - hyper.lr * hyper.weight_decay * hyper.lr / self.peak_lr)
        elif self.decay == "cautious":
            weights.sub_(weights * (direction * weights >= 0) * (hyper.lr * hyper.weight_decay))

    def exact(self, param: Tensor, state: dict[str, Tensor]) -> Tensor:
        """The float32 weights: the parameter itself if it is float32; else its value, with the remainder if there is one."""
        if "step_remainder" not in state:
            return param.float()
        high = param.view(torch.int16).to(torch.int32) << 16
        return (high + state["step_remainder"].to(torch.int32)).view(torch.float32)

    def place(self, param: Tensor, weights: Tensor, state: dict[str, Tensor], count: int) -> None:
        """Put the weights at the point of the constraint set nearest to float32 `weights`, which is overwritten."""
        if self.constraint is not None:
            self.constraint.retract(weights, state)
        self.round(param, weights, state, torch.tensor(count))

    def round(self, param: Tensor, weights: Tensor, state: dict[str, Tensor], count: Tensor) -> None:
        """Store float32 `weights` in `param`, rounded as configured."""
        if self.rounding == "nearest" or param.dtype != torch.bfloat16:
            param.copy_(weights)
            return
        bits = weights.contiguous().view(torch.int32)
        if self.rounding == "stochastic":  # the carry of a random 16-bit number rounds up with the right probability
            high = (bits + hash_bits(bits, count)) >> 16
        else:
            high = (bits + 0x8000) >> 16  # to the nearest, so that the remainder fits 16 bits with its sign
            state["step_remainder"].copy_(bits - (high << 16))
        param.view(torch.int16).copy_(high)


def hash_bits(bits: Tensor, count: Tensor) -> Tensor:
    """16 pseudo-random bits for every element, as int32: a hash of the weight and the step, so that it is the same however
    the weights are divided among ranks, and needs no generator to be saved (finaliser of MurmurHash3)."""
    x = bits.to(torch.int64) + count.to(torch.int64) * 0x9E3779B9 & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFF).to(torch.int32)


class Rule:
    """The base of all rules: a new one defines `direction`, and overrides the rest where it must.

    A rule is pure mathematics on stacked tensors. It knows no process group, no parameter's name, no schedule.
    """

    norm: "Norm"
    """The norm whose steepest descent it is, given or learned (without averages)."""
    compiles: ClassVar[bool] = True
    """Whether `update` is one graph; not where it does other work at some steps, or needs eigenvectors."""

    def __init__(self, config: RuleConfig) -> None:
        self.config = config

    @property
    def scope(self) -> Scope:
        """How finely a tensor may be cut and each part updated alone."""
        return self.norm.scope

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """The first state for the weights `param`, of its dtype unless more is needed; here none."""
        return {}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """The direction D of the step W <- W - lr D, a new tensor of `grad`'s shape; updates `state` in place."""
        raise NotImplementedError

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """The whole step, in place: the direction, then `step`; or a faster equal."""
        step.apply(param, self.direction(param, grad, state, hyper), state, hyper)

    # ---- Rules that need sums over their whole role, on all ranks (agd, prodigy) ----

    def init_shared(self) -> dict[str, Tensor]:
        """Numbers that the whole role shares, float32 0-D; none for most rules."""
        return {}

    def sums(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """This stack's part, float32 (s,), of sums over the role that must be known before any `direction`."""
        raise NotImplementedError

    def update_shared(self, sums: Tensor, hyper: Hyper) -> None:
        """Update `hyper.shared` in place by the sums over all stacks and ranks."""


def zeros_like_bank(param: Tensor) -> Tensor:
    """Zeros of the parameter's shape, dtype and device: the start of an average."""
    return torch.zeros_like(param, memory_format=torch.contiguous_format)


def update_second_moment(average: Tensor, grad: Tensor, beta: float) -> None:
    """v <- beta v + (1 - beta) g^2, in place; squares beyond float32 count as its largest number, so that one huge gradient
    is forgotten like any other."""
    square = grad.float().square().clamp_max_(torch.finfo(torch.float32).max)
    average.mul_(beta).add_(square.mul_(1 - beta).to(average.dtype))
