"""Rule: a map from gradients to a direction D, with state. Step: the update W <- W - lr D, the same for all rules.

All tensors are stacks of matrices (K, m, n); a vector is a matrix of one row. One rank's shard may have any K, even 0.
State tensors have K first; for rules of scope row they begin with (1, rows), for scope element with (1, elements).
"""

from dataclasses import dataclass, replace
from importlib import import_module
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import torch
from torch import Tensor

from configs.optim import Adam, RuleConfig
from optim.constraint import Constraint, Scope
from optim.schedule import Values

if TYPE_CHECKING:
    from optim.norms import Norm

# Class of each constraint set. Its module is imported when a role uses the set.
CONSTRAINTS = {"hyperball": "optim.zoo.hyperball:Hyperball", "radial": "optim.zoo.radial:Radial",
               "sphere": "optim.zoo.sphere:Sphere", "stiefel": "optim.zoo.stiefel:StiefelSet"}


def load_class(path: str) -> type:
    """Import the module of `module:Class` and return the class."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


def coarsest(*scopes: Scope) -> Scope:
    """Return the coarsest of several scopes."""
    return next(scope for scope in ("matrix", "row", "element") if scope in scopes)


class Hyper(NamedTuple):
    """Hyperparameters that change from step to step, as 0-D float32 tensors on the CPU.

    torch.compile would make a Python float part of the graph, and compile again for each new value. Creating CPU tensors
    waits for no device, and operations on GPU tensors accept them.
    """

    lr: Tensor
    """Learning rate of this step: config times schedule."""
    weight_decay: Tensor
    """Weight decay of this step: config times schedule."""
    momentum: Tensor
    """Momentum of this step: the schedule's, or else the config's."""
    count: Tensor
    """Number of this update: 1, 2, ..."""
    shared: dict[str, Tensor] = {}  # noqa: RUF012
    """Numbers that the whole role shares, 0-D float32: created by the rule's `init_shared`, updated by `update_shared`."""
    step: Tensor | None = None
    """Number of this step, of which an update may add up several."""
    period: Tensor | None = None
    """Number of steps whose gradients this update adds up; None: 1."""

    @classmethod
    def at(cls, config: RuleConfig, values: Values, count: int, shared: dict[str, Tensor] | None = None) -> "Hyper":
        """Return a rule's hyperparameters at step `count` (1 is the first), with the schedule's `values` applied."""
        configured = getattr(config, "momentum", getattr(config.graft, "momentum", 0.0))  # one for both rules of a graft
        momentum = configured if values.momentum is None else values.momentum
        numbers = (config.lr * values.lr, config.weight_decay * values.weight_decay, momentum, config.updates(count))
        lr, weight_decay, momentum, updates, step, period = (
            torch.tensor(x, dtype=torch.float32) for x in (*numbers, count, config.period(count)))
        return cls(lr, weight_decay, momentum, updates, shared or {}, step, period if config.longest_period > 1 else None)


@dataclass(frozen=True, slots=True)
class Step:
    """Update of a group's weights along their directions: shape the direction, decay, subtract, constrain, round.

    Decay acts on the weights before the step, as in AdamW. The constraint comes later, so that the step ends in the set.
    Rounding comes last and once: bfloat16 has 8 bits of precision, and would lose a decay below 1/512 of the weight.
    """

    decay: str = "none"
    """Weight decay: none; decoupled W <- (1 - lr wd) W (Loshchilov & Hutter 2017, arXiv 1711.05101); independent
    (1 - wd lr / peak_lr), so that wd does not depend on the peak; corrected (1 - lr wd lr / peak_lr) (Defazio 2025,
    arXiv 2506.02285); cautious: decoupled, only in elements with D W >= 0, where the step shrinks the weight anyway (Chen et
    al. 2025, arXiv 2510.12402); cautious_moving, for Adam: only with D W > 0, so that
    rows of tokens that never occurred rest."""
    peak_lr: float = 0.0
    """Learning rate before the schedule."""
    constraint: Constraint | None = None
    """Set that the weights stay in; None: no constraint."""
    rounding: str = "nearest"
    """Rounding of weights stored in bfloat16: nearest; stochastic: up or down by a hash of the weight, right in the mean;
    remainder: nearest, with what it drops of the float32 weight as 16 bits of state, so that nothing is lost."""
    shape: "object | None" = None
    """Change of the direction before all else (optim.zoo.radial.Shape: brake on growth, floor under rows); None: none."""

    @classmethod
    def build(cls, config: RuleConfig) -> "Step":
        """Return the step that a rule's config describes."""
        constraint, shape, extra = None, None, config.extra
        constraint_name = "stiefel" if config.rule == "stiefel" else config.constraint
        if constraint_name != "none":
            constraint = load_class(CONSTRAINTS[constraint_name]).build(config)
        if extra.radial_brake or extra.row_floor:
            shape = load_class("optim.zoo.radial:Shape")(extra.radial_brake, extra.row_floor)
        decay = config.decay if config.weight_decay else "none"
        decay = "cautious_moving" if decay == "cautious" and isinstance(config, Adam) else decay
        return cls(decay, config.lr, constraint, config.rounding, shape)

    def with_axis(self, axis: int) -> "Step":
        """Return this step for tensors whose model dimension is `axis`, -1 or -2."""
        return self if self.constraint is None else replace(self, constraint=self.constraint.with_axis(axis))

    @property
    def scope(self) -> Scope:
        """Finest piece of a tensor that can take the step alone."""
        return coarsest("element", *(part.scope for part in (self.constraint, self.shape) if part is not None))

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the state that the step needs for weights (K, m, n); keys begin with `step_`."""
        state = {} if self.constraint is None else self.constraint.init_state(param)
        if self.rounding == "remainder" and param.dtype == torch.bfloat16:
            state["step_remainder"] = torch.zeros_like(param, dtype=torch.int16)
        return state

    def project_start(self, param: Tensor) -> None:
        """Project the initial weights into the constraint set, in place."""
        if self.constraint is not None:
            weights = param.float()
            self.constraint.project_start(weights)
            param.copy_(weights)

    def apply(self, param: Tensor, direction: Tensor, state: dict[str, Tensor], hyper: Hyper) -> None:
        """Update the parameter in place: W <- W - lr D with decay, constraint and rounding, computed in float32."""
        # Float32 weights and direction. float() of a float32 parameter is the parameter itself, which is then updated.
        weights = self.float32_weights(param, state)
        direction = direction.float() if self.shape is None else self.shape(weights, direction.float())
        # Decay, from the weights before the step.
        if self.decay != "none":
            self.apply_decay(weights, direction, hyper)
        # Subtract, within the constraint set.
        if self.constraint is None:
            weights.sub_(direction * hyper.lr)
        else:
            self.constraint.move(weights, direction, hyper.lr, state)
        # Round a bfloat16 parameter from its float32 copy.
        if weights is not param:
            self.store(param, weights, state, hyper.count)

    def apply_decay(self, weights: Tensor, direction: Tensor, hyper: Hyper) -> None:
        """Apply one step's weight decay, in place."""
        if self.decay == "decoupled":
            weights.mul_(1 - hyper.lr * hyper.weight_decay)
        elif self.decay == "independent" and self.peak_lr > 0:
            weights.mul_(1 - hyper.lr / self.peak_lr * hyper.weight_decay)
        elif self.decay == "corrected" and self.peak_lr > 0:
            weights.mul_(1 - hyper.lr * hyper.weight_decay * hyper.lr / self.peak_lr)
        elif self.decay == "cautious":
            weights.sub_(weights * (direction * weights >= 0) * (hyper.lr * hyper.weight_decay))
        elif self.decay == "cautious_moving":
            weights.sub_(weights * (direction * weights > 0) * (hyper.lr * hyper.weight_decay))

    def float32_weights(self, param: Tensor, state: dict[str, Tensor]) -> Tensor:
        """Return the weights in float32: a float32 parameter itself, else a copy, with the remainder if there is one."""
        if "step_remainder" not in state:
            return param.float()
        # A bfloat16 number is the upper half of a float32 number. Put it there, and add the signed remainder to the bits.
        high = param.view(torch.int16).to(torch.int32) << 16
        return (high + state["step_remainder"].to(torch.int32)).view(torch.float32)

    def set_weights(self, param: Tensor, weights: Tensor, state: dict[str, Tensor], count: int) -> None:
        """Set the parameter to float32 `weights`, retracted to the constraint set and rounded. Overwrites `weights`."""
        if self.constraint is not None:
            self.constraint.retract(weights, state)
        self.store(param, weights, state, torch.tensor(count))

    def store(self, param: Tensor, weights: Tensor, state: dict[str, Tensor], count: Tensor) -> None:
        """Write float32 `weights` into `param`, rounded as configured if it is bfloat16; `count` varies the random bits."""
        if self.rounding == "nearest" or param.dtype != torch.bfloat16:
            param.copy_(weights)
            return
        # As integers, so that rounding is arithmetic on bits: bfloat16 keeps the upper 16 of float32's 32.
        bits = weights.contiguous().view(torch.int32)
        if self.rounding == "stochastic":
            # Add a random number below 2^16, then drop the lower half. If that half was r, the sum carries into the upper
            # half with probability r / 2^16, which rounds away from zero: the mean is exact.
            high = (bits + hash_bits(bits, count)) >> 16
        else:
            # Add half a unit, then drop the lower half: round to nearest. The difference to the original bits then lies in
            # [-2^15, 2^15) and fits int16.
            high = (bits + 0x8000) >> 16
            state["step_remainder"].copy_(bits - (high << 16))
        param.view(torch.int16).copy_(high)


def hash_bits(bits: Tensor, count: Tensor) -> Tensor:
    """Return 16 pseudo-random bits for every element, as int32: a hash of the weight's bits and the step.

    Unlike a generator, a hash gives the same bits however weights are divided among ranks, and has no state to save. It is
    the finaliser of MurmurHash3; 0x9E3779B9, 2^32 over the golden ratio, spreads consecutive steps. Computed in int64 and
    cut to 32 bits, because PyTorch's >> keeps the sign.
    """
    x = bits.to(torch.int64) + count.to(torch.int64) * 0x9E3779B9 & 0xFFFFFFFF
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return ((x ^ (x >> 16)) & 0xFFFF).to(torch.int32)


class Rule:
    """Base of all rules. A new rule defines `norm`, `init_state` and `direction`, and overrides others if it must.

    A rule is mathematics on stacked tensors: it knows no process group, no parameter names and no schedule.
    """

    norm: "Norm"
    """Norm whose steepest descent the rule is without averages; metrics measure weights in it."""
    compiles: ClassVar[bool] = True
    """True if `update` compiles into one graph; False for rules that do other work at some steps, or need eigenvectors."""

    def __init__(self, config: RuleConfig) -> None:
        self.config = config

    @property
    def scope(self) -> Scope:
        """Finest piece of a tensor that can be updated alone."""
        return self.norm.scope

    def init_state(self, param: Tensor) -> dict[str, Tensor]:
        """Return the initial state for weights `param`, in its dtype unless more is needed; none by default."""
        return {}

    def direction(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return the direction D of the step W <- W - lr D, a new tensor of grad's shape; update `state` in place."""
        raise NotImplementedError

    def update(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper, *, step: Step) -> None:
        """Update `param` and `state` in place: compute the direction, then apply `step`. Override it for a faster equal."""
        step.apply(param, self.direction(param, grad, state, hyper), state, hyper)

    # ---- For rules that need sums over their whole role and all ranks (agd, prodigy) ----

    def init_shared(self) -> dict[str, Tensor]:
        """Return the numbers that the whole role shares, 0-D float32; none by default."""
        return {}

    def sums(self, param: Tensor, grad: Tensor, state: dict[str, Tensor], hyper: Hyper) -> Tensor:
        """Return this stack's part, float32 (s,), of the role's s sums; called before any `direction` of the step."""
        raise NotImplementedError

    def update_shared(self, sums: Tensor, hyper: Hyper) -> None:
        """Update `hyper.shared` in place from the sums over all stacks and ranks, (s,)."""


def zeros_like_bank(param: Tensor) -> Tensor:
    """Return contiguous zeros of the parameter's shape, dtype and device, also if it is a transposed view."""
    return torch.zeros_like(param, memory_format=torch.contiguous_format)


def update_second_moment(average: Tensor, grad: Tensor, beta: float) -> None:
    """Update v <- beta v + (1 - beta) g^2, in place.

    Squares are clamped to float32's largest number: an infinite one would stay in v for ever, a huge one fades.
    """
    square = grad.float().square().clamp_max_(torch.finfo(torch.float32).max)
    average.mul_(beta).add_(square.mul_(1 - beta).to(average.dtype))
